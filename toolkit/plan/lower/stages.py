"""Cutting a model into pipeline stages, between operators of its traced graph.

The model is not touched and need not know: torch.export gives its operators in order with the
module path of each, and a stage is a stretch of them. What a stage reads from before its
beginning becomes its input; parameter-free values (positions, masks) are computed again where
they are needed instead of being sent.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from toolkit.errors import UsageError
from toolkit.plan.lower.compat import module_path


@dataclass(frozen=True)
class StageModule:
    """One stage: `module(*activations, *user inputs)`; parameters are the whole model's own.

    `inputs` are the activations received, and nothing for the first stage; `user_inputs` name
    what of the batch it reads; `outputs` are what it sends, for the last one the loss.
    """

    module: GraphModule
    inputs: tuple[Tensor, ...]
    user_inputs: tuple[str, ...]
    outputs: tuple[Tensor, ...]


def within(path: str, module: str) -> bool:
    """Whether `path` is `module` or lies inside it.

    >>> within("blocks.1.ffn", "blocks.1"), within("blocks.10", "blocks.1")
    (True, False)
    """
    return path == module or path.startswith(f"{module}.")


def cut(
    module: nn.Module,
    batch: Mapping[str, Tensor],
    begins_at: Sequence[str | None],
) -> tuple[StageModule, ...]:
    """Return the stages of `module`, which share its parameters.

    It is traced with an example microbatch, by input name.

    `begins_at[s]` is the module path at whose first operator stage s begins (None: the start).
    Raises UsageError when no operator runs there, or the paths are not in the model's order.
    """
    exported = torch.export.export(module, (), dict(batch), strict=False)
    root = exported.module(check_guards=False)
    assert isinstance(root, GraphModule)
    calls = [node for node in root.graph.nodes if node.op == "call_function"]
    starts = [_start(calls, path) for path in begins_at] + [len(calls)]
    if starts != sorted(set(starts)) or starts[0] != 0:
        raise UsageError(f"stages must follow the model's order, not {list(begins_at)}")
    position = {node: i for i, node in enumerate(calls)}
    learned = _depend_on_parameters(root)
    # Export lowers the case of placeholders' names; they stand in the order of the call.
    placeholders = [node for node in root.graph.nodes if node.op == "placeholder"]
    names = dict(zip(placeholders, batch, strict=True))
    final = next(node for node in root.graph.nodes if node.op == "output").args[0]
    borders = [
        [],
        *(_live(position, learned, start) for start in starts[1:-1]),
        list(final[:1]),  # the loss; a transformers model returns logits after it
    ]
    return tuple(
        _stage(root, names, received, sent) for received, sent in itertools.pairwise(borders)
    )


def _stage(
    root: GraphModule, names: Mapping[Node, str], received: Sequence[Node], sent: Sequence[Node]
) -> StageModule:
    graph = Graph()
    copied: dict[Node, Node] = {}
    for node in received:
        copied[node] = graph.placeholder(node.name)
        copied[node].meta = dict(node.meta)
    needed = _closure(sent, set(received))
    for node in root.graph.nodes:
        if node in names and node in needed:
            copied[node] = graph.placeholder(names[node])
        elif node in needed:
            copied[node] = graph.node_copy(node, lambda old: copied[old])
    outputs = tuple(copied[node] for node in sent)
    graph.output(outputs[0] if len(outputs) == 1 else outputs)
    graph.lint()
    return StageModule(
        module=GraphModule(root, graph),
        inputs=tuple(_like(node) for node in received),
        user_inputs=tuple(name for node, name in names.items() if node in needed),
        outputs=tuple(_like(node) for node in sent),
    )


def _start(calls: Sequence[Node], path: str | None) -> int:
    if path is None:
        return 0
    for i, node in enumerate(calls):
        if within(module_path(node), path):
            return i
    raise UsageError(f"no operator of this model runs in {path!r}", remedy="make the plan again")


def _depend_on_parameters(root: GraphModule) -> set[Node]:
    """Buffers are not learned: a table of positions is held by every stage that reads it."""
    parameters = {name for name, _ in root.named_parameters(remove_duplicate=False)}
    learned: set[Node] = set()
    for node in root.graph.nodes:
        read = node.op == "get_attr" and node.target in parameters
        if read or any(source in learned for source in node.all_input_nodes):
            learned.add(node)
    return learned


def _live(position: Mapping[Node, int], learned: set[Node], start: int) -> list[Node]:
    """The learned values made before `start` and used at or after it, in graph order."""
    return [
        node
        for node, i in position.items()
        if i < start
        and node in learned
        and any(position.get(user, len(position)) >= start for user in node.users)
    ]


def _closure(wanted: Sequence[Node], stop: set[Node]) -> set[Node]:
    """Everything `wanted` is computed from, back to the nodes in `stop`."""
    found: set[Node] = set()
    waiting = [node for node in wanted if node not in stop]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [source for source in node.all_input_nodes if source not in stop]
    return found


def _like(node: Node) -> Tensor:
    """A tensor of the node's shape and type, without memory."""
    value = node.meta["val"]
    return torch.empty(
        value.shape, dtype=value.dtype, device="meta", requires_grad=value.is_floating_point()
    )
