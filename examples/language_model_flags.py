"""The flags of the language model example, and what they must be."""

import functools
import os
import pathlib

from absl import flags

from examples import language_model_text
from examples import strategies

_POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags.

    Args:
        values: Where to define them. Two examples have flags of the same names,
            which one process can only have in two places.
    """
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    enum = functools.partial(flags.DEFINE_enum, flag_values=values)
    boolean = functools.partial(flags.DEFINE_bool, flag_values=values)
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    decimal = functools.partial(flags.DEFINE_float, flag_values=values)

    # Where it runs
    enum("strategy", "one", strategies.NAMES, "Where to train.")
    integer(
        "replicas",
        None,
        "With --strategy=mirrored, how many GPUs; without a GPU, into how many"
        " devices the CPU is split. By default all GPUs, or two.",
        lower_bound=1,
    )
    enum(
        "cluster_resolver",
        "tf_config",
        ("tf_config", "slurm"),
        "With --strategy=multi_worker, who knows the workers.",
    )
    integer(
        "startup_timeout",
        300,
        "Seconds that workers have to come together.",
        lower_bound=1,
    )
    string("tpu", "local", "With --strategy=tpu, the TPU's address.")
    boolean("jit_compile", True, "Whether XLA compiles the steps.")
    enum("mixed_precision", "float32", _POLICIES, "Keras dtype policy.")

    # What it trains on
    enum(
        "batching",
        "packed",
        tuple(language_model_text.BATCHINGS),
        "How documents become rows: one after the other, or each in rows of its"
        " own whose padding does not count.",
    )
    integer(
        "batch_size",
        8,
        "Rows in a micro-batch, on all replicas together.",
        lower_bound=1,
    )
    integer("accum_steps", 4, "Micro-batches per update.", lower_bound=1)
    integer("epochs", 10, "Times to report and save.", lower_bound=1)
    integer(
        "updates_per_epoch", 60, "Updates from one to the next.", lower_bound=1
    )
    integer(
        "seed",
        0,
        "Decides the first weights, the order of the rows and the sample.",
        lower_bound=0,
        upper_bound=2**32 - 1,
    )

    # What is trained, and how
    integer("context", 128, "Bytes in a row.", lower_bound=2)
    integer("layers", 4, "Transformer blocks.", lower_bound=1)
    integer("width", 128, "Size of a token's vector.", lower_bound=1)
    integer("heads", 4, "Attention heads.", lower_bound=1)
    decimal("learning_rate", 0.004, "AdamW's, at its highest.", lower_bound=0.0)
    integer(
        "warmup_updates",
        40,
        "Updates in which the learning rate rises.",
        lower_bound=0,
    )
    decimal("weight_decay", 0.1, "AdamW's, of the kernels.", lower_bound=0.0)
    decimal(
        "clip_norm",
        1.0,
        "The longest gradient, of all weights together; 0 for any.",
        lower_bound=0.0,
    )

    # What it writes
    string(
        "checkpoint_dir",
        None,
        "Where to save after every epoch, and to go on from; all workers must"
        " see the same folder. At the end it gets the model, `model.keras`.",
    )
    # absl has a flag of that name, for log files that this program has not.
    string(
        "log_dir", None, "Where to log for TensorBoard.", allow_override=True
    )
    integer("sample_length", 400, "Bytes of text to make up.", lower_bound=0)
    decimal(
        "temperature",
        0.8,
        "How daring the text is; 0 for the likeliest.",
        lower_bound=0.0,
    )

    _define_rules(values)


def _define_rules(values):
    for names, rule, message in (
        (
            ("width", "heads"),
            lambda width, heads: width % heads == 0,
            "--width must be a multiple of --heads.",
        ),
        (
            ("warmup_updates", "epochs", "updates_per_epoch"),
            lambda warmup, epochs, updates: warmup < epochs * updates,
            "--warmup_updates must be less than all updates, which are --epochs"
            " times --updates_per_epoch.",
        ),
        (
            ("strategy", "replicas"),
            lambda name, replicas: replicas is None or name == "mirrored",
            "--replicas goes with --strategy=mirrored only.",
        ),
        *(
            (
                (name,),
                _is_writable,
                f"--{name} must name a folder that may be written to, or a new"
                " one in such a folder.",
            )
            for name in ("checkpoint_dir", "log_dir")
        ),
    ):
        flags.register_multi_flags_validator(
            names,
            # absl gives a dict in the order of the names.
            lambda given, rule=rule: rule(*given.values()),
            message,
            flag_values=values,
        )


def _is_writable(name):
    if name is None:
        return True
    path = pathlib.Path(name).absolute()
    if path.exists():
        return path.is_dir() and os.access(path, os.W_OK)
    return os.access(path.parent, os.W_OK)
