"""The README's examples run, and train as they say."""

import pathlib
import re
from unittest import mock

import tensorflow as tf

from tests import test_utils

README = pathlib.Path(__file__).parent.parent / "README.md"


class ReadmeTest(test_utils.TestCase):
    def test_examples(self):
        one, whole, several = re.findall(
            r"```python\n(.*?)```",
            README.read_text(encoding="utf-8"),
            re.DOTALL,
        )
        names = {}
        self.run_code(one, names)
        # 1024 rows make 8 updates of 8 x 16 rows, in each of two epochs.
        self.assertEqual(names["model"].optimizer.iterations.numpy(), 16)
        self.run_code(whole, names)
        # 1024 rows make 4 updates of 256.
        self.assertEqual(names["model"].optimizer.iterations.numpy(), 4)
        # By itself it takes all devices. Collectives of a second strategy would
        # be mistaken for those of the first one of a process.
        strategy, missing = test_utils.chosen_strategy()
        if missing:
            self.skipTest(missing)
        with mock.patch.object(
            tf.distribute, "MirroredStrategy", lambda: strategy
        ):
            self.run_code(several, names)
        # 16 micro-batches of 64 rows make 2 updates.
        self.assertEqual(names["model"].optimizer.iterations.numpy(), 2)

    def run_code(self, code, names):
        exec(compile(code, str(README), "exec"), names)  # noqa: S102


if __name__ == "__main__":
    tf.test.main()
