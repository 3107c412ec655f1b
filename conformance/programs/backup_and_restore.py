"""A run that is interrupted in its second epoch, and goes on from a backup.

After https://keras.io/api/callbacks/backup_and_restore/
"""

import tempfile

import keras

# accum+: import keras_accum
from conformance import program_data


class Preempted(Exception):
    pass


class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == 1:
            raise Preempted


def make():
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(16, activation="relu")(inputs)
    outputs = keras.layers.Dense(1)(hidden)
    model = keras.Model(inputs, outputs)
    # accum: model = keras_accum.GradientAccumulationModel(inputs, outputs, **ways)
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9), "mse", metrics=["mae"]
    )
    return model


def train(batch_size, epochs, folder, callbacks=()):
    x, y = program_data.table()
    model = make()
    model.fit(
        x,
        y,
        batch_size,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[keras.callbacks.BackupAndRestore(folder), *callbacks],
    )
    return model


def main(batch_size, epochs):
    with tempfile.TemporaryDirectory() as folder:
        try:
            return train(batch_size, epochs, folder, [Interrupt()])
        except Preempted:
            return train(batch_size, epochs, folder)
