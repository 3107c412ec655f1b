"""The loss of a batch as a whole, where it couples the rows of micro-batches.

As ordinary code, for a loss of all outputs:

```python
outputs = [model(microbatch) for microbatch in batch]
gradients_by_outputs = gradient(loss, concatenate(outputs))
for microbatch, by_outputs in zip(batch, split(gradients_by_outputs)):
    total += gradient(sum(by_outputs * model(microbatch)), weights)
```

Only the outputs are held for the whole batch, and nothing of what lies between.
Random draws are the same in both passes; what a layer assigns is assigned in
the second pass alone.

Reference: Gao et al., 2021, "Scaling Deep Contrastive Learning Batch Size under
Memory Limited Setup", arXiv:2101.06983.
"""

import keras
import tensorflow as tf

from keras_accum import compat
from keras_accum import microbatching
from keras_accum import programs
from keras_accum import reduction
from keras_accum import replicas
from keras_accum import rows as row_counts
from keras_accum.microbatch import Microbatch
from keras_accum.step_loss import StepLoss
from keras_accum.steps import forward
from keras_accum.whole_loss import all_logits
from keras_accum.whole_loss import differentiable
from keras_accum.whole_loss import seen_by_loss
from keras_accum.whole_loss import widened


class WholeBatch:
    """Computes the loss of a batch, and its gradients by the outputs.

    Args:
        accumulation: What the model accumulates in.
        trains: Whether the model trains.
    """

    def __init__(self, accumulation, trains: bool) -> None:
        self._accumulation, self._trains = accumulation, trains
        self._model = model = accumulation.model
        self._forward = programs.in_loop(model, self._forward_step)
        self._differentiate = programs.in_loop(model, self._loss_step)
        # Which outputs have masks, and logits, as the forward step found out.
        self._masked: list[int] = []
        self._with_logits: list[int] = []

    def __call__(self, data, size: int) -> tuple[tuple, list[tf.Tensor]]:
        """Computes the loss of the batch.

        Args:
            data: A replica's rows of the batch.
            size: Most rows of a micro-batch.

        Returns:
            The fields of a `WholeLoss` but for the gradients; and these, with
            all rows of this replica.
        """
        states = self._random_states()
        before = [tf.identity(state.value) for state in states]
        outputs = microbatching.concatenated(data, size, self._forward)
        # The second pass draws the same.
        for state, value in zip(states, before, strict=True):
            state.assign(value)
        x, y, sample_weight = seen_by_loss(self._model, data)
        batch = (x, y, outputs, sample_weight)
        count = row_counts.check_count(outputs)
        batch, start, rows = rows_of_all(batch, count, self._destination)
        value, of_outputs, gradients = self._differentiate(*batch)
        gradients = [each[start : start + count] for each in gradients]
        return (value, of_outputs, rows), gradients

    def example(self, data) -> tuple[list[tf.Tensor], tuple]:
        """Returns gradients for a micro-batch, and a loss, of zeros."""
        forward_step = programs.in_graph(self._forward)
        traced = forward_step.get_concrete_function(data)
        y_pred, _, logits = traced.structured_outputs
        rows = row_counts.number_of_rows(data)

        def zeros(leaf):
            dtype = tf.float64 if leaf.dtype == tf.float64 else tf.float32
            return tf.zeros([rows, *leaf.shape[1:]], dtype)

        floats = [
            leaf
            for leaf in [*tf.nest.flatten(y_pred), *logits]
            if leaf.dtype.is_floating
        ]
        trackers = self._accumulation.window["losses"].trackers[1:]
        of_outputs = [tf.zeros(()) for _ in trackers]
        summary = (tf.zeros(()), of_outputs, rows)
        return [zeros(leaf) for leaf in floats], summary

    @property
    def _destination(self):
        gradients = self._accumulation.window["gradients"]
        return gradients.make_accumulator().weight

    def _random_states(self):
        states = compat.random_states(self._model)
        return states + compat.existing_seed_state()

    def _forward_step(self, data):
        """Returns the outputs of a micro-batch, their masks and logits."""
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        with keras.StatelessScope(collect_losses=True) as scope:
            y_pred = forward(self._model, x, training=self._trains)
        for state in self._random_states():
            value = scope.get_current_value(state)
            if value is not None:
                state.assign(value)
        masks = list(map(compat.keras_mask, keras.tree.flatten(y_pred)))
        self._masked = [i for i, mask in enumerate(masks) if mask is not None]
        logits = all_logits(y_pred)
        self._with_logits = [index for index, _ in logits]
        return (
            y_pred,
            [masks[index] for index in self._masked],
            [each for _, each in logits],
        )

    def _loss_step(self, x, y, outputs, sample_weight):
        """Returns the loss, that of each output, and gradients by outputs."""
        model, losses = self._model, self._accumulation.losses
        y_pred, masks, logits = outputs
        y_pred = keras.tree.map_structure(widened, y_pred)
        leaves = keras.tree.flatten(y_pred)
        for index, mask in zip(self._masked, masks, strict=True):
            compat.set_keras_mask(leaves[index], mask)
        for index, each in zip(self._with_logits, logits, strict=True):
            compat.set_cached_logits(leaves[index], each)
        leaves = differentiable(y_pred)
        with (
            tf.GradientTape() as tape,
            Microbatch(model, True) as microbatch,
            compat.as_on_one_replica(),
        ):
            tape.watch(leaves)
            # These are of micro-batches, in the second pass.
            microbatch.shown_losses = []
            loss = StepLoss(
                losses, x, y, y_pred, sample_weight, self._trains
            ).value
        gradients = []
        if self._trains:
            gradients = tape.gradient(
                loss,
                leaves,
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
        of_outputs = [value for value, _ in microbatch.recorded_losses.values()]
        # Of a loss for each row Keras reports the mean.
        return tf.reduce_mean(loss), of_outputs, gradients


def rows_of_all(values, count, destination: tf.Variable):
    """Returns the rows of all replicas, in replica context.

    Args:
        values: Nested tensors of numbers or bools, with rows along the first
            axis; None stays None.
        count: How many rows this replica has.
        destination: As for `reduce_across`.

    Returns:
        The nested tensors, first the first replica's rows; where the rows of
        this replica start; and how many there are.
    """
    strategy = tf.distribute.get_strategy()
    if not replicas.has_several(strategy):
        return values, 0, count
    context = tf.distribute.get_replica_context()
    place = context.replica_id_in_sync_group
    counts = reduction.sum_over_replicas(
        tf.one_hot(
            place, strategy.num_replicas_in_sync, tf.cast(count, "float32")
        ),
        destination,
    )
    counts = tf.cast(counts, tf.int32)
    start, total = tf.reduce_sum(counts[:place]), tf.reduce_sum(counts)
    flat = [each for each in tf.nest.flatten(values) if each is not None]
    padded = [
        tf.pad(
            tf.cast(each, widest(each.dtype)),
            [[start, total - start - count]] + [[0, 0]] * (each.shape.rank - 1),
        )
        for each in flat
    ]
    vector = reduction.pack(padded)
    vector = context.merge_call(
        reduction.reduce_across, args=(vector, destination)
    )
    segments = tf.split(vector, [tf.size(each) for each in padded])
    made = iter(
        tf.ensure_shape(
            tf.cast(tf.reshape(segment, tf.shape(rows)), each.dtype),
            [None, *each.shape[1:]],
        )
        for segment, rows, each in zip(segments, padded, flat, strict=True)
    )
    gathered = tf.nest.map_structure(
        lambda each: None if each is None else next(made), values
    )
    return gathered, start, total


def widest(dtype: tf.DType) -> tf.DType:
    """Returns a dtype of floats that holds numbers of another one exactly."""
    is_exact = dtype.is_floating and dtype.size <= 4 or dtype.size <= 2
    return tf.float32 if is_exact else tf.float64
