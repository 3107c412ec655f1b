"""Each private name that is used is there, and means what we think."""

import inspect

import keras
import numpy as np
import tensorflow as tf

from keras_accum import compat
from tests import test_utils


class NamesTest(test_utils.TestCase):
    def test_functional_class(self):
        self.assertIs(type(test_utils.mlp()), compat.functional_class())
        self.assertTrue(issubclass(compat.functional_class(), keras.Model))

    def test_train_step(self):
        class Plain(keras.Model):
            pass

        class Custom(keras.Model):
            def train_step(self, data):
                return {}

        class Mixin:
            def train_step(self, data):
                raise NotImplementedError

        plain = type("PlainWithMixin", (Mixin, Plain), {})()
        custom = type("CustomWithMixin", (Mixin, Custom), {})()
        self.assertFalse(compat.has_custom_train_step(plain, Mixin))
        self.assertTrue(compat.has_custom_train_step(custom, Mixin))

    def test_training_argument(self):
        class Takes(keras.Model):
            def call(self, inputs, training=False):
                return inputs

        class Lacks(keras.Model):
            def call(self, inputs):
                return inputs

        self.assertTrue(compat.takes_training_argument(Takes()))
        self.assertFalse(compat.takes_training_argument(Lacks()))

    def test_loss_tracker(self):
        model = test_utils.mlp()
        self.assertIsNone(compat.loss_tracker(model))
        model.compile("sgd", loss="mse")
        self.assertEqual(compat.loss_tracker(model).name, "loss")
        metric = keras.metrics.Mean(name="loss")
        compat.set_loss_tracker(model, metric)
        self.assertIs(model.metrics[0], metric)
        self.assertNotIn(metric, model.metrics[1:])

    def test_compiled_losses(self):
        inputs = keras.Input((2,))
        hidden = keras.layers.Dense(2)(inputs)
        model = keras.Model(inputs, {"a": hidden, "b": hidden})
        self.assertIsNone(compat.compiled_loss(model))
        model.compile("sgd", loss={"a": "mse", "b": "mae"})
        compiled = compat.compiled_loss(model)
        self.assertFalse(compat.is_built(compiled))
        x = np.ones((3, 2), "float32")
        y = {"a": x, "b": 3 * x}
        model.train_on_batch(x, y)
        self.assertTrue(compat.is_built(compiled))
        logs = model.get_metrics_result()
        seen = []
        compat.map_compiled_losses(
            compiled,
            lambda loss, *rest: seen.append((loss.name, *rest)),
            y,
            {"a": tf.constant(x), "b": tf.constant(x)},
            None,
        )
        self.assertEqual(
            [each[0] for each in seen],
            ["mse", "mae"],
        )
        self.assertAllClose(seen[1][1], 3 * x)
        # The walk leaves the losses' own metrics alone.
        self.assertAllClose(model.get_metrics_result(), logs)

    def test_output_metrics(self):
        inputs = keras.Input((2,))
        hidden = keras.layers.Dense(2)(inputs)
        model = keras.Model(inputs, {"a": hidden, "b": hidden})
        model.compile("sgd", loss={"a": "mse", "b": "mae"})
        compiled = compat.compiled_loss(model)
        x = np.ones((3, 2), "float32")
        y, y_pred = {"a": x, "b": x}, {"a": x, "b": x}
        compat.build_compiled_losses(compiled, y, y_pred, None)
        self.assertTrue(compat.is_built(compiled))
        self.assertEqual(
            [m.name for m in compat.output_metrics(compiled)],
            ["a_loss", "b_loss"],
        )
        made = compat.replace_output_metrics(
            compiled, lambda metric: keras.metrics.Mean(metric.name)
        )
        logs = model.train_on_batch(x, {"a": x, "b": x}, return_dict=True)
        self.assertEqual(
            [float(m.result()) for m in made], [logs["a_loss"], logs["b_loss"]]
        )

    def test_own_losses(self):
        inputs = keras.Input((2,))
        layer = keras.layers.Dense(
            2, activity_regularizer="l2", kernel_regularizer="l2"
        )
        model = keras.Model(inputs, layer(inputs))
        model(np.ones((3, 2)))
        self.assertLen(compat.own_losses(model), 1)
        self.assertLen(model.losses, 2)

    def test_masks(self):
        tensor = tf.ones((2, 3))
        self.assertIsNone(compat.keras_mask(tensor))
        mask = keras.layers.Masking()(tf.ones((2, 3, 1)))
        self.assertAllEqual(compat.keras_mask(mask), np.ones((2, 3), bool))
        weight = compat.merge_mask(
            None, tf.constant([True, False]), tf.float32, "sum"
        )
        self.assertAllEqual(weight, [1.0, 0.0])
        values, weight = compat.align_ranks(tf.ones((2,)), tf.ones((2, 1)))
        self.assertEqual(values.shape, weight.shape)

    def test_logs_and_optionals(self):
        model = test_utils.mlp()
        strategy = tf.distribute.get_strategy()
        self.assertEqual(compat.reduce_logs({"a": 1.0}, strategy), {"a": 1.0})
        empty = tf.experimental.Optional.empty(tf.TensorSpec(()))
        seen = []
        compat.optionals_to_none(model, seen.append)((1, empty))
        self.assertEqual(seen, [(1, None)])
        self.assertAllEqual(compat.unscale_loss(tf.constant(2.0)), 2.0)

    def test_compute_loss(self):
        model = test_utils.mlp()
        model.compile("sgd", loss=test_utils.crossentropy())
        ((x, y),) = test_utils.microbatches([4])
        loss = compat.compute_loss(model, x, y, model(x), None)
        self.assertAllClose(loss, model.test_on_batch(x, y))

    def test_automatic_config(self):
        @compat.keeps_automatic_config
        def get_config(self):
            return keras.Model.get_config(self)

        cls = type("Automatic", (keras.Model,), {"get_config": get_config})
        self.assertIn("trainable", cls().get_config())

    def test_private_names_are_used_in_compat_alone(self):
        import keras_accum
        from keras_accum import accumulator
        from keras_accum import epochs
        from keras_accum import functional
        from keras_accum import loss_tracker
        from keras_accum import model
        from keras_accum import training
        from keras_accum import weighting
        from keras_accum import window

        for module in (
            keras_accum,
            accumulator,
            epochs,
            functional,
            loss_tracker,
            model,
            training,
            weighting,
            window,
        ):
            source = inspect.getsource(module)
            self.assertNotIn("keras.src", source)
            self.assertNotIn("tensorflow.python", source)


if __name__ == "__main__":
    tf.test.main()
