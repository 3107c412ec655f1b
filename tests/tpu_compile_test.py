"""The programs, compiled for a TPU by its own compiler, which needs no TPU."""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

import keras
import pytest
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from keras_accum import each_microbatch
from keras_accum import replicas
from keras_accum import steps as library_steps
from tests import test_utils

TOOL = pathlib.Path(__file__).absolute().parent.parent / "tools/hlo_report.py"
TARGET = "tpu:v5e:2x2"
# Micro-batches per window.
STEPS = 4
# What a scalar takes there, as each array is made of tiles.
SCALAR = 512
# The learning rate, the weight of a micro-batch and what that is computed from,
# and the moments of 32 channels, which take no more. All else is large arrays.
FEW_SCALARS = 8 * SCALAR


def convolutional(cls, **kwargs):
    """Returns an image classifier, and the optimizer that trains it."""
    inputs = keras.Input((64, 64, 3))
    hidden = keras.layers.Conv2D(32, 3, use_bias=False)(inputs)
    hidden = keras.layers.BatchNormalization()(hidden)
    hidden = keras.layers.ReLU()(hidden)
    hidden = keras.layers.MaxPooling2D()(hidden)
    hidden = keras.layers.Flatten()(hidden)
    outputs = keras.layers.Dense(10)(hidden)
    return cls(inputs, outputs, **kwargs), keras.optimizers.SGD(
        0.1, momentum=0.9
    )


def decoder(cls, **kwargs):
    """Returns a decoder-only transformer, and the optimizer that trains it."""
    tokens = keras.Input((32,), dtype="int32")
    hidden = keras.layers.Embedding(512, 64)(tokens)
    for _ in range(2):
        normal = keras.layers.LayerNormalization()(hidden)
        hidden += keras.layers.MultiHeadAttention(2, 32)(
            normal, normal, use_causal_mask=True
        )
        normal = keras.layers.LayerNormalization()(hidden)
        wide = keras.layers.Dense(256, activation="gelu")(normal)
        hidden += keras.layers.Dense(64)(wide)
    normal = keras.layers.LayerNormalization()(hidden)
    logits = keras.layers.Dense(512)(normal)
    return cls(tokens, logits, **kwargs), keras.optimizers.AdamW(1e-3)


def images(rows):
    """Returns the shapes and dtypes of a batch for `convolutional`."""
    return tf.TensorSpec((rows, 64, 64, 3)), tf.TensorSpec((rows,), tf.int32)


def texts(rows):
    """Returns the shapes and dtypes of a batch for `decoder`."""
    return (tf.TensorSpec((rows, 32), tf.int32),) * 2


# Name: model, its batches, rows of a micro-batch. The activations of 256 images
# are more than the 128 MiB that the chip has; texts' activations stay on it.
MODELS = {
    "convolutional": (convolutional, images, 256),
    "decoder": (decoder, texts, 16),
}
# Variables that the optimizer has for each weight.
SLOTS = {"convolutional": 1, "decoder": 2}
WINDOW = ("microbatch", "update")
# Micro-batches of a batch that is split within the program, by model.
SPLIT = {"decoder": (4, 32)}


def trained(build, batch, cls, **kwargs):
    """Returns a model that has all its variables, after two small batches."""
    model, optimizer = build(cls, **kwargs)
    # Where these steps run does not matter, and compiling them takes longer.
    model.compile(optimizer, loss=test_utils.crossentropy(), jit_compile=False)
    row = [tf.zeros(spec.shape, spec.dtype) for spec in batch(1)]
    test_utils.train_on(model, [row] * 2)
    return model


def steps(build, batch, rows):
    """Returns the steps to compile, by name: a function and its batch.

    This is the one place that knows how the library names its programs.
    """
    model = trained(
        build, batch, keras_accum.GradientAccumulationModel, accum_steps=2
    )
    plain = trained(build, batch, keras.Model)
    return {
        "microbatch": (
            lambda *data: test_utils.train_microbatch(model, None, data),
            batch(rows),
        ),
        "update": (model.update_step, ()),
        "plain": (lambda *data: plain.train_step(data), batch(rows)),
        "large": (lambda *data: plain.train_step(data), batch(STEPS * rows)),
        **{
            f"split_{num_microbatches}": (
                whole_window(model, rows),
                batch(num_microbatches * rows),
            )
            for num_microbatches in SPLIT.get(build.__name__, ())
        },
    }


