"""Draws docs/window.png: what a window is, on one device and on two.

    python -m tools.draw_window

The colours are near to those of Okabe and Ito, which readers with colour
blindness can tell apart; every box also has its word.
"""

import pathlib
import sys

from matplotlib import figure
from matplotlib import patches

PICTURE = pathlib.Path(__file__).absolute().parent.parent / "docs/window.png"

MICROBATCH = "#0072B2"
BUFFER = "#E69F00"
EMPTY = "#FDF1D9"
UPDATE = "#007D5B"
BOUNDARY = "#EDEDED"
LINE = "#333333"
FAINT = "#777777"

ROWS = 8  # Of each micro-batch.
WIDTH, HEIGHT, STEP = 2.2, 1.05, 2.7
GAUGE, WIDE = 0.42, 2.95
LEFT, RIGHT = 0.15, 15.85
# From a micro-batch's lower edge to its buffer's upper edge.
GAP = 0.75
FONT = 10.5


def box(axes, x, y, text, color, width=WIDTH, ink="white") -> None:
    """Draws a box.

    Args:
        axes: Where to draw.
        x: The left edge.
        y: The lower edge.
        text: What stands in the middle.
        color: Of the box.
        width: From the left edge to the right one.
        ink: The colour of the text.
    """
    axes.add_patch(
        patches.Rectangle((x, y), width, HEIGHT, fc=color, lw=0, zorder=2)
    )
    note(axes, x + width / 2, y + HEIGHT / 2, text, color=ink, ha="center")


def buffer(axes, x, y, rows, share) -> None:
    """Draws a buffer, with a gauge that shows how full the window is.

    Args:
        axes: Where to draw.
        x: The left edge.
        y: The lower edge.
        rows: How many rows are in it.
        share: How much of the window that is.
    """
    box(axes, x, y, "", EMPTY)
    axes.add_patch(
        patches.Rectangle(
            (x, y), GAUGE, share * HEIGHT, fc=BUFFER, lw=0, zorder=3
        )
    )
    for width in (GAUGE, WIDTH):
        axes.add_patch(
            patches.Rectangle(
                (x, y), width, HEIGHT, fill=False, ec=BUFFER, lw=1.6, zorder=3
            )
        )
    middle = x + (GAUGE + WIDTH) / 2
    text = f"buffer\n{rows} rows"
    note(axes, middle, y + HEIGHT / 2, text, color="black", ha="center")


def arrow(axes, start, end, color=LINE) -> None:
    """Draws an arrow from one point to another."""
    axes.add_patch(
        patches.FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=13,
            lw=1.6,
            color=color,
            shrinkA=0,
            shrinkB=0,
            zorder=4,
        )
    )


def note(axes, x, y, text, **kwargs) -> None:
    """Writes beside what is drawn."""
    style = {"fontsize": FONT, "color": LINE, "ha": "left", "va": "center"}
    style |= {"linespacing": 1.15, "zorder": 4}
    axes.text(x, y, text, **style | kwargs)


def bracket(axes, left, right, y, text) -> None:
    """Draws a line over the micro-batches, with its text above."""
    axes.plot(
        [left, left, right, right],
        [y - 0.2, y, y, y - 0.2],
        color=LINE,
        lw=1.4,
        solid_joinstyle="miter",
    )
    note(axes, (left + right) / 2, y + 0.38, text, ha="center")


def device(axes, top, count, first, name=None) -> float:
    """Draws the micro-batches of one device, and its buffer after each.

    Args:
        axes: Where to draw.
        top: The upper edge of the micro-batches.
        count: How many micro-batches there are.
        first: The left edge of the first.
        name: What stands at the left, if anything.

    Returns:
        The height of the buffers' middle.
    """
    upper, lower = top - HEIGHT, top - 2 * HEIGHT - GAP
    for i in range(count):
        x = first + i * STEP
        box(axes, x, upper, f"micro-batch\n{ROWS} rows", MICROBATCH)
        arrow(axes, (x + WIDTH / 2, upper), (x + WIDTH / 2, lower + HEIGHT))
        note(
            axes,
            x + WIDTH / 2 + 0.15,
            upper - GAP / 2,
            f"{'+ ' if i else ''}{ROWS} × gradient",
            color=FAINT,
            fontsize=FONT - 1,
        )
        buffer(axes, x, lower, ROWS * (i + 1), (i + 1) / count)
        middle = lower + HEIGHT / 2
        if i:
            arrow(axes, (x - STEP + WIDTH, middle), (x, middle))
    if name:
        note(axes, LEFT, (top + lower) / 2, name, weight="bold")
    return middle


