"""Schedules against loops by hand, in training, and saved with a model."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from keras_accum import schedules
from tests import test_utils

SCHEDULES = {
    "constants": lambda **kwargs: schedules.PiecewiseConstant(
        [7, 40, 41], [2, 1, 5, 3], **kwargs
    ),
    "up": lambda **kwargs: schedules.LinearRamp(1, 6, 50, **kwargs),
    "down": lambda **kwargs: schedules.LinearRamp(6, 2, 50, **kwargs),
    "parsed": lambda **kwargs: schedules.parse("0:1 10:4 0.03K:2", **kwargs),
}

# What each gives after `seen` updates, samples or tokens.
BY_HAND = {
    "constants": lambda seen: (
        2 if seen < 7 else 1 if seen < 40 else 5 if seen < 41 else 3
    ),
    # Division of what is not negative rounds down.
    "up": lambda seen: 1 + 5 * min(seen, 50) // 50,
    "down": lambda seen: (6 * 50 - 4 * min(seen, 50)) // 50,
    "parsed": lambda seen: 1 if seen < 10 else 4 if seen < 30 else 2,
}


def sizes_by_hand(name, microbatch, updates):
    """Returns the first windows, counting what each micro-batch has."""
    sizes, seen = [], 0
    for _ in range(updates):
        sizes.append(BY_HAND[name](seen))
        seen += sizes[-1] * microbatch
    return sizes


class ValuesTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters(*SCHEDULES)
    def test_updates(self, name):
        schedule = SCHEDULES[name]()
        self.assertEqual(
            [schedule(updates) for updates in range(60)],
            [BY_HAND[name](updates) for updates in range(60)],
        )

    @parameterized.product(
        name=tuple(SCHEDULES),
        unit=("samples", "tokens"),
        microbatch=(1, 3, 8, 100),
    )
    def test_counts_from_itself(self, name, unit, microbatch):
        schedule = SCHEDULES[name](unit=unit, microbatch=microbatch)
        self.assertEqual(
            [schedule(updates) for updates in range(60)],
            sizes_by_hand(name, microbatch, updates=60),
        )

    @parameterized.parameters(*SCHEDULES)
    def test_depends_on_the_updates_alone(self, name):
        expected = sizes_by_hand(name, 3, updates=60)
        schedule = SCHEDULES[name](unit="samples", microbatch=3)
        for updates in np.random.default_rng(0).permutation(60):
            self.assertEqual(schedule(int(updates)), expected[updates])
        # As after a restart, without the calls before.
        restarted = SCHEDULES[name](unit="samples", microbatch=3)
        self.assertEqual(restarted(9), expected[9])

    def test_returns_ints_from_numpy(self):
        for schedule in (
            schedules.PiecewiseConstant(np.array([5]), np.array([1, 4])),
            schedules.LinearRamp(np.int64(1), np.int64(4), np.int64(9)),
        ):
            for updates in (0, 9):
                self.assertIs(type(schedule(updates)), int)

    @parameterized.parameters(0, 1, 10**12)
    def test_no_boundary(self, updates):
        self.assertEqual(schedules.PiecewiseConstant([], [3])(updates), 3)
        self.assertEqual(schedules.LinearRamp(3, 3, 10)(updates), 3)

    def test_new_value_at_the_boundary_unlike_keras(self):
        ours = schedules.PiecewiseConstant([5], [1, 4])
        theirs = keras.optimizers.schedules.PiecewiseConstantDecay(
            [5], [1.0, 4.0]
        )
        self.assertEqual([ours(4), ours(5), ours(6)], [1, 4, 4])
        self.assertEqual([float(theirs(u)) for u in (4, 5, 6)], [1, 1, 4])

    # More levels than updates: some numbers are passed over.
    @parameterized.parameters((1, 100, 7), (100, 1, 7), (2, 1, 1), (3, 5, 1000))
    def test_ramp_is_the_line_rounded_down(self, initial, final, duration):
        ramp = schedules.LinearRamp(initial, final, duration)
        for updates in range(duration + 2):
            seen = min(updates, duration)
            line = initial * duration + (final - initial) * seen
            self.assertEqual(ramp(updates), line // duration)

    def test_long_runs_need_no_loop(self):
        # A loop over these updates would run for years.
        schedule = schedules.parse("0:1 1T:2", unit="tokens", microbatch=3)
        # ceil(10**12 / 3) windows begin before the boundary.
        before = -(-(10**12) // 3)
        self.assertEqual(schedule(before - 1), 1)
        self.assertEqual(schedule(before), 2)
        self.assertEqual(schedule(10**18), 2)


class ParseTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        ("0:3", [], [3]),
        ("0:1 500:4 2000:16", [500, 2000], [1, 4, 16]),
        ("  0:1\n1.5M:4 ", [1_500_000], [1, 4]),
        ("0:1 2K:2 0.25B:3 1T:4", [2000, 250 * 10**6, 10**12], [1, 2, 3, 4]),
        ("0K:1 7.0:2", [7], [1, 2]),
    )
    def test_reads(self, text, boundaries, values):
        self.assertEqual(
            schedules.parse(text, "tokens", microbatch=8),
            schedules.PiecewiseConstant(boundaries, values, "tokens", 8),
        )


class TrainingTest(test_utils.TestCase, parameterized.TestCase):
    # The ramp is 1 + rows / 10, rounded down, and a micro-batch has 4 rows: the
    # windows begin after 0, 4, 8, 12, 20 and 32 of them.
    @parameterized.named_parameters(
        (
            "updates",
            schedules.PiecewiseConstant([1, 3], [1, 2, 3]),
            [1, 2, 2, 3, 3],
        ),
        (
            "samples",
            schedules.LinearRamp(1, 3, 20, "samples", microbatch=4),
            [1, 1, 1, 2, 3, 3],
        ),
    )
    def test_trains_as_with_the_large_batches(self, schedule, sizes):
        batches = test_utils.microbatches([4] * sum(sizes))
        model = test_utils.accumulating(accum_steps=schedule)
        expected = test_utils.mlp()
        initial = [w.astype("float64") for w in model.get_weights()]
        for each in (model, expected):
            each.compile(
                keras.optimizers.SGD(0.1), loss=test_utils.crossentropy()
            )
        expected.run_eagerly = True
        model.fit(test_utils.dataset(batches), verbose=0)
        ends = np.cumsum(sizes)
        windows = [
            test_utils.concatenate(batches[end - size : end])
            for size, end in zip(sizes, ends, strict=True)
        ]
        test_utils.train_on(expected, windows)
        self.assertEqual(int(model.optimizer.iterations), len(sizes))
        self.assertSameTraining(model, expected, initial)

    @parameterized.parameters("flush", "drop", "carry")
    @test_utils.first_command(2)
    def test_updates_of_two_epochs(self, policy):
        schedule = schedules.LinearRamp(1, 6, 7)
        model = test_utils.accumulating(
            accum_steps=schedule, partial_window=policy
        )
        model.compile("sgd", loss=test_utils.crossentropy())
        batches = test_utils.microbatches([2] * 17)
        model.fit(test_utils.dataset(batches), epochs=2, verbose=0)
        updates = position = 0
        for _ in range(2):
            for _ in batches:
                if position == 0:
                    size = 1 + 5 * min(updates, 7) // 7
                position += 1
                if position == size:
                    updates, position = updates + 1, 0
            if policy != "carry":
                updates += policy == "flush" and position > 0
                position = 0
        self.assertEqual(int(model.optimizer.iterations), updates)

    @parameterized.parameters(1, 4)
    @test_utils.first_command(1)
    def test_one_trace_for_all_windows(self, steps):
        # The first micro-batch and the further ones are a program each.
        counted, constant_traces = test_utils.counting_traces()
        constant = test_utils.mlp(counted, accum_steps=lambda updates: 4)
        counted, traces = test_utils.counting_traces()
        model = test_utils.mlp(
            counted, accum_steps=schedules.parse("0:1 2:2 4:3 6:4")
        )
        dataset = test_utils.dataset(test_utils.microbatches([2] * 16))
        for each in (constant, model):
            each.compile(
                "sgd", loss=test_utils.crossentropy(), steps_per_execution=steps
            )
            each.fit(dataset, verbose=0)
        # 1 + 1 + 2 + 2 + 3 + 3 + 4 micro-batches, against 4 windows of 4.
        self.assertEqual(int(model.optimizer.iterations), 7)
        self.assertEqual(int(constant.optimizer.iterations), 4)
        self.assertNotEmpty(traces)
        self.assertLen(traces, len(constant_traces))


class SerializationTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.product(
        name=tuple(SCHEDULES), kwargs=({}, {"unit": "samples", "microbatch": 3})
    )
    def test_round_trip(self, name, kwargs):
        schedule = SCHEDULES[name](**kwargs)
        config = keras.saving.serialize_keras_object(schedule)
        copy = keras.saving.deserialize_keras_object(config)
        self.assertIsNot(copy, schedule)
        self.assertEqual(copy, schedule)
        self.assertEqual(
            [copy(updates) for updates in range(60)],
            [schedule(updates) for updates in range(60)],
        )

    # Five micro-batches, and then three that are one window. They would be
    # several if the schedule began again.
    @parameterized.parameters(
        # 1 + 2 + 2.
        (schedules.PiecewiseConstant([1, 3], [1, 2, 3]), 3),
        # 1 + 1 + 1 + 2, as above.
        (schedules.LinearRamp(1, 3, 20, "samples", microbatch=4), 4),
    )
    def test_model_goes_on_from_a_file(self, schedule, updates):
        batches = test_utils.microbatches([4] * 8)
        model = test_utils.accumulating(accum_steps=schedule)
        model.compile("sgd", loss=test_utils.crossentropy())
        model.fit(test_utils.dataset(batches[:5]), verbose=0)
        self.assertEqual(int(model.optimizer.iterations), updates)
        path = f"{self.get_temp_dir()}/model.keras"
        model.save(path)
        loaded = keras.models.load_model(path)
        self.assertIsInstance(loaded, keras_accum.GradientAccumulationModel)
        self.assertIsNot(loaded.accum_steps, schedule)
        self.assertEqual(loaded.accum_steps, schedule)
        loaded.fit(test_utils.dataset(batches[5:]), verbose=0)
        self.assertEqual(int(loaded.optimizer.iterations), updates + 1)

    def test_equal_by_configuration(self):
        some = [make() for make in SCHEDULES.values()]
        some += [make(unit="samples") for make in SCHEDULES.values()]
        some += [make(unit="tokens") for make in SCHEDULES.values()]
        others = [type(s).from_config(s.get_config()) for s in some]
        for index, schedule in enumerate(some):
            equal = [schedule == other for other in others]
            self.assertEqual(equal, [i == index for i in range(len(some))])
            self.assertEqual(hash(schedule), hash(others[index]))
        self.assertLen(set(some + others), len(some))
        self.assertNotEqual(schedules.PiecewiseConstant([], [3]), 3)

    def test_configuration_is_a_copy(self):
        schedule = schedules.PiecewiseConstant([5], [1, 4])
        schedule.get_config()["values"][1] = 8
        self.assertEqual(schedule(5), 4)

    def test_shows_its_arguments(self):
        self.assertEqual(
            repr(schedules.LinearRamp(1, 8, 100, "tokens", microbatch=32)),
            "LinearRamp(initial=1, final=8, duration=100, unit='tokens', "
            "microbatch=32)",
        )


class ErrorTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.product(
        name=("initial", "final", "duration", "microbatch"),
        value=(0, -3, 2.0, True, "8", None),
    )
    def test_number(self, name, value):
        arguments = {"initial": 1, "final": 4, "duration": 9, "unit": "tokens"}
        error = ValueError if value in (0, -3) else TypeError
        with self.assertRaisesRegex(
            error, f"`{name}` must be a positive integer.*{name}={value!r}"
        ):
            schedules.LinearRamp(**arguments | {name: value})

    @parameterized.product(
        name=("boundaries", "values"),
        value=(500, None, [0], [-1], [True], [2.5], ["8"], "8"),
    )
    def test_sequence(self, name, value):
        arguments = {"boundaries": [500], "values": [1, 4]}
        error = ValueError if value in ([0], [-1]) else TypeError
        with self.assertRaisesRegex(
            error, f"`{name}` must be a sequence of positive .*{name}="
        ):
            schedules.PiecewiseConstant(**arguments | {name: value})

    @parameterized.parameters(([5, 5],), ([7, 5],))
    def test_boundaries_that_do_not_increase(self, boundaries):
        with self.assertRaisesRegex(
            ValueError, "`boundaries` must increase.*boundaries=.*5.*Leave out"
        ):
            schedules.PiecewiseConstant(boundaries, [1, 2, 3])

    @parameterized.parameters(([],), ([1],), ([1, 2, 3],))
    def test_values_that_are_not_one_more(self, values):
        with self.assertRaisesRegex(
            ValueError, "`values` must have one entry more .*values="
        ):
            schedules.PiecewiseConstant([5], values)

    @parameterized.product(
        make=tuple(SCHEDULES.values()), unit=("steps", None, "Samples")
    )
    def test_unit(self, make, unit):
        with self.assertRaisesRegex(
            ValueError, f'`unit` must be one of "updates".*unit={unit!r}'
        ):
            make(unit=unit)

    @parameterized.parameters(*SCHEDULES.values())
    def test_microbatch_without_a_unit(self, make):
        with self.assertRaisesRegex(
            ValueError, "`microbatch` must be left out .*microbatch=32.*Set"
        ):
            make(microbatch=32)

    @parameterized.parameters(
        "",
        "500",
        "0:1 500",
        "0:1, 500:4",
        "0:1 500:0",
        "0:1 500:-4",
        "0:1 500:2.5",
        "0:1 0.5:4",
        "0:1 1.0005K:4",
        "0:1 5Q:4",
        "0:1 -5:4",
        "1:1 500:4",
        "0:1 500:4 500:8",
        "0:1 500:4 0.5K:8",
        "0:1 500:4 20:8",
    )
    def test_text(self, text):
        with self.assertRaisesRegex(
            ValueError, f"`text` must be pairs .*text='{text}'. Write it as"
        ):
            schedules.parse(text)

    @parameterized.parameters(None, 4, ([(0, 1)],), b"0:1")
    def test_text_that_is_none(self, text):
        with self.assertRaisesRegex(
            TypeError, "`text` must be a string.*of type"
        ):
            schedules.parse(text)


if __name__ == "__main__":
    tf.test.main()
