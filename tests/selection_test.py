"""Assignments that count only if a condition holds."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from keras_accum import selection
from tests import test_utils


def assign_all(variable):
    variable.assign(2 * variable)
    variable.assign_add([1.0, 1.0])
    variable.assign_sub(0.5 * variable)


def assign_a_part(variable):
    variable.assign_add([1.0, 1.0])
    variable.scatter_nd_update([[0]], [5.0])


def assign_in_a_branch(variable):
    def branch():
        variable.assign_add([1.0, 1.0])
        return 0

    tf.cond(variable[1] > 0, branch, lambda: 0)


class AssigningIfTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.product(
        update=(assign_all, assign_a_part, assign_in_a_branch),
        jit_compile=(True, False, None),
        holds=(True, False),
    )
    def test_assigns_only_if_it_holds(self, update, jit_compile, holds):
        variable, expected = tf.Variable([1.0, 2.0]), tf.Variable([1.0, 2.0])
        if holds:
            update(expected)

        def function(condition):
            with selection.assigning_if(condition, [variable]):
                update(variable)
            return variable.read_value()

        if jit_compile is not None:
            function = tf.function(
                function, jit_compile=jit_compile, autograph=False
            )
        self.assertAllEqual(function(tf.constant(holds)), expected)
        self.assertAllEqual(variable, expected)

    def test_other_dtypes(self):
        variable = keras.Variable([1, 2], dtype="int64")

        @tf.function
        def function(condition):
            with selection.assigning_if(condition, [variable.value]):
                variable.assign_add(tf.constant([1, 1]))

        function(tf.constant(False))
        self.assertAllEqual(variable, [1, 2])
        function(tf.constant(True))
        self.assertAllEqual(variable, [2, 3])

    def test_ends_with_an_error(self):
        variable = tf.Variable(1.0)
        with (
            self.assertRaisesRegex(ValueError, "Stop."),
            selection.assigning_if(tf.constant(False), [variable]),
        ):
            raise ValueError("Stop.")
        variable.assign(2.0)
        self.assertEqual(variable.numpy(), 2.0)


class ProgramTest(test_utils.TestCase):
    def test_moments_are_not_copied(self):
        weight = keras.Variable(np.ones((64, 32), "float32"))
        optimizer = keras.optimizers.Adam()
        optimizer.build([weight])
        variables = [v.value for v in (weight, *optimizer.variables)]

        @tf.function(jit_compile=True, autograph=False)
        def update(condition, gradient):
            with selection.assigning_if(condition, variables):
                optimizer.apply([gradient], [weight])

        args = tf.constant(True), tf.ones((64, 32))
        program = update.experimental_get_compiler_ir(*args)("optimized_hlo")
        self.assertNotIn("f32[64,32]{1,0} copy(", program)


if __name__ == "__main__":
    tf.test.main()
