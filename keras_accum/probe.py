"""What the steps of a model need and how fast they are, found out by a probe.

The probe is a second model that shares all with the first, and has buffers of
its own. What XLA compiles says how much it needs before it runs. All else is
run, and what it assigns is put back.
"""

import contextlib
import functools
import time
from collections.abc import Iterable
from collections.abc import Iterator

import keras
import tensorflow as tf

from keras_accum import auto_size
from keras_accum import boundary
from keras_accum import compat
from keras_accum import counting
from keras_accum import discovery
from keras_accum import each_microbatch
from keras_accum import first_batch
from keras_accum import memory
from keras_accum import replicas
from keras_accum import rows as row_counts
from keras_accum import steps
from keras_accum import system_memory
from keras_accum.control_flow import wait_for
from keras_accum.microbatch_size import check_layers
from keras_accum.mixin import GradientAccumulationMixin
from keras_accum.model import GradientAccumulationModel

# How often a step is timed; the least counts.
TIMES = 5
# How often a step is run whose memory is counted.
COUNTED = 2


class Probe:
    """A model that shares all with another one, to try steps on.

    All bytes are those on one device: of one replica.

    Args:
        model: The model, compiled and built.
        data: A batch as `fit` gets it, of tensors.
    """

    def __init__(self, model: keras.Model, data) -> None:
        check_layers(model)
        strategy = model.distribute_strategy
        self._num_replicas = strategy.num_replicas_in_sync
        rows = first_batch.rows_of(data)
        self.rows = -(-rows // self._num_replicas)
        self._data = row_counts.take_first(data, self.rows)
        self._model = made = probing(model, self.rows)
        self._accumulation = accumulation = made._accumulation
        self.is_compiled = made.jit_compile and not made.run_eagerly
        accumulation.window["losses"].make_tracker()
        # Bytes that it took to compile a step, at most.
        self._compiling = 0
        if not (self.is_compiled or counting.counts(self._device)):
            raise ValueError(
                "`model` must be compiled with `jit_compile=True` to be "
                "planned here: TensorFlow does not count the memory of "
                f"{self._device}, but XLA plans it."
            )
        discovery.build_for(accumulation, self._data)
        first_batch.look_at(accumulation, self._data)
        self._each = each_microbatch.EachMicrobatch(
            accumulation,
            functools.partial(steps.train_microbatch, accumulation),
            True,
        )
        self._plan_step = functools.cache(
            functools.partial(self._each.memory_plan, self._data)
        )
        # Makes the buffers, and shows whose update it is.
        if made.run_eagerly:
            with self._unchanged():
                self._step(1)
        else:
            self._each.call_with_step(self._data, self.rows, trace)

    def kept_bytes(self) -> dict[str, int]:
        """Returns the bytes of what stays from step to step.

        They are of the "weights", the "buffers", the "optimizer", and the
        "batch": Keras makes two batches ready while one is trained on.
        """
        model, strategy = self._model, self._model.distribute_strategy
        return {
            "weights": counting.bytes_of(model.variables),
            "buffers": counting.bytes_of(self._accumulation.window.variables),
            "optimizer": counting.bytes_of(model.optimizer.variables),
            "batch": 3 * auto_size.bytes_of(strategy, self._data),
        }

    def step_bytes(self, rows: int) -> int:
        """Returns the bytes that come and go in a step on so many rows."""
        if self.is_compiled:
            plan, took = memory.growing(self._plan_step, rows)
            self._compiling = max(self._compiling, took)
            needed = plan.planned + memory.mapped_bytes(plan)
            return needed // self._num_local
        with self._unchanged():
            # What it makes once is no part of it.
            self._step(rows)
            found = [
                counting.counted_bytes(self._step, rows, device=self._device)
                for _ in range(COUNTED)
            ]
        return max(found) // self._num_local

    def update_bytes(self) -> int:
        """Returns the bytes that come and go at the boundary, in the update."""
        model, strategy = self._model, self._model.distribute_strategy
        if self.is_compiled and not replicas.has_several(strategy):
            return boundary.planned_bytes(model)
        update = boundary.make_update_for_host(self._accumulation)
        with self._unchanged(model.optimizer.variables):
            # The first one writes beside the values that are to be put back.
            self._step(1)
            update()
            self._step(1)
            found = counting.counted_bytes(update, device=self._device)
            return found // self._num_local

    def rows_per_second(self, rows: int) -> float:
        """Returns how fast steps on so many rows are, on all replicas."""
        seconds = []
        with self._unchanged():
            self._step(rows)
            for _ in range(TIMES):
                start = time.perf_counter()
                self._step(rows)
                seconds.append(time.perf_counter() - start)
        return self._num_replicas * rows / min(seconds)

    def free_bytes(self) -> int:
        """Returns the bytes for steps now, less what "auto" leaves free."""
        if not self._is_on_cpu:
            return self.device_bytes()
        if self.is_compiled:
            # Shows what compiling takes: training compiles it once more.
            self.step_bytes(self.rows)
        left = memory.left_free(self._compiling)
        return max(0, system_memory.free_bytes() - left) // self._num_local

    def device_bytes(self) -> int:
        """Returns the bytes for all that training takes, as the system says.

        Raises:
            ValueError: If it does not say.
        """
        found, model = None, self._model
        if not self._is_on_cpu:
            found = compat.memory_of_device(self._device)
        elif system_memory.free_bytes() < system_memory.UNKNOWN:
            # What the model has already is not free.
            kept = counting.bytes_of(
                [*model.variables, *model.optimizer.variables]
            )
            found = self.free_bytes() + kept
        if found is None:
            raise ValueError(
                "`memory_limit` must be given: the system does not say how "
                f"much memory there is. Received: device {self._device}"
            )
        return found

    @property
    def _copies(self):
        """A variable that each of this worker's replicas has."""
        accumulator = self._accumulation.window["gradients"].make_accumulator()
        strategy = self._model.distribute_strategy
        return replicas.copies(strategy, accumulator.weight)

    @property
    def _is_on_cpu(self):
        return replicas.on_cpu(self._copies[0])

    @property
    def _device(self):
        """The first replica's device, such as "GPU:0"."""
        spec = tf.DeviceSpec.from_string(self._copies[0].device)
        return f"{spec.device_type}:{spec.device_index}"

    @property
    def _num_local(self):
        """How many replicas share the memory that is counted or planned."""
        return len(self._copies) if self._is_on_cpu else 1

    def _step(self, rows):
        """Makes a step on so many rows, which starts a window."""
        logs = self._each.call_with_step(
            self._data, rows, lambda step, *args: step(*args)
        )
        wait_for(logs)

    @contextlib.contextmanager
    def _unchanged(self, more: Iterable = ()) -> Iterator[None]:
        """Puts back what steps assign, and what else is given."""
        strategy = self._model.distribute_strategy
        own = replicas.Snapshot(strategy, [each.value for each in more])
        others = auto_size.snapshot_of(self._accumulation)
        try:
            yield
        finally:
            # It ends the window of the losses, which is the model's own.
            self._accumulation.reset()
            own.restore()
            others.restore()


def probing(model: keras.Model, rows: int) -> GradientAccumulationModel:
    """Returns a model that accumulates, and shares all with another one.

    Args:
        model: The other one.
        rows: Rows of a micro-batch.
    """
    options = {}
    if isinstance(model, GradientAccumulationMixin):
        options = {
            "nonfinite": model.nonfinite,
            "accumulator_dtype": model.accumulator_dtype,
        }
    made = GradientAccumulationModel.from_model(
        model, microbatch_size=rows, **options
    )
    if not model.optimizer.built:
        # Its variables are gone with the probe.
        cls, config = type(model.optimizer), model.optimizer.get_config()
        with model.distribute_strategy.scope():
            made.optimizer = cls.from_config(config)
    return made


def trace(step, *args):
    """Traces a `tf.function`, and neither compiles nor runs it."""
    step.get_concrete_function(*args)
