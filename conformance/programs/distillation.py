"""A small student that learns from a teacher's logits, in `compute_loss`.

After https://keras.io/examples/vision/knowledge_distillation/
"""

import keras

# accum+: import keras_accum
from conformance import program_data


class Distiller(keras.Model):
    # accum: class Distiller(keras_accum.GradientAccumulationModel):
    def __init__(self, student, teacher, **kwargs):
        super().__init__(**kwargs)
        self.student, self.teacher = student, teacher
        self.teacher.trainable = False

    def compile(
        self, optimizer, metrics, student_loss_fn, distillation_loss_fn
    ):
        super().compile(optimizer=optimizer, metrics=metrics)
        self.student_loss_fn = student_loss_fn
        self.distillation_loss_fn = distillation_loss_fn

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        soft = keras.ops.softmax(self.teacher(x, training=False) / 3.0, axis=1)
        distillation = self.distillation_loss_fn(
            soft, keras.ops.softmax(y_pred / 3.0, axis=1)
        )
        return 0.1 * self.student_loss_fn(y, y_pred) + 0.9 * 9 * distillation

    def call(self, x):
        return self.student(x)


def network(filters):
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(filters, 3, 2, padding="same"),
            keras.layers.LeakyReLU(negative_slope=0.2),
            keras.layers.Conv2D(2 * filters, 3, 2, padding="same"),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )


def main(batch_size, epochs):
    images, classes = program_data.digits()
    distiller = Distiller(student=network(4), teacher=network(16))
    # accum: distiller = Distiller(student=network(4), teacher=network(16), **ways)
    distiller.compile(
        optimizer=keras.optimizers.SGD(0.05),
        metrics=[keras.metrics.SparseCategoricalAccuracy()],
        student_loss_fn=keras.losses.SparseCategoricalCrossentropy(
            from_logits=True
        ),
        distillation_loss_fn=keras.losses.KLDivergence(),
    )
    distiller.fit(
        images, classes, batch_size, epochs=epochs, shuffle=False, verbose=0
    )
    return distiller
