"""`plan`: how many rows at once fit in the memory, and which are fastest.

As ordinary code:

```python
for rows in sizes:
    total = kept + batch + max(step_bytes(rows), update_bytes)
    fits = total <= memory_limit
best = max(those_that_fit, key=rows_per_second)
```

The real thing does not try every size; see `forecast.py`.
"""

import functools
import gc
import itertools
from collections.abc import Iterator
from numbers import Real
from typing import Any

import keras

from keras_accum import compat
from keras_accum import first_batch
from keras_accum import rematerialization
from keras_accum import verifiable
from keras_accum.checks import check_positive
from keras_accum.forecast import Line
from keras_accum.plan_table import Plan
from keras_accum.plan_table import Size
from keras_accum.probe import Probe
from keras_accum.second_call import NotRepeatable

# Sizes of a table; there are more if none of them fits.
SIZES = 7
# Of what a step needs, the most that one with layers recomputed may need to be
# listed.
WORTH = 0.9
# How many sizes are timed: the largest that fits, half of it, and so on.
TIMED = 3


def plan(
    model: keras.Model,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    memory_limit: int | None = None,
) -> Plan:
    """Finds out how many rows at once fit in the memory, and are fastest.

    The rows given are one batch, and so one update. The table has a line for
    each `microbatch_size`: all rows, half of them, and so on; once as the model
    is, and once with its layers recomputed, as `rematerialize` does, if that
    saves a tenth or more; those that cannot be are left out. Where XLA
    compiles, its plan says what a step needs, and nothing is run that may not
    fit. Where it does not, steps on few rows are run, and then on more, as far
    as there is room for twice as much; sizes beyond are forecast. The largest
    sizes that fit are timed.

    Nothing is trained. All that steps assign is put back, but a `tf.Variable`
    that is no attribute of the model or of a layer. A model that is not built
    is, as in `fit`. On several replicas, all is of one of them; on a CPU,
    they share the memory.

    Args:
        model: A compiled model, of any class of `keras.Model`.
        x: Inputs: nested arrays or tensors with rows along the first axis. A
            task of KerasHub preprocesses them as in `fit`.
        y: Labels, or None.
        sample_weight: Sample weights, or None.
        memory_limit: Bytes of each device, for all that training takes. None
            for what the device has; of a CPU, for what is free and what the
            model has already, less what `microbatch_size="auto"` leaves free.

    Returns:
        A `Plan`. `print` shows it as a table.

    Raises:
        TypeError: If `model` is no `keras.Model`, or `memory_limit` no number.
        ValueError: If the model is not compiled, the data is not one batch,
            `memory_limit` is not positive, or nobody says what a step needs.
            XLA does. Without it TensorFlow does, of GPUs and of some CPUs, and
            Linux of the other CPUs.

    Example:

    ```python
    found = keras_accum.plan(model, x[:256], y[:256])
    print(found)
    if found.best.is_recomputed:
        keras_accum.rematerialize(model, found.layers)
    model = keras_accum.GradientAccumulationModel.from_model(
        model, microbatch_size=found.best.rows
    )
    ```
    """
    if memory_limit is not None:
        check_positive(
            memory_limit,
            "`memory_limit` must be a positive number of bytes, or None. "
            f"Received: memory_limit={memory_limit!r}",
            Real,
        )
    data = verifiable.data_of(model, x, y, sample_weight)
    verifiable.check_rows(model, first_batch.rows_of(data))
    if not model.built:
        with model.distribute_strategy.scope():
            compat.build_by(
                model, keras.utils.unpack_x_y_sample_weight(data)[0]
            )
    probe = Probe(model, data)
    limit = probe.device_bytes() if memory_limit is None else memory_limit
    # The update is the same whatever steps recompute.
    boundary = probe.update_bytes()
    sizes = sizes_of(probe, boundary, limit, is_recomputed=False)
    most = max((each.rows for each in sizes if each.fits), default=0)
    try:
        others, layers, note = recomputed_sizes(
            model, data, boundary, limit, timed=most
        )
    except (ImportError, RuntimeError, ValueError) as error:
        others, layers, note = [], [], f"Layers are not recomputed: {error}"
        gc.collect()
    if others and others[0].activations > WORTH * sizes[0].activations:
        others, layers = [], []
        note = "Layers are not recomputed: it saves too little."
    sizes += others
    return Plan(tuple(sizes), limit, tuple(layers), note)


def recomputed_sizes(
    model: keras.Model, data, boundary: int, limit: int, timed: int
) -> tuple[list[Size], list[str], str]:
    """Returns the sizes with layers recomputed: all that can be.

    Args:
        model: The model.
        data: As for `Probe`.
        boundary: As for `sizes_of`.
        limit: As for `sizes_of`.
        timed: As for `sizes_of`.

    Returns:
        The sizes, the names of the layers, and a note on the others.
    """
    layers, left_out = rematerialization.names_of_layers(model), []
    while True:
        try:
            with rematerialization.recomputed(model, layers):
                probe = Probe(model, data)
                sizes = sizes_of(probe, boundary, limit, True, timed)
            break
        except NotRepeatable as error:
            names = error.first().names
            refused = [name for name in layers if name in names]
            if not refused or len(refused) == len(layers):
                first = error.first()
                raise first from None
        layers = [name for name in layers if name not in refused]
        left_out += refused
        # Keras's frames, and those below with the batch, and the error keep
        # each other alive.
        gc.collect()
    note = f"These cannot be recomputed: {', '.join(left_out)}"
    return sizes, layers, note if left_out else ""


def sizes_of(
    probe: Probe,
    boundary: int,
    limit: int,
    is_recomputed: bool,
    timed: int = 0,
) -> list[Size]:
    """Returns the sizes, most rows first; the largest that fit are timed.

    Args:
        probe: What tries steps.
        boundary: Bytes that come and go in the update.
        limit: Bytes that there are.
        is_recomputed: Whether the probe recomputes layers.
        timed: Only sizes of more rows than this are timed.
    """
    kept, room = probe.kept_bytes(), probe.free_bytes()
    free = limit - sum(kept.values())
    needs = Line(probe.step_bytes)
    measure = needs.plan
    if not probe.is_compiled:
        measure = functools.partial(needs.run, room=room)
    sizes = list(itertools.islice(halves(probe.rows), SIZES))
    measure(sizes)
    while needs(sizes[-1]) > free and sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
        measure(sizes)
    fitting = [n for n in sizes if max(needs(n), boundary) <= free]
    to_time = [n for n in fitting if n > timed and needs(n) <= room][:TIMED]
    speeds = {n: probe.rows_per_second(n) for n in to_time}
    return [
        Size(
            rows=n,
            is_recomputed=is_recomputed,
            **kept,
            activations=needs(n),
            boundary=boundary,
            is_measured=n in needs.known,
            fits=n in fitting,
            rows_per_second=speeds.get(n),
        )
        for n in sizes
    ]


def halves(rows: int) -> Iterator[int]:
    """Yields a number of rows, half of them, and so on, down to 1."""
    while rows:
        yield rows
        rows //= 2
