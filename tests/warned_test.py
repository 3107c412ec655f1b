"""What is said and refused."""

import tensorflow as tf

from keras_accum import warned


class WarnedTest(tf.test.TestCase):
    def test_names_what_it_speaks_of(self):
        for say in (warned.coupled, warned.coupled_layers, warned.driven):
            self.assertIn("`a`, `b`", say(["a", "b"]))
        self.assertIn("`microbatch_size`", warned.coupled(["a"]))
        self.assertIn("`update_step`", warned.driven(["a"]))

    def test_refuses_to_skip_a_share(self):
        warned.check_policy_of_share("skip_window")
        with self.assertRaisesRegex(ValueError, "couple the rows"):
            warned.check_policy_of_share("skip_microbatch")


if __name__ == "__main__":
    tf.test.main()
