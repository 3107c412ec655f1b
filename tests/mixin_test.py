"""What models that accumulate have of Keras."""

import tensorflow as tf

from tests import test_utils


class TrackingTest(test_utils.TestCase):
    def test_what_is_ours_is_not_tracked(self):
        model, plain = test_utils.accumulating(), test_utils.mlp()
        for each in (model, plain):
            each.compile("adam", loss=test_utils.crossentropy())
            test_utils.train_on(each, test_utils.microbatches([4] * 4))
        self.assertEqual(
            [(v.name, v.shape) for v in model.variables],
            [(v.name, v.shape) for v in plain.variables],
        )
        self.assertEqual(
            set(model._trackable_children()), set(plain._trackable_children())
        )


if __name__ == "__main__":
    tf.test.main()
