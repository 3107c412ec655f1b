"""`plan`: what sizes need, whether they fit, and that nothing changes."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

import keras_accum
from keras_accum import counting
from keras_accum import forecast
from keras_accum import plan_table
from tests import test_utils

MIB = 2**20
LENGTH, UNITS, CLASSES, ROWS = 2048, 16, 3, 8
# All rows need more, half of them less.
LIMIT = 15 * MIB
WAYS = {"compiled": {"jit_compile": True}, "traced": {"jit_compile": False}}
# Compiling each size takes longest, and is for the second command.
TRACED = 1


class Block(keras.layers.Layer):
    """Keeps much between what it is given and what it returns."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = [
            keras.layers.Dense(UNITS, activation="gelu") for _ in range(3)
        ]
        self.dropout = keras.layers.Dropout(0.1)

    def build(self, shape):
        for each in self.inner:
            each.build(shape)

    def call(self, inputs, training=False):
        hidden = inputs
        for each in self.inner:
            hidden = each(hidden)
        return inputs + self.dropout(hidden, training=training)


class Noise(keras.layers.Layer):
    """Draws by a generator of TensorFlow's, and counts how often."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.generator = tf.random.Generator.from_seed(1)
        self.counts = {"calls": tf.Variable(0.0, trainable=False)}

    def call(self, inputs, training=False):
        if not training:
            return inputs
        self.counts["calls"].assign_add(1.0)
        return inputs + self.generator.normal(tf.shape(inputs))


def make(cls=keras.Model, jit_compile=True, **arguments):
    """Returns a compiled model whose activations are most of its memory."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((LENGTH, UNITS))
    hidden = inputs
    for index in range(2):
        hidden = Block(name=f"block_{index}")(hidden)
    hidden = keras.layers.BatchNormalization(name="norm")(hidden)
    hidden = keras.layers.GlobalAveragePooling1D(name="mean")(hidden)
    hidden = Noise(name="noise")(hidden)
    logits = keras.layers.Dense(CLASSES)
    # It assigns a weight that is trained.
    outputs = keras.layers.SpectralNormalization(logits, name="logits")(hidden)
    model = cls(inputs, outputs, **arguments)
    model.compile(
        keras.optimizers.Adam(),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=jit_compile,
    )
    return model


