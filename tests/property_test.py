"""Random models, data, windows, policies and interruptions, and a loop by hand.

3 cases that are always the same, 20 in the thorough tests, and at night 1,000
that are not.
"""

import dataclasses
import functools
import warnings

import hypothesis
import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

import keras_accum
from tests import test_utils

CASES = 1000 if test_utils.IS_NIGHTLY else 20
FEW_CASES = 3
WORDS, LENGTH, FEATURES, CLASSES = 5, 4, 3, 2


class Coupled(keras.losses.Loss):
    """A ratio of sums over the batch, which no mean of its parts gives.

    Each row has the same value: a single one would meet the sample weight of a
    single row in Keras, which then divides by it where shapes are dynamic, as
    in `fit`, and not where they are known.
    """

    def call(self, y_true, y_pred):
        errors = keras.ops.sum(keras.ops.square(y_pred - y_true))
        ratio = errors / (1 + keras.ops.sum(keras.ops.square(y_pred)))
        return keras.ops.broadcast_to(ratio, keras.ops.shape(y_pred)[:-1])


LOSSES = {
    "coupled": Coupled,
    "squares": keras.losses.MeanSquaredError,
    "crossentropy": functools.partial(
        keras.losses.CategoricalCrossentropy, from_logits=True
    ),
}
OPTIMIZERS = {
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01, global_clipnorm=0.1),
    "average": lambda: keras.optimizers.SGD(
        0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2
    ),
}


def mean_over_rows(errors):
    """Returns the mean of what may be no rows; then zero."""
    rows = tf.cast(tf.shape(errors)[0], errors.dtype)
    return tf.math.divide_no_nan(tf.reduce_sum(errors), rows)


class OwnStep:
    """A `train_step` of one's own, in front of a model class."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            errors = tf.reduce_mean(tf.square(self(x, training=True) - y), -1)
            parts = self.parts_of(errors)
            losses = list(map(mean_over_rows, parts))
        for loss, part in zip(losses, parts, strict=True):
            gradients = tape.gradient(loss, self.trainable_weights)
            self.hand_over(gradients, tf.shape(part)[0])
        return {"loss": losses[0]}

    def parts_of(self, errors):
        """Returns the rows of each loss."""
        return [errors]

    def hand_over(self, gradients, rows):
        """Accumulates; pairs of gradients and weights, the last first."""
        self.accumulate(self.pairs_of(gradients)[::-1], rows)

    def pairs_of(self, gradients):
        return list(zip(gradients, self.trainable_weights, strict=True))


class Halves(OwnStep):
    """Calls for each half of the rows; one of them may have none."""

    def parts_of(self, errors):
        return errors[::2], errors[1::2]


class TwoOptimizers(OwnStep):
    """Has an optimizer for kernels, and one for biases."""

    def compile(self, optimizer, *args, **kwargs):
        super().compile(optimizer, *args, **kwargs)
        self.other_optimizer = OPTIMIZERS["momentum"]()

    def hand_over(self, gradients, rows):
        kernels, biases = split(self.pairs_of(gradients))
        self.accumulate(kernels, rows)
        self.accumulate(biases, rows, optimizer=self.other_optimizer)


OWN_STEPS = {
    "pairs": OwnStep,
    "halves": Halves,
    "two_optimizers": TwoOptimizers,
}


# Half of the models have Keras's own.
STEPS = ("compiled",) * len(OWN_STEPS) + tuple(OWN_STEPS)


def split(pairs):
    """Returns pairs of kernels, and pairs of biases."""
    kernels = [pair for pair in pairs if pair[1].name == "kernel"]
    return kernels, [pair for pair in pairs if pair[1].name != "kernel"]


@dataclasses.dataclass(frozen=True)
class Model:
    """What asks for programs of its own: others share them.

    Attributes:
        masked: Whether it reads words, of which zeros are masked, and gives an
            output for each.
        layers: Units and activation of each hidden layer.
        l2: Factor of the regularizer.
        loss: A key of `LOSSES`.
        reduction: Of the loss.
        weighted: Whether rows have sample weights.
        optimizer: A key of `OPTIMIZERS`.
        way: How windows are made: by "accum_steps", a "schedule" or a
            "microbatch_size".
        microbatch_size: The last one's.
        nonfinite: The policy.
        step: "compiled" for Keras's own, or what a `train_step` of its own does
            with gradients: gives them in another order as "pairs", calls for
            "halves" of the rows, or has "two_optimizers".
    """

    masked: bool
    layers: tuple
    l2: float
    loss: str
    reduction: str
    weighted: bool
    optimizer: str
    way: str
    microbatch_size: int
    nonfinite: str
    step: str


def possible(model):
    """Returns a model with what goes together."""
    if model.loss == "coupled":
        # With `accum_steps` the batch is not known, and a warning says so. To
        # skip one of its micro-batches is refused.
        nonfinite = model.nonfinite.replace("microbatch", "window")
        return dataclasses.replace(
            model,
            way="microbatch_size",
            nonfinite=nonfinite,
            step="compiled",
        )
    if model.step == "compiled":
        return model
    optimizer = model.optimizer
    if model.step == "two_optimizers" and optimizer == "average":
        # Keras ends a `fit` with averages of all weights, or an error.
        optimizer = "adam"
    # Such a step has a mean over rows by hand.
    return dataclasses.replace(
        model,
        optimizer=optimizer,
        masked=False,
        weighted=False,
        l2=0.0,
        loss="squares",
        reduction="sum_over_batch_size",
    )


MODELS = st.builds(
    Model,
    masked=st.booleans(),
    layers=st.lists(
        st.tuples(st.integers(1, 4), st.sampled_from(["tanh", "gelu"])),
        max_size=2,
    ).map(tuple),
    l2=st.sampled_from([0.0, 0.1]),
    loss=st.sampled_from(sorted(LOSSES)),
    reduction=st.sampled_from(
        ["sum_over_batch_size", "mean_with_sample_weight", "sum"]
    ),
    weighted=st.booleans(),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    way=st.sampled_from(["accum_steps", "schedule", "microbatch_size"]),
    microbatch_size=st.integers(1, 4),
    nonfinite=st.sampled_from(["propagate", "skip_microbatch", "skip_window"]),
    step=st.sampled_from(STEPS),
).map(possible)


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of random rows.

    Attributes:
        rows: How many.
        seed: What decides them.
        poisoned: Whether a label is not finite, where the policy minds.
    """

    rows: int
    seed: int
    poisoned: bool


