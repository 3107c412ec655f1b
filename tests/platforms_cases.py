"""Trains as on a system that lacks what only Unix has, for a test.

    python -X warn_default_encoding -m tests.platforms_cases

Modules are imported late, once what they shall not find is gone.
"""

import importlib
import importlib.abc
import pathlib
import pkgutil
import signal
import subprocess
import sys
import tempfile
import types
import warnings

# Modules of the standard library that Windows has not, and that TensorFlow and
# Keras do without. `posix`, `_posixsubprocess` and `_posixshmem` are not among
# them: `os`, `subprocess` and `multiprocessing` are made of those here.
MODULES = frozenset(
    """
    _crypt _curses crypt curses fcntl grp nis ossaudiodev pty pwd readline
    resource spwd syslog termios tty
    """.split()
)
# What others have in modules that Windows has too.
ATTRIBUTES = {
    "mmap": """
        MAP_ANON MAP_ANONYMOUS MAP_PRIVATE MAP_SHARED PROT_READ PROT_WRITE
    """,
    "os": """
        fork forkpty getegid geteuid getgid getloadavg getpgid getpgrp getsid
        getuid killpg mkfifo nice openpty sched_getaffinity setpgid setsid
        sysconf uname wait3 wait4
    """,
    "signal": """
        SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP
        SIGUSR1 SIGUSR2 alarm pause setitimer
    """,
}
# Folders of Linux's kernel.
FOLDERS = ("/proc", "/sys")
ROWS = 8


class Absent(importlib.abc.MetaPathFinder):
    """Finds none of `MODULES`, wherever they are."""

    def find_spec(self, name, path=None, target=None):
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def deny(event, arguments):
    """Hides the files of the kernel, as an audit hook."""
    if event == "open" and str(arguments[0]).startswith(FOLDERS):
        raise FileNotFoundError(arguments[0])


def lack_what_only_unix_has():
    """Takes it from this process, once and for all."""
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, Absent())
    # These two keep their modules: on Windows they have other ones.
    importlib.import_module("keras")
    importlib.import_module("tensorflow")
    # `Popen.kill` is there on Windows, and sends a signal here.
    subprocess.signal = types.SimpleNamespace(**vars(signal))
    for module, names in ATTRIBUTES.items():
        for name in names.split():
            vars(importlib.import_module(module)).pop(name, None)
    sys.addaudithook(deny)


def import_everything():
    """Imports all modules of the package, and the examples' that need no more.

    Other examples import packages that keras_accum does not need.
    """
    names = ["examples.launch_workers", "examples.language_model"]
    package = importlib.import_module("keras_accum")
    for module in pkgutil.iter_modules(package.__path__):
        names.append(f"keras_accum.{module.name}")
    for name in names:
        importlib.import_module(name)


def train(folder):
    """Trains in each way, saves and loads."""
    import keras
    import numpy as np

    import keras_accum

    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 4)).astype("float32")
    y = rng.normal(size=(ROWS, 1)).astype("float32")

    def layers():
        inputs = keras.Input((4,))
        return inputs, keras.layers.Dense(1)(inputs)

    def fitted(model, **kwargs):
        model.compile("adam", "mse", **kwargs)
        model.fit(x, y, batch_size=ROWS // 2, verbose=0)
        return model

    cls = keras_accum.GradientAccumulationModel
    model = fitted(cls(*layers(), accum_steps=2))
    assert int(model.optimizer.iterations) == 1
    model.save(folder / "model.keras")
    loaded = keras.models.load_model(folder / "model.keras")
    assert loaded.accum_steps == 2
    for mine, theirs in zip(
        loaded.get_weights(), model.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)

    # The models below need not be compiled by XLA: that was tried.
    eager = {"run_eagerly": True}
    model = cls.from_model(keras.Model(*layers()), microbatch_size=3)
    assert int(fitted(model, **eager).optimizer.iterations) == 2

    # Nobody says how much is free: the batch is tried as it is.
    model = fitted(cls(*layers(), microbatch_size="auto"), **eager)
    assert model.microbatch_size == ROWS // 2
    from keras_accum import system_memory

    assert system_memory.free_bytes() == system_memory.UNKNOWN
    assert system_memory.address_limit() is None


def launch_workers(folder):
    """Launches two workers, one of which ends while the other waits."""
    from examples import launch_workers

    program = (
        "import os, time\n"
        "print('\\u2603', flush=True)\n"
        "if os.environ['RANK'] == '1':\n"
        "    open(os.environ['SPOKEN'], 'wb').close()\n"
        "    time.sleep(60)\n"
        # The launcher ends the other one as soon as this one has failed.
        "while not os.path.exists(os.environ['SPOKEN']):\n"
        "    time.sleep(0.1)\n"
        "os._exit(3)"
    )
    spoken = {"SPOKEN": str(folder / "spoken")}
    status = launch_workers.launch(
        [sys.executable, "-c", program],
        [spoken | {"RANK": "0"}, spoken | {"RANK": "1"}],
        grace=0.0,
    )
    assert status == 3, status


def main():
    """Fails where something is missed, or read without saying how."""
    warnings.simplefilter("ignore", EncodingWarning)
    warnings.filterwarnings(
        "error", category=EncodingWarning, module=r"(keras_accum|examples)\b"
    )
    lack_what_only_unix_has()
    import_everything()
    with tempfile.TemporaryDirectory() as folder:
        train(pathlib.Path(folder))
        sys.stdout.reconfigure(errors="replace")
        launch_workers(pathlib.Path(folder))
    found = MODULES & set(sys.modules)
    assert not found, found


if __name__ == "__main__":
    main()
