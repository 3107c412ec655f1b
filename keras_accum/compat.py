"""Every private name that is used, each in one small function.

What is needed here has no public name. `tests/compat_test.py` fails with a
clear message when one of them is gone from a Keras release.
"""

import contextlib
import copy
import pathlib
import threading
import traceback
import weakref
from collections.abc import Iterator

import keras
import tensorflow as tf
from keras.src import backend
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
from keras.src.backend.tensorflow.trainer import TFEpochIterator
from keras.src.backend.tensorflow.trainer import reduce_per_replica
from keras.src.losses import loss as loss_module
from keras.src.models.functional import Functional
from keras.src.random import seed_generator
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.trainers.trainer import Trainer
from keras.src.utils import python_utils
from keras.src.utils.tracking import DotNotTrackScope
from tensorflow.compiler.xla.service import hlo_pb2
from tensorflow.python.data.experimental.ops import distribute as data_ops
from tensorflow.python.data.ops import rebatch_op
from tensorflow.python.distribute import input_lib
from tensorflow.python.ops import control_flow_util
from tensorflow.python.ops import resource_variable_ops

# The name of `CheckpointMixin`'s part in checkpoints.
CHECKPOINT = "accumulation_window"

# Where `BackupAndRestore` tells `fit` with which epoch to begin.
FIRST_EPOCH = "_initial_epoch"


def functional_class() -> type[keras.Model]:
    """The class of models that are built from inputs and outputs.

    `keras.Model(inputs, outputs)` returns one; it has no public name.
    """
    return Functional


class Saveable(KerasSaveable):
    """What has a part of its own in the files of the model that it is of."""

    def _obj_type(self):
        return "Loss"  # One that has no parts.


class CheckpointMixin:
    """A model whose `_accum_checkpoint` is part of TensorFlow's checkpoints.

    Only if it is not empty, so that all others are those of `keras.Model`; and
    not of what is exported.
    """

    def _trackable_children(self, save_type="checkpoint", **kwargs):
        children = super()._trackable_children(save_type, **kwargs)
        own = self._accum_checkpoint
        if save_type == "checkpoint" and not own.is_empty():
            children = children | {CHECKPOINT: own}
        return children

    def _lookup_dependency(self, name, *args, **kwargs):
        if name == CHECKPOINT:
            return self._accum_checkpoint
        return super()._lookup_dependency(name, *args, **kwargs)


def set_untracked(owner, name, value) -> None:
    """Sets an attribute that Keras and TensorFlow do not look at."""
    object.__setattr__(owner, name, value)


def random_states(model) -> list[keras.Variable]:
    """The states of all random generators of a model's layers."""
    return [
        generator.state
        for layer in model._flatten_layers()
        for generator in layer._seed_generators
    ]


def normalizations(model) -> list[keras.layers.BatchNormalization]:
    """All `BatchNormalization` layers, in an order that is always the same."""
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]


def share_attributes(model, other, is_shared) -> None:
    """Gives one model what another one has.

    Args:
        model: The one that has it.
        other: One whose constructor has not run.
        is_shared: Tells by the name of an attribute whether it is given.
    """
    # Methods that `__new__` has put around those of the class.
    wrapped = {"build", "quantize"}
    attributes = {
        name: value
        for name, value in vars(model).items()
        if name not in wrapped and is_shared(name)
    }
    for name in (
        "_self_unconditional_checkpoint_dependencies",
        "_self_unconditional_dependency_names",
        "_self_unconditional_deferred_dependencies",
    ):
        # What `tf.train.Checkpoint` finds: another optimizer for the one is
        # none for the other.
        if name in attributes:
            attributes[name] = copy.copy(attributes[name])
    # Past `__setattr__`, which would track them once more.
    vars(other).update(attributes)


class ToldOfClones:
    """In front of a functional model's class: tells a clone of its original.

    `keras.models.clone_model` calls the clone's layers, one after the other, by
    this method, and makes a model of what they return. Layers that were called
    have left a history in it. When a model is called, there is none.
    """

    def _run_through_graph(self, *args, **kwargs):
        outputs = super()._run_through_graph(*args, **kwargs)
        for output in keras.tree.flatten(outputs):
            if hasattr(output, "_keras_history"):
                output._original = weakref.ref(self)
        return outputs


def take_original(tensors):
    """The model that a clone is made of, given its outputs; or None.

    It is told once: other models may be made of the same outputs.
    """
    original = None
    for tensor in keras.tree.flatten(tensors):
        if hasattr(tensor, "_original"):
            original = tensor._original()
            del tensor._original
    return original


