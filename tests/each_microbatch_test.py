"""The steps on a batch in micro-batches, and what they need of it first."""

import keras
import tensorflow as tf

import keras_accum
from keras_accum import each_microbatch
from tests import test_utils


class EachMicrobatchTest(test_utils.TestCase):
    def test_counts_rows_of_each(self):
        keras.utils.set_random_seed(0)
        model = test_utils.mlp(
            keras_accum.GradientAccumulationModel, microbatch_size=3
        )
        model.compile("sgd", "mse", run_eagerly=True)
        sizes = []

        def step(is_first, data, **unused):
            self.assertEqual(bool(is_first), not sizes)
            sizes.append((len(data[0]), bool(sizes)))
            return {"seen": tf.constant(len(sizes))}

        each = each_microbatch.EachMicrobatch(
            model._accumulation, step, trains=True
        )
        data = (tf.zeros((8, test_utils.FEATURES)), tf.zeros((8, 3)))
        logs = each((data,), 3)
        self.assertEqual([size for size, _ in sizes], [3, 3, 2])
        self.assertEqual(int(logs["seen"]), 3)

    def planned(self, step, sizes):
        """Returns the bytes that are planned for a step on so many rows."""
        model = test_utils.mlp(
            keras_accum.GradientAccumulationModel, microbatch_size=8
        )
        model.compile("sgd", "mse", jit_compile=True)
        each = each_microbatch.EachMicrobatch(
            model._accumulation, step, trains=True
        )
        data = (tf.zeros((8, test_utils.FEATURES)), tf.zeros((8, 3)))
        return [each.memory_plan(data, size).planned for size in sizes]

    def test_plans_all_sizes_by_one_trace(self):
        traced = []

        def step(is_first, data):
            traced.append(data[0].shape[0])
            return tf.matmul(data[0], data[0], transpose_b=True)

        planned = self.planned(step, sizes=(8, 4, 2))
        # Products of all pairs of rows, in float32.
        self.assertEqual(planned[0] - planned[1], 4 * (64 - 16))
        self.assertEqual(traced, [None])

    def test_plans_a_step_that_asks_for_the_number_of_rows(self):
        def step(is_first, data):
            return tf.zeros([data[0].shape[0], 100])

        self.assertEqual(self.planned(step, sizes=(8,)), [8 * 100 * 4])

    def test_a_step_gets_its_share_of_the_gradients(self):
        step = each_microbatch.taking_whole(lambda first, data, whole: whole)
        summary = (tf.constant(1.0), [], tf.constant(8))
        whole = step(True, "x", ["d"], summary)
        self.assertEqual((whole.gradients, whole.rows), (["d"], summary[2]))


if __name__ == "__main__":
    tf.test.main()
