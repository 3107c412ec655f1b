"""Accelerate: `accumulate`, and the loop of its guide where sizes differ.

The guide on "training samples of variable size" gathers a window's batches
first, counts what their losses are to be divided by, over all processes, and
takes sums for losses.
"""

import contextlib
import os
import tempfile

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.state import GradientState

from conformance import torch_systems
from conformance.system import DoesNotApply
from conformance.system import NoOption
from conformance.system import System
from conformance.torch_systems import Training


class AcceleratedTraining(Training):
    """A training whose parts Accelerate has prepared."""

    def __init__(self, problem) -> None:
        super().__init__(problem)
        # It keeps them for the next `Accelerator`.
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=problem.accum_steps
        )
        self.model, *self.optimizers, self.schedule = self.accelerator.prepare(
            self.network, *self.optimizers, self.schedule
        )

    def update(self) -> None:
        """Ends a step, as Accelerate's examples do."""
        problem, accelerator = self.problem, self.accelerator
        if accelerator.sync_gradients:
            if problem.clip_norm is not None:
                accelerator.clip_grad_norm_(self.parameters, problem.clip_norm)
            if problem.clip_value is not None:
                accelerator.clip_grad_value_(
                    self.parameters, problem.clip_value
                )
        for optimizer in self.optimizers:
            optimizer.step()
        self.schedule.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            self.after_update()


class Accelerate(System):
    """`accelerator.accumulate(model)`."""

    def plain(self, problem):
        refuse(problem)
        return torch_systems.plain(problem)

    def accumulated(self, problem):
        refuse(problem)
        if problem.nonfinite != "propagate":
            raise NoOption("A NaN reaches the weights.")
        os.environ["ACCELERATE_USE_CPU"] = "true"
        return torch_systems.in_processes(train, problem)


def refuse(problem) -> None:
    """Raises for what it has no part in, on a CPU."""
    torch_systems.refuse_other_subjects(problem)
    if problem.dtype == "mixed_float16":
        raise DoesNotApply("It has float16 on GPUs alone.")


def train(problem, rank):
    """Trains on all windows."""
    training = AcceleratedTraining(problem)
    seen = update = 0
    for epoch, windows in enumerate(problem.windows()):
        for window in windows:
            data = [
                torch_systems.tensors(batch, problem, rank) for batch in window
            ]
            data = torch_systems.in_parts(problem, data)
            steps = problem.steps_of(epoch, update)
            update += 1
            # `accumulate` goes by a count of its own, and would divide by k.
            is_short = len(window) < steps
            add = add_microbatches
            if is_short or differs(problem):
                add = add_of_guide
            training.accelerator.gradient_accumulation_steps = len(data)
            stop = problem.resume_after
            if stop is not None and seen < stop < seen + len(window):
                add(training, data[: stop - seen])
                training = resumed(training)
                data = data[stop - seen :]
            add(training, data)
            seen += len(window)
    outcome = training.outcome()
    training.accelerator.end_training()
    return outcome


def differs(problem) -> bool:
    """Returns whether micro-batches divide their losses by other numbers."""
    if problem.step == "two_parts":
        return True
    found = set()
    for batch in problem.microbatches():
        _, y, weight = torch_systems.tensors(batch, problem)
        found.add(
            tuple(torch_systems.denominators(problem, y, weight))
            + (batch.rows,)
        )
    return len(found) > 1 or problem.model in ("tagger", "two_losses")


def add_microbatches(training, data) -> None:
    """Runs the quick tour's loop: it divides by k, and knows when to step."""
    problem, accelerator = training.problem, training.accelerator
    for each in data:
        with accelerator.accumulate(training.model):
            losses = torch_systems.losses_of(problem, training.model, each)
            losses[0] = losses[0] + torch_systems.penalty(
                problem, training.network
            )
            if problem.reduction == "sum":
                # It divides, and a sum is not divided.
                steps = accelerator.gradient_accumulation_steps
                losses = [loss * steps for loss in losses]
            training.backward(losses, accelerator.backward)
            training.update()


def add_of_guide(training, data) -> None:
    """Runs the loop of the guide on samples of variable size."""
    problem, accelerator = training.problem, training.accelerator
    steps = accelerator.gradient_accumulation_steps
    denominators = [
        torch_systems.denominators(problem, y, weight) for _, y, weight in data
    ]
    rows = float(sum(len(x) for x, _, _ in data))
    local = torch.tensor([*torch.tensor(denominators).sum(0).tolist(), rows])
    *bottoms, rows = accelerator.reduce(local, "sum").tolist()
    scale = steps * accelerator.num_processes
    for index, each in enumerate(data):
        context = contextlib.nullcontext()
        if index < len(data) - 1 and accelerator.num_processes > 1:
            context = training.model.no_sync()
        with context:
            losses = torch_systems.losses_of(
                problem, training.model, each, bottoms, rows
            )
            training.backward(
                [loss * scale for loss in losses], accelerator.backward
            )
    training.update()


def resumed(training):
    """Returns another training that goes on from `save_state`."""
    with tempfile.TemporaryDirectory() as folder:
        training.accelerator.save_state(folder)
        training = AcceleratedTraining(training.problem)
        training.accelerator.load_state(folder)
    return training
