"""The train function, which `fit` calls on the host for every step.

```
train function                     one tf.function, on the host
├─ next(iterator)
├─ the window's first micro-batch  a program that starts the buffers
│  or a further one                a program that adds to them
└─ at the boundary: the update     a third one
```

Each program is compiled by XLA on its own, and the host picks: Python, where it
calls for one micro-batch at a time, and else conditionals around the programs.
A conditional inside one program would make every micro-batch carry the
optimizer's variables through it; one program for all micro-batches would have
to zero the buffers, or select, which reads them once more.
`docs/performance.md` has the figures.
"""

import contextlib
import itertools
import weakref

import keras
import tensorflow as tf

from keras_accum import compat
from keras_accum import microbatching
from keras_accum import programs
from keras_accum import progress
from keras_accum import replicas


def make_update_function(model):
    """Returns a function that updates on all replicas and starts a new window.

    Args:
        model: A `GradientAccumulationModel`.

    Returns:
        A function without arguments, for the host: in cross-replica context.
        It returns the logs, a dict, if there are several replicas.
    """
    strategy = model.distribute_strategy
    several = replicas.has_several(strategy)
    # XLA knows reductions on TPUs alone; else they come between two programs.
    splits = several and not replicas.on_tpu(strategy)
    # A program knows the buffers that there were when it was traced.
    end_window = programs.on_replicas(
        model, lambda known, sums=None: model._end_window(sums)
    )

    def update(known):
        args = (known,)
        if splits:
            # Not compiled: where TensorFlow copies one tensor after the other,
            # XLA on a CPU looks up for each number where it comes from.
            vector = strategy.run(model._pack_sums)
            where = model._accum_buffers.weight
            args += (replicas.reduce_across(strategy, vector, where),)
        logs = end_window(*args)
        model._accum_window.complete()
        return first_replica(logs, strategy)

    # Keras wants a function of its own to make the optimizer's variables in.
    # With reductions it must not be one, since it is called in a `tf.cond`, and
    # TensorFlow numbers the reductions of a function where it is called.
    if not model.run_eagerly and not several:
        update = programs.in_graph(update)
    # Not the `tf.function` itself: Keras would save it with the model.
    return lambda: update(model._known_sums())


def make_flush_function(model):
    """Returns a function that runs the update by itself, on the host."""
    update = make_update_function(model)
    if model.run_eagerly:
        return update
    traced = programs.in_graph(lambda known: update())
    # Not the `tf.function` itself: Keras would save it with the model.
    return lambda: traced(model._known_sums())


def make_train_function(model, update, make_function):
    """Returns what `model.train_function` is to be.

    Args:
        model: A `GradientAccumulationModel`.
        update: What `make_update_function` returned.
        make_function: Makes, of `model`, `update` and a set as that of
            `make_step_function`, the function that is called with iterators.

    Returns:
        A function of an iterator over batches, which trains on
        `model.steps_per_execution` of them and returns the logs. Raises
        `tf.errors.OutOfRangeError` when there are none left.
    """
    traced = set()
    function = make_function(model, update, traced)
    model._accum_window.catch_up()

    def train_function(iterator):
        # A variable that had no gradient when the programs were traced may have
        # got one since, in batches of another structure. The program that
        # starts a window would not start its buffer.
        if traced - {model._number_of_buffers()}:
            return model.make_train_function(force=True)(iterator)
        return function(iterator)

    train_function = forgetting_failed_windows(model, train_function)
    train_function = progress.counting_batches(model, train_function)
    return raising_schedule_errors(model, train_function)


def make_window_function(model, update, traced):
    """Returns a function that trains on batches, each a micro-batch."""
    window = model._accum_window
    if (
        model.steps_per_execution == 1
        and window.kind == "size"
        and not model.run_eagerly
        # Each replica would be traced once for each place.
        and not replicas.has_several(model.distribute_strategy)
    ):
        return make_counting_function(model, update, traced)
    step = make_step_function(model, update, traced)
    return make_iterating_function(model, step)


def make_counting_function(model, update, traced):
    """Returns a function that trains on a micro-batch; Python counts them.

    For each place in a window it has a function, which does what is to be done
    there and no more. Where the device picks, all variables of the model are
    handed to both branches of two conditionals, in every micro-batch.
    """
    window = model._accum_window
    step_at = make_placed_step(model, update, traced)
    functions = {}

    def function(iterator):
        place = window.place()
        if place not in functions:
            functions[place] = make_iterating_function(model, step_at(place))
        logs = functions[place](iterator)
        # A step that fails is not counted.
        window.count(place)
        return logs

    return function


def make_batch_function(model, update, traced):
    """Returns a function that trains on batches, each a window."""
    step = make_batch_step_function(model, update, traced)
    return make_iterating_function(model, step)


