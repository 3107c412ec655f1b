"""PyTorch: a loop as its documentation has it, and one that divides once.

What PyTorch leaves to the user's own loop, moving averages, constraints and
schedules, stands in the loop where a careful user would put it: after the
optimizer's step.
"""

import contextlib
import dataclasses
import os
import socket
import tempfile

import numpy as np
import torch
import torch.distributed
from torch import nn
from torch.nn import functional

from conformance import problems
from conformance.problems import Batch
from conformance.problems import Problem
from conformance.system import DoesNotApply
from conformance.system import Outcome
from conformance.system import System

torch.set_num_threads(1)

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "mixed_float16": torch.float32,
}


class Network(nn.Module):
    """The models of `problems.initial_weights`."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.model, self.lookup = problem.model, problem.lookup
        initial = problems.initial_weights(problem.model)
        layers = {}
        for name in ("hidden", "output", "row", "query", "key", "generator"):
            if f"{name}_kernel" in initial:
                kernel = torch.from_numpy(initial[f"{name}_kernel"].T.copy())
                layer = nn.Linear(
                    kernel.shape[1],
                    kernel.shape[0],
                    bias=f"{name}_bias" in initial,
                )
                layer.weight.data = kernel
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
                layers[name] = layer
        if "embedding" in initial:
            table = torch.from_numpy(initial["embedding"].copy())
            layers["embedding"] = nn.Embedding.from_pretrained(
                table, freeze=False
            )
        if "scale" in initial:
            layers["normalized"] = nn.BatchNorm1d(
                problems.FEATURES, eps=1e-3, momentum=0.1
            )
        if problem.model == "spectral":
            layer = nn.utils.parametrizations.spectral_norm(layers["hidden"])
            vector = problems.initial_vector(problems.FEATURES)
            layer.parametrizations.weight[0]._v = torch.from_numpy(vector)
        self.layers = nn.ModuleDict(layers)
        self.dropout = nn.Dropout(0.5)
        self.to(DTYPES[problem.dtype])

    def forward(self, x):
        """Returns logits, or two of them, and the hidden units or None."""
        layers = self.layers
        if "query" in layers:
            return (layers["query"](x), layers["key"](x)), None
        if "generator" in layers:
            made = torch.tanh(layers["generator"](x))
            return (self.score(x), self.score(made)), None
        if "embedding" in layers and self.lookup:
            x = layers["embedding"](x)
        elif "embedding" in layers:
            table = layers["embedding"].weight
            x = functional.one_hot(x.long(), len(table)).to(table.dtype) @ table
        if "normalized" in layers:
            x = layers["normalized"](x)
        if self.model == "dropout":
            x = self.dropout(x)
        hidden = None
        if "hidden" in layers:
            x = hidden = torch.tanh(layers["hidden"](x))
        outputs = layers["output"](x)
        if "row" in layers:
            outputs = (layers["row"](x[:, 0]), outputs)
        return outputs, hidden

    def score(self, x):
        """Returns the logits of the discriminator of "pair"."""
        hidden = torch.tanh(self.layers["hidden"](x))
        return self.layers["output"](hidden)

    def named(self) -> dict[str, torch.Tensor]:
        """Returns the parameters by the names of `problems.initial_weights`."""
        found = {}
        for name, layer in self.layers.items():
            if name == "embedding":
                found["embedding"] = layer.weight
            elif name == "normalized":
                found |= {"scale": layer.weight, "offset": layer.bias}
            else:
                # Spectral normalization iterates wherever `weight` is read.
                weight = (
                    layer.parametrizations.weight.original
                    if hasattr(layer, "parametrizations")
                    else layer.weight
                )
                found[f"{name}_kernel"] = weight.T
                if layer.bias is not None:
                    found[f"{name}_bias"] = layer.bias
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the same in NumPy."""
        return {
            name: value.detach().double().numpy().copy()
            for name, value in self.named().items()
        }


def tensors(batch: Batch, problem: Problem, rank: int = 0):
    """Returns inputs, labels and weights of a batch: a process's own rows.

    Labels of padding are `IGNORED`.
    """
    size = batch.rows // problem.replicas
    local_rows = slice(rank * size, (rank + 1) * size)

    def local(array):
        return torch.from_numpy(array[local_rows].copy())

    def of_tokens(labels):
        return local(labels).long().masked_fill(x == 0, problems.IGNORED)

    x = local(batch.x)
    if problem.model == "tagger":
        y = of_tokens(batch.y)
    elif problem.model == "two_losses":
        y = (local(batch.y[0]).long(), of_tokens(batch.y[1]))
    else:
        y = local(batch.y)
        y = y if problem.model == "dropout" else y.long()
    if x.is_floating_point():
        x = x.to(DTYPES[problem.dtype])
    return x, y, None if batch.weight is None else local(batch.weight)