BATCHES = st.builds(
    Batch,
    rows=st.integers(1, 6),
    seed=st.integers(0, 999),
    poisoned=st.integers(0, 4).map(lambda draw: draw == 0),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A call of `fit`.

    Attributes:
        batches: The batches of each epoch.
        epochs: How many.
        accum_steps: Set before, where windows are made so.
        interruption: None, or the epoch, the batch, and whether it is "data"
            or a "callback" that raises there, before or after that batch.
    """

    batches: tuple
    epochs: int
    accum_steps: int
    interruption: tuple | None


RUNS = st.builds(
    Run,
    batches=st.lists(BATCHES, min_size=1, max_size=6).map(tuple),
    epochs=st.integers(1, 2),
    accum_steps=st.integers(1, 5),
    interruption=st.none()
    | st.tuples(
        st.integers(0, 1),
        st.integers(0, 5),
        st.sampled_from(["data", "callback"]),
    ),
)


def scheduled(updates):
    """Returns the size of a window, after this number of updates."""
    return 1 + updates * updates % 3


class Interruption(Exception):
    """What interrupts a run."""


class Interrupting(keras.callbacks.Callback):
    """Raises after a batch."""

    def __init__(self, epoch, batch):
        super().__init__()
        self._when = epoch, batch

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self._epoch, batch) == self._when:
            raise Interruption


def data_of(model, batch):
    """Returns `(x, y)` or `(x, y, sample_weight)` of a batch."""
    rng = np.random.default_rng(batch.seed)
    shape = (batch.rows, LENGTH) if model.masked else (batch.rows,)
    if model.masked:
        x = rng.integers(0, WORDS, shape)
    else:
        x = rng.normal(size=(*shape, FEATURES))
    if model.loss == "squares":
        y = rng.normal(size=(*shape, CLASSES))
    else:
        y = np.eye(CLASSES)[rng.integers(0, CLASSES, shape)]
    if batch.poisoned and model.nonfinite != "propagate":
        y[rng.integers(batch.rows)] = np.nan
    weight = rng.integers(0, 3, shape) * rng.random(shape)
    return (x, y, weight) if model.weighted else (x, y)


def build(model, cls, **kwargs):
    """Returns a compiled Keras model."""
    keras.utils.set_random_seed(1)
    regularizer = keras.regularizers.L2(model.l2)
    if model.masked:
        inputs = keras.Input((LENGTH,), dtype="int32")
        values = keras.layers.Embedding(WORDS, FEATURES, mask_zero=True)(inputs)
    else:
        values = inputs = keras.Input((FEATURES,))
    for units, activation in model.layers:
        values = keras.layers.Dense(
            units, activation, kernel_regularizer=regularizer
        )(values)
    outputs = keras.layers.Dense(CLASSES, bias_regularizer=regularizer)(values)
    made = cls(inputs, outputs, **kwargs)
    made.compile(
        OPTIMIZERS[model.optimizer](),
        LOSSES[model.loss](reduction=model.reduction),
    )
    if model.step == "two_optimizers":
        if cls is keras.Model:
            made.other_optimizer = OPTIMIZERS["momentum"]()
        groups = split([(None, each) for each in made.trainable_weights])
        for optimizer, group in zip(optimizers_of(made), groups, strict=True):
            optimizer.build([variable for _, variable in group])
    else:
        made.optimizer.build(made.trainable_weights)
    return made


def optimizers_of(model):
    """Returns the optimizers of kernels and biases, or the one of all."""
    other = getattr(model, "other_optimizer", None)
    return [model.optimizer] if other is None else [model.optimizer, other]


@functools.cache
def pair_of(model):
    """Returns our model, plain Keras's, and their initial state."""
    arguments = {"nonfinite": model.nonfinite}
    if model.way == "schedule":
        arguments["accum_steps"] = scheduled
    elif model.way == "microbatch_size":
        arguments["microbatch_size"] = model.microbatch_size
    else:
        arguments["accum_steps"] = 2
    cls = keras_accum.GradientAccumulationModel
    if model.step != "compiled":
        cls = type("Own", (OWN_STEPS[model.step], cls), {})
    mine = build(model, cls, **arguments)
    initial = [variable.numpy() for variable in state_of(mine)]
    if model.loss == "coupled":
        # What a loss is cannot be seen in a first batch of a row or two.
        fit(mine, model, Run((Batch(5, 0, False),), 1, 2, None))
    return mine, build(model, keras.Model), initial


def state_of(model):
    variables = [each.variables for each in optimizers_of(model)]
    return model.weights + sum(variables, [])


class ByHand:
    """The windows of a plain model, as a loop.

    Args:
        model: The `Model`.
        plain: That as a `keras.Model`.
        partial_window: The policy.
    """

    def __init__(self, model, plain, partial_window):
        self._model, self._plain = model, plain
        self._partial_window = partial_window
        self._window = []

    def run(self, run):
        """Does what `fit` would."""
        if self._partial_window != "carry":
            self._window = []
        for epoch in range(run.epochs):
            for index, batch in enumerate(run.batches):
                if run.interruption == (epoch, index, "data"):
                    return
                self._add(data_of(self._model, batch), run.accum_steps)
                if run.interruption == (epoch, index, "callback"):
                    return
            if self._partial_window == "flush":
                self._update()
            elif self._partial_window == "drop":
                self._window = []
        # What Keras does last: averaged weights take the place of the others.
        if int(self._plain.optimizer.iterations) > 0:
            self._plain.optimizer.finalize_variable_values(
                self._plain.trainable_weights
            )

    def _add(self, data, accum_steps):
        if self._model.way == "microbatch_size":
            size = self._model.microbatch_size
            if self._model.loss == "coupled":
                # What is not finite is so for the batch as a whole.
                size = len(data[0])
            for begin in range(0, len(data[0]), size):
                end = begin + size
                self._window.append([leaf[begin:end] for leaf in data])
            self._update()
            return
        if not self._window:
            self._size = accum_steps
            if self._model.way == "schedule":
                self._size = scheduled(int(self._plain.optimizer.iterations))
        self._window.append(data)
        if len(self._window) >= self._size:
            self._update()

    def _update(self):
        window, self._window = self._window, []
        is_finite = [
            all(map(np.isfinite, map(np.sum, self._gradients(microbatch))))
            for microbatch in window
        ]
        if self._model.nonfinite == "skip_microbatch":
            window = [
                microbatch
                for microbatch, finite in zip(window, is_finite, strict=True)
                if finite
            ]
        elif not all(is_finite):
            window = []
        if window:
            gradients = self._gradients(test_utils.concatenate(window))
            weights = self._plain.trainable_weights
            groups = [list(zip(gradients, weights, strict=True))]
            optimizers = optimizers_of(self._plain)
            if len(optimizers) > 1:
                groups = split(groups[0])
            for optimizer, group in zip(optimizers, groups, strict=True):
                optimizer.apply(*map(list, zip(*group, strict=True)))

    def _gradients(self, data):
        x, *others = data
        with tf.GradientTape() as tape:
            y_pred = self._plain(x, training=True)
            y, sample_weight = [*others, None][:2]
            loss = self._plain.compute_loss(x, y, y_pred, sample_weight)
        return [
            tf.convert_to_tensor(gradient).numpy()
            for gradient in tape.gradient(loss, self._plain.trainable_variables)
        ]


def interrupted(dataset, batches, index, epoch):
    """Returns the dataset; in one epoch its batch `index` cannot be read."""
    begun = tf.Variable(-1)

    def begin(_):
        begun.assign_add(1)
        return tf.data.Dataset.range(batches)

    positions = tf.data.Dataset.range(1).flat_map(begin)

    def check(position, data):
        tf.debugging.Assert(
            (position != index) | (begun != epoch), ["interrupted"]
        )
        return data

    return tf.data.Dataset.zip(positions, dataset).map(check), begun


def fit(model, way, run):
    """Calls `fit`, and interrupts it."""
    dataset = test_utils.dataset([data_of(way, batch) for batch in run.batches])
    callbacks, begun = [], None
    epoch, index, what = run.interruption or (None, None, None)
    if what == "data":
        dataset, begun = interrupted(dataset, len(run.batches), index, epoch)
    elif what == "callback":
        callbacks = [Interrupting(epoch, index)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "An epoch has fewer micro-batches")
        try:
            model.fit(
                dataset, epochs=run.epochs, callbacks=callbacks, verbose=0
            )
        except (Interruption, tf.errors.InvalidArgumentError):
            if not what:
                raise
    del begun  # The dataset only refers to it.


def of_random_runs(cases):
    """Decorates a test that takes a model, runs and a policy."""
    settings = hypothesis.settings(
        max_examples=cases,
        deadline=None,
        derandomize=not test_utils.IS_NIGHTLY,
        database=None,
        # A failure says what it met; to find its smallest form takes minutes.
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    given = hypothesis.given(
        model=MODELS,
        runs=st.lists(RUNS, min_size=1, max_size=3),
        partial_window=st.sampled_from(["flush", "carry", "drop"]),
    )
    return lambda test: settings(given(test))


class PropertyTest(test_utils.TestCase):
    """Any run has the state of the loop by hand."""

    def setUp(self):
        super().setUp()
        self.addCleanup(keras.config.set_floatx, keras.config.floatx())
        self.addCleanup(
            keras.config.set_dtype_policy, keras.config.dtype_policy()
        )
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")

    @of_random_runs(FEW_CASES)
    @pytest.mark.thorough
    def test_some_runs(self, model, runs, partial_window):
        self.check(model, runs, partial_window)

    @pytest.mark.long
    @of_random_runs(CASES)
    @test_utils.at_night
    def test_any_run(self, model, runs, partial_window):
        self.check(model, runs, partial_window)

    def check(self, model, runs, partial_window):
        # Keras exchanges weights and averages at the end of a `fit`, here in
        # the middle of a window.
        hypothesis.assume(
            partial_window != "carry" or model.optimizer != "average"
        )
        mine, plain, initial = pair_of(model)
        for made in (mine, plain):
            for variable, value in zip(state_of(made), initial, strict=True):
                variable.assign(value)
        mine.reset_window()
        mine.partial_window = partial_window
        by_hand = ByHand(model, plain, partial_window)
        for run in runs:
            if model.way == "accum_steps":
                mine.accum_steps = run.accum_steps
            fit(mine, model, run)
            by_hand.run(run)
            # One that explodes multiplies what rounding did.
            hypothesis.assume(
                all(np.abs(v.numpy()).max() < 1e3 for v in state_of(plain))
            )
            for variable, expected in zip(
                state_of(mine), state_of(plain), strict=True
            ):
                self.assertAllClose(
                    variable.numpy(),
                    expected.numpy(),
                    rtol=1e-9,
                    atol=1e-9,
                    msg=variable.path,
                )


if __name__ == "__main__":
    tf.test.main()
