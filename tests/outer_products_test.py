"""Products of few rows, as sums of outer products."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from keras_accum import outer_products
from tests import test_utils


def product(rows, transpose_a, transpose_b, dtype="float64"):
    """Returns factors, and a function that returns their product of 7 by 5."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 7) if transpose_a else (7, rows))
    dy = rng.normal(size=(5, rows) if transpose_b else (rows, 5))

    def function(x, dy):
        return tf.matmul(
            x, dy, transpose_a=transpose_a, transpose_b=transpose_b
        )

    return tf.constant(x, dtype), tf.constant(dy, dtype), function


def types_of(function, *args):
    """Returns the types of the ops that a function traces."""
    graph = tf.function(function).get_concrete_function(*args).graph
    return {op.type for op in graph.get_operations()}


class WrittenOutTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.product(
        rows=(1, 3, 4), transpose_a=(True, False), transpose_b=(True, False)
    )
    def test_is_the_product(self, rows, transpose_a, transpose_b):
        x, dy, function = product(rows, transpose_a, transpose_b)

        def written_out(x, dy):
            return outer_products.written_out(function(x, dy))

        self.assertIn("Mul", types_of(written_out, x, dy))
        for jit_compile in (True, False):
            actual = tf.function(written_out, jit_compile=jit_compile)(x, dy)
            self.assertAllClose(actual, function(x, dy), 1e-13, 1e-13)

    @parameterized.parameters(
        (outer_products.ROWS + 1, "float32"), (2, "bfloat16")
    )
    def test_leaves_others_alone(self, rows, dtype):
        x, dy, function = product(rows, True, False, dtype)

        def same(x, dy):
            gradient = function(x, dy)
            self.assertIs(outer_products.written_out(gradient), gradient)
            return gradient

        types_of(same, x, dy)

    def test_leaves_an_unknown_number_of_rows_alone(self):
        _, _, function = product(2, True, False, "float32")
        specs = tf.TensorSpec([None, 7]), tf.TensorSpec([None, 5])
        types = types_of(
            lambda x, dy: outer_products.written_out(function(x, dy)), *specs
        )
        self.assertNotIn("Mul", types)

    def test_a_choice_of_a_product(self):
        x, dy, function = product(3, True, False)

        def chosen(condition, x, dy):
            product = tf.where(condition, function(x, dy), 7.0)
            return outer_products.written_out(product)

        condition = tf.constant(True)
        self.assertIn("Mul", types_of(chosen, condition, x, dy))
        chosen = tf.function(chosen)
        actual = chosen(condition, x, dy)
        self.assertAllClose(actual, function(x, dy), 1e-13, 1e-13)
        actual = chosen(tf.constant(False), x, dy)
        self.assertAllEqual(actual, np.full((7, 5), 7.0))

    def test_leaves_values_alone(self):
        value = tf.ones((2, 2))
        self.assertIs(outer_products.written_out(value), value)


class ProgramTest(test_utils.TestCase, parameterized.TestCase):
    def program(self, rows):
        """Compiles a further micro-batch on a layer of 64 by 32."""
        keras.utils.set_random_seed(0)
        inputs = keras.Input((64,))
        outputs = keras.layers.Dense(32)(inputs)
        model = keras_accum.GradientAccumulationModel(
            inputs, outputs, accum_steps=4
        )
        model.compile("sgd", "mse", jit_compile=True)
        batch = np.ones((rows, 64), "float32"), np.ones((rows, 32), "float32")
        model.train_on_batch(*batch)
        step = tf.function(
            lambda batch: test_utils.train_microbatch(model, False, batch),
            jit_compile=True,
        )
        batch = tuple(map(tf.constant, batch))
        return step.experimental_get_compiler_ir(batch)(stage="optimized_hlo")

    @pytest.mark.thorough
    def test_no_product_is_stored(self):
        self.assertNotIn("f32[64,32]{1,0} dot(", self.program(4))

    @pytest.mark.thorough
    def test_many_rows_are_a_matrix_product(self):
        self.assertIn("f32[64,32]{1,0} dot(", self.program(32))


if __name__ == "__main__":
    tf.test.main()
