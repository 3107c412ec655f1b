"""One training of the language model example."""

import dataclasses
import pathlib

import keras
import tensorflow as tf

import keras_accum
from examples import language_model_backups
from examples import language_model_network
from examples import language_model_text

# Vectors are scales, shifts and lookups, for which small is not simple.
_NOT_DECAYED = ("bias", "beta", "gamma", "embeddings")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the weights; each field is the flag of its name."""

    batching: str
    batch_size: int
    accum_steps: int
    epochs: int
    updates_per_epoch: int
    learning_rate: float
    warmup_updates: int
    weight_decay: float
    clip_norm: float
    jit_compile: bool
    seed: int
    shape: language_model_network.Shape

    @property
    def updates(self) -> int:
        """Updates in the whole training."""
        return self.epochs * self.updates_per_epoch

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches in an epoch, which is a whole number of windows."""
        return self.updates_per_epoch * self.accum_steps


def learning_rate(
    settings: Settings,
) -> keras.optimizers.schedules.LearningRateSchedule:
    """Rises for the warm-up and falls to a tenth like a cosine.

    It counts updates, whatever `accum_steps` is.
    """
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        warmup_target=settings.learning_rate,
        warmup_steps=settings.warmup_updates,
        decay_steps=settings.updates - settings.warmup_updates,
        alpha=0.1,
    )


def optimizer(settings: Settings) -> keras.optimizers.Optimizer:
    """Returns AdamW, which decays the kernels and nothing else."""
    result = keras.optimizers.AdamW(
        learning_rate(settings),
        weight_decay=settings.weight_decay,
        beta_2=0.95,
        global_clipnorm=settings.clip_norm or None,
    )
    result.exclude_from_weight_decay(var_names=_NOT_DECAYED)
    return result


def compiled_model(settings: Settings) -> keras.Model:
    """Returns the model that trains, made in the scope of its strategy."""
    model = language_model_network.build_model(
        settings.shape,
        keras_accum.GradientAccumulationModel,
        accum_steps=settings.accum_steps,
    )
    model.compile(
        optimizer=optimizer(settings),
        # The mean over a window's tokens, however few its rows have.
        loss=keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        jit_compile=settings.jit_compile,
    )
    return model


def train(
    settings: Settings,
    rows: language_model_text.Rows,
    strategy: tf.distribute.Strategy,
    is_chief: bool = True,
    checkpoint_dir: str | None = None,
    log_dir: str | None = None,
) -> keras.Model:
    """Trains, from the last epoch saved in `checkpoint_dir` if there is one.

    Args:
        settings: What decides the weights.
        rows: What to train on.
        strategy: Where to train.
        is_chief: Whether to print, to log, and to keep what is saved.
        checkpoint_dir: A folder that all workers share; None to save nothing.
        log_dir: A folder for TensorBoard; None for no logs.

    Returns:
        The trained model.
    """
    keras.utils.set_random_seed(settings.seed)
    with strategy.scope():
        model = compiled_model(settings)
        # Before it is restored; `fit` would build it later.
        model.optimizer.build(model.trainable_variables)
    done, callbacks = 0, []
    if checkpoint_dir is not None:
        done = language_model_backups.restore(model, checkpoint_dir)
        language_model_backups.check_agreement(strategy, done)
        callbacks.append(
            language_model_backups.Backups(checkpoint_dir, keep=is_chief)
        )
    if log_dir is not None and is_chief:
        callbacks.append(
            keras.callbacks.TensorBoard(
                pathlib.Path(log_dir), write_graph=False
            )
        )
    if done and is_chief:
        print(f"Going on after epoch {done}", flush=True)
    if done >= settings.epochs:
        return model
    model.fit(
        language_model_text.batches(
            rows,
            settings.batch_size,
            first=done * settings.batches_per_epoch,
            last=settings.epochs * settings.batches_per_epoch,
            seed=settings.seed,
        ),
        initial_epoch=done,
        epochs=settings.epochs,
        steps_per_epoch=settings.batches_per_epoch,
        callbacks=callbacks,
        shuffle=False,
        verbose=2 if is_chief else 0,
    )
    return model
