"""A batch that is split into micro-batches trains as if it were whole."""

import functools
import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from keras_accum import microbatching
from keras_accum import training
from tests import equivalence_test
from tests import test_utils

MODES = {
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
    "eager": {"jit_compile": False, "run_eagerly": True},
}


def in_microbatches(build=test_utils.mlp, microbatch_size=3, **kwargs):
    """Builds with `GradientAccumulationModel` and a `microbatch_size`."""
    return build(
        keras_accum.GradientAccumulationModel,
        microbatch_size=microbatch_size,
        **kwargs,
    )


def masked_tokens(rows, seed=0):
    """Returns tokens; each row has fewer than the one before."""
    tokens = np.random.default_rng(seed).integers(1, 9, (rows, 12))
    lengths = np.linspace(12, 1, rows).astype(int)
    return tokens * (np.arange(12) < lengths[:, None])


def sizes_of(data, size):
    """Returns how many rows the micro-batches have that `fold` makes."""
    return microbatching.fold(
        data,
        size,
        lambda microbatch: tf.nest.flatten(microbatch)[0].shape[:1],
        lambda sizes, microbatch: tf.concat(
            [sizes, tf.nest.flatten(microbatch)[0].shape[:1]], axis=0
        ),
    )


class FoldTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        (100, 32, [32, 32, 32, 4]),
        (64, 32, [32, 32]),
        (32, 32, [32]),
        (5, 32, [5]),
        (3, 1, [1, 1, 1]),
        (0, 4, [0]),
        (7, None, [7]),
    )
    def test_takes_rows_in_their_order(self, rows, size, expected):
        x = tf.reshape(tf.range(rows * 2), (rows, 2))

        def sizes_and_rows(data):
            microbatches = []
            microbatching.fold(
                data,
                size,
                lambda microbatch: (
                    microbatches.append(microbatch) or tf.constant(0)
                ),
                lambda result, microbatch: (
                    microbatches.append(microbatch) or result
                ),
            )
            return microbatches

        microbatches = sizes_and_rows({"a": x, "b": None})
        self.assertEqual(
            [len(microbatch["a"]) for microbatch in microbatches], expected
        )
        self.assertAllEqual(tf.concat([p["a"] for p in microbatches], 0), x)
        self.assertTrue(
            all(microbatch["b"] is None for microbatch in microbatches)
        )

    @parameterized.product(is_static=(False, True), rows=(0, 1, 6, 7, 9))
    def test_in_a_graph(self, is_static, rows):
        @tf.function(
            input_signature=[tf.TensorSpec((rows if is_static else None, 2))]
        )
        def squares(x):
            def square(microbatch):
                if is_static and rows:
                    self.assertIsNotNone(microbatch.shape[0])
                tf.debugging.assert_less_equal(tf.shape(microbatch)[0], 3)
                return microbatch**2

            return microbatching.concatenated(x, 3, square)

        x = np.random.default_rng(0).normal(size=(rows, 2)).astype("float32")
        self.assertAllClose(squares(x), x**2)

    @parameterized.parameters(False, True)
    def test_sparse_and_ragged_rows(self, is_ragged):
        rows = [[1, 0, 2], [0, 3, 0], [4, 5, 6], [0, 0, 7], [8, 0, 0]]
        if is_ragged:
            data = tf.ragged.constant(rows)
        else:
            data = tf.sparse.from_dense(rows)

        @tf.function
        def sums(data):
            def sum_of(microbatch):
                if is_ragged:
                    return tf.reduce_sum(microbatch.to_tensor(), axis=1)
                return tf.sparse.reduce_sum(microbatch, axis=1)

            return microbatching.concatenated(
                data,
                2,
                lambda microbatch: tf.ensure_shape(sum_of(microbatch), [None]),
            )

        self.assertAllEqual(sums(data), [3, 3, 15, 7, 8])


