"""Functional models and subclasses leave each other alone."""

import copy
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_accum
from tests import test_utils


def subclass():
    class Sub(keras_accum.GradientAccumulationModel):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.dense = keras.layers.Dense(3)

        def call(self, inputs):
            return self.dense(inputs)

    return Sub


class ClassesTest(test_utils.TestCase):
    def assertTrains(self, model):
        model.compile("sgd", loss=test_utils.crossentropy())
        before = [w.copy() for w in model.get_weights()]
        for batch in test_utils.microbatches([4, 4]):
            model.train_on_batch(*batch)
        self.assertEqual(int(model.optimizer.iterations), 1)
        if before:
            self.assertNotAllClose(before[0], model.get_weights()[0])

    @pytest.mark.thorough
    def test_any_order_and_number(self):
        bases = keras_accum.GradientAccumulationModel.__bases__
        for _ in range(2):
            self.assertTrains(subclass()(accum_steps=2))
            self.assertTrains(test_utils.accumulating(accum_steps=2))
            self.assertTrains(subclass()(accum_steps=2))
        self.assertEqual(keras_accum.GradientAccumulationModel.__bases__, bases)

    def test_subclass_that_is_functional_and_its_subclass_that_is_not(self):
        class Graph(keras_accum.GradientAccumulationModel):
            def __init__(self, units, **kwargs):
                inputs = keras.Input((test_utils.FEATURES,))
                outputs = keras.layers.Dense(units)(inputs)
                super().__init__(inputs=inputs, outputs=outputs, **kwargs)

        class Child(Graph):
            def __init__(self):
                keras_accum.GradientAccumulationModel.__init__(
                    self, accum_steps=2
                )
                self.dense = keras.layers.Dense(3)

            def call(self, inputs):
                return self.dense(inputs)

        self.assertTrains(Graph(3, accum_steps=2))
        self.assertTrains(Child())
        graph = Graph(3, accum_steps=2)
        self.assertTrains(graph)
        self.assertIsInstance(graph, Graph)
        self.assertEqual(type(graph).__name__, "Graph")
        self.assertLen(graph.layers, 2)

    def test_mixin_in_front_of_another_model(self):
        class Theirs(keras.Model):
            def __init__(self, units):
                super().__init__()
                self.dense = keras.layers.Dense(units)

            def call(self, inputs):
                return self.dense(inputs)

        class Mine(keras_accum.GradientAccumulationMixin, Theirs):
            pass

        self.assertTrains(Mine(3, accum_steps=2))
        self.assertTrains(Mine(units=3, accum_steps=2))
        theirs = Theirs(3)
        theirs.compile("sgd", "mse")
        theirs.train_on_batch(np.ones((2, 6)), np.ones((2, 3)))
        self.assertEqual(int(theirs.optimizer.iterations), 1)

    def test_two_arguments_that_are_no_tensors(self):
        class Theirs(keras.Model):
            def __init__(self, units, activation):
                super().__init__()
                self.dense = keras.layers.Dense(units, activation)

            def call(self, inputs):
                return self.dense(inputs)

        class Mine(keras_accum.GradientAccumulationMixin, Theirs):
            pass

        self.assertTrains(Mine(3, "tanh", accum_steps=2))

    def test_functional_model_behind_the_mixin_with_more_arguments(self):
        class Theirs(keras.Model):
            def __init__(self, inputs, outputs, extra, **kwargs):
                super().__init__(inputs, outputs, **kwargs)
                self.extra = extra

        class Mine(keras_accum.GradientAccumulationMixin, Theirs):
            pass

        inputs = keras.Input((6,))
        outputs = keras.layers.Dense(3)(inputs)
        model = Mine(inputs, outputs, extra=5, accum_steps=2)
        self.assertEqual(model.extra, 5)
        self.assertTrains(model)

    def test_mixin_in_front_of_sequential(self):
        class Mine(keras_accum.GradientAccumulationMixin, keras.Sequential):
            pass

        self.assertTrains(
            Mine([keras.Input((6,)), keras.layers.Dense(3)], accum_steps=2)
        )
        self.assertTrains(Mine([keras.layers.Dense(3)], accum_steps=2))

    def test_keras_model_is_untouched(self):
        bases = keras.Model.__bases__
        test_utils.accumulating()
        self.assertEqual(keras.Model.__bases__, bases)

    def test_nested(self):
        inner = test_utils.accumulating(accum_steps=3)
        inputs = keras.Input((test_utils.FEATURES,))
        outer = keras_accum.GradientAccumulationModel(
            inputs, inner(inputs), accum_steps=2
        )
        self.assertTrains(outer)
        self.assertEqual(outer.accum_steps, 2)
        self.assertEqual(inner.accum_steps, 3)


