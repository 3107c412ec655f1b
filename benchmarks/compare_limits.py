"""Floors for the time of a window: what has to be moved, and to be computed.

Counted are the bytes of weights, gradients, buffers and the optimizer's state,
as if nothing stayed in a cache, and the operations of matrix products and
convolutions. Activations, the arithmetic on single entries and the optimizer's
are left out, so that these are floors indeed, where the weights fit no cache.

With P bytes of weights, all float32, each of a window's k micro-batches reads
them twice, forward and backward. The first writes P bytes of buffers, each
further one reads and writes them. The update reads and writes weights and both
moments of Adam, and reads the buffers: 7P; without moments 3P.
"""

import dataclasses
import math

from benchmarks import compare_models as models
from benchmarks.compare_models import CASES


@dataclasses.dataclass(frozen=True)
class Network:
    """What a network holds, and what one of its rows takes forward.

    Attributes:
        parameters: Numbers that are trained.
        looked_up: Parameters of which a step reads, and adds to, few rows.
        first: Parameters that multiply the inputs, whose gradient nobody needs.
        multiplications: Multiplications of a row, each with an addition.
        first_multiplications: Multiplications by `first` among them.
    """

    parameters: int
    looked_up: int
    first: int
    multiplications: int
    first_multiplications: int


def mlp() -> Network:
    """Returns the MLP of `compare_models`."""
    units = (models.FEATURES, *models.LAYERS, models.CLASSES)
    kernels = [a * b for a, b in zip(units[:-1], units[1:], strict=True)]
    return Network(
        parameters=sum(kernels) + sum(units[1:]),
        looked_up=0,
        first=kernels[0],
        multiplications=sum(kernels),
        first_multiplications=kernels[0],
    )


def transformer(
    length: int = models.LENGTH,
    vocabulary: int = models.VOCABULARY,
    width: int = models.WIDTH,
    blocks: int = models.BLOCKS,
) -> Network:
    """Returns the transformer of `compare_models`, or one of other sizes."""
    kernels = blocks * 12 * width**2 + width * vocabulary
    biases = blocks * 9 * width + vocabulary
    normalizations = (2 * blocks + 1) * 2 * width
    # Scores, and sums of values; that half of them are masked saves nothing.
    attention = blocks * 2 * length**2 * width
    return Network(
        parameters=vocabulary * width + kernels + biases + normalizations,
        looked_up=vocabulary * width,
        first=0,
        multiplications=length * kernels + attention,
        first_multiplications=0,
    )


def convolutional() -> Network:
    """Returns the convolutional network of `compare_models`."""
    side, _, inputs = models.IMAGE
    kernels, multiplications = [], []
    for filters, strides in models.FILTERS:
        side = math.ceil(side / strides)
        kernels.append(9 * inputs * filters)
        multiplications.append(side**2 * kernels[-1])
        inputs = filters
    last = inputs * models.CLASSES
    scales = sum(2 * filters for filters, _ in models.FILTERS)
    return Network(
        parameters=sum(kernels) + scales + last + models.CLASSES,
        looked_up=0,
        first=kernels[0],
        multiplications=sum(multiplications) + last,
        first_multiplications=multiplications[0],
    )


@dataclasses.dataclass(frozen=True)
class Window:
    """What a window has to do.

    Attributes:
        parameters: Bytes of the weights, P.
        transfers: Bytes to and from the memory.
        operations: Multiplications and additions.
        accum_steps: Micro-batches, k.
    """

    parameters: float
    transfers: float
    operations: float
    accum_steps: int


def window(
    network: Network, rows: int, accum_steps: int, optimizer: str
) -> Window:
    """Counts what a window of k micro-batches of `rows` rows has to do."""
    used = 4 * (network.parameters - network.looked_up)
    reads = accum_steps * (2 * used - 4 * network.first)
    buffers = used + (accum_steps - 1) * 2 * used
    update = (3 if optimizer == "sgd" else 7) * 4 * network.parameters
    # Forward, the inputs' gradients and the weights' cost the same.
    multiplications = (
        3 * network.multiplications - network.first_multiplications
    )
    return Window(
        parameters=4 * network.parameters,
        transfers=reads + buffers + update,
        operations=2 * multiplications * rows * accum_steps,
        accum_steps=accum_steps,
    )


def windows() -> dict[str, Window]:
    """Returns the windows of the cases, and one of a larger model."""
    networks = {
        "MLP": mlp(),
        "transformer": transformer(),
        "convolutional": convolutional(),
    }
    found = {
        name: window(
            networks[name], case.rows, case.accum_steps, case.optimizer
        )
        for name, case in CASES.items()
    }
    # Brown et al. (2020), "Language Models are Few-Shot Learners", table 2.1.
    large = transformer(length=2048, vocabulary=50257, width=2048, blocks=24)
    found[LARGE] = window(large, 4, 8, "adamw")
    return found


LARGE = "GPT-3 XL"
# One H200 SXM, from NVIDIA's data sheet: HBM3e; TF32 and BF16 without sparsity;
# a fourth-generation NVLink's 900 GB/s, half in each direction.
H200_BYTES, H200_TF32, H200_BF16, NVLINK = 4.8e12, 494e12, 989e12, 450e9
# 400 Gbit/s in each direction, as the data sheet of a ConnectX-7 has it.
ETHERNET = 50e9
HOSTS, GPUS = 64, 8


def reduction(window: Window, members: int, bandwidth: float) -> float:
    """Returns the seconds of a ring's all-reduce of P bytes.

    Each member sends (and at the same time gets) 2 (n - 1) / n of it. Patarasuk
    and Yuan (2009), "Bandwidth optimal all-reduce algorithms for clusters of
    workstations".
    """
    return 2 * (members - 1) / members * window.parameters / bandwidth


def floors(
    window: Window, bandwidth: float, speed: float
) -> tuple[float, float]:
    """Returns the seconds of a window's transfers, and of its operations."""
    return window.transfers / bandwidth, window.operations / speed
