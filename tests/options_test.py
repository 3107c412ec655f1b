"""The arguments of models that accumulate."""

import dataclasses
import inspect
import typing

import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from keras_accum import annotations
from keras_accum import options
from tests import test_utils


class SignatureTest(test_utils.TestCase):
    def test_lists_every_argument(self):
        for cls in (
            keras_accum.GradientAccumulationMixin,
            keras_accum.GradientAccumulationModel,
        ):
            parameters = inspect.signature(cls).parameters
            self.assertEqual(
                list(parameters), ["args", *options.Options.names(), "kwargs"]
            )
            self.assertEqual(parameters["accum_steps"].default, 1)

    def test_checkers_are_told_what_options_are(self):
        fields = {
            field.name: (field.type, field.default)
            for field in dataclasses.fields(options.Options)
        }
        parameters = inspect.signature(
            keras_accum.GradientAccumulationModel
        ).parameters
        told = {
            name: (parameter.annotation, parameter.default)
            for name, parameter in parameters.items()
            if parameter.kind == inspect.Parameter.KEYWORD_ONLY
        }
        self.assertEqual(told, fields)
        types = {name: annotation for name, (annotation, _) in fields.items()}
        self.assertEqual(typing.get_type_hints(annotations.Arguments), types)


class ErrorTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters(0, -1, np.int64(0))
    def test_not_positive(self, value):
        with self.assertRaisesRegex(
            ValueError, f"`accum_steps` must be a positive .*{value}"
        ):
            options.Options(accum_steps=value)

    @parameterized.parameters(2.5, 2.0, True, "8", None, ([8],))
    def test_not_an_int(self, value):
        with self.assertRaisesRegex(
            TypeError, "`accum_steps` must be a positive .*of type"
        ):
            options.Options(accum_steps=value)

    def test_numpy_ints_are_ints(self):
        self.assertTrue(options.Options(accum_steps=np.int32(2)).accumulates)

    def test_policy(self):
        with self.assertRaisesRegex(
            ValueError, "`partial_window` must be one of \"flush\".*'keep'"
        ):
            options.Options(partial_window="keep")


if __name__ == "__main__":
    tf.test.main()