def compute_loss(model, x, y, y_pred, sample_weight, training):
    """`model.compute_loss`.

    Calls overrides that lack the argument `training`, as Keras 3.2 had it.
    """
    return model._compute_loss(
        x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training
    )


def has_custom_compute_loss(model) -> bool:
    """Whether a class replaces Keras's own `compute_loss`."""
    return type(model).compute_loss is not Trainer.compute_loss


def has_custom_step(model, mixin, name) -> bool:
    """Whether a class behind `mixin` replaces Keras's own step of a name.

    Args:
        model: The model.
        mixin: A class of its, which has a step of that name.
        name: "train_step" or "test_step".
    """
    behind = getattr(super(mixin, model), name)
    return behind.__func__ is not getattr(TensorFlowTrainer, name)


def takes_training_argument(model) -> bool:
    """Whether `model.call` has an argument `training`."""
    return model._call_has_training_arg


def loss_tracker(model):
    """The metric behind the "loss" that `fit` reports; None if uncompiled."""
    return getattr(model, "_loss_tracker", None)


def set_loss_tracker(model, metric) -> None:
    """Replaces the metric behind the "loss" that `fit` reports."""
    # Tracked, it would be listed in `model.metrics` a second time.
    with DotNotTrackScope():
        model._loss_tracker = metric


def unscale_loss(loss):
    """Undoes the division of the loss by the number of replicas."""
    return loss_module.unscale_loss_for_distribution(loss)


def optionals_to_none(model, function):
    """Wraps `function(data)`: empty `tf.experimental.Optional`s become None.

    Keras's data adapters say "no sample weights" in that way.
    """
    return model._autoconvert_optionals(function)


def concatenate_outputs(outputs, strategy):
    """The outputs of all replicas, one after the other."""
    return reduce_per_replica(outputs, strategy, reduction="concat")


def first_batch(epoch_iterator):
    """The first replica's part of an epoch's first batch.

    Keras takes the mean over the replicas, which fails where the parts differ
    in their shapes, or are on several workers (keras#20585).
    """
    for _, _, iterator in epoch_iterator:
        return keras.tree.map_structure(
            lambda value: (
                value.values[0]
                if isinstance(value, tf.distribute.DistributedValues)
                else value
            ),
            next(iterator),
        )
    return None


def current_graph() -> tf.Graph | None:
    """What is being traced in this thread; None if nothing is."""
    if tf.executing_eagerly():
        return None
    return tf.compat.v1.get_default_graph()


def is_compiled_by_xla() -> bool:
    """Whether what is traced here is a part of a program of XLA's."""
    graph = tf.compat.v1.get_default_graph()
    return control_flow_util.GraphOrParentsInXlaContext(graph)


def has_local_strategy(model) -> bool:
    """Whether a model was made in the scope of a strategy."""
    return model._distribute_strategy is not None


def symbolic_build(model, data_batch) -> None:
    """Makes all variables that a batch needs, without running it."""
    model._symbolic_build(data_batch=data_batch)


def global_seed_state() -> list[keras.Variable]:
    """The state of the random generator that all layers without one share."""
    return [seed_generator.global_seed_generator().state]


def planned_bytes(program, *args) -> int:
    """What a compiled `tf.function` allocates when it is called, at most.

    XLA plans that when it compiles. No public name has it; the format is XLA's
    `HloProto`.

    Args:
        program: The `tf.function`, with `jit_compile`.
        *args: Its arguments: nested tensors, or flat `tf.TensorSpec`s.
    """
    hlo = hlo_pb2.HloProto.FromString(
        program.experimental_get_compiler_ir(*args)(
            stage="optimized_hlo_proto_serialized"
        )
    )
    return sum(
        allocation.size
        for allocation in hlo.buffer_assignment.buffer_allocations
        if not allocation.is_entry_computation_parameter
        and not allocation.is_constant
        and not allocation.is_thread_local
    )


def own_copy(variable):
    """Within a replica, its own copy of a `tf.Variable`."""
    if isinstance(variable, tf.distribute.DistributedValues):
        return variable._get_on_device_or_primary()
    return variable


