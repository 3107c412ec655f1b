"""A language model of KerasHub, of which LoRA trains a few weights.

After https://keras.io/examples/nlp/parameter_efficient_finetuning_of_gpt2_with_lora/
"""

import keras
import keras_hub
import numpy as np

# accum+: import keras_accum
from conformance import program_data


def main(batch_size, epochs):
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=20,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=12,
        dropout=0.0,
    )
    backbone.enable_lora(rank=4)
    model = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    # accum+: model = keras_accum.GradientAccumulationModel.from_model(model, **ways)
    model.compile(
        optimizer=keras.optimizers.SGD(0.1),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=["accuracy"],
    )
    tokens = program_data.sentences()
    mask = tokens > 0
    x = {"token_ids": tokens, "padding_mask": mask}
    y = np.roll(tokens, -1, axis=1)
    model.fit(
        x,
        y,
        batch_size,
        epochs=epochs,
        sample_weight=mask.astype("float32"),
        shuffle=False,
        verbose=0,
    )
    return model
