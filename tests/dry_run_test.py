"""Windows that are put back."""

import keras
import numpy as np
import tensorflow as tf

import keras_accum
from keras_accum import dry_run
from keras_accum import restoring
from tests import test_utils


class DryRunTest(test_utils.TestCase):
    def test_puts_everything_back(self):
        x, y = test_utils.microbatches([6])[0]
        model = test_utils.accumulating(accum_steps=3)
        model.compile("adam", test_utils.crossentropy(), metrics=["accuracy"])
        # In the middle of a window.
        model.train_on_batch(x, y)
        before = [np.array(each) for each in model.variables]
        count, position = (
            test_utils.num_microbatches(model),
            (test_utils.position(model)),
        )
        function = model.train_function
        with restoring.unchanged(model):
            self.assertTrue(model.run_eagerly)
            data = (tf.constant(x), tf.constant(y))
            result = dry_run.run(model, data, (0, 2, 6))
        self.assertFalse(model.run_eagerly)
        self.assertIs(model.train_function, function)
        after = [np.array(each) for each in model.variables]
        self.assertAllClose(after, before, 0, 0)
        self.assertEqual(test_utils.num_microbatches(model), count)
        self.assertEqual(test_utils.position(model), position)
        with tf.GradientTape() as tape:
            loss = test_utils.crossentropy()(y, model(x))
        expected = tape.gradient(loss, model.trainable_weights)
        self.assertAllClose(result.loss, loss)
        self.assertAllClose(list(result.gradients.values()), expected)

    def test_puts_back_what_keras_does_not_know(self):
        class Own(tf.Module):
            def __init__(self):
                super().__init__()
                self.value = tf.Variable(1.0)

        inputs = keras.Input((5,))
        layer = keras.layers.Dense(2)
        model = keras_accum.GradientAccumulationModel(
            inputs, layer(inputs), accum_steps=3
        )
        model.compile("sgd", "mse")
        model.number, layer.module = tf.Variable(1.0), Own()
        layer.listed, layer.named = [tf.Variable(1.0)], {"a": tf.Variable(1.0)}
        layer.generator = tf.random.Generator.from_seed(1)
        own = [
            model.number,
            layer.module.value,
            layer.listed[0],
            layer.named["a"],
            layer.generator.state,
        ]
        before = [each.numpy() for each in own]
        with restoring.unchanged(model):
            for each in own[:-1]:
                each.assign(3.0)
            layer.generator.normal([3])
        self.assertAllEqual(own[-1], before[-1])
        self.assertAllClose(own[:-1], before[:-1], 0, 0)

    def test_an_error_puts_back_too(self):
        model = test_utils.accumulating(accum_steps=3)
        model.compile("adam", test_utils.crossentropy())
        before = [np.array(each) for each in model.variables]
        with self.assertRaisesRegex(KeyError, "mine"):
            with restoring.unchanged(model):
                model.trainable_weights[0].assign_add(
                    keras.ops.ones_like(model.trainable_weights[0])
                )
                raise KeyError("mine")
        after = [np.array(each) for each in model.variables]
        self.assertAllClose(after, before, 0, 0)
        self.assertFalse(model.run_eagerly)


if __name__ == "__main__":
    tf.test.main()
