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

    Given a second argument, it makes at most so many steps in that call.

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

    def function(iterator, limit=num_steps):
        nonlocal last, end_together
        most = None if num_steps == 1 else tf.constant(limit)
        if isinstance(iterator, tf.data.Iterator):
            return loop(iterator, False, most)
        if isinstance(iterator, tf.distribute.DistributedIterator):
            if last() is not iterator and replicas.has_several_workers(
                strategy
            ):
                last = weakref.ref(iterator)
                count = compat.number_of_batches(iterator)
                counts = replicas.values_of_all(strategy, count)
                end_together = count >= 0 and len(set(counts)) == 1
            return loop(iterator, end_together, most)
        logs = None
        for data in itertools.islice(iterator, limit):
            logs = step(data)
        return logs

    return function


def make_looking_loop(
    model: keras.Model, loop: Callable, step: Callable, look: Callable
) -> Callable:
    """Returns a function as `loop`, for its first call: it looks at a batch.

    It puts the batch back, and calls `loop`. So TensorFlow optimizes a program
    that all steps share, which may take longer than to trace it, and none for
    the first step alone.

    Args:
        model: The model.
        loop: What `make_loop` returned.
        step: Its step, of a batch.
        look: What is called with the first batch, before its step.
    """
    host_loop = make_host_loop(model, step, look)

    def function(iterator):
        # In a function of the user's own there is no batch yet.
        has_batches = tf.executing_eagerly() and not model.run_eagerly
        if not (has_batches and isinstance(iterator, tf.data.Iterator)):
            return host_loop(iterator)
        types = iterator.element_spec
        data = iterator.get_next()
        look(data)
        if can_be_traced_for_all(step, types):
            step.get_concrete_function(types)
        logs = loop(iterator_of(data, types))
        rest = model.steps_per_execution - 1
        if rest:
            with contextlib.suppress(tf.errors.OutOfRangeError):
                logs = loop(iterator, rest)
        return logs

    return function


def iterator_of(batch, spec) -> tf.data.Iterator:
    """Returns an iterator over one batch.

    Args:
        batch: The batch.
        spec: What batches may be: one like it need not have as many rows.
    """
    variant = tf.data.experimental.to_variant(
        tf.data.Dataset.from_tensors(batch)
    )
    dataset = tf.data.experimental.from_variant(variant, spec)
    # There is nothing to tune, and to end a thread that does may take long.
    options = tf.data.Options()
    options.autotune.enabled = False
    return iter(dataset.with_options(options))


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
            if can_be_traced_for_all(step, types):
                step.get_concrete_function(types)
            logs = step(data)
        return logs

    return loop


def can_be_traced_for_all(step: Callable, types) -> bool:
    """Returns whether a step can be traced for batches of all sizes.

    The programs that it calls are then those that a loop over such batches
    calls later.

    Args:
        step: A function of a batch; False unless it is a `tf.function`.
        types: What batches are, or None if that is not known.
    """
    if not isinstance(step, tf.types.experimental.PolymorphicFunction):
        return False
    specs = [] if types is None else tf.nest.flatten(types)
    # A part that may lack is None in a batch.
    return bool(specs) and not any(
        isinstance(spec, tf.OptionalSpec) for spec in specs
    )


def make_dataset_loop(model, step, num_steps) -> Callable:
    """Returns a function that takes batches from a `tf.data` iterator."""

    def second_batch(iterator, limit):
        if not isinstance(iterator, tf.data.Iterator):
            # There the limit is `num_steps`, always.
            return iterator.get_next_as_optional()
        return tf.cond(
            limit > 1,
            iterator.get_next_as_optional,
            lambda: tf.experimental.Optional.empty(iterator.element_spec),
        )

    def loop(iterator, end_together, limit):
        def remaining(done, logs, batch):
            return tf.logical_and(done < limit, batch.has_value())

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
                    done + 1 < limit,
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

            batch = second_batch(iterator, limit)
            state = (tf.constant(1), logs, batch)
            return tf.while_loop(remaining, some_steps, state)[1]

    return loop