class VariablesTest(test_utils.TestCase):
    def test_variables_are_those_of_keras_model(self):
        expected, actual = test_utils.mlp(), test_utils.accumulating()
        batch = test_utils.microbatches([4])[0]
        for model in (expected, actual):
            model.compile(
                "adam", loss=test_utils.crossentropy(), metrics=["accuracy"]
            )
            model.train_on_batch(*batch)
            model.train_on_batch(*batch)
        for kind in (
            "weights",
            "variables",
            "trainable_weights",
            "non_trainable_weights",
            "metrics_variables",
        ):
            names, shapes = [
                [(v.name, tuple(v.shape)) for v in getattr(model, kind)]
                for model in (expected, actual)
            ]
            self.assertEqual(names, shapes, msg=kind)
        self.assertEqual(
            [m.name for m in expected.metrics],
            [m.name for m in actual.metrics],
        )
        self.assertEqual(
            tf.nest.map_structure(np.shape, expected.get_state_tree()).keys(),
            tf.nest.map_structure(np.shape, actual.get_state_tree()).keys(),
        )
        self.assertEqual(expected.count_params(), actual.count_params())


class SerializationTest(test_utils.TestCase):
    def assertSame(self, loaded, model):
        self.assertIsInstance(loaded, keras_accum.GradientAccumulationModel)
        self.assertEqual(loaded.accum_steps, model.accum_steps)
        self.assertEqual(loaded.partial_window, model.partial_window)
        self.assertEqual(loaded.accumulator_dtype, model.accumulator_dtype)
        self.assertEqual(loaded.communication_dtype, model.communication_dtype)
        x = np.ones((2, test_utils.FEATURES), "float32")
        if loaded.get_weights():
            self.assertEqual(loaded(x).shape, model(x).shape)

    def test_configuration_and_files(self):
        model = test_utils.accumulating(
            accum_steps=5, partial_window="carry", accumulator_dtype="float64"
        )
        model.compile("adam", loss=test_utils.crossentropy())
        batch = test_utils.microbatches([4])[0]
        for _ in range(5):
            model.train_on_batch(*batch)
        cls = keras_accum.GradientAccumulationModel
        self.assertSame(cls.from_config(model.get_config()), model)
        for suffix in ("keras", "h5"):
            path = f"{self.get_temp_dir()}/model.{suffix}"
            model.save(path)
            loaded = keras.models.load_model(path)
            self.assertSame(loaded, model)
            self.assertAllClose(loaded.get_weights(), model.get_weights(), 0, 0)
            self.assertEqual(int(loaded.optimizer.iterations), 1)
            if suffix == "keras":  # Keras cannot train on from .h5 files.
                loaded.train_on_batch(*batch)

    def test_pickle_and_deepcopy(self):
        for accum_steps in (1, 4):
            model = test_utils.accumulating(accum_steps=accum_steps)
            for copied in (
                pickle.loads(pickle.dumps(model)),
                copy.deepcopy(model),
            ):
                self.assertSame(copied, model)
                self.assertAllClose(
                    copied.get_weights(), model.get_weights(), 0, 0
                )

    def test_sequential_behind_the_mixin(self):
        model = SequentialMine([keras.Input((6,)), keras.layers.Dense(3)])
        model.accum_steps = 3
        model.partial_window = "drop"
        path = f"{self.get_temp_dir()}/model.keras"
        model.save(path)
        for loaded in (
            keras.models.load_model(path),
            SequentialMine.from_config(model.get_config()),
        ):
            self.assertEqual(loaded.accum_steps, 3)
            self.assertEqual(loaded.partial_window, "drop")

    def test_plain_model_reads_the_weights(self):
        model = test_utils.accumulating()
        path = f"{self.get_temp_dir()}/model.weights.h5"
        model.save_weights(path)
        plain = test_utils.mlp()
        plain.set_weights([0 * w for w in plain.get_weights()])
        plain.load_weights(path)
        self.assertAllClose(plain.get_weights(), model.get_weights(), 0, 0)

    def test_registered_subclass(self):
        @keras.saving.register_keras_serializable("functional_test")
        class Named(keras_accum.GradientAccumulationModel):
            pass

        model = test_utils.mlp(Named, accum_steps=3)
        path = f"{self.get_temp_dir()}/model.keras"
        model.save(path)
        loaded = keras.models.load_model(path)
        self.assertIsInstance(loaded, Named)
        self.assertEqual(loaded.accum_steps, 3)

    def test_function_comes_back(self):
        model = test_utils.accumulating(accum_steps=schedule)
        path = f"{self.get_temp_dir()}/model.keras"
        model.save(path)
        loaded = keras.models.load_model(path)
        self.assertIs(loaded.accum_steps, schedule)

    def test_subclass_without_a_constructor_of_its_own(self):
        class Doubling(keras_accum.GradientAccumulationModel):
            def call(self, inputs):
                return 2 * inputs

        model = Doubling(accum_steps=3)
        model.accum_steps = 4
        copy = Doubling.from_config(model.get_config())
        self.assertEqual(copy.accum_steps, 4)

    def test_subclass_with_a_constructor_of_its_own(self):
        class Own(keras_accum.GradientAccumulationModel):
            def __init__(self, **kwargs):
                super().__init__(accum_steps=3, **kwargs)

        self.assertEqual(Own.from_config(Own().get_config()).accum_steps, 3)


@keras.saving.register_keras_serializable("functional_test")
class SequentialMine(keras_accum.GradientAccumulationMixin, keras.Sequential):
    pass


@keras.saving.register_keras_serializable("functional_test")
def schedule(updates):
    return 2 + updates


if __name__ == "__main__":
    tf.test.main()
