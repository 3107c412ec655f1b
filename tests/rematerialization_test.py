"""What is recomputed: as it was without, and in less memory."""

import contextlib
import functools
import unittest

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import absltest
from absl.testing import parameterized

import keras_accum
from tests import test_utils

ROWS, LENGTH, WIDTH, VOCABULARY, CLASSES = 12, 6, 8, 11, 3
NONE = {"mode": None}
FULL = {"mode": "full"}
ACTIVATIONS = {"mode": "activations"}
LARGE = {"mode": "larger_than", "output_size_threshold": 40}
LISTED = {"mode": "list_of_layers", "layer_names": ["embedding", "block_0"]}
WINDOW, BATCH, PLAIN = {"accum_steps": 3}, {"microbatch_size": 4}, {}

needs_scope = unittest.skipUnless(
    hasattr(keras, "RematScope"), "Keras 3.9 has the first."
)


def mean_square(x):
    """Returns a scalar in single precision, as Keras adds up losses."""
    return keras.ops.mean(keras.ops.square(keras.ops.cast(x, "float32")))


def sum_square(x):
    """Returns a sum, which Keras divides by the rows."""
    return 0.01 * keras.ops.sum(keras.ops.square(keras.ops.cast(x, "float32")))


class Block(keras.layers.Layer):
    """Has all that a second call could do otherwise than the first."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = keras.layers.LayerNormalization()
        self.attention = keras.layers.MultiHeadAttention(
            2, WIDTH // 2, dropout=0.1
        )
        self.up = keras.layers.Dense(2 * WIDTH, activation="gelu")
        self.down = keras.layers.Dense(WIDTH, activity_regularizer=sum_square)
        self.batch_norm = keras.layers.BatchNormalization()
        self.dropout = keras.layers.Dropout(0.2)
        self.mean = keras.metrics.Mean(name="mean_square")
        self.supports_masking = True

    def build(self, shape):
        self.norm.build(shape)
        self.attention.build(shape, shape)
        self.up.build(shape)
        self.down.build((*shape[:-1], 2 * WIDTH))
        self.batch_norm.build(shape)
        self.scale = self.add_weight(shape=(), initializer="ones")
        self.calls = self.add_weight(
            shape=(), initializer="zeros", trainable=False
        )
        self.built = True

    def call(self, x):
        # What was assigned is read after it, and before it.
        before = keras.ops.convert_to_tensor(self.calls)
        self.calls.assign_add(1.0)
        normal = self.norm(x)
        x += self.dropout(self.attention(normal, normal))
        y = self.batch_norm(self.down(self.up(x)))
        square = mean_square(y)
        self.mean.update_state(square)
        self.add_loss(0.1 * square)
        return x + self.scale * self.dropout(y) * (
            1.0 + 0.1 * (before + self.calls)
        )


def network(scope=NONE, block=Block, blocks=1):
    """Returns inputs and outputs, with what is recomputed as `scope` says."""
    keras.utils.set_random_seed(0)
    with contextlib.ExitStack() as stack:
        if scope["mode"] is not None:
            stack.enter_context(keras.RematScope(**scope))
        inputs = keras.Input((LENGTH,), dtype="int32")
        x = keras.layers.Embedding(
            VOCABULARY, WIDTH, mask_zero=True, name="embedding"
        )(inputs)
        for index in range(blocks):
            x = block(name=f"block_{index}")(x)
        x = keras.layers.GlobalAveragePooling1D()(x)
        x = keras.layers.Dropout(0.3)(x)
        return inputs, keras.layers.Dense(CLASSES, "softmax")(x)


def rows(count=ROWS):
    """Returns token ids, some of them padded, and labels."""
    rng = np.random.default_rng(0)
    x = rng.integers(1, VOCABULARY, (count, LENGTH))
    x[::2, LENGTH - 2 :] = 0
    return x, rng.integers(0, CLASSES, count)


def trained(make, options, compiled, strategy=None, loss=None):
    """Returns variables, outputs and logs of a model that was trained."""
    x, y = rows()
    if loss is not None:
        y = keras.utils.to_categorical(y, CLASSES)
    with contextlib.ExitStack() as stack:
        if strategy is not None:
            stack.enter_context(strategy.scope())
        model = make(options)
        model.compile(
            keras.optimizers.SGD(0.01, momentum=0.9),
            loss or "sparse_categorical_crossentropy",
            metrics=["accuracy"],
            **compiled,
        )
    history = model.fit(
        x,
        y,
        batch_size=12 if options == BATCH else 4,
        epochs=2,
        shuffle=False,
        verbose=0,
    ).history
    logs = [*history.values(), model.evaluate(x, y, verbose=0)]
    variables = [np.asarray(v) for v in model.variables]
    return [*variables, model.predict(x, verbose=0), *map(np.array, logs)]


def functional(options, scope=NONE, blocks=1):
    """Returns the functional model."""
    return keras_accum.GradientAccumulationModel(
        *network(scope, blocks=blocks), **options
    )


def untraced(compiled):
    """Returns how a reference is compiled: XLA alone draws in its own way."""
    return compiled if compiled.get("jit_compile") else {"run_eagerly": True}


def plain(options, compiled):
    """Returns what a model without recomputing comes to."""
    return _plain(tuple(options.items()), tuple(untraced(compiled).items()))


@functools.cache
def _plain(options, compiled):
    return trained(functional, dict(options), dict(compiled))


class RematerializationTest(parameterized.TestCase):
    def assert_same(self, some, others):
        for a, b in zip(some, others, strict=True):
            # Outputs of all rows, and logs, add rounding of their own.
            atol = 2e-6 if np.size(a) != ROWS * CLASSES else 2e-5
            np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@needs_scope
class ScopeTest(RematerializationTest):
    @parameterized.parameters(
        (FULL, WINDOW, {"jit_compile": True}),
        (FULL, WINDOW, {"jit_compile": False}),
        (ACTIVATIONS, BATCH, {"jit_compile": False}),
        (LARGE, BATCH, {"run_eagerly": True}),
        (LISTED, PLAIN, {"jit_compile": False}),
        (LISTED, WINDOW, {"run_eagerly": True}),
        (ACTIVATIONS, BATCH, {"run_eagerly": True}),
        (LARGE, BATCH, {"jit_compile": True}),
    )
    @test_utils.first_command(1, second=(0, 3))
    def test_is_as_without(self, scope, options, compiled):
        make = functools.partial(functional, scope=scope)
        self.assert_same(
            trained(make, options, compiled),
            plain(options, compiled),
        )

    @parameterized.parameters(False, True)
    @test_utils.first_command(second=(0,))
    def test_replicas(self, jit_compile):
        strategy = test_utils.chosen_strategy()[0]
        make = functools.partial(functional, scope=FULL)
        compiled = {"jit_compile": jit_compile}
        self.assert_same(
            trained(make, WINDOW, compiled, strategy),
            trained(functional, WINDOW, compiled, strategy),
        )

    @pytest.mark.thorough
    def test_loss_that_couples_rows(self):
        some, others = (
            trained(
                functools.partial(functional, scope=scope),
                BATCH,
                compiled,
                loss=keras.losses.Dice(),
            )
            for scope, compiled in (
                (FULL, {"jit_compile": False}),
                (NONE, {"run_eagerly": True}),
            )
        )
        self.assert_same(some, others)

    @pytest.mark.thorough
    def test_half_precision(self):
        def run(scope):
            policy = keras.dtype_policies.get("mixed_bfloat16")
            keras.config.set_dtype_policy(policy)
            try:
                make = functools.partial(functional, scope=scope)
                # Eager steps round in another way, on some CPUs.
                return trained(make, WINDOW, {"jit_compile": False})
            finally:
                keras.config.set_dtype_policy("float32")

        for a, b in zip(run(FULL), run(NONE), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-3)


class Functions(keras.layers.Layer):
    """Recomputes a part of itself, as `recompute` does."""

    def __init__(self, recompute, **kwargs):
        super().__init__(**kwargs)
        self.block = Block()
        self.part = recompute(self.compute)
        self.supports_masking = True

    def build(self, shape):
        self.block.build(shape)
        self.built = True

    def compute(self, x, training, factors=None):
        return self.block(x, training=training) * factors["one"]

    def call(self, x, training=None):
        factors = {"one": keras.ops.ones((1, 1, WIDTH)), "none": None}
        return self.part(x, training=training, factors=factors)


class OwnStep(keras_accum.GradientAccumulationModel):
    """Calls its layers, and not itself."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            for layer in self.layers[1:]:
                keywords = {"training": True} if hasattr(layer, "rate") else {}
                x = layer(x, **keywords)
            loss = self.compute_loss(y=y, y_pred=x)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.accumulate(gradients, tf.shape(y)[0])
        return self.compute_metrics(None, y, x)


