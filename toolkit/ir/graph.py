"""OpGraph: a traced model as operators over tensors, all of it plain data.

An operator's arguments hold `Ref` where a tensor goes in and values everywhere else, so a graph
can be written to a file, compared, scaled to other sizes and split without torch at hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import networkx as nx

from toolkit.errors import FormatError, unknown_name

if TYPE_CHECKING:
    from toolkit.ir.fold import Block
    from toolkit.ir.scale import Scaling

Role = Literal["parameter", "buffer", "input", "constant", "activation"]

_ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
    "complex64": 8, "complex128": 16,
}  # fmt: skip


def item_bytes(dtype: str) -> int:
    """Return the bytes of one element of `dtype`; an unknown one is an error.

    >>> item_bytes("bfloat16")
    2
    """
    if dtype not in _ITEM_BYTES:
        raise unknown_name("dtype", dtype, _ITEM_BYTES)
    return _ITEM_BYTES[dtype]


@dataclass(frozen=True)
class Ref:
    """Where an argument of an operator is a tensor: the tensor's name."""

    name: str


@dataclass(frozen=True)
class Constant:
    """An argument that is a torch constant (a dtype, a layout, a memory format, a device)."""

    kind: Literal["dtype", "layout", "memory_format", "device"]
    value: str


# None, bool, int, float, str, Ref, Constant, or a tuple of these; in a `Scaling` also `Size`.
Argument = Any


def refs(argument: Argument) -> Iterator[str]:
    """Yield the names of the tensors inside an argument, in order.

    >>> list(refs((Ref("a"), 1, (Ref("b"),))))
    ['a', 'b']
    """
    if isinstance(argument, Ref):
        yield argument.name
    elif isinstance(argument, tuple):
        for part in argument:
            yield from refs(part)


@dataclass(frozen=True)
class Tensor:
    """A tensor of the graph.

    `storage` names the tensor whose memory this one lies in: itself, or what it is a view of.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role
    fqn: str | None = None
    requires_grad: bool = False
    storage: str = ""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * item_bytes(self.dtype)

    @property
    def is_view(self) -> bool:
        return self.storage != self.name

    @property
    def is_floating(self) -> bool:
        return self.dtype.startswith(("float", "bfloat", "complex"))


@dataclass(frozen=True)
class Op:
    """One call of an ATen (or registered) operator.

    `name` is `<module path>:<operator>`, numbered within the module when it occurs again, so it
    does not change when another part of the model does. `arguments` are by schema name, defaults
    filled in; the first `num_positional` may be passed by position.
    """

    name: str
    target: str
    arguments: Mapping[str, Argument]
    num_positional: int
    outputs: tuple[str, ...]
    module_path: str
    source: str = ""
    grad_enabled: bool = True
    autocast: str = ""  # the dtype products are cast to inside torch.autocast; "" outside

    @property
    def args(self) -> tuple[Argument, ...]:
        return tuple(self.arguments.values())[: self.num_positional]

    @property
    def kwargs(self) -> dict[str, Argument]:
        return dict(list(self.arguments.items())[self.num_positional :])

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensors read, in argument order; one that is read twice is listed twice."""
        return tuple(refs(tuple(self.arguments.values())))

    @property
    def kind(self) -> str:
        """The operator without its overload: `aten.add` for `aten.add.Tensor`."""
        return self.target.rpartition(".")[0] if self.target.count(".") > 1 else self.target


