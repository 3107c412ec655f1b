"""What the workers of `workers_test` do, and one process with one device too.

Each case is a function of a `Place`, and returns a dict of arrays. Run as a
program it is one worker: `worker_cases.py folder replicas case [case ...]`.
"""

import dataclasses
import os
import pathlib
import re
import shutil
import signal
import sys
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.distribute import collective_all_reduce_strategy
from tensorflow.python.eager import context

import keras_accum
from keras_accum import reduction
from tests import noise_cases
from tests import worker_processes

FEATURES, CLASSES = 4, 3
# Of a window, and of a micro-batch on all replicas together.
ACCUM_STEPS, ROWS = 3, 8

DATA = tf.data.experimental.AutoShardPolicy.DATA
FILE = tf.data.experimental.AutoShardPolicy.FILE
OFF = tf.data.experimental.AutoShardPolicy.OFF

REDUCTIONS = ("CollectiveReduce", "CollectiveGather", "CollectiveBcast")


@dataclasses.dataclass
class Place:
    """Where a case runs.

    Attributes:
        strategy: The strategy; the default one where there is one device.
        folder: What all workers see.
        index: Which worker this is.
        workers: How many the data are for. One process with one device takes
            the data of all of them.
        alone: Whether this is that process.
    """

    strategy: tf.distribute.Strategy
    folder: pathlib.Path
    index: int
    workers: int
    alone: bool

    @property
    def is_chief(self):
        return self.index == 0


class Losses(keras.callbacks.Callback):
    """The losses that `fit` reports when the first window of an epoch ends."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        if batch == ACCUM_STEPS - 1:
            self.seen.append(logs["loss"])


def classifier(place, jit, spe=1, dtype=None, make_optimizer=None, **kwargs):
    """Returns a compiled model, with the same first weights at every call."""
    keras.utils.set_random_seed(7)
    with place.strategy.scope():
        inputs = keras.Input((FEATURES,))
        hidden = keras.layers.Dense(5, activation="tanh", dtype=dtype)(inputs)
        outputs = keras.layers.Dense(CLASSES, dtype=dtype)(hidden)
        model = keras_accum.GradientAccumulationModel(
            inputs, outputs, **({"accum_steps": ACCUM_STEPS} | kwargs)
        )
        model.compile(
            optimizer=(make_optimizer or adam)(),
            loss=crossentropy(),
            metrics=["accuracy"],
            weighted_metrics=["sparse_categorical_accuracy"],
            jit_compile=jit,
            steps_per_execution=spe,
        )
    return model


def adam():
    return keras.optimizers.Adam(
        0.01,
        global_clipnorm=0.05,
        use_ema=True,
        ema_overwrite_frequency=2,
        weight_decay=0.1,
    )


def crossentropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def rows(num_rows, seed=0):
    """Returns inputs, labels and uneven sample weights."""
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(num_rows, FEATURES)).astype("float32"),
        rng.integers(0, CLASSES, num_rows),
        rng.random(num_rows).astype("float32"),
    )


def with_policy(dataset, policy):
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = policy
    return dataset.with_options(options)


def of_unknown_length(batches):
    """Returns a dataset of the batches; TensorFlow does not know its length."""
    spec = tuple(
        tf.TensorSpec((None, *leaf.shape[1:]), leaf.dtype)
        for leaf in batches[0]
    )

    def copies():
        # TensorFlow writes into arrays that a generator hands out.
        for batch in batches:
            yield tuple(leaf.copy() for leaf in batch)

    return tf.data.Dataset.from_generator(copies, output_signature=spec)


def split(arrays, size):
    """Splits arrays into batches of `size` rows; the last has what is left."""
    return [
        tuple(array[start : start + size] for array in arrays)
        for start in range(0, len(arrays[0]), size)
    ]


def side_by_side(shares):
    """Returns the batches that all workers' batches make together."""
    longest = max(map(len, shares))
    return [
        tuple(
            np.concatenate(leaves)
            for leaves in zip(
                *(share[i] for share in shares if i < len(share)), strict=True
            )
        )
        for i in range(longest)
    ]


def copies_of(model, strategy):
    """Returns every copy that this process has of the model's variables."""
    variables = model.variables + model.optimizer.variables
    return {
        f"copy/{i}/{replica}": copy.numpy()
        for i, variable in enumerate(variables)
        for replica, copy in enumerate(
            strategy.experimental_local_results(variable.value)
        )
    }