def pairs(outputs, labels):
    """Returns the outputs and labels of each loss."""
    if isinstance(labels, tuple):
        return list(zip(outputs, labels, strict=True))
    return [(outputs, labels)]


def numerators(problem: Problem, outputs, labels, weight) -> list[torch.Tensor]:
    """Returns each loss, summed."""
    if problem.model == "towers":
        query, key = outputs
        own = torch.arange(len(query))
        return [functional.cross_entropy(query @ key.T, own, reduction="sum")]
    if problem.model == "pair":
        real, fake = map(functional.softplus, (-outputs[0], outputs[1]))
        called_real = functional.softplus(-outputs[1])
        return [(real + fake).sum(), called_real.sum()]
    sums = []
    for output, label in pairs(outputs, labels):
        if label.is_floating_point():
            entries = functional.mse_loss(output, label, reduction="none")
        else:
            entries = functional.cross_entropy(
                output.flatten(0, -2).to(
                    torch.promote_types(output.dtype, torch.float32)
                ),
                label.flatten(),
                ignore_index=problems.IGNORED,
                reduction="none",
            )
        sums.append((entries if weight is None else entries * weight).sum())
    return sums


def denominators(problem: Problem, labels, weight) -> list[float]:
    """Returns what each loss is divided by, in a mean."""
    every = labels if isinstance(labels, tuple) else (labels,)
    if problem.model == "pair":
        every *= 2
    if problem.reduction == "sum":
        return [1.0] * len(every)
    if problem.reduction == "weighted_mean":
        return [float(weight.sum())]
    return [float((each != problems.IGNORED).sum()) for each in every]


def penalty(problem: Problem, network: Network) -> torch.Tensor:
    """Returns the L2 penalty of the hidden kernel."""
    if not problem.l2:
        return torch.zeros(())
    return problem.l2 * network.layers["hidden"].weight.square().sum()


def extras(problem: Problem, hidden, rows: float) -> torch.Tensor:
    """Returns the penalty on hidden units, and the loss that is added.

    Args:
        problem: The problem.
        hidden: The hidden units, or None.
        rows: Of all that means are taken over.
    """
    if hidden is None:
        return torch.zeros(())
    loss = problem.activity_l2 * hidden.square().sum() / rows
    if problem.added == "balance":
        shares = hidden.softmax(-1).mean(0)
        balance = problems.UNITS * shares.square().sum()
        # It has no sum over rows; as if it were a mean over them.
        return loss + problem.added_scale * balance * (len(hidden) / rows)
    if problem.added is not None:
        added = problem.added_scale * hidden.square().mean(-1).sum()
        loss = loss + (added / rows if problem.added == "row_mean" else added)
    return loss


def losses_of(problem: Problem, model, data, bottoms=None, rows=None):
    """Returns the losses of a batch that have a backward pass each.

    Args:
        problem: The problem.
        model: The network, or what wraps it.
        data: The batch.
        bottoms: What each loss is divided by; else, its own denominator.
        rows: The rows that means over rows are taken over; else, its own.
    """
    x, y, weight = data
    outputs, hidden = model(x)
    if bottoms is None:
        bottoms = denominators(problem, y, weight)
    means = [
        # A mean over nothing is NaN in PyTorch; who has such batches says 0.
        top / max(bottom, 1.0 if top == 0 else bottom)
        for top, bottom in zip(
            numerators(problem, outputs, y, weight), bottoms, strict=True
        )
    ]
    if problem.step in ("two_calls", "two_optimizers"):
        return means
    return [extras(problem, hidden, rows or len(x)) + sum(means)]


def loss_of(problem: Problem, network, inner: Network, data) -> torch.Tensor:
    """Returns the loss of a batch, as it is written without accumulation."""
    return penalty(problem, inner) + sum(losses_of(problem, network, data))


