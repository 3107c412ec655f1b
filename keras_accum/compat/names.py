"""The private names that are used, and what to say where one is not there."""

import importlib
import inspect
import types

import keras
import tensorflow as tf

# By the module or class that has them. Releases that lack one cannot be used.
NAMES = {
    "keras.Layer": (
        "_call_has_training_arg",
        "_flatten_layers",
        "_get_own_losses",
        "_seed_generators",
    ),
    "keras.Model": (
        "_aggregate_additional_loss",
        "_compile_loss",
        "_compute_loss",
        "_distribute_strategy",
        "_initial_epoch",
        "_jit_compile",
        "_lookup_dependency",
        "_loss_tracker",
        "_maybe_symbolic_build",
        "_run_eagerly",
        "_symbolic_build",
        "_trackable_children",
    ),
    "keras.Optimizer": (
        "_all_reduce_sum_gradients",
        "_trainable_variables",
        "apply",
        "assign",
    ),
    "keras.Variable": ("_direct_assign", "_value"),
    "keras.callbacks.Callback": ("_model",),
    "keras.callbacks.TensorBoard": ("_write_keras_model_summary",),
    "keras.layers.BatchNormalization": ("_moments",),
    "keras.src.backend": (
        "Variable",
        "compute_output_spec",
        "standardize_dtype",
    ),
    "keras.src.backend.common.global_state": (
        "get_global_attribute",
        "set_global_attribute",
    ),
    "keras.src.backend.common.masking": ("get_keras_mask", "set_keras_mask"),
    "keras.src.backend.tensorflow.trainer": (
        "TFEpochIterator",
        "TensorFlowTrainer",
        "reduce_per_replica",
    ),
    "keras.src.backend.tensorflow.trainer.TFEpochIterator": (
        "_current_iterator",
        "_distributed_dataset",
        "_epoch_iterator",
        "_get_iterator",
    ),
    "keras.src.losses.loss": (
        "apply_mask",
        "scale_loss_for_distribution",
        "squeeze_or_expand_to_same_rank",
        "unscale_loss_for_distribution",
    ),
    "keras.src.models.functional": (
        "Functional",
        "functional_like_constructor",
    ),
    "keras.src.models.functional.Functional": ("_run_through_graph",),
    "keras.src.ops.function.Function": ("_nodes_by_depth",),
    "keras.src.ops.node.Node": ("_keras_history",),
    "keras.src.random.seed_generator": ("global_seed_generator",),
    "keras.src.saving.keras_saveable": ("KerasSaveable",),
    "keras.src.saving.keras_saveable.KerasSaveable": ("_obj_type",),
    "keras.src.trainers.compile_utils.CompileLoss": (
        "_flat_losses",
        "_metrics",
    ),
    "keras.src.trainers.trainer": ("Trainer",),
    "keras.src.utils.python_utils": ("default",),
    "keras.src.utils.tracking": ("DotNotTrackScope",),
    "tensorflow": ("raw_ops",),
    "tensorflow.Operation": ("op_def",),
    "tensorflow.python.framework.ops.SymbolicTensor": ("consumers",),
    "tensorflow.compiler.xla.service.hlo_pb2": ("HloProto",),
    "tensorflow.data.Dataset": ("_inputs",),
    "tensorflow.python.client.device_lib": ("list_local_devices",),
    "tensorflow.python.distribute.values.DistributedValues": (
        "_get_on_device_or_primary",
    ),
    "tensorflow.distribute.Strategy": ("extended",),
    "tensorflow.python.data.experimental.ops.distribute": (
        "_LegacyRebatchDataset",
    ),
    "tensorflow.python.data.ops.rebatch_op": ("_RebatchDataset",),
    "tensorflow.python.distribute.collective_all_reduce_strategy"
    ".CollectiveAllReduceExtended": ("_get_cross_device_ops",),
    "tensorflow.python.distribute.cross_device_ops.CollectiveAllReduce": (
        "_launchers",
    ),
    "tensorflow.python.distribute.cross_device_utils"
    ".CollectiveReplicaLauncher": (
        "_device",
        "_get_ordering_token",
        "_group_key",
        "_group_size",
        "_next_instance_key",
        "_options",
    ),
    "tensorflow.python.distribute.distribute_lib.StrategyExtendedV1": (
        "_gather_to",
        "_use_merge_call",
    ),
    "tensorflow.python.distribute.input_lib": (
        "_calculate_replicas_with_values",
        "_create_iterators_per_worker",
    ),
    "tensorflow.python.distribute.input_lib.DistributedDataset": (
        "_cardinality",
    ),
    "tensorflow.python.distribute.input_lib.DistributedIterator": (
        "_cardinality",
        "_iterators",
    ),
    "tensorflow.python.distribute.input_lib._SingleWorkerDatasetIteratorBase": (
        "_dataset",
    ),
    "tensorflow.python.eager.record": ("stop_recording",),
    "tensorflow.python.framework.func_graph.FuncGraph": ("capture",),
    "tensorflow.python.ops.collective_ops": ("all_to_all_v2",),
    "tensorflow.python.ops.custom_gradient": (
        "_eager_mode_decorator",
        "_graph_mode_decorator",
    ),
    "tensorflow.python.ops.control_flow_util": ("GraphOrParentsInXlaContext",),
    "tensorflow.python.ops.resource_variable_ops": (
        "BaseResourceVariable",
        "ResourceVariable",
    ),
    "tensorflow.python.ops.resource_variable_ops.BaseResourceVariable": (
        "_aggregation",
    ),
    "tensorflow.python.ops.stateless_random_ops": ("stateless_random_uniform",),
    "tensorflow.python.trackable.base.Trackable": (
        "_self_unconditional_checkpoint_dependencies",
        "_self_unconditional_deferred_dependencies",
        "_self_unconditional_dependency_names",
    ),
}

