"""Functions of an iterator, which make steps on the batches that they take."""

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from keras_accum import compat
from keras_accum import programs
from keras_accum import replicas


def make_loop(model: keras.Model, step: Callable, num_steps: int) -> Callable:
    """Returns a function that makes steps on what it takes from an iterator.

    Args:
        model: The model.
        step: A function of a batch.
        num_steps: How many it makes, if there are as many batches.
    """
    step = compat.optionals_to_none(model, step)
    loop = make_dataset_loop(model, step, num_steps)
    if not model.run_eagerly:
        loop = programs.in_graph(loop)
        step = programs.in_graph(step, reduce_retracing=True)
    strategy = model.distribute_strategy
    last, end_together = lambda: None, False

    def function(iterator):
        nonlocal last, end_together
        if isinstance(iterator, tf.data.Iterator):
            return loop(iterator, False)
        if isinstance(iterator, tf.distribute.DistributedIterator):
            if last() is not iterator and replicas.has_several_workers(
                strategy
            ):
                last = weakref.ref(iterator)
                count = compat.number_of_batches(iterator)
                counts = replicas.values_of_all(strategy, count)
                end_together = count >= 0 and len(set(counts)) == 1
            return loop(iterator, end_together)
        logs = None
        for data in itertools.islice(iterator, num_steps):
            logs = step(data)
        return logs

    return function


def make_host_loop(
    model: keras.Model, step: Callable, look: Callable | None = None
) -> Callable:
    """Returns a function as `make_loop`, whose steps the host makes.

    Args:
        model: The model.
        step: A function of a batch. One that is traced is traced for the types
            that batches have, and not for those of each.
        look: What is called with each batch before.
    """
    is_traced = isinstance(step, tf.types.experimental.PolymorphicFunction)
    fetch_one = make_loop(model, lambda data: data, num_steps=1)

    def fetch(iterator):
        data = fetch_one(iterator)
        if data is None:  # An iterator of Python's has ended.
            raise StopIteration
        return tf.nest.map_structure(
            lambda leaf: (
                tf.convert_to_tensor(leaf)
                if isinstance(leaf, np.ndarray)
                else leaf
            ),
            data,
        )

    def loop(iterator):
        logs, types = None, getattr(iterator, "element_spec", None)
        for _ in range(model.steps_per_execution):
            try:
                data = fetch(iterator)
            except (StopIteration, tf.errors.OutOfRangeError):
                if logs is None:
                    raise
                break
            if look is not None:
                look(data)
            if is_traced and can_trace_for(types):
                step.get_concrete_function(types)
            logs = step(data)
        return logs

    return loop


def can_trace_for(types) -> bool:
    """Returns whether a step can be traced for batches of all sizes.

    The programs that it calls are then those that a loop over such batches
    calls later.

    Args:
        types: What batches are, or None if that is not known.
    """
    specs = [] if types is None else tf.nest.flatten(types)
    # A part that may lack is None in a batch.
    return bool(specs) and not any(
        isinstance(spec, tf.OptionalSpec) for spec in specs
    )


def make_dataset_loop(model, step, num_steps) -> Callable:
    """Returns a function that takes batches from a `tf.data` iterator."""

    def remaining(done, logs, batch):
        return tf.logical_and(done < num_steps, batch.has_value())

    def loop(iterator, end_together):
        with contextlib.ExitStack() as stack:
            if end_together:
                stack.enter_context(compat.asking_no_other_workers())
            logs = step(iterator.get_next())
            if num_steps == 1:
                return logs

            def one_step(done, logs, batch):
                logs = step(batch.get_value())
                # The batch after the last one is left for the next call.
                batch = tf.cond(
                    done + 1 < num_steps,
                    iterator.get_next_as_optional,
                    lambda: batch,
                )
                return done + 1, logs, batch

            def some_steps(*state):
                state = one_step(*state)
                unrolled = min(model.unrolled_steps_per_execution, num_steps)
                for _ in range(unrolled - 1):
                    state = tf.cond(
                        remaining(*state),
                        functools.partial(one_step, *state),
                        lambda state=state: state,
                    )
                return state

            state = (tf.constant(1), logs, iterator.get_next_as_optional())
            return tf.while_loop(remaining, some_steps, state)[1]

    return loop