def told(model, place, history=None, losses=None):
    """Returns the weights, the optimizer's state and what `fit` reported."""
    result = {f"weight/{i}": w for i, w in enumerate(model.get_weights())}
    for i, variable in enumerate(model.optimizer.variables):
        result[f"slot/{i}"] = variable.numpy()
    for name, values in (history.history if history else {}).items():
        result[f"history/{name}"] = values
    if losses:
        result["losses"] = losses.seen
    return result | copies_of(model, place.strategy)


def arrays(place, jit=True, spe=1):
    """Trains on NumPy arrays, and does all else that one does with a model."""
    model = classifier(place, jit, spe)
    # Three batches and two rows, so that some replicas get none.
    x, y, weight = rows(3 * ROWS + 2)
    losses = Losses()
    history = model.fit(
        x,
        y,
        sample_weight=weight,
        batch_size=ROWS,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=[losses],
        validation_data=(x[:19], y[:19], weight[:19]),
        validation_batch_size=ROWS,
    )
    result = {
        "evaluate": model.evaluate(x, y, batch_size=ROWS, verbose=0),
        "predict": model.predict(x, batch_size=ROWS, verbose=0),
    }
    logs = [
        model.train_on_batch(xs, ys, ws)
        for xs, ys, ws in split(rows(ACCUM_STEPS * ROWS, seed=1), ROWS)
    ]
    result["train_on_batch"] = logs[-1]
    return told(model, place, history, losses) | result


def plain(place):
    """Trains as `arrays` does, without XLA, three steps at a time."""
    return arrays(place, jit=False, spe=3)


def masks(place):
    """Trains on masked tokens of unknown length; windows are carried on."""
    keras.utils.set_random_seed(7)
    rng = np.random.default_rng(3)
    length, num_rows = 6, 4 * ROWS + 3
    tokens = rng.integers(1, 9, (num_rows, length))
    kept = rng.integers(1, length + 1, num_rows)
    tokens[np.arange(length) >= kept[:, None]] = 0
    data = (tokens, rng.integers(0, CLASSES, (num_rows, length)))
    data += (rng.random((num_rows, 1)).astype("float32"),)
    with place.strategy.scope():
        inputs = keras.Input((length,), dtype="int32")
        hidden = keras.layers.Embedding(9, 5, mask_zero=True)(inputs)
        outputs = keras.layers.Dense(CLASSES)(hidden)
        model = keras_accum.GradientAccumulationModel(
            inputs,
            outputs,
            accum_steps=ACCUM_STEPS,
            partial_window="carry",
        )
        model.compile(
            # What an embedding's gradient is divided by shows in each row.
            optimizer=keras.optimizers.SGD(0.5, momentum=0.9, clipnorm=0.2),
            loss=crossentropy(),
            jit_compile=False,
            steps_per_execution=ACCUM_STEPS,
        )
    dataset = with_policy(of_unknown_length(split(data, ROWS)), DATA)
    # Six batches are two windows.
    history = model.fit(dataset, epochs=3, verbose=0)
    return told(model, place, history)


def float16(place):
    """Trains in half precision, with scaled losses."""
    model = classifier(
        place,
        jit=True,
        spe=ACCUM_STEPS,
        dtype="mixed_float16",
        make_optimizer=lambda: keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.1, momentum=0.9), dynamic_growth_steps=2
        ),
    )
    x, y, weight = rows(6 * ROWS)
    dataset = tf.data.Dataset.from_tensor_slices((x, y, weight)).batch(ROWS)
    history = model.fit(with_policy(dataset, DATA), epochs=2, verbose=0)
    return told(model, place, history)


