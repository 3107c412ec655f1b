"""The size that fits is found, and a failed attempt leaves nothing behind."""

import json
import sys
import unittest
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from keras_accum import auto_size
from keras_accum import counting
from keras_accum import discovery
from keras_accum import system_memory
from tests import equivalence_test
from tests import microbatching_test
from tests import test_utils

MODES = microbatching_test.MODES
# Of a batch for models of `auto_size_cases`, where it is not 256.
ROWS = {"dense": 1024, "wide": 2048}
# Entries of an input that the model below has memory for.
ROOM = 5 * test_utils.FEATURES


@keras.saving.register_keras_serializable("tests")
class Limited(keras.layers.Layer):
    """Has not enough memory for large inputs, in the middle of a step."""

    def call(self, inputs):
        def check(size):
            if size > ROOM:
                raise MemoryError(f"No room for {size} numbers.")
            return np.int32(0)

        zero = tf.numpy_function(check, [tf.size(inputs)], tf.int32)
        zero.set_shape(())
        return inputs + tf.cast(zero, inputs.dtype)


class Shrinking(keras.layers.Dense):
    """A layer that assigns a weight that is trained, and one of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = tf.Variable(0.0, trainable=False)

    def call(self, inputs, training=None):
        if training:
            self.kernel.assign(0.9 * self.kernel)
            self.calls.assign_add(1.0)
        return super().call(inputs)


def limited(cls, constraint=None, **kwargs):
    """Returns a model with state of all kinds; some of its steps fail."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((None, test_utils.FEATURES))
    hidden = keras.layers.Dropout(0.2, seed=3)(inputs)
    hidden = keras.layers.BatchNormalization()(hidden)
    hidden = Limited()(hidden)
    hidden = Shrinking(4, kernel_constraint=constraint)(hidden)
    hidden = keras.layers.BatchNormalization()(hidden)
    hidden = keras.layers.GlobalAveragePooling1D()(hidden)
    outputs = [keras.layers.Dense(3, name=name)(hidden) for name in "ab"]
    return cls(inputs, outputs, **kwargs)


def compiled(size, mode="graph", strategy=None, **kwargs):
    """Returns `limited` with a `microbatch_size`, compiled."""
    with (strategy or tf.distribute.get_strategy()).scope():
        model = limited(
            keras_accum.GradientAccumulationModel,
            microbatch_size=size,
            **kwargs,
        )
        model.compile(
            keras.optimizers.Adam(0.01),
            loss=[test_utils.crossentropy(), test_utils.crossentropy()],
            metrics=[["accuracy"], ["accuracy"]],
            **MODES[mode],
        )
    return model


def batches(sizes, lengths):
    rng = np.random.default_rng(0)
    for rows, length in zip(sizes, lengths, strict=True):
        x = rng.normal(size=(rows, length, test_utils.FEATURES))
        y = rng.integers(0, 3, rows)
        yield x.astype("float32"), (y, y)


def state_of(model):
    """Returns all variables of the model."""
    variables = [
        *model.variables,
        *model.metrics_variables,
        *model.optimizer.variables,
        *model._accumulation.window["losses"].variables,
        *(each.calls for each in model.layers if isinstance(each, Shrinking)),
    ]
    return [v.numpy() for v in variables]


class FindingTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters("graph", "eager")
    @test_utils.first_command(1)
    def test_trains_as_with_the_size_that_it_finds(self, mode):
        found, given = compiled("auto", mode), compiled(4, mode)
        # 16, 8 and 4 rows are tried. The last batch is short. Of two batches
        # of full length, both are trained with 4.
        data = list(batches([16, 7], [1, 1]))
        with self.assertLogs("absl", "WARNING") as logs:
            found.fit(test_utils.dataset(data), epochs=2, verbose=0)
        given.fit(test_utils.dataset(data), epochs=2, verbose=0)
        self.assertEqual(found.microbatch_size, 4)
        self.assertLen([line for line in logs.output if "found" in line], 1)
        self.assertAllClose(state_of(found), state_of(given), 0, 0)
        self.assertEqual(found.get_config()["microbatch_size"], 4)
        self.assertAllEqual(
            found.evaluate(*data[0], verbose=0),
            given.evaluate(*data[0], batch_size=16, verbose=0),
        )

    @pytest.mark.thorough
    def test_a_longer_batch_makes_it_smaller(self):
        found = compiled("auto")
        sizes = []
        for data in batches([8, 8, 8], [1, 2, 1]):
            found.train_on_batch(*data)
            sizes.append(found.microbatch_size)
        # Two rows of two steps fit, and the size is kept.
        self.assertEqual(sizes, [4, 2, 2])

    @pytest.mark.thorough
    def test_grows_until_something_fails(self):
        found = compiled("auto")
        sizes = []
        for data in batches([2, 5, 3, 8, 5], [1] * 5):
            found.train_on_batch(*data)
            sizes.append(found.microbatch_size)
        # What has fitted is not halved.
        self.assertEqual(sizes, [2, 5, 5, 5, 5])

    @pytest.mark.thorough
    def test_keeps_a_size_that_is_fast(self):
        found = compiled("auto")
        x, y = next(batches([16], [1]))
        data = [(x, y)] * 8
        with self.assertLogs("absl", "WARNING"):
            found.fit(test_utils.dataset(data), verbose=0)
        self.assertIn(found.microbatch_size, (1, 2, 4))
        self.assertEqual(found.optimizer.iterations, 8)
        self.assertEqual(
            found._accumulation.size.to_try(16), found.microbatch_size
        )

    @pytest.mark.thorough
    def test_largest_that_fits(self):
        found = compiled("largest")
        (data,) = batches([16], [1])
        with self.assertLogs("absl", "WARNING"):
            found.fit(test_utils.dataset([data] * 3), verbose=0)
        self.assertEqual(found.microbatch_size, 5)

    @pytest.mark.thorough
    def test_the_next_fit_goes_on_with_it(self):
        found = compiled("auto")
        (data,) = batches([16], [1])
        found.train_on_batch(*data)
        found.compile("sgd", loss=found.loss)
        tried = []
        found._accumulation.size.to_try = lambda rows: tried.append(rows) or 4
        found.fit(*data, batch_size=16, verbose=0)
        self.assertEqual(tried, [16])
        self.assertEqual(found.microbatch_size, 4)

    @test_utils.at_night
    def test_replicas_take_the_same_size(self):
        strategy, missing = test_utils.chosen_strategy()
        if missing:
            self.skipTest(missing)
        rows = 16 * strategy.num_replicas_in_sync
        data = list(batches([rows, rows], [1, 1]))
        found = compiled("auto", strategy=strategy)
        given = compiled(4, strategy=strategy)
        for model in (found, given):
            model.fit(test_utils.dataset(data), verbose=0)
        self.assertEqual(found.microbatch_size, 4)
        self.assertAllClose(found.get_weights(), given.get_weights(), 0, 0)


class FailureTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters("graph", "eager")
    @test_utils.first_command(1)
    def test_a_row_that_does_not_fit(self, mode):
        model = compiled("auto", mode)
        fits, too_long = batches([4, 4], [1, 6])
        model.train_on_batch(*fits)
        before = state_of(model)
        iterator = iter([too_long])
        with self.assertRaisesRegex(
            tf.errors.ResourceExhaustedError, "One row does not fit"
        ):
            model.train_function(iterator)
        self.assertAllClose(before, state_of(model), 0, 0)
        # And it goes on.
        model.train_on_batch(*fits)
        self.assertEqual(int(model.optimizer.iterations), 2)

    def test_an_update_that_does_not_fit(self):
        def constraint(weight):
            def fail(weight):
                raise MemoryError("No room for an update.")

            checked = tf.numpy_function(fail, [weight], tf.float32)
            return tf.ensure_shape(checked, weight.shape)

        model = compiled("auto", constraint=constraint)
        (data,) = batches([4], [1])
        train_function = model.make_train_function()
        discovery.build_for(
            model._accumulation, tf.nest.map_structure(tf.constant, data)
        )
        before = state_of(model)
        with self.assertRaisesRegex(
            tf.errors.ResourceExhaustedError, "update does not fit"
        ):
            train_function(iter([data]))
        self.assertAllClose(before, state_of(model), 0, 0)

    @parameterized.parameters("adam", "muon")
    def test_a_rehearsal_assigns_nothing(self, name):
        self.check_rehearsal(name)

    @parameterized.named_parameters(
        (name, name)
        for name in equivalence_test.OPTIMIZERS
        if name not in ("adam", "muon")
    )
    @test_utils.first_command(
        second=("_adafactor", "_lamb", "_schedule_free", "_sgd")
    )
    def test_a_rehearsal_assigns_nothing_with(self, name):
        self.check_rehearsal(name)

    def check_rehearsal(self, name):
        model = microbatching_test.in_microbatches()
        model.compile(
            equivalence_test.OPTIMIZERS[name](
                use_ema=True, weight_decay=0.1, global_clipnorm=1.0
            ),
            loss=test_utils.crossentropy(),
        )
        batch, other = test_utils.microbatches([8, 8])
        model.train_on_batch(*batch)
        model.train_step(other)
        before = test_utils.all_state(model)
        auto_size.make_rehearsal(model._accumulation)()
        self.assertAllClose(before, test_utils.all_state(model), 0, 0)

    def test_other_errors_are_raised_as_they_are(self):
        model = compiled("auto")
        (x, _), *_ = batches([4], [1])
        with self.assertRaisesRegex(ValueError, "Dimensions must be equal"):
            model.train_on_batch(x, (np.zeros(3, int), np.zeros(3, int)))

    def test_what_is_out_of_memory(self):
        for error, expected in (
            (MemoryError(), True),
            (tf.errors.ResourceExhaustedError(None, None, ""), True),
            (tf.errors.InternalError(None, None, "CUDA: out of memory"), True),
            (tf.errors.InternalError(None, None, "BLOOM failed"), False),
        ):
            self.assertEqual(auto_size.is_out_of_memory(error), expected)


class ForecastTest(tf.test.TestCase):
    def test_forecasts_nothing_where_the_system_says_nothing(self):
        model = compiled("auto", "eager")
        (data,) = batches([8], [1])
        with (
            mock.patch.object(
                system_memory, "read_kernel", side_effect=FileNotFoundError
            ),
            mock.patch.dict(sys.modules, {"resource": None}),
            mock.patch.object(counting, "counted_bytes") as counted,
        ):
            self.assertEqual(system_memory.free_bytes(), system_memory.UNKNOWN)
            self.assertIsNone(system_memory.address_limit())
            # Eight rows are tried, and do not fit.
            model.train_on_batch(*data)
        counted.assert_not_called()
        self.assertEqual(model.microbatch_size, 4)

    @pytest.mark.thorough
    def test_no_room_for_a_row(self):
        for limit, raises in ((None, False), (10**15, True)):
            model = compiled("auto")
            (data,) = batches([4], [1])
            with (
                mock.patch.object(system_memory, "free_bytes", return_value=0),
                mock.patch.object(
                    system_memory, "address_limit", return_value=limit
                ),
            ):
                if raises:
                    with self.assertRaisesRegex(
                        tf.errors.ResourceExhaustedError, "One row"
                    ):
                        model.train_on_batch(*data)
                else:
                    model.train_on_batch(*data)
                    self.assertEqual(model.microbatch_size, 1)


def outcome_of(*flags, before=()):
    """Returns what came of a training, and the end of what it said if it died.

    Args:
        *flags: Of `auto_size_cases`.
        before: What is before the command.
    """
    run = test_utils.run_program(
        "-m", "tests.auto_size_cases", "--length=1024", *flags, before=before
    )
    if run.returncode:
        return None, f"{run.returncode}: {run.stderr[-2000:]}"
    return json.loads(run.stdout.splitlines()[-1]), None


