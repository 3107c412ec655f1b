"""Denominators, found by making them visible in the loss itself."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from keras_accum import weighting
from tests import test_utils


class Ones(keras.losses.Loss):
    """A loss of 1 per entry."""

    def call(self, y_true, y_pred):
        return keras.ops.mean(keras.ops.ones_like(y_pred), axis=-1)


class Scalar(keras.losses.Loss):
    """A loss that is reduced already."""

    def call(self, y_true, y_pred):
        return keras.ops.mean(keras.ops.cast(y_pred, "float32"))


def masked(tensor, mask):
    tensor = tf.convert_to_tensor(tensor)
    tensor._keras_mask = tf.constant(mask)
    return tensor


Y = np.zeros((2, 3, 4), "float32")
MASK = np.array([[1, 1, 0], [1, 0, 0]], bool)
WEIGHT = np.array([[0.5, 2.0, 9.0], [1.0, 9.0, 9.0]], "float32")


class DenominatorTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        # Reduction, masked, weighted, what the sum is divided by.
        ("sum_over_batch_size", False, False, 6.0),
        ("sum_over_batch_size", True, False, 3.0),
        ("sum_over_batch_size", False, True, 6.0),
        ("sum_over_batch_size", True, True, 3.0),
        ("mean", True, True, 3.0),
        ("mean_with_sample_weight", False, False, 6.0),
        ("mean_with_sample_weight", True, False, 3.0),
        ("mean_with_sample_weight", False, True, 30.5),
        ("mean_with_sample_weight", True, True, 3.5),
    )
    def test_value(self, reduction, is_masked, is_weighted, expected):
        loss = Ones(reduction=reduction)
        y_pred = masked(Y, MASK) if is_masked else tf.constant(Y)
        weight = WEIGHT if is_weighted else None
        found = weighting.loss_denominator(loss, Y, y_pred, weight, 2)
        self.assertAllClose(found.value, expected)
        # The same from Keras: the sum of the entries over the loss.
        mask = MASK if is_masked else np.ones_like(MASK)
        entries = mask * (WEIGHT if is_weighted else 1.0)
        self.assertAllClose(
            float(loss(Y, y_pred, weight)) * expected, entries.sum(), rtol=1e-6
        )

    @parameterized.parameters("sum", "none", None)
    def test_sums_have_none(self, reduction):
        loss = Ones(reduction=reduction)
        self.assertIsNone(weighting.loss_denominator(loss, Y, Y, None, 2))

    def test_scalars_and_strangers_count_by_rows(self):
        class Stranger(keras.losses.Loss):
            def __call__(self, y_true, y_pred, sample_weight=None):
                return keras.ops.mean(y_pred)

        for loss in (Scalar(), Stranger(), lambda y_true, y_pred: 0.0):
            for y_pred in (tf.constant(Y), masked(Y, MASK)):
                found = weighting.loss_denominator(loss, Y, y_pred, None, 2)
                self.assertAllClose(found.value, 2.0)
                self.assertEqual(found.source, weighting.ROWS)

    def test_a_python_number_is_a_scalar(self):
        class Zero(keras.Loss):
            def call(self, y_true, y_pred):
                return 0

        found = weighting.loss_denominator(Zero(), Y, tf.constant(Y), None, 2)
        self.assertAllEqual(found.value, 2.0)

    def test_scalars_that_nothing_fits_are_a_guess(self):
        for loss, weight in (
            (Scalar(), np.ones(2)),
            (Scalar(reduction="sum"), None),
            (Scalar(reduction=None), None),
        ):
            found = weighting.loss_denominator(loss, Y, Y, weight, 2)
            self.assertAllClose(found.value, 2.0)
            self.assertFalse(weighting.is_exact([found], ()))

    def test_all_masked_is_zero(self):
        found = weighting.loss_denominator(
            Ones(), Y, masked(Y, 0 * MASK), None, 2
        )
        self.assertAllEqual(found.value, 0.0)


class ExactnessTest(test_utils.TestCase):
    def denominators(self, *outputs, loss=None):
        return [
            weighting.loss_denominator(loss or Ones(), Y, y_pred, None, 2)
            for y_pred in outputs
        ]

    def test_means_over_rows_are_proportional(self):
        both = self.denominators(tf.constant(Y), tf.constant(Y[:, 0]))
        self.assertTrue(weighting.is_exact(both, [None]))
        self.assertAllEqual(weighting.total_weight(both), 6.0 + 2.0)

    def test_one_mask_for_both(self):
        mask = tf.constant(MASK)
        one, two = tf.constant(Y), tf.constant(Y)
        one._keras_mask = two._keras_mask = mask
        both = self.denominators(one, two)
        self.assertTrue(weighting.is_exact(both, ()))
        self.assertFalse(weighting.is_exact(both, [None]))

    def test_two_masks(self):
        both = self.denominators(masked(Y, MASK), masked(Y, MASK))
        self.assertFalse(weighting.is_exact(both, ()))

    def test_sum_and_mean(self):
        mean, total = Ones(), Ones(reduction="sum")
        both = [
            weighting.loss_denominator(loss, Y, tf.constant(Y), None, 2)
            for loss in (mean, total)
        ]
        self.assertFalse(weighting.is_exact(both, ()))
        self.assertTrue(weighting.is_exact(both[1:], ()))
        self.assertFalse(weighting.is_exact(both[1:], [None]))


class IsSumTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        (None, False),
        ("mse", False),
        ({"a": "mse"}, False),
    )
    def test_names(self, losses, expected):
        self.assertEqual(weighting.is_sum(losses), expected)

    def test_objects(self):
        total, mean = Ones(reduction="sum"), Ones()
        self.assertTrue(weighting.is_sum(total))
        self.assertTrue(weighting.is_sum([total, None, total]))
        self.assertFalse(weighting.is_sum([total, mean]))
        self.assertFalse(weighting.is_sum([total, "mse"]))


if __name__ == "__main__":
    tf.test.main()
