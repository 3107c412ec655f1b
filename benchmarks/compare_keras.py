"""`benchmarks.compare` for systems on Keras and TensorFlow.

All are compiled by XLA, fed by the same `tf.data` pipeline, and called through
the train function that `fit` calls. Also runs on Keras 2.13, which is what the
gradient-accumulator package installs.
"""

import functools
import statistics

import keras
import tensorflow as tf

from benchmarks import compare_models as models
from benchmarks import compare_worker


def mlp():
    """Returns the inputs and outputs of the MLP."""
    inputs = hidden = keras.Input((models.FEATURES,))
    for units in models.LAYERS:
        hidden = keras.layers.Dense(units, activation="relu")(hidden)
    return inputs, keras.layers.Dense(models.CLASSES)(hidden)


def transformer():
    """Returns the inputs and outputs of the transformer."""
    inputs = keras.Input((models.LENGTH,), dtype="int32")
    hidden = keras.layers.Embedding(models.VOCABULARY, models.WIDTH)(inputs)
    for _ in range(models.BLOCKS):
        normal = keras.layers.LayerNormalization()(hidden)
        attention = keras.layers.MultiHeadAttention(
            models.HEADS, models.WIDTH // models.HEADS
        )
        hidden = hidden + attention(normal, normal, use_causal_mask=True)
        normal = keras.layers.LayerNormalization()(hidden)
        wide = keras.layers.Dense(4 * models.WIDTH, activation="gelu")(normal)
        hidden = hidden + keras.layers.Dense(models.WIDTH)(wide)
    normal = keras.layers.LayerNormalization()(hidden)
    return inputs, keras.layers.Dense(models.VOCABULARY)(normal)


def convolutional():
    """Returns the inputs and outputs of the convolutional network."""
    inputs = hidden = keras.Input(models.IMAGE)
    for filters, strides in models.FILTERS:
        hidden = keras.layers.Conv2D(
            filters, 3, strides=strides, padding="same", use_bias=False
        )(hidden)
        hidden = keras.layers.BatchNormalization()(hidden)
        hidden = keras.layers.ReLU()(hidden)
    hidden = keras.layers.GlobalAveragePooling2D()(hidden)
    return inputs, keras.layers.Dense(models.CLASSES)(hidden)


NETWORKS = {
    "MLP": mlp,
    "transformer": transformer,
    "convolutional": convolutional,
}


def make_optimizer(name: str, **kwargs) -> keras.optimizers.Optimizer:
    """Returns the optimizer; `kwargs` say how it accumulates."""
    kwargs["learning_rate"] = models.LEARNING_RATE
    if name == "adamw":
        kwargs["weight_decay"] = models.WEIGHT_DECAY
        return keras.optimizers.AdamW(**kwargs)
    cls = {"adam": keras.optimizers.Adam, "sgd": keras.optimizers.SGD}[name]
    return cls(**kwargs)


class Keras(compare_worker.Contestants):
    """Plain training, and Keras's own accumulation."""

    names = ("window", "plain", "whole", "ideal")

    def make(self, name, accum_steps):
        """See `Contestants`."""
        case = self.case
        if name == "ideal":
            return self._ideal(accum_steps)
        rows, calls = case.rows, accum_steps
        if name in ("whole", "cut"):
            rows, calls = case.rows * accum_steps, 1
        if name == "steps":
            calls = 1
        return self._calls(self._model(name, accum_steps), rows, calls)

    def first_step(self, name, accum_steps):
        """See `Contestants`."""
        rows = self.case.rows * (accum_steps if name == "cut" else 1)
        # With "steps" it is a window's, since there is no shorter call.
        return self._calls(self._model(name, accum_steps), rows, 1)

    def traces(self, name):
        """See `Contestants`."""
        times = [0]

        class Counting(keras.layers.Layer):
            """Counts how often Python runs through the model."""

            def call(self, inputs):
                times[0] += 1
                return inputs

        model = self._model(name, 2, Counting())
        rows = self.case.rows * (2 if name == "cut" else 1)
        self._calls(model, rows, 2)()
        before = times[0]
        self.change_steps(model, 4)
        self._calls(model, 2 * rows if name == "cut" else rows, 8)()
        return times[0] - before

    def change_steps(self, model, accum_steps):
        """Changes k, as is documented or, if nothing is, as has an effect."""
        model.optimizer.gradient_accumulation_steps = accum_steps
        model.make_train_function(force=True)

    def model_arguments(self, name, accum_steps) -> tuple[type, dict, dict]:
        """Returns the model class, and what it and the optimizer are told."""
        if name == "window":
            return (
                keras.Model,
                {},
                {"gradient_accumulation_steps": accum_steps},
            )
        return keras.Model, {}, {}

    def _model(self, name, accum_steps, last_layer=lambda outputs: outputs):
        cls, of_model, of_optimizer = self.model_arguments(name, accum_steps)
        keras.utils.set_random_seed(0)
        inputs, outputs = NETWORKS[self.model]()
        outputs = last_layer(outputs)
        model = cls(inputs=inputs, outputs=outputs, **of_model)
        optimizer = make_optimizer(self.case.optimizer, **of_optimizer)
        optimizer.build(model.trainable_variables)
        model.compile(
            optimizer,
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=True,
            **({"steps_per_execution": accum_steps} if name == "steps" else {}),
        )
        return model

    def _batches(self, rows):
        batch = self.case.batch(rows)
        return iter(tf.data.Dataset.from_tensors(batch).cache().repeat())

    def _calls(self, model, rows, calls):
        model.make_train_function()
        iterator = self._batches(rows)

        def run():
            for _ in range(calls):
                logs = model.train_function(iterator)
            # Where devices are asynchronous, this waits.
            tf.nest.map_structure(float, dict(logs))

        return run

    def _ideal(self, accum_steps):
        model = self._model("plain", accum_steps)
        variables = model.trainable_variables
        iterator = self._batches(self.case.rows)

        @tf.function(jit_compile=True)
        def gradient(x, y):
            with tf.GradientTape() as tape:
                y_pred = model(x, training=True)
                loss = model.compute_loss(x, y, y_pred)
            return tape.gradient(loss, variables)

        @tf.function
        def forward_and_backward(iterator):
            return gradient(*iterator.get_next())

        @tf.function(jit_compile=True)
        def update(gradients):
            pairs = zip(gradients, variables, strict=True)
            model.optimizer.apply_gradients(pairs)

        def run():
            for _ in range(accum_steps):
                gradients = forward_and_backward(iterator)
            update(gradients)

        return run


