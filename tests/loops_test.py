"""Functions of an iterator."""

import tensorflow as tf
from absl.testing import parameterized

from keras_accum import loops
from tests import test_utils


class LoopTest(test_utils.TestCase, parameterized.TestCase):
    def loop(self, num_steps, eagerly):
        model = test_utils.mlp()
        model.compile("sgd", run_eagerly=eagerly, jit_compile=False)
        seen = tf.Variable([], shape=[None], dtype=tf.int64)

        def step(data):
            seen.assign(tf.concat([seen, [data]], 0))
            return 10 * data

        return loops.make_loop(model, step, num_steps), seen

    @parameterized.product(num_steps=(1, 2, 5), eagerly=(False, True))
    def test_leaves_no_batch_out(self, num_steps, eagerly):
        loop, seen = self.loop(num_steps, eagerly)
        iterator = iter(tf.data.Dataset.range(5))
        logs = []
        for _ in range(-(-5 // num_steps)):
            logs.append(int(loop(iterator)))
        self.assertAllEqual(seen, range(5))
        self.assertEqual(logs[-1], 40)
        with self.assertRaises(tf.errors.OutOfRangeError):
            loop(iterator)
        self.assertAllEqual(seen, range(5))

    def test_takes_iterators_of_python(self):
        loop, seen = self.loop(2, False)
        iterator = iter([tf.constant(n, tf.int64) for n in range(3)])
        self.assertAllEqual(loop(iterator), 10)
        self.assertAllEqual(loop(iterator), 20)
        self.assertIsNone(loop(iterator))
        self.assertAllEqual(seen, range(3))


if __name__ == "__main__":
    tf.test.main()
