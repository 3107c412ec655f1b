"""A window is the list of its parts."""

import keras
import tensorflow as tf

from keras_accum import microbatch
from keras_accum import window
from tests import test_utils


class Counted(window.Part):
    """Counts micro-batches, and writes down what it is told."""

    def __init__(self, name, told):
        self._name, self._told, self.count = name, told, tf.Variable(0.0)

    @property
    def variables(self):
        return [self.count]

    def add(self, microbatch):
        self.count.assign_add(1.0)

    def close(self, totals, applies):
        self._told.append((self._name, "close", float(totals[0]), applies))

    def reset(self):
        self._told.append((self._name, "reset"))

    def state(self):
        return {self._name: self.count.numpy()}

    def restore(self, state):
        self.count.assign(state[self._name])


class WindowTest(tf.test.TestCase):
    def test_asks_each_part_in_its_order(self):
        told = []
        parts = {"b": Counted("b", told), "a": Counted("a", told)}
        found = window.Window(parts)
        for _ in range(2):
            found.add(microbatch.Microbatch(None, True))
        self.assertEqual(list(found.sums()), ["b", "a"])
        self.assertEqual(found.state(), {"b": 2.0, "a": 2.0})
        found.close({"b": [tf.constant(3.0)], "a": [tf.constant(4.0)]}, None)
        found.reset()
        self.assertEqual(
            told,
            [
                ("b", "close", 3.0, None),
                ("a", "close", 4.0, None),
                ("b", "reset"),
                ("a", "reset"),
            ],
        )
        found.restore({"a": 7.0, "b": 8.0})
        self.assertAllEqual(found["a"].count, 7.0)
        self.assertLen(found.variables, 2)
        self.assertEqual(found.signature(), (1, 1))

    def test_a_part_without_variables_needs_nothing(self):
        found = window.Window({"nothing": window.Part()})
        found.add(microbatch.Microbatch(None, True))
        found.close(found.sums(), None)
        found.check_state({})
        found.restore({})
        self.assertEqual((found.state(), found.signature()), ({}, (0,)))

    def test_totals_count_if_the_update_is_made(self):
        totals = [tf.constant([1.0, 2.0])]
        self.assertIs(window.if_applied(totals, None), totals)
        for applies, expected in ((True, [1.0, 2.0]), (False, [0.0, 0.0])):
            (found,) = window.if_applied(totals, tf.constant(applies))
            self.assertAllEqual(found, expected)


class LayerStateTest(test_utils.TestCase):
    def test_is_the_replicas_mean(self):
        with test_utils.mirrored().scope():
            inputs = keras.Input((2,))
            layer = keras.layers.BatchNormalization()
            model = keras.Model(inputs, layer(inputs))
        part = window.LayerState(model)
        step = microbatch.Microbatch(model, True, is_replicated=True)
        self.assertEmpty(part.variables)
        step.assigned[id(layer.moving_mean)] = layer.moving_mean
        part.add(step)
        self.assertLen(part.variables, 1)
        self.assertIs(part.variables[0], layer.moving_mean.value)

    def test_one_replica_has_none(self):
        model = test_utils.mlp()
        self.assertEmpty(window.LayerState(model).variables)
        self.assertEmpty(window.MetricSums(model).variables)


if __name__ == "__main__":
    tf.test.main()
