"""The README's example runs, and trains as it says."""

import pathlib
import re

import tensorflow as tf

from tests import test_utils

README = pathlib.Path(__file__).parent.parent / "README.md"


class ReadmeTest(test_utils.TestCase):
    def test_example(self):
        (example,) = re.findall(
            r"```python\n(.*?)```", README.read_text(), re.DOTALL
        )
        names = {}
        exec(compile(example, str(README), "exec"), names)  # noqa: S102
        # 1024 rows make 8 updates of 8 x 16 rows, in each of two epochs.
        self.assertEqual(int(names["model"].optimizer.iterations), 16)


if __name__ == "__main__":
    tf.test.main()