@contextlib.contextmanager
def without_communication(optimizer, is_tpu) -> Iterator[None]:
    """Lets an optimizer update each replica's copies from what it is given.

    All replicas must give it the same gradients. By itself it would sum them
    over the replicas, after it has clipped them, and leave the replicas'
    programs for that, where XLA cannot follow.

    Args:
        optimizer: The optimizer of a model.
        is_tpu: Whether `merge_call` is known to XLA, as it is on TPUs alone.
    """
    extended = tf.distribute.get_strategy().extended
    parts = [optimizer, getattr(optimizer, "inner_optimizer", None)]
    parts += getattr(optimizer, "optimizers", [])
    with contextlib.ExitStack() as stack:
        for part in parts:
            if part is not None:
                stack.enter_context(
                    attribute(
                        part, "_all_reduce_sum_gradients", lambda pairs: pairs
                    )
                )
        if not is_tpu:
            # As TensorFlow's own tests do it: each replica then runs what it
            # would have left to `merge_call`, on its own copies.
            stack.enter_context(
                attribute(extended, "_use_merge_call", lambda: False)
            )
            for part in parts:
                for variable in getattr(part, "variables", []):
                    # The number of updates would be sent by the first replica.
                    stack.enter_context(
                        attribute(
                            variable.value,
                            "_aggregation",
                            tf.VariableAggregation.NONE,
                        )
                    )
        yield


def ending_training_by(optimizer, function):
    """Has a function be called where Keras ends a `fit`, for a while.

    Args:
        optimizer: The optimizer, which then takes averages for the weights, if
            it has any.
        function: Called as `function(end, *args)`, where `end(*args)` does
            what Keras would.

    Returns:
        A context manager.
    """
    name = "finalize_variable_values"
    end = getattr(optimizer, name)
    return attribute(
        optimizer, name, lambda *args, **kwargs: function(end, *args, **kwargs)
    )


@contextlib.contextmanager
def attribute(owner, name, value):
    """Gives an object another attribute for a while."""
    missing = object()
    before = vars(owner).get(name, missing)
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, before)


class _Hook:
    """A function of others that calls one of ours, in threads that ask for it.

    Args:
        owner: The class or module.
        name: Name of its method or function.
    """

    def __init__(self, owner, name):
        self._owner, self._name = owner, name
        self._method = getattr(owner, name)
        self._local = threading.local()
        self._lock = threading.Lock()
        self._users = 0

    @contextlib.contextmanager
    def calling(self, function):
        """Has this thread call `function(method, owner, *args)` for a while."""
        before = getattr(self._local, "function", None)
        self._count_users(1)
        self._local.function = function
        try:
            yield
        finally:
            self._local.function = before
            self._count_users(-1)

    def _count_users(self, change):
        """Replaces the method while anyone uses it, in whatever thread."""

        def replaced(*args, **kwargs):
            function = getattr(self._local, "function", None)
            if function is None:
                return self._method(*args, **kwargs)
            return function(self._method, *args, **kwargs)

        with self._lock:
            self._users += change
            method = replaced if self._users else self._method
            setattr(self._owner, self._name, method)


_assignments = _Hook(backend.Variable, "_direct_assign")
_moments = _Hook(keras.layers.BatchNormalization, "_moments")
_new_iterators = _Hook(input_lib, "_create_iterators_per_worker")
_begun_epochs = _Hook(TFEpochIterator, "_get_iterator")
# What updates anything ends in one of these.
_updates = [
    _Hook(cls, "apply")
    for cls in (keras.Optimizer, keras.optimizers.LossScaleOptimizer)
]


def assigning_through(function):
    """Has a function say what Keras's variables are assigned, in this thread.

    Args:
        function: Called as `function(variable, value)`; its result is what
            the `keras.Variable` is assigned.

    Returns:
        A context manager.
    """
    return _assignments.calling(
        lambda assign, variable, value: assign(
            variable, function(variable, value)
        )
    )


