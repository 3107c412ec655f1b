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

    @parameterized.product(num_steps=(1, 2, 5), eagerly=(False, True))
    def test_looks_at_the_first_batch(self, num_steps, eagerly):
        model = test_utils.mlp()
        model.compile(
            "sgd",
            run_eagerly=eagerly,
            jit_compile=False,
            steps_per_execution=num_steps,
        )
        seen = tf.Variable(tf.zeros((0, 1)), shape=(None, 1))
        looked_at, traces = [], []

        def step(data):
            traces.append(data.shape)
            seen.assign(tf.concat([seen, data], 0))
            return tf.reduce_max(data)

        if not eagerly:
            step = tf.function(step)
        loop = loops.make_loop(model, step, num_steps)
        looking = loops.make_looking_loop(model, loop, step, looked_at.append)
        rows = tf.range(9.0)[:, None]
        # Two rows, and one in the last batch.
        iterator = iter(tf.data.Dataset.from_tensor_slices(rows).batch(2))
        logs = [float(looking(iterator))]
        for _ in range(-(-5 // num_steps) - 1):
            logs.append(float(loop(iterator)))
        self.assertAllEqual(seen, rows)
        self.assertAllEqual(looked_at[0], rows[:2])
        self.assertEqual(logs[-1], 8.0)
        if not eagerly:
            with self.subTest("For all batches, it is traced once."):
                self.assertEqual([tuple(each) for each in traces], [(None, 1)])
        with self.assertRaises(tf.errors.OutOfRangeError):
            loop(iterator)

    def test_within_a_function_of_the_users(self):
        model = test_utils.mlp()
        model.compile("sgd", jit_compile=False)
        seen = []
        step = tf.function(tf.reduce_max)
        loop = loops.make_loop(model, step, 1)
        looking = loops.make_looking_loop(model, loop, step, seen.append)
        iterator = iter(tf.data.Dataset.range(3).batch(2))
        train = tf.function(lambda: looking(iterator))
        self.assertEqual([int(train()), int(train())], [1, 2])
        self.assertLen(seen, 1)
        self.assertIsInstance(seen[0], tf.Tensor)


if __name__ == "__main__":
    tf.test.main()
