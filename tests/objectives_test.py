"""The losses of a step, and the updates that they make together."""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

from keras_accum import calls
from keras_accum import objectives
from keras_accum.accumulator import GradientAccumulator
from tests import test_utils


class ObjectivesTest(test_utils.TestCase):
    def setUp(self):
        super().setUp()
        self.variables = [keras.Variable(tf.zeros([2])) for _ in range(3)]
        self.optimizers = [keras.optimizers.SGD(), keras.optimizers.Adam()]

    def call(self, optimizer, *variables, place=()):
        variables = [self.variables[index] for index in variables]
        return calls.Call(
            self.optimizers[optimizer],
            variables,
            [tf.ones([2])] * len(variables),
            1.0,
            place,
        )

    def update(self, optimizer, value, *variables, is_made=None):
        return objectives.Update(
            self.optimizers[optimizer],
            [self.variables[index] for index in variables],
            [None if value is None else tf.fill([2], value)] * len(variables),
            None if is_made is None else tf.constant(is_made),
        )

    def test_calls_of_one_loss(self):
        groups = objectives.by_loss(
            [
                self.call(0, 0, 1, place=("here",)),
                self.call(0, 1, 0, place=("here",)),
                self.call(0, 0, 1, place=("there",)),
                self.call(1, 0, 1, place=("here",)),
                self.call(0, 2, place=("there",)),
            ]
        )
        self.assertEqual(list(map(len, groups.values())), [2, 1, 1, 1])
        self.assertEqual([key[2] for key in groups], [0, 1, 0, 0])

    def test_updates_of_one_optimizer(self):
        both, other = objectives.joined(
            [
                self.update(0, 1.0, 0, 1),
                self.update(1, 5.0, 0),
                self.update(0, 2.0, 1, 2, is_made=False),
            ]
        )
        self.assertEqual(both.variables, self.variables)
        self.assertAllClose(both.gradients, [[1, 1], [3, 3], [2, 2]])
        # One of the two is made for certain.
        self.assertIsNone(both.is_made)
        self.assertIs(other.optimizer, self.optimizers[1])
        (either,) = objectives.joined(
            [
                self.update(0, None, 0, is_made=True),
                self.update(0, None, 0, is_made=False),
            ]
        )
        self.assertAllEqual(either.is_made, True)
        self.assertEqual(either.gradients, [None])

    def test_update_of_one(self):
        accumulator = GradientAccumulator(self.variables[:1])
        accumulator.add([tf.fill([2], 6.0)], 3.0)
        objective = objectives.Objective(accumulator)
        objective.is_optional = True
        sums = accumulator.sums()
        update = objectives.update_of(
            objective, self.optimizers[0], sums, num_replicas=1
        )
        self.assertAllClose(update.gradients, [[6, 6]])
        self.assertAllEqual(update.is_made, True)
        update.build_optimizer()
        update.apply()
        self.assertAllClose(self.variables[0], [-0.06, -0.06])

    def test_optimizers_are_built_for_all_of_a_step(self):
        some, other = self.optimizers
        calls = [self.call(1, 1), self.call(1, 0, 1), self.call(0, 0)]

        @tf.function(autograph=False)
        def step():
            strategy = tf.distribute.get_strategy()
            objectives.build_optimizers(calls, strategy)

        step()
        self.assertTrue(some.built)
        # Two moments of each, the number of updates and the learning rate.
        self.assertLen(other.variables, 2 * 2 + 2)

    def test_weights_are_not_rounded(self):
        self.addCleanup(keras.config.set_floatx, keras.config.floatx())
        keras.config.set_floatx("float64")
        calls = {
            objectives.Objective(GradientAccumulator(self.variables[:1])): [
                dataclasses.replace(self.call(0, 0), weight=weight)
            ]
            for weight in tf.constant([0.1, 0.2], tf.float64)
        }
        found = objectives.weights_of(calls, tf.constant(7))
        self.assertAllClose(
            list(found.values()), np.array([0.1, 0.2]), 0, 1e-15
        )

    def test_states_have_names(self):
        states = {1: {"buffer_0": np.ones(2)}, 12: {"count": np.ones(())}}
        named = objectives.named_states(states)
        self.assertEqual(
            list(named), ["objective_1_buffer_0", "objective_12_count"]
        )
        self.assertEqual(
            objectives.states_of_others(named | {"count": np.ones(())}), states
        )


if __name__ == "__main__":
    tf.test.main()