class DenominatorsTest(test_utils.TestCase, parameterized.TestCase):
    """Losses with denominators of their own; one weight would not be exact."""

    microbatch_size = 3

    @parameterized.parameters(
        ("graph", "mean_with_sample_weight", "sum"),
        ("xla", "sum_over_batch_size", "sum_over_batch_size"),
        ("eager", "mean_with_sample_weight", "sum"),
    )
    @test_utils.first_command(0, 2)
    def test_outputs_with_different_masks_and_weights(self, mode, *reductions):
        self.check_outputs(mode, reductions)

    @parameterized.parameters(
        ("graph", "sum_over_batch_size", "sum_over_batch_size"),
        ("xla", "mean_with_sample_weight", "sum"),
        ("eager", "sum_over_batch_size", "sum_over_batch_size"),
    )
    @test_utils.first_command(second=(0,))
    def test_outputs_with_other_reductions(self, mode, *reductions):
        self.check_outputs(mode, reductions)

    def check_outputs(self, mode, reductions):
        rng = np.random.default_rng(0)
        windows = []
        for seed in range(3):
            tokens = masked_tokens(8, seed)
            weights = [
                rng.uniform(0, 2, (8, 12)).astype("float32"),
                rng.uniform(0, 2, 8).astype("float32"),
            ]
            windows.append([(tokens, [tokens % 5, tokens[:, 0] % 5], weights)])
        actual, _ = self.assertTrainsAlike(
            functools.partial(
                equivalence_test.masked_and_not, regularizer="l2"
            ),
            lambda: {
                "optimizer": keras.optimizers.SGD(0.1),
                "loss": [
                    test_utils.crossentropy(reduction=reduction)
                    for reduction in reductions
                ],
                "loss_weights": [0.3, 2.0],
                **MODES[mode],
            },
            windows,
        )
        self.assertTrue(actual._accumulation.losses.uses_denominators())

    @parameterized.parameters(*MODES)
    @test_utils.first_command(second=(0,))
    def test_masks_with_added_losses(self, mode):
        def build(cls, **kwargs):
            keras.utils.set_random_seed(7)
            tokens = keras.Input((None,), dtype="int32")
            hidden = keras.layers.Embedding(9, 4, mask_zero=True)(tokens)
            hidden = keras.layers.Dense(
                5, activity_regularizer="l2", kernel_regularizer="l1"
            )(hidden)
            return cls(tokens, hidden, **kwargs)

        windows = [
            [(masked_tokens(8, seed), masked_tokens(8, seed + 9) % 5)]
            for seed in range(3)
        ]
        actual, _ = self.assertTrainsAlike(
            build,
            lambda: {
                "optimizer": keras.optimizers.SGD(0.1),
                "loss": test_utils.crossentropy(),
                **MODES[mode],
            },
            windows,
        )
        self.assertTrue(actual._accumulation.losses.uses_denominators())

    @pytest.mark.thorough
    def test_reported_losses(self):
        tokens = masked_tokens(8)
        batch = (tokens, [tokens % 5, tokens[:, 0] % 5])
        reported = []
        for model in (
            equivalence_test.masked_and_not(keras.Model),
            in_microbatches(equivalence_test.masked_and_not),
        ):
            model.compile(
                "sgd",
                loss=[test_utils.crossentropy(), test_utils.crossentropy()],
                metrics=[["accuracy"], ["accuracy"]],
                jit_compile=False,
            )
            logs = [model.train_on_batch(*batch), model.test_on_batch(*batch)]
            reported.append(logs)
        self.assertAllClose(*reported)


class FitTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters(("graph", True), ("xla", False), ("eager", False))
    @test_utils.first_command(0, second=(1,))
    def test_fit_evaluate_and_predict(self, mode, known_length):
        self.check_fit(mode, known_length)

    @parameterized.parameters(("graph", False), ("xla", True), ("eager", True))
    @test_utils.at_night
    def test_fit_evaluate_and_predict_otherwise(self, mode, known_length):
        self.check_fit(mode, known_length)

    def check_fit(self, mode, known_length):
        # The last batch is shorter than a micro-batch.
        batches = test_utils.microbatches([10, 10, 2])
        x, y = test_utils.concatenate(batches)
        expected, actual = test_utils.mlp(), in_microbatches()
        initial = expected.get_weights()
        reported = []
        for model in (expected, actual):
            model.compile(
                "adam",
                loss=test_utils.crossentropy(),
                metrics=["accuracy"],
                **MODES["eager" if model is expected else mode],
            )
            history = model.fit(
                test_utils.dataset(batches, True)
                if known_length
                else tf.data.Dataset.from_tensor_slices((x, y)).batch(11),
                epochs=2,
                verbose=0,
                validation_data=(x, y),
                validation_batch_size=10,
            )
            reported.append(
                [
                    *history.history.values(),
                    model.evaluate(x, y, batch_size=22, verbose=0),
                    model.predict(x, batch_size=22, verbose=0),
                    model.predict_on_batch(x[:4]),
                ]
            )
        self.assertSameTraining(actual, expected, initial)
        for mine, theirs in zip(*reported, strict=True):
            self.assertAllClose(mine, theirs, rtol=1e-5)

    @parameterized.parameters("mlp", "masked_and_not")
    @test_utils.first_command(0)
    def test_evaluates_many_batches_before_any_fit(self, name):
        if name == "mlp":
            build = test_utils.mlp
            x, y = test_utils.microbatches([22])[0]
        else:
            build = equivalence_test.masked_and_not
            x = masked_tokens(22)
            y = [x % 5, x[:, 0] % 5]
        reported = []
        for model in (build(keras.Model), in_microbatches(build)):
            loss = test_utils.crossentropy()
            model.compile(
                "sgd",
                loss if name == "mlp" else [loss, loss],
                jit_compile=False,
            )
            reported.append(
                [
                    model.evaluate(x, y, batch_size=5, verbose=0)
                    for _ in range(2)
                ]
            )
        self.assertAllClose(*reported, rtol=1e-5)

    def test_predict_puts_nested_outputs_together(self):
        inputs = keras.Input((2,), name="in")
        model = keras_accum.GradientAccumulationModel(
            {"in": inputs},
            {"a": inputs + 1, "b": [inputs * 2]},
            microbatch_size=3,
        )
        x = np.arange(14.0, dtype="float32").reshape(7, 2)
        outputs = model.predict({"in": x}, batch_size=7, verbose=0)
        self.assertAllClose(outputs["a"], x + 1)
        self.assertAllClose(outputs["b"][0], x * 2)

    def test_steps_per_execution(self):
        batches = test_utils.microbatches([8, 7, 5, 3, 4])
        expected, actual = test_utils.mlp(), in_microbatches()
        initial = expected.get_weights()
        for model in (expected, actual):
            model.compile(
                "adam",
                loss=test_utils.crossentropy(),
                steps_per_execution=2,
                jit_compile=False,
            )
            model.run_eagerly = model is expected
            model.fit(test_utils.dataset(batches, True), verbose=0)
        self.assertSameTraining(actual, expected, initial)

    def test_random_generators_advance_with_micro_batches(self):
        inputs = keras.Input((64,))
        dropped = keras.layers.Dropout(0.5, seed=1)(inputs)
        masks = []

        class Masks(keras_accum.GradientAccumulationModel):
            def compute_loss(self, x, y, y_pred, sample_weight, training):
                # The loss is looked at eagerly, before.
                if not tf.executing_eagerly():
                    tf.numpy_function(
                        lambda pred: masks.append(pred != 0), [y_pred], []
                    )
                return keras.ops.mean(y_pred * keras.ops.mean(self.scale))

        model = Masks(inputs, dropped, microbatch_size=1)
        model.scale = model.add_weight(name="scale")
        model.compile("sgd", jit_compile=False)
        model.fit(np.ones((4, 64)), batch_size=4, epochs=2, verbose=0)
        self.assertLen({mask.tobytes() for mask in masks}, 8)

    def test_a_data_set_that_ends_changes_nothing(self):
        # Of unknown length: its end is seen when one more is asked for.
        batches = test_utils.microbatches([7, 7])
        inputs = keras.Input((test_utils.FEATURES,))
        hidden = keras.layers.Dropout(0.5, seed=1)(inputs)
        model = keras_accum.GradientAccumulationModel(
            inputs, keras.layers.Dense(3)(hidden), microbatch_size=3
        )
        model.compile("adam", loss=test_utils.crossentropy(), jit_compile=False)
        states = []
        for known_length in (True, False):
            model.fit(test_utils.dataset(batches, known_length), verbose=0)
            (seed,) = [v for v in model.variables if "seed" in v.path]
            states.append((int(model.optimizer.iterations), int(seed[1])))
        # Two updates, of three micro-batches each.
        self.assertEqual(states, [(2, 6), (4, 12)])

    @parameterized.parameters(False, True)
    @test_utils.first_command(1)
    def test_sparse_and_ragged_inputs(self, is_ragged):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(7, 6)).astype("float32") * (
            rng.uniform(size=(7, 6)) < 0.5
        )
        y = rng.normal(size=(7, 1)).astype("float32")
        data = tf.RaggedTensor.from_tensor(x) if is_ragged else None
        trained = []
        for cls, kwargs in (
            (keras.Model, {}),
            (keras_accum.GradientAccumulationModel, {"microbatch_size": 3}),
        ):
            keras.utils.set_random_seed(0)

            class Linear(cls):
                def __init__(self, **kwargs):
                    super().__init__(**kwargs)
                    self.dense = keras.layers.Dense(1)
                    self.dense.build((None, 6))

                def call(self, inputs):
                    if isinstance(inputs, tf.RaggedTensor):
                        inputs = inputs.to_tensor(shape=(None, 6))
                    return self.dense(inputs)

            model = Linear(**kwargs)
            model.compile("sgd", loss="mse", jit_compile=False)
            inputs = data if is_ragged else tf.sparse.from_dense(x)
            dataset = tf.data.Dataset.from_tensors((inputs, y))
            model.fit(dataset, verbose=0)
            trained.append(model.get_weights())
        self.assertAllClose(*trained)

    def test_changing_the_size(self):
        batches = test_utils.microbatches([8, 8, 8, 8])
        expected, actual = (
            test_utils.mlp(),
            test_utils.accumulating(accum_steps=1),
        )
        initial = expected.get_weights()
        for model in (expected, actual):
            model.compile(
                "adam", loss=test_utils.crossentropy(), jit_compile=False
            )
        expected.run_eagerly = True
        for batch, size in zip(batches, (None, 3, 5, None), strict=True):
            actual.microbatch_size = size
            self.assertEqual(actual.microbatch_size, size)
            for model in (expected, actual):
                model.train_on_batch(*batch)
        self.assertSameTraining(actual, expected, initial)

    def test_a_step_that_fails_leaves_no_window(self):
        expected, actual = test_utils.mlp(), in_microbatches()
        initial = expected.get_weights()
        (x, y), other = test_utils.microbatches([8, 8])
        for model in (expected, actual):
            model.compile(
                "adam", loss=test_utils.crossentropy(), jit_compile=False
            )
            model.run_eagerly = model is expected
            model.train_on_batch(x, y)
        # The labels of the last micro-batch do not exist.
        wrong = np.where(np.arange(8) < 7, y, 99)
        actual.compile("adam", loss=checked_crossentropy, jit_compile=False)
        before = actual.get_weights()
        with self.assertRaises(tf.errors.InvalidArgumentError):
            actual.train_on_batch(x, wrong)
        self.assertAllClose(before, actual.get_weights(), 0, 0)
        self.assertEqual(test_utils.num_microbatches(actual), 0)
        for model in (expected, actual):
            model.compile(
                "adam", loss=test_utils.crossentropy(), jit_compile=False
            )
            model.run_eagerly = model is expected
            model.train_on_batch(*other)
        self.assertSameTraining(actual, expected, initial)


