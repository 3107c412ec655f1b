"""`verify`: whether a model is exact, and if not, why."""

import contextlib
import io
import pathlib
import re
import warnings

import keras
import pytest
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from tests import inner_test
from tests import own_steps_cases
from tests import own_steps_test
from tests import test_utils
from tests import whole_batch_test

ROOT = pathlib.Path(__file__).absolute().parent.parent
ACCUM_STEPS, MICROBATCH_SIZE = {"accum_steps": 2}, {"microbatch_size": 3}


class Own(keras_accum.GradientAccumulationModel):
    """Has a `train_step` of its own; classes below say with which loss."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.loss_of(y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_weights)
        self.accumulate(gradients, **self.weight_of(x))
        return {"loss": loss}

    def loss_of(self, y, y_pred):
        return tf.reduce_mean(tf.square(y_pred - y))

    def weight_of(self, x):
        return {"weight": tf.shape(x)[0]}


class Unweighted(Own):
    def weight_of(self, x):
        return {}


class Summed(Own):
    def loss_of(self, y, y_pred):
        return tf.reduce_sum(tf.square(y_pred - y))


class Contrastive(Own):
    def loss_of(self, y, y_pred):
        return whole_batch_test.contrastive(y, y_pred)


class Teaching(Own):
    """Moves averages of its weights in each step."""

    def train_step(self, data):
        logs = super().train_step(data)
        for mean in self.average.weights:
            mean.assign(0.9 * mean + 0.1)
        return logs


class Parts(Own):
    """Calls its parts, as an autoencoder does its encoder, and not itself."""

    def __init__(self, parts, **kwargs):
        super().__init__(**kwargs)
        self.parts = parts

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            for part in self.parts:
                x = part(x)
            loss = self.loss_of(y[:, :2], x)
        gradients = tape.gradient(loss, self.trainable_weights)
        self.accumulate(gradients, tf.shape(x)[0])
        return {"loss": loss}

    def call(self, inputs):
        raise NotImplementedError


def own(cls=None, **kwargs):
    keras.utils.set_random_seed(3)
    x = keras.Input((5,))
    hidden = keras.layers.Dropout(0.5)(keras.layers.Dense(8)(x))
    model = cls(x, keras.layers.Dense(4)(hidden), **kwargs)
    model.compile("sgd", jit_compile=False)
    return model


class VerifyTest(test_utils.TestCase, parameterized.TestCase):
    def verify(self, model, rows=11):
        x, y = whole_batch_test.arrays(rows)
        before = self.state(model)
        found = keras_accum.verify(model, x, y)
        self.assertAllClose(self.state(model), before, 0, 0)
        return found

    def state(self, model):
        variables = [*model.variables, *model.optimizer.variables]
        return [each.numpy() for each in variables]

    @parameterized.product(
        way=(ACCUM_STEPS, MICROBATCH_SIZE),
        case=(
            ("mse", True, True),
            (keras.losses.Dice(), False, True),
        ),
    )
    @test_utils.first_command(second=(2,))
    def test_compiled_losses(self, way, case):
        loss, with_accum_steps, with_microbatch_size = case
        cls = keras_accum.GradientAccumulationModel
        model = whole_batch_test.one_output(cls, **way)
        model.compile("adam", loss, metrics=["mae"], jit_compile=False)
        found = self.verify(model)
        is_exact = (
            with_accum_steps if "accum_steps" in way else (with_microbatch_size)
        )
        self.assertEqual(found.exact, is_exact)
        if not is_exact:
            self.assertIn("`dice`", found.differences[0].cause)
            self.assertIn("`microbatch_size`", str(found))
        # It trains as if nothing had been.
        x, y = whole_batch_test.arrays()
        other = whole_batch_test.one_output(cls, **way)
        other.compile("adam", loss, metrics=["mae"], jit_compile=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logs = [
                each.fit(x, y, batch_size=4, shuffle=False, verbose=0).history
                for each in (model, other)
            ]
        self.assertAllClose(logs[0], logs[1], 0, 0)

    def test_batch_normalization_is_by_design(self):
        model = whole_batch_test.normalized(
            keras_accum.GradientAccumulationModel, **ACCUM_STEPS
        )
        model.compile("adam", "mse", jit_compile=False)
        found = self.verify(model)
        self.assertFalse(found.exact)
        causes = {each.cause for each in found.differences if each.cause}
        self.assertLen(causes, 1)
        self.assertIn("BatchNormalization", causes.pop())
        # Its statistics are those of the large batch.
        states = [each for each in found.differences if each.what == "state"]
        self.assertLen(states, 2)
        self.assertLess(max(each.distance for each in states), 1e-5)

    @parameterized.parameters(
        (Own, None),
        (Unweighted, "number of rows"),
        (Summed, "None: the loss is a sum"),
        (Contrastive, "there is none"),
    )
    def test_steps_of_ones_own(self, cls, expected):
        found = self.verify(own(cls, **ACCUM_STEPS))
        self.assertEqual(found.exact, expected is None)
        if expected:
            self.assertIn(expected, found.differences[0].way_out)

    @parameterized.parameters(True, False)
    def test_a_step_that_assigns(self, trainable):
        x, y = whole_batch_test.arrays()
        model = own(Teaching, **ACCUM_STEPS)
        model.average = keras.models.clone_model(model)
        model.average.trainable = trainable
        if len(model.variables) == len(model.average.variables):
            self.skipTest("Functional models of this Keras do not list it.")
        found = keras_accum.verify(model, x, y)
        self.assertFalse(found.exact)
        self.assertEqual(found.differences[0].what, "state")
        self.assertIn("update_step", found.differences[0].way_out)
        # Weights that no step assigns are not listed as if one did.
        states = [each for each in found.differences if each.what == "state"]
        self.assertLen(states, len(model.average.weights))

    @parameterized.parameters(ACCUM_STEPS, MICROBATCH_SIZE)
    def test_a_step_that_never_calls_the_model(self, **way):
        x, y = whole_batch_test.arrays()
        model = Parts([keras.layers.Dense(4), keras.layers.Dense(2)], **way)
        model.compile("sgd", jit_compile=False)
        with self.assertRaisesRegex(ValueError, "must be built.*dense"):
            keras_accum.verify(model, x, y)
        model.fit(x, y, batch_size=3, verbose=0)
        self.assertFalse(model.built)
        found = keras_accum.verify(model, x, y)
        self.assertTrue(found.exact, str(found))
        self.assertGreaterEqual(len(found.differences), 4)

    @pytest.mark.thorough
    def test_layers(self):
        for reductions, expected in (
            ((inner_test.mean, inner_test.of_rows), "denominators"),
            ((inner_test.balance,), "couples rows"),
            ((inner_test.mean,), None),
        ):
            x = keras.Input((5,))
            hidden = x
            for reduce in reductions:
                hidden = inner_test.Adding(reduce)(hidden)
            layer = keras.layers.SpectralNormalization(keras.layers.Dense(4))
            model = keras_accum.GradientAccumulationModel(
                x, layer(keras.layers.Dense(3)(hidden)), **ACCUM_STEPS
            )
            model.compile("sgd", "mse", jit_compile=False)
            found = self.verify(model)
            # Without weights before it, an added loss has no gradient.
            if expected == "denominators":
                expected = None if found.exact else expected
            if expected:
                losses = [each for each in found.differences if each.cause]
                self.assertIn(expected, losses[0].cause)
            else:
                gradients = [
                    each
                    for each in found.differences
                    if each.what == "gradient"
                ]
                self.assertLess(max(each.distance for each in gradients), 1e-4)

    @pytest.mark.thorough
    def test_of_a_model_that_exists_on_replicas(self):
        strategy, _ = test_utils.chosen_strategy()
        for way in (ACCUM_STEPS, MICROBATCH_SIZE):
            with strategy.scope():
                model = whole_batch_test.one_output()
                model.compile("sgd", "mse", jit_compile=False)
                model = keras_accum.GradientAccumulationModel.from_model(
                    model, **way
                )
            self.assertTrue(self.verify(model).exact)

    @parameterized.parameters(
        {"accum_steps": 4}, {"microbatch_size": 5, "accum_steps": 1}
    )
    @test_utils.first_command(0)
    def test_several_optimizers(self, **way):
        model = own_steps_test.gan(**way)
        initial = model.get_weights()
        real, noise = own_steps_cases.gan_batches([16])[0]
        found = keras_accum.verify(model, real, noise)
        self.assertTrue(found.exact)
        names = [each.name for each in found.differences]
        self.assertLen(set(names), len(names))
        self.assertAllEqual(model.get_weights()[0], initial[0])

    def test_a_table_has_few_lines_of_what_is_equal(self):
        x = keras.Input((5,))
        deep = x
        for _ in range(8):
            deep = keras.layers.Dense(4)(deep)
        coupled = keras.layers.Dense(4, "sigmoid")(x)
        model = keras_accum.GradientAccumulationModel(
            x, [coupled, deep], **ACCUM_STEPS
        )
        model.compile("sgd", [keras.losses.Dice(), "mse"], run_eagerly=True)
        x, y = whole_batch_test.arrays()
        found = keras_accum.verify(model, x, [y, y])
        # The loss, and two variables for each layer.
        self.assertLen(found.differences, 19)
        different = sum(bool(each.cause) for each in found.differences)
        self.assertBetween(different, 2, 3)
        lines = str(found).splitlines()[2:]
        distances = [float(line.split()[0]) for line in lines[:-2]]
        self.assertLen(distances, different + 10)
        self.assertLess(distances[different], found.tolerance)
        self.assertEqual(
            lines[-2],
            f"and {19 - different - 10} more, all within {found.tolerance:.0e}",
        )
        self.assertStartsWith(lines[-1], "(1) the loss couples rows: `dice`")

    @pytest.mark.thorough
    def test_the_page_prints_what_it_says(self):
        page = ROOT / "docs" / "exactness.md"
        blocks = re.findall(
            r"```(python)?\n(.*?)```", page.read_text("utf-8"), re.DOTALL
        )
        texts = [text for _, text in blocks]
        self.assertLen(texts, 4)
        digits = re.compile(r"\d\.\de-\d\d")
        for code, said in zip(texts[::2], texts[1::2], strict=True):
            # Keras numbers layers.
            keras.utils.clear_session()
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(code, {})
            self.assertEqual(
                sorted(digits.sub("", printed.getvalue()).splitlines()),
                sorted(digits.sub("", said).splitlines()),
            )

    def test_refuses_what_it_cannot_verify(self):
        x, y = whole_batch_test.arrays()
        plain = whole_batch_test.one_output()
        plain.compile("sgd", "mse", jit_compile=False)
        with self.assertRaisesRegex(ValueError, "must accumulate"):
            keras_accum.verify(plain, x, y)
        model = whole_batch_test.one_output(
            keras_accum.GradientAccumulationModel, **ACCUM_STEPS
        )
        with self.assertRaisesRegex(ValueError, "must be compiled"):
            keras_accum.verify(model, x, y)
        model.compile("sgd", "mse", jit_compile=False)
        with self.assertRaisesRegex(ValueError, "at least 3"):
            keras_accum.verify(model, x[:2], y[:2])
        with self.assertRaisesRegex(ValueError, "same number of rows"):
            keras_accum.verify(model, x, y[:2])
        with self.assertRaisesRegex(ValueError, "must be one batch"):
            keras_accum.verify(model, tf.data.Dataset.from_tensors((x, y)))
        inputs = keras.Input(batch_shape=(4, 2, 5))
        model = keras_accum.GradientAccumulationModel(
            inputs, keras.layers.LSTM(1, stateful=True)(inputs), **ACCUM_STEPS
        )
        model.compile("sgd", "mse", jit_compile=False)
        with self.assertRaisesRegex(ValueError, "no stateful layers"):
            keras_accum.verify(model, tf.zeros((4, 2, 5)), tf.zeros((4, 1)))


if __name__ == "__main__":
    tf.test.main()
