"""The moments of one micro-batch, by which a layer normalized it."""

import dataclasses

import keras
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Moments:
    """The means and variances by which a layer normalized its inputs.

    Attributes:
        layer: The layer.
        count: How many values of a channel there were; a float scalar.
        means: Of the channels.
        variances: Of the channels.
    """

    layer: keras.layers.BatchNormalization
    count: tf.Tensor
    means: tf.Tensor
    variances: tf.Tensor


def moments_of(layer, inputs, mask, means, variances) -> Moments:
    """Returns the `Moments` that a layer computed of its inputs.

    Args:
        layer: A `keras.layers.BatchNormalization`.
        inputs: What it normalizes, with its channels along `layer.axis`.
        mask: Which entries count, of the shape of `inputs` without the last
            axis; None for all.
        means: Of the channels.
        variances: Of the channels.
    """
    channels = layer.moving_mean.shape[0]
    # Of one channel, Keras leaves out the axis if there is a mask.
    means, variances = (
        tf.reshape(values, [channels]) for values in (means, variances)
    )
    if mask is None:
        count = tf.size(inputs) // channels
    else:
        count = tf.math.count_nonzero(mask)
    return Moments(layer, tf.cast(count, means.dtype), means, variances)
