"""Lightning: `Trainer(accumulate_grad_batches=k)`.

Steps with several backward passes or optimizers are what its documentation
calls manual optimization, with which the trainer does not accumulate: it has a
loop for that.
"""

import logging
import tempfile
import warnings

import lightning
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from conformance import torch_systems
from conformance.system import DoesNotApply
from conformance.system import NoOption
from conformance.system import System
from conformance.torch_systems import Training

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class Module(lightning.LightningModule):
    """A training's network, with the hooks that a user writes."""

    def __init__(self, problem) -> None:
        super().__init__()
        self.training_of = Training(problem)
        self.network = self.training_of.network
        self.problem = problem
        self.losses: list[float] = []

    def training_step(self, batch, index):
        """Returns the mean loss; Lightning divides it by k."""
        del index
        problem = self.problem
        loss = torch_systems.loss_of(problem, self.network, self.network, batch)
        rows = len(batch[0])
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=rows)
        if problem.reduction == "sum":
            # It divides, and a sum is not divided.
            loss = loss * self.trainer.accumulate_grad_batches
        return loss

    def configure_optimizers(self):
        """Returns the optimizer, and a schedule that counts its steps."""
        schedule = self.training_of.schedule
        return {
            "optimizer": self.training_of.optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def optimizer_step(self, *args, **kwargs):
        """Makes the optimizer's step, and what follows it."""
        super().optimizer_step(*args, **kwargs)
        self.training_of.after_update()

    def on_train_epoch_end(self):
        """Keeps the loss that is reported."""
        self.losses.append(float(self.trainer.callback_metrics["loss"]))


class ManualModule(Module):
    """A module of manual optimization, with the loop for accumulation."""

    def __init__(self, problem) -> None:
        super().__init__(problem)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        """Makes backward passes, and with each k-th batch the updates."""
        problem, training = self.problem, self.training_of
        parts = torch_systems.in_parts(problem, [batch])
        steps = problem.accum_steps * len(parts)
        for part in parts:
            losses = torch_systems.losses_of(problem, self.network, part)
            training.backward(
                [loss / steps for loss in losses], self.manual_backward
            )
        if (index + 1) % problem.accum_steps == 0:
            optimizers = self.optimizers()
            for each in (
                optimizers if isinstance(optimizers, list) else [optimizers]
            ):
                each.step()
                each.zero_grad()

    def configure_optimizers(self):
        """Returns the optimizers."""
        return self.training_of.optimizers

    def on_train_epoch_end(self):
        """Keeps no loss."""


class Loader:
    """The batches of all epochs, which goes on where a checkpoint was made."""

    def __init__(self, problem, rank) -> None:
        self._epochs = [
            [torch_systems.tensors(batch, problem, rank) for batch in batches]
            for batches in problem.epochs
        ]
        self._epoch = self._next = 0

    def __iter__(self):
        # Lightning knows the length, and asks for no more than that.
        if self._next == len(self):
            self._epoch, self._next = self._epoch + 1, 0
        for index in range(self._next, len(self)):
            self._next = index + 1
            yield self._epochs[self._epoch][index]

    def __len__(self):
        return len(self._epochs[self._epoch])

    def state_dict(self):
        """Returns where the loader is."""
        return {"epoch": self._epoch, "next": self._next}

    def load_state_dict(self, state):
        """Goes there."""
        self._epoch, self._next = state["epoch"], state["next"]


class SavesOnce(lightning.Callback):
    """Saves a checkpoint after `batches` batches."""

    def __init__(self, batches, path) -> None:
        self._left, self._path = batches, path

    def on_train_batch_end(self, trainer, *args):
        """Counts the batches."""
        del args
        self._left -= 1
        if self._left == 0:
            trainer.save_checkpoint(self._path)


class Lightning(System):
    """`Trainer(accumulate_grad_batches=k)`."""

    def plain(self, problem):
        refuse(problem)
        return torch_systems.plain(problem)

    def accumulated(self, problem):
        refuse(problem)
        if problem.nonfinite != "propagate":
            raise NoOption("A NaN reaches the weights.")
        if problem.steps_by_update is not None:
            raise NoOption("`GradientAccumulationScheduler` counts epochs.")
        return torch_systems.in_processes(train, problem)


def refuse(problem) -> None:
    """Raises for what it has no part in, on a CPU."""
    torch_systems.refuse_other_subjects(problem)
    if problem.dtype == "mixed_float16":
        raise DoesNotApply("It has float16 on GPUs alone.")


def train(problem, rank):
    """Trains on all epochs; saves and goes on in between if it is to."""
    if problem.resume_after is None:
        return fit(problem, rank, [])
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/saved.ckpt"
        fit(problem, rank, [SavesOnce(problem.resume_after, path)])
        return fit(problem, rank, [], path)


def fit(problem, rank, callbacks, path=None):
    """Trains with these callbacks, from a checkpoint if there is a path."""
    is_manual = problem.step != "whole"
    module = ManualModule(problem) if is_manual else Module(problem)
    steps = 1 if is_manual else problem.accum_steps
    if problem.steps_by_epoch is not None:
        steps = 1
        scheduling = dict(enumerate(problem.steps_by_epoch))
        callbacks = [*callbacks, GradientAccumulationScheduler(scheduling)]
    clipping = {}
    if problem.clip_norm is not None:
        clipping = {"gradient_clip_val": problem.clip_norm}
    if problem.clip_value is not None:
        clipping = {
            "gradient_clip_val": problem.clip_value,
            "gradient_clip_algorithm": "value",
        }
    is_replicated = problem.replicas > 1
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=problem.replicas,
        strategy="ddp" if is_replicated else "auto",
        precision={"float64": "64-true", "bfloat16": "bf16-true"}.get(
            problem.dtype, "32-true"
        ),
        max_epochs=len(problem.epochs),
        accumulate_grad_batches=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **clipping,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer._default_root_dir = folder
        trainer.fit(
            module, Loader(problem, rank), ckpt_path=path, weights_only=False
        )
    outcome = module.training_of.outcome()
    outcome.losses = module.losses
    return outcome
