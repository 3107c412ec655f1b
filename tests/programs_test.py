"""The compiled programs: what is updated in place, and what is traced again."""

import functools
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from keras_accum import training
from tests import test_utils


def compiled_model(optimizer="adam", **kwargs):
    model = test_utils.accumulating(**kwargs)
    model.compile(
        optimizer,
        loss=test_utils.crossentropy(),
        metrics=["accuracy"],
        jit_compile=True,
    )
    return model


def optimized_hlo(function, *args):
    """Returns the program that XLA makes of `function`, which is not run."""
    compiled = tf.function(function, jit_compile=True)
    return compiled.experimental_get_compiler_ir(*args)(stage="optimized_hlo")


def parameters(hlo):
    """Returns the shapes of the entry computation's parameters, in order."""
    layout = re.search(r"entry_computation_layout=\{\((.*?)\)->", hlo).group(1)
    layout = re.sub(r"/\*.*?\*/", "", layout)
    return re.findall(r"\w+\[[\d,]*\]", layout)


def aliased(hlo):
    """Returns the indices of the parameters over which an output is written."""
    alias = re.search(r"input_output_alias=\{(.*?)\}, \w+=", hlo).group(1)
    return [int(index) for index in re.findall(r"\((\d+), \{\}", alias)]


def number_of_outputs(hlo):
    """Counts the outputs of the entry computation."""
    outputs = re.search(r"entry_computation_layout=\{.*->(.*?)\}\n", hlo)
    outputs = re.sub(r"/\*.*?\*/", "", outputs.group(1))
    return len(re.findall(r"\w+\[[\d,]*\]", outputs))


def shapes(variables):
    """Returns the shapes of variables, as `parameters` writes them."""
    names = {"float32": "f32", "int64": "s64"}
    return [
        f"{names[tf.as_dtype(v.dtype).name]}[{','.join(map(str, v.shape))}]"
        for v in variables
    ]


@functools.cache
def trained(optimizer="adam"):
    """Returns a model that has all its programs, and a batch."""
    model = compiled_model(optimizer)
    batches = test_utils.microbatches([8] * 8)
    test_utils.train_on(model, batches)
    x, y = batches[0]
    return model, (tf.constant(x), tf.constant(y))


@functools.cache
def program_of(name):
    """Returns what XLA makes of a step of that model."""
    model, batch = trained()
    if name == "update":
        return optimized_hlo(model.update_step)
    return optimized_hlo(
        lambda *batch: test_utils.train_microbatch(model, None, batch), *batch
    )


def kernels(model):
    """Returns the matrices among the weights; no two are of one shape."""
    return [v for v in model.trainable_variables if len(v.shape) == 2]


class InPlaceTest(test_utils.TestCase, parameterized.TestCase):
    def assertInPlace(self, hlo, variables):
        """Checks that each of `variables` is written where it was read."""
        written = [parameters(hlo)[index] for index in aliased(hlo)]
        for shape in set(shapes(variables)):
            self.assertGreaterEqual(
                written.count(shape), shapes(variables).count(shape), msg=shape
            )

    def test_buffers(self):
        model, _ = trained()
        hlo = program_of("microbatch")
        accumulator = test_utils.accumulator(model)
        self.assertInPlace(
            hlo, [*accumulator.buffers, accumulator.weight, accumulator.count]
        )
        # What is not in place is new: the logs, of a few bytes.
        self.assertLessEqual(number_of_outputs(hlo) - len(aliased(hlo)), 4)

    @parameterized.parameters("adam", "sgd", "adamw", "rmsprop")
    @test_utils.first_command(0, second=(2,))
    def test_weights_and_slots(self, optimizer):
        model, _ = trained(optimizer)
        hlo = optimized_hlo(model.update_step)
        slots = [
            v
            for v in model.optimizer.variables
            if v.path.split("/")[-1] != "learning_rate"
        ]
        self.assertInPlace(hlo, [*model.trainable_variables, *slots])
        self.assertEqual(number_of_outputs(hlo), len(aliased(hlo)))

    @pytest.mark.thorough
    def test_an_update_reads_the_buffers_and_leaves_them(self):
        model, _ = trained()
        hlo = program_of("update")
        read = parameters(hlo)
        written = [read[index] for index in aliased(hlo)]
        for kernel in shapes(kernels(model)):
            # A weight, two slots and a buffer each; all but the last written.
            self.assertEqual(read.count(kernel), 4)
            self.assertEqual(written.count(kernel), 3)

    @pytest.mark.thorough
    def test_a_micro_batch_does_not_touch_the_optimizer(self):
        model, _ = trained()
        hlo = program_of("microbatch")
        for kernel in shapes(kernels(model)):
            self.assertEqual(parameters(hlo).count(kernel), 2)

    def test_no_conditional_in_any_program(self):
        for name in ("microbatch", "update"):
            hlo = program_of(name)
            self.assertNotIn(" conditional(", hlo)
            self.assertNotIn(" while(", hlo)

    @pytest.mark.thorough
    def test_a_pass_over_a_buffer_selects_and_adds(self):
        # Where it starts, what it held is selected away as the gradient is
        # added.
        hlo = program_of("microbatch")
        kernel = shapes(kernels(trained()[0]))[0]
        entry = hlo[hlo.index("\nENTRY") :]
        passes = re.findall(
            rf"= {re.escape(kernel)}\{{1,0\}} (?!parameter|get-tuple)(\S+)\(",
            entry,
        )
        self.assertEqual(passes, ["dot", "fusion"])


