"""The programs that plan: for a saved model, and within a limit."""

import os
import re
import sys
import tempfile

import keras
import pytest
from absl.testing import absltest
from absl.testing import parameterized

from tests import test_utils


class SavedModelTest(parameterized.TestCase):
    @parameterized.parameters(
        ("sparse_categorical_crossentropy", "--memory_limit_mib=512"),
        ("mse", "--length=16"),
    )
    @test_utils.first_command(second=(0,))
    def test_plans_a_model_of_a_file(self, loss, flag):
        inputs = keras.Input((None,), dtype="int32")
        hidden = keras.layers.Embedding(5, 4)(inputs)
        model = keras.Model(
            inputs, keras.layers.Dense(3, "softmax", name="out")(hidden)
        )
        model.compile("sgd", loss, jit_compile=False)
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "model.keras")
            model.save(file)
            finished = test_utils.run_program(
                "-m",
                "examples.plan_memory",
                f"--model={file}",
                "--rows=8",
                flag,
            )
        self.assertEqual(finished.returncode, 0, finished.stderr)
        lines = finished.stdout.splitlines()
        self.assertRegex(lines[0], "MiB on each device, of [0-9,]+:")
        self.assertEqual(
            [line.split()[0] for line in lines[2:6]], ["8", "4", "2", "1"]
        )
        self.assertIn("microbatch_size=", finished.stdout)

    @pytest.mark.thorough
    def test_says_that_there_is_no_file(self):
        finished = test_utils.run_program(
            "-m", "examples.plan_memory", "--model=nowhere.keras"
        )
        self.assertNotEqual(finished.returncode, 0)
        self.assertIn("--model must name a file", finished.stderr)


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="It needs Linux.")
class WithinLimitTest(absltest.TestCase):
    def test_trains_what_did_not_fit(self):
        finished = test_utils.run_program(
            "-m",
            "examples.within_limit",
            "--batch_size=512",
            "--limit_mib=160",
        )
        said = finished.stdout + finished.stderr
        self.assertEqual(finished.returncode, 0, said)
        self.assertIn("keras: died.", finished.stdout)
        (distance,) = re.findall(
            r"Weights differ by at most (\S+)\.$", finished.stdout.strip()
        )
        self.assertLess(float(distance), 1e-5)

    def test_recomputes_the_layers_that_the_plan_names(self):
        # Without these, it dies.
        names = ["dense", *(f"dense_{n}" for n in range(1, 25))]
        finished = test_utils.run_program(
            "-m",
            "examples.within_limit",
            "--part=micro-batches",
            "--batch_size=512",
            "--limit_mib=270",
            "--microbatch_size=256",
            f"--recomputed={','.join(names)}",
            before=["env", "MALLOC_ARENA_MAX=1"],
        )
        self.assertEqual(finished.returncode, 0, finished.stderr)


if __name__ == "__main__":
    absltest.main()
