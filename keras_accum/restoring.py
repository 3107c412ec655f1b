"""Eager steps of a model, after which all is put back."""

import contextlib
from collections.abc import Iterator

from keras_accum import compat
from keras_accum import replicas


def check_built(accumulation) -> None:
    """Raises a `ValueError` if a step would make weights."""
    model = accumulation.model
    if model.built:
        return
    unbuilt = [model]
    if accumulation.overrides.step("train_step") is not None:
        # Such a step may call the parts of a model, and never the model.
        unbuilt = [
            each for each in compat.unbuilt_layers(model) if each is not model
        ]
    if unbuilt:
        raise ValueError(
            "`model` must be built. Call it on some rows first. Received: "
            f"{', '.join(each.name for each in unbuilt)} not built"
        )


@contextlib.contextmanager
def unchanged(model) -> Iterator[None]:
    """Puts back all that steps change of a model."""
    accumulation, tracker = model._accumulation, compat.loss_tracker(model)
    strategy = model.distribute_strategy
    check_built(accumulation)
    variables = [
        each.value
        for each in (
            *model.variables,
            *model.metrics_variables,
            *model.optimizer.variables,
            *compat.existing_seed_state(),
        )
    ]
    trackers = accumulation.window["losses"].trackers
    variables += [each for tracker in trackers for each in tracker.windows]
    snapshot = replicas.Snapshot(strategy, variables)
    functions = (
        model.train_function,
        model.test_function,
        model.predict_function,
    )
    try:
        with compat.running_eagerly(model):
            yield
    finally:
        compat.set_loss_tracker(model, tracker)
        (
            model.train_function,
            model.test_function,
            model.predict_function,
        ) = functions
        snapshot.restore()