@contextlib.contextmanager
def before_updates(function) -> Iterator[None]:
    """Has a function be called before Keras's optimizers update, likewise.

    Args:
        function: Called as `function(optimizer)`.
    """

    def update(apply, optimizer, *args, **kwargs):
        function(optimizer)
        return apply(optimizer, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for hook in _updates:
            stack.enter_context(hook.calling(update))
        yield


def line_of_caller() -> str:
    """The line that called Keras: the last that is none of Keras's or ours."""
    folders = [
        str(pathlib.Path(file).parent) for file in (__file__, keras.__file__)
    ]
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(tuple(folders)):
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return "an unknown line"


def noting_moments(function):
    """Has a function see what BatchNormalization normalises with, likewise.

    Args:
        function: Called as `function(layer, inputs, mask, means, variances)`.

    Returns:
        A context manager.
    """

    def note(compute, layer, inputs, mask):
        means, variances = compute(layer, inputs, mask)
        function(layer, inputs, mask, means, variances)
        return means, variances

    return _moments.calling(note)


def is_overwritten(variable) -> bool:
    """Whether a variable is assigned its gradient, as the scales of float8."""
    return getattr(variable, "overwrite_with_gradient", False)


def moving_statistics(layer) -> list[keras.Variable]:
    """What a BatchNormalization assigns when it has seen a batch."""
    names = ["moving_mean", "moving_variance"]
    if layer.renorm:
        names += ["moving_stddev", "renorm_mean", "renorm_stddev"]
    return [getattr(layer, name) for name in names]


def update_moving_statistics(layer, means, variances) -> None:
    """Does what a BatchNormalization does with the moments of a batch."""
    if layer.renorm:
        layer._update_renorm_statistics(means, variances)
        return
    for variable, value in (
        (layer.moving_mean, means),
        (layer.moving_variance, variances),
    ):
        moving = tf.cast(variable, value.dtype)
        variable.assign(
            moving * layer.momentum + value * (1.0 - layer.momentum)
        )


@contextlib.contextmanager
def computing_assignments() -> Iterator[None]:
    """Lets `tf.Variable`s be assigned nothing: the values are only computed.

    For tracing a function that is to need what another needs, and to change
    nothing. Optimizers assign `tf.Variable`s, which `keras.StatelessScope` does
    not know.
    """

    def compute(variable, value, *unused_args, **unused_kwargs):
        # A stateful op, or TensorFlow would leave out what it is made of.
        with tf.control_dependencies([tf.convert_to_tensor(value)]):
            tf.raw_ops.Assert(condition=True, data=[0])
        return variable

    def add(variable, value, *unused_args, **unused_kwargs):
        return compute(variable, variable + value)

    methods = {
        "assign": compute,
        "assign_add": add,
        "assign_sub": add,
        "scatter_add": compute,
        "scatter_sub": compute,
        "scatter_update": compute,
    }
    with contextlib.ExitStack() as stack:
        # Of the two that there are, either may have methods of its own.
        for owner in (
            resource_variable_ops.BaseResourceVariable,
            resource_variable_ops.ResourceVariable,
        ):
            for name in methods.keys() & vars(owner).keys():
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, methods[name])
        yield


def iterating_over(function):
    """Has a function say what distributed data are iterated over, likewise.

    Args:
        function: Called with each worker's `tf.data.Dataset`; returns one.

    Returns:
        A context manager.
    """
    return _new_iterators.calling(
        lambda make, datasets, *args, **kwargs: make(
            [function(dataset) for dataset in datasets], *args, **kwargs
        )
    )


def noting_epoch_iterators(function):
    """Has a function see each epoch iterator when it begins, likewise.

    Args:
        function: Called with what Keras counts the steps of an epoch with.

    Returns:
        A context manager.
    """

    def note(data_of, epoch_iterator):
        function(epoch_iterator)
        return data_of(epoch_iterator)

    return _begun_epochs.calling(note)


def end_epoch(epoch_iterator) -> None:
    """Lets go of the data of an epoch, which may be in its middle.

    Keras does the same before the next one. The generator of the steps refers
    to what has it.
    """
    epoch_iterator._current_iterator = None
    epoch_iterator._epoch_iterator = None


def number_of_batches(iterator) -> int:
    """How many batches a distributed iterator has for this worker in all.

    Returns:
        A negative number where that is not known, or there is no end.
    """
    return min(
        _number_of_steps(part._dataset, iterator._cardinality)
        for part in iterator._iterators
    )


def note_number_of_batches(epoch_iterator) -> None:
    """Tells a distributed dataset what Keras knows of its length.

    Keras makes the dataset of arrays in a way that hides it.
    """
    dataset, number = (
        epoch_iterator._distributed_dataset,
        epoch_iterator.num_batches,
    )
    is_unknown = dataset.cardinality == tf.data.UNKNOWN_CARDINALITY
    if number is not None and is_unknown:
        dataset._cardinality = number


def _number_of_steps(dataset, uncut_length):
    """The length of a worker's dataset before it was cut into shares.

    TensorFlow does not know how many shares there are. If each worker has its
    share of each batch, if need be an empty one, there is a step per batch.
    """
    policy = dataset.options().experimental_distribute.auto_shard_policy
    is_cut = (rebatch_op._RebatchDataset, data_ops._LegacyRebatchDataset)
    uncut = dataset
    while policy == tf.data.experimental.AutoShardPolicy.DATA:
        inputs = uncut._inputs()
        if len(inputs) != 1:
            break
        if isinstance(uncut, is_cut):
            return int(uncut_length)
        uncut = inputs[0]
    return int(dataset.cardinality())


@contextlib.contextmanager
def asking_no_other_workers() -> Iterator[None]:
    """Lets distributed iterators end when the data end on this worker.

    By themselves they ask all workers at every step whether anyone has a batch
    left.
    """

    def count_here(strategy, input_workers, optionals):
        del strategy, input_workers
        has_value = [each.has_value() for each in tf.nest.flatten(optionals)]
        return tf.math.count_nonzero(tf.stack(has_value))

    with attribute(input_lib, "_calculate_replicas_with_values", count_here):
        yield


