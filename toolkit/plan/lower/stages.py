"""Cutting a model into pipeline stages, between operators of its traced graph.

The model is not touched and need not know: torch.export gives its operators in order with the
module path of each, and a stage is a stretch of them. What a stage reads from before its
beginning becomes its input; a value used several stages on (an encoder's output) is an input and
an output of those between. Parameter-free values (positions, masks) are computed again where they
are needed instead of being sent.

Inside a stage, the operators of a module in `recompute` become a graph of their own, which keeps
its inputs only and is run again in backward.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import checkpoint

from toolkit.errors import UsageError
from toolkit.plan.lower.compat.pipelines import module_path


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


class Recomputed(nn.Module):
    """Keeps only its inputs, and runs forward again before its backward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return checkpoint(self.module, *args, use_reentrant=False)


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
    recompute: Sequence[str] = (),
) -> tuple[StageModule, ...]:
    """Return the stages of `module`, which share its parameters.

    It is traced with an example microbatch, by input name.

    `begins_at[s]` is the module path at whose first operator stage s begins (None: the start).
    Modules in `recompute` must each lie in one stage. Raises UsageError when no operator runs at
    one of these paths, or they are not in the model's order.
    """
    exported = torch.export.export(module, (), dict(batch), strict=False)
    root = exported.module(check_guards=False)
    assert isinstance(root, GraphModule)
    calls = [node for node in root.graph.nodes if node.op == "call_function"]
    starts = [0 if path is None else _stretch(calls, path).start for path in begins_at]
    starts.append(len(calls))
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
    stretches = [_stretch(calls, path) for path in recompute]
    for path, stretch in zip(recompute, stretches, strict=True):
        if any(stretch.start < start < stretch.stop for start in starts):
            raise UsageError(
                f"{path} is to be recomputed as one, and a stage begins inside it",
                remedy="recompute the modules in it, or begin the stage elsewhere",
            )
    return tuple(
        _stage(root, names, received, sent, _inside(calls, stretches, first, last))
        for (received, sent), (first, last) in zip(
            itertools.pairwise(borders), itertools.pairwise(starts), strict=True
        )
    )


def _stage(
    root: GraphModule,
    names: Mapping[Node, str],
    received: Sequence[Node],
    sent: Sequence[Node],
    recomputed: Mapping[Node, int],
) -> StageModule:
    graph = Graph()
    copied: dict[Node, Node] = {}
    for node in received:
        copied[node] = graph.placeholder(node.name)
        copied[node].meta = dict(node.meta)
    needed = _closure(sent, set(received))
    inner: dict[str, nn.Module] = {}
    stretches: dict[int, list[Node]] = {}
    for node in recomputed:
        if node in needed:
            stretches.setdefault(recomputed[node], []).append(node)
    for node in root.graph.nodes:
        if node in names and node in needed:
            copied[node] = graph.placeholder(names[node])
        elif node in recomputed and node in needed:
            stretch = stretches[recomputed[node]]
            if node is stretch[-1]:
                name = f"recomputed_{len(inner)}"
                inner[name] = _splice(root, graph, copied, stretch, needed, set(sent), name)
        elif node in needed:
            copied[node] = graph.node_copy(node, lambda old: copied[old])
    outputs = tuple(copied[node] for node in sent)
    graph.output(outputs[0] if len(outputs) == 1 else outputs)
    _drop_unread(graph)
    graph.lint()
    return StageModule(
        module=GraphModule({**_attributes(root, graph), **inner}, graph),
        inputs=tuple(_like(node) for node in received),
        user_inputs=tuple(name for node, name in names.items() if node in needed),
        outputs=tuple(_like(node) for node in sent),
    )


def _splice(
    root: GraphModule,
    graph: Graph,
    copied: dict[Node, Node],
    stretch: Sequence[Node],
    needed: set[Node],
    sent: set[Node],
    name: str,
) -> Recomputed:
    """Make `stretch` a graph of its own, and `graph` call it as the submodule `name`."""
    members, inner, inside = set(stretch), Graph(), dict[Node, Node]()
    sources = dict.fromkeys(source for node in stretch for source in node.all_input_nodes)
    read = [source for source in sources if source not in members and source.op != "get_attr"]
    for source in read:
        inside[source] = inner.placeholder(source.name)
    for source in sources:
        if source.op == "get_attr":
            inside[source] = inner.node_copy(source)
    for node in stretch:
        inside[node] = inner.node_copy(node, lambda old: inside[old])
    made = [
        node
        for node in stretch
        if node in sent or any(user in needed and user not in members for user in node.users)
    ]
    inner.output(tuple(inside[node] for node in made))
    inner.lint()
    call = graph.call_module(name, tuple(copied[source] for source in read))
    for i, node in enumerate(made):
        copied[node] = graph.call_function(operator.getitem, (call, i))
    return Recomputed(GraphModule(_attributes(root, inner), inner))


def _drop_unread(graph: Graph) -> None:
    """Parameters that only a recomputed stretch reads are held by that stretch alone."""
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


def _attributes(root: GraphModule, graph: Graph) -> dict[str, Any]:
    """What `graph` reads of `root`: its parameters, buffers and constants."""
    found: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            found[str(node.target)] = getattr(root.get_submodule(owner), name)
    return found


def _stretch(calls: Sequence[Node], path: str) -> range:
    """The positions of what runs in the module at `path`, which must be one stretch."""
    first = _start(calls, path)
    last = max(i for i, node in enumerate(calls) if within(module_path(node), path))
    for node in calls[first : last + 1]:
        # An operator of no module (a check that export put in) may lie anywhere.
        if module_path(node) and not within(module_path(node), path):
            raise UsageError(
                f"{path} runs more than once: {module_path(node)} runs between",
                remedy="use the 3f1b strategy for a model that recycles its blocks",
            )
    return range(first, last + 1)


def _inside(
    calls: Sequence[Node], stretches: Sequence[range], first: int, last: int
) -> dict[Node, int]:
    """Which stretch each operator of the stage [first, last) is in, of those in a stretch."""
    return {
        calls[i]: number
        for number, stretch in enumerate(stretches)
        if first <= stretch.start and stretch.stop <= last
        for i in stretch
    }


def _start(calls: Sequence[Node], path: str) -> int:
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
