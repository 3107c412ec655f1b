"""Layers that are recomputed together: the least that is kept."""

import itertools
import random

from absl.testing import absltest

from keras_accum import segments
from keras_accum.segments import Link


def spans(chain, starts):
    """Returns the segments of a chain, as lists of links."""
    stops = [*starts[1:], len(chain)]
    return [chain[a:b] for a, b in zip(starts, stops, strict=True)]


def kept(chain, starts):
    """Returns what is kept of a chain."""
    return sum(chain[start].size for start in starts)


def at_once(chain, starts):
    """Returns the most that passes between the layers of a segment."""
    return max(
        sum(each.size for each in span[1:]) for span in spans(chain, starts)
    )


def is_allowed(chain, starts):
    """Returns whether no two large layers are in a segment."""
    return all(
        sum(each.is_large for each in span) <= 1
        for span in spans(chain, starts)
    )


def total(chains, all_starts):
    """Returns the memory of chains that are cut somewhere."""
    pairs = list(zip(chains, all_starts, strict=True))
    return sum(kept(*pair) for pair in pairs) + 2 * max(
        at_once(*pair) for pair in pairs
    )


def ways(chain):
    """Returns all ways to cut a chain."""
    return [
        [0, *places]
        for count in range(len(chain))
        for places in itertools.combinations(range(1, len(chain)), count)
        if is_allowed(chain, [0, *places])
    ]


class StartsTest(absltest.TestCase):
    def test_near_the_least_of_all_ways(self):
        rng = random.Random(0)
        for _ in range(100):
            chains = [
                [
                    Link(rng.choice([1, 4, 16, 64, 100]), rng.random() < 0.3)
                    for _ in range(rng.randint(2, 6))
                ]
                for _ in range(rng.randint(1, 3))
            ]
            found = segments.starts(chains)
            least = min(
                total(chains, some)
                for some in itertools.product(*map(ways, chains))
            )
            with self.subTest(chains=chains):
                self.assertLessEqual(total(chains, found), 1.25 * least)
                self.assertTrue(all(map(is_allowed, chains, found)))

    def test_square_root_of_many_alike(self):
        (found,) = segments.starts([[Link(1)] * 200])
        # 20 are kept, and 9 with their gradients there at once.
        self.assertLessEqual(total([[Link(1)] * 200], [found]), 40)

    def test_no_two_large_together(self):
        (found,) = segments.starts([[Link(1, True)] * 4])
        self.assertEqual(found, [0, 1, 2, 3])

    def test_narrow_ones_are_kept(self):
        # Those of a transformer, many times: the wide one is not kept.
        chains = [[Link(8), Link(8, True)], [Link(8), Link(8), Link(32)]] * 6
        self.assertEqual(segments.starts(chains), [[0]] * 12)

    def test_no_chains(self):
        self.assertEqual(segments.starts([]), [])


if __name__ == "__main__":
    absltest.main()
