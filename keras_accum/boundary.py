"""What replicas tell each other at the boundary of a window, and no sooner."""

import contextlib
from collections.abc import Iterator

import keras
import tensorflow as tf

from keras_accum import compat
from keras_accum import moments
from keras_accum import replicas
from keras_accum.accumulator import after_everything_so_far
from keras_accum.finite import is_finite
from keras_accum.loss_tracker import WindowLoss


class BoundaryMixin(compat.SymbolicBuildMixin):
    """The one reduction of a window, and what each replica makes of it.

    Five things are summed over the replicas: the buffers with the window's
    weight, the numerators and denominators of the losses, the moments that
    BatchNormalization keeps, other variables that steps assign, and those of
    metrics. The first make the update, the last the logs.
    """

    # `id`s of the variables that train steps assign, besides the trained ones.
    _accum_state: frozenset[int] = frozenset()
    # The moments of the window; None until a layer had some.
    _accum_moments: moments.WindowMoments | None = None
    # In the train function's update: what the replicas' sums add up to.
    _accum_sums = None

    def _build_from(self, iterator, data_batch):
        """Does as Keras, without a reduction; see `compat.first_batch`."""
        if iterator is not None:
            if replicas.has_several_workers(self.distribute_strategy):
                replicas.check_same_length(
                    self.distribute_strategy, iterator.num_batches
                )
                compat.note_number_of_batches(iterator)
            data_batch = compat.first_batch(iterator)
        with self.distribute_strategy.scope():
            compat.symbolic_build(self, data_batch)

    def _needs_own_functions(self):
        """Whether Keras's functions fail: several devices, and XLA or workers.

        See keras#20585.
        """
        strategy = self.distribute_strategy
        if not replicas.has_several(strategy) or replicas.on_tpu(strategy):
            return False
        return self.jit_compile or replicas.has_several_workers(strategy)

    @contextlib.contextmanager
    def _gathering_moments(self, now) -> Iterator[None]:
        """Has BatchNormalization update its statistics once a window."""
        # Tensors of another graph, such as that of a loop, stay in it. Then the
        # layer does what it does in Keras.
        graph = compat.current_graph()

        def note(layer, *args):
            if compat.current_graph() is graph:
                now.moments.append(moments.moments_of(layer, *args))
                now.held |= set(map(id, compat.moving_statistics(layer)))

        with compat.noting_moments(note):
            yield
        if not now.moments:
            return
        if self._accum_moments is None:
            strategy = self.distribute_strategy
            self._accum_moments = moments.WindowMoments(strategy)
        # Last, so that a step that fails leaves the window as it was.
        with tf.control_dependencies(after_everything_so_far([])):
            self._accum_moments.add(now, self._is_first())

    def _noting_state(self, now):
        """Returns a function that sees what Keras's variables are assigned."""
        several = replicas.has_several(self.distribute_strategy)
        changes_nothing = not several and self.nonfinite == "propagate"

        def assign(variable, value):
            if id(variable) in now.held:
                return variable.value
            if changes_nothing:
                return value
            # Of others, such as the state of random generators, all replicas
            # have the same, and shall go on having it.
            if not tf.as_dtype(variable.dtype).is_floating:
                return value
            self._accum_state |= {id(variable)}
            if self.nonfinite == "skip_microbatch" and now.is_finite is None:
                now.note_state(variable)
            if self.nonfinite == "skip_window":
                # The gradients are looked at too late for that.
                value = tf.convert_to_tensor(value)
                value = tf.where(is_finite(value), value, variable.value)
            return now.value_or(value, variable)

        return assign

    def _state_variables(self):
        """Other variables that train steps assign, such as moving means.

        Each replica assigns its own copy. At a boundary the mean is taken.
        """
        if not replicas.has_several(self.distribute_strategy):
            return []
        return [
            v
            for v in self.non_trainable_variables
            if id(v) in self._accum_state
        ]

    def _metric_sums(self):
        """Variables of metrics that are sums over the replicas."""
        if not replicas.has_several(self.distribute_strategy):
            return []
        return [
            variable
            for variable in self.metrics_variables
            if variable.aggregation == "sum"
            and tf.as_dtype(variable.dtype).is_floating
        ]

    def _boundary_sums(self):
        """What is summed over the replicas at a boundary."""
        gathered = self._accum_moments
        return {
            "gradients": self._gradient_accumulator().sums(),
            "losses": [each.window for each in self._window_trackers()],
            "moments": [] if gathered is None else gathered.sums(),
            "state": [v.value for v in self._state_variables()],
            "metrics": [v.value for v in self._metric_sums()],
            "nonfinite": self._nonfinite_sums(),
        }

    def _known_sums(self):
        """Stands for the structure of `_boundary_sums`."""
        if self._accum_buffers is None:
            return ()
        gathered = self._accum_moments
        return (
            self._number_of_buffers(),
            len(self._window_trackers()),
            0 if gathered is None else len(gathered.states),
            len(self._state_variables()),
            len(self._metric_sums()),
        )

    def _pack_sums(self):
        """What a replica gives to the reduction: a vector."""
        return replicas.pack(self._boundary_sums())

    def _end_window(self, vector=None):
        """`update_step` in the train function.

        Args:
            vector: What the replicas' `_pack_sums` add up to, or None if it has
                to be found out.

        Returns:
            The logs of all replicas, or None if there is one.
        """
        if not replicas.has_several(self.distribute_strategy):
            self.update_step()
            return None
        own = self._boundary_sums()
        if vector is None:
            where = self._accum_buffers.weight
            sums = replicas.sum_over_replicas(own, where)
        else:
            sums = replicas.unpack(vector, own)
        self._accum_sums = sums
        # If there was no batch, nothing may change: not the number of updates
        # either, which does not depend on the sums by itself.
        with tf.control_dependencies(tf.nest.flatten(sums)[:1]):
            try:
                self.update_step()
            finally:
                self._accum_sums = None
            return self._logs_of_all(sums)

    def _logs_of_all(self, sums):
        """The metrics' results, from what the replicas' `sums` add up to."""
        variables = self._metric_sums()
        totals = dict(zip(map(id, variables), sums["metrics"], strict=True))
        for tracker, window in zip(
            self._window_trackers(), sums["losses"], strict=True
        ):
            tracker.add_window_to(totals, window)
        mapping = [(v, totals[id(v)]) for v in variables]
        with keras.StatelessScope(state_mapping=mapping):
            return self.get_metrics_result()

    @contextlib.contextmanager
    def _updating_own_copies(self) -> Iterator[None]:
        strategy = self.distribute_strategy
        if not replicas.has_copies(strategy):
            yield
            return
        on_tpu = replicas.on_tpu(strategy)
        with compat.without_communication(self.optimizer, on_tpu):
            yield

    def _close_trackers(self):
        for tracker in self._window_trackers():
            tracker.close()
        if self._accum_nonfinite is not None:
            self._accum_nonfinite.forget_window()

    def _window_trackers(self):
        """The metrics that count a window as one batch."""
        compiled = compat.compiled_loss(self)
        outputs = [] if compiled is None else compat.output_metrics(compiled)
        trackers = [compat.loss_tracker(self), *outputs]
        return [each for each in trackers if isinstance(each, WindowLoss)]
