"""Models that exist already, made to accumulate by `from_model`."""

import pathlib
import pickle
import tempfile

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized
from tensorflow.core.util import event_pb2

import keras_accum
from keras_accum import saving
from tests import test_utils

GA = keras_accum.GradientAccumulationModel
ROWS = 24


@keras.saving.register_keras_serializable("keras_accum_test")
class Subclassed(keras.Model):
    """A model with a loss, a metric and a method of its own."""

    def __init__(self, units=2, is_normalized=True, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [keras.layers.Dense(4), keras.layers.Dense(units)]
        self.norm = (
            keras.layers.BatchNormalization()
            if is_normalized
            else keras.layers.Identity()
        )
        self.largest = keras.metrics.Mean(name="largest")

    def call(self, inputs, training=None):
        hidden = self.norm(self.blocks[0](inputs), training=training)
        return self.blocks[1](hidden)

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        return 3 * super().compute_loss(x, y, y_pred, sample_weight, training)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        self.largest.update_state(tf.reduce_max(y_pred, axis=-1))
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def twice(self, inputs):
        return 2 * self(inputs)


class CallsSuper(keras.Model):
    """A model whose methods all add to those that they override."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(2)

    def call(self, inputs):
        return self.dense(inputs)

    def train_step(self, data):
        x, y = data
        logs = super().train_step((2.0 * x, y))
        return logs | {"rate": self.optimizer.learning_rate}

    def test_step(self, data):
        x, y = data
        return super().test_step((2.0 * x, y)) | {"more": 1.0}

    def compute_loss(self, *args, **kwargs):
        return 3 * super().compute_loss(*args, **kwargs)

    def compute_metrics(self, *args, **kwargs):
        return super().compute_metrics(*args, **kwargs) | {"four": 4.0}


def without_norm():
    # A micro-batch is normalized by itself.
    return Subclassed(is_normalized=False)


def sequential():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])


def unbuilt():
    return keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(2)])


def functional():
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(4, activation="tanh", name="hidden")(inputs)
    return keras.Model(inputs, keras.layers.Dense(2)(hidden), name="mine")


def nested():
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(3)(functional()(inputs))
    return keras.Model(inputs, sequential()(hidden))


def accumulating():
    return GA.from_model(functional(), accum_steps=2)


KINDS = (sequential, unbuilt, functional, nested, Subclassed, accumulating)
STATES = ("fresh", "compiled", "trained")


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 3)).astype("float32")
    return x, rng.normal(size=(ROWS, 2)).astype("float32")


def made(kind, state):
    """Returns a model as a user may have it: fresh, compiled or trained."""
    keras.utils.set_random_seed(1)
    model = kind()
    if state != "fresh":
        compile_(model)
    if state == "trained":
        model.fit(*data(), batch_size=ROWS // 2, verbose=0)
    return model


def compile_(model):
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        "mse",
        metrics=["mae"],
        jit_compile=False,
    )


def fit(model, batch_size):
    return model.fit(
        *data(), batch_size=batch_size, epochs=2, shuffle=False, verbose=0
    )


class FromModelTest(test_utils.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        (sequential, "accum_steps"),
        (unbuilt, "microbatch_size"),
        (nested, "effective_batch_size"),
        (without_norm, "microbatch_size"),
    )
    @test_utils.first_command(0, second=(1,))
    def test_trains_as_the_large_batch(self, kind, way):
        self.check_training(kind, way)

    @parameterized.parameters(
        (sequential, "microbatch_size"),
        (sequential, "effective_batch_size"),
        (unbuilt, "accum_steps"),
        (unbuilt, "effective_batch_size"),
        (nested, "accum_steps"),
        (nested, "microbatch_size"),
        (without_norm, "accum_steps"),
        (without_norm, "effective_batch_size"),
    )
    @test_utils.first_command(second=(4,))
    def test_trains_as_the_large_batch_otherwise(self, kind, way):
        self.check_training(kind, way)

    def check_training(self, kind, way):
        size, batch_size = {
            "accum_steps": (3, ROWS // 3),
            "microbatch_size": (7, ROWS),
            "effective_batch_size": (ROWS, ROWS // 4),
        }[way]
        large = made(kind, "trained")
        model = GA.from_model(made(kind, "trained"), **{way: size})
        theirs, mine = fit(large, ROWS), fit(model, batch_size)
        self.assertEqual(
            int(model.optimizer.iterations), int(large.optimizer.iterations)
        )
        for a, b in zip(model.get_weights(), large.get_weights(), strict=True):
            self.assertAllClose(a, b, rtol=1e-5, atol=1e-6)
        for name, values in theirs.history.items():
            self.assertAllClose(mine.history[name], values, rtol=1e-5)

    @parameterized.parameters(*zip(KINDS, 2 * STATES, strict=True))
    def test_shares_all(self, kind, state):
        self.check_sharing(kind, state)

    @parameterized.parameters(
        *zip(KINDS, 2 * (STATES[1:] + STATES[:1]), strict=True),
        *zip(KINDS, 2 * (STATES[2:] + STATES[:2]), strict=True),
    )
    @test_utils.first_command(second=(0, 6))
    def test_shares_all_in_other_states(self, kind, state):
        self.check_sharing(kind, state)

    def check_sharing(self, kind, state):
        model = made(kind, state)
        found = GA.from_model(model, accum_steps=2)
        self.assertIsInstance(found, GA)
        self.assertIsInstance(found, type(model))
        self.assertIsInstance(model, keras.Model)
        self.assertEqual(found.name, model.name)
        self.assertEqual(found.compiled, model.compiled)
        self.assertEqual(found.built, model.built)
        for mine, theirs in zip(found.layers, model.layers, strict=True):
            self.assertIs(mine, theirs)
        for mine, theirs in zip(found.weights, model.weights, strict=True):
            self.assertIs(mine, theirs)
        if state != "fresh":
            self.assertIs(found.optimizer, model.optimizer)
        x, y = data()
        self.assertAllEqual(found(x), model(x))
        if state == "fresh":
            compile_(found)
            self.assertFalse(model.compiled)
        found.fit(x, y, batch_size=6, verbose=0)
        self.assertAllEqual(found(x), model(x))
        self.assertLen(model.weights, len(found.weights))

    @pytest.mark.thorough
    def test_the_first_one_trains_on(self):
        model = made(Subclassed, "trained")
        found = GA.from_model(model, accum_steps=2)
        names = [metric.name for metric in model.metrics]
        fit(found, 6)
        self.assertEqual([metric.name for metric in model.metrics], names)
        self.assertEqual(found.metrics_names, model.metrics_names)
        before = int(model.optimizer.iterations)
        fit(model, 6)
        self.assertEqual(int(model.optimizer.iterations), before + 8)
        fit(found, 6)
        self.assertEqual(int(model.optimizer.iterations), before + 12)

    def test_another_optimizer_is_none_for_the_first_one(self):
        model = made(functional, "trained")
        first = model.optimizer
        found = GA.from_model(model, accum_steps=2)
        compile_(found)
        self.assertIsNot(found.optimizer, first)
        self.assertIs(model.optimizer, first)
        children = tf.train.Checkpoint(model=model).model
        self.assertIs(children.optimizer, first)
        self.assertIs(model._lookup_dependency("optimizer"), first)

    def test_methods_losses_and_metrics(self):
        found = GA.from_model(made(Subclassed, "compiled"), accum_steps=2)
        x, y = data()
        self.assertAllEqual(found.twice(x), 2 * found(x))
        logs = fit(found, 6).history
        self.assertIn("largest", logs)
        loss = found.evaluate(x, y, verbose=0, return_dict=True)["loss"]
        error = np.mean((found.predict(x, verbose=0) - y) ** 2)
        self.assertAllClose(loss, 3 * error, rtol=1e-5)

    @parameterized.parameters(unbuilt, Subclassed, accumulating)
    @test_utils.first_command(2, second=(0,))
    def test_files_and_pickles(self, kind):
        self.check_files(kind)

    @parameterized.parameters(sequential, functional, nested)
    @test_utils.first_command(second=(1,))
    def test_files_and_pickles_of_others(self, kind):
        self.check_files(kind)

    def check_files(self, kind):
        found = GA.from_model(
            made(kind, "trained"),
            accum_steps=2,
            partial_window="drop",
            nonfinite="skip_window",
        )
        fit(found, 6)
        path = self.get_temp_dir()
        found.save(f"{path}/model.keras")
        loaded = keras.models.load_model(f"{path}/model.keras")
        for other in (loaded, pickle.loads(pickle.dumps(found))):
            self.assertIs(type(other), type(found))
            self.assertEqual(other.accum_steps, 2)
            self.assertEqual(other.partial_window, "drop")
            self.assertEqual(other.nonfinite, "skip_window")
            self.assertEqual(
                int(other.optimizer.iterations), int(found.optimizer.iterations)
            )
        fit(found, 6)
        fit(loaded, 6)
        for a, b in zip(found.weights, loaded.weights, strict=True):
            self.assertAllEqual(a, b)
        # A plain model reads the weights.
        found.save_weights(f"{path}/model.weights.h5")
        plain = made(functional if kind is accumulating else kind, "trained")
        plain.load_weights(f"{path}/model.weights.h5")
        for a, b in zip(found.weights, plain.weights, strict=True):
            self.assertAllEqual(a, b)

    def test_step_of_the_users_own(self):
        class Own(keras.Model):
            def __init__(self):
                super().__init__()
                self.dense = keras.layers.Dense(2)

            def call(self, inputs):
                return self.dense(inputs)

            def train_step(self, data):
                x, y = data
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
                gradients = tape.gradient(loss, self.trainable_weights)
                self.accumulate(gradients, tf.shape(x)[0])
                return {"loss": loss}

        found = GA.from_model(Own(), accum_steps=3)
        found.compile("sgd", jit_compile=False)
        fit(found, 8)
        self.assertEqual(int(found.optimizer.iterations), 2)

    def test_wrong_arguments(self):
        with self.assertRaisesRegex(TypeError, "must be a `keras.Model`"):
            GA.from_model(keras.layers.Dense(2), accum_steps=2)
        with self.assertRaisesRegex(TypeError, "Received: steps"):
            GA.from_model(functional(), steps=2)
        with self.assertRaisesRegex(ValueError, "give one of them"):
            GA.from_model(functional(), accum_steps=2, microbatch_size=3)
        model = functional()
        model.compile(
            keras.optimizers.SGD(gradient_accumulation_steps=2),
            jit_compile=False,
        )
        with self.assertRaisesRegex(ValueError, "a second time"):
            GA.from_model(model, accum_steps=2)
        self.assertEqual(GA.from_model(model).accum_steps, 1)


VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"]
SENTENCES = np.array(["a b c", "a d", "g", "c d e f", "b b", "f"] * 2)
CLASSES = np.array([0, 1, 1, 0, 1, 0] * 2)


def text_classifier():
    keras.utils.set_random_seed(0)
    hub = keras_hub.models
    return hub.BertTextClassifier(
        hub.BertBackbone(
            vocabulary_size=len(VOCABULARY),
            num_layers=1,
            num_heads=2,
            hidden_dim=8,
            intermediate_dim=16,
            max_sequence_length=6,
            dropout=0.0,
        ),
        num_classes=2,
        dropout=0.0,
        preprocessor=hub.BertTextClassifierPreprocessor(
            hub.BertTokenizer(vocabulary=VOCABULARY), sequence_length=6
        ),
    )


class KerasHubTest(test_utils.TestCase, parameterized.TestCase):
    def train(self, model, batch_size):
        model.compile(
            keras.optimizers.SGD(0.1),
            loss=test_utils.crossentropy(),
            metrics=["accuracy"],
            jit_compile=False,
        )
        return model.fit(
            SENTENCES,
            CLASSES,
            batch_size=batch_size,
            epochs=2,
            shuffle=False,
            verbose=0,
        )

    @parameterized.parameters(
        ({"accum_steps": 3}, 4), ({"microbatch_size": 5}, 12)
    )
    @test_utils.first_command(second=(0,))
    def test_task(self, arguments, batch_size):
        large = text_classifier()
        expected = self.train(large, 12)
        model = GA.from_model(text_classifier(), **arguments)
        logs = self.train(model, batch_size)
        for a, b in zip(model.weights, large.weights, strict=True):
            self.assertAllClose(a, b, rtol=1e-5, atol=1e-6)
        for name, values in expected.history.items():
            self.assertAllClose(logs.history[name], values, rtol=1e-5)
        predicted = model.predict(SENTENCES, verbose=0)
        path = f"{self.get_temp_dir()}/model.keras"
        model.save(path)
        with self.assertWarnsRegex(UserWarning, "not called as part of"):
            # `compile` of a task is its own, and is not loaded, as in Keras.
            loaded = keras.models.load_model(path)
        self.assertEqual(
            (loaded.accum_steps, loaded.microbatch_size),
            (model.accum_steps, model.microbatch_size),
        )
        self.assertAllClose(
            loaded.predict(SENTENCES, verbose=0), predicted, rtol=1e-5
        )

    @pytest.mark.thorough
    def test_verify_takes_what_fit_takes(self):
        model = GA.from_model(text_classifier(), microbatch_size=5)
        model.compile("sgd", test_utils.crossentropy(), jit_compile=False)
        for texts in (SENTENCES, tf.constant(SENTENCES), list(SENTENCES)):
            self.assertTrue(keras_accum.verify(model, texts, CLASSES).exact)
        tokens, labels = model.preprocessor(SENTENCES, CLASSES)
        model.preprocessor = None
        self.assertTrue(keras_accum.verify(model, tokens, labels).exact)

    @pytest.mark.thorough
    def test_presets_and_clones(self):
        plain = text_classifier()
        model = GA.from_model(plain, accum_steps=3)
        expected = plain.predict(SENTENCES, verbose=0)
        folder = f"{self.get_temp_dir()}/preset"
        model.save_to_preset(folder)
        # By the task's own class, which knows nothing of ours; and through it.
        task = keras_hub.models.BertTextClassifier.from_preset(folder)
        self.assertIs(type(task), keras_hub.models.BertTextClassifier)
        again = type(model).from_preset(folder, accum_steps=5)
        self.assertEqual(again.accum_steps, 5)
        for loaded in (task, again):
            self.assertAllClose(
                loaded.predict(SENTENCES, verbose=0), expected, rtol=1e-5
            )
        clone = keras.models.clone_model(model)
        self.assertEqual(clone.accum_steps, 3)
        self.assertEqual(
            [each.shape for each in clone.weights],
            [each.shape for each in keras.models.clone_model(plain).weights],
        )

    def test_mixin_in_front_of_a_task(self):
        class Mine(
            keras_accum.GradientAccumulationMixin,
            keras_hub.models.BertTextClassifier,
        ):
            pass

        plain = text_classifier()
        model = Mine(
            plain.backbone,
            num_classes=2,
            dropout=0.0,
            preprocessor=plain.preprocessor,
            accum_steps=3,
        )
        self.train(model, 4)
        self.assertEqual(int(model.optimizer.iterations), 2)


class CloneTest(test_utils.TestCase, parameterized.TestCase):
    def model(self, **arguments):
        inputs = keras.Input((3,))
        return GA(inputs, keras.layers.Dense(2)(inputs), **arguments)

    @parameterized.parameters(
        {"accum_steps": 3, "nonfinite": "skip_window"},
        {"accum_steps": keras_accum.schedules.PiecewiseConstant([2], [1, 4])},
        {"microbatch_size": 5, "partial_window": "drop"},
        {"effective_batch_size": 8, "accumulator_dtype": "float64"},
    )
    def test_arguments_come_back(self, **arguments):
        model = self.model(**arguments)
        for original in (model, GA.from_model(functional(), **arguments)):
            clone = keras.models.clone_model(original)
            for name, value in arguments.items():
                self.assertEqual(getattr(clone, name), value)
            self.assertIsNot(clone.weights[0], original.weights[0])
        on_tensor = keras.models.clone_model(
            model, input_tensors=keras.Input((3,), batch_size=7)
        )
        self.assertEqual(
            saving.arguments_of(on_tensor), saving.arguments_of(clone)
        )

    def test_models_of_the_same_tensors_have_their_own(self):
        model = self.model(accum_steps=3)
        clone = keras.models.clone_model(model)
        self.assertEqual(GA(clone.inputs, clone.outputs).accum_steps, 1)
        for batch_size in (None, 7):
            inputs = keras.Input((3,), batch_size=batch_size)
            self.assertEqual(GA(inputs, model(inputs)).accum_steps, 1)

    def test_nested(self):
        inner = self.model(accum_steps=3)
        inputs = keras.Input((3,))
        clone = keras.models.clone_model(
            GA(inputs, inner(inputs), accum_steps=2), recursive=True
        )
        self.assertEqual(clone.accum_steps, 2)
        self.assertEqual(clone.layers[1].accum_steps, 3)


class CallsSuperTest(test_utils.TestCase, parameterized.TestCase):
    """It is what subclassing is, and what the batch at once gives."""

    @parameterized.product(
        way=({"accum_steps": 4}, {"microbatch_size": 3}),
        run_eagerly=(False, True),
        on_replicas=(False, True),
    )
    @test_utils.first_command(0, second=(3, 4))
    def test_steps_losses_and_metrics(self, way, run_eagerly, on_replicas):
        if on_replicas and run_eagerly:
            self.skipTest("Slow, and the same.")
        strategy = tf.distribute.get_strategy()
        if on_replicas:
            strategy, _ = test_utils.chosen_strategy()
        rng = np.random.default_rng(0)
        x = rng.normal(size=(ROWS, 3)).astype("float32")
        y = rng.normal(size=(ROWS, 2)).astype("float32")

        class Derived(keras_accum.GradientAccumulationMixin, CallsSuper):
            pass

        found = []
        for make in (
            CallsSuper,
            lambda: GA.from_model(CallsSuper(), **way),
            lambda: Derived(**way),
        ):
            keras.utils.set_random_seed(0)
            is_plain = make is CallsSuper
            chosen = tf.distribute.get_strategy() if is_plain else strategy
            with chosen.scope():
                model = make()
                model(x[:1])
                initial = model.get_weights()
                model.compile("sgd", "mse", run_eagerly=run_eagerly)
            steps = 1 if is_plain else way.get("accum_steps", 1)
            model.fit(x, y, ROWS // steps, shuffle=False, verbose=0)
            logs = model.evaluate(x, y, ROWS, verbose=0, return_dict=True)
            found.append((model.get_weights(), logs))
        for weights, logs in found[1:]:
            self.assertSameWeights(weights, found[0][0], initial)
            self.assertEqual(logs.keys(), found[0][1].keys())
            self.assertAllClose(logs["loss"], found[0][1]["loss"])


class TensorBoardTest(test_utils.TestCase):
    def tags(self, model):
        model.compile("sgd", "mse", jit_compile=False)
        callback = keras.callbacks.TensorBoard(
            tempfile.mkdtemp(dir=self.get_temp_dir())
        )
        x = np.ones((4, 3), "float32")
        model.fit(x, x[:, :2], 2, verbose=0, callbacks=[callback])
        folder = pathlib.Path(callback.log_dir)
        return {
            value.tag
            for file in folder.rglob("events*")
            for record in tf.data.TFRecordDataset(str(file))
            for value in event_pb2.Event.FromString(
                record.numpy()
            ).summary.value
        }

    def test_shows_the_graph_of_layers(self):
        inputs = keras.Input((3,))
        outputs = keras.layers.Dense(2)(inputs)
        for model in (
            keras.Model(inputs, outputs),
            GA(inputs, outputs, accum_steps=2),
            GA.from_model(sequential(), accum_steps=2),
        ):
            self.assertIn("keras", self.tags(model))


if __name__ == "__main__":
    tf.test.main()
