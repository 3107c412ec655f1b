"""optax on JAX: `MultiSteps`, and `microbatching`.

The models are functions of a dictionary of arrays. What optax leaves to the
user's own loop, moving averages and the end of an epoch, stands in the loop.
"""

import dataclasses
import functools
import os
import pickle

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=2"
)

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from optax import microbatching

from conformance import problems
from conformance.problems import Batch
from conformance.problems import Problem
from conformance.system import DoesNotApply
from conformance.system import NoOption
from conformance.system import Outcome
from conformance.system import System


def apply(problem: Problem, parameters, x, key):
    """Returns logits, or two of them, and the hidden units or None."""

    def dense(name, x):
        y = x @ parameters[f"{name}_kernel"]
        bias = parameters.get(f"{name}_bias")
        return y if bias is None else y + bias

    if "embedding" in parameters and problem.lookup:
        x = parameters["embedding"][x]
    elif "embedding" in parameters:
        x = jax.nn.one_hot(x, problems.TOKENS) @ parameters["embedding"]
    else:
        x = x.astype(jax.tree.leaves(parameters)[0].dtype)
    if problem.model == "towers":
        return (dense("query", x), dense("key", x)), None
    if problem.model == "dropout":
        x = x * jax.random.bernoulli(key, 0.5, x.shape) * 2
    hidden = None
    if "hidden_kernel" in parameters:
        x = hidden = jnp.tanh(dense("hidden", x))
    outputs = dense("output", x)
    if "row_kernel" in parameters:
        outputs = (dense("row", x[:, 0]), outputs)
    return outputs, hidden


def sums(problem: Problem, parameters, data, key):
    """Returns the sum of each loss's numerators, and a mean's denominator.

    That of a loss that is no mean is 0. The last is what comes of the hidden
    units: the penalty on activations, and an added loss.
    """
    x, y, weight, counts = data["x"], data["y"], data["weight"], data["counts"]
    if problem.model == "pair":
        return [
            ((each * counts).sum(), counts.sum())
            for each in losses_of_pair(problem, parameters, x, key)
        ]
    outputs, hidden = apply(problem, parameters, x, key)
    if problem.model == "towers":
        query, key = outputs
        entries = optax.softmax_cross_entropy_with_integer_labels(
            query @ key.T, jnp.arange(len(query))
        )
        return [((entries * counts).sum(), counts.sum())]
    has_two_losses = isinstance(outputs, tuple)
    result = []
    for output, label in zip(
        outputs if has_two_losses else (outputs,), y, strict=True
    ):
        if problem.model == "dropout":
            entries = optax.squared_error(output, label).mean(-1)
        else:
            entries = optax.softmax_cross_entropy_with_integer_labels(
                output.astype(jnp.promote_types(output.dtype, jnp.float32)),
                label,
            )
        # A mask of the tokens that count, or of the rows that are no padding.
        shape = (-1,) + (1,) * (entries.ndim - 1)
        mask = counts.reshape(shape)
        if entries.ndim > 1:
            mask = mask * (x != 0)
        weights = weight.reshape(shape) * mask
        bottom = mask.sum()
        if problem.reduction == "weighted_mean":
            bottom = weights.sum()
        result.append(((entries * weights).sum(), bottom))
    if hidden is not None:
        result += extras(problem, hidden, counts)
    return result


def extras(problem: Problem, hidden, counts):
    """Returns the sums of losses of the hidden units, and denominators."""
    squares = jnp.square(hidden).sum(tuple(range(1, hidden.ndim))) * counts
    rows = counts.sum()
    result = [(problem.activity_l2 * squares.sum(), rows)]
    added = problem.added_scale * squares.sum() / problems.UNITS
    if problem.added == "row_mean":
        result.append((added, rows))
    elif problem.added == "per_row":
        result.append((added, 0.0 * rows))
    elif problem.added == "balance":
        shares = jax.nn.softmax(hidden).mean(0)
        balance = problems.UNITS * jnp.square(shares).sum()
        # It has no sum over rows; as if it were a mean over them.
        result.append((problem.added_scale * balance * rows, rows))
    return result


