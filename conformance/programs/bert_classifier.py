"""A classifier of KerasHub on a BERT backbone.

After https://keras.io/keras_hub/guides/classification_with_keras_hub/
"""

import keras
import keras_hub
import numpy as np

# accum+: import keras_accum
from conformance import program_data


def main(batch_size, epochs):
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=20,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=12,
        dropout=0.0,
    )
    model = keras_hub.models.BertTextClassifier(
        backbone, num_classes=2, preprocessor=None, dropout=0.0
    )
    # accum+: model = keras_accum.GradientAccumulationModel.from_model(model, **ways)
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=keras.optimizers.SGD(0.1),
        metrics=[keras.metrics.SparseCategoricalAccuracy()],
    )
    tokens = program_data.sentences()
    x = {
        "token_ids": tokens,
        "segment_ids": np.zeros_like(tokens),
        "padding_mask": tokens > 0,
    }
    y = (tokens.sum(axis=1) > 60).astype("int32")
    model.fit(x, y, batch_size, epochs=epochs, shuffle=False, verbose=0)
    return model
