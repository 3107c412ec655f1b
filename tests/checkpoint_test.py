"""Runs that are interrupted, and what their files hold."""

import os
import pathlib
import signal
import subprocess
import sys
import unittest
import warnings

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import parameterized

import keras_accum
from tests import checkpoint_cases as cases
from tests import test_utils

ROOT = pathlib.Path(__file__).absolute().parent.parent
PYTHONPATH = os.pathsep.join(filter(None, sys.path))
ACCUM_STEPS = 3


class SaveAt(keras.callbacks.Callback):
    """Saves a model after a batch of the first epoch."""

    def __init__(self, batch, save):
        super().__init__()
        self._batch, self._save = batch, save
        self._epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self._epoch, batch) == (0, self._batch):
            self._save(self.model)


def save(model, kind, path):
    if kind == "keras":
        model.save(f"{path}.keras")
    elif kind == "h5":
        model.save_weights(f"{path}.weights.h5")
    else:
        tf.train.Checkpoint(model=model).write(path)


def loaded(kind, path, **arguments):
    if kind == "keras":
        return keras.models.load_model(f"{path}.keras")
    model = cases.build(**arguments)
    model.optimizer.build(model.trainable_variables)
    if kind == "h5":
        model.load_weights(f"{path}.weights.h5")
    else:
        status = tf.train.Checkpoint(model=model).read(path)
        status.assert_existing_objects_matched()
    return model


def mid_window(path, kind="h5", batch=1, **arguments):
    """Returns a trained model that was saved in the middle of a window."""
    model = cases.build(**({"accum_steps": ACCUM_STEPS} | arguments))
    callback = SaveAt(batch, lambda model: save(model, kind, path))
    cases.train(model, [callback])
    return model