def batch(rows=ROWS):
    """Returns inputs and labels."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, LENGTH, UNITS)).astype("float32")
    return x, rng.integers(0, CLASSES, rows)


def values(model):
    """Returns all that a training changes, by name."""
    variables = [
        *model.variables,
        *model.metrics_variables,
        *model.optimizer.variables,
        model.get_layer("noise").generator.state,
        model.get_layer("noise").counts["calls"],
    ]
    return [variable.numpy() for variable in variables]


@functools.cache
def plan(way):
    """Returns the plan of a way, made once."""
    return keras_accum.plan(make(**WAYS[way]), *batch(), memory_limit=LIMIT)


def train_as_planned(rows):
    """Asks for a plan, trains a new model so, and returns the size."""
    found = keras_accum.plan(make(), *batch(rows))
    model = make(
        keras_accum.GradientAccumulationModel, microbatch_size=found.best.rows
    )
    if found.best.is_recomputed:
        keras_accum.rematerialize(model, found.layers)
    data = batch(rows)
    model.fit(*data, batch_size=rows, validation_data=data, verbose=0)
    return model.microbatch_size


class PlanTest(parameterized.TestCase):
    @parameterized.parameters(*WAYS)
    @test_utils.first_command(TRACED)
    def test_lists_sizes_with_their_bytes(self, way):
        found, model = plan(way), make()
        plain = [each for each in found.sizes if not each.is_recomputed]
        self.assertEqual([each.rows for each in plain], [8, 4, 2, 1])
        # Weights, and the statistics of BatchNormalization, and the seeds.
        weights = sum(each.numpy().nbytes for each in model.variables)
        trained = sum(each.numpy().nbytes for each in model.trainable_weights)
        for each in found.sizes:
            self.assertEqual(each.weights, weights)
            self.assertBetween(each.buffers, trained, trained + 2**12)
            self.assertBetween(each.optimizer, 2 * trained, 2 * trained + 64)
            self.assertEqual(each.batch, 3 * sum(a.nbytes for a in batch()))
            kept = each.weights + each.buffers + each.optimizer + each.batch
            self.assertEqual(
                each.total, kept + max(each.activations, each.boundary)
            )
            self.assertEqual(each.fits, each.total <= LIMIT)

    @parameterized.parameters(*WAYS)
    @test_utils.first_command(TRACED)
    def test_needs_less_for_fewer_rows_and_for_recomputed_layers(self, way):
        sizes = {
            (each.rows, each.is_recomputed): each.activations
            for each in plan(way).sizes
        }
        # Where Linux counts, it counts what kernels take for themselves, too.
        counts = way == "compiled" or counting.counts_tensors("CPU:0")
        most = 0.7 if counts else 0.8
        for recomputed in (False, True):
            self.assertLess(sizes[4, recomputed], most * sizes[8, recomputed])
        self.assertLess(sizes[8, True], 0.7 * sizes[8, False])

    @parameterized.parameters(*WAYS)
    @test_utils.first_command(TRACED)
    def test_best_is_the_fastest_that_fits(self, way):
        found = plan(way)
        timed = [each for each in found.sizes if each.rows_per_second]
        self.assertTrue(all(each.fits for each in timed))
        self.assertEqual(
            found.best.rows_per_second,
            max(each.rows_per_second for each in timed),
        )
        largest = max(e.rows for e in found.sizes if e.fits)
        self.assertIn(largest, [each.rows for each in timed])

    @parameterized.parameters(*WAYS)
    @test_utils.first_command(TRACED)
    def test_table_says_what_to_do(self, way):
        found = plan(way)
        lines = str(found).splitlines()
        self.assertLen(lines[2:-2], len(found.sizes) + found.best.is_recomputed)
        self.assertEqual(lines[-2], f"microbatch_size={found.best.rows}")

    @parameterized.parameters(*WAYS)
    @test_utils.first_command(TRACED)
    def test_leaves_out_layers_that_cannot_be_recomputed(self, way):
        found = plan(way)
        self.assertNotIn("noise", found.layers)
        self.assertIn("block_0", found.layers)
        self.assertIn("block_1", found.layers)
        self.assertRegex(found.note, "^These cannot be recomputed: .*noise")

    @pytest.mark.thorough
    def test_layers_are_those_of_rematerialize(self):
        found, model = plan("traced"), make(jit_compile=False)
        self.assertIn("block_0", found.layers)
        keras_accum.rematerialize(model, found.layers)
        again = keras_accum.plan(model, *batch(), memory_limit=LIMIT)
        self.assertLess(
            again.sizes[0].activations, 0.8 * found.sizes[0].activations
        )


class ForecastTest(parameterized.TestCase):
    @parameterized.parameters(
        lambda rows: 1000 + 10 * rows,
        lambda rows: max(5000, 100 * rows),
        lambda rows: 3000 + max(0, 70 * (rows - 9)) + 1 / rows,
    )
    def test_sizes_between_are_near_their_line(self, needed):
        sizes = [256, 128, 64, 32, 16, 8, 4, 2, 1]
        needs = forecast.Line(needed)
        needs.plan(sizes)
        for rows in sizes:
            self.assertAlmostEqual(needs(rows) / needed(rows), 1, delta=0.1)

    def test_runs_no_more_than_there_is_room_for(self):
        tried = []

        def run(rows):
            tried.append(rows)
            return 100 + 10 * rows

        needs = forecast.Line(run)
        needs.run([64, 32, 16, 8], 600)
        self.assertEqual(tried, [1, 2, 8, 16])
        self.assertEqual(needs(64), 740)


class TableTest(absltest.TestCase):
    def test_marks_what_is_forecast(self):
        kept = {"weights": MIB, "buffers": MIB, "optimizer": 0, "batch": 0}
        sizes = [
            plan_table.Size(
                rows=rows,
                is_recomputed=False,
                activations=rows * 2**10 * MIB,
                boundary=0,
                is_measured=rows < 8,
                fits=True,
                **kept,
            )
            for rows in (8, 4)
        ]
        found = plan_table.Plan(tuple(sizes), 10**6 * MIB)
        _, _, forecast, measured, advice = str(found).splitlines()
        self.assertIn("    ~8,192.0         0.0     8,194.0", forecast)
        self.assertIn("     4,096.0         0.0     4,098.0", measured)
        self.assertEqual(advice, "microbatch_size=8")


class UnchangedTest(parameterized.TestCase):
    @parameterized.parameters(
        {"jit_compile": True, "arguments": {}},
        {"jit_compile": False, "arguments": {"accum_steps": 4}},
    )
    @test_utils.first_command(second=(1,))
    def test_training_goes_on_as_if_nothing_had_been(
        self, jit_compile, arguments
    ):
        cls = keras.Model
        if arguments:
            cls = keras_accum.GradientAccumulationModel
        model, other = (
            make(cls, jit_compile=jit_compile, **arguments) for _ in range(2)
        )
        x, y = batch(8)
        for each in (model, other):
            # A window of two of four micro-batches, if it accumulates.
            for start in (0, 4):
                each.train_on_batch(x[start : start + 4], y[start : start + 4])
        before, function = values(model), model.train_function
        keras_accum.plan(model, x[:2], y[:2])
        for a, b in zip(before, values(model), strict=True):
            np.testing.assert_array_equal(a, b)
        self.assertIs(model.train_function, function)
        self.assertFalse(any(each._remat_mode for each in model.layers))
        for each in (model, other):
            each.train_on_batch(x[:4], y[:4])
            each.train_on_batch(x[4:], y[4:])
        for a, b in zip(values(other), values(model), strict=True):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.thorough
    def test_optimizer_that_is_not_built_stays_so(self):
        model = make(jit_compile=False)
        keras_accum.plan(model, *batch(1))
        self.assertFalse(model.optimizer.built)


class ModelsTest(parameterized.TestCase):
    def test_model_that_is_not_built(self):
        model = keras.Sequential([keras.layers.Dense(3)])
        model.compile("sgd", "mse", run_eagerly=True)
        found = keras_accum.plan(model, np.ones((6, 2)), np.ones((6, 3)))
        self.assertEqual([each.rows for each in found.sizes[:3]], [6, 3, 1])
        self.assertIsNotNone(found.best)

    @pytest.mark.thorough
    def test_nothing_fits(self):
        found = keras_accum.plan(
            make(jit_compile=False), *batch(1), memory_limit=2**10
        )
        self.assertIsNone(found.best)
        self.assertIn("Nothing fits", str(found))

    @pytest.mark.thorough
    def test_several_replicas(self):
        strategy = test_utils.chosen_strategy()[0]
        with strategy.scope():
            model = make(jit_compile=False)
        rows = strategy.num_replicas_in_sync
        found = keras_accum.plan(model, *batch(rows), memory_limit=2**30)
        self.assertEqual(found.sizes[0].rows, 1)
        self.assertEqual(
            found.sizes[0].batch, 3 * sum(a.nbytes for a in batch(1))
        )
        self.assertTrue(found.best.fits)

    @pytest.mark.thorough
    def test_what_it_finds_trains_in_a_control_group(self):
        with test_utils.memory_group(1250 * MIB) as before:
            size = test_utils.number_printed(
                "from tests import planning_test\n"
                "print(planning_test.train_as_planned(512))",
                before,
            )
        self.assertBetween(size, 1, 511)

    def test_refuses_what_cannot_be_planned(self):
        model = make()
        with self.assertRaisesRegex(ValueError, "same number of rows"):
            keras_accum.plan(model, np.ones((4, 2)), np.ones(3))
        with self.assertRaisesRegex(ValueError, "must be one batch"):
            keras_accum.plan(model, iter([batch(4)]))
        with self.assertRaisesRegex(ValueError, "must have rows"):
            keras_accum.plan(model, *batch(0))
        with self.assertRaisesRegex(TypeError, "must be a `keras.Model`"):
            keras_accum.plan("model.keras", *batch(4))
        bytes_expected = "positive number of bytes"
        for limit in (0, float("nan")):
            with self.assertRaisesRegex(ValueError, bytes_expected):
                keras_accum.plan(model, *batch(4), memory_limit=limit)
        for limit in ("8GB", True):
            with self.assertRaisesRegex(TypeError, bytes_expected):
                keras_accum.plan(model, *batch(4), memory_limit=limit)
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
        with self.assertRaisesRegex(ValueError, "must be compiled"):
            keras_accum.plan(model, np.ones((4, 2)), np.ones((4, 3)))


if __name__ == "__main__":
    absltest.main()
