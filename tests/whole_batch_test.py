"""Losses that couple rows, with `microbatch_size`: as of the whole batch."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from keras_accum import whole_batch
from tests import test_utils

ROWS, SIZE, FEATURES = 8, 3, 5


def arrays(rows=ROWS):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, FEATURES)).astype("float32")
    # Rows that differ in how much of them is there, as masks of images do.
    share = np.linspace(0.1, 0.9, rows)[:, None]
    return x, (rng.uniform(size=(rows, 4)) < share).astype("float32")


def masked_mean(y, y_pred):
    """As in TensorFlow's tutorial of transformers: a scalar."""
    values = keras.ops.square(y_pred - y)
    mask = keras.ops.cast(y > 0.5, values.dtype)
    return keras.ops.sum(values * mask) / keras.ops.sum(mask)


def contrastive(y, y_pred):
    """Each row's pair is the same row; all others are not."""
    scores = tf.matmul(y_pred, tf.cast(y, y_pred.dtype), transpose_b=True)
    labels = tf.range(tf.shape(scores)[0])
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, scores)
    return tf.reduce_mean(losses)


def dice_and_crossentropy(y, y_pred):
    """A common loss of segmentation; Keras's looks for the logits."""
    dice = keras.losses.dice(y, y_pred)
    return dice + keras.losses.binary_crossentropy(y, y_pred)


def one_output(cls=keras.Model, dtype=None, **kwargs):
    keras.utils.set_random_seed(3)
    x = keras.Input((FEATURES,))
    hidden = keras.layers.Dense(
        6, "tanh", kernel_regularizer="l2", dtype=dtype
    )(x)
    hidden = keras.layers.Dropout(0.4, seed=1, dtype=dtype)(hidden)
    hidden = keras.layers.ActivityRegularization(l2=0.1, dtype=dtype)(hidden)
    outputs = keras.layers.Dense(4, "sigmoid", dtype=dtype)(hidden)
    return cls(x, outputs, **kwargs)


def two_outputs(cls=keras.Model, **kwargs):
    keras.utils.set_random_seed(3)
    x = keras.Input((FEATURES,))
    hidden = keras.layers.Dense(6, "tanh")(x)
    return cls(
        x,
        {
            "a": keras.layers.Dense(4, "sigmoid", name="a")(hidden),
            "b": keras.layers.Dense(2, name="b")(hidden),
        },
        **kwargs,
    )


def normalized(cls=keras.Model, **kwargs):
    keras.utils.set_random_seed(3)
    x = keras.Input((FEATURES,))
    hidden = keras.layers.BatchNormalization()(keras.layers.Dense(6)(x))
    return cls(x, keras.layers.Dense(4, "sigmoid")(hidden), **kwargs)


class InMicrobatches(keras.Model):
    """What is right, under one tape: outputs of micro-batches, one loss."""

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        starts = range(0, ROWS, SIZE)
        added = []
        with tf.GradientTape() as tape:
            outputs = []
            for start in starts:
                part = x[start : start + SIZE]
                outputs.append(self(part, training=True))
                activity, *regularizers = self.losses or [0.0]
                share = min(SIZE, ROWS - start) / ROWS
                is_mean = test_utils.divides_activity_losses()
                added.append(activity * (share if is_mean else 1))
            y_pred = tf.concat(outputs, axis=0)
            loss = self._compile_loss(y, y_pred, sample_weight)
            for each in added + regularizers:
                loss += tf.cast(each, loss.dtype)
            scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, self.trainable_weights)
        self.optimizer.apply(gradients, self.trainable_weights)
        self._loss_tracker.update_state(loss, sample_weight=ROWS)
        return self.compute_metrics(x, y, y_pred, sample_weight)


class WholeBatchTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.product(
        (
            {"loss": keras.losses.Dice, "build": one_output},
            {"loss": lambda: masked_mean, "build": normalized},
            {"loss": lambda: contrastive, "build": one_output},
        ),
        jit_compile=(False, True),
    )
    @test_utils.first_command(0, second=(3,))
    def test_is_that_of_one_tape(self, loss, build, jit_compile):
        self.check(build, loss, jit_compile=jit_compile)

    @pytest.mark.thorough
    def test_eagerly(self):
        self.check(one_output, keras.losses.Tversky, run_eagerly=True)

    @pytest.mark.thorough
    def test_with_sample_weights(self):
        weights = np.linspace(0.0, 2.0, ROWS)
        self.check(one_output, keras.losses.Dice, sample_weight=weights)

    @pytest.mark.thorough
    def test_in_mixed_precision(self):
        def build(cls=keras.Model, **kwargs):
            return one_output(cls, dtype="mixed_float16", **kwargs)

        # The units in the last place of half precision.
        self.check(build, keras.losses.Dice, tolerance=2e-3, auto_scale=True)

    def check(
        self,
        build,
        loss,
        sample_weight=None,
        tolerance=2e-5,
        auto_scale=False,
        **compile_args,
    ):
        expected = build(InMicrobatches)
        actual = build(
            keras_accum.GradientAccumulationModel, microbatch_size=SIZE
        )
        initial = [each.numpy() for each in expected.trainable_weights]
        logs = []
        for model in (expected, actual):
            optimizer = keras.optimizers.SGD(0.3)
            if auto_scale:
                optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
            model.compile(
                optimizer,
                loss(),
                metrics=["mae"],
                auto_scale_loss=False,
                # XLA draws in a way of its own.
                **compile_args
                if model is actual or compile_args.get("jit_compile")
                else {"run_eagerly": True},
            )
            x, y = arrays()
            history = model.fit(
                x,
                y,
                sample_weight=sample_weight,
                batch_size=ROWS,
                epochs=2,
                shuffle=False,
                verbose=0,
            )
            logs.append(history.history)
        self.assertSameWeights(
            [each.numpy() for each in actual.trainable_weights],
            [each.numpy() for each in expected.trainable_weights],
            initial,
            tolerance,
        )
        self.assertAllClose(logs[1], logs[0], rtol=max(1e-4, tolerance))

    @pytest.mark.thorough
    def test_of_several_outputs(self):
        x, y = arrays(2 * ROWS - 1)
        labels = {"a": y, "b": x[:, :2]}
        weights = {"a": np.linspace(0, 2, len(x)), "b": np.ones(len(x))}
        history, models = [], []
        for model in (
            two_outputs(),
            two_outputs(
                keras_accum.GradientAccumulationModel, microbatch_size=SIZE
            ),
        ):
            models.append(model)
            initial = model.get_weights()
            model.compile(
                keras.optimizers.SGD(0.3),
                {"a": dice_and_crossentropy, "b": "mse"},
                loss_weights={"a": 2.0, "b": 0.5},
                metrics={"a": "mae", "b": "mse"},
                weighted_metrics={"a": "mae"},
                jit_compile=False,
            )
            # The last batch is short.
            args = {"batch_size": ROWS, "verbose": 0}
            logs = model.fit(
                x, labels, sample_weight=weights, shuffle=False, **args
            )
            history.append(logs.history)
            history.append(
                model.evaluate(x, labels, sample_weight=weights, **args)
            )
        self.assertSameWeights(
            models[1].get_weights(), models[0].get_weights(), initial
        )
        self.assertAllClose(history[2:], history[:2], rtol=1e-4)

    def test_of_compute_loss(self):
        def build(cls=keras.Model, **kwargs):
            class Contrastive(cls):
                def compute_loss(
                    self, x, y, y_pred, sample_weight, training=True
                ):
                    # Without those that layers add.
                    del sample_weight, training
                    return contrastive(y, y_pred) + masked_mean(
                        x[:, :4], y_pred
                    )

            keras.utils.set_random_seed(3)
            inputs = keras.Input((FEATURES,))
            hidden = keras.layers.ActivityRegularization(l2=9.0)(inputs)
            outputs = keras.layers.Dense(4, kernel_regularizer="l2")(hidden)
            return Contrastive(inputs, outputs, **kwargs)

        self.assert_as_keras(build, None)

    def test_of_compute_loss_that_looks_into_the_model(self):
        class Looking(keras_accum.GradientAccumulationModel):
            def call(self, x, training=False):
                self.seen = x
                return super().call(x, training=training)

            def compute_loss(self, x, y, y_pred, sample_weight, training=True):
                return contrastive(y, y_pred) + tf.reduce_mean(self.seen)

        keras.utils.set_random_seed(3)
        x = keras.Input((FEATURES,))
        model = Looking(x, keras.layers.Dense(4)(x), microbatch_size=SIZE)
        model.compile("sgd", jit_compile=False)
        with self.assertWarnsRegex(UserWarning, "`compute_loss`"):
            model.fit(*arrays(), batch_size=ROWS, verbose=0)

    def test_a_loss_with_a_variable_is_not_taken_apart(self):
        class Scaled(keras_accum.GradientAccumulationModel):
            def compute_loss(self, x, y, y_pred, sample_weight, training=True):
                return contrastive(y, y_pred * self.temperature)

        keras.utils.set_random_seed(3)
        x = keras.Input((FEATURES,))
        model = Scaled(x, keras.layers.Dense(4)(x), microbatch_size=SIZE)
        model.temperature = model.add_weight(
            name="temperature", shape=(), initializer="ones"
        )
        model.compile("sgd", jit_compile=False)
        with self.assertWarnsRegex(UserWarning, "`compute_loss`"):
            model.fit(*arrays(), batch_size=ROWS, verbose=0)
        self.assertNotEqual(float(model.temperature), 1.0)

    def test_a_step_that_changes_the_data_is_not_anticipated(self):
        class Cubed(keras_accum.GradientAccumulationModel):
            def train_step(self, data):
                x, y = data
                return super().train_step((x**3, y))

        keras.utils.set_random_seed(3)
        x = keras.Input((FEATURES,))
        outputs = keras.layers.Dense(4, "sigmoid")(x)
        model = Cubed(x, outputs, microbatch_size=SIZE)
        model.compile("sgd", keras.losses.Dice(), jit_compile=False)
        with self.assertWarnsRegex(UserWarning, "`dice`"):
            model.fit(*arrays(), batch_size=ROWS, verbose=0)

    def test_scaled_added_losses_are_not_taken_apart(self):
        class Scaling(keras_accum.GradientAccumulationModel):
            def compute_loss(self, x, y, y_pred, sample_weight, training=True):
                added = keras.ops.sum(keras.ops.stack(self.losses or [0.0]))
                return contrastive(y, y_pred) + 0.1 * added

        keras.utils.set_random_seed(3)
        x = keras.Input((FEATURES,))
        hidden = keras.layers.ActivityRegularization(l2=1.0)(x)
        model = Scaling(x, keras.layers.Dense(4)(hidden), microbatch_size=SIZE)
        model.compile("sgd", jit_compile=False)
        with self.assertWarnsRegex(UserWarning, "`compute_loss`"):
            model.fit(*arrays(), batch_size=ROWS, verbose=0)

    def test_evaluation_comes_first(self):
        x, y = arrays()
        results = []
        for cls, way in (
            (keras.Model, {}),
            (keras_accum.GradientAccumulationModel, {"microbatch_size": SIZE}),
        ):
            model = one_output(cls, **way)
            model.compile(
                "sgd", keras.losses.Dice(), metrics=["mae"], jit_compile=False
            )
            results.append(model.evaluate(x, y, batch_size=ROWS, verbose=0))
        self.assertAllClose(results[1], results[0])

    @pytest.mark.thorough
    def test_metrics_and_statistics_count_once(self):
        models = []
        for loss in ("mse", masked_mean):
            model = normalized(
                keras_accum.GradientAccumulationModel, microbatch_size=SIZE
            )
            model.compile(
                keras.optimizers.SGD(0.0),
                loss,
                metrics=["mae"],
                jit_compile=False,
            )
            x, y = arrays()
            history = model.fit(x, y, batch_size=ROWS, verbose=0)
            models.append((model.get_weights(), history.history["mae"]))
        self.assertAllClose(models[1], models[0])

    @parameterized.parameters(False, True)
    @test_utils.first_command(second=(0,))
    def test_on_replicas(self, jit_compile):
        strategy = test_utils.chosen_strategy()[0]

        def build(cls=keras.Model, **kwargs):
            if cls is keras.Model:
                return two_outputs(cls, **kwargs)
            with strategy.scope():
                return two_outputs(cls, **kwargs)

        self.assert_as_keras(
            build,
            {"a": keras.losses.Dice(), "b": "mse"},
            rows=7,
            jit_compile=jit_compile,
        )

    @pytest.mark.thorough
    def test_with_a_size_to_find(self):
        self.assert_as_keras(
            two_outputs, {"a": masked_mean, "b": "mse"}, size="auto"
        )

    def assert_as_keras(self, build, loss, rows=ROWS, size=SIZE, **args):
        x, y = arrays(rows)
        labels = {"a": y, "b": x[:, :2]} if isinstance(loss, dict) else y
        expected = build()
        actual = build(
            keras_accum.GradientAccumulationModel, microbatch_size=size
        )
        initial = expected.get_weights()
        results = []
        for model in (expected, actual):
            with model.distribute_strategy.scope():
                model.compile(
                    keras.optimizers.SGD(0.3),
                    loss,
                    **args if model is actual else {"run_eagerly": True},
                )
            history = model.fit(
                x, labels, batch_size=rows, epochs=2, shuffle=False, verbose=0
            )
            results.append(history.history)
            results.append(
                model.evaluate(x, labels, batch_size=rows, verbose=0)
            )
        self.assertSameWeights(
            actual.get_weights(), expected.get_weights(), initial, 2e-5
        )
        self.assertAllClose(results[2:], results[:2], rtol=1e-4)

    def test_no_microbatch_may_be_skipped(self):
        model = two_outputs(
            keras_accum.GradientAccumulationModel,
            microbatch_size=SIZE,
            nonfinite="skip_microbatch",
        )
        model.compile(
            "sgd", {"a": keras.losses.Dice(), "b": "mse"}, jit_compile=False
        )
        x, y = arrays()
        with self.assertRaisesRegex(ValueError, "couple the rows"):
            model.fit(x, {"a": y, "b": x[:, :2]}, verbose=0)

    @pytest.mark.thorough
    def test_accum_steps_warns_once(self):
        for loss, names in (
            ({"a": keras.losses.Dice(), "b": "mse"}, ["dice"]),
            ({"a": masked_mean, "b": "mse"}, ["masked_mean"]),
            ({"a": "binary_crossentropy", "b": "mse"}, []),
        ):
            model = two_outputs(
                keras_accum.GradientAccumulationModel, accum_steps=2
            )
            model.compile("sgd", loss, jit_compile=False)
            x, y = arrays()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model.fit(
                    x,
                    {"a": y, "b": x[:, :2]},
                    batch_size=3,
                    epochs=2,
                    verbose=0,
                )
            said = [str(each.message) for each in caught]
            said = [each for each in said if "`microbatch_size`" in each]
            self.assertLen(said, len(names))
            for message, name in zip(said, names, strict=True):
                self.assertIn(f"`{name}`", message)


