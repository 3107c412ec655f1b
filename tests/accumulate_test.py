"""`accumulate` called several times in a step, and with pairs."""

import os

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from keras_accum import accumulate
from tests import test_utils


def mean_square(values):
    return tf.reduce_mean(tf.square(values))


class Halves(keras_accum.GradientAccumulationModel):
    """Takes a micro-batch in two halves, as one with several captions."""

    def train_step(self, data):
        x, y = data
        half = tf.shape(x)[0] // 2
        for rows in (slice(None, half), slice(half, None)):
            with tf.GradientTape() as tape:
                loss = mean_square(self(x[rows]) - y[rows])
            gradients = tape.gradient(loss, self.trainable_weights)
            self.accumulate(gradients, tf.shape(x[rows])[0])
        return {"loss": loss}


class Both(keras.Model):
    """Two losses with denominators of their own, of some weights each."""

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        first, second = self.layers[1:]
        variables = {
            "first": first.trainable_variables,
            # In another order, and one of them is in both.
            "second": second.trainable_variables[::-1] + [first.bias],
        }
        counted = tf.cast(y[:, 0] > 0, tf.float32)
        with tf.GradientTape(persistent=True) as tape:
            hidden = first(x)
            losses = {
                "first": mean_square(hidden),
                "second": tf.math.divide_no_nan(
                    tf.reduce_sum(counted * second(hidden)[:, 0] ** 2),
                    tf.reduce_sum(counted),
                ),
            }
        weights = {"first": tf.shape(x)[0], "second": tf.reduce_sum(counted)}
        for name, loss in losses.items():
            pairs = zip(
                tape.gradient(loss, variables[name]),
                variables[name],
                strict=True,
            )
            self.take(pairs, weights[name])
        return {"loss": losses["first"]}

    def take(self, pairs, weight):
        self.accumulate(pairs, weight)


class AccumulatingBoth(keras_accum.GradientAccumulationMixin, Both):
    pass


def build(cls, **kwargs):
    keras.utils.set_random_seed(1)
    x = keras.Input((3,))
    hidden = keras.layers.Dense(4)(x)
    return cls(x, keras.layers.Dense(1)(hidden), **kwargs)


def arrays(rows=12):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 3)).astype("float32")
    return x, rng.normal(size=(rows, 1)).astype("float32")


def by_hand(model, windows, rate=0.1):
    """Trains `Both` by what its windows should give to SGD."""
    variables = model.trainable_weights
    for window in windows:
        totals = [np.zeros(each.shape) for each in variables]
        weights = [0.0] * len(variables)

        def take(pairs, weight, totals=totals, weights=weights):
            for gradient, variable in pairs:
                index = [each is variable for each in variables].index(True)
                totals[index] += float(weight) * gradient.numpy()
                weights[index] += float(weight)

        model.take = take
        for x, y in window:
            model.train_step((tf.constant(x), tf.constant(y)))
        for variable, total, weight in zip(
            variables, totals, weights, strict=True
        ):
            variable.assign_sub(rate * total / max(weight, 1e-9))


class AccumulateTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters({"accum_steps": 3}, {"microbatch_size": 4})
    def test_each_call_adds(self, **way):
        x, y = arrays()
        expected, actual = build(keras.Model), build(Halves, **way)
        initial = expected.get_weights()
        for model in (expected, actual):
            model.compile(keras.optimizers.SGD(0.1), "mse")
            rows = 4 if model is actual and "accum_steps" in way else 12
            model.fit(x, y, batch_size=rows, epochs=2, shuffle=False, verbose=0)
        self.assertSameWeights(
            actual.get_weights(), expected.get_weights(), initial
        )

    @parameterized.parameters(
        {"jit_compile": True},
        {"run_eagerly": True},
        {"steps_per_execution": 3},
    )
    def test_pairs_of_some_weights_count_by_their_own(self, **compile_args):
        x, y = arrays()
        expected, actual = build(Both), build(AccumulatingBoth, accum_steps=3)
        initial = expected.get_weights()
        actual.compile(keras.optimizers.SGD(0.1), **compile_args)
        # Two full windows, and a short one, in two epochs.
        actual.fit(x, y, batch_size=3, epochs=2, shuffle=False, verbose=0)
        batches = [(x[i : i + 3], y[i : i + 3]) for i in range(0, 12, 3)]
        by_hand(expected, 2 * [batches[:3], batches[3:]])
        self.assertSameWeights(
            actual.get_weights(), expected.get_weights(), initial
        )

    def test_on_replicas(self):
        strategy, _ = test_utils.chosen_strategy()
        x, y = arrays()
        expected = build(Both)
        initial = expected.get_weights()
        with strategy.scope():
            actual = build(AccumulatingBoth, accum_steps=2)
            # What it computes is not divided by the number of replicas.
            rate = 0.1 / strategy.num_replicas_in_sync
            actual.compile(keras.optimizers.SGD(rate))
        actual.fit(x, y, batch_size=6, shuffle=False, verbose=0)
        by_hand(expected, [[(x[:6], y[:6]), (x[6:], y[6:])]])
        self.assertSameWeights(
            actual.get_weights(), expected.get_weights(), initial
        )

    def test_goes_on_in_the_middle_of_a_window(self):
        x, y = arrays()
        weights = []
        for stops in (False, True):
            model = build(AccumulatingBoth, accum_steps=4)
            model.compile(keras.optimizers.SGD(0.1))
            for start in range(0, 12, 3):
                if stops and start == 6:
                    file = os.path.join(self.get_temp_dir(), "it.weights.h5")
                    model.save_weights(file)
                    model = build(AccumulatingBoth, accum_steps=4)
                    model.compile(keras.optimizers.SGD(0.1))
                    model.load_weights(file)
                model.train_on_batch(x[start : start + 3], y[start : start + 3])
            weights.append(model.get_weights())
        self.assertAllClose(weights[0], weights[1], 0, 0)

    def test_sums_of_several_sets_add_up(self):
        class Sums(keras_accum.GradientAccumulationModel):
            def train_step(self, data):
                kernel, bias = self.trainable_weights
                ones = tf.ones_like(kernel)
                self.accumulate([(ones, kernel), (tf.ones((1,)), bias)], None)
                self.accumulate([(ones, kernel)], None)
                return {}

        x = keras.Input((3,))
        model = Sums(x, keras.layers.Dense(1)(x), accum_steps=2)
        before = model.get_weights()
        model.compile(keras.optimizers.SGD(1.0))
        model.fit(np.ones((4, 3)), np.ones((4, 1)), batch_size=2, verbose=0)
        kernel, bias = (
            b - a for b, a in zip(before, model.get_weights(), strict=True)
        )
        self.assertAllClose(kernel, np.full((3, 1), 4.0))
        self.assertAllClose(bias, [2.0])

    def test_without_accumulation_each_call_applies(self):
        model = build(AccumulatingBoth)
        model.compile(keras.optimizers.SGD(0.1))
        x, y = arrays()
        model.fit(x, y, batch_size=12, verbose=0)
        self.assertEqual(int(model.optimizer.iterations), 2)

    def test_no_microbatch_may_be_skipped_in_part(self):
        model = build(Halves, accum_steps=2, nonfinite="skip_microbatch")
        model.compile("sgd")
        x, y = arrays()
        with self.assertRaisesRegex(ValueError, "call `accumulate` once"):
            model.fit(x, y, verbose=0)


class ByIndexTest(test_utils.TestCase):
    def test_orders_pairs(self):
        variables = [keras.Variable([1.0]), tf.Variable([2.0])]
        pairs = [("b", variables[1]), (None, variables[0].value)]
        found = accumulate.by_index(iter(pairs), variables)
        self.assertEqual(found, ([0, 1], [None, "b"]))
        found = accumulate.by_index(pairs[:1], variables)
        self.assertEqual(found, ([1], ["b"]))
        found = accumulate.by_index(["a", None], variables)
        self.assertEqual(found, ([0, 1], ["a", None]))

    def test_says_what_to_write(self):
        variables = [keras.Variable([1.0]), keras.Variable([2.0])]
        other = keras.Variable([3.0], name="other")
        for gradients, said in (
            (["a"], "one entry per variable"),
            ([("a", other)], "Received: other"),
            ([("a", variables[0])] * 2, "once"),
            (tf.zeros((2,)), "must be a list"),
        ):
            with self.assertRaisesRegex(ValueError, said):
                accumulate.by_index(gradients, variables)
        with self.assertRaisesRegex(ValueError, r"zip\(gradients, variables"):
            accumulate.check_weight(variables)
        accumulate.check_weight(tf.constant(3.0))


if __name__ == "__main__":
    tf.test.main()