def keras_mask(tensor):
    """The mask that a layer attached to its output, or None."""
    return backend.get_keras_mask(tensor)


def merge_mask(sample_weight, mask, dtype, reduction):
    """The weights of a loss's entries, as `keras.Loss` merges them."""
    return loss_module.apply_mask(
        sample_weight, mask, dtype=dtype, reduction=reduction
    )


def align_ranks(values, weight):
    """`values` and `weight` with the ranks at which `keras.Loss` multiplies."""
    return loss_module.squeeze_or_expand_to_same_rank(values, weight)


def compiled_loss(model):
    """The object that computes the losses given to `compile`, or None.

    It pairs each loss with its output, label and sample weight.
    """
    return getattr(model, "_compile_loss", None)


def own_losses(model) -> list[tf.Tensor]:
    """What layers added by `add_loss` and activity regularizers."""
    losses = list(model._get_own_losses())
    for layer in model._flatten_layers(include_self=False):
        losses.extend(layer._get_own_losses())
    return losses


def map_compiled_losses(compiled, function, y, y_pred, sample_weight):
    """Calls `function` for each loss of `compile`, with what the loss sees.

    Args:
        compiled: What `compiled_loss` returned, after its first call.
        function: Called as `function(loss, y_true, y_pred, sample_weight)`.
        y: Labels of the batch, in any structure that Keras takes.
        y_pred: Outputs of the model.
        sample_weight: Sample weights of the batch, or None.
    """
    # A copy of the object walks the structures, with other leaves: Keras
    # reconciles lists, tuples, dicts and partial losses in many ways.
    walker = object.__new__(type(compiled))
    walker.__dict__.update(compiled.__dict__)
    walker._flat_losses = [
        entry._replace(loss=_Leaf(entry.loss, function), loss_weights=None)
        for entry in compiled._flat_losses
    ]
    walker._metrics = [None] * len(walker._flat_losses)
    walker(y, y_pred, sample_weight)


@contextlib.contextmanager
def weighting_losses(compiled, factors) -> Iterator[None]:
    """Multiplies the losses of `compile` by factors, for a while.

    Args:
        compiled: What `compiled_loss` returned, built.
        factors: One scalar per loss; None to leave it as it is.
    """
    entries = [
        entry
        if factor is None
        else entry._replace(
            loss_weights=factor
            if entry.loss_weights is None
            else entry.loss_weights * factor
        )
        for entry, factor in zip(compiled._flat_losses, factors, strict=True)
    ]
    with attribute(compiled, "_flat_losses", entries):
        yield


def build_compiled_losses(compiled, y, y_pred, sample_weight) -> None:
    """Lets `compiled` meet its first batch, and make its metrics, unrun."""

    def symbolic(leaf):
        if leaf is None:
            return None
        return keras.KerasTensor(
            leaf.shape, backend.standardize_dtype(leaf.dtype)
        )

    batch = keras.tree.map_structure(symbolic, (y, y_pred, sample_weight))
    backend.compute_output_spec(compiled, *batch)


def number_of_losses(compiled) -> int:
    """How many losses `compile` was given; `compiled` is built."""
    return len(compiled._flat_losses)


def output_metrics(compiled) -> list[keras.Metric]:
    """The metrics behind the losses of single outputs; none if there is one."""
    return list(compiled._metrics)


def replace_output_metrics(compiled, make) -> list[keras.Metric]:
    """Replaces what `output_metrics` returns, and returns the new ones.

    Args:
        compiled: What `compiled_loss` returned, built.
        make: A function from an old metric to the new one.
    """
    # The same list: what tracks the metrics has it too.
    compiled._metrics[:] = [make(metric) for metric in compiled._metrics]
    return output_metrics(compiled)


def is_built(compiled) -> bool:
    """Whether `compiled` has met its first batch."""
    return bool(compiled.built)


def keeps_automatic_config(get_config):
    """Marks an override of `get_config` that only adds to Keras's.

    Keras writes the configuration of a subclass from the arguments of its
    constructor, unless the subclass has a `get_config` without this mark.
    """
    return python_utils.default(get_config)


class _Leaf:
    """Stands in for a loss in `map_compiled_losses`."""

    def __init__(self, loss, function):
        self._loss = loss
        self._function = function

    def __call__(self, y_true, y_pred, sample_weight=None):
        self._function(self._loss, y_true, y_pred, sample_weight)
        return tf.zeros(())
