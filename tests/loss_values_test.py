"""A loss is computed once in a step, also where its size must be known."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from keras_accum.loss_values import LossValues

ROWS = 10


class Noisy(keras.losses.Loss):
    """Draws a factor for each row, and counts how often it is computed."""

    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(7)
        self.times = 0

    def count(self):
        self.times += 1
        return np.float32(0)

    def call(self, y_true, y_pred):
        zero = tf.numpy_function(self.count, [], tf.float32)
        zero.set_shape(())
        factor = keras.random.uniform(tf.shape(y_pred), seed=self.seeds)
        return tf.reduce_mean(factor * (y_true - y_pred) ** 2, axis=-1) + zero


def train(model, loss, **arguments):
    """Trains on batches of which the last one is short."""
    model.compile(keras.optimizers.SGD(0.1), loss, jit_compile=False)
    x = np.linspace(-1, 1, ROWS * 2, dtype="float32").reshape(ROWS, 2)
    model.fit(x, x[:, :1] ** 2, shuffle=False, verbose=0, **arguments)


def net():
    """Returns the inputs and the outputs of a model."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((2,))
    return inputs, keras.layers.Dense(1)(inputs)


class OneComputationTest(parameterized.TestCase):
    def test_draws_as_often_as_in_keras(self):
        models = [
            keras.Model(*net()),
            keras_accum.GradientAccumulationModel(*net(), accum_steps=2),
        ]
        losses = [Noisy(), Noisy()]
        for model, loss in zip(models, losses, strict=True):
            train(model, loss, batch_size=4)
        expected, found = (loss.seeds.state.numpy() for loss in losses)
        np.testing.assert_array_equal(found, expected)

    def test_several_draw_as_often_as_in_keras(self):
        losses = []
        for cls, options in (
            (keras.Model, {}),
            (keras_accum.GradientAccumulationModel, {"accum_steps": 2}),
        ):
            inputs, outputs = net()
            model = cls(inputs, [outputs, outputs], **options)
            losses.append(Noisy())
            model.compile("sgd", [losses[-1], "mae"], jit_compile=False)
            x = np.ones((ROWS, 2), "float32")
            y = [x[:, :1], x[:, :1]]
            model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
        expected, found = (loss.seeds.state.numpy() for loss in losses)
        np.testing.assert_array_equal(found, expected)

    @parameterized.parameters(
        ({"accum_steps": 2}, 4, 3), ({"microbatch_size": 2}, 8, 5)
    )
    def test_once_for_each_microbatch(self, options, batch_size, count):
        loss = Noisy()
        model = keras_accum.GradientAccumulationModel(*net(), **options)
        train(model, loss, batch_size=batch_size)
        loss.times = 0
        x = np.ones((ROWS, 2), "float32")
        model.fit(x, x[:, :1], batch_size=batch_size, verbose=0)
        self.assertEqual(loss.times, count)
        loss.times = 0
        model.evaluate(x, x[:, :1], batch_size=batch_size, verbose=0)
        self.assertEqual(loss.times, count)


class LossValuesTest(parameterized.TestCase):
    def test_only_of_the_very_same(self):
        loss, y, y_pred, found = object(), object(), object(), object()
        values = LossValues()
        self.assertIsNone(values.of(loss, y, y_pred))
        values.record(loss, y, y_pred, found)
        self.assertIs(values.of(loss, y, y_pred), found)
        self.assertIsNone(values.of(loss, y, object()))

    def test_not_those_of_a_branch(self):
        values = LossValues()

        @tf.function
        def in_a_graph():
            values.record(None, None, None, tf.zeros(2))

        in_a_graph()
        self.assertIsNone(values.of(None, None, None))


if __name__ == "__main__":
    tf.test.main()
