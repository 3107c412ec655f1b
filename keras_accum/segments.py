"""Which layers are computed a second time together, to keep the least.

A layer that is recomputed keeps what it is given. Of layers that follow one
another, recomputed as one, only the first keeps it; but what passes between
them is all there at once, on the way back, with its gradients. As ordinary
code, for layers that are given tensors of some sizes:

```python
kept = sum(sizes[start] for start in starts)
at_once = max(2 * sum(sizes[start + 1 : stop]) for start, stop in segments)
starts = min(all_starts, key=lambda starts: kept + at_once)
```

So many layers alike, one behind the other, are cut into about as many segments
as the square root of their number. What comes and goes in a layer that has
layers of its own is not known; no two of these are computed together.

References: T. Chen et al., "Training Deep Nets with Sublinear Memory Cost",
2016.
"""

import math
from collections.abc import Iterator
from collections.abc import Sequence

from keras_accum.compat import Link

# What passes between layers, and its gradients.
WITH_GRADIENTS = 2
# How many bounds are tried from one to its double.
PER_OCTAVE = 3


def starts(chains: Sequence[Sequence[Link]]) -> list[list[int]]:
    """Returns where segments begin, for each chain of layers.

    What is kept adds up, over all chains; one segment after the other is there
    at once.

    Returns:
        For each chain, the places of the layers that begin a segment; 0 first.
    """
    best, least = [[0] for _ in chains], math.inf
    for bound in bounds(chains):
        found = [fewest(chain, bound) for chain in chains]
        total = WITH_GRADIENTS * bound + sum(kept for kept, _ in found)
        if total < least:
            best, least = [places for _, places in found], total
    return best


def bounds(chains: Sequence[Sequence[Link]]) -> Iterator[float]:
    """Yields what may pass between layers, from all of a chain to nothing."""
    bound = float(
        max(
            (sum(each.size for each in chain[1:]) for chain in chains),
            default=0,
        )
    )
    while bound >= 1:
        yield bound
        bound /= 2 ** (1 / PER_OCTAVE)
    yield 0


def fewest(chain: Sequence[Link], bound: float) -> tuple[int, list[int]]:
    """Returns the least that is kept, and where the segments begin.

    Args:
        chain: The layers.
        bound: The most that passes between the layers of a segment.
    """
    count = len(chain)
    # Of the layers from each one on.
    kept, stops = [0] * (count + 1), [0] * count
    for start in reversed(range(count)):
        least, passing, large = math.inf, 0, 0
        for stop in range(start + 1, count + 1):
            large += chain[stop - 1].is_large
            if passing > bound or large > 1:
                break
            # Of equals, the one with fewer segments.
            if kept[stop] <= least:
                least, stops[start] = kept[stop], stop
            passing += chain[stop].size if stop < count else 0
        kept[start] = chain[start].size + int(least)
    places, place = [], 0
    while place < count:
        places.append(place)
        place = stops[place]
    return kept[0], places