def make_step_function(model, update, traced):
    """Returns a function of one batch: a micro-batch, and what follows it.

    Args:
        model: A `GradientAccumulationModel`.
        update: What `make_update_function` returned.
        traced: A set that gets the number of buffers that there were
            whenever the program that starts a window was traced.
    """
    window = model._accum_window
    strategy = model.distribute_strategy
    start = programs.on_replicas(model, starting(model, traced))
    proceed = programs.on_replicas(model, model._next_microbatch)

    def step(data):
        if tf.inside_function():
            replicas.outside_of_tracing(lambda: build_for_resumed(model, data))

        def first():
            size = window.begin(
                model.optimizer.iterations,
                lambda: replicas.number_of_rows(strategy, data),
                strategy.num_replicas_in_sync,
            )
            with tf.control_dependencies([size]):
                return first_replica(start(data), strategy)

        def further():
            return first_replica(proceed(data), strategy)

        # An exhausted iterator stops what depends on its data, and no more.
        with tf.control_dependencies(tensors_in(data)):
            logs = tf.cond(tf.equal(window.position, 0), first, further)
        # A step that fails is not counted.
        with tf.control_dependencies(tensors_in(logs)):
            full = window.advance()
        return tf.cond(full, lambda: newer(logs, update()), lambda: logs)

    return step


def make_placed_step(model, update, traced):
    """Returns a function of a place in a window, for one replica.

    It returns a function of one batch: a micro-batch, and what follows it.

    Args:
        model: A `GradientAccumulationModel`.
        update: What `make_update_function` returned.
        traced: As for `make_step_function`.
    """
    start, proceed = (
        programs.on_replicas(model, function, inline=False)
        for function in (starting(model, traced), model._next_microbatch)
    )

    def step_at(place):
        def step(data):
            # An exhausted iterator stops what depends on its data.
            with tf.control_dependencies(tensors_in(data)):
                logs = (start if place.is_first else proceed)(data)
            if place.is_first and tf.inside_function():
                # Now, so that no change of k traces anything, and what is saved
                # in mid-window has the optimizer's variables.
                proceed.get_concrete_function(data)
                programs.in_graph(update).get_concrete_function()
            if not place.is_last:
                return logs
            with tf.control_dependencies(tensors_in(logs)):
                return newer(logs, update())

        return step

    return step_at


def starting(model, traced):
    """Returns the train step for the first micro-batch of a window.

    Args:
        model: A `GradientAccumulationModel`.
        traced: As for `make_step_function`.
    """

    def start_window(*args):
        logs = model._first_microbatch(*args)
        traced.add(model._number_of_buffers())
        return logs

    return start_window


def build_for_resumed(model, data):
    """Makes the variables of metrics, for a window from a checkpoint.

    Keras makes them while it traces. Their initial values would be those of the
    branch that starts a window, which is not run.
    """
    if int(model._accum_window.position):
        model._build_for(data)


def make_batch_step_function(model, update, traced):
    """Returns a function of one batch: its micro-batches, and the update.

    Args:
        model: A `GradientAccumulationModel` with a `microbatch_size`.
        update: What `make_update_function` returned.
        traced: As for `make_step_function`.
    """
    strategy = model.distribute_strategy
    add_all = make_adding_function(model, traced)

    position = model._accum_window.position

    def step(data):
        def add():
            return first_replica(add_all(data, model.microbatch_size), strategy)

        # An exhausted iterator stops what depends on its data, and no more; in
        # a branch all does. There is one, since the position is always 0.
        with tf.control_dependencies(tensors_in(data)):
            logs = tf.switch_case(tf.cast(position, tf.int32), [add])
        with tf.control_dependencies(tensors_in(logs)):
            return newer(logs, update())

    return step


def make_adding_function(model, traced):
    """Returns a function of a batch, which is a window, and of a size.

    Args:
        model: A `GradientAccumulationModel` with a `microbatch_size`.
        traced: As for `make_step_function`.
    """
    return microbatching.EachMicrobatch(
        model, starting(model, traced), model._next_microbatch
    )


def make_test_function(model):
    """Returns what `model.test_function` is to be.

    For several replicas: Keras compiles around `strategy.run`, which XLA
    refuses where there are several devices, and reduces all logs at every step.
    And for batches that are cut up.
    """
    strategy, size = model.distribute_strategy, model._accum_size.known
    if size is None:
        test = programs.on_replicas(model, model._first_test)

        def step(data):
            return first_replica(test(data), strategy)
    else:
        test_all = microbatching.EachMicrobatch(
            model, model._first_test, model._next_test
        )

        def step(data):
            logs = first_replica(test_all(data, size), strategy)
            with tf.control_dependencies(tensors_in(logs)):
                strategy.run(model._close_trackers)
            return logs

    return make_iterating_function(model, step)


