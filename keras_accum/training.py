"""The train function, which `fit` calls on the host for every step.

```
train function                     one tf.function, on the host
├─ next(iterator)
├─ the window's first micro-batch  a program that starts the buffers
│  or a further one                a program that adds to them
└─ at the boundary: the update     a third one
```

Each program is compiled by XLA on its own, and the host picks. A conditional
inside one program would make every micro-batch carry the optimizer's variables
through it; one program for all micro-batches would have to zero the buffers, or
select, which reads them once more. `benchmarks/window_time.py` has the figures.
"""

import itertools

import tensorflow as tf

from keras_accum import compat


def make_update_function(model):
    """Returns a function that updates on all replicas and starts a new window.

    Args:
        model: A `GradientAccumulationModel`.

    Returns:
        A function without arguments, for the host: in cross-replica context.
    """
    # A program knows the buffers that there were when it was traced.
    program = compile_for_replica(model, lambda buffers: model.update_step())

    @tf.autograph.experimental.do_not_convert
    def update(buffers):
        model.distribute_strategy.run(program, args=(buffers,))
        model._accum_window.complete()

    if not model.run_eagerly:
        update = tf.function(update)
    # Not the `tf.function` itself: Keras would save it with the model.
    return lambda: update(model._number_of_buffers())


def make_train_function(model, update):
    """Returns what `model.train_function` is to be.

    Args:
        model: A `GradientAccumulationModel`.
        update: What `make_update_function` returned.

    Returns:
        A function of an iterator over batches, which trains on
        `model.steps_per_execution` of them and returns the logs. Raises
        `tf.errors.OutOfRangeError` when there are none left.
    """
    traced_buffers = set()
    step = make_step_function(model, update, traced_buffers)
    steps = make_steps_function(model, step)

    def train_function(iterator):
        # A variable that had no gradient when the programs were traced may have
        # got one since, in batches of another structure. The program that
        # starts a window would not start its buffer.
        if traced_buffers - {model._number_of_buffers()}:
            return model.make_train_function(force=True)(iterator)
        if isinstance(
            iterator, tf.data.Iterator | tf.distribute.DistributedIterator
        ):
            return steps(iterator)
        logs = None
        for data in itertools.islice(iterator, model.steps_per_execution):
            logs = step(data)
        return logs

    return raising_schedule_errors(model, train_function)


def make_step_function(model, update, traced_buffers):
    """Returns a function of one batch: a micro-batch, and what follows it.

    Args:
        model: A `GradientAccumulationModel`.
        update: What `make_update_function` returned.
        traced_buffers: A set that gets the number of buffers that there were
            whenever the program that starts a window was traced.
    """

    def start_window(data):
        logs = model._first_microbatch(data)
        traced_buffers.add(model._number_of_buffers())
        return logs

    window = model._accum_window
    strategy = model.distribute_strategy
    start = compile_for_replica(model, start_window)
    proceed = compile_for_replica(model, model._next_microbatch)

    @tf.autograph.experimental.do_not_convert
    def step(data):
        def first():
            with tf.control_dependencies(
                [window.begin(model.optimizer.iterations)]
            ):
                return strategy.run(start, args=(data,))

        def further():
            return strategy.run(proceed, args=(data,))

        # An exhausted iterator stops what depends on its data, and no more.
        with tf.control_dependencies(tensors_in(data)):
            logs = tf.cond(tf.equal(window.position, 0), first, further)
        # A step that fails is not counted.
        with tf.control_dependencies(tensors_in(logs)):
            full = window.advance()
        tf.cond(full, lambda: run_and_return_nothing(update), tf.no_op)
        return compat.reduce_logs(logs, strategy)

    if not model.run_eagerly:
        step = tf.function(step, reduce_retracing=True)
    return compat.optionals_to_none(model, step)


def make_steps_function(model, step):
    """Returns a function that takes batches from a `tf.data` iterator."""

    @tf.autograph.experimental.do_not_convert
    def steps(iterator):
        logs = step(iterator.get_next())
        total = model.steps_per_execution
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

    return steps if model.run_eagerly else tf.function(steps)


def compile_for_replica(model, function):
    """Returns `function` for `strategy.run`, compiled if the model is.

    `strategy.run` would lift a `tf.function` around the whole of itself, and
    XLA cannot compile one program for two devices; it leaves a plain function
    around one alone.
    """
    function = tf.autograph.experimental.do_not_convert(function)
    if not model.jit_compile or model.run_eagerly:
        return function
    compiled = tf.function(function, jit_compile=True, reduce_retracing=True)
    return lambda *args: compiled(*args)


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


def run_and_return_nothing(function):
    """Calls `function` in a branch of a `tf.cond`, whose other does nothing."""
    function()
    return tf.no_op()


def tensors_in(structure):
    """The tensors in a structure that also holds None and other leaves."""
    return [
        leaf
        for leaf in tf.nest.flatten(structure, expand_composites=True)
        if isinstance(leaf, tf.Tensor)
    ]