class TracingTest(test_utils.TestCase, parameterized.TestCase):
    def graph_size(self, accum_steps):
        model = compiled_model(accum_steps=accum_steps)
        programs = training.Programs(model._accumulation)
        step = programs.make_step()
        x, y = test_utils.microbatches([8])[0]
        traced = tf.function(step, autograph=False)
        graph = traced.get_concrete_function(
            (tf.constant(x), tf.constant(y))
        ).graph
        definition = graph.as_graph_def()
        return sum(
            len(function.node_def) for function in definition.library.function
        ) + len(definition.node)

    def test_the_program_does_not_grow_with_k(self):
        self.assertEqual(self.graph_size(2), self.graph_size(64))

    def test_position_and_k_are_not_traced(self):
        counted, traces = test_utils.counting_traces()
        model = test_utils.mlp(counted, accum_steps=2)
        model.compile("adam", loss=test_utils.crossentropy(), jit_compile=True)
        batch = test_utils.microbatches([8])[0]
        model.train_on_batch(*batch)
        traced = len(traces)
        for steps in (3, 5, 2):
            model.accum_steps = steps
            test_utils.train_on(model, [batch] * 7)
            model.flush()
        self.assertLen(traces, traced)


class HostTest(test_utils.TestCase):
    def test_the_window_lives_on_the_host(self):
        found = test_utils.accumulating()._accumulation.position
        for variable in (found.variable, found.completed):
            self.assertIn("CPU:0", variable.device)


class EmbeddingTest(test_utils.TestCase):
    def test_rows_are_scattered_in_place(self):
        keras.utils.set_random_seed(0)
        tokens = keras.Input((3,), dtype="int32")
        hidden = keras.layers.Embedding(5000, 16)(tokens)
        hidden = keras.layers.Flatten()(hidden)
        model = keras_accum.GradientAccumulationModel(
            tokens, keras.layers.Dense(3)(hidden), accum_steps=2
        )
        model.compile("sgd", loss=test_utils.crossentropy(), jit_compile=True)
        x, y = np.zeros((4, 3), "int32"), np.zeros((4,), "int32")
        test_utils.train_on(model, [(x, y)] * 2)
        batch = (tf.constant(x), tf.constant(y))
        hlo = optimized_hlo(
            lambda *b: test_utils.train_microbatch(model, None, b), *batch
        )
        index = parameters(hlo).index("f32[5000,16]")
        tables = [
            i for i, p in enumerate(parameters(hlo)) if p == "f32[5000,16]"
        ]
        self.assertLen(tables, 2)
        self.assertLen([i for i in tables if i in aliased(hlo)], 1)
        # No sum of two whole tables.
        self.assertNotRegex(hlo, r"f32\[5000,16\]\S* add\(")
        self.assertGreaterEqual(index, 0)


if __name__ == "__main__":
    tf.test.main()