def checked_crossentropy(y_true, y_pred):
    tf.debugging.assert_less(y_true, tf.cast(3, y_true.dtype))
    return keras.losses.sparse_categorical_crossentropy(
        y_true, y_pred, from_logits=True
    )


class ProgramTest(test_utils.TestCase):
    def graph_size(self, rows):
        model = in_microbatches()
        model.compile("adam", loss=test_utils.crossentropy(), jit_compile=False)
        programs = training.Programs(model._accumulation)
        step = programs.make_step()
        batch = test_utils.microbatches([rows])[0]
        graph = (
            tf.function(step, autograph=False)
            .get_concrete_function(tf.nest.map_structure(tf.constant, batch))
            .graph.as_graph_def()
        )
        functions = graph.library.function
        return len(graph.node) + sum(len(f.node_def) for f in functions)

    def test_does_not_grow_with_the_batch(self):
        self.assertEqual(self.graph_size(12), self.graph_size(96))

    def test_batches_of_other_sizes_are_not_traced_again(self):
        counted, traces = test_utils.counting_traces()
        model = test_utils.mlp(counted, microbatch_size=3)
        model.compile("adam", loss=test_utils.crossentropy(), jit_compile=False)
        model.fit(
            test_utils.dataset(test_utils.microbatches([7, 30, 2, 300])),
            verbose=0,
        )
        # One is of all micro-batches; one finds out what `compute_loss` looks
        # at.
        self.assertLen(traces, 2)