class Training:
    """A network, its optimizers, and what follows each of their steps.

    Attributes:
        groups: The parameters of each optimizer.
    """

    def __init__(self, problem: Problem) -> None:
        torch.manual_seed(0)
        self.problem = problem
        self.network = Network(problem)
        self.parameters = list(self.network.parameters())
        self.groups = [self.parameters]
        if problem.step == "two_optimizers":
            generator = list(self.network.layers["generator"].parameters())
            others = [
                parameter
                for name in ("hidden", "output")
                for parameter in self.network.layers[name].parameters()
            ]
            self.groups = [others, generator]
        self.optimizers = [
            make_optimizer(problem, group) for group in self.groups
        ]
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(
            self.optimizer, 0.5 if problem.halving else 1.0
        )
        self.average = self.average_by_hand = None
        if problem.average_by_hand:
            self.average_by_hand = [p.detach().clone() for p in self.parameters]
        elif problem.average is not None:
            self.average = torch.optim.swa_utils.AveragedModel(
                self.network,
                multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(
                    problem.average
                ),
            )
            # It begins with the first weights, and not with the first update.
            self.average.update_parameters(self.network)
        # With a scale at which no step overflows, and is left out.
        self.scaler = torch.amp.GradScaler(
            "cpu",
            init_scale=2.0**10,
            enabled=problem.dtype == "mixed_float16",
        )

    @property
    def optimizer(self):
        """The first optimizer, or the only one."""
        return self.optimizers[0]

    def backward(self, losses, backward=torch.Tensor.backward) -> None:
        """Makes a backward pass of each loss.

        Args:
            losses: One for each optimizer, if there are several.
            backward: What makes a pass.
        """
        for index, loss in enumerate(losses):
            kwargs = {}
            if index < len(losses) - 1:
                kwargs["retain_graph"] = True
            if len(self.groups) > 1:
                # What it has to say to the other network does not count.
                kwargs["inputs"] = self.groups[index]
            backward(loss, **kwargs)

    def autocast(self):
        """Returns the context of the forward pass."""
        if self.problem.dtype != "mixed_float16":
            return contextlib.nullcontext()
        return torch.autocast("cpu", torch.float16)

    def update(self) -> None:
        """Takes the optimizer's step, and what follows it."""
        problem = self.problem
        self.scaler.unscale_(self.optimizer)
        if problem.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, problem.clip_norm)
        if problem.clip_value is not None:
            nn.utils.clip_grad_value_(self.parameters, problem.clip_value)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.schedule.step()
        self.after_update()

    def after_update(self) -> None:
        """Applies the constraint and the moving average."""
        if self.problem.nonnegative:
            with torch.no_grad():
                self.network.layers["hidden"].weight.clamp_(min=0)
        if self.average is not None:
            self.average.update_parameters(self.network)
        if self.average_by_hand is not None:
            with torch.no_grad():
                for average, parameter in zip(
                    self.average_by_hand, self.parameters, strict=True
                ):
                    average.lerp_(parameter, 1 - self.problem.average)

    def outcome(self) -> Outcome:
        """Returns what it left behind."""
        result = Outcome(self.network.arrays())
        states = list(self.optimizer.state.values())
        if states and "step" in states[0]:
            result.updates = int(states[0]["step"])
        if self.average is not None:
            result.averages = self.average.module.arrays()
        if self.average_by_hand is not None:
            network = Network(self.problem)
            network.load_state_dict(
                dict(
                    zip(
                        dict(self.network.named_parameters()),
                        self.average_by_hand,
                        strict=True,
                    )
                )
            )
            result.averages = network.arrays()
        if "normalized" in self.network.layers:
            layer = self.network.layers["normalized"]
            result.moving_mean = layer.running_mean.double().numpy()
            result.moving_variance = layer.running_var.double().numpy()
        if self.problem.model == "spectral":
            hidden = self.network.layers["hidden"]
            vector = hidden.parametrizations.weight[0]._v
            result.power_vector = vector.double().numpy()
        return result


def make_optimizer(problem: Problem, parameters) -> torch.optim.Optimizer:
    """Returns the optimizer."""
    rate = problem.learning_rate
    if problem.optimizer == "adam":
        return torch.optim.Adam(parameters, rate)
    if problem.optimizer == "adamw":
        return torch.optim.AdamW(parameters, rate, weight_decay=0.1)
    momentum = 0.9 if problem.optimizer == "momentum" else 0.0
    return torch.optim.SGD(parameters, rate, momentum=momentum)


def plain(problem: Problem) -> Outcome:
    """Trains on the large batches, in one process."""
    problem = dataclasses.replace(problem, replicas=1)
    training, reported = Training(problem), []
    for batches in problem.large_batches():
        sums = []
        for batch in batches:
            data = tensors(batch, problem)
            with training.autocast():
                losses = losses_of(problem, training.network, data)
                losses[0] = losses[0] + penalty(problem, training.network)
            training.backward([training.scaler.scale(each) for each in losses])
            training.update()
            sums.append((float(sum(losses)), batch.rows))
        rows = sum(each for _, each in sums)
        reported.append(sum(loss * each for loss, each in sums) / max(rows, 1))
    outcome = training.outcome()
    outcome.losses = reported
    return outcome


def in_processes(function, problem: Problem, *args) -> Outcome:
    """Calls `function(problem, rank, *args)` in each of the replicas.

    They find each other by the usual variables of the environment. Returns
    what the first returned.
    """
    if problem.replicas == 1:
        return function(problem, 0, *args)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            in_process,
            (function, problem, args, port, folder),
            nprocs=problem.replicas,
        )
        return torch.load(f"{folder}/outcome", weights_only=False)


