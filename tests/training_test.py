"""Everything that `fit` offers, with windows in it."""

import os
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from tests import test_utils

K, ROWS, WINDOWS = 4, 6, 3


def data(seed=0):
    return test_utils.microbatches([ROWS] * K * WINDOWS, seed)


class Batches(keras.utils.PyDataset):
    """Micro-batches as a `PyDataset`."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def generator(batches):
    while True:
        for batch in batches:
            yield keras.tree.map_structure(np.copy, batch)


# Name: what `fit` gets, from the batches.
INPUTS = {
    "tf_data": lambda batches: {
        "x": tf.data.Dataset.from_tensor_slices(
            tuple(map(np.stack, zip(*batches, strict=True)))
        )
    },
    "unknown_length": lambda batches: {"x": test_utils.dataset(batches)},
    "known_length": lambda batches: {"x": test_utils.dataset(batches, True)},
    "repeated": lambda batches: {
        "x": test_utils.dataset(batches).repeat(),
        "steps_per_epoch": len(batches),
    },
    "numpy": lambda batches: dict(
        zip("xy", test_utils.concatenate(batches), strict=True),
        batch_size=len(batches[0][0]),
    ),
    "generator": lambda batches: {
        "x": generator(batches),
        "steps_per_epoch": len(batches),
    },
    "py_dataset": lambda batches: {"x": Batches(batches)},
}

# Without an accelerator Keras's default, "auto", is not XLA.
MODES = {
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
    "eager": {"run_eagerly": True},
    "loop": {"steps_per_execution": 5, "jit_compile": False},
}
OTHER_MODES = {
    "auto": {"jit_compile": "auto"},
    "loop_xla": {"steps_per_execution": 7, "jit_compile": True},
    "loop_eager": {"steps_per_execution": 5, "run_eagerly": True},
    "loop_of_all": {"steps_per_execution": 100, "jit_compile": False},
}


def fit(model, batches, unrolled=1, epochs=2, **compile_args):
    """Compiles and fits; returns the history as a dict."""
    inputs = compile_args.pop("inputs", "unknown_length")
    model.compile(
        keras.optimizers.Adam(0.01),
        loss=test_utils.crossentropy(),
        metrics=["accuracy"],
        weighted_metrics=["accuracy"],
        **compile_args,
    )
    model.unrolled_steps_per_execution = unrolled
    return model.fit(
        epochs=epochs, shuffle=False, verbose=0, **INPUTS[inputs](batches)
    ).history


class FitTest(test_utils.TestCase, parameterized.TestCase):
    def assertFitsAlike(self, batches, **kwargs):
        expected, actual = test_utils.mlp(), test_utils.accumulating()
        initial = expected.get_weights()
        large = [
            test_utils.concatenate(batches[i : i + K])
            for i in range(0, len(batches), K)
        ]
        expected_history = fit(
            expected, large, inputs="known_length", run_eagerly=True
        )
        history = fit(actual, batches, **kwargs)
        self.assertSameWeights(
            actual.get_weights(), expected.get_weights(), initial
        )
        self.assertAllClose(history, expected_history, rtol=1e-5)
        self.assertEqual(int(actual.optimizer.iterations), 2 * WINDOWS)

    @parameterized.named_parameters((name, name) for name in INPUTS)
    @test_utils.first_command(
        "_tf_data", "_numpy", "_generator", "_unknown_length"
    )
    def test_inputs(self, name):
        self.assertFitsAlike(data(), inputs=name, jit_compile=False)

    @parameterized.named_parameters((name, name) for name in MODES)
    def test_modes(self, name):
        self.assertFitsAlike(data(), **MODES[name])

    @parameterized.named_parameters((name, name) for name in OTHER_MODES)
    @test_utils.first_command("_loop_xla", "_auto")
    @pytest.mark.thorough
    def test_other_modes(self, name):
        self.assertFitsAlike(data(), **OTHER_MODES[name])

    # As many as there are, fewer, and more.
    @parameterized.parameters((2, 2), (5, 3), (2, 200))
    @test_utils.first_command(second=(0,))
    def test_unrolled_loops(self, steps, unrolled):
        self.assertFitsAlike(
            data(),
            steps_per_execution=steps,
            unrolled=unrolled,
            jit_compile=False,
        )

    def check_uneven(self, **mode):
        sizes = [8, 1, 1, 7, 2, 9, 5, 5, 3, 4]
        self.assertFitsAlike(test_utils.microbatches(sizes), **mode)

    @parameterized.parameters("graph", "loop")
    @test_utils.first_command(1)
    def test_uneven_microbatches_and_partial_windows(self, mode):
        self.check_uneven(**MODES[mode])

    @parameterized.parameters("xla", "eager", "loop_xla")
    @test_utils.at_night
    def test_uneven_microbatches_and_partial_windows_elsewhere(self, mode):
        self.check_uneven(**(MODES | OTHER_MODES)[mode])

    @pytest.mark.thorough
    def test_sample_weight(self):
        rng = np.random.default_rng(0)
        batches = [
            (x, y, rng.uniform(0, 2, len(x)).astype("float32"))
            for x, y in data()
        ]
        self.assertFitsAlike(batches)

    def test_numpy_with_validation_and_sample_weight(self):
        x, y = test_utils.concatenate(data())
        weight = np.linspace(0, 2, len(x)).astype("float32")
        histories = []
        for model, batch_size in (
            (test_utils.mlp(), K * ROWS),
            (test_utils.accumulating(), ROWS),
        ):
            model.compile(
                "adam",
                loss=test_utils.crossentropy(),
                run_eagerly=batch_size > ROWS,
            )
            histories.append(
                model.fit(
                    x,
                    y,
                    batch_size,
                    3,
                    0,
                    sample_weight=weight,
                    validation_split=0.25,
                    shuffle=False,
                ).history
            )
        self.assertAllClose(*histories, rtol=1e-5)

    @pytest.mark.thorough
    def test_validation_after_an_evaluation(self):
        x, y = test_utils.concatenate(data())
        losses = []
        for evaluate_first in (False, True):
            model = test_utils.accumulating()
            model.compile(
                "sgd", loss=test_utils.crossentropy(), jit_compile=False
            )
            if evaluate_first:
                model.evaluate(x, y, batch_size=8, verbose=0)
            history = model.fit(
                x,
                y,
                4,
                shuffle=False,
                verbose=0,
                validation_data=(x, y),
                validation_batch_size=8,
            )
            losses.append(history.history["val_loss"])
        self.assertAllClose(*losses)
        self.assertGreater(losses[0][0], 0.5)

    def test_nested_inputs_and_outputs(self):
        def build(cls, **kwargs):
            keras.utils.set_random_seed(7)
            inputs = {
                "a": keras.Input((4,), name="a"),
                "b": keras.Input((2,), name="b"),
            }
            both = keras.layers.Concatenate()(list(inputs.values()))
            outputs = [
                keras.layers.Dense(1)(both),
                keras.layers.Dense(2)(both),
            ]
            return cls(inputs, outputs, **kwargs)

        rng = np.random.default_rng(0)

        def batch(rows):
            x = {
                "a": rng.normal(size=(rows, 4)),
                "b": rng.normal(size=(rows, 2)),
            }
            return x, [rng.normal(size=(rows, 1)), rng.normal(size=(rows, 2))]

        self.assertTrainsAlike(
            build,
            lambda: {
                "optimizer": "sgd",
                "loss": ["mse", "mae"],
                "loss_weights": [1.0, 3.0],
            },
            [[batch(rows) for rows in (5, 3, 1)] for _ in range(3)],
        )

    def test_reported_loss_of_masked_outputs(self):
        def build(cls, **kwargs):
            keras.utils.set_random_seed(7)
            tokens = keras.Input((12,), dtype="int32")
            hidden = keras.layers.Embedding(9, 4, mask_zero=True)(tokens)
            return cls(tokens, keras.layers.Dense(5)(hidden), **kwargs)

        rng = np.random.default_rng(0)
        batches = []
        for length in [12, 3, 2, 1] * 3:
            tokens = rng.integers(1, 9, (2, 12))
            tokens[:, length:] = 0
            batches.append((tokens, tokens % 5))
        large = [test_utils.concatenate(batches[i : i + 4]) for i in (0, 4, 8)]
        losses = []
        for model, each in (
            (build(keras.Model), large),
            (test_utils.accumulating(build), batches),
        ):
            model.compile(
                "sgd", loss=test_utils.crossentropy(), jit_compile=False
            )
            model.run_eagerly = each is large
            batches_of_each = test_utils.dataset(each, known_length=True)
            history = model.fit(batches_of_each, epochs=2, verbose=0)
            losses.append(history.history["loss"])
        self.assertAllClose(*losses, rtol=1e-6)

    @parameterized.parameters("sum", "mean", "mean_with_sample_weight", None)
    @test_utils.first_command(0, 3)
    def test_reported_loss_of_every_reduction(self, reduction):
        batches = test_utils.microbatches([8, 1, 1, 7, 2, 9, 5, 5])
        large = [test_utils.concatenate(batches[i : i + 4]) for i in (0, 4)]
        regularizer = None if reduction is None else "l2"
        losses = []
        for model, each in (
            (test_utils.mlp(regularizer=regularizer), large),
            (test_utils.accumulating(regularizer=regularizer), batches),
        ):
            model.compile(
                "sgd",
                loss=test_utils.crossentropy(reduction=reduction),
                jit_compile=False,
            )
            model.run_eagerly = each is large
            batches_of_each = test_utils.dataset(each, known_length=True)
            history = model.fit(batches_of_each, epochs=2, verbose=0)
            losses.append(history.history["loss"])
        self.assertAllClose(*losses, rtol=1e-6)

    @parameterized.parameters(
        ("mean", False, "graph"),
        ("mean", True, "eager"),
        ("sum", False, "xla"),
        ("sum", True, "graph"),
        ("mean_with_sample_weight", False, "eager"),
        ("mean_with_sample_weight", True, "xla"),
    )
    @test_utils.first_command(1, second=(2,))
    def test_reported_losses_of_outputs(self, reduction, known_rows, mode):
        def build(cls, **kwargs):
            keras.utils.set_random_seed(7)
            inputs = keras.Input((4,))
            outputs = {
                "a": keras.layers.Dense(1, name="a")(inputs),
                "b": keras.layers.Dense(2, name="b")(inputs),
            }
            return cls(inputs, outputs, **kwargs)

        sizes = [4] * 6 if known_rows else [4, 2, 5, 3, 1, 4]
        rng = np.random.default_rng(0)
        batches = [
            (
                rng.normal(size=(n, 4)),
                {"a": rng.normal(size=(n, 1)), "b": rng.normal(size=(n, 2))},
                rng.uniform(0, 2, n),
            )
            for n in sizes
        ]
        large = [test_utils.concatenate(batches[i : i + 2]) for i in (0, 2, 4)]
        histories = []
        for model, each in (
            (build(keras.Model), large),
            (test_utils.accumulating(build, accum_steps=2), batches),
        ):
            model.compile(
                "sgd",
                loss={
                    "a": keras.losses.MeanSquaredError(reduction=reduction),
                    "b": keras.losses.MeanAbsoluteError(reduction=reduction),
                },
                loss_weights={"a": 0.5, "b": 2.0},
                # How Keras weighs these losses depends on it.
                **MODES[mode],
            )
            fed = test_utils.dataset(each, known_length=True)
            if known_rows:
                rows = len(each[0][0])
                fed = fed.unbatch().batch(rows, drop_remainder=True)
                fed = fed.apply(
                    tf.data.experimental.assert_cardinality(len(each))
                )
            history = model.fit(
                fed, epochs=2, verbose=0, validation_data=large[0][:2]
            )
            histories.append(history.history)
        self.assertIn("a_loss", histories[0])
        self.assertIn("val_b_loss", histories[0])
        self.assertAllClose(*histories, rtol=1e-5)

    @parameterized.parameters("graph", "loop")
    @test_utils.first_command(0)
    def test_subclassed_unbuilt_model(self, mode):
        self.check_unbuilt(**MODES[mode])

    @parameterized.parameters("xla", "eager", *OTHER_MODES)
    @test_utils.first_command(second=(0,))
    def test_subclassed_unbuilt_model_elsewhere(self, mode):
        self.check_unbuilt(**(MODES | OTHER_MODES)[mode])

    def check_unbuilt(self, **mode):
        class Net(keras_accum.GradientAccumulationModel):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.dense = keras.layers.Dense(
                    8, activation="tanh", kernel_initializer="ones"
                )
                self.norm = keras.layers.BatchNormalization()
                self.drop = keras.layers.Dropout(0.1)
                self.out = keras.layers.Dense(3)

            def call(self, inputs, training=False):
                hidden = self.norm(self.dense(inputs), training=training)
                return self.out(self.drop(hidden, training=training))

        model = Net(accum_steps=2)
        fit(model, data(), **mode)
        self.assertEqual(int(model.optimizer.iterations), 2 * WINDOWS * K // 2)

    def test_no_trainable_weights(self):
        model = test_utils.accumulating()
        model.trainable = False
        model.compile("sgd", loss=test_utils.crossentropy(), jit_compile=False)
        with self.assertWarnsRegex(UserWarning, "any trainable weights"):
            model.train_on_batch(*data()[0])


class OneTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.named_parameters((name, name) for name in MODES)
    @test_utils.first_command("_graph", second=("_xla",))
    def test_accum_steps_1_is_keras_model_to_the_bit(self, name):
        self.check_bits(**MODES[name])

    @parameterized.named_parameters((name, name) for name in OTHER_MODES)
    @test_utils.first_command(second=("_auto",))
    def test_accum_steps_1_is_keras_model_elsewhere(self, name):
        self.check_bits(**OTHER_MODES[name])

    def check_bits(self, **mode):
        results = []
        for model in (
            test_utils.mlp(),
            test_utils.mlp(keras_accum.GradientAccumulationModel),
        ):
            history = fit(model, data(), **mode)
            state = [v.numpy() for v in model.optimizer.variables]
            results.append((model.get_weights(), state, history))
        self.assertAllClose(*results, rtol=0, atol=0)
        self.assertIsNone(test_utils.accumulator(model))

    def test_train_on_batch(self):
        results = []
        for model in (
            test_utils.mlp(),
            test_utils.mlp(keras_accum.GradientAccumulationModel),
        ):
            model.compile(
                "adam", loss=test_utils.crossentropy(), jit_compile=False
            )
            logs = [model.train_on_batch(*batch) for batch in data()]
            results.append((model.get_weights(), logs))
        self.assertAllClose(*results, rtol=0, atol=0)


class StepTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters(False, True)
    @test_utils.first_command(0)
    def test_between_boundaries_nothing_changes(self, jit_compile):
        model = test_utils.accumulating()
        model.compile(
            "adam", loss=test_utils.crossentropy(), jit_compile=jit_compile
        )
        changed = []
        for batch in data():
            before = model.get_weights()
            model.train_on_batch(*batch)
            after = model.get_weights()
            changed.append(
                any(
                    not np.array_equal(b, a)
                    for b, a in zip(before, after, strict=True)
                )
            )
        self.assertEqual(changed, [False, False, False, True] * WINDOWS)

    def test_train_on_batch_reports_the_micro_batch(self):
        model, plain = test_utils.accumulating(), test_utils.mlp()
        plain.compile(
            "sgd",
            loss=test_utils.crossentropy(),
            metrics=["acc"],
            jit_compile=False,
        )
        plain.run_eagerly = True
        model.compile(
            "sgd",
            loss=test_utils.crossentropy(),
            metrics=["acc"],
            jit_compile=False,
        )
        for batch in data()[:K]:
            expected = plain.test_on_batch(*batch)
            self.assertAllClose(model.train_on_batch(*batch), expected)

    @parameterized.parameters(False, True)
    @test_utils.first_command(0)
    def test_a_loop_of_ones_own(self, in_graph):
        batches = test_utils.microbatches([8, 7, 5, 3])
        expected, actual = test_utils.mlp(), test_utils.accumulating()
        initial = expected.get_weights()
        for model in (expected, actual):
            model.compile(
                "adam",
                loss=test_utils.crossentropy(reduction="sum"),
                jit_compile=False,
            )
        expected.run_eagerly = True
        step = tf.function(actual.train_step) if in_graph else actual.train_step
        for _ in range(3):
            for batch in batches:
                step(batch)
            actual.update_step()
            expected.train_on_batch(*test_utils.concatenate(batches))
        self.assertSameWeights(
            actual.get_weights(), expected.get_weights(), initial
        )

    def test_model_that_is_never_called(self):
        class Parts(keras_accum.GradientAccumulationModel):
            """As a GAN: there is nothing to build it with but the step."""

            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.first = keras.layers.Dense(4, activation="tanh")
                self.second = keras.layers.Dense(3)

            def train_step(self, data):
                x, y = data
                with tf.GradientTape() as tape:
                    outputs = self.second(self.first(x))
                    loss = tf.reduce_mean(
                        keras.losses.sparse_categorical_crossentropy(
                            y, outputs, from_logits=True
                        )
                    )
                gradients = tape.gradient(loss, self.trainable_weights)
                self.accumulate(gradients, tf.shape(x)[0])
                return {"loss": loss}

        model = Parts(accum_steps=3)
        model.compile("sgd", jit_compile=False)
        model.fit(test_utils.dataset(data()[:3] * 2), epochs=2, verbose=0)
        self.assertEqual(int(model.optimizer.iterations), 4)

    def test_train_step_that_calls_the_one_it_overrides(self):
        class Doubling(keras_accum.GradientAccumulationModel):
            def train_step(self, data):
                x, y = data
                return super().train_step((2.0 * x, y))

        model = test_utils.mlp(Doubling, accum_steps=2)
        model.compile("sgd", loss=test_utils.crossentropy(), jit_compile=False)
        x, y = data()[0]
        expected = model.evaluate(2.0 * x, y, batch_size=99, verbose=0)
        model.reset_metrics()
        self.assertAllClose(model.train_step((x, y))["loss"], expected)
        self.assertEqual(test_utils.num_microbatches(model), 1)

    def test_loop_after_fit(self):
        batches = test_utils.microbatches([8, 7, 5, 3])
        expected, actual = test_utils.mlp(), test_utils.accumulating()
        initial = expected.get_weights()
        for model in (expected, actual):
            model.compile(
                "sgd", loss=test_utils.crossentropy(), jit_compile=False
            )
        expected.run_eagerly = True
        actual.fit(test_utils.dataset(batches), verbose=0)
        for batch in batches:
            actual.train_step(batch)
        actual.flush()
        for _ in range(2):
            expected.train_on_batch(*test_utils.concatenate(batches))
        self.assertSameWeights(
            actual.get_weights(), expected.get_weights(), initial
        )

    @parameterized.product(accum_steps=(1, 4), jit_compile=(False, True))
    @test_utils.first_command(0, 2, second=(3,))
    def test_train_step_of_ones_own(self, accum_steps, jit_compile):
        class Mine(keras_accum.GradientAccumulationModel):
            def train_step(self, batch):
                x, y = batch
                with tf.GradientTape() as tape:
                    loss = self.compute_loss(x, y, self(x, training=True))
                gradients = tape.gradient(loss, self.trainable_weights)
                self.accumulate(gradients, tf.shape(x)[0])
                return {"my_loss": loss, "one": 1.0}

        model = test_utils.mlp(Mine, accum_steps=accum_steps)
        expected = test_utils.mlp()
        initial = expected.get_weights()
        batches = test_utils.microbatches([8, 7, 5, 3] * 3)
        large = [
            test_utils.concatenate(batches[i : i + accum_steps])
            for i in range(0, len(batches), accum_steps)
        ]
        for each in (model, expected):
            each.compile(
                "adam", loss=test_utils.crossentropy(), jit_compile=jit_compile
            )
        expected.run_eagerly = True
        history = model.fit(test_utils.dataset(batches), verbose=0).history
        self.assertEqual(sorted(history), ["my_loss", "one"])
        test_utils.train_on(expected, large)
        self.assertSameWeights(
            model.get_weights(), expected.get_weights(), initial
        )

    def test_mixin_keeps_the_train_step_behind_it(self):
        class Theirs(keras.Model):
            def train_step(self, batch):
                x, y = batch
                with tf.GradientTape() as tape:
                    loss = self.compute_loss(x, y, self(x, training=True))
                gradients = tape.gradient(loss, self.trainable_weights)
                self.accumulate(gradients, tf.shape(x)[0])
                return {"theirs": loss}

        class Mine(keras_accum.GradientAccumulationMixin, Theirs):
            pass

        model = test_utils.mlp(Mine, accum_steps=2)
        model.compile("sgd", loss=test_utils.crossentropy(), jit_compile=False)
        history = model.fit(test_utils.dataset(data()), verbose=0).history
        self.assertEqual(list(history), ["theirs"])
        self.assertEqual(int(model.optimizer.iterations), 6)

    def updating(self, update, policy=None, **kwargs):
        """Returns a model whose step ends with `update(model, gradients)`."""

        class Mine(keras_accum.GradientAccumulationModel):
            def train_step(self, batch):
                x, y = batch
                with tf.GradientTape() as tape:
                    loss = self.compute_loss(x, y, self(x, training=True))
                gradients = tape.gradient(loss, self.trainable_weights)
                update(self, gradients)
                return {"loss": loss}

        model = test_utils.mlp(Mine, dtype=policy, accum_steps=2, **kwargs)
        optimizer = keras.optimizers.SGD()
        if policy == "mixed_float16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        model.compile(
            optimizer, loss=test_utils.crossentropy(), jit_compile=False
        )
        return model

    @parameterized.product(
        update=(
            lambda model, gradients: model.optimizer.apply(
                gradients, model.trainable_weights
            ),
            lambda model, gradients: model.optimizer.apply_gradients(
                zip(gradients, model.trainable_weights, strict=True)
            ),
            lambda model, gradients: (
                model.accumulate(gradients),
                model.optimizer.apply(
                    grads=gradients,
                    trainable_variables=model.trainable_weights,
                ),
            ),
        ),
        policy=(None, "mixed_float16"),
    )
    def test_train_step_that_updates_is_refused(self, update, policy):
        model = self.updating(update, policy)
        before = model.get_weights()
        with self.assertRaisesRegex(
            RuntimeError, r"`self.accumulate.*training_test.py:\d+: .*optimizer"
        ):
            model.fit(test_utils.dataset(data()), verbose=0)
        self.assertAllClose(before, model.get_weights(), 0, 0)
        self.assertEqual(int(model.optimizer.iterations), 0)

    def test_train_step_that_forgets_is_refused(self):
        model = self.updating(lambda model, gradients: None)
        with self.assertRaisesRegex(RuntimeError, "without a call"):
            model.fit(test_utils.dataset(data()), verbose=0)

    def test_train_step_with_another_optimizer(self):
        other_optimizer = keras.optimizers.SGD(0.1)
        scale = keras.Variable(1.0)

        def update(model, gradients):
            other_optimizer.apply([tf.constant(1.0)], [scale])
            model.accumulate(gradients)

        other_optimizer.build([scale])
        model = self.updating(update)
        model.fit(test_utils.dataset(data()), verbose=0)
        self.assertEqual(int(other_optimizer.iterations), len(data()))
        # And by hand, nobody is in the way.
        model.optimizer.apply(
            [tf.zeros(v.shape) for v in model.trainable_weights],
            model.trainable_weights,
        )


class ChangeTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters(1, 3)
    def test_a_change_takes_effect_at_the_next_window(self, steps):
        counted, traces = test_utils.counting_traces()
        model = test_utils.mlp(counted, accum_steps=2)
        model.compile(
            "sgd",
            loss=test_utils.crossentropy(),
            steps_per_execution=steps,
            jit_compile=False,
        )
        dataset = test_utils.dataset(data()).cache()
        model.fit(dataset, verbose=0)
        self.assertEqual(int(model.optimizer.iterations), 6)
        traced = len(traces)
        model.accum_steps = 4
        model.fit(dataset, verbose=0)
        self.assertEqual(int(model.optimizer.iterations), 9)
        model.accum_steps = 12
        model.fit(dataset, verbose=0)
        self.assertEqual(int(model.optimizer.iterations), 10)
        model.accum_steps = 1
        model.fit(dataset, verbose=0)
        self.assertEqual(int(model.optimizer.iterations), 22)
        self.assertLen(traces, traced)

    def test_a_change_from_a_callback(self):
        model = test_utils.accumulating(accum_steps=5)
        model.compile("sgd", loss=test_utils.crossentropy(), jit_compile=False)
        updates = []

        def change(batch, logs):
            updates.append(int(model.optimizer.iterations))
            if batch == 2:
                model.accum_steps = 3

        model.fit(
            test_utils.dataset(data()),
            verbose=0,
            callbacks=[
                keras.callbacks.LambdaCallback(on_train_batch_end=change)
            ],
        )
        # Five in the window that had begun, then threes.
        self.assertEqual(updates, [0] * 4 + [1] * 3 + [2] * 3 + [3] * 2)
        self.assertEqual(int(model.optimizer.iterations), 4)

    @parameterized.parameters(1, 5)
    @test_utils.first_command(0)
    def test_from_1_during_fit(self, steps):
        model = test_utils.accumulating(accum_steps=1)
        model.compile(
            "sgd",
            loss=test_utils.crossentropy(),
            steps_per_execution=steps,
            jit_compile=False,
        )

        def change(epoch, logs):
            model.accum_steps = 4

        model.fit(
            test_utils.dataset(data(), known_length=True),
            verbose=0,
            epochs=2,
            callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=change)],
        )
        self.assertEqual(int(model.optimizer.iterations), 12 + 3)

    @parameterized.parameters(*MODES)
    @test_utils.first_command(0, second=(1,))
    def test_schedule(self, mode):
        seen = []

        def schedule(updates):
            seen.append(updates)
            return min(updates + 1, 4)

        model = test_utils.accumulating(accum_steps=schedule)
        fit(model, data(), epochs=1, **MODES[mode])
        # 1 + 2 + 3 + 4 and a partial window of 2.
        self.assertEqual(seen, [0, 1, 2, 3, 4])
        self.assertEqual(int(model.optimizer.iterations), 5)

    # Both errors in each mode.
    @parameterized.parameters(
        (0, "graph"),
        (2.5, "graph"),
        (0, "eager"),
        (True, "eager"),
        (0, "loop"),
        ("8", "loop"),
    )
    @test_utils.first_command(0, 3, second=())
    def test_schedule_that_returns_nonsense(self, value, mode):
        model = test_utils.accumulating(accum_steps=lambda updates: value)
        with self.assertRaisesRegex(
            (TypeError, ValueError),
            f"`accum_steps`.*accum_steps\\(0\\)={value!r}",
        ):
            fit(model, data(), **MODES[mode])

    def test_schedule_that_raises(self):
        def schedule(updates):
            raise KeyError("mine")

        model = test_utils.accumulating(accum_steps=schedule)
        with self.assertRaisesRegex(KeyError, "mine"):
            fit(model, data())

    @pytest.mark.thorough
    def test_between_int_and_function(self):
        model = test_utils.accumulating(accum_steps=4)
        fit(model, data(), epochs=1)
        model.accum_steps = lambda updates: 6
        model.fit(test_utils.dataset(data()), verbose=0)
        model.accum_steps = 3
        model.fit(test_utils.dataset(data()), verbose=0)
        self.assertEqual(int(model.optimizer.iterations), 3 + 2 + 4)


class GradientsTest(test_utils.TestCase):
    def test_no_gradient_no_buffer(self):
        class Half(keras_accum.GradientAccumulationModel):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.used = keras.layers.Dense(3)
                self.unused = keras.layers.Dense(3)

            def call(self, inputs):
                self.unused(inputs)
                return self.used(inputs)

        model = Half(accum_steps=2)
        model.compile("sgd", loss=test_utils.crossentropy(), jit_compile=False)
        with self.assertWarnsRegex(UserWarning, "Gradients do not exist"):
            test_utils.train_on(model, data()[:2])
        buffers = test_utils.accumulator(model).buffers
        self.assertEqual([b is None for b in buffers], [False] * 2 + [True] * 2)

    def test_gradient_that_comes_and_goes(self):
        class Optional(keras_accum.GradientAccumulationModel):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.first = keras.layers.Dense(3)
                self.second = keras.layers.Dense(3)

            def build(self, shape):
                self.first.build((None, 6))
                self.second.build((None, 6))

            def call(self, inputs):
                if "b" in inputs:
                    return self.first(inputs["a"]) + self.second(inputs["b"])
                return self.first(inputs["a"])

        model = Optional(accum_steps=2)
        model.build(None)
        model.compile(keras.optimizers.SGD(1.0), loss="mse", jit_compile=False)
        rng = np.random.default_rng(0)
        a, b, y = rng.normal(size=(3, 4, 6)).astype("float32")
        y = y[:, :3]
        without, both = ({"a": a}, y), ({"a": a, "b": b}, y)
        pattern = [without, without, without, both, both, without, both, both]
        pattern += [without, both]

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Gradients do not exist")
            for i in range(0, len(pattern), 2):
                weights = [tf.Variable(w) for w in model.trainable_weights]
                with tf.GradientTape() as tape:
                    loss = 0.0
                    for x, y in pattern[i : i + 2]:
                        output = x["a"] @ weights[0] + weights[1]
                        if "b" in x:
                            output += x["b"] @ weights[2] + weights[3]
                        loss += tf.reduce_mean((output - y) ** 2) / 2
                gradients = tape.gradient(
                    loss, weights, unconnected_gradients="zero"
                )
                expected = [
                    w - g for w, g in zip(weights, gradients, strict=True)
                ]
                test_utils.train_on(model, pattern[i : i + 2])
                self.assertAllClose(
                    model.get_weights(), expected, rtol=1e-5, atol=1e-6
                )

    def test_embedding(self):
        def build(cls, **kwargs):
            keras.utils.set_random_seed(7)
            tokens = keras.Input((3,), dtype="int32")
            hidden = keras.layers.Embedding(50, 4)(tokens)
            hidden = keras.layers.Flatten()(hidden)
            return cls(tokens, keras.layers.Dense(3)(hidden), **kwargs)

        rng = np.random.default_rng(0)
        batches = [
            [(rng.integers(0, 50, (4, 3)), rng.integers(0, 3, 4))] * 3
            for _ in range(3)
        ]
        for jit_compile in (False, True):
            self.assertTrainsAlike(
                build,
                lambda: {
                    "optimizer": keras.optimizers.SGD(0.5),
                    "loss": test_utils.crossentropy(),
                    "jit_compile": jit_compile,  # noqa: B023
                },
                batches,
            )


class FailureTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters("graph", "eager", "loop")
    def test_a_failed_step_leaves_the_window_as_it_was(self, mode):
        self.check_failure(**MODES[mode])

    @pytest.mark.thorough
    def test_a_failed_step_of_an_eager_loop(self):
        self.check_failure(**OTHER_MODES["loop_eager"])

    def check_failure(self, **mode):
        def build(cls, **kwargs):
            keras.utils.set_random_seed(7)
            tokens = keras.Input((3,), dtype="int32")
            hidden = keras.layers.Embedding(50, 4)(tokens)
            hidden = keras.layers.Flatten()(hidden)
            return cls(tokens, keras.layers.Dense(3)(hidden), **kwargs)

        model = test_utils.accumulating(build, accum_steps=4)
        model.compile("sgd", loss=test_utils.crossentropy(), **mode)
        fine = (np.full((2, 3), 7), np.array([0, 1]))
        bad = (np.full((2, 3), 70), np.array([0, 1]))
        test_utils.train_on(model, [fine, fine])
        before = [b.numpy() for b in test_utils.accumulator(model).buffers]
        with self.assertRaises(tf.errors.InvalidArgumentError):
            model.train_on_batch(*bad)
        self.assertEqual(test_utils.position(model), 2)
        self.assertEqual(test_utils.num_microbatches(model), 2)
        self.assertAllClose(before, test_utils.accumulator(model).buffers, 0, 0)
        test_utils.train_on(model, [fine, fine])
        self.assertEqual(int(model.optimizer.iterations), 1)

    @parameterized.parameters(1, 3)
    @test_utils.first_command(1)
    def test_an_exhausted_iterator_counts_nothing(self, steps):
        model = test_utils.accumulating(partial_window="carry", accum_steps=7)
        model.compile(
            "sgd",
            loss=test_utils.crossentropy(),
            steps_per_execution=steps,
            jit_compile=False,
        )
        batches = data()[:5]
        for epoch in range(1, 8):
            model.fit(test_utils.dataset(batches), verbose=0)
            self.assertEqual(test_utils.position(model), 5 * epoch % 7)
            self.assertEqual(test_utils.num_microbatches(model), 5 * epoch % 7)
            self.assertEqual(int(model.optimizer.iterations), 5 * epoch // 7)


class CallbackTest(test_utils.TestCase):
    @pytest.mark.thorough
    def test_every_built_in_callback(self):
        folder = self.get_temp_dir()

        def callbacks():
            return [
                keras.callbacks.BackupAndRestore(f"{folder}/backup"),
                keras.callbacks.CSVLogger(f"{folder}/log.csv"),
                keras.callbacks.EarlyStopping("loss", patience=5),
                keras.callbacks.History(),
                keras.callbacks.LambdaCallback(),
                keras.callbacks.LearningRateScheduler(
                    lambda epoch, rate: 0.5 * rate
                ),
                keras.callbacks.ModelCheckpoint(f"{folder}/model.keras"),
                keras.callbacks.ModelCheckpoint(
                    f"{folder}/{{batch}}.weights.h5",
                    save_weights_only=True,
                    save_freq=3,
                ),
                keras.callbacks.ProgbarLogger(),
                keras.callbacks.ReduceLROnPlateau("loss", patience=0),
                keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
                keras.callbacks.TensorBoard(f"{folder}/logs"),
                keras.callbacks.TerminateOnNaN(),
            ]

        results = []
        for model, batch_size in (
            (test_utils.mlp(), K * ROWS),
            (test_utils.accumulating(), ROWS),
        ):
            model.compile(
                keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5),
                loss=test_utils.crossentropy(),
                run_eagerly=batch_size > ROWS,
            )
            x, y = test_utils.concatenate(data())
            history = model.fit(
                x,
                y,
                batch_size,
                epochs=3,
                shuffle=False,
                verbose=0,
                validation_data=(x, y),
                callbacks=callbacks(),
            ).history
            results.append((model.get_weights(), history))
        self.assertAllClose(*results, rtol=1e-4, atol=1e-6)
        self.assertTrue(os.path.exists(f"{folder}/model.keras"))

    def test_callback_list_and_single_callback(self):
        model = test_utils.accumulating()
        model.compile("sgd", loss=test_utils.crossentropy(), jit_compile=False)
        callbacks = keras.callbacks.CallbackList(
            [keras.callbacks.History()], model=model, epochs=1
        )
        for _ in range(2):
            model.fit(
                test_utils.dataset(data()[:6]), verbose=0, callbacks=callbacks
            )
        self.assertEqual(int(model.optimizer.iterations), 4)
        self.assertLen(callbacks.callbacks, 2)
        model.fit(
            test_utils.dataset(data()[:6]),
            verbose=0,
            callbacks=keras.callbacks.TerminateOnNaN(),
        )
        self.assertEqual(int(model.optimizer.iterations), 6)


if __name__ == "__main__":
    tf.test.main()
