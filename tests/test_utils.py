"""Models, micro-batches and the yardstick that the tests share."""

import contextlib
import functools
import inspect
import os
import pathlib
import re
import subprocess
import sys
import unittest
import warnings

import keras
import numpy as np
import tensorflow as tf
from absl import flags

import keras_accum
from keras_accum import compat
from keras_accum import steps

ROOT = pathlib.Path(__file__).absolute().parent.parent
# Put before a command, it limits addresses: to more than there are, so that
# nothing fails, but the command sees a limit.
LIMITED = ["sh", "-c", 'ulimit -v 17179869184; exec "$@"', "sh"]
FEATURES, CLASSES = 6, 3

# Whether to test what takes too long for every change as well.
IS_NIGHTLY = "KERAS_ACCUM_NIGHTLY" in os.environ

LOGICAL_CPUS = 8
# TensorFlow splits a device once, before it runs anything.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * LOGICAL_CPUS,
)


HAS_RENORM = (
    "renorm" in inspect.signature(keras.layers.BatchNormalization).parameters
)
needs_renorm = unittest.skipUnless(
    HAS_RENORM, "BatchNormalization has no `renorm` in this Keras."
)
needs_multi_optimizer = unittest.skipUnless(
    hasattr(keras.optimizers, "MultiOptimizer"), "Keras 3.15 has the first."
)


def divides_activity_losses():
    """Returns whether an activity's loss is a mean over rows, or their sum.

    It is a mean from Keras 3.14 on.
    """
    with tf.init_scope():
        layer = keras.layers.ActivityRegularization(l2=1.0)
        layer(np.ones((2, 1), "float32"))
        return float(layer.losses[0]) == 1.0


def with_nightly(cases, nightly):
    """Returns the cases for every change, and at night those for the night."""
    return [*cases, *(nightly if IS_NIGHTLY else ())]


