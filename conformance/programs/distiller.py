"""A student that learns from a teacher's logits and features, by Keras's class.

After https://keras.io/api/models/distillation/distiller/
"""

import keras

# accum+: import keras_accum
from conformance import program_data


def network(filters):
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(filters, 3, 2, padding="same"),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(8, activation="relu", name="features"),
            keras.layers.Dense(10),
        ]
    )


def main(batch_size, epochs):
    images, classes = program_data.digits()
    distiller = keras.distillation.Distiller(
        teacher=network(16),
        student=network(4),
        distillation_losses=[
            keras.distillation.LogitsDistillation(temperature=2.0),
            keras.distillation.FeatureDistillation(
                teacher_layer_name="features", student_layer_name="features"
            ),
        ],
        distillation_loss_weights=[1.0, 0.5],
        student_loss_weight=0.5,
    )
    # accum+: distiller = keras_accum.GradientAccumulationModel.from_model(distiller, **ways)
    distiller.compile(
        optimizer=keras.optimizers.SGD(0.1),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    distiller.fit(
        images,
        classes,
        batch_size=batch_size,
        epochs=epochs,
        validation_data=(images, classes),
        shuffle=False,
        verbose=0,
    )
    return distiller
