"""The table of sizes that `plan` returns, and what it says to do."""

import dataclasses

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Size:
    """What micro-batches of a number of rows need, on each device.

    Attributes:
        rows: Rows of a micro-batch on each device.
        is_recomputed: Whether layers are recomputed; see `Plan.layers`.
        weights: Bytes of the model's variables.
        buffers: Bytes of what a window gathers: gradients above all.
        optimizer: Bytes of the optimizer's variables.
        batch: Bytes of the batch that `fit` trains on, and of those that it
            makes ready meanwhile.
        activations: Bytes that come and go in a micro-batch's step.
        boundary: Bytes that come and go in the update.
        is_measured: Whether `activations` is of this size, and not a line
            through what others need.
        fits: Whether `total` is within the limit.
        rows_per_second: Of steps without the update; None if not timed.
    """

    rows: int
    is_recomputed: bool
    weights: int
    buffers: int
    optimizer: int
    batch: int
    activations: int
    boundary: int
    is_measured: bool
    fits: bool
    rows_per_second: float | None = None

    @property
    def microbatch_size(self) -> int:
        """The argument of the model; the same as `rows`."""
        return self.rows

    @property
    def total(self) -> int:
        """The most bytes at any time: step and update follow each other."""
        kept = self.weights + self.buffers + self.optimizer + self.batch
        return kept + max(self.activations, self.boundary)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found.

    Attributes:
        sizes: The sizes, most rows first; then those with layers recomputed.
        memory_limit: Bytes that there are on each device.
        layers: What to give to `rematerialize` for the sizes with
            `is_recomputed`: names of layers.
        note: Why there are no such sizes, or not with all layers; or "".
    """

    sizes: tuple[Size, ...]
    memory_limit: int
    layers: tuple[str, ...] = ()
    note: str = ""

    @property
    def best(self) -> Size | None:
        """The size with the most rows per second of those that fit.

        Of sizes that are not timed it is the one with the most rows. None if
        nothing fits.
        """
        return max(
            (each for each in self.sizes if each.fits),
            key=lambda each: (
                each.rows_per_second or 0.0,
                not each.is_recomputed,
                each.rows,
            ),
            default=None,
        )

    def __str__(self) -> str:
        """Returns a table in MiB, and what to do; "~" marks a forecast."""
        columns = (
            "weights",
            "buffers",
            "optimizer",
            "batch",
            "activations",
            "boundary",
            "total",
        )
        lines = [
            f"MiB on each device, of {self.memory_limit / MIB:,.0f}:",
            f"{'rows':>6}  {'recomputed':10}"
            + "".join(f"{name:>12}" for name in columns)
            + f"  {'fits':4}{'rows/s':>9}",
        ]
        for each in self.sizes:
            recomputed = "yes" if each.is_recomputed else "no"
            marks = {} if each.is_measured else {"activations": "~"}
            cells = [
                f"{marks.get(name, '')}{getattr(each, name) / MIB:,.1f}"
                for name in columns
            ]
            speed = each.rows_per_second
            line = (
                f"{each.rows:6}  {recomputed:10}"
                + "".join(f"{cell:>12}" for cell in cells)
                + f"  {'yes' if each.fits else 'no':4}"
                + ("" if speed is None else f"{speed:9,.0f}")
            )
            lines.append(line.rstrip())
        return "\n".join([*lines, *self._advice()])

    def _advice(self):
        if self.best is None:
            yield (
                "Nothing fits: make the model, its rows or the optimizer's "
                "state smaller."
            )
            return
        if self.best.is_recomputed:
            yield f"keras_accum.rematerialize(model, {list(self.layers)})"
        yield f"microbatch_size={self.best.rows}"
        if self.note:
            yield self.note
