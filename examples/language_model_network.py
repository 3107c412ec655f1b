"""The network of the language model example: a decoder-only transformer."""

import dataclasses

import keras

from examples import language_model_text


@dataclasses.dataclass(frozen=True)
class Shape:
    """The size of the network; each field is the flag of its name."""

    context: int
    layers: int
    width: int
    heads: int


@keras.saving.register_keras_serializable("language_model")
class Positions(keras.layers.Layer):
    """Adds an embedding of its position to every token.

    Args:
        context: The number of positions.
        **kwargs: As for `keras.layers.Layer`.
    """

    def __init__(self, context: int, **kwargs):
        super().__init__(**kwargs)
        self.context = context

    def build(self, input_shape):
        """Makes the table."""
        self.embeddings = self.add_weight(
            shape=(self.context, input_shape[-1]),
            initializer=keras.initializers.RandomNormal(stddev=0.02),
            name="embeddings",
        )

    def call(self, x):
        """Adds the table to every row of `x`."""
        return x + self.embeddings

    def get_config(self):
        """Returns what the constructor got."""
        return {**super().get_config(), "context": self.context}


def build_model(
    shape: Shape, cls: type[keras.Model] = keras.Model, **kwargs
) -> keras.Model:
    """Returns a transformer that predicts, at each token, the next one.

    It has no dropout, whose random state Keras would not save: a training that
    goes on is then the same as one that was not interrupted.

    Args:
        shape: The network's size.
        cls: The class of the model.
        **kwargs: What else the class takes.

    Returns:
        A model from tokens, int32 of shape `(rows, context)`, to logits,
        float32 of shape `(rows, context, vocabulary)`.
    """
    inputs = keras.Input((shape.context,), dtype="int32", name="tokens")
    x = keras.layers.Embedding(
        language_model_text.VOCABULARY_SIZE,
        shape.width,
        embeddings_initializer=keras.initializers.RandomNormal(stddev=0.02),
        name="token",
    )(inputs)
    x = Positions(shape.context, name="position")(x)
    for layer in range(shape.layers):
        x = x + _attention(x, shape, f"attention_{layer}")
        x = x + _feed_forward(x, shape, f"feed_forward_{layer}")
    x = keras.layers.LayerNormalization(name="last_norm")(x)
    # Not in half precision, in which a softmax over logits is too coarse.
    outputs = keras.layers.Dense(
        language_model_text.VOCABULARY_SIZE, dtype="float32", name="logits"
    )(x)
    return cls(inputs, outputs, **kwargs)


def _attention(x, shape, name):
    x = keras.layers.LayerNormalization(name=f"{name}_norm")(x)
    return keras.layers.MultiHeadAttention(
        shape.heads, shape.width // shape.heads, name=name
    )(x, x, use_causal_mask=True)


def _feed_forward(x, shape, name):
    x = keras.layers.LayerNormalization(name=f"{name}_norm")(x)
    x = keras.layers.Dense(
        4 * shape.width, activation="gelu", name=f"{name}_in"
    )(x)
    return keras.layers.Dense(shape.width, name=f"{name}_out")(x)
