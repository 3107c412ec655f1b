"""Each private name that is used is there, and means what we think."""

import contextlib
import threading
import weakref

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.distribute import input_lib

from keras_accum import compat
from tests import test_utils


class NamesTest(test_utils.TestCase):
    def test_functional_class(self):
        self.assertIs(type(test_utils.mlp()), compat.functional_class())
        self.assertTrue(issubclass(compat.functional_class(), keras.Model))

    def test_custom_steps(self):
        class Plain(keras.Model):
            pass

        class Custom(keras.Model):
            def train_step(self, data):
                return {}

            def compute_loss(self, *args, **kwargs):
                return 0.0

        class Mixin:
            def train_step(self, data):
                raise NotImplementedError

            test_step = train_step

        plain = type("PlainWithMixin", (Mixin, Plain), {})()
        custom = type("CustomWithMixin", (Mixin, Custom), {})()
        self.assertFalse(compat.has_custom_step(plain, Mixin, "train_step"))
        self.assertTrue(compat.has_custom_step(custom, Mixin, "train_step"))
        self.assertFalse(compat.has_custom_step(custom, Mixin, "test_step"))
        self.assertFalse(compat.has_custom_compute_loss(plain))
        self.assertTrue(compat.has_custom_compute_loss(custom))

    def test_losses_are_weighted(self):
        inputs = keras.Input((2,))
        model = keras.Model(inputs, [inputs, 3 * inputs])
        model.compile("sgd", loss=["mse", "mse"], loss_weights=[1.0, 2.0])
        x = np.ones((4, 2), "float32")
        y = [np.zeros((4, 2), "float32")] * 2
        compiled = compat.compiled_loss(model)
        # 1 + 2 * 9
        self.assertAllClose(compiled(y, model(x)), 19.0)
        self.assertEqual(compat.number_of_losses(compiled), 2)
        with compat.weighting_losses(compiled, [None, tf.constant(0.5)]):
            self.assertAllClose(compiled(y, model(x)), 10.0)
        self.assertAllClose(compiled(y, model(x)), 19.0)

    def test_global_seed_state(self):
        (state,) = compat.global_seed_state()
        before = state.numpy()
        keras.random.normal((1,))
        self.assertNotAllEqual(before, state.numpy())

    def test_iterators(self):
        strategy = tf.distribute.OneDeviceStrategy("CPU:0")
        with strategy.scope():
            model = test_utils.mlp()
            model.compile("sgd", test_utils.crossentropy(), run_eagerly=True)
        seen, begun = [], []

        def first_rows(dataset):
            seen.append(dataset)
            return dataset.take(1)

        x, y = test_utils.microbatches([4])[0]
        with (
            compat.iterating_over(first_rows),
            compat.recording_epoch_iterators(begun.append),
        ):
            predicted = model.predict(x, batch_size=1, steps=4, verbose=0)
        self.assertLen(seen, 1)
        # It is what is iterated over.
        self.assertLen(predicted, 1)
        (epoch_iterator,) = begun
        model.predict(x, batch_size=1, verbose=0)
        self.assertLen(seen, 1)
        ended = weakref.ref(epoch_iterator)
        compat.end_epoch(epoch_iterator)
        del epoch_iterator, begun[:]
        # Nothing refers to it, not even itself.
        self.assertIsNone(ended())

    def test_planned_bytes(self):
        @tf.function(jit_compile=True)
        def function(x):
            return tf.sort(tf.cos(x) @ tf.sin(x), axis=0)

        few, many = (
            compat.planned_bytes(function, tf.zeros((n, n))) for n in (64, 256)
        )
        # The output at least, and the two that are multiplied.
        self.assertGreaterEqual(few, 4 * 64**2)
        self.assertGreaterEqual(many, 10 * few)
        self.assertLessEqual(many, 10 * 4 * 256**2)

    def test_addresses_for_patches(self):
        def mapped(function, *shapes):
            program = tf.function(function, jit_compile=True)
            return compat.memory_plan(program, *map(tf.zeros, shapes)).mapped

        def conv(x, kernel):
            return tf.nn.conv2d(x, kernel, 1, "SAME")

        def depthwise(x, kernel):
            return tf.nn.depthwise_conv2d(x, kernel, (1, 1, 1, 1), "SAME")

        patches, images = 8 * 16 * 16, (8, 16, 16, 4)
        # 36 numbers of each, in eights; and of many numbers not all.
        few = mapped(conv, images, (3, 3, 4, 2))
        self.assertEqual(few, 4 * 40 * (patches + 2))
        many = mapped(conv, (8, 16, 16, 96), (3, 3, 96, 2))
        self.assertEqual(many, 4 * 640 * (patches + 2))
        # Each channel for itself, with 9 numbers.
        each = mapped(depthwise, images, (3, 3, 4, 1))
        self.assertEqual(each, 4 * 4 * 16 * (patches + 1))
        product = mapped(lambda a, b: a @ b, (64, 64), (64, 64))
        self.assertEqual(product, 0)

    def test_replacing_assignments(self):
        variable, own = tf.Variable([1.0]), tf.Variable([1.0])
        seen = []

        def note(name):
            def function(assigned, value):
                seen.append((name, assigned, value))
                return assigned

            return function

        rows = tf.IndexedSlices([1.0], [0], [1])
        names = ["assign", "assign_add", "assign_sub"]
        names += ["scatter_add", "scatter_sub", "scatter_update"]
        with compat.replacing_assignments({name: note(name) for name in names}):
            for name in names:
                value = rows if name.startswith("scatter") else [3.0]
                self.assertIs(getattr(variable, name)(value), variable)
            thread = threading.Thread(target=lambda: own.assign([2.0]))
            thread.start()
            thread.join()
        self.assertEqual([name for name, *_ in seen], names)
        self.assertAllEqual(variable, [1.0])
        # Another thread has nothing to do with it.
        self.assertAllEqual(own, [2.0])
        variable.assign_add([1.0])
        self.assertAllEqual(variable, [2.0])

    def test_compute_anyway(self):
        @tf.function
        def function(value):
            compat.compute_anyway(tf.debugging.check_numerics(value, "NaN"))

        function(1.0)
        with self.assertRaises(tf.errors.InvalidArgumentError):
            function(np.nan)

    def test_training_argument(self):
        class Takes(keras.Model):
            def call(self, inputs, training=False):
                return inputs

        class Lacks(keras.Model):
            def call(self, inputs):
                return inputs

        self.assertTrue(compat.takes_training_argument(Takes()))
        self.assertFalse(compat.takes_training_argument(Lacks()))

    def test_loss_tracker(self):
        model = test_utils.mlp()
        self.assertIsNone(compat.loss_tracker(model))
        model.compile("sgd", loss="mse")
        self.assertEqual(compat.loss_tracker(model).name, "loss")
        metric = keras.metrics.Mean(name="loss")
        compat.set_loss_tracker(model, metric)
        self.assertIs(model.metrics[0], metric)
        self.assertNotIn(metric, model.metrics[1:])

    def test_compiled_losses(self):
        inputs = keras.Input((2,))
        hidden = keras.layers.Dense(2)(inputs)
        model = keras.Model(inputs, {"a": hidden, "b": hidden})
        self.assertIsNone(compat.compiled_loss(model))
        model.compile("sgd", loss={"a": "mse", "b": "mae"})
        compiled = compat.compiled_loss(model)
        self.assertFalse(compat.is_built(compiled))
        x = np.ones((3, 2), "float32")
        y = {"a": x, "b": 3 * x}
        model.train_on_batch(x, y)
        self.assertTrue(compat.is_built(compiled))
        logs = model.get_metrics_result()
        seen = []
        compat.map_compiled_losses(
            compiled,
            lambda loss, *rest: seen.append((loss.name, *rest)),
            y,
            {"a": tf.constant(x), "b": tf.constant(x)},
            None,
        )
        self.assertEqual(
            [each[0] for each in seen],
            ["mse", "mae"],
        )
        self.assertAllClose(seen[1][1], 3 * x)
        # The walk leaves the losses' own metrics alone.
        self.assertAllClose(model.get_metrics_result(), logs)

    def test_output_metrics(self):
        inputs = keras.Input((2,))
        hidden = keras.layers.Dense(2)(inputs)
        model = keras.Model(inputs, {"a": hidden, "b": hidden})
        model.compile("sgd", loss={"a": "mse", "b": "mae"})
        compiled = compat.compiled_loss(model)
        x = np.ones((3, 2), "float32")
        y, y_pred = {"a": x, "b": x}, {"a": x, "b": x}
        compat.build_compiled_losses(compiled, y, y_pred, None)
        self.assertTrue(compat.is_built(compiled))
        self.assertEqual(
            [m.name for m in compat.output_metrics(compiled)],
            ["a_loss", "b_loss"],
        )
        made = compat.replace_output_metrics(
            compiled, lambda metric: keras.metrics.Mean(metric.name)
        )
        logs = model.train_on_batch(x, {"a": x, "b": x}, return_dict=True)
        self.assertEqual(
            [float(m.result()) for m in made], [logs["a_loss"], logs["b_loss"]]
        )

    def test_own_losses(self):
        inputs = keras.Input((2,))
        layer = keras.layers.Dense(
            2, activity_regularizer="l2", kernel_regularizer="l2"
        )
        model = keras.Model(inputs, layer(inputs))
        model(np.ones((3, 2)))
        self.assertLen(compat.added_losses(model), 1)
        self.assertLen(model.losses, 2)

    def test_masks(self):
        tensor = tf.ones((2, 3))
        self.assertIsNone(compat.keras_mask(tensor))
        mask = keras.layers.Masking()(tf.ones((2, 3, 1)))
        self.assertAllEqual(compat.keras_mask(mask), np.ones((2, 3), bool))
        weight = compat.merge_mask(
            None, tf.constant([True, False]), tf.float32, "sum"
        )
        self.assertAllEqual(weight, [1.0, 0.0])
        values, weight = compat.align_ranks(tf.ones((2,)), tf.ones((2, 1)))
        self.assertEqual(values.shape, weight.shape)

    def test_outputs_and_optionals(self):
        model = test_utils.mlp()
        strategy = tf.distribute.get_strategy()
        outputs = {"a": tf.ones(2)}
        self.assertAllEqual(
            compat.concatenate_outputs(outputs, strategy), outputs
        )
        empty = tf.experimental.Optional.empty(tf.TensorSpec(()))
        seen = []
        compat.optionals_to_none(model, seen.append)((1, empty))
        # Older releases of Keras give none.
        gives_them = hasattr(model, "_autoconvert_optionals")
        self.assertEqual(seen, [(1, None if gives_them else empty)])
        self.assertAllEqual(compat.unscale_loss(tf.constant(2.0)), 2.0)

    def test_symbolic_build(self):
        with tf.distribute.OneDeviceStrategy("CPU:0").scope():
            model = keras.Sequential([keras.layers.Dense(2)])
            model.compile("sgd", loss="mse")
        self.assertTrue(compat.has_local_strategy(model))
        self.assertFalse(compat.has_local_strategy(test_utils.mlp()))
        batch = (tf.ones((4, 3)), tf.ones((4, 2)), None)
        self.assertIs(compat.first_batch([(0, 1, iter([batch]))])[0], batch[0])
        compat.symbolic_build(model, batch)
        self.assertEqual(model.weights[0].shape, (3, 2))
        self.assertTrue(model.optimizer.built)

    def test_assigning_through(self):
        variable = keras.Variable([1.0, 2.0])
        own = keras.Variable(0.0)
        seen = []

        def tenfold(assigned, value):
            seen.append(assigned)
            return 10 * value

        with compat.assigning_through(tenfold):
            variable.assign([3.0, 4.0])
            thread = threading.Thread(target=lambda: own.assign(1.0))
            thread.start()
            thread.join()
        variable.assign_add([1.0, 1.0])
        self.assertAllEqual(variable, [31.0, 41.0])
        self.assertEqual([id(each) for each in seen], [id(variable)])
        # Another thread has nothing to do with it.
        self.assertAllEqual(own, 1.0)

    def test_assigning_through_in_any_order(self):
        variable = keras.Variable(0.0)
        entered, left = threading.Event(), threading.Event()

        def other():
            with compat.assigning_through(lambda _, value: value + 2):
                entered.set()
                left.wait()
                variable.assign(5.0)

        thread = threading.Thread(target=other)
        with compat.assigning_through(lambda _, value: value + 1):
            thread.start()
            entered.wait()
        left.set()
        thread.join()
        self.assertAllEqual(variable, 7.0)
        # The last one to leave cleans up.
        variable.assign(5.0)
        self.assertAllEqual(variable, 5.0)

    def test_without_communication(self):
        optimizer = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.5)
        )
        variable = keras.Variable([1.0])
        optimizer.build([variable])
        extended = tf.distribute.get_strategy().extended
        inner = optimizer.inner_optimizer
        aggregation = inner.iterations.value.aggregation
        before = [dict(vars(each)) for each in (extended, optimizer, inner)]
        with compat.without_communication(optimizer, is_tpu=False):
            self.assertFalse(extended._use_merge_call())
            pairs = [(tf.ones(1), variable)]
            self.assertIs(inner._all_reduce_sum_gradients(pairs), pairs)
            self.assertEqual(
                inner.iterations.value.aggregation,
                tf.VariableAggregation.NONE,
            )
        self.assertEqual(inner.iterations.value.aggregation, aggregation)
        after = [dict(vars(each)) for each in (extended, optimizer, inner)]
        self.assertEqual(list(map(set, after)), list(map(set, before)))

    def test_local_variable(self):
        variable = tf.Variable(1.0)
        self.assertIs(compat.local_variable(variable), variable)

    def test_number_of_batches(self):
        strategy = tf.distribute.MirroredStrategy(["CPU:0"])
        data = tf.data.Dataset.range(7).batch(2)
        for dataset, num_batches in ((data, 4), (data.repeat(), -1)):
            distributed = strategy.experimental_distribute_dataset(dataset)
            self.assertEqual(
                compat.number_of_batches(iter(distributed)), num_batches
            )

    def test_asking_no_other_workers(self):
        before = input_lib._calculate_replicas_with_values
        optionals = [
            tf.experimental.Optional.from_value(1),
            tf.experimental.Optional.empty(tf.TensorSpec((), tf.int32)),
        ]
        with compat.asking_no_other_workers():
            count = input_lib._calculate_replicas_with_values(
                None, None, [optionals]
            )
        self.assertAllEqual(count, 1)
        self.assertIs(input_lib._calculate_replicas_with_values, before)

    def test_compute_loss(self):
        model = test_utils.mlp()
        model.compile("sgd", loss=test_utils.crossentropy())
        ((x, y),) = test_utils.microbatches([4])
        loss = compat.compute_loss(model, x, y, model(x), None, True)
        self.assertAllClose(loss, model.test_on_batch(x, y))

    def test_automatic_config(self):
        @compat.keeps_automatic_config
        def get_config(self):
            return keras.Model.get_config(self)

        cls = type("Automatic", (keras.Model,), {"get_config": get_config})
        self.assertIn("trainable", cls().get_config())

    def test_checkpoint_mixin(self):
        class Model(compat.CheckpointMixin, keras.Model):
            def __init__(self):
                super().__init__()
                part = tf.train.Checkpoint(value=tf.Variable(1.0))
                compat.set_untracked(self, "part", part)

            def _children_to_save(self):
                return {"extra": self.part}

            def _child_to_restore(self, name):
                return self.part if name == "extra" else None

        model, other = Model(), Model()
        # Neither Keras nor TensorFlow has it as an attribute.
        self.assertNotIn("part", keras.Model._trackable_children(model))
        model.part.value.assign(2.0)
        path = tf.train.Checkpoint(model=model).write(
            f"{self.get_temp_dir()}/checkpoint"
        )
        tf.train.Checkpoint(model=other).read(path).assert_consumed()
        self.assertAllEqual(other.part.value, 2.0)
        exported = model._trackable_children("savedmodel", cache={})
        self.assertNotIn("extra", exported)

    def test_saveable(self):
        class Part(compat.Saveable):
            def __init__(self, value):
                self.value = np.asarray(value)

            def save_own_variables(self, store):
                store["value"] = self.value

            def load_own_variables(self, store):
                self.value = np.asarray(store["value"])

        model, other = test_utils.mlp(), test_utils.mlp()
        compat.set_untracked(model, "part", Part(3.0))
        compat.set_untracked(other, "part", Part(0.0))
        path = f"{self.get_temp_dir()}/model.weights.h5"
        model.save_weights(path)
        other.load_weights(path)
        self.assertAllEqual(other.part.value, 3.0)

    def test_told_of_clones(self):
        seen = []

        class Told(compat.ToldOfClones, compat.functional_class()):
            def _record_clone(self, outputs):
                seen.append((self, len(outputs)))

        inputs = keras.Input((2,))
        model = Told(inputs, keras.layers.Dense(2)(inputs))
        model(np.ones((1, 2)))
        self.assertEqual({num_outputs for _, num_outputs in seen}, {0})
        keras.models.clone_model(model)
        self.assertIn((model, 1), seen)

    def test_attributes_to_share(self):
        model = test_utils.mlp()
        model.compile("sgd", loss="mse")
        attributes = compat.attributes_to_share(model)
        self.assertIs(attributes["optimizer"], model.optimizer)
        self.assertNotIn("build", attributes)
        # Each object has its own parts of checkpoints.
        name = "_self_unconditional_checkpoint_dependencies"
        self.assertEqual(attributes[name], vars(model)[name])
        self.assertIsNot(attributes[name], vars(model)[name])

    def test_layers(self):
        layer = keras.layers.BatchNormalization(momentum=0.5)
        model = keras.Sequential([layer, keras.layers.Dropout(0.5)])
        x = np.array([[0.0], [2.0]], "float32")
        seen = []
        with compat.recording_moments(lambda *args: seen.append(args)):
            model(x, training=True)
        self.assertEqual([each for each, *_ in seen], [layer])
        _, inputs, mask, means, variances = seen[0]
        self.assertAllEqual(inputs, x)
        self.assertIsNone(mask)
        self.assertAllEqual(means, [1.0])
        self.assertAllEqual(variances, [1.0])
        self.assertEqual(compat.normalizations(model), [layer])
        (state,) = compat.random_states(model)
        self.assertIs(state, model.layers[1].seed_generator.state)
        self.assertFalse(compat.renormalizes(layer))
        self.assertLen(compat.moving_statistics(layer), 2)
        self.assertAllEqual(layer.moving_mean, [0.5])

    @test_utils.needs_renorm
    def test_renorm(self):
        renorm = keras.layers.BatchNormalization(momentum=0.5, renorm=True)
        renorm(np.array([[0.0], [2.0]], "float32"), training=True)
        self.assertTrue(compat.renormalizes(renorm))
        self.assertLen(compat.moving_statistics(renorm), 5)
        before = [v.numpy() for v in compat.moving_statistics(renorm)]
        compat.update_renorm_statistics(
            renorm, tf.constant([7.0]), tf.constant([5.0])
        )
        after = compat.moving_statistics(renorm)
        self.assertAllClose(after[0], (before[0] + 7.0) / 2)
        self.assertAllGreater(after[1] - before[1], 0.0)

    def test_graphs(self):
        variable = tf.Variable(1.0)
        graphs, found, uses, is_xla = [], [], [], []

        def function():
            graphs.append(compat.current_graph())
            variable.assign(2.0)
            found.extend(op.type for op in compat.stateful_operations())
            uses.extend(op.type for op in compat.uses(graphs[-1], variable))
            is_xla.append(compat.is_compiled_by_xla())
            return tf.constant(1.0) + 1.0

        self.assertIsNone(compat.current_graph())
        concrete = tf.function(function).get_concrete_function()
        self.assertIs(graphs[-1], concrete.graph)
        self.assertIn("AssignVariableOp", found)
        self.assertNotIn("Const", found)
        self.assertEqual(uses, ["AssignVariableOp"])
        tf.function(function, jit_compile=True).get_concrete_function()
        self.assertEqual(is_xla, [False, True])

    def test_uninitialized(self):
        # The last one has more bytes than an axis may have entries.
        for size in (8, 512, 3 * 2**30):
            with tf.device("CPU:0"):
                memory = compat.uninitialized(size)
            self.assertEqual(memory.dtype, tf.uint8)
            self.assertBetween(memory.shape.num_elements(), size, size + 255)

    def test_attribute(self):
        layer = keras.layers.Dense(2)
        before = dict(vars(layer))
        with (
            compat.attribute(layer, "units", 3),
            compat.attribute(layer, "build", None),
        ):
            self.assertEqual(layer.units, 3)
            self.assertIsNone(layer.build)
        self.assertEqual(vars(layer), before)

    def test_record_number_of_batches(self):
        with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
            model = test_utils.mlp()
        seen = []

        def note(epoch_iterator):
            compat.record_number_of_batches(epoch_iterator)
            seen.append(int(epoch_iterator._distributed_dataset.cardinality))

        ((x, _),) = test_utils.microbatches([4])
        with compat.recording_epoch_iterators(note):
            model.predict(x, batch_size=2, verbose=0)
        self.assertEqual(set(seen), {2})

    def test_sum_to(self):
        strategy = tf.distribute.MirroredStrategy(["CPU:0"])
        with strategy.scope():
            where = tf.Variable(0.0)
        values = strategy.run(lambda: tf.constant([1.0, 2.0]))
        total = compat.sum_to(strategy, values, where)
        self.assertAllEqual(
            strategy.experimental_local_results(total)[0], [1.0, 2.0]
        )

    def test_gather_to(self):
        strategy = tf.distribute.MirroredStrategy(["CPU:0"])
        with strategy.scope():
            where = tf.Variable(0.0)
        values = strategy.run(lambda: tf.constant([1.0, 2.0]))
        found = compat.gather_to(strategy, values, where)
        self.assertAllEqual(
            strategy.experimental_local_results(found)[0], [1.0, 2.0]
        )

    def test_first_epoch(self):
        model = test_utils.mlp()
        model.compile("sgd", loss=test_utils.crossentropy())
        resume = keras.callbacks.LambdaCallback(
            on_train_begin=lambda logs: setattr(model, compat.FIRST_EPOCH, 2)
        )
        ((x, y),) = test_utils.microbatches([4])
        history = model.fit(x, y, epochs=3, callbacks=[resume], verbose=0)
        self.assertEqual(history.epoch, [2])

    def test_ending_training_by(self):
        model = test_utils.mlp()
        model.compile("sgd", loss=test_utils.crossentropy())
        ((x, y),) = test_utils.microbatches([4])
        seen = []

        def end(finalize, variables):
            seen.append(len(variables))
            finalize(variables)

        with compat.ending_training_by(model.optimizer, end):
            model.fit(x, y, epochs=2, verbose=0)
        model.fit(x, y, verbose=0)
        self.assertEqual(seen, [len(model.trainable_weights)])

    def test_symbolic_build_mixin(self):
        seen = []

        class Model(compat.SymbolicBuildMixin, keras.Sequential):
            def _build_from(self, iterator, data_batch):
                seen.append((iterator is not None, data_batch is not None))

        x, y = np.ones((4, 2), "float32"), np.ones((4, 2), "float32")
        for scope in (
            contextlib.nullcontext(),
            tf.distribute.OneDeviceStrategy("CPU:0").scope(),
        ):
            with scope:
                model = Model([keras.Input((2,)), keras.layers.Dense(2)])
                model.compile("sgd", loss="mse")
            model.train_on_batch(x, y)
            model.evaluate(x, y, verbose=0)
        # Of the second alone.
        self.assertEqual(seen, [(False, True), (True, False)])

    def test_is_overwritten(self):
        variable = keras.Variable(1.0)
        self.assertFalse(compat.is_overwritten(variable))
        variable.overwrite_with_gradient = True
        self.assertTrue(compat.is_overwritten(variable))


if __name__ == "__main__":
    tf.test.main()
