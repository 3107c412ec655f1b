"""Tests of inner products of gradients."""

import numpy as np
import tensorflow as tf

from keras_accum import inner_products
from keras_accum.inner_products import inner_product


def random(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return tf.constant(rng.normal(size=shape), tf.float32)


class InnerProductTest(tf.test.TestCase):
    def everywhere(self, function):
        """Returns what a function returns eagerly, traced, and with XLA."""
        return [
            make()
            for make in (
                function,
                tf.function(function),
                tf.function(function, jit_compile=True),
            )
        ]

    def test_dense(self):
        shapes = [(3,), (40, 96), (2, 3, 5, 64), ()]
        some = [random(*shape) for shape in shapes]
        others = [random(*shape, seed=1) for shape in shapes]
        for a, b in ((some, some), (some, others)):
            expected = sum(np.vdot(x, y) for x, y in zip(a, b, strict=True))
            for on_cpu in (True, False):
                found = self.everywhere(
                    lambda a=a, b=b, on_cpu=on_cpu: inner_product(a, b, on_cpu)
                )
                self.assertAllClose(found, [expected] * 3, rtol=1e-5)

    def test_what_lacks_is_zero(self):
        some, others = [None, random(3), None], [random(2), None, None]
        self.assertAllEqual(inner_product(some, others), 0.0)
        self.assertAllEqual(inner_product([], []), 0.0)

    def test_rows_that_come_twice(self):
        for indices in ([3, 1, 3, 3, 0], [2, 2, 2], [1], []):
            rows = tf.IndexedSlices(
                random(len(indices), 4),
                tf.constant(indices, tf.int32),
                tf.constant([5, 4]),
            )
            other = tf.IndexedSlices(
                random(2, 4, seed=1), tf.constant([3, 3]), tf.constant([5, 4])
            )
            dense = [tf.convert_to_tensor(each) for each in (rows, other)]
            full = random(5, 4, seed=2)
            for some, others, a, b in (
                (rows, rows, dense[0], dense[0]),
                (rows, other, *dense),
                (full, rows, full, dense[0]),
                (rows, full, dense[0], full),
            ):
                with self.subTest(indices=indices):
                    found = self.everywhere(
                        lambda s=some, o=others: inner_product([s], [o], True)
                    )
                    expected = np.vdot(a, b)
                    self.assertAllClose(found, [expected] * 3, rtol=1e-5)

    def test_matrix_product_of_few_rows_is_not_read(self):
        x, dy = random(4, 96), random(4, 128, seed=1)
        expected = np.linalg.norm(x.numpy().T @ dy.numpy()) ** 2

        def squared_norm(x, dy):
            gradient = tf.matmul(x, dy, transpose_a=True)
            return inner_product([gradient], [gradient], True)

        traced = tf.function(squared_norm).get_concrete_function(x, dy)
        self.assertAllClose(traced(x, dy), expected, rtol=1e-5)
        # The gradient itself is nobody's input.
        (product,) = [
            op
            for op in traced.graph.get_operations()
            if op.type == "MatMul" and list(op.outputs[0].shape) == [96, 128]
        ]
        self.assertEmpty(product.outputs[0].consumers())

    def test_of_many_rows_it_is(self):
        self.assertTrue(inner_products.is_cheaper(random(4, 96), random(4, 96)))
        self.assertFalse(
            inner_products.is_cheaper(random(256, 96), random(256, 96))
        )

    def test_half_precision_does_not_overflow(self):
        gradient = tf.fill([8, 8], tf.constant(6e4, tf.float16))
        self.assertAllClose(
            inner_product([gradient], [gradient]), 64 * 6e4**2, rtol=1e-2
        )


if __name__ == "__main__":
    tf.test.main()