def losses_of_pair(problem: Problem, parameters, x, key):
    """Returns the losses of each row: the discriminator's, the generator's.

    Each has no gradient of the other's weights.
    """
    stopped = jax.tree.map(jax.lax.stop_gradient, parameters)

    def score(parameters, x):
        logits, _ = apply(problem, parameters, x, key)
        return logits[:, 0]

    def made(parameters):
        kernel = parameters["generator_kernel"]
        return jnp.tanh(x @ kernel + parameters["generator_bias"])

    # `apply` also finds the generator's weights, and leaves them alone.
    real, fake = score(parameters, x), score(parameters, made(stopped))
    called_real = -score(stopped, made(parameters))
    softplus = jax.nn.softplus
    return softplus(-real) + softplus(fake), softplus(called_real)


def penalty(problem: Problem, parameters):
    """Returns the L2 penalty of the hidden kernel."""
    if not problem.l2:
        return 0.0
    return problem.l2 * jnp.square(parameters["hidden_kernel"]).sum()


def mean_loss(problem: Problem, parameters, data, key):
    """Returns the loss, as it would be written without accumulation."""
    loss = penalty(problem, parameters)
    losses = sums(problem, parameters, data, key)
    for index, (top, bottom) in enumerate(losses):
        if problem.reduction == "sum" and index == 0:
            bottom = 1.0
        # A sum; or a mean over nothing: who has such batches says 0.
        loss = loss + top / jnp.where(bottom == 0, 1, bottom)
    return loss


def arrays(problem: Problem, batch: Batch, sharding=None):
    """Returns a batch as the functions above want it."""
    ones = np.ones(batch.rows, wide(problem))
    data = {
        "x": batch.x,
        "y": batch.y if isinstance(batch.y, tuple) else (batch.y,),
        "weight": ones if batch.weight is None else batch.weight,
        "counts": ones,
    }
    return jax.device_put(data, sharding)


def parts(problem: Problem, data) -> list:
    """Returns the parts of a batch that have a gradient each."""
    if problem.step != "two_parts":
        return [data]
    first = jax.tree.map(lambda leaf: problems.parts(leaf)[0], data)
    return [first, jax.tree.map(lambda leaf: problems.parts(leaf)[1], data)]


def wide(problem: Problem) -> str:
    """Returns the dtype of what is counted."""
    return "float64" if problem.dtype == "float64" else "float32"


def first_parameters(problem: Problem):
    """Returns the first weights, in the problem's dtype."""
    return {
        name: jnp.asarray(value, problem.dtype)
        for name, value in problems.initial_weights(problem.model).items()
    }


def make_optimizer(problem: Problem) -> optax.GradientTransformation:
    """Returns the optimizer, without accumulation.

    Where there are two, `optax.partition` joins them to one transformation.
    """
    if problem.step == "two_optimizers":
        single = dataclasses.replace(problem, step="whole")
        return optax.partition(
            {
                "generator": make_optimizer(single),
                "discriminator": make_optimizer(single),
            },
            lambda tree: {
                name: (
                    "generator"
                    if name.startswith("generator")
                    else "discriminator"
                )
                for name in tree
            },
        )
    transformations = []
    if problem.clip_norm is not None:
        transformations.append(optax.clip_by_global_norm(problem.clip_norm))
    if problem.clip_value is not None:
        transformations.append(optax.clip(problem.clip_value))
    rate = problem.learning_rate
    if problem.halving:
        rate = optax.exponential_decay(rate, 1, 0.5)
    momentum = 0.9 if problem.optimizer == "momentum" else None
    transformations.append(
        {
            "sgd": lambda: optax.sgd(rate),
            "momentum": lambda: optax.sgd(rate, momentum),
            "adam": lambda: optax.adam(rate),
            "adamw": lambda: optax.adamw(rate, weight_decay=0.1),
        }[problem.optimizer]()
    )
    if problem.nonnegative:
        transformations.append(
            optax.masked(
                optax.keep_params_nonnegative(),
                lambda tree: {name: name == "hidden_kernel" for name in tree},
            )
        )
    return optax.chain(*transformations)