class RowsOfAllTest(test_utils.TestCase):
    def test_come_one_replica_after_the_other(self):
        strategy = test_utils.chosen_strategy()[0]
        count = strategy.num_replicas_in_sync
        with strategy.scope():
            destination = tf.Variable(0.0)

        def share(context):
            place = context.replica_id_in_sync_group
            # The largest that float32 would not hold.
            return tf.fill([place + 1, 2], tf.constant(2**24 + 1 + place))

        local = strategy.experimental_distribute_values_from_function(share)

        @tf.function
        def run():
            def gather(values):
                rows = tf.shape(values)[0]
                batch = (values, values > 2**24 + 1, None)
                return whole_batch.rows_of_all(batch, rows, destination)

            return strategy.run(gather, args=(local,))

        results = strategy.experimental_local_results(run())
        expected = np.repeat(np.arange(count), np.arange(count) + 1)
        for place, each in enumerate(results):
            (values, flags, nothing), start, rows = each
            self.assertAllEqual(values[:, 0], 2**24 + 1 + expected)
            self.assertAllEqual(flags[:, 1], expected > 0)
            self.assertIsNone(nothing)
            self.assertEqual(int(start), place * (place + 1) // 2)
            self.assertEqual(int(rows), len(expected))


if __name__ == "__main__":
    tf.test.main()
