r"""Trains a small language model on Python's reference, on one device or many.

A decoder-only transformer learns to predict the bytes of the text that `help()`
shows, which every Python has. Every `--accum_steps` micro-batches make one
update. Trainings of the same `--batch_size` times `--accum_steps` see the same
rows in each update and give the same weights up to rounding, wherever they run.
(One micro-batch per update does not quite: Keras's Adam then gets an
embedding's gradient with repeated rows, and squares each, not their sum.)

    python -m examples.language_model
    python -m examples.language_model --batch_size=4 --accum_steps=8
    python -m examples.language_model --strategy=mirrored --replicas=2
    python -m examples.launch_workers --workers=2 -- \
        python -m examples.language_model --strategy=multi_worker

`--batch_size` is what `fit` means by it: the rows of a micro-batch on all
replicas together, of which each replica gets an equal share.

At the end it compares the loss on held-out documents with the entropy of their
bytes taken one by one, and shows a text that the model makes up. In a training
on several machines only the chief prints, logs and keeps what is saved.
"""

import dataclasses
import os
import pathlib
import sys

from absl import app
from absl import flags

if not __package__:  # `python examples/language_model.py`
    sys.path.insert(0, str(pathlib.Path(__file__).absolute().parent.parent))

from examples import silence

# TensorFlow describes the machine when it is imported and when it looks for
# devices first; `TF_CPP_MIN_LOG_LEVEL` stops only what it says later.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
with silence.silent_stderr():
    import keras
    import tensorflow as tf

    from examples import language_model_flags
    from examples import language_model_network
    from examples import language_model_report
    from examples import language_model_text
    from examples import language_model_training
    from examples import strategies

    tf.config.list_physical_devices()

FLAGS = flags.FLAGS


def _make_strategy() -> tf.distribute.Strategy:
    """Returns the strategy that the flags ask for."""
    if FLAGS.strategy == "mirrored":
        return strategies.mirrored(FLAGS.replicas)
    if FLAGS.strategy == "multi_worker":
        return strategies.multi_worker(
            FLAGS.cluster_resolver, FLAGS.startup_timeout
        )
    if FLAGS.strategy == "tpu":
        return strategies.tpu(FLAGS.tpu)
    return strategies.one_device()


def _from_flags(cls: type, **others):
    """Makes a dataclass, each field of which is the flag of its name."""
    names = {field.name for field in dataclasses.fields(cls)} - set(others)
    return cls(**{name: FLAGS[name].value for name in names}, **others)


def main(argv: list[str]) -> None:
    """Trains, and tells what came of it."""
    if len(argv) > 1:
        sys.exit(f"Flags are written --name=value. Received: {argv[1]}")
    # Strategies tell at length what they are made of.
    tf.get_logger().setLevel("ERROR")
    # First: before TensorFlow has done anything, it can still join others.
    try:
        strategy = _make_strategy()
    except (ValueError, OSError) as error:
        sys.exit(f"--strategy={FLAGS.strategy} cannot be used. {error}.")
    replicas = strategy.num_replicas_in_sync
    if FLAGS.batch_size % replicas:
        sys.exit(
            f"--batch_size={FLAGS.batch_size} must be a multiple of the number"
            f" of replicas, which is {replicas}."
        )
    keras.config.set_dtype_policy(FLAGS.mixed_precision)
    settings = _from_flags(
        language_model_training.Settings,
        shape=_from_flags(language_model_network.Shape),
    )
    train_texts, held_out_texts = language_model_text.documents()
    make_rows = language_model_text.BATCHINGS[settings.batching]
    rows = make_rows(train_texts, settings.shape.context)
    is_chief = strategies.is_chief(strategy)
    if is_chief:
        print(
            f"{len(train_texts)} documents, {rows.tokens:,} bytes, in"
            f" {len(rows):,} rows. {replicas} replica(s) with"
            f" {settings.batch_size // replicas} rows each; an update has"
            f" {settings.accum_steps} micro-batches of them,"
            f" {settings.accum_steps * settings.batch_size} rows.",
            flush=True,
        )
    model = language_model_training.train(
        settings, rows, strategy, is_chief, FLAGS.checkpoint_dir, FLAGS.log_dir
    )
    if not is_chief:
        return
    local = language_model_report.local_copy(model, settings.shape)
    if FLAGS.checkpoint_dir is not None:
        local.save(pathlib.Path(FLAGS.checkpoint_dir, "model.keras"))
    held_out = make_rows(held_out_texts, settings.shape.context)
    print(language_model_report.evaluate(local, rows, held_out), flush=True)
    if FLAGS.sample_length:
        text = language_model_report.sample(
            local, FLAGS.sample_length, FLAGS.temperature, FLAGS.seed
        )
        print(f"\nA sample:\n\n{language_model_report.printable(text)}")


if __name__ == "__main__":
    # The sample may hold characters that the terminal does not have.
    sys.stdout.reconfigure(errors="replace")
    language_model_flags.define()
    # For `--help`, which shows the flags of this file alone.
    flags.adopt_module_key_flags(language_model_flags)
    app.run(main)
