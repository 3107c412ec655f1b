"""Several replicas give what one device gives for all the rows.

Each test runs under the strategy that `--strategy` names: on real devices
wherever there are any, else on parts of the CPU.
"""

import collections
import contextlib
import functools
import os
import warnings
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from keras_accum import compat
from tests import equivalence_test
from tests import test_utils

# Rows of micro-batches: most do not divide, and some leave replicas without.
SIZES = ([8, 7, 5, 3], [4, 4, 4, 4], [1, 9, 9, 1])

MODES = {
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
    "eager": {"jit_compile": False, "run_eagerly": True},
}


def windows():
    return [
        test_utils.microbatches(sizes, seed) for seed, sizes in enumerate(SIZES)
    ]


def with_sample_weights(batches):
    """Adds sample weights that are larger for later rows."""
    return [
        (x, y, np.linspace(0, 3, len(x), dtype="float32") ** 2)
        for x, y in batches
    ]


def flat(lists):
    return [each for some in lists for each in some]


eagerly = test_utils.eagerly


class TestCase(test_utils.TestCase, parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.strategy, missing = test_utils.chosen_strategy()
        if missing:
            self.skipTest(missing)
        self.replicas = self.strategy.num_replicas_in_sync

    def skipUnlessSeveral(self):
        if self.replicas == 1:
            self.skipTest("There is one replica.")

    def on_replicas(self, build, compile_args, **kwargs):
        """Returns a model that accumulates, compiled in the strategy's scope.

        Args:
            build: Function of a model class and keywords.
            compile_args: Function that makes the keywords of `compile`.
            **kwargs: For `GradientAccumulationModel`.
        """
        with self.strategy.scope():
            model = test_utils.accumulating(build, **kwargs)
            model.compile(**compile_args())
        return model

    def local_batches(self, batches):
        """Returns what each replica gets of each batch, in order."""
        dataset = self.strategy.experimental_distribute_dataset(
            test_utils.dataset(batches)
        )
        return [
            list(
                zip(
                    *map(self.strategy.experimental_local_results, batch),
                    strict=True,
                )
            )
            for batch in dataset
        ]

    def copies(self, variable):
        """Returns the copies of a variable, one per replica."""
        values = self.strategy.experimental_local_results(variable.value)
        return [value.numpy() for value in values]

    def assertSameOnAllReplicas(self, model):
        for variable in model.variables + model.optimizer.variables:
            first, *others = self.copies(variable)
            for other in others:
                self.assertAllEqual(first, other, variable.path)

    def assertTrainsAlike(
        self,
        build,
        compile_args,
        windows,
        tolerance=1e-5,
        slots_tolerance=None,
        **kwargs,
    ):
        """Trains on the replicas, and one device on the concatenated windows.

        Args:
            build: Function of a model class and keywords.
            compile_args: Function that makes the keywords of `compile`.
            windows: Lists of batches, of one length each.
            tolerance: As for `assertSameWeights`.
            slots_tolerance: As for `assertSameTraining`.
            **kwargs: For `GradientAccumulationModel`.
        """
        expected = build(keras.Model)
        initial = expected.get_weights()
        expected.compile(**eagerly(compile_args()))
        # Under a strategy Keras does it so, and some names depend on it.
        expected.optimizer.build(expected.trainable_variables)
        large = [test_utils.concatenate(window) for window in windows]
        expected.fit(test_utils.dataset(large, True), verbose=0)
        if self.microbatch_size:
            size = {"accum_steps": 1, "microbatch_size": self.microbatch_size}
            batches = large
        else:
            size = {"accum_steps": len(windows[0])}
            batches = flat(windows)
        actual = self.on_replicas(build, compile_args, **size | kwargs)
        self.assertAllClose(initial, actual.get_weights(), 0, 0)
        actual.fit(test_utils.dataset(batches), verbose=0)
        self.assertSameTraining(
            actual, expected, initial, tolerance, slots_tolerance
        )
        self.assertSameOnAllReplicas(actual)
        return actual, expected


def compile_args(optimizer="adam", loss=None, options=None, **kwargs):
    """Returns a function that makes the arguments of `compile`."""
    return lambda: {
        "jit_compile": False,
        "optimizer": equivalence_test.OPTIMIZERS[optimizer](**(options or {})),
        "loss": loss or test_utils.crossentropy(),
        **kwargs,
    }


def tagger(cls, **kwargs):
    """Labels each token; token 0 is masked."""
    keras.utils.set_random_seed(7)
    tokens = keras.Input((None,), dtype="int32")
    hidden = keras.layers.Embedding(9, 4, mask_zero=True)(tokens)
    return cls(tokens, keras.layers.Dense(5)(hidden), **kwargs)


class OptimizerTest(TestCase):
    @parameterized.parameters("xla", "eager")
    @test_utils.first_command(1, second=())
    def test_every_mode(self, mode):
        self.assertTrainsAlike(
            test_utils.mlp,
            compile_args(
                options={
                    "global_clipnorm": 0.05,
                    "weight_decay": 0.1,
                    "use_ema": True,
                },
                **MODES[mode],
            ),
            windows(),
        )

    @test_utils.needs_multi_optimizer
    @pytest.mark.thorough
    def test_multi_optimizer(self):
        def arguments():
            kernels = keras.optimizers.Adam(0.01)
            biases = keras.optimizers.SGD(0.1)
            return {
                "optimizer": keras.optimizers.MultiOptimizer(
                    lambda v: kernels if v.name == "kernel" else biases
                ),
                "loss": test_utils.crossentropy(),
                "jit_compile": False,
            }

        self.assertTrainsAlike(test_utils.mlp, arguments, windows())


class LossTest(TestCase):
    @parameterized.parameters(
        "sum_over_batch_size", "mean_with_sample_weight", "sum"
    )
    @test_utils.first_command(0, second=(2,))
    def test_sample_weights_and_regularizers(self, reduction):
        self.assertTrainsAlike(
            functools.partial(test_utils.mlp, regularizer="l2"),
            compile_args("sgd", test_utils.crossentropy(reduction=reduction)),
            [with_sample_weights(window) for window in windows()],
        )

    @parameterized.parameters("sum_over_batch_size", "sum")
    @test_utils.first_command(0)
    def test_masks_and_embeddings(self, reduction):
        rng = np.random.default_rng(0)

        def batch(rows):
            tokens = rng.integers(1, 9, (rows, 12))
            # The rows get shorter: the replicas have unequal numbers of tokens.
            lengths = np.linspace(12, 1, rows).astype(int)
            tokens *= np.arange(12) < lengths[:, None]
            return tokens, rng.integers(0, 5, (rows, 12))

        self.assertTrainsAlike(
            tagger,
            compile_args("sgd", test_utils.crossentropy(reduction=reduction)),
            [[batch(4), batch(3), batch(1)] for _ in range(2)],
        )

    @pytest.mark.thorough
    def test_added_losses(self):
        self.assertTrainsAlike(
            equivalence_test.with_added_losses, compile_args("sgd"), windows()
        )

    @pytest.mark.thorough
    def test_several_outputs(self):
        batches = [
            [
                (x, {"a": y, "b": np.eye(3, dtype="float32")[y]})
                for x, y in window
            ]
            for window in windows()
        ]
        self.assertTrainsAlike(
            equivalence_test.two_headed,
            compile_args(
                "sgd",
                {"a": test_utils.crossentropy(), "b": "mse"},
                loss_weights={"a": 0.3, "b": 2.0},
                metrics={"a": ["accuracy"], "b": ["mae"]},
            ),
            batches,
        )


class RowsTest(TestCase):
    """Rows that do not divide, and replicas that get none."""

    def setUp(self):
        super().setUp()
        rows = 3 * self.replicas + 1
        # The last batch of one row leaves all replicas but one without.
        self.x, self.y = test_utils.microbatches([rows])[0]
        self.batch_size = self.replicas

    def test_there_are_replicas_without_rows(self):
        self.skipUnlessSeveral()
        *_, (first, *others) = self.local_batches(
            test_utils.microbatches([4, 1])
        )
        self.assertLen(first[0], 1)
        for x, y in others:
            self.assertEqual((len(x), len(y)), (0, 0))

    @parameterized.parameters("graph", "xla")
    @test_utils.first_command(0, second=())
    def test_fit_evaluate_and_predict(self, mode):
        arguments = compile_args(metrics=["accuracy"], **MODES[mode])
        expected, single = (
            test_utils.mlp(),
            test_utils.accumulating(accum_steps=2),
        )
        initial = expected.get_weights()
        expected.compile(**eagerly(arguments()))
        single.compile(**eagerly(arguments()))
        actual = self.on_replicas(test_utils.mlp, arguments, accum_steps=2)
        # Two windows, of two batches each.
        step = 2 * self.batch_size
        for start in (0, step):
            rows = slice(start, start + step)
            expected.train_on_batch(self.x[rows], self.y[rows])
        reported = [
            model.fit(
                self.x,
                self.y,
                self.batch_size,
                shuffle=False,
                verbose=0,
                validation_data=(self.x, self.y),
                validation_batch_size=self.batch_size,
            ).history
            for model in (single, actual)
        ]
        self.assertSameTraining(actual, expected, initial)
        self.assertSameOnAllReplicas(actual)
        self.assertAllClose(*reported, rtol=1e-5)
        self.assertAllClose(
            actual.evaluate(self.x, self.y, self.batch_size, verbose=0),
            expected.evaluate(self.x, self.y, verbose=0),
            rtol=1e-5,
        )
        self.assertAllClose(
            actual.predict(self.x, self.batch_size, verbose=0),
            expected.predict(self.x, verbose=0),
            rtol=1e-5,
        )

    @pytest.mark.thorough
    def test_uneven_windows(self):
        self.assertTrainsAlike(test_utils.mlp, compile_args(), windows())


@pytest.mark.thorough
class OptimizerInMicrobatchesTest(OptimizerTest):
    """The same on whole batches, which each replica splits.

    What an optimizer gets does not depend on both the way to accumulate and the
    replicas: `equivalence_test` has each of them with `accum_steps`.
    """

    microbatch_size = 3

    @parameterized.named_parameters(
        (name, name) for name in equivalence_test.OPTIMIZERS
    )
    @test_utils.first_command("_adafactor", "_schedule_free")
    def test_every_optimizer(self, name):
        amplifies = name in equivalence_test.AMPLIFIES
        actual, _ = self.assertTrainsAlike(
            test_utils.mlp,
            compile_args(name),
            windows(),
            tolerance=1e-4 if amplifies else 1e-5,
        )
        self.assertEqual(actual.optimizer.iterations.numpy(), len(SIZES))

    @parameterized.named_parameters(
        (name, name) for name in equivalence_test.OPTIONS
    )
    @test_utils.first_command("_ema_overwrite")
    def test_every_option(self, name):
        self.assertTrainsAlike(
            test_utils.mlp,
            compile_args(options=equivalence_test.OPTIONS[name]),
            windows(),
        )


@pytest.mark.thorough
class LossInMicrobatchesTest(LossTest):
    """The same on whole batches, which each replica splits."""

    microbatch_size = 3


class DenominatorsTest(TestCase):
    """Losses with denominators of their own; one weight would not be exact."""

    microbatch_size = 3

    @parameterized.parameters("graph", "xla")
    @test_utils.first_command(second=(0,))
    def test_outputs_with_different_masks(self, mode):
        rng = np.random.default_rng(0)
        windows = []
        for rows in (7, 4, 1):
            tokens = rng.integers(1, 9, (rows, 12))
            lengths = np.linspace(12, 1, rows).astype(int)
            tokens *= np.arange(12) < lengths[:, None]
            weights = np.ones((rows, 12)), rng.uniform(0, 2, rows)
            labels = tokens % 5, tokens[:, 0] % 5
            windows.append([(tokens, labels, weights)])
        actual, _ = self.assertTrainsAlike(
            equivalence_test.masked_and_not,
            compile_args(
                "sgd",
                [
                    test_utils.crossentropy(),
                    test_utils.crossentropy(reduction="sum"),
                ],
                **MODES[mode],
            ),
            windows,
        )
        self.assertTrue(actual._accumulation.losses.uses_denominators())


class WindowTest(TestCase):
    def fit(self, sizes, ends, epochs=1, compiled=None, **kwargs):
        """Compares a `fit` with windows that end at `ends`, in batches."""
        batches = test_utils.microbatches(sizes)
        expected = test_utils.mlp()
        initial = expected.get_weights()
        expected.compile(**eagerly(compile_args()()))
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            window = (batches * epochs)[start:end]
            expected.train_on_batch(*test_utils.concatenate(window))
        arguments = compile_args(**(compiled or {}))
        model = self.on_replicas(test_utils.mlp, arguments, **kwargs)
        model.fit(test_utils.dataset(batches), epochs=epochs, verbose=0)
        self.assertSameTraining(model, expected, initial)
        self.assertSameOnAllReplicas(model)
        return model

    @parameterized.named_parameters(
        ("flush", "flush", [3, 6, 7, 10, 13, 14]),
        ("carry", "carry", [3, 6, 9, 12]),
        # The seventh batch is dropped, and begins the second epoch anew.
        ("drop", "drop", [3, 6]),
    )
    @test_utils.first_command("_flush", second=("_drop",))
    def test_partial_windows(self, policy, ends):
        sizes = [8, 7, 5, 3, 4, 4, 1]
        epochs = 1 if policy == "drop" else 2
        self.fit(sizes, ends, epochs, accum_steps=3, partial_window=policy)

    @parameterized.parameters(2, 3)
    @test_utils.first_command(second=(1,))
    def test_steps_per_execution(self, steps):
        compiled = {"steps_per_execution": steps}
        sizes = [8, 7, 5, 3, 4, 4, 1]
        self.fit(sizes, [3, 6, 7], compiled=compiled, accum_steps=3)

    def test_schedule(self):
        sizes = [8, 7, 5, 3, 4, 4]
        self.fit(sizes, [1, 3, 6], accum_steps=lambda updates: updates + 1)

    @pytest.mark.thorough
    def test_a_change_of_accum_steps(self):
        batches = test_utils.microbatches([8, 7, 5, 3, 4])
        expected = test_utils.mlp()
        initial = expected.get_weights()
        arguments = compile_args()
        expected.compile(**eagerly(arguments()))
        model = self.on_replicas(test_utils.mlp, arguments)
        for some in (batches[:2], batches[2:]):
            model.accum_steps = len(some)
            model.fit(test_utils.dataset(some), verbose=0)
            expected.train_on_batch(*test_utils.concatenate(some))
        self.assertSameTraining(model, expected, initial)
        self.assertSameOnAllReplicas(model)

    @pytest.mark.thorough
    def test_train_on_batch(self):
        # Each replica gets the whole batch, as in Keras.
        batches = test_utils.microbatches([8, 7, 5, 3])
        expected = test_utils.mlp()
        initial = expected.get_weights()
        arguments = compile_args()
        expected.compile(**eagerly(arguments()))
        model = self.on_replicas(test_utils.mlp, arguments, accum_steps=2)
        test_utils.train_on(model, batches)
        for i in (0, 2):
            window = test_utils.concatenate(batches[i : i + 2])
            expected.train_on_batch(*window)
        self.assertSameTraining(model, expected, initial)
        self.assertSameOnAllReplicas(model)

    def test_between_boundaries_nothing_changes(self):
        arguments = compile_args()
        model = self.on_replicas(
            test_utils.mlp, arguments, accum_steps=3, partial_window="carry"
        )
        first, second, third = test_utils.microbatches([7, 1, 4])
        before = test_utils.all_state(model)
        # The optimizer's variables are made with the first micro-batch.
        model.fit(test_utils.dataset([first]), verbose=0)
        before = test_utils.all_state(model)
        model.fit(test_utils.dataset([second]), verbose=0)
        self.assertAllClose(before, test_utils.all_state(model), 0, 0)
        model.fit(test_utils.dataset([third]), verbose=0)
        self.assertEqual(model.optimizer.iterations.numpy(), 1)


class WarningsTest(TestCase):
    @parameterized.parameters(
        {"accum_steps": 3, "partial_window": "carry"},
        {"effective_batch_size": 24},
        {"microbatch_size": 3},
        {"microbatch_size": "auto", "mode": "xla"},
    )
    @test_utils.first_command(second=(0,))
    def test_tensorflow_warns_of_nothing(self, mode="graph", **kwargs):
        kwargs = {"accum_steps": 1} | kwargs
        x, y = test_utils.microbatches([4 * 8])[0]
        folder = self.get_temp_dir()
        with self.assertLogs("tensorflow", "WARNING") as logged:
            tf.get_logger().warning("One at least.")
            model = self.on_replicas(
                with_batch_normalization, compile_args(**MODES[mode]), **kwargs
            )
            model.fit(x, y, batch_size=8, validation_data=(x, y), verbose=0)
            model.predict(x, verbose=0)
            # With "carry" in the middle of a window.
            checkpoint = tf.train.Checkpoint(model=model)
            checkpoint.restore(checkpoint.save(os.path.join(folder, "c")))
            model.fit(x, y, batch_size=8, verbose=0)
            model.reset_window()
        # Keras's own functions may have been traced often by other tests of
        # this process: TensorFlow counts them together.
        messages = [
            each.getMessage()
            for each in logged.records[1:]
            if "TensorFlowTrainer." not in each.getMessage()
        ]
        self.assertEmpty(messages)


class BatchLogs(keras.callbacks.Callback):
    """Keeps the logs of every batch."""

    def __init__(self):
        super().__init__()
        self.logs = []

    def on_train_batch_end(self, batch, logs=None):
        self.logs.append(dict(logs))


class LogsTest(TestCase):
    @parameterized.parameters("graph", "eager")
    @test_utils.first_command(0, second=())
    def test_logs_are_those_of_one_device(self, mode):
        arguments = compile_args(
            metrics=["accuracy", keras.metrics.SparseCategoricalCrossentropy()],
            weighted_metrics=["accuracy"],
            **MODES[mode],
        )
        single = test_utils.accumulating(accum_steps=3)
        single.compile(**eagerly(arguments()))
        replicated = self.on_replicas(test_utils.mlp, arguments, accum_steps=3)
        batches = with_sample_weights(
            test_utils.microbatches([8, 7, 5, 3, 4, 4, 1])
        )
        seen, histories = [], []
        for model in (single, replicated):
            logs = BatchLogs()
            history = model.fit(
                test_utils.dataset(batches),
                epochs=2,
                verbose=0,
                callbacks=[logs],
                validation_data=test_utils.dataset(batches[:3]),
            )
            seen.append(logs.logs)
            histories.append(history.history)
        self.assertAllClose(*histories, rtol=1e-5)
        # Where windows end, in both epochs. What is in between is the first
        # replica's, since nobody was asked.
        for end in (2, 5, 9, 12):
            self.assertAllClose(seen[0][end], seen[1][end], rtol=1e-5)


def with_batch_normalization(cls, synchronized=False, renorm=False, **kwargs):
    keras.utils.set_random_seed(7)
    inputs = keras.Input((test_utils.FEATURES,))
    hidden = keras.layers.BatchNormalization(
        momentum=0.5,
        synchronized=synchronized,
        **({"renorm": True} if renorm else {}),
    )(inputs)
    outputs = keras.layers.Dense(test_utils.CLASSES)(hidden)
    return cls(inputs, outputs, **kwargs)


@keras.saving.register_keras_serializable("replicas_test")
class Centering(keras.layers.Layer):
    """Subtracts a moving mean, which it updates by its own rule."""

    def build(self, shape):
        self.mean = self.add_weight(
            shape=shape[1:], initializer="zeros", trainable=False
        )

    def call(self, x, training=None):
        if training:
            self.mean.assign(0.5 * self.mean + 0.5 * keras.ops.mean(x, axis=0))
        return x - self.mean


def with_centering(cls, **kwargs):
    keras.utils.set_random_seed(7)
    inputs = keras.Input((test_utils.FEATURES,))
    outputs = keras.layers.Dense(test_utils.CLASSES)(Centering()(inputs))
    return cls(inputs, outputs, **kwargs)


def train_with_own_statistics(model, windows, are_merged):
    """Trains in the plain loop: each replica normalizes its own rows.

    Args:
        model: A compiled `keras.Model`.
        windows: Lists of micro-batches, each a list of the replicas' `(x, y)`.
        are_merged: Whether moving statistics are those of all rows at once, or
            the mean of what each replica's are by itself.
    """
    trained, moving = model.trainable_variables, model.non_trainable_variables

    def restore(values):
        for variable, value in zip(moving, values, strict=True):
            variable.assign(value)

    for window in windows:
        before = [v.numpy() for v in moving]
        after, total, weight = [], [0.0] * len(trained), 0
        for microbatches in zip(*window, strict=True):
            restore(before)
            for x, y in microbatches:
                if len(x) == 0:
                    continue
                if are_merged:
                    restore(before)
                with tf.GradientTape() as tape:
                    loss = model.compute_loss(x, y, model(x, training=True))
                gradients = tape.gradient(loss, trained)
                total = [
                    t + len(x) * g
                    for t, g in zip(total, gradients, strict=True)
                ]
                weight += len(x)
            after.append([v.numpy() for v in moving])
        if are_merged:
            restore(before)
            rows = [local for batch in window for local in batch]
            model(test_utils.concatenate(rows)[0], training=True)
        else:
            restore(
                [np.mean(each, axis=0) for each in zip(*after, strict=True)]
            )
        model.optimizer.apply([t / weight for t in total], trained)


class StateTest(TestCase):
    @parameterized.product(
        build_and_are_merged=(
            (with_batch_normalization, True),
            (
                functools.partial(with_batch_normalization, renorm=True),
                True,
            ),
            (with_centering, False),
        ),
        mode=("graph", "xla"),
    )
    @test_utils.first_command(0, second=(1,))
    def test_moving_statistics(self, build_and_are_merged, mode):
        build, are_merged = build_and_are_merged
        if isinstance(build, functools.partial) and not test_utils.HAS_RENORM:
            self.skipTest("BatchNormalization has no `renorm` in this Keras.")
        arguments = compile_args("sgd", **MODES[mode])
        expected = build(keras.Model)
        initial = expected.get_weights()
        expected.compile(**eagerly(arguments()))
        train_with_own_statistics(
            expected,
            [self.local_batches(window) for window in windows()],
            are_merged,
        )
        actual = self.on_replicas(build, arguments)
        with warnings.catch_warnings():
            # One of the layers does so, and `inner_test` sees it said.
            warnings.filterwarnings("ignore", "A layer assigns what follows")
            actual.fit(test_utils.dataset(flat(windows())), verbose=0)
        self.assertSameTraining(actual, expected, initial)
        # The norm of all weights is less than that of the statistics.
        self.assertAllClose(
            actual.non_trainable_variables,
            expected.non_trainable_variables,
            rtol=1e-5,
            atol=1e-6,
        )
        self.assertSameOnAllReplicas(actual)

    def test_synchronized_batch_normalization(self):
        build = functools.partial(with_batch_normalization, synchronized=True)
        batches = test_utils.microbatches([2 * self.replicas] * 6)
        arguments = compile_args("sgd")
        single = test_utils.accumulating(
            with_batch_normalization, accum_steps=3
        )
        initial = single.get_weights()
        single.compile(**eagerly(arguments()))
        replicated = self.on_replicas(build, arguments, accum_steps=3)
        for model in (single, replicated):
            model.fit(test_utils.dataset(batches), verbose=0)
        self.assertSameTraining(replicated, single, initial)
        self.assertAllClose(
            single.non_trainable_variables,
            replicated.non_trainable_variables,
            rtol=1e-5,
            atol=1e-6,
        )
        self.assertSameOnAllReplicas(replicated)

    @pytest.mark.thorough
    def test_random_generators_stay_together(self):
        def build(cls, **kwargs):
            keras.utils.set_random_seed(7)
            inputs = keras.Input((test_utils.FEATURES,))
            hidden = keras.layers.Dropout(0.5, seed=1)(inputs)
            outputs = keras.layers.Dense(test_utils.CLASSES)(hidden)
            return cls(inputs, outputs, **kwargs)

        arguments = compile_args()
        model = self.on_replicas(build, arguments)
        model.fit(test_utils.dataset(flat(windows())), verbose=0)
        self.assertSameOnAllReplicas(model)


class PrecisionTest(TestCase):
    def setUp(self):
        super().setUp()
        keras.config.set_dtype_policy("mixed_float16")
        self.addCleanup(keras.config.set_dtype_policy, "float32")

    @pytest.mark.thorough
    def test_half_precision(self):
        # Activations keep 11 bits: see `equivalence_test`.
        self.assertTrainsAlike(
            test_utils.mlp, compile_args("sgd"), windows(), tolerance=0.05
        )

    @parameterized.parameters("graph", "xla")
    @test_utils.first_command(0)
    def test_all_replicas_see_what_is_not_finite_on_one(self, mode):
        arguments = compile_args("adam", **MODES[mode])
        model = self.on_replicas(test_utils.mlp, arguments, accum_steps=2)
        batches = test_utils.microbatches([2 * self.replicas] * 4)
        # The last row is on the last replica.
        batches[0][0][-1] = np.inf
        before = model.get_weights()
        model.fit(test_utils.dataset(batches[:2]), verbose=0)
        # Keras halves the scale and skips the update.
        for scale in self.copies(model.optimizer.dynamic_scale):
            self.assertEqual(scale, 2.0**14)
        self.assertAllClose(before, model.get_weights(), 0, 0)
        self.assertEqual(test_utils.num_updates(model.optimizer), 0)
        self.assertSameOnAllReplicas(model)
        model.fit(test_utils.dataset(batches[2:]), verbose=0)
        self.assertEqual(test_utils.num_updates(model.optimizer), 1)
        self.assertSameOnAllReplicas(model)


class StepTest(TestCase):
    def test_train_step_of_ones_own(self):
        class Mine(keras_accum.GradientAccumulationModel):
            def train_step(self, batch):
                x, y = batch
                with tf.GradientTape() as tape:
                    loss = self.compute_loss(x, y, self(x, training=True))
                gradients = tape.gradient(loss, self.trainable_weights)
                self.accumulate(gradients, tf.shape(x)[0])
                return {"my_loss": loss}

        def build(cls, **kwargs):
            accumulates = cls is keras_accum.GradientAccumulationModel
            return test_utils.mlp(Mine if accumulates else cls, **kwargs)

        self.assertTrainsAlike(build, compile_args(), windows())

    @pytest.mark.thorough
    def test_frozen_layers(self):
        def build(cls, **kwargs):
            model = test_utils.mlp(cls, **kwargs)
            model.layers[1].trainable = False
            return model

        self.assertTrainsAlike(build, compile_args(), windows())

    @pytest.mark.thorough
    def test_a_variable_without_gradient(self):
        class Half(keras.layers.Layer):
            def build(self, shape):
                self.used = self.add_weight(shape=(shape[-1], 3), name="used")
                self.unused = self.add_weight(shape=(2,), name="unused")

            def call(self, inputs):
                return inputs @ self.used

        def build(cls, **kwargs):
            keras.utils.set_random_seed(7)
            inputs = keras.Input((test_utils.FEATURES,))
            return cls(inputs, Half()(inputs), **kwargs)

        with self.assertWarnsRegex(UserWarning, "Gradients do not exist"):
            actual, _ = self.assertTrainsAlike(build, compile_args(), windows())
        self.assertLen(actual.trainable_variables, 2)

    @parameterized.parameters(False, True)
    @test_utils.first_command(1)
    def test_accumulator_by_hand(self, in_graph):
        run = self.strategy.run
        if in_graph:
            run = tf.function(run)
        expected = test_utils.mlp()
        initial = expected.get_weights()
        loss_of = test_utils.crossentropy()
        with self.strategy.scope():
            model = test_utils.mlp()
            optimizer = keras.optimizers.SGD(1.0)
            optimizer.build(model.trainable_variables)
            accumulator = keras_accum.GradientAccumulator(
                model.trainable_variables
            )

        def add(x, y):
            with tf.GradientTape() as tape:
                # Keras divides losses by the number of replicas.
                loss = self.replicas * loss_of(y, model(x))
            gradients = tape.gradient(loss, model.trainable_variables)
            accumulator.add(gradients, tf.shape(x)[0])

        batches = test_utils.microbatches([2 * self.replicas, self.replicas])
        for batch in self.strategy.experimental_distribute_dataset(
            test_utils.dataset(batches)
        ):
            run(add, args=batch)
        self.assertAllEqual(accumulator.count, 2)
        self.assertAllEqual(accumulator.weight, 3 * self.replicas)
        means = run(accumulator.mean)
        x, y = test_utils.concatenate(batches)
        with tf.GradientTape() as tape:
            loss = loss_of(y, expected(x))
        gradients = tape.gradient(loss, expected.trainable_variables)
        for mine, theirs in zip(means, gradients, strict=True):
            for copy in self.strategy.experimental_local_results(mine):
                self.assertAllClose(copy, theirs, rtol=1e-5, atol=1e-6)
        self.assertAllClose(initial, model.get_weights(), 0, 0)
        run(accumulator.reset)
        self.assertAllEqual(accumulator.weight, 0)


@pytest.mark.thorough
class SavingTest(TestCase):
    def trained(self, on_replicas):
        scope = (
            self.strategy.scope() if on_replicas else contextlib.nullcontext()
        )
        with scope:
            model = test_utils.accumulating(accum_steps=2)
            model.compile(**compile_args()())
        model.fit(
            test_utils.dataset(test_utils.microbatches([4] * 4)), verbose=0
        )
        return model

    def assertGoesOnAlike(self, model, other):
        """Compares all state now, and after a window more."""
        for _ in range(2):
            states = [test_utils.all_state(each) for each in (model, other)]
            self.assertAllClose(*states, rtol=1e-5, atol=1e-7)
            for each in (model, other):
                each.fit(
                    test_utils.dataset(test_utils.microbatches([4, 3], 1)),
                    verbose=0,
                )

    @parameterized.parameters(False, True)
    @test_utils.first_command(0)
    def test_checkpoint(self, from_replicas):
        model = self.trained(from_replicas)
        prefix = os.path.join(self.get_temp_dir(), "checkpoint")
        path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(
            prefix
        )
        other = self.trained(not from_replicas)
        other.fit(
            test_utils.dataset(test_utils.microbatches([4, 4])), verbose=0
        )
        tf.train.Checkpoint(model=other, optimizer=other.optimizer).restore(
            path
        ).assert_consumed()
        self.assertGoesOnAlike(model, other)

    @parameterized.parameters(False, True)
    @test_utils.first_command(1)
    def test_model_and_weights(self, from_replicas):
        model = self.trained(from_replicas)
        folder = self.get_temp_dir()
        file = os.path.join(folder, "model.keras")
        weights = os.path.join(folder, "model.weights.h5")
        model.save(file)
        model.save_weights(weights)
        scope = (
            contextlib.nullcontext() if from_replicas else self.strategy.scope()
        )
        with scope:
            loaded = keras.saving.load_model(file)
        other = self.trained(not from_replicas)
        other.load_weights(weights)
        self.assertAllClose(model.get_weights(), other.get_weights(), 0, 0)
        self.assertGoesOnAlike(model, loaded)


def called_functions(node):
    """Returns the names of the functions that a node of a graph may call."""
    names = []
    for value in node.attr.values():
        if value.HasField("func"):
            names.append(value.func.name)
        names += [function.name for function in value.list.func]
    return names


class Program:
    """A traced function, with all that it calls.

    Args:
        function: A `tf.function` without arguments.
    """

    def __init__(self, function):
        graph = function.get_concrete_function().graph
        definition = graph.as_graph_def(add_shapes=True)
        self.top = definition.node
        self.bodies = {
            body.signature.name: body.node_def
            for body in definition.library.function
        }

    def reductions(self, nodes):
        """Returns the collectives in `nodes` and what they call."""
        found = []
        for node in nodes:
            if node.op.startswith(("Collective", "NcclAllReduce", "CrossRep")):
                found.append(node)
            for name in called_functions(node):
                found += self.reductions(self.bodies[name])
        return found

    def conditionals(self, nodes):
        """Returns the outer conditionals in `nodes` and what they call."""
        found = []
        for node in nodes:
            if node.op in ("If", "StatelessIf"):
                found.append(node)
                continue
            for name in called_functions(node):
                found += self.conditionals(self.bodies[name])
        return found

    def branch(self, node, name):
        """Returns the body of a branch of a conditional."""
        return self.bodies[node.attr[name].func.name]


class ProgramTestCase(TestCase):
    def setUp(self):
        super().setUp()
        self.skipUnlessSeveral()

    def program(self, build=test_utils.mlp, **kwargs):
        model = self.on_replicas(build, compile_args(**kwargs), accum_steps=3)
        batches = test_utils.dataset(test_utils.microbatches([8]))
        iterator = iter(self.strategy.experimental_distribute_dataset(batches))
        train = model.make_train_function()
        return model, Program(
            tf.function(lambda: train(iterator), autograph=False)
        )


class ProgramTest(ProgramTestCase):
    @parameterized.parameters("graph", "xla")
    def test_one_reduction_a_window(self, mode):
        model, program = self.program(**MODES[mode])
        self.assertLen(program.reductions(program.top), self.replicas)
        boundaries = [
            node
            for node in program.conditionals(program.top)
            if program.reductions([node])
        ]
        self.assertLen(boundaries, 1)
        (boundary,) = boundaries
        full = program.branch(boundary, "then_branch")
        self.assertLen(program.reductions(full), self.replicas)
        # With the gradients go the weight of the window, the sums of its loss,
        # their weights and rows, and the mean loss's total and count.
        entries = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
        entries += 1 + 3 + 2
        for node in program.reductions(full):
            self.assertEqual(node.attr["T"].type, tf.float32.as_datatype_enum)
            (shape,) = node.attr["_output_shapes"].list.shape
            self.assertEqual([dim.size for dim in shape.dim], [entries])

    def test_micro_batches_reduce_nothing(self):
        _, program = self.program(with_batch_normalization, jit_compile=False)
        conditionals = program.conditionals(program.top)
        reducing = [n for n in conditionals if program.reductions([n])]
        self.assertLen(reducing, 1)
        # The first and the further micro-batches, and the boundary at least.
        self.assertGreaterEqual(len(conditionals), 2)
        self.assertEmpty(
            program.reductions(program.branch(reducing[0], "else_branch"))
        )

    def test_synchronized_layers_are_seen(self):
        """Checks that reductions of micro-batches would be found."""
        _, program = self.program(
            functools.partial(with_batch_normalization, synchronized=True),
            jit_compile=False,
        )
        reducing = [
            node
            for node in program.conditionals(program.top)
            if program.reductions([node])
        ]
        self.assertLen(reducing, 1)


class OneReplicaTest(TestCase):
    """A strategy of one replica costs nothing: the programs are the same."""

    def setUp(self):
        super().setUp()
        if self.replicas > 1:
            self.skipTest("There are several replicas.")

    @parameterized.product(
        kwargs=({"accum_steps": 2}, {"microbatch_size": 4}),
        mode=("graph", "xla"),
    )
    def test_programs_are_those_without_a_strategy(self, kwargs, mode):
        kwargs = {"accum_steps": 1} | kwargs
        here = self.ops(self.strategy, mode, **kwargs)
        without = self.ops(tf.distribute.get_strategy(), mode, **kwargs)
        self.assertEqual((here - without, without - here), ({}, {}))

    def ops(self, strategy, mode, **kwargs):
        """Counts the ops of each kind.

        Left out are ops that pass on, or take from TensorFlow's iterators.
        """
        with strategy.scope():
            model = test_utils.accumulating(**kwargs)
            # In a loop, which one function has all of.
            arguments = compile_args(steps_per_execution=2, **MODES[mode])
            model.compile(**arguments())
        batch = tf.data.Dataset.from_tensors(test_utils.microbatches([8])[0])
        # Without end no batch is short, and nothing depends on it.
        data = iter(strategy.experimental_distribute_dataset(batch.repeat()))
        train = model.make_train_function()
        program = Program(tf.function(lambda: train(data), autograph=False))
        nodes = [program.top, *program.bodies.values()]
        return collections.Counter(
            node.op
            for each in nodes
            for node in each
            if not node.op.startswith(
                ("Identity", "IteratorGetNext", "NoOp", "Optional", "Placeh")
            )
        )


class RefusalTest(tf.test.TestCase):
    def assertRefused(self, message):
        with self.assertRaisesRegex(ValueError, message):
            test_utils.accumulating()

    def test_central_storage(self):
        strategy = tf.distribute.experimental.CentralStorageStrategy(
            ["CPU:0", "CPU:1"], "CPU:0"
        )
        with strategy.scope():
            self.assertRefused(
                "none, `OneDeviceStrategy`, `MirroredStrategy`, "
                "`MultiWorkerMirroredStrategy` and `TPUStrategy`. Received: "
                "CentralStorageStrategy"
            )

    def test_parameter_server(self):
        strategy = mock.create_autospec(
            tf.distribute.ParameterServerStrategy, instance=True
        )
        with (
            mock.patch.object(
                tf.distribute, "get_strategy", return_value=strategy
            ),
            mock.patch.object(tf.distribute, "has_strategy", return_value=True),
        ):
            self.assertRefused("`MirroredStrategy`.*Received: ")

    def test_old_keras(self):
        with (
            test_utils.mirrored().scope(),
            mock.patch.object(compat, "are_summed_on_read", lambda: False),
        ):
            self.assertRefused("Keras 3.10.*Received: Keras 3.*one replica")

    def test_keras_distribution(self):
        try:
            distribution = keras.distribution.DataParallel(devices=["cpu:0"])
        except AttributeError:
            self.skipTest("Keras has none for TensorFlow in this release.")
        keras.distribution.set_distribution(distribution)
        self.addCleanup(keras.distribution.set_distribution, None)
        self.assertRefused("`distribution`.*DataParallel.*`MirroredStrategy`")

    def test_without_accumulation_all_are_kerass(self):
        strategy = tf.distribute.experimental.CentralStorageStrategy(
            ["CPU:0", "CPU:1"], "CPU:0"
        )
        with strategy.scope():
            model = test_utils.accumulating(accum_steps=1)
            with self.assertRaisesRegex(ValueError, "CentralStorageStrategy"):
                model.accum_steps = 2


if __name__ == "__main__":
    tf.test.main()