# The first releases that are known to have them.
OLDEST = {"keras": (3, 8), "tensorflow": (2, 16)}


def check_all() -> None:
    """Raises an `ImportError` for the first name that is not there."""
    for path, names in NAMES.items():
        try:
            owner = _resolve(path)
        except ImportError:
            raise ImportError(absence(path)) from None
        for name in names:
            if not has(owner, name):
                raise ImportError(absence(f"{path}.{name}"))


def _resolve(path):
    """Returns the module or class of a dotted name."""
    owner, _, rest = path.partition(".")
    resolved = importlib.import_module(owner)
    for name in rest.split(".") if rest else ():
        owner = f"{owner}.{name}"
        # TensorFlow has folders of the names of attributes.
        if hasattr(resolved, name):
            resolved = getattr(resolved, name)
        else:
            resolved = importlib.import_module(owner)
    return resolved


def has(owner, name) -> bool:
    """Returns whether a module or class has a name, or its objects have.

    What is set on objects is there if a method of the class, or of one of its
    bases, has the name in its code: no object is made to see.
    """
    if hasattr(owner, name):
        return True
    codes = (
        getattr(inspect.unwrap(value), "__code__", None)
        for cls in getattr(owner, "__mro__", ())
        for value in vars(cls).values()
        if isinstance(value, types.FunctionType)
    )
    return any(name in code.co_names for code in codes if code is not None)


def absence(path: str) -> str:
    """Returns what to say where the installed release has no `path`."""
    package = path.partition(".")[0]
    title, installed = {
        "keras": ("Keras", keras.__version__),
        "tensorflow": ("TensorFlow", tf.__version__),
    }[package]
    release = tuple(map(int, installed.split(".")[:2]))
    oldest = OLDEST[package]
    if release < oldest:
        way_out = f"install {package}>={_dotted(oldest)}"
    else:
        way_out = f"install {package}<{_dotted(release)} or a newer keras_accum"
    return (
        f"keras_accum uses `{path}`, which {title} {installed} does not have; "
        f"{way_out}."
    )


def _dotted(release) -> str:
    return ".".join(map(str, release))
