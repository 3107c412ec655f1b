"""BatchNormalization's statistics are those of one update on all rows."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from keras_accum import compat
from tests import test_utils

MODES = {
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
    "eager": {"run_eagerly": True},
}
LENGTH = 5


def normalizing(cls, layer=keras.layers.BatchNormalization, **kwargs):
    """Returns a model whose first layer normalizes: its inputs are the data."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((None, test_utils.FEATURES))
    hidden = layer(name="norm")(inputs)
    hidden = keras.layers.GlobalAveragePooling1D()(hidden)
    outputs = keras.layers.Dense(test_utils.CLASSES)(hidden)
    return cls(inputs, outputs, **kwargs)


def masked(cls, layer=keras.layers.BatchNormalization, **kwargs):
    """Returns the same model, where zeros are masked."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((LENGTH, test_utils.FEATURES))
    hidden = keras.layers.Masking()(inputs)
    hidden = layer(name="norm")(hidden)
    hidden = keras.layers.GlobalAveragePooling1D()(hidden)
    outputs = keras.layers.Dense(test_utils.CLASSES)(hidden)
    return cls(inputs, outputs, **kwargs)


def data(sizes, offset=3.0):
    """Yields micro-batches that differ in their means and lengths."""
    rng = np.random.default_rng(0)
    for index, rows in enumerate(sizes):
        shape = (rows, LENGTH, test_utils.FEATURES)
        x = offset + index + rng.normal(size=shape) * (1 + index)
        x[rows // 2 :, LENGTH - 2 :] = 0
        yield x.astype("float32"), rng.integers(0, test_utils.CLASSES, rows)


def statistics(model):
    return [
        v.numpy() for v in compat.moving_statistics(model.get_layer("norm"))
    ]


def once(build, batches):
    """Trains a plain model on the batches as one; returns its statistics."""
    model = build(keras.Model)
    x, _ = test_utils.concatenate(batches)
    model(x, training=True)
    return model


class MomentsTest(test_utils.TestCase, parameterized.TestCase):
    def assertSameStatistics(self, actual, expected):
        for mine, theirs in zip(
            statistics(actual), statistics(expected), strict=True
        ):
            self.assertAllClose(mine, theirs, rtol=1e-5, atol=1e-6)

    def check(self, build, mode, sizes=(8, 3, 4, 1), **kwargs):
        batches = list(data(sizes))
        expected = once(build, batches)
        by_steps = build(
            keras_accum.GradientAccumulationModel, accum_steps=len(sizes)
        )
        by_size = build(
            keras_accum.GradientAccumulationModel, microbatch_size=3
        )
        for model in (by_steps, by_size):
            model.compile(
                "sgd", loss=test_utils.crossentropy(), **MODES[mode], **kwargs
            )
        before = statistics(by_steps)
        test_utils.train_on(by_steps, batches[:-1])
        self.assertAllClose(before, statistics(by_steps), 0, 0)
        test_utils.train_on(by_steps, batches[-1:])
        by_size.train_on_batch(*test_utils.concatenate(batches))
        self.assertSameStatistics(by_steps, expected)
        self.assertSameStatistics(by_size, expected)

    @parameterized.parameters(
        (normalizing, "graph", True),
        (normalizing, "xla", False),
        (masked, "xla", True),
        (masked, "eager", False),
    )
    @test_utils.first_command(0, second=(2,))
    def test_are_those_of_the_large_batch(self, build, mode, renorm):
        self.check_layer(build, mode, renorm)

    @parameterized.parameters(
        *test_utils.with_nightly(
            [
                (normalizing, "xla", True),
                (normalizing, "eager", True),
                (masked, "graph", True),
                (masked, "xla", False),
            ],
            [
                (normalizing, "graph", False),
                (normalizing, "eager", False),
                (masked, "graph", False),
                (masked, "eager", True),
            ],
        )
    )
    @test_utils.first_command(second=(0,))
    def test_are_those_of_the_large_batch_elsewhere(self, build, mode, renorm):
        self.check_layer(build, mode, renorm)

    def check_layer(self, build, mode, renorm):
        if renorm and not test_utils.HAS_RENORM:
            self.skipTest("BatchNormalization has no `renorm` in this Keras.")
        layer = functools.partial(
            keras.layers.BatchNormalization,
            momentum=0.5,
            **({"renorm": True} if renorm else {}),
        )
        self.check(functools.partial(build, layer=layer), mode)

    @pytest.mark.thorough
    def test_in_half_precision(self):
        layer = functools.partial(
            keras.layers.BatchNormalization, dtype="mixed_float16"
        )
        self.check(functools.partial(normalizing, layer=layer), "graph")

    def test_values_far_from_zero(self):
        build = functools.partial(
            normalizing,
            layer=functools.partial(
                keras.layers.BatchNormalization, momentum=0.0
            ),
        )
        batches = list(data((8, 3, 4), offset=1000.0))
        model = build(keras_accum.GradientAccumulationModel, accum_steps=3)
        model.compile("sgd", loss=test_utils.crossentropy(), jit_compile=False)
        test_utils.train_on(model, batches)
        x, _ = test_utils.concatenate(batches)
        values = x.astype("float64").reshape(-1, test_utils.FEATURES)
        means, variances = statistics(model)
        self.assertAllClose(means, values.mean(0), rtol=1e-6)
        self.assertAllClose(variances, values.var(0), rtol=1e-5)

    def test_a_layer_that_is_called_twice(self):
        # As in Keras: two updates, the second from what the first left.
        class Twice(keras.layers.Layer):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.norm = keras.layers.BatchNormalization(momentum=0.5)
                self.moving_mean = self.moving_variance = None
                self.renorm = False

            def build(self, shape):
                self.norm.build(shape)
                self.moving_mean = self.norm.moving_mean
                self.moving_variance = self.norm.moving_variance

            def call(self, x, training=None):
                self.norm(x + 1.0, training=training)
                return self.norm(x * 2.0, training=training)

        self.check(functools.partial(normalizing, layer=Twice), "graph")

    def test_a_layer_that_is_frozen(self):
        layer = functools.partial(
            keras.layers.BatchNormalization, trainable=False
        )
        self.check(functools.partial(normalizing, layer=layer), "graph")

    @pytest.mark.thorough
    def test_within_another_model(self):
        class Nested(keras.layers.Layer):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.norm = keras.layers.BatchNormalization()
                self.inner = keras.Sequential([self.norm])
                self.renorm = False

            def call(self, x, training=None):
                outputs = self.inner(x, training=training)
                self.moving_mean = self.norm.moving_mean
                self.moving_variance = self.norm.moving_variance
                return outputs

        self.check(functools.partial(normalizing, layer=Nested), "graph")

    def test_fit_with_partial_windows(self):
        batches = list(data((8, 3, 4, 2, 5)))
        model = normalizing(
            keras_accum.GradientAccumulationModel, accum_steps=3
        )
        model.compile("sgd", loss=test_utils.crossentropy(), jit_compile=False)
        model.fit(test_utils.dataset(batches), verbose=0)
        expected = normalizing(keras.Model)
        for window in (batches[:3], batches[3:]):
            x, _ = test_utils.concatenate(window)
            expected(x, training=True)
        self.assertSameStatistics(model, expected)

    def test_what_is_reset_or_fails_does_not_count(self):
        batches = list(data((8, 3, 4)))
        bad = batches[0][0][:, :, :3], batches[0][1]
        model = normalizing(
            keras_accum.GradientAccumulationModel, accum_steps=3
        )
        model.compile("sgd", loss=test_utils.crossentropy(), jit_compile=False)
        test_utils.train_on(model, batches[:2])
        model.reset_window()
        for batch in batches[:2]:
            model.train_on_batch(*batch)
        # `ValueError` in tracing; the other in a program that exists already.
        with self.assertRaises((ValueError, tf.errors.InvalidArgumentError)):
            model.train_on_batch(*bad)
        model.train_on_batch(*batches[2])
        self.assertSameStatistics(model, once(normalizing, batches))

    def test_with_no_number_in_a_window_that_was_reset(self):
        batches = list(data((8, 3, 4)))
        model = normalizing(
            keras_accum.GradientAccumulationModel, accum_steps=3
        )
        model.compile("sgd", loss=test_utils.crossentropy(), jit_compile=False)
        model.train_on_batch(batches[0][0] * np.nan, batches[0][1])
        model.reset_window()
        test_utils.train_on(model, batches)
        x, _ = test_utils.concatenate(batches)
        self.assertSameStatistics(model, once(normalizing, batches))

    @pytest.mark.thorough
    def test_steps_by_hand(self):
        batches = list(data((8, 3, 4)))
        model = normalizing(
            keras_accum.GradientAccumulationModel, accum_steps=3
        )
        model.compile("sgd", loss=test_utils.crossentropy(), jit_compile=False)
        step = tf.function(model.train_step, reduce_retracing=True)
        for x, y in batches:
            step((tf.constant(x), tf.constant(y)))
        model.update_step()
        self.assertSameStatistics(model, once(normalizing, batches))

    def test_within_a_loop_it_is_as_in_keras(self):
        class Looping(keras.layers.Layer):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.norm = keras.layers.BatchNormalization(momentum=0.5)
                self.renorm = False

            def build(self, shape):
                self.norm.build(shape)
                self.moving_mean = self.norm.moving_mean
                self.moving_variance = self.norm.moving_variance

            def call(self, x, training=None):
                return tf.while_loop(
                    lambda i, _: i < 2,
                    lambda i, x: (i + 1, self.norm(x, training=training)),
                    (tf.constant(0), x),
                )[1]

        batches = list(data((8, 3)))
        kwargs = {"layer": Looping}
        model = normalizing(
            keras_accum.GradientAccumulationModel, accum_steps=2, **kwargs
        )
        model.compile("sgd", loss=test_utils.crossentropy(), jit_compile=False)
        test_utils.train_on(model, batches)
        expected = normalizing(keras.Model, **kwargs)
        call = tf.function(expected)
        for x, _ in batches:
            call(tf.constant(x), training=True)
        self.assertSameStatistics(model, expected)

    def test_one_micro_batch_is_as_in_keras(self):
        batches = list(data((8, 3)))
        models = [
            normalizing(keras.Model),
            normalizing(keras_accum.GradientAccumulationModel),
        ]
        for model in models:
            model.compile(
                "sgd", loss=test_utils.crossentropy(), jit_compile=False
            )
            test_utils.train_on(model, batches)
        self.assertAllClose(*map(statistics, models), rtol=0, atol=0)


if __name__ == "__main__":
    tf.test.main()
