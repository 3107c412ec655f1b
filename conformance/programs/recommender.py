"""Matrix factorization of ratings, with large tables and biases.

After https://keras.io/examples/structured_data/collaborative_filtering_movielens/
"""

import keras
import numpy as np

# accum+: import keras_accum

USERS, MOVIES = 2000, 5000


def embedding(rows, size):
    return keras.layers.Embedding(
        rows,
        size,
        embeddings_initializer="he_normal",
        embeddings_regularizer=keras.regularizers.L2(1e-6),
    )


class Recommender(keras.Model):
    # accum: class Recommender(keras_accum.GradientAccumulationModel):
    def __init__(self, size, **kwargs):
        super().__init__(**kwargs)
        self.user_embedding = embedding(USERS, size)
        self.user_bias = keras.layers.Embedding(USERS, 1)
        self.movie_embedding = embedding(MOVIES, size)
        self.movie_bias = keras.layers.Embedding(MOVIES, 1)

    def call(self, inputs):
        users, movies = inputs[:, 0], inputs[:, 1]
        products = self.user_embedding(users) * self.movie_embedding(movies)
        score = keras.ops.sum(products, axis=1, keepdims=True)
        score += self.user_bias(users) + self.movie_bias(movies)
        return keras.ops.sigmoid(score)


def main(batch_size, epochs):
    rng = np.random.default_rng(0)
    # A few of them are popular: their rows occur several times in a batch.
    users = rng.zipf(1.5, 80) % USERS
    movies = rng.zipf(1.5, 80) % MOVIES
    x = np.stack([users, movies], axis=1)
    y = rng.integers(0, 11, 80) / 10
    model = Recommender(16)
    # accum: model = Recommender(16, **ways)
    model.compile(
        loss=keras.losses.BinaryCrossentropy(),
        optimizer=keras.optimizers.SGD(0.5, momentum=0.9),
    )
    model.fit(
        x=x[:64],
        y=y[:64],
        batch_size=batch_size,
        epochs=epochs,
        validation_data=(x[64:], y[64:]),
        shuffle=False,
        verbose=0,
    )
    return model
