"""`Seesaw` against the rule by hand, plain Keras, and itself after restarts."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

from keras_accum import schedules
from tests import own_steps_cases
from tests import test_utils

decays = keras.optimizers.schedules

# What each is to a training of `DURATION` updates of `accum_steps`.
DURATION = 60
RATES = {
    "cosine": lambda: decays.CosineDecay(0.3, DURATION),
    "warm_up": lambda: decays.CosineDecay(
        0.0, 50, alpha=0.05, warmup_target=0.1, warmup_steps=10
    ),
    # A rate of exactly a half, then one that passes over a quarter.
    "steps": lambda: decays.PiecewiseConstantDecay(
        [20, 40, 50], [0.1, 0.05, 0.0125, 0.001]
    ),
    "line": lambda: decays.PolynomialDecay(0.3, DURATION, 0.0),
    "constant": lambda: decays.ExponentialDecay(0.3, 10, 1.0),
    "plateau": lambda: decays.PiecewiseConstantDecay(
        [5, 10, 30], [0.01, 0.1, 0.2, 0.02]
    ),
    "function": lambda: halved,
}


@keras.saving.register_keras_serializable("seesaw_test")
def halved(step):
    return 0.2 * 0.5 ** (step / 10)


@functools.cache
def rates_by_step(name):
    """Returns the rate at each step, and those of some further ones."""
    return rates_of(RATES[name](), 2 * DURATION)


def rates_of(rate, count):
    compiled = tf.function(rate)
    steps = [tf.constant(step, tf.int64) for step in range(count)]
    return np.array([float(compiled(step)) for step in steps])


def seesaw(name="warm_up", **kwargs):
    return schedules.Seesaw(RATES[name](), DURATION, **kwargs)


def by_hand(base, duration, accum_steps=1, maximum=64, rule="adam"):
    """Returns k and the rate of each update, looking at every step."""
    of_training = base[:duration]
    peak = base.max()
    top = int(of_training.argmax())
    sizes, rates, step = [], [], 0
    while step < duration + 20:
        # It falls only: what it has fallen to is what it is.
        lowest = of_training[min(step, duration - 1)]
        stage = 0
        while (
            step > top
            and accum_steps * 2 ** (stage + 1) <= maximum
            and lowest <= peak * 2.0 ** -(stage + 1) * (1 + 2**-21)
        ):
            stage += 1
        sizes.append(accum_steps * 2**stage)
        shrink = 2.0 ** (-stage / 2) if rule == "adam" else 1.0
        if step < top:
            rates.append(base[step])
        elif accum_steps * 2 ** (stage + 1) > maximum:
            rates.append(shrink * base[step] / 2.0**-stage)
        else:
            rates.append(peak * shrink)
        step += 2**stage
    return sizes, rates


class ValuesTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.product(
        name=tuple(RATES),
        kwargs=(
            {},
            {"rule": "sgd"},
            {"accum_steps": 3, "maximum": 20},
            {"maximum": 4, "rule": "sgd"},
        ),
    )
    def test_is_the_rule(self, name, kwargs):
        schedule = seesaw(name, **kwargs)
        sizes, rates = by_hand(rates_by_step(name), DURATION, **kwargs)
        found = [schedule(updates) for updates in range(len(sizes))]
        self.assertEqual(found, sizes)
        self.assertIs(type(found[0]), int)
        found = rates_of(schedule.learning_rate, len(rates))
        self.assertAllClose(found, rates, rtol=2e-6, atol=1e-8)

    # Powers of two are steps whose rates are known without a computation.
    def test_cuts_of_a_long_training(self):
        duration = 2**21
        rate = decays.PolynomialDecay(0.1, duration, 0.0)
        schedule = schedules.Seesaw(rate, duration, maximum=8)
        # The line is at 1/2, 1/4 and 1/8 after so many steps, of which the
        # second half is made of windows of 2, and so on.
        cuts = [2**20, 2**20 + 2**18, 2**20 + 2**18 + 2**16]
        for k, cut in zip((1, 2, 4), cuts, strict=True):
            self.assertEqual(schedule(cut - 1), k)
            self.assertEqual(schedule(cut), 2 * k)
            expected = 0.1 * (2 * k) ** -0.5
            self.assertAllClose(schedule.learning_rate(cut), expected)
        self.assertEqual(schedule(10**12), 8)

    def test_window_that_passes_a_cut_ends_first(self):
        # The cuts are at steps 3, 4 and 9. The second comes within the window
        # of 2 that begins at step 3, the third within that of steps 5 to 8.
        rate = decays.PiecewiseConstantDecay([2, 3, 8], [0.8, 0.4, 0.2, 0.1])
        schedule = schedules.Seesaw(rate, 20, rule="sgd")
        self.assertEqual(
            [schedule(updates) for updates in range(8)],
            [1, 1, 1, 2, 4, 8, 8, 8],
        )
        # Further boundaries of the same window are passed as well.
        rate = decays.PiecewiseConstantDecay([2, 3], [0.8, 0.4, 0.025])
        schedule = schedules.Seesaw(rate, 20, rule="sgd")
        self.assertEqual(
            [schedule(updates) for updates in range(6)], [1, 1, 1, 2, 32, 32]
        )

    @parameterized.parameters(*RATES)
    def test_is_the_schedule_itself_if_k_may_not_grow(self, name):
        schedule = seesaw(name, accum_steps=4, maximum=7)
        for updates in range(DURATION):
            self.assertEqual(schedule(updates), 4)
        self.assertAllClose(
            rates_of(schedule.learning_rate, 2 * DURATION), rates_by_step(name)
        )

    @parameterized.parameters(*RATES)
    def test_depends_on_the_updates_alone(self, name):
        schedule, restarted = seesaw(name), seesaw(name)
        expected = [schedule(u) for u in range(40)]
        rates = rates_of(schedule.learning_rate, 40)
        rate = tf.function(restarted.learning_rate)
        for u in np.random.default_rng(0).permutation(40):
            self.assertEqual(restarted(int(u)), expected[u])
            self.assertEqual(float(rate(tf.constant(u))), rates[u])

    @parameterized.product(name=("warm_up", "steps"), jit_compile=(False, True))
    def test_rate_is_traced_once(self, name, jit_compile):
        rate = seesaw(name, maximum=8).learning_rate
        compiled = tf.function(rate, jit_compile=jit_compile)
        # About one in each stage, and before and after them.
        for updates in (0, 5, 10, 20, 30, 35, 40, 45, 100):
            step = tf.constant(updates, tf.int64)
            self.assertEqual(compiled(step).dtype, tf.float32)
            self.assertAllClose(compiled(step), rate(updates))
        self.assertEqual(compiled.experimental_get_tracing_count(), 1)


class TrainingTest(test_utils.TestCase, parameterized.TestCase):
    OPTIMIZERS = {
        "adam": functools.partial(keras.optimizers.Adam, epsilon=1e-3),
        "sgd": functools.partial(keras.optimizers.SGD, momentum=0.9),
    }
    RATE = staticmethod(
        lambda: decays.CosineDecay(0.0, 10, warmup_target=0.1, warmup_steps=2)
    )

    def train(self, rule, strategy=None, **mode):
        """Trains by `Seesaw`, and by hand with what the rule says."""
        schedule = schedules.Seesaw(
            self.RATE(), 12, accum_steps=2, maximum=8, rule=rule
        )
        sizes, rates = by_hand(rates_of(self.RATE(), 40), 12, 2, 8, rule)
        # To the end of the 12 steps, or just beyond it.
        count = int(np.searchsorted(np.cumsum(sizes) // 2, 12)) + 1
        sizes, rates = sizes[:count], rates[:count]
        batches = test_utils.microbatches([4] * sum(sizes))
        with (strategy or tf.distribute.get_strategy()).scope():
            model = test_utils.accumulating(accum_steps=schedule)
            model.compile(
                self.OPTIMIZERS[rule](schedule.learning_rate),
                loss=test_utils.crossentropy(),
                **mode,
            )
        expected = test_utils.mlp()
        initial = [w.astype("float64") for w in expected.get_weights()]
        expected.compile(
            self.OPTIMIZERS[rule](0.1),
            loss=test_utils.crossentropy(),
            run_eagerly=True,
        )
        model.fit(
            test_utils.dataset(batches, known_length=True),
            shuffle=False,
            verbose=0,
        )
        ends = np.cumsum(sizes)
        for size, end, rate in zip(sizes, ends, rates, strict=True):
            expected.optimizer.learning_rate = rate
            window = test_utils.concatenate(batches[end - size : end])
            expected.train_on_batch(*window)
        self.assertGreater(len(set(sizes)), 2)
        self.assertEqual(test_utils.num_updates(model.optimizer), len(sizes))
        self.assertSameWeights(
            model.get_weights(), expected.get_weights(), initial
        )

    @parameterized.parameters("adam", "sgd")
    @test_utils.first_command(0)
    def test_is_plain_keras_on_the_windows(self, rule):
        self.train(rule)

    @parameterized.product(
        rule=("adam", "sgd"),
        mode=(
            {"jit_compile": True},
            {"jit_compile": True, "steps_per_execution": 5},
            {"steps_per_execution": 5},
        ),
    )
    @test_utils.first_command(0, 4)
    @pytest.mark.thorough
    def test_modes(self, rule, mode):
        self.train(rule, **mode)

    @parameterized.product(
        rule=("adam", "sgd"), mode=({}, {"jit_compile": True})
    )
    @test_utils.first_command(1)
    @pytest.mark.thorough
    def test_replicas(self, rule, mode):
        strategy, reason = test_utils.chosen_strategy()
        if strategy is None:
            self.skipTest(reason)
        self.train(rule, strategy, **mode)


class RateTest(test_utils.TestCase):
    def setUp(self):
        super().setUp()
        self.seesaw = schedules.Seesaw(decays.CosineDecay(0.1, 4), 4, maximum=2)

    def fit(self, optimizer):
        model = test_utils.accumulating(accum_steps=self.seesaw)
        model.compile(optimizer, test_utils.crossentropy(), jit_compile=False)
        batches = test_utils.microbatches([4] * 4)
        data = test_utils.dataset(batches, known_length=True)
        model.fit(data, shuffle=False, verbose=0)

    def test_one_that_does_not_follow_is_warned_of(self):
        with self.assertWarnsRegex(UserWarning, "the rate does not follow"):
            self.fit(keras.optimizers.SGD(0.1))

    def test_its_own_is_not_warned_of(self):
        for wrap in (lambda it: it, keras.optimizers.LossScaleOptimizer):
            optimizer = keras.optimizers.SGD(self.seesaw.learning_rate)
            with test_utils.no_warnings():
                self.fit(wrap(optimizer))

    def test_one_of_several_may_be_another(self):
        model = own_steps_cases.GAN(accum_steps=self.seesaw)
        optimizers = own_steps_cases.gan_optimizers()
        optimizers["d_optimizer"] = keras.optimizers.SGD(
            self.seesaw.learning_rate
        )
        model.compile(**optimizers, jit_compile=False)
        data = test_utils.dataset(
            own_steps_cases.gan_batches([4] * 4), known_length=True
        )
        with test_utils.no_warnings():
            model.fit(data, shuffle=False, verbose=0)


class RestartTest(test_utils.TestCase, parameterized.TestCase):
    def model(self):
        schedule = schedules.Seesaw(decays.CosineDecay(0.1, 12), 12, maximum=4)
        model = test_utils.accumulating(
            accum_steps=schedule, partial_window="carry"
        )
        model.compile(
            keras.optimizers.Adam(schedule.learning_rate),
            loss=test_utils.crossentropy(),
        )
        return model

    def assertSameState(self, model, other):
        pairs = zip(
            test_utils.all_state(model),
            test_utils.all_state(other),
            strict=True,
        )
        for mine, theirs in pairs:
            self.assertAllEqual(mine, theirs)

    def fit(self, model, batches, **kwargs):
        model.fit(test_utils.dataset(batches), verbose=0, **kwargs)

    # k is 1 up to the cut at step 6, 2 up to that at step 8, and then 4. After
    # 7 batches a window of 2 has begun.
    @parameterized.parameters(5, 7, 8, 10)
    @test_utils.first_command(1, second=(2,))
    def test_from_a_file(self, done):
        batches = test_utils.microbatches([4] * 16)
        model, other = self.model(), self.model()
        self.fit(model, batches)
        self.fit(other, batches[:done])
        path = f"{self.get_temp_dir()}/model.keras"
        other.save(path)
        loaded = keras.models.load_model(path)
        self.assertEqual(loaded.accum_steps, model.accum_steps)
        self.assertIsNot(loaded.accum_steps, model.accum_steps)
        self.fit(loaded, batches[done:])
        self.assertEqual(
            test_utils.num_updates(loaded.optimizer),
            test_utils.num_updates(model.optimizer),
        )
        self.assertSameState(loaded, model)

    @pytest.mark.thorough
    def test_from_weights(self):
        batches = test_utils.microbatches([4] * 16)
        model, other, restarted = (self.model() for _ in range(3))
        self.fit(model, batches)
        self.fit(other, batches[:7])
        path = f"{self.get_temp_dir()}/model.weights.h5"
        other.save_weights(path)
        restarted.optimizer.build(restarted.trainable_variables)
        restarted.load_weights(path)
        self.fit(restarted, batches[7:])
        self.assertSameState(restarted, model)

    @pytest.mark.thorough
    def test_from_a_backup(self):
        class Stop(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                if epoch == 1:
                    raise KeyboardInterrupt

        batches = test_utils.microbatches([4] * 8)
        whole, model, restarted = (self.model() for _ in range(3))
        self.fit(whole, batches, epochs=2)
        folder = self.get_temp_dir()
        with self.assertRaises(KeyboardInterrupt):
            backup = keras.callbacks.BackupAndRestore(folder)
            self.fit(model, batches, epochs=2, callbacks=[backup, Stop()])
        backup = keras.callbacks.BackupAndRestore(folder)
        self.fit(restarted, batches, epochs=2, callbacks=[backup])
        # Of the first epoch it has made none.
        self.assertSameState(restarted, whole)


class SerializationTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.product(
        name=tuple(RATES),
        kwargs=({}, {"accum_steps": 3, "maximum": 20, "rule": "sgd"}),
    )
    def test_round_trip(self, name, kwargs):
        schedule = seesaw(name, **kwargs)
        for each in (schedule, schedule.learning_rate):
            config = keras.saving.serialize_keras_object(each)
            copy = keras.saving.deserialize_keras_object(config)
            self.assertIs(type(copy), type(each))
            self.assertIsNot(copy, each)
            self.assertEqual(copy.get_config(), each.get_config())
            for updates in (0, 5, 10, 20, 30, 40, 100):
                self.assertEqual(copy(updates), each(updates))

    def test_equal_by_configuration(self):
        some = [seesaw(name) for name in RATES]
        some += [seesaw(maximum=8), seesaw(rule="sgd"), seesaw(accum_steps=2)]
        others = [type(s).from_config(s.get_config()) for s in some]
        for index, schedule in enumerate(some):
            equal = [schedule == other for other in others]
            self.assertEqual(equal, [i == index for i in range(len(some))])
            self.assertEqual(hash(schedule), hash(others[index]))
        self.assertLen(set(some + others), len(some))

    def test_shows_its_arguments(self):
        rate = decays.ExponentialDecay(0.5, 10, 0.25)
        self.assertEqual(
            repr(schedules.Seesaw(rate, 100, maximum=8)),
            "Seesaw(learning_rate=ExponentialDecay(initial_learning_rate=0.5, "
            "decay_steps=10, decay_rate=0.25, staircase=False, "
            "name='ExponentialDecay'), duration=100, accum_steps=1, maximum=8, "
            "rule='adam')",
        )
        self.assertEqual(
            repr(schedules.Seesaw(halved, 100)),
            "Seesaw(learning_rate=halved, duration=100, accum_steps=1, "
            "maximum=64, rule='adam')",
        )


class ErrorTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.product(
        name=("duration", "accum_steps", "maximum"),
        value=(0, -3, 2.0, True, "8", None),
    )
    def test_number(self, name, value):
        arguments = {"learning_rate": RATES["line"](), "duration": 60}
        error = ValueError if value in (0, -3) else TypeError
        with self.assertRaisesRegex(
            error, f"`{name}` must be a positive integer.*{name}={value!r}"
        ):
            schedules.Seesaw(**arguments | {name: value})

    @parameterized.parameters(0.1, None, "adam")
    def test_rate_that_is_no_schedule(self, rate):
        with self.assertRaisesRegex(
            TypeError, "`learning_rate` must be a schedule.*of type"
        ):
            schedules.Seesaw(rate, 60)

    def test_maximum_below_the_start(self):
        with self.assertRaisesRegex(
            ValueError, "`maximum` must be at least `accum_steps`.*=4.*=8"
        ):
            seesaw(accum_steps=8, maximum=4)

    @parameterized.parameters("adamw", None, 1)
    def test_rule(self, rule):
        with self.assertRaisesRegex(
            ValueError, f'`rule` must be one of "adam", "sgd".*rule={rule!r}'
        ):
            seesaw(rule=rule)

    @parameterized.parameters(0.0, -0.1, float("nan"), float("inf"))
    def test_rate_that_is_none(self, value):
        with self.assertRaisesRegex(
            ValueError, "`learning_rate` must return finite numbers"
        ):
            schedules.Seesaw(lambda step: value, 60)

    def test_rate_that_rises_again(self):
        rate = decays.CosineDecayRestarts(0.1, 20)
        with self.assertRaisesRegex(
            ValueError, "`learning_rate` must rise once.*at step"
        ):
            schedules.Seesaw(rate, 60)


if __name__ == "__main__":
    tf.test.main()
