"""How many rows make a micro-batch."""

import tensorflow as tf

from keras_accum import microbatch_size


class SizeTest(tf.test.TestCase):
    def test_given(self):
        size = microbatch_size.MicrobatchSize(4)
        self.assertEqual((size.value, size.rows, size.is_auto), (4, 4, False))
        self.assertIsNone(microbatch_size.MicrobatchSize(None).rows)

    def test_found(self):
        size = microbatch_size.MicrobatchSize("auto")
        self.assertTrue(size.is_auto)
        self.assertIsNone(size.rows)
        self.assertEqual(size.to_try(16), 16)
        with self.assertLogs("absl", "WARNING"):
            self.assertTrue(size.record_fit(8))
        self.assertEqual(size.value, 8)
        # A short batch says nothing of longer ones.
        self.assertFalse(size.record_fit(3))
        self.assertTrue(size.record_fit(12))
        # A failure leaves a limit, which is kept.
        size.limit = 5
        self.assertEqual(size.to_try(16), 5)
        self.assertTrue(size.record_fit(5))
        self.assertEqual((size.value, size.to_try(3)), (5, 3))


if __name__ == "__main__":
    tf.test.main()
