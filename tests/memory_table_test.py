"""docs/choosing.md has the memory that models have, and its code runs."""

import re

import tensorflow as tf
from absl.testing import parameterized

from benchmarks import memory_table
from tests import test_utils


def page():
    return memory_table.PAGE.read_text(encoding="utf-8")


class TablesTest(test_utils.TestCase, parameterized.TestCase):
    def assert_is_in_page(self, name, lines):
        self.assertIn(memory_table.marked(name, lines), page())

    @parameterized.parameters("moments", "buffers")
    @test_utils.at_night
    def test_what_stays(self, name):
        self.assert_is_in_page(name, memory_table.TABLES[name]())

    @test_utils.at_night
    def test_what_comes_and_goes(self):
        strategy, missing = test_utils.chosen_strategy()
        if missing or strategy.num_replicas_in_sync != 2:
            self.skipTest("The table is of two replicas.")
        self.assert_is_in_page(
            "transient", memory_table.transient_table(strategy)
        )

    def test_every_replica_has_as_much(self):
        strategy, missing = test_utils.chosen_strategy()
        if missing:
            self.skipTest(missing)
        case = memory_table.Case("`accum_steps=4`")
        one = memory_table.persistent(memory_table.trained(case))
        with strategy.scope():
            replicated = memory_table.persistent(memory_table.trained(case))
        for name, value in one.items():
            self.assertAlmostEqual(replicated[name], value, 3, name)
        self.assertAlmostEqual(one["buffers"], 4)

    def test_writes_between_the_marks_of_the_page(self):
        for name in memory_table.TABLES:
            written = memory_table.with_table(page(), name, ["| a |"])
            self.assertNotEqual(written, page())
            self.assertIn(memory_table.marked(name, ["| a |"]), written)


class PageTest(tf.test.TestCase):
    def test_code_runs(self):
        names = {}
        blocks = re.findall(r"```python\n(.*?)```", page(), re.DOTALL)
        for block in blocks:
            exec(compile(block, memory_table.PAGE.name, "exec"), names)
        self.assertEqual(int(names["model"].optimizer.iterations), 2)
        self.assertEqual(names["accum_steps"](0), 1)
        mine = names["Mine"]([names["keras"].layers.Dense(1)], accum_steps=2)
        self.assertEqual(mine.accum_steps, 2)


if __name__ == "__main__":
    tf.test.main()
