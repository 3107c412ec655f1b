"""The README's examples run, and train as they say."""

import functools
import pathlib
import re
from unittest import mock

import tensorflow as tf

from tests import test_utils

README = pathlib.Path(__file__).parent.parent / "README.md"


class ReadmeTest(test_utils.TestCase):
    def test_examples(self):
        one, several = re.findall(
            r"```python\n(.*?)```", README.read_text(), re.DOTALL
        )
        names = {}
        self.run_code(one, names)
        # 1024 rows make 8 updates of 8 x 16 rows, in each of two epochs.
        self.assertEqual(names["model"].optimizer.iterations.numpy(), 16)
        # By itself it takes all GPUs, or all CPUs.
        mirrored = functools.partial(
            tf.distribute.MirroredStrategy, ["CPU:0", "CPU:1"]
        )
        with mock.patch.object(tf.distribute, "MirroredStrategy", mirrored):
            self.run_code(several, names)
        self.assertEqual(names["strategy"].num_replicas_in_sync, 2)
        # 16 micro-batches of 64 rows make 2 updates.
        self.assertEqual(names["model"].optimizer.iterations.numpy(), 2)

    def run_code(self, code, names):
        exec(compile(code, str(README), "exec"), names)  # noqa: S102


if __name__ == "__main__":
    tf.test.main()