def refuse(problem: Problem) -> None:
    """Raises for what optax has no part in."""
    if problem.model in ("normalized", "spectral"):
        raise DoesNotApply("optax has no layers.")
    if problem.dtype == "mixed_float16":
        raise DoesNotApply("optax has no loss scale.")


class Run:
    """Parameters, the optimizer's state, and what follows each update."""

    def __init__(self, problem: Problem, optimizer) -> None:
        self.problem = problem
        self.parameters = first_parameters(problem)
        self.state = optimizer.init(self.parameters)
        self.average = self.parameters
        self.key = jax.random.key(0)

    def next_key(self):
        """Returns a key for a step of its own."""
        self.key, key = jax.random.split(self.key)
        return key

    def after_update(self) -> None:
        """Updates the moving average."""
        if self.problem.average is not None:
            self.average = optax.incremental_update(
                self.parameters, self.average, 1 - self.problem.average
            )

    def outcome(self, updates=None) -> Outcome:
        """Returns what it left behind."""

        def named(tree):
            return {k: np.asarray(v, "float64") for k, v in tree.items()}

        result = Outcome(named(self.parameters), updates)
        if self.problem.average is not None:
            result.averages = named(self.average)
        return result


def make_step(optimizer, gradient):
    """Returns a compiled step: the gradient, and the optimizer's update."""

    @jax.jit
    def step(parameters, state, data, key):
        gradients = gradient(parameters, data, key)
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    return step


def train_on_batches(problem, optimizer, gradient, epochs) -> Outcome:
    """Makes one update for each batch."""
    run, step = Run(problem, optimizer), make_step(optimizer, gradient)
    updates = 0
    for batches in epochs:
        for data in batches:
            run.parameters, run.state = step(
                run.parameters, run.state, data, run.next_key()
            )
            run.after_update()
            updates += 1
    return run.outcome(updates)


class Optax(System):
    """What both ways have in common: training without accumulation."""

    def plain(self, problem):
        refuse(problem)
        with jax.enable_x64(problem.dtype == "float64"):
            epochs = [
                [arrays(problem, batch) for batch in batches]
                for batches in problem.large_batches()
            ]
            gradient = jax.grad(functools.partial(mean_loss, problem))
            optimizer = make_optimizer(problem)
            return train_on_batches(problem, optimizer, gradient, epochs)

    def accumulated(self, problem):
        refuse(problem)
        sharding = None
        if problem.replicas > 1:
            mesh = jax.make_mesh(
                (problem.replicas,),
                ("rows",),
                axis_types=(jax.sharding.AxisType.Auto,),
            )
            sharding = NamedSharding(mesh, PartitionSpec("rows"))
        with jax.enable_x64(problem.dtype == "float64"):
            return self.train(problem, sharding)

    def train(self, problem: Problem, sharding) -> Outcome:
        """Trains with accumulation, on rows that are spread like this."""
        raise NotImplementedError


class MultiSteps(Optax):
    """`optax.MultiSteps`."""

    def plain(self, problem):
        if problem.nonfinite == "skip_microbatch":
            # Its window waits for another micro-batch in the place of one that
            # it leaves out, and the last window is not filled.
            finite = [
                b for b in problem.microbatches() if problems.is_finite(b)
            ]
            full = len(finite) - len(finite) % problem.accum_steps
            problem = dataclasses.replace(
                problem, epochs=(tuple(finite[:full]),)
            )
        return super().plain(problem)

    def train(self, problem, sharding):
        inner, skip = make_optimizer(problem), None
        if problem.nonfinite == "skip_microbatch":
            skip = optax.skip_not_finite
        if problem.nonfinite == "skip_window":
            inner = optax.apply_if_finite(inner, 10)
        optimizer = optax.MultiSteps(
            inner,
            every_k(problem),
            # A sum is not divided.
            use_grad_mean=problem.reduction != "sum",
            should_skip_update_fn=skip,
            accumulator_dtype=jnp.dtype(wide(problem)),
        )
        gradient = jax.grad(functools.partial(mean_loss, problem))
        run, step = Run(problem, optimizer), make_step(optimizer, gradient)
        for index, batch in enumerate(problem.microbatches()):
            if index == problem.resume_after:
                saved = pickle.dumps(
                    jax.device_get((run.parameters, run.state))
                )
                run = Run(problem, optimizer)
                run.parameters, run.state = pickle.loads(saved)
            for data in parts(problem, arrays(problem, batch, sharding)):
                run.parameters, run.state = step(
                    run.parameters, run.state, data, run.next_key()
                )
            if optimizer.has_updated(run.state):
                run.after_update()
        return run.outcome(int(run.state.gradient_step))


