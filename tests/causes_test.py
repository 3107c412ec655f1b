"""What differences come from."""

import keras
import tensorflow as tf

import keras_accum
from keras_accum import causes
from keras_accum.coupling import Kind
from keras_accum.dry_run import Result
from keras_accum.findings import Findings


class CauseTest(tf.test.TestCase):
    def cause(self, findings, needs_denominators=False, **way):
        x = keras.Input((2,))
        model = keras_accum.GradientAccumulationModel(x, x, **way)
        result = Result(0.0, {}, {}, frozenset(), findings, needs_denominators)
        return causes.cause_of(model, result)

    def test_names_what_is_known(self):
        coupled = Findings(compute_loss=Kind.COUPLED)
        cause, way_out = self.cause(coupled, accum_steps=2)
        self.assertIn("`compute_loss`", cause)
        self.assertIn("`microbatch_size`", way_out)
        # With that it is computed of the whole.
        cause = self.cause(coupled, microbatch_size=2)
        self.assertEqual(cause, causes.UNKNOWN)
        layer = Findings(added=(Kind.COUPLED,), added_by=("experts",))
        cause, _ = self.cause(layer, microbatch_size=2)
        self.assertIn("`experts`", cause)
        cause = self.cause(Findings(), True, accum_steps=2)
        self.assertEqual(cause, causes.SEVERAL_WEIGHTS)

    def test_tries_weights(self):
        for agrees, expected in (
            (lambda weight_of: weight_of(3) == 3.0, "number of rows"),
            (lambda weight_of: weight_of(3) is None, "None"),
            (lambda weight_of: False, "there is none"),
        ):
            _, way_out = causes.own_cause(agrees)
            self.assertIn(expected, way_out)


if __name__ == "__main__":
    tf.test.main()