class KerasAccum(Keras):
    """This library, and what it is compared with in the same process.

    "window" is `accum_steps`, "steps" the same with `steps_per_execution=k`,
    "cut" is `microbatch_size`, "keras" is Keras's own accumulation.
    """

    names = ("window", "steps", "cut", "keras", "plain", "whole", "ideal")

    def model_arguments(self, name, accum_steps):
        """See `Keras`."""
        import keras_accum

        ours = keras_accum.GradientAccumulationModel
        if name in ("window", "steps"):
            return ours, {"accum_steps": accum_steps}, {}
        if name == "cut":
            return ours, {"microbatch_size": self.case.rows}, {}
        name = "window" if name == "keras" else name
        return super().model_arguments(name, accum_steps)

    def change_steps(self, model, accum_steps):
        """See `Keras`."""
        if getattr(model, "microbatch_size", self) is None:
            model.accum_steps = accum_steps
        elif not hasattr(model, "microbatch_size"):
            super().change_steps(model, accum_steps)

    def scratch(self):
        """See `Contestants`."""
        from keras_accum import compat
        from keras_accum import steps

        batch = tf.nest.map_structure(
            tf.convert_to_tensor, self.case.batch(self.case.rows)
        )
        model, plain = self._model("window", 8), self._model("plain", 8)
        step = functools.partial(
            steps.train_microbatch, model._accumulation, None
        )
        # The buffers are there when it is traced.
        step(batch)
        programs = {"window": step, "plain": plain.train_step}
        return {
            name: compat.planned_bytes(
                tf.function(step, jit_compile=True, autograph=False), batch
            )
            for name, step in programs.items()
        }

    def host(self):
        """See `Contestants`: `fit` of a model of one weight."""
        steps, rounds = 400, 11
        batch = tf.ones((1, 1)), tf.zeros((1, 1))
        dataset = tf.data.Dataset.from_tensors(batch).repeat()

        def model(name):
            inputs = keras.Input((1,))
            outputs = keras.layers.Dense(1, use_bias=False)(inputs)
            cls, of_model, _ = self.model_arguments(name, 8)
            made = cls(inputs=inputs, outputs=outputs, **of_model)
            made.compile("sgd", "mse", jit_compile=True)
            return made

        def fit(made):
            made.fit(dataset, steps_per_epoch=steps, verbose=0)

        ours, plain = model("window"), model("plain")
        ratios = []
        for _ in range(rounds + 1):
            times = [
                compare_worker.seconds(lambda made=made: fit(made))
                for made in (ours, plain)
            ]
            ratios.append(times[0] / times[1])
        # The first round traces.
        return statistics.quantiles(ratios[1:], n=4)

    def machine(self):
        """See `Contestants`."""
        entries, width = 2**26, 2048
        total, term = (tf.Variable(tf.ones(entries)) for _ in range(2))
        factor = tf.ones((width, width))

        @tf.function(jit_compile=True)
        def add():
            total.assign_add(term)

        multiply = tf.function(tf.matmul, jit_compile=True)
        programs = {
            # It reads both, and writes one of them.
            "bytes": (add, 3 * 4 * entries),
            "operations": (lambda: multiply(factor, factor), 2 * width**3),
        }
        fastest = {}
        for name, (program, amount) in programs.items():
            times = [compare_worker.seconds(program) for _ in range(21)]
            fastest[name] = amount / min(times)
        return fastest


class GradientAccumulatorPackage(Keras):
    """`GradientAccumulateModel` of the gradient-accumulator package."""

    def model_arguments(self, name, accum_steps):
        """See `Keras`."""
        if name != "window":
            return keras.Model, {}, {}
        import gradient_accumulator

        ours = gradient_accumulator.GradientAccumulateModel
        return ours, {"accum_steps": accum_steps}, {}

    def traces(self, name):
        """See `Contestants`; its k cannot be changed."""
        del name
        return None


CONTESTANTS = {
    "keras_accum": KerasAccum,
    "gradient_accumulator": GradientAccumulatorPackage,
}

if __name__ == "__main__":
    compare_worker.serve(CONTESTANTS)