def run_program(*command, before=()):
    """Runs Python as a user would, with the library on its path.

    Args:
        *command: What follows `python`.
        before: What is before it, such as `LIMITED`.
    """
    # Under Bazel the interpreter alone does not know the way.
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    return subprocess.run(
        [*before, sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def number_printed(program, before=()):
    """Returns the number that a program prints last.

    Args:
        program: Its text.
        before: As for `run_program`.
    """
    run = run_program("-c", program, before=before)
    if run.returncode:
        raise AssertionError(f"{run.returncode}: {run.stderr}")
    return int(run.stdout.splitlines()[-1])


@contextlib.contextmanager
def memory_group(limit):
    """Makes a control group, of which the kernel ends what takes more memory.

    Where none can be made, it skips the test.

    Args:
        limit: Bytes.

    Yields:
        What runs a command in the group, if it is put before it.
    """
    top, name = pathlib.Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
    if not top.exists():
        top, name = top.parent, "memory.max"
    group = top / f"keras_accum_{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise unittest.SkipTest(f"No control group: {error}") from error
    try:
        if not group.joinpath(name).exists():
            raise unittest.SkipTest("Control groups do not limit memory.")
        group.joinpath(name).write_text(str(limit), encoding="ascii")
        enter = f'echo $$ > {group}/cgroup.procs; exec "$@"'
        yield ["sh", "-c", enter, "sh"]
    finally:
        group.rmdir()


def accumulator(model):
    """Returns what sums a model's gradients; None before the first."""
    return model._accumulation.window["gradients"].accumulator


def num_microbatches(model):
    """Returns how many micro-batches have gradients in a model's window."""
    return model._accumulation.window["gradients"].num_microbatches


def num_updates(optimizer):
    """Returns how many updates an optimizer, or the one inside it, has made."""
    return int(compat.iterations(optimizer).numpy())


def position(model):
    """Returns how many micro-batches of its window `fit` has counted."""
    return model._accumulation.position.read()[0]


def train_microbatch(model, is_first, data):
    """Returns what a model's program for a micro-batch computes."""
    return steps.train_microbatch(model._accumulation, is_first, data)


@contextlib.contextmanager
def no_warnings():
    """Fails if anything within the context warns its user."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def first_command(*cases, second=None):
    """Leaves a parameterized test's other cases to the thorough tests.

    Where the test is thorough itself, by its own mark or its class's, it leaves
    them to the night.

    Args:
        *cases: The numbers or names of the cases that the first command runs.
        second: Those that the thorough tests run, where these leave some to the
            night. None: all others.
    """

    def note(test):
        commands = [cases] if second is None else [cases, (*cases, *second)]
        test.cases_of_commands = [
            {f"{test.__name__}{case}" for case in each} for each in commands
        ]
        return test

    return note


def at_night(test):
    """Leaves a test to the night, with all of its cases."""
    return first_command(second=())(test)


def mirrored(replicas=None):
    """Returns a strategy of `replicas` CPUs; None: all GPUs, or two CPUs."""
    if replicas != 1 and not compat.are_summed_on_read():
        raise unittest.SkipTest("Several replicas need Keras 3.10 or newer.")
    gpus = tf.config.list_logical_devices("GPU")
    if replicas is None and gpus:
        return tf.distribute.MirroredStrategy([gpu.name for gpu in gpus])
    return tf.distribute.MirroredStrategy(
        [f"CPU:{index}" for index in range(replicas or 2)]
    )


def tpu():
    """Returns `TPUStrategy` on the TPU of this machine."""
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver
    return tf.distribute.TPUStrategy(resolver.connect("local"))


# Name: how to make it. A process can have one number of replicas: collectives
# of another would join the group of the first, and fail.
STRATEGIES = {
    "none": tf.distribute.get_strategy,
    "one_device": lambda: tf.distribute.OneDeviceStrategy("CPU:0"),
    "mirrored": mirrored,
    "mirrored_1": lambda: mirrored(1),
    "mirrored_2": lambda: mirrored(2),
    "mirrored_4": lambda: mirrored(4),
    "mirrored_8": lambda: mirrored(8),
    # Without a cluster it is one worker.
    "multi_worker_1": tf.distribute.MultiWorkerMirroredStrategy,
    "tpu": tpu,
}

# pytest has an option of this name instead; see `conftest.py`.
STRATEGY = flags.DEFINE_enum(
    "strategy",
    os.environ.get("KERAS_ACCUM_STRATEGY", "mirrored"),
    list(STRATEGIES),
    "The strategy under which distribution is tested.",
)


@functools.cache
def chosen_strategy():
    """Returns the strategy that the flag names, and None; or None, and why."""
    # Under pytest nobody parses flags.
    name = flags.FLAGS["strategy"].value
    try:
        return STRATEGIES[name](), None
    # Errors of TensorFlow, of Google's metadata server and of the network.
    except Exception as error:
        if name != "tpu":
            raise
        reason = str(error).partition("\n")[0]
        return None, f"strategy {name}: there is no TPU here ({reason})"


def mlp(cls=keras.Model, regularizer=None, dtype=None, **kwargs):
    """Returns a functional classifier, always with the same weights."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((FEATURES,))
    hidden = keras.layers.Dense(
        8, activation="tanh", kernel_regularizer=regularizer, dtype=dtype
    )(inputs)
    outputs = keras.layers.Dense(CLASSES, dtype=dtype)(hidden)
    return cls(inputs, outputs, **kwargs)


def accumulating(build=mlp, accum_steps=4, **kwargs):
    """Builds with `GradientAccumulationModel`."""
    return build(
        keras_accum.GradientAccumulationModel, accum_steps=accum_steps, **kwargs
    )


def crossentropy(**kwargs):
    """Returns the loss that goes with `mlp`."""
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, **kwargs
    )


def microbatches(sizes, seed=0, dtype="float32"):
    """Returns pairs `(x, y)` for `mlp`, of these numbers of rows."""
    rng = np.random.default_rng(seed)
    return [
        (
            rng.normal(size=(size, FEATURES)).astype(dtype),
            rng.integers(0, CLASSES, size),
        )
        for size in sizes
    ]


def concatenate(batches):
    """Returns one batch of the rows of all; None stays None."""
    # Keras's own takes None for a leaf from 3.10 on.
    return tf.nest.map_structure(
        lambda *leaves: None if leaves[0] is None else np.concatenate(leaves),
        *batches,
    )


def dataset(batches, known_length=False):
    """Returns a `tf.data.Dataset` over batches of any sizes.

    Plain Keras counts an update too many, in `iterations`, when it runs into
    the end of a dataset of unknown length: references need a known one.
    """

    def of_one(batch):
        made = tf.data.Dataset.from_tensors(
            batch if isinstance(batch, tuple) else (batch,)
        )
        # Of any number of rows, without a function that would be traced.
        spec = tf.nest.map_structure(without_rows, made.element_spec)
        variant = tf.data.experimental.to_variant(made)
        return tf.data.experimental.from_variant(variant, spec)

    def without_rows(spec):
        if not isinstance(spec, tf.TensorSpec):
            return spec
        return tf.TensorSpec([None, *spec.shape[1:]], spec.dtype)

    # Not from a Python generator: where Python collects an iterator over
    # several devices as garbage, TensorFlow waits for a thread that waits for
    # Python.
    datasets = map(of_one, batches)
    result = functools.reduce(
        lambda some, more: some.concatenate(more), datasets
    )
    # Of an unknown length, too.
    result = result.filter(lambda *unused: True)
    if known_length:
        cardinality = tf.data.experimental.assert_cardinality(len(batches))
        result = result.apply(cardinality)
    return result


def eagerly(compile_args):
    """Returns arguments of `compile` with which a reference is not traced.

    A reference is plain Keras on one device: it has the same numbers, up to
    rounding, whether it is traced or not, and tracing is most of its time.
    """
    return compile_args | {"run_eagerly": True, "jit_compile": False}


def train_on(model, batches):
    """Calls `train_on_batch` for each batch of `(x, y[, sample_weight])`."""
    for batch in batches:
        model.train_on_batch(*batch)


def all_state(model):
    """Returns weights and optimizer variables, as float64 arrays."""
    variables = model.weights + model.optimizer.variables
    return [np.asarray(v.numpy(), "float64") for v in variables]


def counting_traces():
    """Returns a model class, and a list that grows with each traced step."""
    traces = []

    class Counted(keras_accum.GradientAccumulationModel):
        def compute_loss(self, *args, **kwargs):
            # The losses are looked at eagerly, before.
            if not tf.executing_eagerly():
                traces.append(1)
            return super().compute_loss(*args, **kwargs)

    return Counted, traces


class TestCase(tf.test.TestCase):
    """Compares a model with one trained on the concatenated batches.

    Attributes:
        microbatch_size: None to train with `accum_steps`, on micro-batches. A
            number to train on whole batches, with this `microbatch_size`.
    """

    microbatch_size = None

    def assertSameWeights(self, actual, expected, initial, tolerance=1e-5):
        """Compares weights, in units of how far they moved.

        Rounding makes each gradient wrong by some units in its last place, so
        the error grows with the way; 1e-5 leaves float32 about 100 of these.
        """
        moved = norm([e - i for e, i in zip(expected, initial, strict=True)])
        apart = norm([a - e for a, e in zip(actual, expected, strict=True)])
        self.assertGreater(moved, 0.0)
        self.assertLessEqual(apart / moved, tolerance)

    def assertTrainsAlike(
        self,
        build,
        compile_args,
        windows,
        tolerance=1e-5,
        slots_tolerance=None,
        traces_reference=False,
        **kwargs,
    ):
        """Trains on windows of micro-batches, and on what they concatenate to.

        Args:
            build: Function of a model class and keywords.
            compile_args: Function that makes the keywords of `compile`.
            windows: List of lists of batches.
            tolerance: As for `assertSameWeights`.
            slots_tolerance: Relative, for the optimizer's variables.
            traces_reference: Whether the reference is no eager one.
            **kwargs: For `GradientAccumulationModel`.
        """
        expected = build(keras.Model)
        kwargs["microbatch_size"] = self.microbatch_size
        actual = accumulating(build, 1 if self.microbatch_size else 4, **kwargs)
        initial = [w.astype("float64") for w in expected.get_weights()]
        self.assertAllClose(initial, actual.get_weights(), 0, 0)
        reference_args = compile_args()
        if not traces_reference:
            reference_args = eagerly(reference_args)
        expected.compile(**reference_args)
        arguments = compile_args()
        if not arguments.get("run_eagerly"):
            # Compiling by XLA, as Keras does, takes longest. It is a mode of
            # some tests, and of all at night.
            arguments.setdefault("jit_compile", "auto" if IS_NIGHTLY else False)
        actual.compile(**arguments)
        for window in windows:
            if self.microbatch_size:
                train_on(actual, [concatenate(window)])
            else:
                actual.accum_steps = len(window)
                train_on(actual, window)
            train_on(expected, [concatenate(window)])
        self.assertSameTraining(
            actual, expected, initial, tolerance, slots_tolerance
        )
        return actual, expected

    def assertFitsAlike(
        self, build, loss, way, batch, rate, strategy=None, rtol=1e-6
    ):
        """Trains by `fit` on one window, and in plain Keras on one batch.

        It fails at a warning. Weights are compared, and on one replica the loss
        that is reported: on several Keras multiplies regularizers.

        Args:
            build: Function of a model class and keywords.
            loss: For `compile`.
            way: Keywords for `GradientAccumulationModel`, that say how to
                accumulate.
            batch: The inputs of the window, and its labels or None.
            rate: Learning rate of SGD.
            strategy: A strategy for the model that accumulates.
            rtol: Relative tolerance for the loss.
        """
        strategy = strategy or tf.distribute.get_strategy()
        expected, reported = build(keras.Model), []
        initial = expected.get_weights()
        with strategy.scope():
            actual = build(keras_accum.GradientAccumulationModel, **way)
        for model in (expected, actual):
            with model.distribute_strategy.scope():
                model.compile(keras.optimizers.SGD(rate), loss)
            steps = way.get("accum_steps", 1) if model is actual else 1
            with no_warnings():
                history = model.fit(
                    *batch,
                    batch_size=len(batch[0]) // steps,
                    shuffle=False,
                    verbose=0,
                )
            reported.append(history.history["loss"])
        self.assertSameWeights(
            actual.get_weights(), expected.get_weights(), initial
        )
        if strategy.num_replicas_in_sync == 1:
            self.assertAllClose(reported[1], reported[0], rtol=rtol)

    def assertSameTraining(
        self, actual, expected, initial, tolerance=1e-5, slots_tolerance=None
    ):
        """Compares weights and the optimizer's variables of two models."""
        self.assertSameWeights(
            actual.get_weights(), expected.get_weights(), initial, tolerance
        )
        pairs = zip(
            actual.optimizer.variables,
            expected.optimizer.variables,
            strict=True,
        )
        for mine, theirs in pairs:
            # Keras numbers layers and optimizers: "dense_1" and "dense_2".
            self.assertEqual(unnumbered(mine.path), unnumbered(theirs.path))
            scale = np.abs(theirs.numpy()).max() + 1e-30
            self.assertAllClose(
                mine.numpy() / scale,
                theirs.numpy() / scale,
                rtol=0,
                atol=slots_tolerance or 10 * tolerance,
                msg=mine.path,
            )


def unnumbered(name):
    """Returns `name` without the numbers that make it unique."""
    return re.sub(r"_?\d+", "", name)


def norm(arrays):
    """Returns the Euclidean norm of a list of arrays."""
    return float(
        np.sqrt(sum(np.sum(np.square(a.astype("float64"))) for a in arrays))
    )