class ControlGroupTest(tf.test.TestCase, parameterized.TestCase):
    """Processes that a container ends if they take too much memory."""

    @parameterized.parameters(
        *test_utils.with_nightly(
            [(False, "largest", 0, "dense"), (True, "auto", 2, "dense")],
            [
                (False, "auto", 2, "dense"),
                (True, "largest", 0, "dense"),
                (False, "largest", 2, "dense"),
                (True, "largest", 2, "dense"),
                (False, "auto", 2, "convolutional"),
                (True, "auto", 2, "convolutional"),
                (False, "auto", 2, "transformer"),
                (False, "auto", 2, "language"),
                # What it takes to save them is much of what there is.
                (False, "auto", 2, "wide"),
                (True, "auto", 2, "wide"),
            ],
        )
    )
    @pytest.mark.thorough
    def test_never_dies(self, jit_compile, size, epochs, model):
        with test_utils.memory_group(1500 * 2**20) as before:
            outcome, died = outcome_of(
                f"--jit_compile={jit_compile}",
                f"--model={model}",
                f"--rows={ROWS.get(model, 256)}",
                f"--size={size}",
                f"--epochs={epochs}",
                before=before,
            )
        self.assertIsNone(died)
        self.assertIsNone(outcome["error"])
        self.assertEqual(outcome["updates"], 2 * (epochs or 1))
        # What the first step took is no longer free, and there for others.
        least = 32 if model == "dense" else 16
        self.assertBetween(outcome["size"], least, 1000)


