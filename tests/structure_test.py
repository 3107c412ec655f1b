"""The package keeps the shape that `tools/structure.py` measures."""

import ast

import tensorflow as tf

from tools import structure


class StructureTest(tf.test.TestCase):
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
