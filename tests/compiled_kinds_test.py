"""What losses given to `compile` are measured to be."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from keras_accum import compat
from keras_accum import compiled_kinds
from keras_accum import sample as samples
from keras_accum.coupling import Kind
from tests import test_utils

ROWS = 11


def probabilities(*shape):
    values = np.random.default_rng(1).uniform(0.05, 0.95, (ROWS, *shape))
    return values.astype("float32")


def masked_mean(y, y_pred):
    """As in TensorFlow's tutorial of transformers."""
    values = keras.ops.square(y_pred - y)
    mask = keras.ops.cast(y > 0.5, "float32")
    return keras.ops.sum(values * mask) / keras.ops.sum(mask)


def contrastive(y, y_pred):
    """Each row's pair is the same row; all others are not."""
    scores = tf.matmul(y_pred, y, transpose_b=True)
    labels = tf.range(tf.shape(scores)[0])
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, scores)


def scalar_mean(y, y_pred):
    return keras.ops.mean(keras.ops.square(y_pred - y))


def scalar_sum(y, y_pred):
    return keras.ops.sum(keras.ops.square(y_pred - y))


def compiled(loss):
    """What Keras makes of a loss, or of a function."""
    model = keras.Sequential([keras.layers.Identity()])
    model.compile(loss=loss)
    return compat.compiled_loss(model)


class OfFourRows(keras.Loss):
    def call(self, y, y_pred):
        # As a loss that was written for batches of one size.
        return tf.linalg.diag_part(tf.reshape(y_pred - y, [4, 4]))


class KindTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.named_parameters(
        ("dice", keras.losses.Dice(), Kind.COUPLED),
        ("dice_of_rows", keras.losses.Dice(axis=(1,)), Kind.MEAN),
        ("tversky", keras.losses.Tversky(), Kind.COUPLED),
        ("circle", keras.losses.Circle(), Kind.COUPLED),
        ("masked_mean", masked_mean, Kind.COUPLED),
        ("contrastive", contrastive, Kind.COUPLED),
        ("scalar_mean", scalar_mean, Kind.MEAN),
        ("scalar_sum", scalar_sum, Kind.SUM),
    )
    def test_of_one_output(self, loss, expected):
        y = (probabilities(5) > 0.5).astype("float32")
        if isinstance(loss, keras.losses.Circle):
            y = np.arange(ROWS) % 3
        self.check(loss, y, probabilities(5)[::-1], expected)

    @parameterized.named_parameters(
        (name.lower(), name)
        for name in (
            "BinaryCrossentropy",
            "BinaryFocalCrossentropy",
            "CategoricalCrossentropy",
            "CategoricalFocalCrossentropy",
            "CategoricalHinge",
            "CosineSimilarity",
            "Hinge",
            "Huber",
            "KLDivergence",
            "LogCosh",
            "MeanAbsoluteError",
            "MeanAbsolutePercentageError",
            "MeanSquaredError",
            "MeanSquaredLogarithmicError",
            "Poisson",
            "SquaredHinge",
        )
    )
    def test_of_keras_is_no_false_alarm(self, name):
        cls = getattr(keras.losses, name)
        y = np.eye(5, dtype="float32")[np.arange(ROWS) % 5]
        y_pred = probabilities(5)
        y_pred /= y_pred.sum(axis=-1, keepdims=True)
        for reduction in ("sum_over_batch_size", "sum", None):
            kind = Kind.MEAN if reduction == "sum_over_batch_size" else Kind.SUM
            self.check(cls(reduction=reduction), y, y_pred, kind)
        weights = np.linspace(0, 2, ROWS, dtype="float32")
        self.check(cls(), y, y_pred, Kind.MEAN, weights)
        loss = cls(reduction="mean_with_sample_weight")
        self.check(loss, y, y_pred, Kind.MEAN, weights)

    def test_of_classes(self):
        y_pred = probabilities(3, 5)
        y_pred /= y_pred.sum(axis=-1, keepdims=True)
        y = np.arange(3 * ROWS).reshape(ROWS, 3) % 5
        mask = np.arange(3) < (1 + np.arange(ROWS) % 3)[:, None]
        for reduction, weights in (
            ("sum_over_batch_size", None),
            ("sum_over_batch_size", mask.astype("float32")),
            ("mean_with_sample_weight", mask.astype("float32")),
        ):
            loss = keras.losses.SparseCategoricalCrossentropy(
                reduction=reduction
            )
            self.check(loss, y, y_pred, Kind.MEAN, weights)
            self.check(loss, y, y_pred, Kind.MEAN, weights, mask)
        loss = keras.losses.CategoricalGeneralizedCrossEntropy()
        self.check(loss, y[:, 0], y_pred[:, 0], Kind.MEAN)
        # Keras leaves such labels out, and divides by all.
        loss = keras.losses.SparseCategoricalCrossentropy(ignore_class=1)
        self.check(loss, y, y_pred, Kind.MEAN)

    def test_of_sequences(self):
        y_pred = np.random.default_rng(0).normal(size=(ROWS, 8, 5))
        y = np.arange(3 * ROWS).reshape(ROWS, 3) % 4 + 1
        self.check(keras.losses.CTC(), y, y_pred.astype("float32"), Kind.MEAN)

    def test_rows_with_equally_many_that_count(self):
        y = np.random.default_rng(0).uniform(0.6, 0.9, (ROWS, 4))
        y_pred = probabilities(4)
        self.check(masked_mean, y.astype("float32"), y_pred, Kind.COUPLED)
        self.check(scalar_mean, y.astype("float32"), y_pred, Kind.MEAN)

    def test_labels_that_may_not_be_zero(self):
        def of_positive(y, y_pred):
            tf.debugging.assert_positive(y)
            return scalar_mean(y, y_pred)

        def of_shares(y, y_pred):
            return keras.ops.mean(keras.ops.abs((y - y_pred) / y))

        y = np.random.default_rng(0).uniform(0.6, 0.9, (ROWS, 4))
        for loss in (of_positive, of_shares):
            y_pred = probabilities(4)
            self.check(loss, y.astype("float32"), y_pred, Kind.MEAN)

    def test_of_one_row(self):
        y = (probabilities(5) > 0.5).astype("float32")
        for loss, kind in (
            (keras.losses.Dice(), Kind.COUPLED),
            (keras.losses.MeanSquaredError(), Kind.MEAN),
            (scalar_mean, Kind.MEAN),
            (masked_mean, Kind.COUPLED),
        ):
            # The first of them has a label that counts.
            row = y[np.argmax(y.sum(axis=-1))][None]
            self.check(loss, row, probabilities(5)[:1], kind)

    def test_of_equal_outputs(self):
        # An output layer that starts with zeros.
        y_pred = np.full((ROWS, 5), 0.5, "float32")
        y = (probabilities(5) > 0.5).astype("float32")
        self.check(keras.losses.Dice(), y, y_pred, Kind.COUPLED)
        self.check(keras.losses.MeanSquaredError(), y, y_pred, Kind.MEAN)

    def test_of_a_size(self):
        y = probabilities(4)[:4]
        self.check(OfFourRows(), y, y[::-1].copy(), Kind.COUPLED)
        y_pred = tf.constant(probabilities(5))
        with self.assertRaises(tf.errors.InvalidArgumentError):
            compiled_kinds.kind_of_entry(OfFourRows(), y_pred, y_pred, None)

    def test_zero_tells_nothing(self):
        y = probabilities(5)
        self.check(lambda y, y_pred: 0 * y_pred, y, y, None)
        self.check(lambda y, y_pred: y_pred / 0, y, y, None)

    def check(self, loss, y, y_pred, kind, weights=None, mask=None):
        y_pred = tf.convert_to_tensor(y_pred)
        if mask is not None:
            compat.set_keras_mask(y_pred, tf.constant(mask))
        weights = None if weights is None else tf.constant(weights)
        sample = samples.Sample(None, tf.constant(y), y_pred, weights)
        (entry,) = compiled_kinds.entries_of(compiled(loss), sample)
        self.assertEqual(compiled_kinds.kind_of_entry(*entry), kind)


if __name__ == "__main__":
    tf.test.main()