class FunctionTest(RematerializationTest):
    @parameterized.parameters(
        (tf.recompute_grad, {"jit_compile": True}),
        (getattr(keras, "remat", None), {"run_eagerly": True}),
        (tf.recompute_grad, {"jit_compile": False}),
    )
    @test_utils.first_command(second=(1,))
    def test_is_as_without(self, recompute, compiled):
        if recompute is None:
            self.skipTest("Keras 3.9 has the first.")

        def make(options, recompute):
            block = functools.partial(Functions, recompute)
            return keras_accum.GradientAccumulationModel(
                *network(block=block), **options
            )

        some, others = (
            trained(functools.partial(make, recompute=each), WINDOW, compiled)
            for each, compiled in (
                (recompute, compiled),
                (lambda function: function, untraced(compiled)),
            )
        )
        self.assert_same(some, others)

    @needs_scope
    @parameterized.parameters(WINDOW, {"accum_steps": 1})
    @test_utils.first_command(second=(0,))
    def test_steps_of_ones_own(self, **window):
        some, others = (
            trained(
                lambda options, scope=scope: OwnStep(
                    *network(scope), **options
                ),
                window,
                compiled,
            )
            for scope, compiled in (
                (LISTED, {"jit_compile": False}),
                (NONE, {"run_eagerly": True}),
            )
        )
        self.assert_same(some, others)

    def test_plain_keras_is_left_alone(self):
        @tf.function
        def differentiate(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = tf.recompute_grad(lambda x, power: x**power)(x, power=2.0)
            return tape.gradient(y, x)

        with self.assertRaisesRegex(ValueError, "keywords"):
            differentiate(tf.ones(2))


class Assigning(keras.layers.Layer):
    """Assigns what follows from data, and a weight that is trained."""

    def build(self, shape):
        self.factor = self.add_weight(shape=shape[-1:], initializer="ones")
        self.mean = self.add_weight(shape=(), trainable=False)
        self.built = True

    def call(self, x):
        y = x * self.factor
        self.mean.assign(0.9 * self.mean + 0.1 * keras.ops.mean(y))
        self.factor.assign(0.5 * self.factor)
        return y * self.mean * self.factor


@needs_scope
class AssignmentTest(RematerializationTest):
    @parameterized.product(
        layer=(
            Assigning,
            lambda: keras.layers.SpectralNormalization(keras.layers.Dense(4)),
        ),
        is_traced=(False, True),
    )
    def test_gradients_go_through_none(self, layer, is_traced):
        def differentiate(scope):
            keras.utils.set_random_seed(0)
            inputs = keras.Input((4,))
            with keras.RematScope(**scope):
                outputs = layer()(inputs)
            model = keras_accum.GradientAccumulationModel(
                inputs, outputs, accum_steps=2
            )
            x = tf.random.stateless_normal((3, 4), (0, 0))

            def step():
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    loss = tf.reduce_sum(model(x, training=True) ** 2)
                return tape.gradient(loss, [x, *model.trainable_weights])

            gradients = tf.function(step)() if is_traced else step()
            return [*gradients, *model.variables]

        for a, b in zip(differentiate(FULL), differentiate(NONE), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


@needs_scope
class RematerializeTest(RematerializationTest):
    @parameterized.parameters("block_0", Block)
    @test_utils.first_command(0)
    def test_is_as_without(self, layer):
        def make(options):
            # One of two, which are alike.
            model = keras.Model(*network(blocks=2))
            model = keras_accum.GradientAccumulationModel.from_model(
                model, **options
            )
            keras_accum.rematerialize(model, [layer])
            return model

        expected = functools.partial(functional, blocks=2)
        self.assert_same(
            trained(make, WINDOW, {"jit_compile": False}),
            trained(expected, WINDOW, {"run_eagerly": True}),
        )

    @parameterized.parameters(
        lambda layer: "counting",
        lambda layer: Counting,
        lambda layer: layer,
        lambda layer: ["counting"],
        lambda layer: (each for each in [layer]),
    )
    def test_one_or_several(self, layers):
        inputs = keras.Input((2,))
        layer = Counting(name="counting")
        model = keras_accum.GradientAccumulationModel(
            inputs, layer(inputs), accum_steps=2
        )
        keras_accum.rematerialize(model, layers(layer))
        x, layer.calls = tf.ones((3, 2)), 0
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = model(x)
        self.assertEqual(layer.calls, 1)
        tape.gradient(y, x)
        self.assertEqual(layer.calls, 2)

    def test_unknown(self):
        model = functional(WINDOW)
        for wanted in ("blok_0", ["blok_0"]):
            with self.assertRaisesRegex(ValueError, "Did you mean `block_0`"):
                keras_accum.rematerialize(model, wanted)

    def test_wrong_kinds(self):
        model = functional(WINDOW)
        for wanted in (None, 3, lambda layer: True):
            with self.assertRaisesRegex(TypeError, "a name, a class or a lay"):
                keras_accum.rematerialize(model, wanted)
        with self.assertRaisesRegex(TypeError, "must be a `keras.Model`"):
            keras_accum.rematerialize("model.keras", "block_0")

    @pytest.mark.thorough
    def test_memory(self):
        def planned(depth_is_kept):
            inputs = x = keras.Input((64,))
            for _ in range(8):
                x = Wide()(x)
            model = keras_accum.GradientAccumulationModel(
                inputs, x, microbatch_size=64
            )
            if not depth_is_kept:
                keras_accum.rematerialize(model, [Wide])
            return planned_bytes(model)

        self.assertLess(planned(False), most_of_memory() * planned(True))


def planned_bytes(model):
    """Returns what XLA plans for a step on 64 rows of 64 numbers."""
    model.compile("sgd", "mse", jit_compile=True)
    x = np.ones((64, 64), "float32")
    model.train_on_batch(x, x)
    each = model.train_function._programs.microbatch.func
    return each.memory_plan((tf.constant(x), tf.constant(x)), 64).planned


def most_of_memory():
    """Returns how much of the memory a model of deep layers may still need.

    XLA plans worse in older releases: 0.49 with TensorFlow 2.18.
    """
    release = tuple(map(int, tf.__version__.split(".")[:2]))
    return 0.3 if release >= (2, 21) else 0.6


def of_keras_layers(scope=NONE):
    """Returns a model of Keras's layers, that follow one another in part."""
    keras.utils.set_random_seed(0)
    with keras.RematScope(**scope):
        inner = x = keras.Input((8,))
        x = keras.layers.Dense(32, "gelu")(x)
        x = keras.layers.LayerNormalization()(x)
        # Its layers are meant, not it.
        inner = keras.Model(inner, keras.layers.Dense(8)(x), name="inner")
        twice = keras.layers.Dense(8, "tanh")
        inputs = keras.Input((8,))
        x = keras.layers.Dense(16, activity_regularizer="l2")(inputs)
        x = keras.layers.BatchNormalization()(x)
        x = keras.layers.Dropout(0.3)(x)
        x = middle = keras.layers.Dense(8, "relu")(x)
        x = twice(keras.layers.Dropout(0.3)(inner(x)))
        x = keras.layers.Add()([twice(x), middle])
        x = keras.layers.Dense(8, "relu")(x)
        return inputs, [keras.layers.Dense(1)(x), middle]


@needs_scope
class SegmentsTest(RematerializationTest):
    @parameterized.parameters(
        ({"jit_compile": False},), ({"jit_compile": True},)
    )
    @test_utils.first_command(0, second=(1,))
    def test_is_as_without(self, compiled):
        x = np.random.default_rng(0).normal(size=(12, 8)).astype("float32")
        found = []
        for scope in (NONE, FULL):
            model = keras_accum.GradientAccumulationModel(
                *of_keras_layers(scope), accum_steps=2
            )
            model.compile(
                keras.optimizers.SGD(0.01), ["mse", "mse"], **compiled
            )
            history = model.fit(
                x, [x[:, :1], x], batch_size=3, shuffle=False, verbose=0
            ).history
            found.append(
                [
                    *map(np.asarray, model.variables),
                    *map(np.array, history.values()),
                ]
            )
        self.assert_same(*found)

    @pytest.mark.thorough
    def test_memory(self):
        def planned(scope):
            with keras.RematScope(**scope):
                inputs = x = keras.Input((64,))
                for _ in range(6):
                    y = keras.layers.LayerNormalization()(x)
                    y = keras.layers.Dense(2048, activation="gelu")(y)
                    x = x + keras.layers.Dense(64)(y)
            model = keras_accum.GradientAccumulationModel(
                inputs, x, microbatch_size=64
            )
            return planned_bytes(model)

        self.assertLess(planned(FULL), most_of_memory() * planned(NONE))


class Counting(keras.layers.Layer):
    """Counts its calls."""

    calls = 0

    def call(self, x):
        self.calls += 1
        return x * x


class Wide(keras.layers.Layer):
    """Holds much more than it is given."""

    def __init__(self):
        super().__init__()
        self.up = keras.layers.Dense(2048, activation="gelu")
        self.down = keras.layers.Dense(64)

    def build(self, shape):
        self.up.build(shape)
        self.down.build((None, 2048))
        self.built = True

    def call(self, x):
        return x + self.down(self.up(x))


class Odd(keras.layers.Layer):
    """Computes what a second call would not repeat."""

    def __init__(self, function):
        super().__init__(name="odd")
        self.function = function
        self.state = self.add_weight(shape=(), trainable=False)
        self.other = tf.Variable(0.0)
        self.factor = self.add_weight(shape=())
        self.kept = None

    def compute_output_shape(self, shape):
        return shape

    def call(self, x):
        part = tf.recompute_grad(functools.partial(self.function, self))
        self.kept = tf.exp(tf.convert_to_tensor(self.factor))
        return part(x)


def draw(layer, x):
    """Draws as only TensorFlow knows."""
    return x * tf.random.uniform(tf.shape(x))


def assign_other(layer, x):
    """Assigns what Keras does not know."""
    return x * layer.other.assign_add(1.0)


def assign_in_loop(layer, x):
    """Assigns in a graph of its own."""

    def body(index):
        layer.state.assign_add(1.0)
        return index + 1

    tf.while_loop(lambda index: index < 3, body, [tf.constant(0)])
    return x * layer.state


def use_other(layer, x):
    """Uses what it is not given, and would have gradients."""
    return x * layer.kept


class RefusalTest(parameterized.TestCase):
    @parameterized.parameters(
        (draw, False, "RandomUniform"),
        (draw, True, "other outputs"),
        (assign_other, False, "Assign"),
        (assign_in_loop, False, "in a loop"),
        (use_other, False, "is not given"),
    )
    def test_is_named(self, function, eagerly, message):
        inputs = keras.Input((2,))
        x = keras.layers.Dense(2)(inputs)
        model = keras_accum.GradientAccumulationModel(
            inputs, Odd(function)(x), accum_steps=2
        )
        model.compile("sgd", "mse", run_eagerly=eagerly)
        x = np.ones((4, 2), "float32")
        with self.assertRaisesRegex(
            ValueError, f"{function.__name__}.*cannot be recomputed.*{message}"
        ):
            model.fit(x, x, batch_size=2, verbose=0)


if __name__ == "__main__":
    absltest.main()