def every_k(problem: Problem):
    """Returns k, or a schedule that follows the number of updates."""
    by_update = problem.steps_by_update
    if problem.steps_by_epoch is not None:
        by_update = [
            len(window) for windows in problem.windows() for window in windows
        ]
    if by_update is None:
        return problem.accum_steps * (1 + (problem.step == "two_parts"))
    sizes = jnp.asarray(by_update)
    return lambda update: sizes[jnp.minimum(update, len(sizes) - 1)]


class Microbatching(Optax):
    """`optax.microbatching` around the gradient of the whole batch."""

    def train(self, problem, sharding):
        optimizer = make_optimizer(problem)
        if problem.resume_after is not None:
            raise DoesNotApply("No window is open between batches.")
        if problem.nonfinite == "skip_microbatch":
            raise NoOption("A NaN reaches the batch's gradient.")
        if problem.nonfinite == "skip_window":
            optimizer = optax.apply_if_finite(optimizer, 10)
        epochs = [
            [self._padded(problem, batch, sharding) for batch in batches]
            for batches in problem.whole_batches()
        ]
        gradient = functools.partial(divided_gradient, problem)
        return train_on_batches(problem, optimizer, gradient, epochs)

    def _padded(self, problem, batch, sharding):
        # It wants a multiple of the size: rows that do not count are added.
        data = arrays(problem, batch)
        missing = -batch.rows % problem.most_rows
        return jax.device_put(
            jax.tree.map(
                lambda leaf: jnp.pad(
                    leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1)
                ),
                data,
            ),
            sharding,
        )


def divided_gradient(problem, parameters, data, key):
    """Returns the gradient of sums over micro-batches, divided once."""
    # Each row has a key, so that each micro-batch draws for itself.
    keys = jax.random.split(key, len(data["counts"]))

    def of_microbatch(parameters, data, keys):
        def tops(parameters, data):
            pairs = sums(problem, parameters, data, keys[0])
            bottoms = jnp.stack([bottom for _, bottom in pairs])
            return jnp.stack([top for top, _ in pairs]), bottoms

        gradients, bottoms = jax.tree.map(
            lambda *leaves: sum(leaves),
            *(
                jax.jacrev(tops, has_aux=True)(parameters, part)
                for part in parts(problem, data)
            ),
        )
        # They are added up in the dtype that they have.
        gradients = jax.tree.map(
            lambda leaf: leaf.astype(wide(problem)), gradients
        )
        return gradients, bottoms

    gradients, bottoms = microbatching.microbatch(
        of_microbatch,
        argnums=(1, 2),
        microbatch_size=problem.most_rows,
        accumulator=microbatching.AccumulationType.SUM,
    )(parameters, data, keys)
    if problem.reduction == "sum":
        bottoms = jnp.ones_like(bottoms)
    # Of a sum it is 0.
    bottoms = jnp.where(bottoms == 0, 1, bottoms)
    regularizer = jax.grad(
        lambda p: jnp.asarray(penalty(problem, p), wide(problem))
    )(parameters)
    return jax.tree.map(
        lambda gradient, other: (
            jnp.tensordot(1 / bottoms, gradient, 1) + other
        ).astype(problem.dtype),
        gradients,
        regularizer,
    )
