"""Programs of others, with the class swapped: as in plain Keras, or said."""

import keras
import pytest
import tensorflow as tf
from absl.testing import parameterized

from conformance import program_report
from conformance import program_suite as suite
from conformance import program_worker
from tests import test_utils

# The report trains all of them, as does `tools/nightly.sh`. These have CTC,
# LoRA, masks, state and several inputs.
NAMES = suite.names() if test_utils.IS_NIGHTLY else suite.names()[6::12]
TEXT = '''\
"""A model.

After https://example.org/model/
"""

import keras

# accum+: import keras_accum

REFUSED = ("microbatch_size",)


class Model(keras.Model):
    # accum: class Model(keras_accum.GradientAccumulationModel):
    pass


def main(batch_size, epochs):
    model = Model()
    # accum: model = Model(**ways)
    print(model)
    # accum:
    return model
'''


class ProgramTest(test_utils.TestCase, parameterized.TestCase):
    def test_reads_what_a_swap_changes(self):
        program = suite.Program("model", TEXT)
        self.assertEqual(program.title, "A model")
        self.assertEqual(program.source, "https://example.org/model/")
        self.assertEqual(program.refused, ("microbatch_size",))
        self.assertNotIn("accum", program.plain())
        self.assertIn("print(model)", program.plain())
        self.assertEqual(
            program.changes("accum_steps"),
            [
                "+import keras_accum",
                "-class Model(keras.Model):",
                "+class Model(keras_accum.GradientAccumulationModel):",
                "-    model = Model()",
                "-    print(model)",
                "+    model = Model(accum_steps=4)",
            ],
        )

    def test_every_program_says_where_it_comes_from(self):
        self.assertGreaterEqual(len(suite.names()), 40)
        for name in suite.names():
            program = suite.program(name)
            with self.subTest(name):
                self.assertStartsWith(program.source, "https://")
                self.assertNotEmpty(program.title)
                self.assertNotEmpty(program.changes("accum_steps"))
                for text in (program.plain(), program.swapped("accum_steps")):
                    compile(text, name, "exec")

    @parameterized.named_parameters((name, name) for name in NAMES)
    @test_utils.first_command("_gemma_lora", "_wide_and_deep")
    @pytest.mark.thorough
    def test_is_as_in_plain_keras_or_says_why(self, name):
        program = suite.program(name)
        _, before = program_worker.run(program, "plain", suite.EPOCHS - 1)
        plain, expected = program_worker.run(program, "plain")
        for way in suite.WAYS:
            with self.subTest(way):
                keras.backend.clear_session()
                result, weights = program_worker.run(program, way)
                self.assertEqual("refused" in result, way in program.refused)
                if "refused" in result:
                    continue
                result["weights"] = suite.distance(weights, expected, before)
                self.assertFalse(
                    program_report.is_silent(result), result["weights"]
                )
                # A step of its own may return values of its last rows.
                if (
                    result["weights"] < suite.BOUND
                    and "def train_step" not in program.text
                ):
                    off = suite.distance_of_logs(result["logs"], plain["logs"])
                    self.assertLess(off, suite.BOUND)


if __name__ == "__main__":
    tf.test.main()