def make_predict_function(model):
    """Returns what `model.predict_function` is to be, for the same cases."""
    strategy, size = model.distribute_strategy, model._accum_size.known
    predict = microbatching.concatenating(model, model.predict_step, size)

    def step(data):
        return compat.concatenate_outputs(predict(data), strategy)

    step = compat.optionals_to_none(model, step)
    if not model.run_eagerly:
        step = programs.in_graph(step, reduce_retracing=True)

    def predict_function(batches):
        outputs = [step(batch) for batch in batches]
        return keras.tree.map_structure(
            lambda *parts: tf.concat(parts, axis=0), *outputs
        )

    return predict_function


def make_iterating_function(model, step, total=None):
    """Returns a function that makes steps on what it takes from an iterator.

    Args:
        model: A `GradientAccumulationModel`.
        step: A function of a batch.
        total: How many steps; None for `model.steps_per_execution`.
    """
    total = model.steps_per_execution if total is None else total
    step = compat.optionals_to_none(model, step)
    steps = make_steps_function(model, step, total)
    if not model.run_eagerly:
        steps = programs.in_graph(steps)
        step = programs.in_graph(step, reduce_retracing=True)
    strategy = model.distribute_strategy
    last, end_together = lambda: None, False

    def function(iterator):
        nonlocal last, end_together
        if isinstance(iterator, tf.data.Iterator):
            return steps(iterator, False)
        if isinstance(iterator, tf.distribute.DistributedIterator):
            if last() is not iterator and replicas.has_several_workers(
                strategy
            ):
                last = weakref.ref(iterator)
                number = compat.number_of_batches(iterator)
                numbers = replicas.numbers_of_all(strategy, number)
                end_together = number >= 0 and len(set(numbers)) == 1
            return steps(iterator, end_together)
        logs = None
        for data in itertools.islice(iterator, total):
            logs = step(data)
        return logs

    return function


def make_steps_function(model, step, total):
    """Returns a function that takes batches from a `tf.data` iterator."""

    def steps(iterator, asks_nobody):
        with contextlib.ExitStack() as stack:
            if asks_nobody:
                stack.enter_context(compat.asking_no_other_workers())
            return several(iterator)

    def several(iterator):
        logs = step(iterator.get_next())
        if total == 1:
            return logs

        def remaining(done, logs, batch):
            return tf.logical_and(done < total, batch.has_value())

        def one(done, logs, batch):
            logs = step(batch.get_value())
            # The batch after the last one is left for the next call.
            batch = tf.cond(
                done + 1 < total, iterator.get_next_as_optional, lambda: batch
            )
            return done + 1, logs, batch

        def some(*state):
            state = one(*state)
            for _ in range(min(model.unrolled_steps_per_execution, total) - 1):
                state = tf.cond(
                    remaining(*state),
                    lambda state=state: one(*state),
                    lambda state=state: state,
                )
            return state

        state = (tf.constant(1), logs, iterator.get_next_as_optional())
        return tf.while_loop(remaining, some, state)[1]

    return steps


def forgetting_failed_windows(model, function):
    """Wraps `function`: what it has added when it fails is forgotten.

    With `microbatch_size`, the window was empty before. With `accum_steps`, one
    replica adds last of all, and the window is as it was; of several replicas
    some may have added their part of the micro-batch, and asking would cross
    replicas in every micro-batch, so that the window is lost.
    """
    several = replicas.has_several(model.distribute_strategy)
    if not several and not model.microbatch_size:
        return function

    def wrapped(iterator):
        try:
            return function(iterator)
        except (StopIteration, tf.errors.OutOfRangeError):
            raise
        except BaseException:
            model.reset_window()
            raise

    return wrapped


def raising_schedule_errors(model, function):
    """Wraps `function`: an error of a schedule is raised as it was."""

    def wrapped(iterator):
        try:
            return function(iterator)
        except tf.errors.OpError:
            error = model._accum_window.schedule_error
            if error is None:
                raise
            model._accum_window.schedule_error = None
            raise error from None

    return wrapped


def first_replica(values, strategy):
    """What the first of this worker's replicas returned.

    It depends on what all of them did, so that a step that fails on one fails.
    """
    if not replicas.has_several(strategy):
        return values
    done = []

    def first(value):
        of_replicas = strategy.experimental_local_results(value)
        done.extend(tensors_in(of_replicas))
        return of_replicas[0]

    firsts = keras.tree.map_structure(first, values)
    with tf.control_dependencies(done):
        return keras.tree.map_structure(tf.identity, firsts)


def newer(logs, of_all):
    """`logs`, with what is known of all replicas in the place of one's own."""
    if not isinstance(logs, dict) or not isinstance(of_all, dict):
        return logs
    return {
        name: tf.cast(of_all.get(name, value), tf.as_dtype(value.dtype))
        if isinstance(value, tf.Tensor)
        else value
        for name, value in logs.items()
    }


def tensors_in(structure):
    """The tensors in a structure that also holds None and other leaves."""
    return [
        leaf
        for leaf in tf.nest.flatten(structure, expand_composites=True)
        if isinstance(leaf, tf.Tensor)
    ]
