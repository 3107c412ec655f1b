"""What `evaluate` and `predict` call."""

import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from keras_accum import evaluation
from tests import test_utils


class FunctionsTest(test_utils.TestCase, parameterized.TestCase):
    def models(self, **mode):
        for size in (None, 3):
            model = test_utils.mlp(
                keras_accum.GradientAccumulationModel,
                microbatch_size=size,
            )
            model.compile("sgd", loss=test_utils.crossentropy(), **mode)
            yield model

    @parameterized.parameters(True, False)
    def test_micro_batches_say_what_the_batch_says(self, run_eagerly):
        x, y = test_utils.microbatches([7])[0]
        found = []
        for model in self.models(run_eagerly=run_eagerly):
            test = evaluation.make_test_function(model._accumulation)
            model._accumulation.window["losses"].make_tracker()
            data = tf.data.Dataset.from_tensors((x, y))
            model.reset_metrics()
            predict = evaluation.make_predict_function(model._accumulation)
            found.append(
                (
                    test(iter(data))["loss"],
                    predict([(tf.constant(x),), (tf.constant(x[:2]),)]),
                )
            )
        (loss, outputs), (other_loss, other_outputs) = found
        self.assertAllClose(loss, other_loss)
        self.assertAllClose(outputs, other_outputs)
        self.assertEqual(outputs.shape, (9, 3))


if __name__ == "__main__":
    tf.test.main()
