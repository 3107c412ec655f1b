"""Weights and state equal those of one big batch, whatever is compiled."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from tests import test_utils

SIZES = ([8, 7, 5, 3], [4, 4, 4, 4], [1, 9, 9, 1])


def windows(dtype="float32", sizes=SIZES):
    return [
        test_utils.microbatches(each, seed, dtype)
        for seed, each in enumerate(sizes)
    ]


OPTIMIZERS = {
    "sgd": lambda **kw: keras.optimizers.SGD(0.1, **kw),
    "momentum": lambda **kw: keras.optimizers.SGD(0.1, momentum=0.9, **kw),
    "nesterov": lambda **kw: keras.optimizers.SGD(
        0.1, momentum=0.9, nesterov=True, **kw
    ),
    "rmsprop": lambda **kw: keras.optimizers.RMSprop(
        0.01, momentum=0.5, centered=True, **kw
    ),
    "adam": lambda **kw: keras.optimizers.Adam(0.01, **kw),
    "amsgrad": lambda **kw: keras.optimizers.Adam(0.01, amsgrad=True, **kw),
    "adamw": lambda **kw: keras.optimizers.AdamW(0.01, **kw),
    "adadelta": lambda **kw: keras.optimizers.Adadelta(1.0, **kw),
    "adagrad": lambda **kw: keras.optimizers.Adagrad(0.1, **kw),
    "adamax": lambda **kw: keras.optimizers.Adamax(0.01, **kw),
    "adafactor": lambda **kw: keras.optimizers.Adafactor(0.01, **kw),
    "nadam": lambda **kw: keras.optimizers.Nadam(0.01, **kw),
    "ftrl": lambda **kw: keras.optimizers.Ftrl(0.1, **kw),
    "lion": lambda **kw: keras.optimizers.Lion(0.01, **kw),
    "lamb": lambda **kw: keras.optimizers.Lamb(0.01, **kw),
    "muon": lambda **kw: keras.optimizers.Muon(0.01, **kw),
    "schedule_free": lambda **kw: keras.optimizers.ScheduleFreeAdamW(
        0.01, **kw
    ),
}
# Older releases of Keras do not have all.
NEWER = {"muon": "Muon", "schedule_free": "ScheduleFreeAdamW"}
OPTIMIZERS = {
    name: make
    for name, make in OPTIMIZERS.items()
    if name not in NEWER or hasattr(keras.optimizers, NEWER[name])
}
# Muon normalizes by Newton-Schulz iterations, which amplify rounding.
AMPLIFIES = ("muon",)
# What Keras sets its slots to in `build` is lost where a trace builds it.
BEGINS_ELSEWHERE_IN_A_TRACE = ("schedule_free",)

OPTIONS = {
    "clipnorm": {"clipnorm": 0.05},
    "clipvalue": {"clipvalue": 0.01},
    "global_clipnorm": {"global_clipnorm": 0.05},
    "weight_decay": {"weight_decay": 0.1},
    "ema": {"use_ema": True, "ema_momentum": 0.5},
    "ema_overwrite": {
        "use_ema": True,
        "ema_momentum": 0.5,
        "ema_overwrite_frequency": 2,
    },
    "loss_scale": {"loss_scale_factor": 128.0},
}


class OptimizerTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.named_parameters((name, name) for name in OPTIMIZERS)
    @test_utils.first_command(
        "_sgd",
        "_adam",
        "_rmsprop",
        "_adafactor",
        "_muon",
        "_schedule_free",
        second=(),
    )
    def test_every_optimizer(self, name):
        tolerance = 1e-4 if name in AMPLIFIES else 1e-5
        _, expected = self.assertTrainsAlike(
            test_utils.mlp,
            lambda: {
                "optimizer": OPTIMIZERS[name](),
                "loss": test_utils.crossentropy(),
            },
            windows(),
            tolerance,
            traces_reference=name in BEGINS_ELSEWHERE_IN_A_TRACE,
        )
        self.assertEqual(int(expected.optimizer.iterations), 3)

    def test_every_optimizer_of_keras_is_listed(self):
        shipped = {
            name
            for name, value in vars(keras.optimizers).items()
            if isinstance(value, type)
            and issubclass(value, keras.optimizers.Optimizer)
        }
        tested = {type(make()).__name__ for make in OPTIMIZERS.values()}
        # These wrap other optimizers, and have tests of their own.
        wrappers = {"LossScaleOptimizer", "MultiOptimizer"}
        self.assertEqual(shipped - {"Optimizer"} - wrappers, tested)

    @parameterized.named_parameters((name, name) for name in OPTIONS)
    @test_utils.first_command(
        "_global_clipnorm",
        "_ema_overwrite",
        second=("_loss_scale", "_clipvalue"),
    )
    def test_every_option(self, name):
        self.assertTrainsAlike(
            test_utils.mlp,
            lambda: {
                "optimizer": OPTIMIZERS["adam"](**OPTIONS[name]),
                "loss": test_utils.crossentropy(),
            },
            windows(),
        )

    def test_schedule_counts_updates(self):
        actual, expected = self.assertTrainsAlike(
            test_utils.mlp,
            lambda: {
                "optimizer": keras.optimizers.SGD(
                    keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5)
                ),
                "loss": test_utils.crossentropy(),
            },
            windows(),
        )
        # 0.5 halved at each of three updates.
        self.assertAllClose(actual.optimizer.learning_rate, 0.0625)
        self.assertAllClose(expected.optimizer.learning_rate, 0.0625)

    def test_constraint(self):
        def build(cls, **kwargs):
            keras.utils.set_random_seed(7)
            inputs = keras.Input((test_utils.FEATURES,))
            outputs = keras.layers.Dense(
                3, kernel_constraint=keras.constraints.UnitNorm()
            )(inputs)
            return cls(inputs, outputs, **kwargs)

        self.assertTrainsAlike(
            build,
            lambda: {
                "optimizer": OPTIMIZERS["sgd"](),
                "loss": test_utils.crossentropy(),
            },
            windows(),
        )

    @test_utils.needs_multi_optimizer
    def test_multi_optimizer(self):
        def optimizer():
            kernels, biases = keras.optimizers.Adam(0.01), OPTIMIZERS["sgd"]()
            return keras.optimizers.MultiOptimizer(
                lambda v: kernels if v.name == "kernel" else biases
            )

        self.assertTrainsAlike(
            test_utils.mlp,
            lambda: {
                "optimizer": optimizer(),
                "loss": test_utils.crossentropy(),
            },
            windows(),
        )


class LossTest(test_utils.TestCase, parameterized.TestCase):
    # All pairs. Keras cannot add a scalar to unreduced losses.
    @parameterized.parameters(
        ("sum_over_batch_size", False, "l2"),
        ("sum_over_batch_size", True, None),
        ("mean", False, None),
        ("mean", True, "l2"),
        ("mean_with_sample_weight", False, None),
        ("mean_with_sample_weight", True, "l2"),
        ("sum", False, "l2"),
        ("sum", True, None),
        (None, False, None),
        (None, True, None),
    )
    @test_utils.first_command(1, 4, 6, 9)
    def test_every_reduction(self, reduction, weights, regularizer):
        rng = np.random.default_rng(3)
        batches = windows()
        if weights:
            batches = [
                [
                    (x, y, rng.uniform(0, 2, len(x)).astype("float32"))
                    for x, y in window
                ]
                for window in batches
            ]
        self.assertTrainsAlike(
            lambda *args, **kwargs: test_utils.mlp(
                *args, regularizer=regularizer, **kwargs
            ),
            lambda: {
                "optimizer": OPTIMIZERS["sgd"](),
                "loss": test_utils.crossentropy(reduction=reduction),
            },
            batches,
        )

    @parameterized.parameters(
        "sum_over_batch_size", "mean", "mean_with_sample_weight", "sum"
    )
    @test_utils.first_command(3)
    def test_masks_and_weights(self, reduction):
        self.check_masks(reduction, weights=True)

    @parameterized.parameters(
        "sum_over_batch_size", "mean", "mean_with_sample_weight", "sum"
    )
    @test_utils.first_command(second=(0,))
    def test_masks(self, reduction):
        self.check_masks(reduction, weights=False)

    def check_masks(self, reduction, weights):
        lengths = [12, 3, 2, 1]
        batches = []
        rng = np.random.default_rng(0)
        for _ in range(3):
            window = []
            for length in lengths:
                tokens = rng.integers(1, 9, (2, 12))
                tokens[:, length:] = 0
                labels = rng.integers(0, 5, (2, 12))
                batch = (tokens, labels)
                if weights:
                    weight = rng.uniform(0, 2, (2, 12)).astype("float32")
                    batch = (*batch, weight)
                window.append(batch)
            batches.append(window)
        self.assertTrainsAlike(
            tagger,
            lambda: {
                "optimizer": OPTIMIZERS["sgd"](),
                "loss": test_utils.crossentropy(reduction=reduction),
            },
            batches,
        )

    @pytest.mark.thorough
    def test_ignored_class(self):
        rng = np.random.default_rng(0)
        batches = [
            [
                (
                    rng.integers(1, 9, (2, 12)),
                    rng.integers(0, 5, (2, 12)) * (np.arange(12) < length),
                )
                for length in (12, 3, 2, 1)
            ]
            for _ in range(3)
        ]
        self.assertTrainsAlike(
            tagger,
            lambda: {
                "optimizer": OPTIMIZERS["sgd"](),
                "loss": test_utils.crossentropy(ignore_class=0),
            },
            batches,
        )

    def test_fully_masked_microbatch_counts_for_nothing(self):
        tokens = np.random.default_rng(0).integers(1, 9, (2, 12))
        labels = tokens % 5
        window = [(tokens, labels), (np.zeros_like(tokens), labels)]
        self.assertTrainsAlike(
            tagger,
            lambda: {
                # Keras's Adam takes an embedding's repeated rows one by one.
                "optimizer": OPTIMIZERS["sgd"](),
                "loss": test_utils.crossentropy(),
            },
            [window] * 3,
        )

    def test_outputs_with_loss_weights(self):
        batches = [
            [
                (x, {"a": y, "b": np.eye(3, dtype="float32")[y]})
                for x, y in window
            ]
            for window in windows()
        ]
        self.assertTrainsAlike(
            two_headed,
            lambda: {
                "optimizer": OPTIMIZERS["sgd"](),
                "loss": {"a": test_utils.crossentropy(), "b": "mse"},
                "loss_weights": {"a": 0.3, "b": 2.0},
                "metrics": {"a": ["accuracy"], "b": ["mae"]},
            },
            batches,
        )

    def test_add_loss_and_activity_regularizer(self):
        self.assertTrainsAlike(
            with_added_losses,
            lambda: {
                "optimizer": OPTIMIZERS["sgd"](),
                "loss": test_utils.crossentropy(),
            },
            windows(),
        )

    def test_no_compiled_loss(self):
        self.assertTrainsAlike(
            functools.partial(with_added_losses, loss_on_outputs=True),
            lambda: {"optimizer": OPTIMIZERS["sgd"]()},
            [[(x,) for x, _ in window] for window in windows()],
        )

    def test_overridden_compute_loss_and_metrics(self):
        def build(cls, **kwargs):
            class Mine(cls):
                def compute_loss(self, x, y, y_pred, sample_weight, training):
                    error = keras.ops.square(y_pred - keras.ops.one_hot(y, 3))
                    return keras.ops.mean(error) + sum(self.losses)

                def compute_metrics(self, x, y, y_pred, sample_weight=None):
                    logs = super().compute_metrics(x, y, y_pred, sample_weight)
                    return logs | {"constant": 3.0}

            return test_utils.mlp(Mine, regularizer="l2", **kwargs)

        self.assertTrainsAlike(
            build, lambda: {"optimizer": OPTIMIZERS["sgd"]()}, windows()
        )

    def test_overridden_weight(self):
        def build(cls, **kwargs):
            class Mine(cls):
                def compute_loss(self, x, y, y_pred, sample_weight, training):
                    return keras.ops.sum(y_pred * y_pred) / 10.0

                def microbatch_weight(self, x, y, y_pred, sample_weight):
                    return None

            return test_utils.mlp(Mine, **kwargs)

        self.assertTrainsAlike(
            build, lambda: {"optimizer": OPTIMIZERS["sgd"]()}, windows()
        )

    @parameterized.parameters(False, True)
    @test_utils.first_command(0)
    def test_overridden_weight_and_regularizers(self, jit_compile):
        def build(cls, **kwargs):
            class Sum(cls):
                def compute_loss(self, x, y, y_pred, sample_weight, training):
                    return keras.ops.sum(y_pred * y_pred) + sum(self.losses)

                def microbatch_weight(self, x, y, y_pred, sample_weight):
                    return None

            return test_utils.mlp(Sum, regularizer="l2", **kwargs)

        self.assertTrainsAlike(
            build,
            lambda: {
                "optimizer": keras.optimizers.SGD(0.001),
                "jit_compile": jit_compile,
            },
            windows(),
        )

    def said_to_sum(self):
        """Returns a model whose override says so, and whose loss is a mean."""

        class Sum(keras_accum.GradientAccumulationModel):
            def microbatch_weight(self, x, y, y_pred, sample_weight=None):
                return None

        model = test_utils.mlp(Sum, regularizer="l2", accum_steps=2)
        model.compile("sgd", loss=test_utils.crossentropy(), jit_compile=False)
        return model

    def test_regularizers_that_may_count_twice_are_warned_of(self):
        model = self.said_to_sum()
        with self.assertWarnsRegex(UserWarning, "may count more than once"):
            model.train_step(test_utils.microbatches([4])[0])

    def test_an_override_is_asked_before_regularizers_count(self):
        # In a loop by hand, nothing was measured. It warns of nothing.
        model = self.said_to_sum()
        batch = tuple(map(tf.constant, test_utils.microbatches([4])[0]))
        tf.function(model.train_step, autograph=False)(batch)
        self.assertTrue(model._accumulation.losses.is_sum)

    @parameterized.parameters("sum_over_batch_size", "mean_with_sample_weight")
    @test_utils.first_command(0)
    def test_a_window_of_weight_zero_regularizes(self, reduction):
        batches = [
            [(x, y, np.zeros(len(x))) for x, y in window]
            for window in windows()
        ]
        self.assertTrainsAlike(
            functools.partial(test_utils.mlp, regularizer="l2"),
            lambda: {
                "optimizer": OPTIMIZERS["sgd"](),
                "loss": test_utils.crossentropy(reduction=reduction),
            },
            batches,
        )

    @parameterized.parameters(False, True)
    @test_utils.first_command(0)
    def test_loss_that_returns_a_scalar(self, is_masked):
        def loss(y_true, y_pred):
            return keras.ops.mean((y_pred - y_true) ** 2)

        rng = np.random.default_rng(0)
        rows = [[2, 1, 5], [3, 3, 3], [1, 1, 4]]
        self.assertTrainsAlike(
            tagger if is_masked else test_utils.mlp,
            lambda: {"optimizer": OPTIMIZERS["sgd"](), "loss": loss},
            [
                [
                    (rng.integers(0, 9, (n, 12)), rng.normal(size=(n, 12, 5)))
                    if is_masked
                    else (rng.normal(size=(n, 6)), rng.normal(size=(n, 3)))
                    for n in window
                ]
                for window in rows
            ],
        )

    def test_loss_with_a_call_operator_of_its_own(self):
        class Mine(keras.losses.Loss):
            def __call__(self, y_true, y_pred, sample_weight=None):
                return keras.ops.mean(y_pred - keras.ops.one_hot(y_true, 3))

        self.assertTrainsAlike(
            test_utils.mlp,
            lambda: {"optimizer": OPTIMIZERS["sgd"](), "loss": Mine()},
            windows(),
        )

    def test_inexact_weights_are_warned_of_once(self):
        def scalar(y, y_pred):
            return keras.ops.mean(keras.ops.square(y_pred - y))

        model = test_utils.accumulating(test_utils.mlp, accum_steps=2)
        model.compile("sgd", loss=scalar, jit_compile=False)
        # Keras multiplies the mean by the mean of the weights.
        batch = (np.ones((2, 6)), np.ones((2, 3)), np.array([1.0, 2.0]))
        with self.assertWarnsRegex(UserWarning, "One weight per micro-batch"):
            model.train_on_batch(*batch)
        model.compile("sgd", loss=model.loss, jit_compile=False)
        with test_utils.no_warnings():
            model.train_on_batch(*batch)

    def test_class_weight(self):
        sizes = [8, 8, 8, 8] * 3
        batches = test_utils.microbatches(sizes)
        x, y = test_utils.concatenate(batches)
        expected, actual = test_utils.mlp(), test_utils.accumulating()
        initial = expected.get_weights()
        histories = []
        for model, batch_size in ((expected, 32), (actual, 8)):
            model.compile(
                "sgd", loss=test_utils.crossentropy(), jit_compile=False
            )
            model.run_eagerly = model is expected
            histories.append(
                model.fit(
                    x,
                    y,
                    batch_size,
                    shuffle=False,
                    verbose=0,
                    class_weight={0: 0.5, 1: 3.0, 2: 1.0},
                ).history
            )
        self.assertSameWeights(
            actual.get_weights(), expected.get_weights(), initial
        )
        self.assertAllClose(*histories)


class PrecisionTest(test_utils.TestCase, parameterized.TestCase):
    def tearDown(self):
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")
        super().tearDown()

    @parameterized.parameters(("adam", False), ("lamb", True))
    @test_utils.first_command(0)
    def test_float64(self, name, jit_compile):
        self.check_float64(name, jit_compile)

    @parameterized.parameters(
        ("sgd", False),
        ("sgd", True),
        ("adam", True),
        ("adamw", False),
        ("adamw", True),
        ("lamb", False),
    )
    @test_utils.first_command(second=(3,))
    def test_float64_of_others(self, name, jit_compile):
        self.check_float64(name, jit_compile)

    def check_float64(self, name, jit_compile):
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
        self.assertTrainsAlike(
            test_utils.mlp,
            lambda: {
                "optimizer": OPTIMIZERS[name](),
                "loss": test_utils.crossentropy(),
                "jit_compile": jit_compile,
            },
            windows("float64"),
            tolerance=1e-12,
        )

    @parameterized.parameters(
        ("mixed_float16", True),
        ("mixed_bfloat16", False),
        ("bfloat16", False),
        ("float16", False),
    )
    @test_utils.first_command(1, 3)
    def test_half_precision(self, policy, jit_compile):
        self.check_half_precision(policy, jit_compile)

    @parameterized.parameters(
        ("mixed_float16", False),
        ("mixed_bfloat16", True),
        ("bfloat16", True),
        ("float16", True),
    )
    @test_utils.first_command(second=(2,))
    def test_half_precision_of_others(self, policy, jit_compile):
        self.check_half_precision(policy, jit_compile)

    def check_half_precision(self, policy, jit_compile):
        keras.config.set_dtype_policy(policy)
        # Activations keep 8 bits (bfloat16) or 11, and so do the gradients:
        # about 1 in 100 after three updates; weights of 8 bits move in steps.
        tolerance = 0.5 if policy == "bfloat16" else 0.05
        actual, _ = self.assertTrainsAlike(
            test_utils.mlp,
            lambda: {
                "optimizer": OPTIMIZERS["sgd"](),
                "loss": test_utils.crossentropy(),
                "jit_compile": jit_compile,
            },
            windows(),
            tolerance,
        )
        for buffer in test_utils.accumulator(actual).buffers:
            self.assertEqual(buffer.dtype, tf.float32)
        is_scaled = isinstance(
            actual.optimizer, keras.optimizers.LossScaleOptimizer
        )
        self.assertEqual(is_scaled, policy == "mixed_float16")

    def test_loss_scale_changes_at_boundaries_only(self):
        keras.config.set_dtype_policy("mixed_float16")
        model = test_utils.accumulating()
        model.compile("sgd", loss=test_utils.crossentropy(), jit_compile=False)
        scales = []
        (x, y), *others = test_utils.microbatches([4] * 4)
        before = model.get_weights()
        for batch in [(x * np.inf, y), *others]:
            model.train_on_batch(*batch)
            scales.append(float(model.optimizer.dynamic_scale))
        # Keras halves the scale and skips the update when one is not finite.
        self.assertAllEqual(scales, [2.0**15] * 3 + [2.0**14])
        self.assertAllClose(before, model.get_weights(), 0, 0)
        self.assertEqual(int(model.optimizer.iterations), 0)


def tagger(cls, **kwargs):
    """Labels each token; token 0 is masked."""
    keras.utils.set_random_seed(7)
    tokens = keras.Input((None,), dtype="int32")
    hidden = keras.layers.Embedding(9, 4, mask_zero=True)(tokens)
    hidden = keras.layers.LSTM(4, return_sequences=True)(hidden)
    return cls(tokens, keras.layers.Dense(5)(hidden), **kwargs)


def masked_and_not(cls, regularizer=None, **kwargs):
    """Returns a model with two outputs, of which one has a mask."""
    keras.utils.set_random_seed(7)
    tokens = keras.Input((None,), dtype="int32")
    hidden = keras.layers.Embedding(9, 4, mask_zero=True)(tokens)
    pooled = keras.layers.GlobalAveragePooling1D()(hidden)
    outputs = [
        keras.layers.Dense(5, kernel_regularizer=regularizer)(hidden),
        keras.layers.Dense(5)(pooled),
    ]
    return cls(tokens, outputs, **kwargs)


def two_headed(cls, **kwargs):
    """Returns a model with two named outputs."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((test_utils.FEATURES,))
    outputs = {
        "a": keras.layers.Dense(3, name="a")(inputs),
        "b": keras.layers.Dense(3, name="b")(inputs),
    }
    return cls(inputs, outputs, **kwargs)


class AddsLoss(keras.layers.Layer):
    """Adds the mean square of its input to the losses."""

    def call(self, inputs):
        self.add_loss(0.1 * keras.ops.mean(keras.ops.square(inputs)))
        return inputs


def with_added_losses(cls, loss_on_outputs=False, **kwargs):
    """Returns a model with an `add_loss` and with two kinds of regularizer."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((test_utils.FEATURES,))
    hidden = keras.layers.Dense(
        8, activity_regularizer="l2", kernel_regularizer="l1"
    )(inputs)
    outputs = keras.layers.Dense(3)(AddsLoss()(hidden))
    if loss_on_outputs:
        outputs = AddsLoss()(outputs)
    return cls(inputs, outputs, **kwargs)


@pytest.mark.thorough
class LossInMicrobatchesTest(LossTest):
    """The same on whole batches, which are split into micro-batches."""

    microbatch_size = 3


@pytest.mark.thorough
class PrecisionInMicrobatchesTest(PrecisionTest):
    """The same on whole batches, which are split into micro-batches."""

    microbatch_size = 3


if __name__ == "__main__":
    tf.test.main()