def whole_window(model, rows):
    """Returns a window of one batch, with its loop, as it is on TPUs."""
    with mock.patch.object(replicas, "on_tpu", return_value=True):
        each = each_microbatch.EachMicrobatch(
            model._accumulation,
            functools.partial(
                library_steps.train_microbatch, model._accumulation
            ),
            trains=True,
        )
    return lambda *data: each((data,), rows)


def lower(function, batch):
    """Returns a step as serialized HLO, which any XLA compiler takes."""
    compiled = tf.function(function, jit_compile=True)
    return compiled.experimental_get_compiler_ir(*batch)(stage="hlo_serialized")


def python_with_jax():
    """Returns the Python to compile with, or None if none is known."""
    # Where one is named, nothing is skipped: it works, or tests fail.
    if named := os.environ.get("KERAS_ACCUM_JAX_PYTHON"):
        return named
    here = all(map(importlib.util.find_spec, ("jax", "libtpu")))
    return sys.executable if here else None


def run_tool(*args, python=sys.executable, flags=(), **variables):
    """Runs the tool; returns its exit status, output and errors."""
    result = subprocess.run(
        [python, *flags, TOOL, *args],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
    )
    return result.returncode, result.stdout, result.stderr


def compile_all():
    """Returns what the tool says of each step: (model, step) to its line."""
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, recipe in MODELS.items():
            for step, (function, batch) in steps(*recipe).items():
                file = pathlib.Path(folder, f"{name}_{step}.hlo")
                file.write_bytes(lower(function, batch))
                files[name, step] = file
        status, output, errors = run_tool(
            "--target", TARGET, *files.values(), python=python_with_jax()
        )
    if status:
        raise RuntimeError(f"{TOOL} failed:\n{errors}")
    rows = [json.loads(line) for line in output.splitlines()]
    return dict(zip(files, rows, strict=True))


def new_bytes(report):
    """Returns the bytes of outputs that are not written over an argument."""
    return report["output_bytes"] - report["alias_bytes"]


def scratch_bytes(report):
    """Returns the bytes in use beyond arguments and outputs, in all memories.

    `temp_bytes` counts main memory only, and a small program has its
    activations on the chip.
    """
    return report["peak_bytes"] - report["argument_bytes"] - new_bytes(report)


class JaxTestCase(test_utils.TestCase):
    def setUp(self):
        super().setUp()
        if python_with_jax() is None:
            self.skipTest(
                "needs JAX and libtpu: `pip install jax libtpu` in an "
                "environment of their own, and KERAS_ACCUM_JAX_PYTHON set to "
                "the path of its Python"
            )


class LowerTest(test_utils.TestCase):
    """What needs no JAX, so that it is tried wherever tests run."""

    @pytest.mark.thorough
    def test_lowers_a_window_with_its_loop(self):
        model = trained(
            decoder, texts, keras_accum.GradientAccumulationModel, accum_steps=2
        )
        rows = 2
        program = lower(whole_window(model, rows), texts(2 * rows))
        self.assertIn(b"while", program)