@unittest.skipUnless(
    sys.platform == "linux", "Linux alone holds to a limit of addresses."
)
class ExhaustionTest(tf.test.TestCase, parameterized.TestCase):
    """Processes that run out of addresses for real."""

    def outcome(self, limit, jit_compile, rows, *flags, **options):
        """Returns what came of a training, and the end of what it said.

        Args:
            limit: Mebibytes beyond what the process has when training begins.
            jit_compile: Whether XLA compiles.
            rows: Rows of a batch.
            *flags: Flags of other names, of `auto_size_cases`.
            **options: What may differ from the usual: the `size`, the number of
                `epochs`, and whether it `is_limited` when it starts, as by
                `ulimit -v`.
        """
        values = {"size": "auto", "epochs": 0, **options}
        is_limited = values.pop("is_limited", True)
        if limit is not None:
            values["limit_mib"] = limit
        return outcome_of(
            f"--jit_compile={jit_compile}",
            f"--rows={rows}",
            *(f"--{name}={value}" for name, value in values.items()),
            *flags,
            before=test_utils.LIMITED if limit and is_limited else (),
        )

    def check(self, outcome, died, rows):
        self.assertIsNone(died)
        if outcome["error"]:
            self.assertIn("does not fit", outcome["error"])
            self.assertTrue(outcome["is_untouched"])
            self.assertEqual(outcome["updates"], 0)
        else:
            self.assertEqual(outcome["updates"], 2)
            self.assertBetween(outcome["size"], 1, rows)

    @parameterized.product(
        (
            {"limit": 400, "rows": 256},
            {"limit": 600, "rows": 512},
        ),
        jit_compile=(False, True),
        is_limited=(False, True),
    )
    @test_utils.at_night
    def test_never_dies(self, limit, rows, jit_compile, is_limited):
        outcome, died = self.outcome(
            limit, jit_compile, rows, is_limited=is_limited
        )
        self.check(outcome, died, rows)

    @parameterized.parameters(
        *test_utils.with_nightly(
            [(1000, 768, False)],
            [
                (1500, 1024, True),
                (1000, 768, True),
                (1500, 1024, False),
                (2500, 2048, False),
                (2500, 2048, True),
                # Steps take more than 2 GiB.
                (5000, 4096, True),
            ],
        )
    )
    @pytest.mark.thorough
    def test_finds_half_of_the_largest_size(self, limit, rows, jit_compile):
        outcome, died = self.outcome(limit, jit_compile, rows)
        self.check(outcome, died, rows)
        # Where Linux counts, it is half or somewhat less.
        is_counted = jit_compile or counting.counts_tensors("CPU:0")
        larger = int((2 if is_counted else 2.5) * outcome["size"])
        if larger < rows:
            other, _ = self.outcome(limit, jit_compile, rows, size=larger)
            self.assertTrue(other is None or other["error"])

    @parameterized.parameters((1000, 768), (2500, 3072))
    @test_utils.at_night
    def test_largest_is_close_to_what_fits(self, limit, rows):
        outcome, died = self.outcome(limit, True, rows, size="largest")
        self.check(outcome, died, rows)
        # With 1.2 times the rows some die, and some are lucky.
        larger = int(outcome["size"] / 0.6)
        other, _ = self.outcome(limit, True, rows, size=larger)
        self.assertTrue(other is None or other["error"])

    @parameterized.product(
        jit_compile=(False, True),
        size=("auto", "largest"),
        is_limited=(False, True),
    )
    @test_utils.at_night
    def test_never_dies_of_what_comes_after_the_first_batch(
        self, jit_compile, size, is_limited
    ):
        outcome, died = self.outcome(
            1000, jit_compile, 512, size=size, epochs=4, is_limited=is_limited
        )
        self.assertIsNone(died)
        self.assertEqual(outcome["updates"], 8)
        self.assertLess(outcome["losses"][-1], outcome["losses"][0])
        # With a heap for each thread it would die, or find hardly any.
        self.assertGreater(outcome["size"], 100)

    @parameterized.product(limit=(1000, 1500), jit_compile=(False, True))
    @test_utils.at_night
    def test_never_dies_as_it_saves_large_weights(self, limit, jit_compile):
        outcome, died = self.outcome(
            limit, jit_compile, 2048, "--model=wide", epochs=2
        )
        self.assertIsNone(died)
        self.assertEqual(outcome["updates"], 4)
        self.assertGreater(outcome["size"], 100)

    @parameterized.parameters(
        # XLA plans nothing of what its convolutions take.
        (2500, "convolutional"),
        # To make the steps and validation takes more than to plan them.
        (2500, "transformer"),
        (2535, "language"),
    )
    @test_utils.at_night
    def test_never_dies_of_what_xla_does_not_plan(self, limit, model):
        outcome, died = self.outcome(
            limit, True, 512, f"--model={model}", size="largest", epochs=2
        )
        self.assertIsNone(died)
        self.assertEqual(outcome["updates"], 4)
        self.assertBetween(outcome["size"], 100, 400)

    @parameterized.parameters("auto", "largest")
    @test_utils.at_night
    def test_computing_twice_finds_three_times_the_rows(self, size):
        """Of a model that is long to compile, which takes memory as well."""
        sizes = []
        for flag in ("--norecompute", "--recompute"):
            outcome, died = self.outcome(
                2500,
                True,
                1024,
                "--model=transformer",
                flag,
                size=size,
                epochs=2,
            )
            self.assertIsNone(died)
            self.assertEqual(outcome["updates"], 4)
            sizes.append(outcome["size"])
        self.assertGreaterEqual(sizes[1], 3 * sizes[0])

    @test_utils.at_night
    def test_trains_as_with_the_size_that_it_finds(self):
        self.check_found(500, jit_compile=False, rows=256)

    @test_utils.at_night
    def test_trains_with_xla_as_with_the_size_that_it_finds(self):
        self.check_found(450, jit_compile=True, rows=256)

    def check_found(self, limit, jit_compile, rows):
        found, died = self.outcome(limit, jit_compile, rows)
        self.assertIsNone(died)
        self.assertLess(found["size"], rows)
        given, _ = self.outcome(None, jit_compile, rows, size=found["size"])
        for mine, theirs in zip(
            found["weights"], given["weights"], strict=True
        ):
            # Threads add in any order.
            self.assertAllClose(mine, theirs, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    tf.test.main()