def boundary(axes, left, top, bottom) -> None:
    """Draws the ground of what happens at the end of a window."""
    axes.add_patch(
        patches.Rectangle(
            (left, bottom), RIGHT - left, top - bottom, fc=BOUNDARY, lw=0
        )
    )
    axes.plot([left, left], [bottom, top], color=LINE, ls=(0, (4, 3)), lw=1.6)
    middle = (left + RIGHT) / 2
    note(axes, middle, top - 0.4, "boundary", ha="center", weight="bold")


def one_device(axes, top) -> None:
    """Draws a window of four micro-batches."""
    note(axes, LEFT, top, "One device", weight="bold", fontsize=FONT + 2)
    first, left = LEFT + 0.15, 11.85
    bracket(
        axes,
        first,
        first + 3 * STEP + WIDTH,
        top - 1.35,
        "one window: 4 micro-batches, 32 rows",
    )
    middle = device(axes, top - 1.8, 4, first)
    boundary(axes, left, top - 0.8, middle - 0.8)
    x = 12.7
    arrow(axes, (first + 3 * STEP + WIDTH, middle), (x, middle))
    box(
        axes,
        x,
        middle - HEIGHT / 2,
        "update\nof the weights",
        UPDATE,
        width=WIDE,
    )
    note(
        axes,
        x + WIDE / 2,
        middle + 1.35,
        "buffer / 32 rows\n= mean gradient",
        ha="center",
    )


def two_devices(axes, top) -> None:
    """Draws a window of two micro-batches on each of two devices."""
    note(
        axes,
        LEFT,
        top,
        "Two devices (two replicas of the model)",
        weight="bold",
        fontsize=FONT + 2,
    )
    first, left = 2.1, 8.35
    end = first + STEP + WIDTH
    note(
        axes,
        (first + end) / 2,
        top - 0.98,
        "one window: 2 × 2\nmicro-batches, 32 rows",
        ha="center",
    )
    bracket(axes, first, end, top - 1.65, "")
    row = 2 * HEIGHT + GAP + 0.6
    middles = [
        device(axes, top - 2.05 - i * row, 2, first, f"device {i + 1}")
        for i in range(2)
    ]
    boundary(axes, left, top - 0.8, middles[1] - 0.8)
    mean = sum(middles) / 2
    width, x, update = 2.75, 9.0, 12.7
    box(
        axes,
        x,
        mean - HEIGHT / 2,
        "sum of buffers\n32 rows",
        BUFFER,
        width=width,
        ink="black",
    )
    for middle, edge in zip(
        middles, (mean + HEIGHT / 2, mean - HEIGHT / 2), strict=True
    ):
        corner = x + width / 2
        axes.plot([end, corner], [middle] * 2, color=LINE, lw=1.6, zorder=4)
        arrow(axes, (corner, middle), (corner, edge))
        box(
            axes,
            update,
            middle - HEIGHT / 2,
            "update\nof the weights",
            UPDATE,
            width=WIDE,
        )
        turn = (x + width + update) / 2
        axes.plot(
            [x + width, turn, turn],
            [mean, mean, middle],
            color=LINE,
            lw=1.6,
            zorder=4,
        )
        arrow(axes, (turn, middle), (update, middle))
    note(
        axes,
        update + WIDE / 2,
        mean,
        "sum / 32 rows\n= mean gradient",
        ha="center",
    )
    note(
        axes,
        corner,
        middles[0] + 0.75,
        "devices exchange\ndata only here",
        ha="center",
    )


def draw(path: pathlib.Path) -> None:
    """Writes the picture.

    Args:
        path: The PNG file to write.
    """
    height = 15.0
    picture = figure.Figure(figsize=(8, height / 2), dpi=150)
    axes = picture.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 16)
    axes.set_ylim(0, height)
    axes.axis("off")
    one_device(axes, height - 0.45)
    two_devices(axes, height - 6.2)
    picture.savefig(path)


def main() -> None:
    """Draws to the path given, or to the one in docs/."""
    draw(pathlib.Path(sys.argv[1]) if sys.argv[1:] else PICTURE)


if __name__ == "__main__":
    main()
