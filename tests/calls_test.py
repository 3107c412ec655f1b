"""What `accumulate` takes, and what it refuses."""

import keras
import tensorflow as tf
from absl.testing import parameterized

from keras_accum import calls
from keras_accum import origins
from tests import test_utils


class CallTest(test_utils.TestCase, parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.model = test_utils.mlp()
        self.model.compile("sgd")
        self.variables = self.model.trainable_weights
        self.gradients = [
            tf.fill(v.shape, float(index))
            for index, v in enumerate(self.variables)
        ]

    def make(self, gradients, weight=1.0, optimizer=None, known=None):
        return calls.make_call(self.model, gradients, weight, optimizer, known)

    def test_gradients_of_all(self):
        call = self.make(iter(self.gradients), 2.0)
        self.assertEqual(call.variables, self.variables)
        self.assertIs(call.optimizer, self.model.optimizer)
        self.assertEqual(call.weight, 2.0)
        self.assertAllClose(call.gradients[3], self.gradients[3])

    def test_pairs_in_any_order(self):
        pairs = list(zip(self.gradients, self.variables, strict=True))
        whole = self.make(reversed(pairs))
        # Of all, they are the model's.
        self.assertEqual(whole.variables, self.variables)
        self.assertAllClose(whole.gradients[1], self.gradients[1])
        # A `tf.Variable` is what Keras's is made of.
        some = self.make([(pairs[2][0], pairs[2][1].value), pairs[0]])
        self.assertEqual(some.variables, [self.variables[2], self.variables[0]])

    def test_a_variable_that_is_given_twice(self):
        variable = self.variables[1]
        ones, rows = tf.ones(variable.shape), tf.constant([[3]])
        sparse = tf.IndexedSlices(tf.ones([1]), rows[0], variable.shape)
        call = self.make(
            [(ones, variable), (None, variable), (sparse, variable)]
        )
        self.assertLen(call.variables, 1)
        self.assertAllClose(call.gradients[0], [1, 1, 1, 2, 1, 1, 1, 1])
        call = self.make([(None, variable)])
        self.assertEqual(call.gradients, [None])

    def test_the_order_that_a_tape_has_shown(self):
        known = origins.Origins()
        backwards = self.variables[::-1]
        known.record(tf.constant(0.0), backwards, self.gradients[::-1])
        call = self.make(self.gradients[::-1], known=known)
        self.assertAllClose(call.gradients[0], self.gradients[0])

    def test_refused_gradients(self):
        pairs = list(zip(self.gradients, self.variables, strict=True))
        other = keras.Variable(tf.zeros([2]))
        frozen = self.model.layers[1]
        frozen.trainable = False
        for gradients, error, message in (
            (self.gradients[:1], ValueError, r"accumulate\(zip\("),
            ([pairs[0][::-1]], TypeError, "pairs of a gradient"),
            ([*pairs[2:], self.gradients[0]], TypeError, "pairs of a gradient"),
            ([(tf.zeros([2]), other)], ValueError, "trainable weights"),
            ([pairs[0]], ValueError, "`trainable`"),
            ([(tf.zeros([5]), pairs[2][1])], ValueError, "shapes"),
        ):
            with self.subTest(message), self.assertRaisesRegex(error, message):
                self.make(gradients)

    def test_refused_weight_and_optimizer(self):
        for weight in (self.variables, self.variables[0], self.model.optimizer):
            with self.assertRaisesRegex(TypeError, "zip"):
                self.make(self.gradients, weight)
        with self.assertRaisesRegex(ValueError, "`weight` must be a scalar"):
            self.make(self.gradients, tf.ones([3]))
        with self.assertRaisesRegex(TypeError, "optimizer='adam'"):
            self.make(self.gradients, optimizer="adam")
        self.model.optimizer = None
        with self.assertRaisesRegex(ValueError, "needs an optimizer"):
            self.make(self.gradients)


if __name__ == "__main__":
    tf.test.main()