@dataclass(frozen=True)
class OpGraph:
    """A model's forward pass: operators in execution order, and the tensors between them."""

    name: str
    ops: tuple[Op, ...]
    tensors: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    modules: Mapping[str, str]  # module path -> class name
    training: bool
    sizes: Mapping[str, int] = field(default_factory=dict)  # batch, tokens, context: as evaluated
    tied: Mapping[str, str] = field(default_factory=dict)  # another FQN -> the parameter's own
    scaling: Scaling | None = None
    fixed: Mapping[str, str] = field(default_factory=dict)  # size -> why it cannot vary

    def __post_init__(self) -> None:
        _check(self)

    def op(self, name: str) -> Op:
        """Return the operator called `name`; an unknown one is an error."""
        if name not in self._by_name:
            raise unknown_name(f"operator of {self.name}", name, self._by_name)
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Op]:
        return {op.name: op for op in self.ops}

    @cached_property
    def producer(self) -> Mapping[str, Op]:
        """Tensor name -> the operator that makes it (parameters and inputs have none)."""
        return {name: op for op in self.ops for name in op.outputs}

    @cached_property
    def learned(self) -> frozenset[str]:
        """The tensors that depend on a parameter, parameters included."""
        found = {tensor.name for tensor in self.parameters()}
        for op in self.ops:
            if not found.isdisjoint(op.inputs):
                found.update(op.outputs)
        return frozenset(found)

    @cached_property
    def consumers(self) -> Mapping[str, tuple[Op, ...]]:
        """Tensor name -> the operators that read it, in order; every tensor has an entry."""
        readers: dict[str, list[Op]] = {name: [] for name in self.tensors}
        for op in self.ops:
            for name in dict.fromkeys(op.inputs):
                readers[name].append(op)
        return {name: tuple(ops) for name, ops in readers.items()}

    def input_tensors(self, op: Op) -> tuple[Tensor, ...]:
        return tuple(self.tensors[name] for name in op.inputs)

    def output_tensors(self, op: Op) -> tuple[Tensor, ...]:
        return tuple(self.tensors[name] for name in op.outputs)

    def parameters(self) -> tuple[Tensor, ...]:
        """Return every parameter once (a tied weight is one tensor)."""
        return tuple(t for t in self.tensors.values() if t.role == "parameter")

    @cached_property
    def differentiated(self) -> frozenset[str]:
        """Names of the operators whose backward runs: a gradient reaches them from an output."""
        reached = {name for name in self.outputs if self.tensors[name].requires_grad}
        found: set[str] = set()
        for op in reversed(self.ops):
            if op.grad_enabled and not reached.isdisjoint(op.outputs):
                inputs = {name for name in op.inputs if self.tensors[name].requires_grad}
                if inputs:
                    found.add(op.name)
                    reached |= inputs
        return frozenset(found)

    @cached_property
    def networkx(self) -> nx.DiGraph:
        """The graph as networkx: operators and source tensors are nodes, tensors label edges.

        An operator's node has `kind="op"` and `op`; a parameter's, buffer's, input's or constant's
        has `kind="source"` and `tensor`; an edge's `tensors` are the names that flow along it.
        """
        made = nx.DiGraph(name=self.name)
        for tensor in self.tensors.values():
            if tensor.role != "activation":
                made.add_node(tensor.name, kind="source", tensor=tensor)
        for op in self.ops:
            made.add_node(op.name, kind="op", op=op)
        for op in self.ops:
            for name in dict.fromkeys(op.inputs):
                maker = self.producer.get(name)
                tail = maker.name if maker else name
                if made.has_edge(tail, op.name):
                    made.edges[tail, op.name]["tensors"] += (name,)
                else:
                    made.add_edge(tail, op.name, tensors=(name,))
        return made

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the graph's content, the same as in a file it is saved to."""
        from toolkit import record
        from toolkit.ir import io

        return record.digest(io.to_body(self))

    def at(self, **sizes: int) -> OpGraph:
        """Return this graph at other sizes, e.g. `at(batch=8, tokens=1, context=4096)`.

        Nothing is traced again. Raises UsageError naming a size the graph cannot vary, and why.
        """
        from toolkit.ir import scale

        return scale.at(self, sizes)

    def blocks(self) -> tuple[Block, ...]:
        """Return the repeated blocks, each unique one with all its instances."""
        return self._blocks

    @cached_property
    def _blocks(self) -> tuple[Block, ...]:
        from toolkit.ir import fold

        return fold.blocks(self)

    def save(self, path: Path) -> str:
        """Write the graph to `path` as a record of kind "graph"; return its digest."""
        from toolkit.ir import io

        return io.save(self, path)

    @staticmethod
    def load(path: Path) -> OpGraph:
        """Read a graph file; raises UsageError when missing, FormatError when not a sound one."""
        from toolkit.ir import io

        return io.load(path)


def _check(graph: OpGraph) -> None:
    """Raise FormatError unless every name is defined once, before it is used."""

    def fail(what: str) -> FormatError:
        return FormatError(f"graph {graph.name!r} is not sound: {what}")

    roles = get_args(Role)
    known: set[str] = set()
    for name, tensor in graph.tensors.items():
        if tensor.name != name or tensor.role not in roles or tensor.storage not in graph.tensors:
            raise fail(f"tensor {name!r} is {tensor}")
        if any(type(size) is not int or size < 0 for size in tensor.shape):
            raise fail(f"tensor {name!r} has shape {tensor.shape}")
        item_bytes(tensor.dtype)
        if tensor.role != "activation":
            known.add(name)
    names: set[str] = set()
    for op in graph.ops:
        if op.name in names or op.name in known:
            raise fail(f"the name {op.name!r} occurs twice")
        names.add(op.name)
        for name in op.inputs:
            if name not in known:
                raise fail(f"{op.name!r} reads {name!r}, which nothing before it makes")
        for name in op.outputs:
            if name in known or name not in graph.tensors:
                raise fail(f"{op.name!r} makes {name!r}, which is unknown or made before")
            known.add(name)
    for name in (*graph.inputs, *graph.outputs, *graph.tensors):
        if name not in known:
            raise fail(f"nothing makes {name!r}")