class TpuTest(JaxTestCase, parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        if python_with_jax():
            cls.reports = compile_all()

    @parameterized.parameters(*MODELS)
    def test_all_programs_compile(self, name):
        for step in (*WINDOW, "plain", "large"):
            self.assertEqual(
                self.reports[name, step]["program"], f"{name}_{step}.hlo"
            )
            self.assertGreater(self.reports[name, step]["flops"], 0)

    def size_of_weights(self, name):
        """Returns the bytes of the weights, in the tiles of the TPU."""
        # What a plain step writes are the weights and the slots.
        return self.reports[name, "plain"]["alias_bytes"] / (1 + SLOTS[name])

    @parameterized.product(name=tuple(MODELS), step=WINDOW)
    def test_in_place(self, name, step):
        report = self.reports[name, step]
        # What is new is the tuple of the outputs and, of a micro-batch, the one
        # log, the loss. A single scalar more would show.
        new = 1 if step == "update" else 2
        self.assertLessEqual(new_bytes(report), new * SCALAR)
        # Weights and slots, or the buffers, which are of the weights' shapes.
        arrays = 1 + SLOTS[name] if step == "update" else 1
        self.assertAllClose(
            report["alias_bytes"],
            arrays * self.size_of_weights(name),
            rtol=0,
            atol=FEW_SCALARS,
        )

    @parameterized.product(name=tuple(MODELS), step=WINDOW)
    def test_scratch_is_that_of_a_plain_step(self, name, step):
        self.assertLessEqual(
            scratch_bytes(self.reports[name, step]),
            scratch_bytes(self.reports[name, "plain"]) + FEW_SCALARS,
        )

    @parameterized.parameters(*WINDOW)
    def test_main_memory_is_that_of_a_plain_step(self, step):
        plain = self.reports["convolutional", "plain"]["temp_bytes"]
        # Each of the two activations before the pooling, of 62 x 62 x 32.
        self.assertGreater(plain, 256 * 62 * 62 * 32 * 4)
        self.assertLessEqual(
            self.reports["convolutional", step]["temp_bytes"], plain
        )

    @parameterized.parameters(*MODELS)
    def test_scratch_is_far_below_that_of_the_large_batch(self, name):
        window = max(scratch_bytes(self.reports[name, step]) for step in WINDOW)
        large = scratch_bytes(self.reports[name, "large"])
        # Activations are k times larger, and nearly all of it.
        self.assertLess(window, large / STEPS * 1.5)

    @parameterized.parameters(*SPLIT["decoder"])
    def test_scratch_does_not_grow_with_a_batch_that_is_split(
        self, num_microbatches
    ):
        report = self.reports["decoder", f"split_{num_microbatches}"]
        plain = self.reports["decoder", "plain"]
        self.assertLessEqual(scratch_bytes(report), 1.1 * scratch_bytes(plain))
        # The buffers, in place.
        self.assertLessEqual(new_bytes(report), 2 * SCALAR)

    @parameterized.parameters(*MODELS)
    def test_micro_batches_do_not_read_the_optimizer(self, name):
        report = self.reports[name, "microbatch"]
        plain = self.reports[name, "plain"]
        # A plain step writes all that it reads but this.
        batch_and_rate = plain["argument_bytes"] - plain["alias_bytes"]
        # The weights and the buffers. A slot would come on top.
        self.assertLessEqual(
            report["argument_bytes"],
            batch_and_rate + 2 * self.size_of_weights(name) + FEW_SCALARS,
        )


class ToolTestCase(test_utils.TestCase):
    def assertFails(self, message, *args, **kwargs):
        status, output, errors = run_tool(*args, **kwargs)
        self.assertNotEqual(status, 0)
        self.assertEmpty(output)
        self.assertRegex(errors, message)
        self.assertNotIn("Traceback", errors)

    def file(self, content=b""):
        path = pathlib.Path(self.get_temp_dir(), "program.hlo")
        path.write_bytes(content)
        return path


class ToolTest(ToolTestCase):
    def test_no_file(self):
        self.assertFails("the following arguments are required: programs")

    def test_missing_file(self):
        self.assertFails(
            r"`programs` must be files. Missing: \['none.hlo'\]",
            self.file(),
            "none.hlo",
        )

    def test_target_is_not_one(self):
        for target in ("v5e", "tpu:v5e", "gpu:h100:1"):
            self.assertFails(
                f"`--target` must be `local` or .* Received: --target={target}",
                "--target",
                target,
                self.file(),
            )

    def test_no_jax(self):
        # -S: without the packages that are installed.
        self.assertFails(
            r"Missing: \['jax', 'libtpu'\].*`pip install jax libtpu`",
            self.file(),
            flags=["-S"],
            PYTHONPATH="",
        )

    def test_no_libtpu(self):
        pathlib.Path(self.get_temp_dir(), "jax.py").touch()
        self.assertFails(
            r"Missing: \['libtpu'\]",
            self.file(),
            flags=["-S"],
            PYTHONPATH=self.get_temp_dir(),
        )


class ToolWithJaxTest(ToolTestCase, JaxTestCase):
    def test_unknown_tpu(self):
        self.assertFails(
            "`--target` must name a TPU .* Received: --target=tpu:v99:2x2",
            "--target",
            "tpu:v99:2x2",
            self.file(),
            python=python_with_jax(),
        )

    def test_not_hlo(self):
        self.assertFails(
            "`programs` must be serialized HLO.* Received: ",
            self.file(b"text"),
            python=python_with_jax(),
        )

    def test_local_programs_are_timed(self):
        double = tf.function(lambda x: 2.0 * x, jit_compile=True)
        program = double.experimental_get_compiler_ir(tf.zeros(1000))
        status, output, errors = run_tool(
            "--target",
            "local",
            "--runs",
            "3",
            self.file(program(stage="hlo_serialized")),
            python=python_with_jax(),
        )
        self.assertEqual(status, 0, errors)
        report = json.loads(output)
        self.assertEqual(report["argument_bytes"], 4 * 1000)
        self.assertEqual(report["output_bytes"], 4 * 1000)
        self.assertEqual(report["alias_bytes"], 0)
        self.assertGreater(report["min_ms"], 0.0)
        self.assertGreaterEqual(report["median_ms"], report["min_ms"])


if __name__ == "__main__":
    tf.test.main()
