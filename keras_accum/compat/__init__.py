"""Every private name that is used, each in one small function.

What is needed here has no public name, or none that is documented. Each subject
has its module; the rest of `keras_accum` imports this package alone.
`names.py` lists them: a release of Keras or TensorFlow that lacks one is
refused here, by name. `tests/compat_test.py` says what each means.
"""

from keras_accum.compat import names

names.check_all()

from keras_accum.compat.classes import CheckpointMixin
from keras_accum.compat.classes import Saveable
from keras_accum.compat.classes import ToldOfClones
from keras_accum.compat.classes import attributes_to_share
from keras_accum.compat.classes import functional_class
from keras_accum.compat.classes import keeps_automatic_config
from keras_accum.compat.classes import set_untracked
from keras_accum.compat.classes import takes_inputs_and_outputs
from keras_accum.compat.draws import drawing_through
from keras_accum.compat.graphs import compute_anyway
from keras_accum.compat.graphs import current_graph
from keras_accum.compat.graphs import is_compiled_by_xla
from keras_accum.compat.graphs import memory_of_device
from keras_accum.compat.graphs import planned_bytes
from keras_accum.compat.graphs import stateful_operations
from keras_accum.compat.graphs import uninitialized
from keras_accum.compat.graphs import uses
from keras_accum.compat.hooks import attribute
from keras_accum.compat.iterators import asking_no_other_workers
from keras_accum.compat.iterators import end_epoch
from keras_accum.compat.iterators import first_batch
from keras_accum.compat.iterators import iterating_over
from keras_accum.compat.iterators import number_of_batches
from keras_accum.compat.iterators import record_number_of_batches
from keras_accum.compat.iterators import recording_epoch_iterators
from keras_accum.compat.layers import all_layers
from keras_accum.compat.layers import calling_operations_through
from keras_accum.compat.layers import compute_dtypes
from keras_accum.compat.layers import existing_seed_state
from keras_accum.compat.layers import global_seed_state
from keras_accum.compat.layers import inner_state
from keras_accum.compat.layers import moving_statistics
from keras_accum.compat.layers import normalizations
from keras_accum.compat.layers import normalizing_by_moving_statistics
from keras_accum.compat.layers import random_states
from keras_accum.compat.layers import recording_moments
from keras_accum.compat.layers import renormalizes
from keras_accum.compat.layers import replacing_moments
from keras_accum.compat.layers import stateful_layers
from keras_accum.compat.layers import unbuilt_layers
from keras_accum.compat.layers import update_renorm_statistics
from keras_accum.compat.losses import added_by
from keras_accum.compat.losses import added_losses
from keras_accum.compat.losses import align_ranks
from keras_accum.compat.losses import as_on_one_replica
from keras_accum.compat.losses import build_compiled_losses
from keras_accum.compat.losses import cached_logits
from keras_accum.compat.losses import compiled_loss
from keras_accum.compat.losses import dividing_losses
from keras_accum.compat.losses import is_built
from keras_accum.compat.losses import keras_mask
from keras_accum.compat.losses import loss_names
from keras_accum.compat.losses import map_compiled_losses
from keras_accum.compat.losses import merge_mask
from keras_accum.compat.losses import number_of_losses
from keras_accum.compat.losses import output_metrics
from keras_accum.compat.losses import recording_losses
from keras_accum.compat.losses import replace_output_metrics
from keras_accum.compat.losses import set_cached_logits
from keras_accum.compat.losses import set_keras_mask
from keras_accum.compat.losses import showing_values
from keras_accum.compat.losses import unscale_loss
from keras_accum.compat.losses import weighting_losses
from keras_accum.compat.remat import CallContext
from keras_accum.compat.remat import collecting_added_losses
from keras_accum.compat.remat import depends_on_weights
from keras_accum.compat.remat import is_made_of_recomputed
from keras_accum.compat.remat import recompute_layer
from keras_accum.compat.remat import recomputing_by
from keras_accum.compat.remat import recomputing_layers
from keras_accum.compat.remat import tensorflow_variable
from keras_accum.compat.remat import unrepeatable
from keras_accum.compat.remat import value_without_cast
from keras_accum.compat.remat import without_tape
from keras_accum.compat.replicas import concatenate_outputs
from keras_accum.compat.replicas import gather_to
from keras_accum.compat.replicas import local_variable
from keras_accum.compat.replicas import sum_to
from keras_accum.compat.replicas import without_communication
from keras_accum.compat.tapes import recording_gradients
from keras_accum.compat.tensorboard import showing_graph
from keras_accum.compat.trainer import FIRST_EPOCH
from keras_accum.compat.trainer import SymbolicBuildMixin
from keras_accum.compat.trainer import aggregate_loss
from keras_accum.compat.trainer import before_updates
from keras_accum.compat.trainer import build_by
from keras_accum.compat.trainer import compute_loss
from keras_accum.compat.trainer import ending_training_by
from keras_accum.compat.trainer import has_call
from keras_accum.compat.trainer import has_custom_compute_loss
from keras_accum.compat.trainer import has_custom_step
from keras_accum.compat.trainer import has_local_strategy
from keras_accum.compat.trainer import instead_of_keras
from keras_accum.compat.trainer import iterations
from keras_accum.compat.trainer import loss_tracker
from keras_accum.compat.trainer import optionals_to_none
from keras_accum.compat.trainer import running_eagerly
from keras_accum.compat.trainer import set_loss_tracker
from keras_accum.compat.trainer import symbolic_build
from keras_accum.compat.trainer import takes_training_argument
from keras_accum.compat.variables import are_summed_on_read
from keras_accum.compat.variables import assigning_through
from keras_accum.compat.variables import before_assignments
from keras_accum.compat.variables import is_overwritten
from keras_accum.compat.variables import optimizers_assigning_nothing
from keras_accum.compat.variables import replacing_assignments
