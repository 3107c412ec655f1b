"""`benchmarks.compare` for systems on PyTorch: a loop, Accelerate, Lightning.

Not compiled: `torch.compile` is another subject, and wants a C++ compiler.
"""

import os
import queue
import threading

import torch
from torch import nn
from torch.nn import functional

from benchmarks import compare_models as models
from benchmarks import compare_worker

torch.set_num_threads(os.cpu_count())


class Attention(nn.Module):
    """Causal attention of a block."""

    def __init__(self):
        super().__init__()
        self.inputs = nn.Linear(models.WIDTH, 3 * models.WIDTH)
        self.output = nn.Linear(models.WIDTH, models.WIDTH)

    def forward(self, x):
        """Returns what the tokens attend to."""
        rows, length, width = x.shape
        heads = (rows, length, 3, models.HEADS, width // models.HEADS)
        query, key, value = self.inputs(x).view(heads).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True
        )
        return self.output(y.transpose(1, 2).reshape(x.shape))


class Residual(nn.Module):
    """Adds what a layer makes of the normalized input."""

    def __init__(self, layer):
        super().__init__()
        self.normal = nn.LayerNorm(models.WIDTH, eps=1e-3)
        self.layer = layer

    def forward(self, x):
        """Returns the sum."""
        return x + self.layer(self.normal(x))


def mlp() -> nn.Module:
    """Returns the MLP."""
    layers, inputs = [], models.FEATURES
    for units in models.LAYERS:
        layers += [nn.Linear(inputs, units), nn.ReLU()]
        inputs = units
    return nn.Sequential(*layers, nn.Linear(inputs, models.CLASSES))


def transformer() -> nn.Module:
    """Returns the transformer."""
    width = models.WIDTH
    layers = [nn.Embedding(models.VOCABULARY, width)]
    for _ in range(models.BLOCKS):
        dense = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )
        layers += [Residual(Attention()), Residual(dense)]
    return nn.Sequential(
        *layers,
        nn.LayerNorm(width, eps=1e-3),
        nn.Linear(width, models.VOCABULARY),
    )


def convolutional() -> nn.Module:
    """Returns the convolutional network; channels come first in PyTorch."""
    layers, inputs = [], models.IMAGE[-1]
    for filters, strides in models.FILTERS:
        layers += [
            nn.Conv2d(inputs, filters, 3, strides, padding=1, bias=False),
            nn.BatchNorm2d(filters, eps=1e-3, momentum=0.01),
            nn.ReLU(),
        ]
        inputs = filters
    return nn.Sequential(
        *layers,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(inputs, models.CLASSES),
    )


NETWORKS = {
    "MLP": mlp,
    "transformer": transformer,
    "convolutional": convolutional,
}


def make_optimizer(name: str, parameters) -> torch.optim.Optimizer:
    """Returns the optimizer."""
    if name == "adamw":
        return torch.optim.AdamW(
            parameters, models.LEARNING_RATE, weight_decay=models.WEIGHT_DECAY
        )
    cls = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name]
    return cls(parameters, models.LEARNING_RATE)


def loss_of(network: nn.Module, x, y) -> torch.Tensor:
    """Returns the mean loss."""
    logits = network(x)
    return functional.cross_entropy(logits.flatten(0, -2), y.flatten())


class Loop(compare_worker.Contestants):
    """The loop that PyTorch documents."""

    names = ("window", "plain", "whole", "ideal")

    def make(self, name, accum_steps):
        """See `Contestants`."""
        torch.manual_seed(0)
        network = NETWORKS[self.model]()
        optimizer = make_optimizer(self.case.optimizer, network.parameters())
        rows = self.case.rows * (accum_steps if name == "whole" else 1)
        batch = self._batch(rows)
        if name == "window":
            return self.window(network, optimizer, batch, accum_steps)
        calls = 1 if name == "whole" else accum_steps

        def step():
            for _ in range(calls):
                optimizer.zero_grad()
                loss_of(network, *batch).backward()
                if name != "ideal":
                    optimizer.step()
            if name == "ideal":
                optimizer.step()

        return step

    def window(self, network, optimizer, batch, accum_steps):
        """Returns the function for "window"."""

        def run():
            for _ in range(accum_steps):
                (loss_of(network, *batch) / accum_steps).backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    def _batch(self, rows):
        x, y = self.case.batch(rows)
        x, y = torch.from_numpy(x.copy()), torch.from_numpy(y.copy())
        if self.model == "convolutional":
            # The order in memory stays, and is what PyTorch says is fastest.
            x = x.permute(0, 3, 1, 2)
        return x, y.long()


class Accelerate(Loop):
    """Accelerate's `accumulate`."""

    def window(self, network, optimizer, batch, accum_steps):
        """See `Loop`."""
        import accelerate

        accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=accum_steps
        )
        network, optimizer = accelerator.prepare(network, optimizer)

        def run():
            for _ in range(accum_steps):
                with accelerator.accumulate(network):
                    accelerator.backward(loss_of(network, *batch))
                    optimizer.step()
                    optimizer.zero_grad()

        return run


class Lightning(Loop):
    """Lightning's `Trainer`, whose loop waits at the ends of windows."""

    def window(self, network, optimizer, batch, accum_steps):
        """See `Loop`."""
        import lightning

        class Module(lightning.LightningModule):
            """The network, its loss and its optimizer."""

            def __init__(self):
                super().__init__()
                self.network = network

            def training_step(self, batch, index):
                del index
                return loss_of(self.network, *batch)

            def configure_optimizers(self):
                return optimizer

        begin, end = queue.SimpleQueue(), queue.SimpleQueue()

        class Windows:
            """Batches of a window, once it may begin."""

            def __iter__(self):
                while True:
                    begin.get()
                    for _ in range(accum_steps):
                        yield batch
                    end.put(None)

            def __len__(self):
                # With a length, Lightning fetches no batch before its time.
                return 10**9

        trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=-1,
            accumulate_grad_batches=accum_steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        threading.Thread(
            target=trainer.fit, args=(Module(), Windows()), daemon=True
        ).start()

        def run():
            begin.put(None)
            end.get()

        return run


CONTESTANTS = {
    "torch_loop": Loop,
    "accelerate": Accelerate,
    "lightning": Lightning,
}

if __name__ == "__main__":
    compare_worker.serve(CONTESTANTS)
    # Lightning waits for another window in a thread of its own.
    os._exit(0)
