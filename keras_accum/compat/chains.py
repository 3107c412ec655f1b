"""Layers of a functional model that follow one another, called as one."""

import collections
import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import NamedTuple

import keras

from keras_accum.compat.classes import functional_class
from keras_accum.compat.hooks import Hook
from keras_accum.compat.remat import is_for_shapes
from keras_accum.compat.remat import is_recomputed_whole
from keras_accum.compat.remat import recompute

_graphs = Hook(functional_class(), "_run_through_graph")


class Link(NamedTuple):
    """A layer of a chain.

    Attributes:
        size: Of what it is given, in entries of a row.
        is_large: Whether what comes and goes in it may be much: it has
            layers of its own, or is not Keras's.
    """

    size: int
    is_large: bool = False


class Chain:
    """Recomputed layers: each is given what the one before it returns.

    Nobody else is given that, nor are they given anything else.

    Args:
        nodes: Their places in the graph of the model.
        operation_fn: Returns the function to call instead of a layer.

    Attributes:
        names: The names of the layers.
    """

    def __init__(self, nodes: Sequence, operation_fn: Callable) -> None:
        self._nodes, self._operation_fn = nodes, operation_fn
        self.names = tuple(node.operation.name for node in nodes)

    def __call__(self, *args, **kwargs):
        """Calls the layers, as the graph does."""
        first, *others = self._nodes
        result = self._operation_fn(first.operation)(*args, **kwargs)
        for node in others:
            known = {id(tensor): result for tensor in node.input_tensors}
            args, kwargs = node.arguments.fill_in(known)
            result = self._operation_fn(node.operation)(*args, **kwargs)
        return result


def recomputing_chains(starts: Callable):
    """Has layers that follow one another recomputed as one, in this thread.

    Those are meant that are recomputed, in calls of functional models; the way
    is that of `recomputing_by`.

    Args:
        starts: Called with a list of `Link`s for each chain; returns where each
            is cut into others.

    Returns:
        A context manager.
    """

    def run(method, model, inputs, *args, **kwargs):
        is_symbolic = is_for_shapes() or any(
            isinstance(leaf, keras.KerasTensor)
            for leaf in keras.tree.flatten(inputs)
        )
        if args or set(kwargs) != {"operation_fn"} or is_symbolic:
            return method(model, inputs, *args, **kwargs)
        chains = _chains(model)
        chains = _cut(chains, starts([_links(chain) for chain in chains]))
        by_chain = _by_chain(chains, kwargs["operation_fn"])
        return method(model, inputs, operation_fn=by_chain)

    return _graphs.calling(run)


def _by_chain(chains, operation_fn):
    """Returns an `operation_fn` by which the first of a chain calls it all."""
    whole = {
        id(chain[0].operation): Chain(chain, operation_fn) for chain in chains
    }
    later = {id(node.operation) for chain in chains for node in chain[1:]}

    def function(operation):
        if id(operation) in later:
            return _given
        chain = whole.get(id(operation))
        if chain is None:
            return operation_fn(operation)
        return lambda *args, **kwargs: recompute(chain, args, kwargs)

    return function


def _given(*args, **kwargs):
    """Returns the tensor that a layer is given: its chain's result."""
    tensors = keras.tree.flatten((args, kwargs))
    return next(filter(keras.ops.is_tensor, tensors))


def _chains(model):
    """Returns lists of two or more nodes that follow one another."""
    nodes = [
        node
        for some in model._nodes_by_depth.values()
        for node in some
        if node.operation and not node.is_input
    ]
    if not any(is_recomputed_whole(node.operation) for node in nodes):
        return []
    counts = collections.Counter(id(node.operation) for node in nodes)
    users = collections.defaultdict(dict)
    for node in nodes:
        for tensor in node.input_tensors:
            users[id(tensor)][id(node)] = node
    for tensor in model.outputs:
        # The caller.
        users[id(tensor)][None] = None

    def is_link(node):
        layer = node and node.operation
        return (
            isinstance(layer, keras.Layer)
            # Its own layers are recomputed.
            and not isinstance(layer, keras.Model)
            and is_recomputed_whole(layer)
            and counts[id(layer)] == 1
            and len(node.outputs) == 1
        )

    following = {}
    for node in filter(is_link, nodes):
        (output,) = node.outputs
        if len(users[id(output)]) == 1:
            (user,) = users[id(output)].values()
            if is_link(user) and {id(output)} == set(
                map(id, user.input_tensors)
            ):
                following[id(node)] = user
    begun, chains = set(map(id, following.values())), []
    for node in nodes:
        if id(node) in following and id(node) not in begun:
            chain = [node]
            while id(chain[-1]) in following:
                chain.append(following[id(chain[-1])])
            chains.append(chain)
    return chains


def _links(chain):
    """Returns the layers of a chain as `Link`s."""
    return [
        Link(
            sum(
                math.prod(size for size in tensor.shape if size is not None)
                for tensor in {id(t): t for t in node.input_tensors}.values()
            ),
            not type(node.operation).__module__.startswith("keras.")
            or len(list(node.operation._flatten_layers())) > 1,
        )
        for node in chain
    ]


def _cut(chains, starts):
    """Returns the parts of chains that have two or more layers."""
    parts = []
    for chain, places in zip(chains, starts, strict=True):
        stops = [*places[1:], len(chain)]
        parts += [
            chain[start:stop]
            for start, stop in zip(places, stops, strict=True)
            if stop - start > 1
        ]
    return parts
