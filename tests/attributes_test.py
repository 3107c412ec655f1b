"""Options of a model, as attributes that may be set at any time."""

import importlib.util
import inspect
import pathlib
import pydoc
import unittest

import tensorflow as tf

import keras_accum
from tests import test_utils

ROOT = pathlib.Path(__file__).absolute().parent.parent
SETTABLE = (
    "accum_steps",
    "effective_batch_size",
    "microbatch_size",
    "partial_window",
    "nonfinite",
    "communication_dtype",
)


class OptionTest(test_utils.TestCase):
    def test_is_read_and_set(self):
        model = test_utils.accumulating(accum_steps=2)
        self.assertEqual(model.partial_window, "flush")
        model.partial_window = "carry"
        self.assertEqual(model.partial_window, "carry")
        with self.assertRaisesRegex(ValueError, "`partial_window` must be"):
            model.partial_window = "no"
        self.assertEqual(model.partial_window, "carry")

    def test_one_size_replaces_the_other(self):
        model = test_utils.accumulating(accum_steps=2)
        model.effective_batch_size = 32
        self.assertEqual(model.effective_batch_size, 32)
        model.accum_steps = 3
        self.assertEqual(
            (model.accum_steps, model.effective_batch_size), (3, None)
        )

    def test_help_has_its_docstring(self):
        text = pydoc.plain(
            pydoc.render_doc(keras_accum.GradientAccumulationModel)
        )
        for name in SETTABLE:
            option = getattr(keras_accum.GradientAccumulationModel, name)
            self.assertTrue(inspect.isdatadescriptor(option))
            self.assertIn(f"{name}\n", text)
            self.assertIn(inspect.getdoc(option).splitlines()[0], text)

    def test_cannot_be_deleted(self):
        with self.assertRaises(AttributeError):
            del test_utils.accumulating().partial_window


@unittest.skipUnless(importlib.util.find_spec("griffe"), "It needs `.[docs]`.")
class SiteTest(test_utils.TestCase):
    def test_api_page_shows_properties(self):
        import griffe

        extensions = griffe.load_extensions(ROOT / "tools/site_options.py")
        package = griffe.load(
            "keras_accum", search_paths=[ROOT], extensions=extensions
        )
        mixin = package["mixin.GradientAccumulationMixin"]
        for name in SETTABLE:
            self.assertContainsSubset(
                {"property", "writable"}, mixin[name].labels
            )
            self.assertIsNotNone(mixin[name].docstring)


if __name__ == "__main__":
    tf.test.main()
