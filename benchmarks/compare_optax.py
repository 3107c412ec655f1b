"""`benchmarks.compare` for systems on JAX and optax.

The models are written out: dictionaries of arrays and functions of them, all
compiled, with arguments donated.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import microbatching

from benchmarks import compare_models as models
from benchmarks import compare_worker


def dense(rng, inputs, outputs):
    """Returns the parameters of a dense layer."""
    bound = np.sqrt(6 / (inputs + outputs))
    kernel = rng.uniform(-bound, bound, (inputs, outputs))
    return {
        "kernel": jnp.asarray(kernel, "float32"),
        "bias": jnp.zeros(outputs),
    }


def apply_dense(layer, x):
    """Applies a dense layer."""
    return x @ layer["kernel"] + layer["bias"]


def normalize(layer, x, axes, epsilon):
    """Applies layer or batch normalization; also returns mean and variance."""
    mean = jnp.mean(x, axes, keepdims=True)
    variance = jnp.var(x, axes, keepdims=True)
    scaled = (x - mean) * jax.lax.rsqrt(variance + epsilon)
    return scaled * layer["scale"] + layer["offset"], (mean, variance)


def normalization(width):
    """Returns the parameters of a normalization."""
    return {"scale": jnp.ones(width), "offset": jnp.zeros(width)}


def mlp_parameters(rng):
    """Returns the parameters of the MLP."""
    widths = (models.FEATURES, *models.LAYERS, models.CLASSES)
    return [
        dense(rng, inputs, outputs)
        for inputs, outputs in zip(widths, widths[1:], strict=False)
    ]


def mlp(parameters, state, x):
    """Returns the logits and new state of the MLP."""
    *hidden, last = parameters
    for layer in hidden:
        x = jax.nn.relu(apply_dense(layer, x))
    return apply_dense(last, x), state


def transformer_parameters(rng):
    """Returns the parameters of the transformer."""
    width = models.WIDTH

    def block():
        return {
            "before_attention": normalization(width),
            "query": dense(rng, width, width),
            "key": dense(rng, width, width),
            "value": dense(rng, width, width),
            "output": dense(rng, width, width),
            "before_dense": normalization(width),
            "wide": dense(rng, width, 4 * width),
            "narrow": dense(rng, 4 * width, width),
        }

    table = rng.uniform(-0.05, 0.05, (models.VOCABULARY, width))
    return {
        "embedding": jnp.asarray(table, "float32"),
        "blocks": [block() for _ in range(models.BLOCKS)],
        "last": normalization(width),
        "logits": dense(rng, width, models.VOCABULARY),
    }


def transformer(parameters, state, x):
    """Returns the logits and new state of the transformer."""

    def normal(layer, x):
        return normalize(layer, x, -1, 1e-3)[0]

    def heads(layer, x):
        shape = (*x.shape[:2], models.HEADS, models.WIDTH // models.HEADS)
        return apply_dense(layer, x).reshape(shape)

    x = parameters["embedding"][x]
    for block in parameters["blocks"]:
        y = normal(block["before_attention"], x)
        y = jax.nn.dot_product_attention(
            heads(block["query"], y),
            heads(block["key"], y),
            heads(block["value"], y),
            is_causal=True,
        )
        x = x + apply_dense(block["output"], y.reshape(x.shape))
        y = normal(block["before_dense"], x)
        y = jax.nn.gelu(apply_dense(block["wide"], y), approximate=False)
        x = x + apply_dense(block["narrow"], y)
    return apply_dense(
        parameters["logits"], normal(parameters["last"], x)
    ), state


def convolutional_parameters(rng):
    """Returns the parameters of the convolutional network."""
    layers, inputs = [], models.IMAGE[-1]
    for filters, _ in models.FILTERS:
        bound = np.sqrt(6 / (9 * (inputs + filters)))
        kernel = rng.uniform(-bound, bound, (3, 3, inputs, filters))
        layers.append(
            {"kernel": jnp.asarray(kernel, "float32"), **normalization(filters)}
        )
        inputs = filters
    return {"layers": layers, "last": dense(rng, inputs, models.CLASSES)}


def convolutional(parameters, state, x):
    """Returns the network's logits and new moving statistics."""
    statistics = []
    for layer, moving, (_, strides) in zip(
        parameters["layers"], state, models.FILTERS, strict=True
    ):
        x = jax.lax.conv_general_dilated(
            x,
            layer["kernel"],
            (strides, strides),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x, seen = normalize(layer, x, (0, 1, 2), 1e-3)
        statistics.append(
            jax.tree.map(
                lambda old, new: 0.99 * old + 0.01 * new.reshape(-1),
                moving,
                seen,
            )
        )
        x = jax.nn.relu(x)
    return apply_dense(parameters["last"], x.mean((1, 2))), statistics


NETWORKS = {
    "MLP": (mlp_parameters, mlp),
    "transformer": (transformer_parameters, transformer),
    "convolutional": (convolutional_parameters, convolutional),
}


def make_optimizer(name: str) -> optax.GradientTransformation:
    """Returns the optimizer."""
    if name == "adamw":
        return optax.adamw(
            models.LEARNING_RATE, weight_decay=models.WEIGHT_DECAY
        )
    return getattr(optax, name)(models.LEARNING_RATE)


class Optax(compare_worker.Contestants):
    """Plain training; subclasses accumulate as "window"."""

    names = ("window", "plain", "whole", "ideal")

    def make(self, name, accum_steps):
        """See `Contestants`."""
        rows = self.case.rows * (accum_steps if name == "whole" else 1)
        batch = jax.device_put(self.case.batch(rows))
        if name == "window":
            return self.window(accum_steps)
        if name == "ideal":
            return self._ideal(batch, accum_steps)
        calls = 1 if name == "whole" else accum_steps
        optimizer = make_optimizer(self.case.optimizer)
        return self.calls(self.step(optimizer), optimizer, batch, calls)

    def window(self, accum_steps):
        """Returns the function for "window"."""
        raise NotImplementedError

    def start(self, optimizer):
        """Returns the first parameters and states of network and optimizer."""
        make, _ = NETWORKS[self.model]
        parameters = make(np.random.default_rng(0))
        state = ()
        if self.model == "convolutional":
            state = [
                (jnp.zeros(filters), jnp.ones(filters))
                for filters, _ in models.FILTERS
            ]
        return parameters, state, optimizer.init(parameters)

    def loss(self, parameters, state, x, y):
        """Returns the mean loss, and the network's new state."""
        _, apply = NETWORKS[self.model]
        logits, state = apply(parameters, state, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), state

    def step(self, optimizer):
        """Returns a training step with such an optimizer, compiled."""

        @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
        def step(parameters, state, of_optimizer, x, y):
            (_, state), gradients = jax.value_and_grad(self.loss, has_aux=True)(
                parameters, state, x, y
            )
            return self.updated(
                optimizer, parameters, state, of_optimizer, gradients
            )

        return step

    def updated(self, optimizer, parameters, state, of_optimizer, gradients):
        """Returns what a step returns, from the gradients."""
        updates, of_optimizer = optimizer.update(
            gradients, of_optimizer, parameters
        )
        return optax.apply_updates(parameters, updates), state, of_optimizer

    def calls(self, step, optimizer, batch, calls):
        """Returns a function that takes `calls` steps."""
        carried = self.start(optimizer)

        def run():
            nonlocal carried
            for _ in range(calls):
                carried = step(*carried, *batch)
            jax.block_until_ready(carried)

        return run

    def _ideal(self, batch, accum_steps):
        optimizer = make_optimizer(self.case.optimizer)
        parameters, state, of_optimizer = self.start(optimizer)
        gradient = jax.jit(jax.grad(self.loss, has_aux=True))
        update = jax.jit(
            functools.partial(self.updated, optimizer), donate_argnums=(0, 2)
        )

        def run():
            nonlocal parameters, state, of_optimizer
            for _ in range(accum_steps):
                gradients, state = gradient(parameters, state, *batch)
            parameters, state, of_optimizer = update(
                parameters, state, of_optimizer, gradients
            )
            jax.block_until_ready(parameters)

        return run


class MultiSteps(Optax):
    """`optax.MultiSteps`."""

    def window(self, accum_steps):
        """See `Optax`."""
        optimizer = optax.MultiSteps(
            make_optimizer(self.case.optimizer), accum_steps
        )
        batch = jax.device_put(self.case.batch(self.case.rows))
        step = self.step(optimizer)
        return self.calls(step, optimizer, batch, accum_steps)

    def traces(self, name):
        """See `Contestants`: k is a schedule, which is traced."""
        del name
        optimizer = optax.MultiSteps(
            make_optimizer(self.case.optimizer),
            lambda updates: jnp.where(updates < 1, 2, 4),
        )
        batch = jax.device_put(self.case.batch(self.case.rows))
        step = self.step(optimizer)
        self.calls(step, optimizer, batch, 6)()
        return step._cache_size() - 1


class Microbatching(Optax):
    """`optax.microbatching`, of the rows of all micro-batches."""

    def window(self, accum_steps):
        """See `Optax`."""
        optimizer = make_optimizer(self.case.optimizer)
        return self.calls(
            self._step(optimizer), optimizer, self._rows(accum_steps), 1
        )

    def traces(self, name):
        """See `Contestants`."""
        del name
        optimizer = make_optimizer(self.case.optimizer)
        step = self._step(optimizer)
        for accum_steps in (2, 4):
            self.calls(step, optimizer, self._rows(accum_steps), 1)()
        return step._cache_size() - 1

    def _rows(self, accum_steps):
        return jax.device_put(self.case.batch(self.case.rows * accum_steps))

    def _step(self, optimizer):
        mean = microbatching.AccumulationType.MEAN
        gradient = microbatching.microbatch(
            jax.grad(self.loss, has_aux=True),
            argnums=(2, 3),
            microbatch_size=self.case.rows,
            # The mean of what each leaves of the moving statistics.
            accumulator=mean,
        )

        @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
        def step(parameters, state, of_optimizer, x, y):
            gradients, state = gradient(parameters, state, x, y)
            return self.updated(
                optimizer, parameters, state, of_optimizer, gradients
            )

        return step


CONTESTANTS = {"multi_steps": MultiSteps, "optax_microbatch": Microbatching}

if __name__ == "__main__":
    compare_worker.serve(CONTESTANTS)
