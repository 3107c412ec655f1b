"""What is in memory at the same time, without XLA."""

import unittest

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from keras_accum import counting
from keras_accum import ordering
from tests import test_utils

DEPTH, WIDTH, ROWS = 8, 512, 4


def stack(optimizer, **kwargs) -> keras.Model:
    """Returns equal layers, each of which is a group of its own."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((WIDTH,))
    for _ in range(DEPTH):
        x = keras.layers.Dense(WIDTH, "tanh", use_bias=False)(x)
    cls = keras_accum.GradientAccumulationModel if kwargs else keras.Model
    model = cls(inputs, x, **kwargs)
    model.compile(optimizer, "mse", jit_compile=False)
    return model


def batch(rows: int = 2 * ROWS):
    x = np.random.default_rng(0).normal(size=(rows, WIDTH)).astype("float32")
    return x, np.tanh(x[:, ::-1])


def peak(function) -> float:
    """Returns what comes and goes in a call, in bytes for each parameter.

    Where other programs have the cores, what is ready runs late, and more of it
    is there at once. So it is the least of many calls.
    """
    if not counting.counts("CPU:0"):
        raise unittest.SkipTest("No bytes are counted here.")
    least = min(counting.counted_bytes(function) for _ in range(20))
    return least / (DEPTH * WIDTH**2)


class MemoryTest(test_utils.TestCase, parameterized.TestCase):
    """All of one kind, such as all gradients, are 4 bytes."""

    @parameterized.parameters(
        ({"accum_steps": 2}, "sgd", 1.5),
        ({"accum_steps": 2}, "adam", 3.0),
        ({"microbatch_size": ROWS}, "adam", 3.0),
    )
    def test_an_update(self, arguments, optimizer, most):
        model = stack(optimizer, **arguments)
        rows = 2 * ROWS if "microbatch_size" in arguments else ROWS
        for _ in range(2 * 2):
            model.train_on_batch(*batch(rows))
        update = tf.function(model.update_step, autograph=False)
        update()
        self.assertLess(peak(update), most)

    @parameterized.parameters("sgd", "adam")
    def test_a_batch_in_micro_batches(self, optimizer):
        model = stack(optimizer, microbatch_size=ROWS)
        step = model.make_train_function()
        data = iter(tf.data.Dataset.from_tensors(batch()).repeat())
        for _ in range(3):
            step(data)
        self.assertLess(peak(lambda: step(data)), 3.0)


class EquivalenceTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.product(
        make=(
            lambda: keras.optimizers.SGD(0.1, momentum=0.9),
            lambda: keras.optimizers.AdamW(1e-3, use_ema=True),
            lambda: keras.optimizers.Adam(1e-3, global_clipnorm=1e-3),
            lambda: keras.optimizers.SGD(10.0, clipvalue=1e-5),
            lambda: keras.optimizers.LossScaleOptimizer(
                keras.optimizers.SGD(0.1)
            ),
        ),
        arguments=({"accum_steps": 2}, {"microbatch_size": ROWS}),
    )
    @test_utils.first_command(0, 5, second=(8,))
    def test_the_order_changes_nothing(self, make, arguments):
        expected, actual = stack(make()), stack(make(), **arguments)
        initial, (x, y) = expected.get_weights(), batch(4 * ROWS)
        rows = ROWS if "accum_steps" in arguments else 2 * ROWS
        expected.fit(x, y, batch_size=2 * ROWS, shuffle=False, verbose=0)
        actual.fit(x, y, batch_size=rows, shuffle=False, verbose=0)
        self.assertSameTraining(actual, expected, initial)

    @parameterized.parameters({"accum_steps": 2}, {"microbatch_size": ROWS})
    @test_utils.first_command(second=(0,))
    def test_on_replicas(self, **arguments):
        strategy, missing = test_utils.chosen_strategy()
        if missing:
            self.skipTest(missing)
        expected = stack("adam")
        with strategy.scope():
            actual = stack("adam", **arguments)
        rows = 2 * ROWS * strategy.num_replicas_in_sync
        initial, (x, y) = expected.get_weights(), batch(2 * rows)
        expected.fit(x, y, batch_size=rows, shuffle=False, verbose=0)
        if "accum_steps" in arguments:
            rows //= 2
        actual.fit(x, y, batch_size=rows, shuffle=False, verbose=0)
        self.assertSameTraining(actual, expected, initial)


class GroupsTest(test_utils.TestCase):
    def test_small_variables_are_together(self):
        half = ordering.SIZE // 2
        variables = [tf.zeros(n) for n in (3, 4, 4 * half, half, half, 2)]
        self.assertEqual(
            list(ordering.groups(variables)), [[0, 1, 2], [3, 4], [5]]
        )

    def test_a_product_is_computed_again(self):
        @tf.function
        def function(x):
            (mean,) = tf.raw_ops.IdentityN(input=[x * 3.0])
            made = ordering.again(tf.cast(mean * 2.0, tf.float64))
            self.assertIsNot(made.op.inputs[0].op.inputs[0], mean)
            return made

        self.assertAllEqual(function(tf.constant([1.0, 2.0])), [6.0, 12.0])

    def test_what_is_no_product_stays(self):
        value = tf.constant(1.0)
        self.assertIs(ordering.again(value), value)


if __name__ == "__main__":
    tf.test.main()
