"""A Gemma model of KerasHub, fine-tuned by LoRA.

After https://ai.google.dev/gemma/docs/core/lora_tuning
"""

import keras
import keras_hub
import numpy as np

# accum+: import keras_accum
from conformance import program_data


def main(batch_size, epochs):
    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=20,
        num_layers=2,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=16,
        intermediate_dim=32,
        head_dim=8,
    )
    model = keras_hub.models.GemmaCausalLM(backbone, preprocessor=None)
    model.backbone.enable_lora(rank=4)
    # accum+: model = keras_accum.GradientAccumulationModel.from_model(model, **ways)
    optimizer = keras.optimizers.AdamW(learning_rate=1e-3, weight_decay=0.01)
    optimizer.exclude_from_weight_decay(var_names=["bias", "scale"])
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=optimizer,
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
    )
    tokens = program_data.sentences()
    mask = tokens > 0
    x = {"token_ids": tokens, "padding_mask": mask}
    y = np.roll(tokens, -1, axis=1)
    model.fit(
        x,
        y,
        sample_weight=mask.astype("float32"),
        batch_size=batch_size,
        epochs=epochs,
        shuffle=False,
        verbose=0,
    )
    return model