def shares_of(place, multiple=1):
    """Returns each worker's own rows: their numbers differ."""
    shares = []
    for index in range(place.workers):
        num_rows = (4 + 3 * index) * ROWS // place.workers + index
        shares.append(rows(num_rows // multiple * multiple, seed=index))
    return shares


def together(place, shares):
    """Returns the batches that one device would see of all workers' rows."""
    each = ROWS // place.workers
    return side_by_side([split(share, each) for share in shares])


def files(place):
    """Trains on a text file for each worker; their lengths differ."""
    model = classifier(place, jit=False)
    names, shares = [], shares_of(place)
    for index, (x, y, weight) in enumerate(shares):
        names.append(str(place.folder / f"rows-{index}.csv"))
        if place.is_chief and not place.alone:
            table = np.column_stack([x, y, weight])
            # A worker may read while another one writes.
            np.savetxt(names[-1] + ".new", table, delimiter=",", fmt="%.9e")
            os.replace(names[-1] + ".new", names[-1])
    if not place.alone:
        meet(place.strategy)

    def parse(line):
        values = tf.strings.to_number(tf.strings.split(line, ","))
        values = tf.ensure_shape(values, [FEATURES + 2])
        return values[:-2], tf.cast(values[-2], tf.int64), values[-1]

    dataset = tf.data.TextLineDataset(names).map(parse).batch(ROWS)
    dataset = with_policy(dataset, FILE)
    if place.alone:
        dataset = of_unknown_length(together(place, shares))
    losses = Losses()
    history = model.fit(dataset, epochs=2, verbose=0, callbacks=[losses])
    return told(model, place, history, losses)


def own(place):
    """Trains each worker on its own rows; none is shared out."""
    model = classifier(place, jit=False, spe=ACCUM_STEPS)
    # TensorFlow splits a short batch of a generator in a way of its own.
    shares = shares_of(place, multiple=ROWS)
    dataset = of_unknown_length(together(place, shares))
    if not place.alone:
        share = shares[place.index]
        dataset = with_policy(of_unknown_length(split(share, ROWS)), OFF)
    history = model.fit(dataset, epochs=2, verbose=0)
    return told(model, place, history)


def rounded(place):
    """Sends gradients as bfloat16, in several buckets."""
    dtype = None if place.alone else "bfloat16"
    with mock.patch.object(reduction, "BUCKET_BYTES", 64):
        model = classifier(place, jit=False, communication_dtype=dtype)
        fit(model, epochs=2)
    return told(model, place)


def undisturbed(place):
    """Trains for three epochs, of one window and a short one each."""
    model = classifier(place, jit=False)
    fit(model, epochs=3)
    return told(model, place)


def fit(model, **kwargs):
    """Trains on epochs of a window of three batches and one of one batch."""
    x, y, weight = rows(3 * ROWS + 2)
    dataset = tf.data.Dataset.from_tensor_slices((x, y, weight)).batch(ROWS)
    model.fit(with_policy(dataset, DATA), verbose=0, **kwargs)


def amid_third_epoch(model, batch):
    """Returns whether `batch` ends the first window of the third epoch."""
    updates = model.optimizer.iterations.numpy()
    return updates == 4 and batch == ACCUM_STEPS - 1


def noise(place):
    """Trains in windows that follow the noise scale; notes their sizes."""
    model, x, y = noise_cases.model_of(
        8.0,
        place.strategy,
        accum_steps=keras_accum.schedules.NoiseScale(1, 64),
        window_metrics=("gradient_noise_scale",),
    )
    sizes, num_rows = noise_cases.Sizes(), 300 * ROWS
    history = model.fit(
        x[:num_rows],
        y[:num_rows],
        batch_size=ROWS,
        shuffle=False,
        verbose=0,
        callbacks=[sizes],
    )
    return told(model, place, history) | {"updates": sizes.updates}


def kept_by_chief(place, name):
    """Returns where to save: TensorFlow's convention for several workers.

    All of them have to save, since they do so together. What the chief writes
    is kept; each other worker writes to a folder of its own.
    """
    if place.is_chief:
        return place.folder / name
    return place.folder / f"temporary-{place.index}" / name


def forget_temporary(place):
    """Removes what is not the chief's."""
    shutil.rmtree(place.folder / f"temporary-{place.index}", True)


class SaveCheckpoint(keras.callbacks.Callback):
    """Writes a `tf.train.Checkpoint` after every epoch."""

    def __init__(self, place, name):
        super().__init__()
        self.place, self.name = place, name

    def on_epoch_end(self, epoch, logs=None):
        path = kept_by_chief(self.place, self.name)
        done = tf.Variable(epoch + 1, dtype=tf.int64)
        checkpoint = tf.train.Checkpoint(model=self.model, epochs=done)
        checkpoint.write(path / "checkpoint")
        forget_temporary(self.place)


def restored(place, name):
    """Returns a model that `SaveCheckpoint` wrote, and the epochs it had."""
    model = classifier(place, jit=False)
    # It is restored to what there is; `fit` would make it later.
    with place.strategy.scope():
        model.optimizer.build(model.trainable_variables)
    done = tf.Variable(0, dtype=tf.int64)
    checkpoint = tf.train.Checkpoint(model=model, epochs=done)
    checkpoint.read(place.folder / name / "checkpoint")
    return model, int(done)


def tf_checkpoint(place):
    """Interrupts a training that `tf.train.Checkpoint` saves."""
    first = classifier(place, jit=False)
    fit(first, epochs=2, callbacks=[SaveCheckpoint(place, "tf")])
    meet(place.strategy)
    second, done = restored(place, "tf")
    fit(second, initial_epoch=done, epochs=3)
    return told(second, place)


def model_checkpoint(place):
    """Interrupts a training of which `ModelCheckpoint` saves whole models."""
    first = classifier(place, jit=False)
    path = kept_by_chief(place, "model-checkpoint")
    path.mkdir(parents=True)
    callback = keras.callbacks.ModelCheckpoint(path / "{epoch}.keras")
    fit(first, epochs=2, callbacks=[callback])
    forget_temporary(place)
    meet(place.strategy)
    with place.strategy.scope():
        second = keras.models.load_model(
            place.folder / "model-checkpoint" / "2.keras"
        )
    fit(second, initial_epoch=2, epochs=3)
    return told(second, place)


def backup_and_restore(place):
    """Interrupts a window with an error, beside `BackupAndRestore`.

    It reads and deletes what it wrote itself: each worker has its own.
    """
    folder = str(place.folder / f"backup-{place.index}")

    class Failing(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if amid_third_epoch(self.model, batch):
                raise InterruptedError

    first = classifier(place, jit=False)
    backups = keras.callbacks.BackupAndRestore(folder)
    try:
        fit(first, epochs=3, callbacks=[backups, Failing()])
    except InterruptedError:
        second = classifier(place, jit=False)
        backups = keras.callbacks.BackupAndRestore(folder)
        fit(second, epochs=3, callbacks=[backups])
    return told(second, place)


def killed(place):
    """Trains; a worker is killed amid the third epoch's window."""

    class Killed(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if place.index == 1 and amid_third_epoch(self.model, batch):
                os.kill(os.getpid(), signal.SIGKILL)

    callbacks = [SaveCheckpoint(place, "killed"), Killed()]
    fit(classifier(place, jit=False), epochs=3, callbacks=callbacks)
    return {}


def restarted(place):
    """Goes on as when all workers are started again."""
    model, done = restored(place, "killed")
    fit(model, initial_epoch=done, epochs=3)
    return told(model, place) | {"done": done}


def collectives(place):
    """Counts the reductions in the functions of a training.

    A function of its own, `cond_true`, is what TensorFlow makes of a branch.
    """
    x, y, weight = rows(6 * ROWS)
    known_length = tf.data.Dataset.from_tensor_slices((x, y, weight)).batch(
        ROWS
    )
    unknown_length = of_unknown_length(split((x, y, weight), ROWS))
    arrays = {"x": x, "y": y, "sample_weight": weight, "batch_size": ROWS}
    found = {}
    for name, data in (
        ("arrays", arrays),
        ("known", {"x": with_policy(known_length, DATA)}),
        ("unknown", {"x": with_policy(unknown_length, DATA)}),
    ):
        before = set(context.context().list_function_names())
        model = classifier(place, jit=False)
        model.fit(**data, verbose=0)
        found[f"{name}/branches"], found[f"{name}/others"] = [], []
        for function in context.context().list_function_names():
            # Reductions that Python asked for are wrapped in such functions.
            if function in before or function.startswith("__wrapped__"):
                continue
            nodes = context.context().get_function_def(function).node_def
            count = sum(node.op.startswith(REDUCTIONS) for node in nodes)
            is_branch = re.search(r"cond(_\d+)?_true_", function)
            if count:
                found[f"{name}/{'branches' if is_branch else 'others'}"].append(
                    count
                )
    return found


def meet(strategy):
    """Waits for all workers."""
    one = tf.constant([1])
    strategy.gather(strategy.run(lambda: one), axis=0)


def main(argv):
    folder, replicas, *names = argv
    index, workers = worker_processes.task()
    place = Place(
        make_strategy(int(replicas)),
        pathlib.Path(folder),
        index,
        workers,
        False,
    )
    for name in names:
        result = CASES[name](place)
        path = place.folder / f"worker-{index}" / f"{name}.npz"
        worker_processes.save(path, result)
    # None leaves before the others have what they wait for.
    meet(place.strategy)


def make_strategy(replicas):
    """Returns a worker's strategy, with its CPU split into `replicas` devices.

    TensorFlow takes one CPU for one replica, and has no other way to try what
    a worker with several GPUs does.
    """
    if replicas > 1:
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * replicas,
        )
        extended = collective_all_reduce_strategy.CollectiveAllReduceExtended
        extended._initialize_local_devices = lambda self, resolver, device: (
            tuple(f"{device}/device:CPU:{i}" for i in range(replicas)),
            "CPU",
        )
    return tf.distribute.MultiWorkerMirroredStrategy()


CASES = {
    case.__name__: case
    for case in (
        arrays,
        plain,
        masks,
        float16,
        files,
        own,
        rounded,
        undisturbed,
        noise,
        tf_checkpoint,
        model_checkpoint,
        backup_and_restore,
        killed,
        restarted,
        collectives,
    )
}

if __name__ == "__main__":
    main(sys.argv[1:])
