"""Whatever drops an iterator: no process dies, and nothing is left behind."""

import contextlib
import os
import pathlib
import subprocess
import sys
import threading
import weakref

import keras
import tensorflow as tf
from absl.testing import parameterized

from keras_accum import iterators
from tests import iterators_cases
from tests import test_utils

ROOT = pathlib.Path(__file__).absolute().parent.parent
# Has glibc overwrite what is let go of.
DETECTING = {
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.perturb=165"
}
# Of seven fits each: at night more than 300 in each process.
PROCESSES, ROUNDS = (20, 43) if test_utils.IS_NIGHTLY else (1, 4)


def live_through(strategy, *options):
    """Runs the cases in a process of its own; returns it."""
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.iterators_cases",
            strategy,
            str(ROUNDS),
            *options,
        ],
        env=os.environ | DETECTING | {"PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


class ProcessTest(tf.test.TestCase, parameterized.TestCase):
    """Three of four processes of four rounds died, before it was mended."""

    @parameterized.parameters(
        ("one_device",), ("mirrored_1", "threads"), ("mirrored_2",)
    )
    @test_utils.first_command(second=(0,))
    def test_lives(self, strategy, *options):
        self.check(strategy, *options)

    def check(self, strategy, *options):
        for _ in range(PROCESSES):
            finished = live_through(strategy, *options)
            self.assertEqual(finished.returncode, 0, finished.stderr)
            self.assertEqual(finished.stdout, "lived\n")


class OptionsTest(tf.test.TestCase):
    def test_nothing_that_is_off_is_switched_on(self):
        options = tf.data.Options()
        options.experimental_optimization.apply_default_optimizations = False
        options.experimental_optimization.noop_elimination = False
        data = tf.data.Dataset.range(3).with_options(options)
        optimization = (
            iterators.rewritten(data).options().experimental_optimization
        )
        self.assertFalse(optimization.noop_elimination)
        self.assertTrue(optimization.shuffle_and_repeat_fusion)
        self.assertFalse(optimization.apply_default_optimizations)


class Source:
    """Rows without end, which a `with` of Python's would close."""

    def __init__(self):
        self.opened = self.closed = 0

    def __call__(self):
        self.opened += 1
        (batch,) = test_utils.microbatches([4])
        try:
            while True:
                yield tuple(leaf.copy() for leaf in batch)
        finally:
            self.closed += 1

    def dataset(self):
        return tf.data.Dataset.from_generator(
            self,
            output_signature=(
                tf.TensorSpec((None, test_utils.FEATURES)),
                tf.TensorSpec((None,), tf.int64),
            ),
        )


def wait_for_ends():
    """Waits for what `fit` does not wait for."""
    for thread in threading.enumerate():
        if thread.name == "keras_accum_iterators":
            thread.join()


class EndTest(test_utils.TestCase, parameterized.TestCase):
    """A generator is closed with the method that read it."""

    def setUp(self):
        super().setUp()
        self.model = test_utils.accumulating(accum_steps=2)
        self.model.compile("sgd", test_utils.crossentropy(), run_eagerly=True)
        self.source = Source()

    def assertClosed(self):
        wait_for_ends()
        self.assertGreaterEqual(self.source.opened, 1)
        self.assertEqual(self.source.closed, self.source.opened)

    @parameterized.parameters(iterators_cases.Interruption, KeyboardInterrupt)
    def test_raising(self, error):
        with contextlib.suppress(error):
            self.model.fit(
                self.source.dataset(),
                callbacks=[iterators_cases.Raising(error)],
                verbose=0,
            )
        self.assertClosed()

    def test_stopping(self):
        self.model.accum_steps = 1
        self.model.fit(
            self.source.dataset(),
            callbacks=[iterators_cases.Stopping()],
            verbose=0,
        )
        self.assertClosed()

    def test_steps(self):
        data = self.source.dataset()
        self.model.fit(
            data,
            steps_per_epoch=2,
            epochs=2,
            validation_data=data,
            validation_steps=1,
            verbose=0,
        )
        self.assertClosed()
        self.model.evaluate(data, steps=1, verbose=0)
        self.assertClosed()
        self.model.predict(data.map(lambda x, y: x), steps=1, verbose=0)
        self.assertClosed()

    def test_another_thread_waits(self):
        threads, read = set(), []
        self.model.make_train_function()
        train_function = self.model.train_function

        def ended(reference):
            del reference
            threads.add(threading.current_thread().name)

        def seen(iterator):
            if not read or read[-1]() is not iterator:
                read.append(weakref.ref(iterator, ended))
            return train_function(iterator)

        self.model.train_function = seen
        ((x, y),) = test_utils.microbatches([8])
        self.model.fit(x, y, batch_size=2, epochs=3, verbose=0)
        wait_for_ends()
        self.assertLen(read, 3)
        self.assertEqual([each() for each in read], [None] * 3)
        self.assertEqual(threads, {"keras_accum_iterators"})

    def test_an_end_that_takes_long(self):
        may_end, ended = threading.Event(), []

        class Slow:
            def __del__(self):
                # Not for ever: a test should fail, and not hang.
                may_end.wait(60)
                ended.append(True)

        iterators.let_go_of([Slow()])
        self.assertEmpty(ended)
        may_end.set()
        wait_for_ends()
        self.assertEqual(ended, [True])

    def test_epochs_go_on_with_the_data(self):
        seen = []

        class Seeing(keras.callbacks.Callback):
            def on_epoch_end(_, epoch, logs=None):
                seen.append(self.source.opened)

        self.model.fit(
            self.source.dataset(),
            steps_per_epoch=2,
            epochs=3,
            callbacks=[Seeing()],
            verbose=0,
        )
        self.assertEqual(seen, [seen[0]] * 3)


if __name__ == "__main__":
    tf.test.main()