class ResumingTest(test_utils.TestCase, parameterized.TestCase):
    def path(self):
        return os.path.join(self.folder(), "model")

    def setUp(self):
        super().setUp()
        # What is left of an epoch may be shorter than a window.
        warnings.filterwarnings("ignore", "An epoch has fewer")

    def folder(self):
        folder = os.path.join(self.get_temp_dir(), self.id())
        os.makedirs(folder, exist_ok=True)
        return folder

    def assertSameState(self, mine, theirs):
        for a, b in zip(cases.state(mine), cases.state(theirs), strict=True):
            self.assertAllEqual(a, b)

    @parameterized.parameters(("keras", 0), ("h5", 1), ("tf", 2))
    @test_utils.first_command(0, second=(2,))
    def test_bits_are_those_of_a_run_without_a_break(self, kind, batch):
        self.check_bits(kind, batch)

    @parameterized.parameters(
        ("keras", 1), ("keras", 2), ("h5", 0), ("h5", 2), ("tf", 0), ("tf", 1)
    )
    @test_utils.at_night
    def test_bits_after_other_batches(self, kind, batch):
        self.check_bits(kind, batch)

    def check_bits(self, kind, batch):
        self.assertLess(batch, cases.BATCHES - 1)
        arguments = {
            "keras": {},
            "h5": {"partial_window": "carry", "nonfinite": "skip_microbatch"},
            "tf": {"accumulator_dtype": "bfloat16"},
        }[kind]
        path = self.path()
        whole = mid_window(path, kind, batch, **arguments)
        model = loaded(kind, path, accum_steps=ACCUM_STEPS, **arguments)
        model.fit(cases.dataset(batch + 1), verbose=0, shuffle=False)
        model.fit(
            cases.dataset(),
            initial_epoch=1,
            epochs=cases.EPOCHS,
            verbose=0,
            shuffle=False,
        )
        self.assertSameState(model, whole)

    # Between windows and within one; at night, after every batch.
    @unittest.skipIf(os.name == "nt", "Windows has no SIGKILL.")
    @parameterized.parameters(
        *test_utils.with_nightly(
            [("carry", 3)], [("flush", 2), ("carry", 1), ("flush", 1)]
        )
    )
    @pytest.mark.thorough
    def test_killed(self, partial_window, every):
        self.check_killed(partial_window, every)

    @parameterized.parameters(
        ({"accum_steps": 2}, 0, 1),
        ({"accum_steps": 2}, 1, 0),
        ({"microbatch_size": 1}, 1, 2),
    )
    @test_utils.first_command(0, second=(2,))
    def test_goes_on_from_a_backup_without_anything_else(
        self, arguments, epoch, batch
    ):
        # Between windows, and without a random generator, the place in the
        # epoch is all that a backup has besides a `keras.Model`.
        def build():
            return cases.build(rate=None, **arguments)

        def backup():
            return keras.callbacks.BackupAndRestore(self.folder(), save_freq=1)

        class Stop(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                self.epoch = epoch

            def on_train_batch_end(self, index, logs=None):
                if (self.epoch, index) == (epoch, batch):
                    raise KeyboardInterrupt

        whole = build()
        cases.train(whole)
        with self.assertRaises(KeyboardInterrupt):
            cases.train(build(), [backup(), Stop()])
        model = build()
        cases.train(model, [backup()])
        self.assertSameState(model, whole)

    def check_killed(self, partial_window, every):
        folder = self.folder()
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "tests.checkpoint_cases",
            f"--backups={folder}",
            f"--partial_window={partial_window}",
        ]
        for done in range(every, cases.BATCHES * cases.EPOCHS + 1, every):
            run = subprocess.run(
                [*command, f"--batches={every}"],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": PYTHONPATH},
                capture_output=True,
                text=True,
            )
            self.assertEqual(run.returncode, -signal.SIGKILL, run.stderr)
            self.assertFalse(os.path.exists(f"{folder}/state.npz"), done)
        subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": PYTHONPATH},
            capture_output=True,
            check=True,
        )
        whole = cases.build(
            accum_steps=ACCUM_STEPS, partial_window=partial_window
        )
        cases.train(whole)
        with np.load(f"{folder}/state.npz") as found:
            for a, b in zip(found.values(), cases.state(whole), strict=True):
                self.assertAllEqual(a, b)

    @pytest.mark.thorough
    def test_another_number_of_micro_batches(self):
        path = self.path()
        whole = mid_window(path)
        model = loaded("h5", path, accum_steps=2)
        before = int(model.optimizer.iterations)
        # The window ends as it was begun, with three; the next has two.
        model.fit(cases.dataset(cases.BATCHES - 1), verbose=0)
        self.assertEqual(int(model.optimizer.iterations), before + 1)
        model.fit(cases.dataset(), verbose=0)
        self.assertEqual(int(model.optimizer.iterations), before + 3)
        self.assertEqual(int(whole.optimizer.iterations), 4)

    @parameterized.parameters({}, {"microbatch_size": 1})
    @test_utils.first_command(second=(0,))
    def test_model_without_windows_says_what_it_forgets(self, **arguments):
        path = self.path()
        mid_window(path)
        model = cases.build(**arguments)
        model.optimizer.build(model.trainable_variables)
        with self.assertWarnsRegex(UserWarning, "2 micro-batches"):
            model.load_weights(f"{path}.weights.h5")
        cases.train(model)

    @pytest.mark.thorough
    def test_plain_model_and_back(self):
        path = self.path()
        mid_window(path)
        model = loaded("h5", path, accum_steps=ACCUM_STEPS)
        plain = keras.Model(model.inputs, model.outputs)
        plain.compile(keras.optimizers.Adam(0.1), "mse", jit_compile=False)
        plain.optimizer.build(plain.trainable_variables)
        before = [np.zeros_like(w) for w in plain.get_weights()]
        expected = model.get_weights()
        plain.set_weights(before)
        plain.load_weights(f"{path}.weights.h5")
        for a, b in zip(plain.get_weights(), expected, strict=True):
            self.assertAllEqual(a, b)
        plain.save_weights(f"{path}2.weights.h5")
        # What was gathered is of other weights.
        model.load_weights(f"{path}2.weights.h5")
        self.assertEqual(test_utils.position(model), 0)
        self.assertEqual(test_utils.num_microbatches(model), 0)

    def test_files_between_windows_are_those_of_keras(self):
        def names(model, path):
            model.save_weights(path)
            found = []

            def add(name, node):
                # Older releases of Keras write empty groups as well.
                if isinstance(node, h5py.Dataset):
                    found.append(name)

            with h5py.File(path) as file:
                file.visititems(add)
            return found

        inputs = keras.Input((3,))
        outputs = keras.layers.Dense(2)(inputs)
        path = f"{self.path()}.weights.h5"
        plain = keras.Model(inputs, outputs)
        model = cases.keras_accum.GradientAccumulationModel(
            inputs, outputs, accum_steps=2
        )
        self.assertEqual(names(model, path), names(plain, path))
        tf.train.Checkpoint(model=model).write(f"{path}.tf")
        tf.train.Checkpoint(model=plain).read(f"{path}.tf").assert_consumed()

    @parameterized.parameters("shape", "truncated")
    @test_utils.first_command(second=(0,))
    def test_what_does_not_fit_changes_nothing(self, fault):
        path = f"{self.path()}.weights.h5"
        mid_window(self.path())
        model = cases.build(accum_steps=ACCUM_STEPS)
        cases.train(model)
        before = cases.state(model)
        if fault == "shape":
            with h5py.File(path, "a") as file:
                window = file["_accum_checkpoint"]["vars"]
                del window["buffer_0"]
                window["buffer_0"] = np.zeros((3, 4), "float32")
        else:
            whole = pathlib.Path(path).read_bytes()
            pathlib.Path(path).write_bytes(whole[: len(whole) // 2])
        error = ValueError if fault == "shape" else OSError
        with self.assertRaises(error):
            model.load_weights(path)
        for a, b in zip(cases.state(model), before, strict=True):
            self.assertAllEqual(a, b)
        cases.train(model)

    # HDF5 raises too, and may end the process when it closes the file.
    @unittest.skipIf(os.name == "nt", "Windows does not limit files.")
    @parameterized.parameters("keras", "tf")
    @test_utils.first_command(second=(0,))
    def test_a_full_disk_changes_nothing(self, kind):
        import resource

        model = cases.build(accum_steps=ACCUM_STEPS, partial_window="carry")
        model.fit(cases.dataset(2), verbose=0)
        before = cases.state(model)
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        # No file grows beyond 100 bytes, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, most))
        try:
            with self.assertRaises((OSError, RuntimeError, tf.errors.OpError)):
                save(model, kind, self.path())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        for a, b in zip(cases.state(model), before, strict=True):
            self.assertAllEqual(a, b)
        self.assertEqual(test_utils.position(model), 2)
        save(model, kind, self.path())
        other = loaded(
            kind,
            self.path(),
            accum_steps=ACCUM_STEPS,
            partial_window="carry",
        )
        for each in (model, other):
            each.fit(cases.dataset(3), verbose=0, shuffle=False)
        self.assertSameState(model, other)

    @pytest.mark.thorough
    def test_exported_model_needs_no_library_and_has_no_buffers(self):
        folder = self.folder()
        model = cases.build(accum_steps=ACCUM_STEPS, partial_window="carry")
        model.fit(cases.dataset(2), verbose=0)
        self.assertEqual(test_utils.position(model), 2)
        model.export(f"{folder}/model", verbose=False)
        names = [
            name
            for name, _ in tf.train.list_variables(
                f"{folder}/model/variables/variables"
            )
        ]
        self.assertNotIn("accumulation_window", "".join(names))
        x, _ = next(iter(cases.dataset().as_numpy_iterator()))
        np.save(f"{folder}/x.npy", x)
        code = (
            "import sys, numpy as np, tensorflow as tf\n"
            "sys.modules['keras_accum'] = sys.modules['keras'] = None\n"
            f"model = tf.saved_model.load({folder!r} + '/model')\n"
            f"y = model.serve(np.load({folder!r} + '/x.npy'))\n"
            f"np.save({folder!r} + '/y.npy', y)\n"
        )
        subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
        self.assertAllClose(
            np.load(f"{folder}/y.npy"), model(x), rtol=1e-5, atol=1e-6
        )


class ReportedLossTest(test_utils.TestCase, parameterized.TestCase):
    """A window that goes on reports the loss of all its micro-batches."""

    def build(self, **mode):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((3,))
        hidden = keras.layers.Dense(4)(inputs)
        outputs = {
            "a": keras.layers.Dense(2, name="a")(hidden),
            "b": keras.layers.Dense(2, name="b")(hidden),
        }
        model = keras_accum.GradientAccumulationModel(
            inputs, outputs, accum_steps=3, partial_window="carry"
        )
        losses = {"a": "mse", "b": "mae"}
        model.compile(keras.optimizers.Adam(0.1), losses, **mode)
        model.optimizer.build(model.trainable_variables)
        return model

    def logs(self, model, batches):
        data = cases.dataset().map(lambda x, y: (x, {"a": y, "b": 2.0 * y}))
        data = data.skip(batches.start).take(len(batches))
        history = model.fit(data, verbose=0, shuffle=False).history
        return {name: values[-1] for name, values in history.items()}

    @parameterized.parameters(
        ("keras", {}),
        ("h5", {"run_eagerly": True}),
        ("tf", {"steps_per_execution": 2}),
    )
    @test_utils.first_command(1, second=(2,))
    def test_is_that_of_the_whole_window(self, kind, mode):
        expected = self.logs(self.build(**mode), range(3))
        path = os.path.join(self.get_temp_dir(), kind)
        model = self.build(**mode)
        self.logs(model, range(2))
        save(model, kind, path)
        if kind == "keras":
            model = keras.models.load_model(f"{path}.keras")
        else:
            model = self.build(**mode)
            if kind == "h5":
                model.load_weights(f"{path}.weights.h5")
            else:
                tf.train.Checkpoint(model=model).read(path)
        actual = self.logs(model, range(2, 3))
        self.assertEqual(int(model.optimizer.iterations), 1)
        self.assertEqual(list(actual), list(expected))
        for name, value in expected.items():
            self.assertAllClose(actual[name], value, rtol=1e-6, msg=name)

    def test_is_not_of_a_window_that_has_ended(self):
        path = os.path.join(self.get_temp_dir(), "ended")
        model = self.build(run_eagerly=True)
        self.logs(model, range(2))
        save(model, "h5", path)
        found = []
        for flushes in (True, False):
            model = self.build(run_eagerly=True)
            model.load_weights(f"{path}.weights.h5")
            if flushes:
                model.flush()
            else:
                model.update_step()
                model._accumulation.position.complete()
            found.append(self.logs(model, range(2, 4)))
        self.assertAllClose(*found)


class OldFilesTest(test_utils.TestCase, parameterized.TestCase):
    """Files of before a window was made of parts: one update, and 2 of 3."""

    @parameterized.parameters("keras", "tf")
    @test_utils.first_command(0)
    def test_go_on(self, kind):
        if kind == "keras" and not test_utils.HAS_RENORM:
            self.skipTest("Keras 3.15 wrote it: older ones do not read it.")
        arguments = {
            "accum_steps": ACCUM_STEPS,
            "partial_window": "carry",
            "nonfinite": "skip_microbatch",
        }
        expected = cases.build(**arguments)
        for skipped in (0, 3):
            expected.fit(cases.dataset(skipped), verbose=0, shuffle=False)
        path = str(ROOT / "tests" / "data" / "window")
        model = loaded(kind, path, **arguments)
        self.assertEqual(model.partial_window, "carry")
        for each in (model, expected):
            each.fit(cases.dataset(3), verbose=0, shuffle=False)
            self.assertEqual(int(each.optimizer.iterations), 2)
        # In front of BatchNormalization a bias has a gradient of rounding
        # alone, which Adam makes as large as any. Another CPU wrote the file.
        bias, moving_mean = model.layers[1].bias, model.layers[2].moving_mean
        # Two updates, each by at most its rate of 0.1, up or down.
        atols = {id(bias): 0.4, id(moving_mean): 1e-4}
        variables = [*model.variables, *model.optimizer.variables]
        for variable, a, b in zip(
            variables, cases.state(model), cases.state(expected), strict=True
        ):
            atol = atols.get(id(variable), 1e-6)
            self.assertAllClose(a, b, 1e-5, atol, variable.path)


class ReplicasTest(test_utils.TestCase, parameterized.TestCase):
    """What was gathered goes into another number of replicas."""

    @parameterized.parameters(("keras", True), ("h5", False), ("tf", True))
    @test_utils.first_command(0, second=(2,))
    def test_goes_on(self, kind, onto_replicas):
        self.check(kind, onto_replicas)

    @parameterized.parameters(("keras", False), ("h5", True), ("tf", False))
    @test_utils.at_night
    def test_goes_on_the_other_way(self, kind, onto_replicas):
        self.check(kind, onto_replicas)

    def check(self, kind, onto_replicas):
        replicated, reason = test_utils.chosen_strategy()
        if replicated is None:
            self.skipTest(reason)
        strategies = [tf.distribute.get_strategy(), replicated]
        if not onto_replicas:
            strategies.reverse()
        batches = test_utils.microbatches([8, 6, 4, 8, 2, 8])

        def built():
            model = test_utils.accumulating(
                accum_steps=3, partial_window="carry"
            )
            model.compile(
                keras.optimizers.SGD(0.1, momentum=0.9),
                loss=test_utils.crossentropy(),
                jit_compile=False,
            )
            model.optimizer.build(model.trainable_variables)
            return model

        path = os.path.join(self.get_temp_dir(), self.id())
        with strategies[0].scope():
            model = built()
        model.fit(test_utils.dataset(batches[:5]), verbose=0)
        save(model, kind, path)
        with strategies[1].scope():
            if kind == "keras":
                model = keras.models.load_model(f"{path}.keras")
            else:
                model = built()
            if kind == "h5":
                model.load_weights(f"{path}.weights.h5")
            elif kind == "tf":
                status = tf.train.Checkpoint(model=model).read(path)
                status.assert_existing_objects_matched()
        model.fit(test_utils.dataset(batches[5:]), verbose=0)
        self.assertEqual(test_utils.position(model), 0)
        expected = test_utils.mlp()
        initial = expected.get_weights()
        expected.compile(
            keras.optimizers.SGD(0.1, momentum=0.9),
            loss=test_utils.crossentropy(),
            run_eagerly=True,
        )
        for window in (batches[:3], batches[3:]):
            expected.train_on_batch(*test_utils.concatenate(window))
        self.assertSameWeights(
            model.get_weights(), expected.get_weights(), initial
        )


if __name__ == "__main__":
    tf.test.main()