def in_process(rank, function, problem, args, port, folder) -> None:
    """Trains in one of the processes; see `in_processes`."""
    os.environ |= {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(problem.replicas),
    }
    outcome = function(problem, rank, *args)
    if rank == 0:
        torch.save(outcome, f"{folder}/outcome")


def refuse_other_subjects(problem: Problem) -> None:
    """Raises for what PyTorch has no part in."""
    if problem.xla:
        raise DoesNotApply("PyTorch has a compiler of its own.")


class Loop(System):
    """The loop that PyTorch documents."""

    def plain(self, problem):
        refuse_other_subjects(problem)
        return plain(problem)

    def accumulated(self, problem):
        refuse_other_subjects(problem)
        if problem.nonfinite != "propagate":
            raise DoesNotApply("What a loop leaves out is up to the user.")
        return in_processes(train_in_loop, problem, add_microbatches)


class SummingLoop(Loop):
    """The loop that sums, and divides by what all of the window amounts to."""

    def accumulated(self, problem):
        refuse_other_subjects(problem)
        if problem.nonfinite != "propagate":
            raise DoesNotApply("What a loop leaves out is up to the user.")
        return in_processes(train_in_loop, problem, add_sums)


def train_in_loop(problem, rank, add) -> Outcome:
    """Trains on all windows; `add` makes the gradients of one."""
    training = Training(problem)
    model = training.network
    if problem.replicas > 1:
        torch.distributed.init_process_group("gloo")
        model = nn.parallel.DistributedDataParallel(model)
    seen = 0
    for windows in problem.windows():
        for window in windows:
            data = [tensors(batch, problem, rank) for batch in window]
            data = in_parts(problem, data)
            steps = len(data)
            stop = problem.resume_after
            if stop is not None and seen < stop < seen + len(window):
                add(training, model, data[: stop - seen], steps)
                training = resumed(training)
                model = training.network
                data = data[stop - seen :]
            add(training, model, data, steps)
            training.update()
            seen += len(window)
    if problem.replicas > 1:
        torch.distributed.destroy_process_group()
    return training.outcome()


def in_parts(problem: Problem, data: list[tuple]) -> list[tuple]:
    """Returns the micro-batches, or, of "two_parts", all of their parts."""
    if problem.step != "two_parts":
        return data
    return [
        (*part, weight)
        for x, y, weight in data
        for part in zip(problems.parts(x), problems.parts(y), strict=True)
    ]


def resumed(training: Training) -> Training:
    """Returns another training that goes on from what this one saved."""
    with tempfile.TemporaryFile() as file:
        torch.save(
            {
                "model": training.network.state_dict(),
                "optimizer": training.optimizer.state_dict(),
            },
            file,
        )
        file.seek(0)
        state = torch.load(file)
    training = Training(training.problem)
    training.network.load_state_dict(state["model"])
    training.optimizer.load_state_dict(state["optimizer"])
    return training


def synchronized(model, is_last: bool):
    """Returns the context of a backward pass: only the last one reduces."""
    if is_last or not hasattr(model, "no_sync"):
        return contextlib.nullcontext()
    return model.no_sync()


def add_microbatches(training, model, data, steps) -> None:
    """Adds up the mean losses' gradients, each over k."""
    problem = training.problem
    # A sum is not divided. A short window is known to be one.
    divisor = 1 if problem.reduction == "sum" else steps
    for index, each in enumerate(data):
        with synchronized(model, index == len(data) - 1):
            with training.autocast():
                losses = losses_of(problem, model, each)
                losses[0] = losses[0] + penalty(problem, training.network)
            training.backward(
                [training.scaler.scale(loss / divisor) for loss in losses]
            )


def add_sums(training, model, data, steps) -> None:
    """Adds up the sums' gradients, over the denominators of the window."""
    del steps
    problem, network = training.problem, training.network
    bottoms = torch.tensor(
        [denominators(problem, y, weight) for _, y, weight in data],
        dtype=torch.float64,
    ).sum(0)
    rows = torch.tensor([float(sum(len(x) for x, _, _ in data))])
    if problem.reduction == "sum":
        bottoms = torch.ones_like(bottoms)
    elif problem.replicas > 1:
        torch.distributed.all_reduce(bottoms)
        torch.distributed.all_reduce(rows)
    # DistributedDataParallel takes the mean over the processes.
    scale = problem.replicas
    for index, each in enumerate(data):
        is_last = index == len(data) - 1
        with synchronized(model, is_last):
            with training.autocast():
                losses = [
                    scale * loss
                    for loss in losses_of(
                        problem, model, each, bottoms.tolist(), float(rows)
                    )
                ]
                if is_last:
                    losses[0] = losses[0] + penalty(problem, network)
            training.backward([training.scaler.scale(loss) for loss in losses])