class SavingTest(test_utils.TestCase):
    def test_round_trip(self):
        path = os.path.join(self.get_temp_dir(), "model.keras")
        for name, value in (
            ("microbatch_size", 5),
            ("microbatch_size", "auto"),
            ("effective_batch_size", 24),
        ):
            model = test_utils.mlp(
                keras_accum.GradientAccumulationModel, **{name: value}
            )
            model.save(path)
            loaded = keras.saving.load_model(path)
            self.assertEqual(getattr(loaded, name), value)
            self.assertEqual(loaded.accum_steps, 1)


class EffectiveBatchSizeTest(test_utils.TestCase, parameterized.TestCase):
    def model(self, size):
        model = test_utils.mlp(
            keras_accum.GradientAccumulationModel, effective_batch_size=size
        )
        model.compile("adam", loss=test_utils.crossentropy(), jit_compile=False)
        return model

    def test_counts_the_batches_of_the_first_ones_size(self):
        x, y = test_utils.concatenate(test_utils.microbatches([22]))
        expected, actual = test_utils.mlp(), self.model(12)
        initial = expected.get_weights()
        expected.compile(
            "adam", loss=test_utils.crossentropy(), jit_compile=False
        )
        expected.run_eagerly = True
        for size, k in ((4, 3), (6, 2), (12, 1)):
            actual.fit(x, y, batch_size=size, shuffle=False, verbose=0)
            self.assertEqual(actual.accum_steps, k)
            expected.fit(x, y, batch_size=12, shuffle=False, verbose=0)
        self.assertSameTraining(actual, expected, initial)

    @parameterized.parameters((12, 5), (4, 8))
    def test_must_be_a_multiple(self, size, rows):
        model = self.model(size)
        batch = test_utils.microbatches([rows])[0]
        with self.assertRaisesRegex(
            ValueError,
            f"effective_batch_size={size}, with {rows} rows on each of 1 repl",
        ):
            model.fit(*batch, batch_size=rows, verbose=0)

    def test_replicas_count(self):
        strategy, missing = test_utils.chosen_strategy()
        if missing:
            self.skipTest(missing)
        num_replicas = strategy.num_replicas_in_sync
        with strategy.scope():
            model = self.model(12 * num_replicas)
        batches = test_utils.microbatches([4 * num_replicas] * 6)
        model.fit(test_utils.dataset(batches), verbose=0)
        self.assertEqual(model.accum_steps, 3)
        self.assertEqual(model.optimizer.iterations.numpy(), 2)


class ErrorsTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        (0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)
    )
    def test_sizes(self, value, error):
        for name in ("microbatch_size", "effective_batch_size"):
            with self.assertRaisesRegex(
                error, f"`{name}` must be a positive int.*{name}={value}"
            ):
                test_utils.mlp(
                    keras_accum.GradientAccumulationModel, **{name: value}
                )

    def test_unknown_word(self):
        with self.assertRaisesRegex(TypeError, "microbatch_size='most'"):
            in_microbatches(microbatch_size="most")

    def test_one_of_them(self):
        with self.assertRaisesRegex(
            ValueError, "give one of them. Received: accum_steps=2, micro"
        ):
            in_microbatches(accum_steps=2)
        model = in_microbatches()
        with self.assertRaisesRegex(ValueError, "give one of them"):
            model.accum_steps = 2
        model.microbatch_size = None
        model.accum_steps = 2
        with self.assertRaisesRegex(
            ValueError, "Received: .*set its `accum_steps` to 1, or the others"
        ):
            model.microbatch_size = 3
        # It says how.
        model.accum_steps = 1
        model.microbatch_size = 3
        self.assertEqual(model.microbatch_size, 3)

    @parameterized.parameters(*MODES)
    def test_batches_that_cannot_be_split_along_their_first_axis(self, mode):
        model = in_microbatches()
        model.compile("sgd", loss="mse", **MODES[mode])
        x = np.zeros((8, test_utils.FEATURES))
        with self.assertRaisesRegex(ValueError, "cut along the first axis"):
            model.train_on_batch(x, np.zeros((7, 3)))


if __name__ == "__main__":
    tf.test.main()
