"""The systems that are compared: where they come from, how they are used."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class About:
    """A system, and how to get it.

    Attributes:
        title: Its name in tables.
        module: Where in `conformance` its adapter is.
        adapter: The adapter's class in there.
        packages: What `pip install` is given. "." is this library.
        shown: The packages whose versions are shown.
        usage: How it is used here, in a sentence.
    """

    title: str
    module: str
    adapter: str
    packages: tuple[str, ...]
    shown: tuple[str, ...]
    usage: str


SYSTEMS = {
    "accum_steps": About(
        "keras_accum, `accum_steps`",
        "keras_systems",
        "KerasAccum",
        (".",),
        ("keras_accum", "keras", "tensorflow"),
        "`GradientAccumulationModel(accum_steps=k)`, micro-batches in `fit`.",
    ),
    "microbatch_size": About(
        "keras_accum, `microbatch_size`",
        "keras_systems",
        "KerasAccumMicrobatches",
        (".",),
        ("keras_accum", "keras", "tensorflow"),
        "`GradientAccumulationModel(microbatch_size=n)`, large batches in "
        "`fit`; n is the number of rows in the largest micro-batch.",
    ),
    "keras": About(
        "Keras",
        "keras_systems",
        "KerasOwn",
        ("keras", "tensorflow"),
        ("keras", "tensorflow"),
        "`gradient_accumulation_steps=k` of the optimizer, micro-batches in "
        "`fit`.",
    ),
    "gradient_accumulator": About(
        "gradient-accumulator",
        "keras_systems",
        "GradientAccumulatorPackage",
        ("gradient-accumulator",),
        ("gradient-accumulator", "keras", "tensorflow"),
        "`GradientAccumulateModel(accum_steps=k)`, micro-batches in `fit`.",
    ),
    "multi_steps": About(
        "optax.MultiSteps",
        "optax_systems",
        "MultiSteps",
        ("optax", "jax"),
        ("optax", "jax"),
        "`MultiSteps(every_k_schedule=k)` around the optimizer, in a loop.",
    ),
    "optax_microbatch": About(
        "optax.microbatching",
        "optax_systems",
        "Microbatching",
        ("optax", "jax"),
        ("optax", "jax"),
        "`microbatch` around the gradient of the large batch.",
    ),
    "torch_loop": About(
        "PyTorch, documented loop",
        "torch_systems",
        "Loop",
        ("torch", "numpy"),
        ("torch",),
        "`(loss / k).backward()`, `step` after k, and at an epoch's end.",
    ),
    "torch_sums": About(
        "PyTorch, sums divided once",
        "torch_systems",
        "SummingLoop",
        ("torch", "numpy"),
        ("torch",),
        "Losses as sums. Before `step`, the gradients are divided once, by the "
        "number that the loss of the whole window is divided by.",
    ),
    "lightning": About(
        "Lightning",
        "lightning_system",
        "Lightning",
        ("lightning", "numpy"),
        ("lightning", "torch"),
        "`Trainer(accumulate_grad_batches=k)`.",
    ),
    "accelerate": About(
        "Accelerate",
        "accelerate_system",
        "Accelerate",
        ("accelerate", "numpy"),
        ("accelerate", "torch"),
        "`accelerator.accumulate(model)`; for samples of uneven size, the loop "
        "in its guide on such samples.",
    ),
}
