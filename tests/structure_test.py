"""The package keeps the shape that `tools/structure.py` measures."""

import ast
import traceback
from unittest import mock

import tensorflow as tf

from keras_accum import gradients
from tests import test_utils
from tools import structure


def stack_of_microbatch(**mode):
    """The functions of the package on the stack in the sum of gradients."""
    stacks, add = [], gradients.add

    def looking(*args):
        stacks.append(traceback.extract_stack()[:-1])
        add(*args)

    model = test_utils.accumulating(accum_steps=2)
    model.compile("sgd", loss=test_utils.crossentropy(), **mode)
    batches = test_utils.microbatches([4] * 2)
    with mock.patch.object(gradients, "add", looking):
        model.fit(test_utils.dataset(batches), verbose=0)
    folder = str(structure.PACKAGE)
    names = [f.name for f in stacks[-1] if f.filename.startswith(folder)]
    # `fit` itself is Keras's.
    return names[names.index("fit") + 1 :]


class StructureTest(tf.test.TestCase):
    def test_path_is_the_stack(self):
        names = [name.split(".")[-1] for _, name in structure.PATH]
        path = names[: names.index("_add_gradients") + 1]
        self.assertEqual(stack_of_microbatch(), path)
        by_device = stack_of_microbatch(steps_per_execution=2)
        self.assertEqual(
            [name for name in by_device if name != "_begin_and"], path
        )

    def test_figures_are_within_their_bounds(self):
        for name, (value, bound) in structure.measures().items():
            with self.subTest(name):
                self.assertLessEqual(value, bound)

    def test_sees_an_access_of_another_class(self):
        trees = {
            "mixin": ast.parse(
                "class GradientAccumulationMixin(Other):\n"
                "    def mine(self): return self.theirs()\n"
            ),
            "other": ast.parse(
                "class Other:\n    def theirs(self): return self.theirs()\n"
            ),
        }
        classes = structure.model_classes(trees)
        self.assertEqual(structure.accesses_across(classes), 1)

    def test_sees_private_names(self):
        for source, expected in (
            ("from keras.src import ops", True),
            ("import tensorflow.python.ops", True),
            ("import tensorflow as tf", False),
        ):
            tree = ast.parse(source)
            self.assertEqual(structure.imports_private_names(tree), expected)


if __name__ == "__main__":
    tf.test.main()
