"""Retrieval: users and items told by the other items of the batch.

After https://www.tensorflow.org/recommenders/examples/basic_retrieval
"""

import keras
import numpy as np
from keras import ops

# accum+: import keras_accum

USERS, ITEMS, WIDTH = 2_000, 5_000, 8


class TwoTower(keras.Model):
    # accum: class TwoTower(keras_accum.GradientAccumulationModel):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.users = keras.layers.Embedding(USERS, WIDTH)
        self.items = keras.layers.Embedding(ITEMS, WIDTH)
        self.user_tower, self.item_tower = (
            keras.layers.Dense(WIDTH) for _ in range(2)
        )

    def call(self, features):
        return {
            "user": self.user_tower(self.users(features["user_id"])),
            "item": self.item_tower(self.items(features["item_id"])),
        }

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        scores = ops.matmul(y_pred["user"], ops.transpose(y_pred["item"]))
        # An item that the batch has twice is no negative of itself.
        ids = x["item_id"]
        is_same = ops.equal(ids[:, None], ids[None])
        rows = ops.shape(ids)[0]
        is_twin = ops.logical_and(is_same, ops.logical_not(ops.eye(rows) > 0))
        scores = ops.where(is_twin, -1e9, scores / 0.05)
        losses = keras.losses.sparse_categorical_crossentropy(
            ops.arange(rows), scores, from_logits=True
        )
        return ops.mean(losses)


def main(batch_size, epochs):
    rng = np.random.default_rng(0)
    clicks = {
        "user_id": rng.integers(0, USERS, 64),
        "item_id": rng.zipf(1.3, 64) % ITEMS,
    }
    model = TwoTower()
    # accum: model = TwoTower(**ways)
    model.compile(optimizer=keras.optimizers.SGD(0.1))
    model.fit(
        clicks, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0
    )
    return model


def batch():
    return ({"user_id": np.arange(16), "item_id": np.arange(16) % 12},)
