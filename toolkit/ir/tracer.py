"""trace: an nn.Module, unmodified, becomes an OpGraph through torch.export on meta weights.

What is kept of each operator: its target, arguments by name, the module it runs in, the source
line. What is left out: sizes computed on the side (they become expressions), and assertions.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from toolkit import log
from toolkit.errors import ToolkitError
from toolkit.ir import attention, capture, deepen, formulas, nodes, storage, symbols
from toolkit.ir.capture import Axes, Captured
from toolkit.ir.expand import CannotRepeatError, Parts, Repeats, differentiable
from toolkit.ir.graph import Argument, Constant, Op, OpGraph, Ref, Tensor
from toolkit.ir.scale import SHAPE_ARGUMENT, Evaluator, Scaling, Size

_log = log.get_logger(__name__)

# Checks and bookkeeping that compute nothing a model uses.
_CHECKS = frozenset({
    "aten._assert_async.msg", "aten._assert_scalar.default", "aten._assert_tensor_metadata.default",
    "aten.sym_constrain_range.default", "aten.sym_constrain_range_for_size.default",
})  # fmt: skip
_ROLES: dict[InputKind, Any] = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
    InputKind.USER_INPUT: "input",
}
_REPEATS = frozenset({
    "toolkit.enter.default", "toolkit.leave.default", "toolkit.repeat.default",
})  # fmt: skip


def trace(
    module: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    name: str,
    axes: Axes | None = None,
) -> OpGraph:
    """Trace `module(*args, **kwargs)` into an OpGraph; nothing is computed.

    Weights may be on "meta", so a model of any size traces on any machine. `axes` says which input
    dims are sizes the graph can later be evaluated at: `{"batch": {"input_ids": 0}, ...}`, a tuple
    where an input has the size in several dims; None guesses (see capture.guess_axes), `{}` fixes
    everything. The module is traced as it is: `module.train()` keeps dropout, `module.eval()` does
    not. Raises ToolkitError when torch.export cannot trace the model, and when an operator has no
    formula (none is ever taken as free).
    """
    own, _ = own_names(module)
    try:
        captured = capture.capture(module, args, kwargs or {}, axes, own=own)
        traced = _Builder(module, captured, name).graph()
    except CannotRepeatError as error:
        _log.info("%s is traced in full: %s", name, error)
        captured = capture.capture(module, args, kwargs or {}, axes)
        traced = _Builder(module, captured, name).graph()
    graph = attention.as_eager(traced)
    formulas.check(graph)
    return graph


def trace_model(
    model: Any,
    *,
    dtype: torch.dtype = torch.float32,
    training: bool = True,
    targets: bool = True,
    **sizes: int,
) -> OpGraph:
    """Trace a `toolkit.models.Model` on meta, at `sizes` (its defaults for those not given).

    With `targets` the graph ends in the training loss where the model has one, else in its
    outputs. The sizes named in `model.sizes` are what `graph.at` can vary, where export allows.
    """
    stack = model.stack
    if stack is not None and stack.num_blocks > deepen.SHALLOW:
        shallow = stack.shallow(deepen.SHALLOW)
        graph = trace_model(shallow, dtype=dtype, training=training, targets=targets, **sizes)
        return deepen.deepen(graph, stack.path, stack.num_blocks, name=model.name)
    wanted = {**model.sizes, **sizes}
    # Export fixes a size of 1: trace at 2 and evaluate at 1.
    traced = {size: max(value, 2) for size, value in wanted.items()}
    module = model.build(device="meta", dtype=dtype)
    module.train(training)

    def example(**other: int) -> tuple[Sequence[Any], Mapping[str, Any]]:
        return model.example(**other, device="meta", dtype=dtype, targets=targets)

    axes = capture.example_axes(module, example, traced)
    args, kwargs = example(**traced)
    graph = trace(module, args, kwargs, name=model.name, axes=axes)
    ones = {size: 1 for size, value in wanted.items() if value == 1 and size in graph.sizes}
    return graph.at(**ones) if ones else graph


@dataclass
class _Builder:
    """Walks the exported fx graph once, in order, and collects tensors and operators."""

    module: torch.nn.Module
    captured: Captured
    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    shapes: dict[str, tuple[int | Size, ...]] = field(default_factory=dict)
    arguments: dict[str, dict[str, Argument]] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    values: dict[torch.fx.Node, Any] = field(default_factory=dict)  # node -> tensor name(s), scalar
    place: dict[torch.fx.Node, int] = field(default_factory=dict)  # node -> its place
    grad_enabled: bool = True
    autocast: str = ""

    def graph(self) -> OpGraph:
        fixed = dict(self.captured.fixed)
        self.symbols, bounds = symbols.named(self.captured, fixed)
        sizes = dict(self.captured.sizes)
        self.now = Evaluator(sizes)
        self.own, self.tied = own_names(self.module)
        self.repeats = Repeats(Parts(
            self.ops, self.tensors, self.shapes, self.arguments, self.modules, self.own,
            self._new_name,
        ))  # fmt: skip
        inputs = tuple(self._placeholders())
        given = self._body(self.captured.program.graph_module)
        outputs = [name for name in given if isinstance(name, str) and name in self.tensors]
        shapes = {name: shape for name, shape in self.shapes.items() if _varies(shape)}
        return OpGraph(
            name=self.name,
            ops=tuple(self.ops),
            tensors=self.tensors,
            inputs=inputs,
            outputs=tuple(dict.fromkeys(outputs)),
            modules=self.modules,
            training=self.module.training,
            sizes=sizes,
            tied=self.tied,
            scaling=Scaling(bounds, shapes, self.arguments) if bounds else None,
            fixed=fixed,
        )

    def _placeholders(self) -> Iterator[str]:
        program = self.captured.program
        specs = program.graph_signature.input_specs
        holders = [node for node in program.graph.nodes if node.op == "placeholder"]
        requires_grad = {name for name, p in self.module.named_parameters() if p.requires_grad}
        given = iter(self.captured.inputs)
        for node, spec in zip(holders, specs, strict=True):
            value = node.meta.get("val")
            asked = next(given) if spec.kind == InputKind.USER_INPUT else ""
            if not isinstance(value, torch.Tensor):
                self.values[node] = value
                continue
            if spec.kind not in _ROLES:
                raise ToolkitError(f"{self.name}: input {node.name} is a {spec.kind.name}")
            role = _ROLES[spec.kind]
            fqn = self.own.get(spec.target, spec.target) if role != "input" else None
            name = fqn or asked
            self.values[node] = name
            if name not in self.tensors:
                grad = name in requires_grad if role == "parameter" else value.requires_grad
                self._tensor(name, value, role=role, fqn=fqn, requires_grad=grad, storage=name)
            if role == "input":
                yield name

    def _tensor(self, name: str, value: torch.Tensor, **fields: Any) -> None:
        symbolic = tuple(self.symbols(size) for size in value.shape)
        self.shapes[name] = symbolic
        dtype = str(value.dtype).removeprefix("torch.")
        self.tensors[name] = Tensor(name, self.now(symbolic), dtype, **fields)

    def _body(self, body: torch.fx.GraphModule) -> list[Any]:
        """Walk one (sub)graph whose placeholders have values; return its outputs' values."""
        self.place = {user: index for index, user in enumerate(body.graph.nodes)}
        for node in body.graph.nodes:
            if node.op == "call_function":
                self._call(body, node)
            elif node.op == "output":
                return [self.values[n] if isinstance(n, torch.fx.Node) else n
                        for n in pytree.tree_leaves(node.args[0])]  # fmt: skip
        raise AssertionError("an fx graph ends with an output")

    def _call(self, body: torch.fx.GraphModule, node: torch.fx.Node) -> None:
        value = node.meta.get("val")
        if node.target is operator.getitem:
            source, index = cast("tuple[torch.fx.Node, int]", node.args)
            self.values[node] = self.values[source][index]
        elif isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            self.values[node] = self.symbols(value)
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            self._region(body, node)
        elif str(node.target) in _REPEATS:
            self._repeated(node, str(node.target))
        elif str(node.target) in _CHECKS:
            self.values[node] = None
        elif isinstance(node.target, torch._ops.OpOverload) and value is not None:
            self._operator(node, node.target)
        elif isinstance(value, (bool, int, float)):
            self.values[node] = value  # arithmetic on sizes that turned out constant
        else:
            raise _unknown(node)

    def _region(self, body: torch.fx.GraphModule, node: torch.fx.Node) -> None:
        """Inline the region of a `with torch.no_grad()` or `with torch.autocast(...)`."""
        kind = str(node.target)
        at = next((i for i, a in enumerate(node.args) if nodes.is_submodule(a)), None)
        if kind not in ("wrap_with_set_grad_enabled", "wrap_with_autocast") or at is None:
            raise _unknown(node)
        outer = self.grad_enabled, self.autocast, self.place
        if kind == "wrap_with_set_grad_enabled":
            self.grad_enabled = bool(node.args[0])
        else:
            _, dtype, enabled, *_ = node.args
            self.autocast = str(dtype).removeprefix("torch.") if enabled else ""
        inner = getattr(body, str(cast("torch.fx.Node", node.args[at]).target))
        holders = [n for n in inner.graph.nodes if n.op == "placeholder"]
        for holder, given in zip(holders, node.args[at + 1 :], strict=True):
            self.values[holder] = self.values[given] if isinstance(given, torch.fx.Node) else given
        self.values[node] = tuple(self._body(inner))
        self.grad_enabled, self.autocast, self.place = outer

    def _operator(self, node: torch.fx.Node, target: torch._ops.OpOverload) -> None:
        path, kind_of_module = nodes.module(node)
        self.modules.setdefault(path, kind_of_module)
        for parent, parent_kind in (node.meta.get("nn_module_stack") or {}).values():
            self.modules.setdefault(nodes.plain_path(parent), nodes.class_name(parent_kind))
        name = self._new_name(path, str(target).split(".")[1])
        values = node.meta["val"]
        many = isinstance(values, (tuple, list))
        values = list(values) if many else [values]
        outputs = tuple(f"{name}#{i}" if many else name for i in range(len(values)))

        symbolic, num_positional = self._arguments(node, target)
        op = Op(
            name=name,
            target=str(target),
            arguments={},
            num_positional=num_positional,
            outputs=outputs,
            module_path=path,
            source=nodes.source(node),
            grad_enabled=self.grad_enabled,
            autocast=self.autocast,
        )
        if op.kind in SHAPE_ARGUMENT:
            argument = SHAPE_ARGUMENT[op.kind]
            given = symbolic[argument]
            made = tuple(self.symbols(size) for size in values[0].shape)
            symbolic[argument] = tuple(
                size if asked == -1 else asked for asked, size in zip(given, made, strict=True)
            )
        arguments = {key: self.now(value) for key, value in symbolic.items()}
        varying = {key: value for key, value in symbolic.items() if _varies(value)}
        if varying:
            self.arguments[name] = varying
        op = replace(op, arguments=arguments)

        written = nodes.written(target, arguments)
        base = next(iter(op.inputs), None)
        base_value = next((n.meta["val"] for n in node.all_input_nodes if self._is(n, base)), None)
        grad = differentiable(op) and any(self.tensors[n].requires_grad for n in op.inputs)
        for output, value in zip(outputs, values, strict=True):
            owner = output
            if written is not None:
                owner = self.tensors[written].storage
            elif base is not None and storage.is_view(op.kind, arguments, base_value, value):
                owner = self.tensors[base].storage
            floating = value.is_floating_point() or value.is_complex()
            self._activation(output, value, grad and floating, owner)
        self.values[node] = outputs if many else outputs[0]
        if written is not None:
            op = self._after_write(node, op, written)
        self.ops.append(op)

    def _new_name(self, path: str, operator_name: str) -> str:
        name = f"{path}:{operator_name}"
        self.counts[name] += 1
        return name if self.counts[name] == 1 else f"{name}.{self.counts[name] - 1}"

    def _repeated(self, node: torch.fx.Node, kind: str) -> None:
        """One of repeat.py's operators: where a block's call begins or ends, or happens again."""
        given, call, *earlier = cast("tuple[Any, ...]", node.args)
        names = tuple(self.values[part] for part in given)
        path = self.captured.calls[call]
        if kind == "toolkit.repeat.default":
            names = self.repeats.repeat(earlier[0], path, names)
        elif kind == "toolkit.enter.default":
            self.repeats.enter(call, path, names)
        else:
            self.repeats.leave(call, names)
        self.values[node] = names

    def _is(self, node: torch.fx.Node, name: str | None) -> bool:
        found = self.values.get(node)
        return isinstance(found, str) and found == name

    def _activation(self, name: str, value: torch.Tensor, grad: bool, owner: str) -> None:
        self.tensors[name] = Tensor(name, (), "bool", "activation", storage=owner)
        self._tensor(name, value, role="activation", requires_grad=grad, storage=owner)

    def _after_write(self, node: torch.fx.Node, op: Op, written: str) -> Op:
        """Give every other name of the memory an in-place operator wrote a new version.

        Later readers of any of them then depend on the write, as data.
        """
        owner = self.tensors[written].storage
        here = self.place[node]
        outputs = list(op.outputs)
        for other, name in list(self.values.items()):
            if other is node or not isinstance(name, str) or name not in self.tensors:
                continue
            tensor = self.tensors[name]
            used_later = any(self.place.get(user, -1) > here for user in other.users)
            if tensor.storage != owner or not used_later:
                continue
            fresh = op.outputs[0]
            if name != written:
                fresh = f"{op.name}@{name}"
                self.shapes[fresh] = self.shapes[name]
                grad = tensor.requires_grad or self.tensors[op.outputs[0]].requires_grad
                self.tensors[fresh] = Tensor(
                    fresh, tensor.shape, tensor.dtype, "activation", None, grad, owner
                )
                outputs.append(fresh)
            self.values[other] = fresh
        return replace(op, outputs=tuple(outputs))

    def _arguments(
        self, node: torch.fx.Node, target: torch._ops.OpOverload
    ) -> tuple[dict[str, Argument], int]:
        """The call's arguments by schema name, defaults filled in, sizes as expressions."""
        found: dict[str, Argument] = {}
        schema = target._schema.arguments
        for index, argument in enumerate(schema):
            if index < len(node.args):
                given = node.args[index]
            elif argument.name in node.kwargs:
                given = node.kwargs[argument.name]
            else:
                given = argument.default_value if argument.has_default_value() else None
            found[argument.name] = self._argument(given)
        return found, sum(not argument.kwarg_only for argument in schema)

    def _argument(self, given: Any) -> Argument:
        if isinstance(given, torch.fx.Node):
            value = self.values[given]
            return Ref(value) if isinstance(value, str) and value in self.tensors else value
        if isinstance(given, (tuple, list)):
            return tuple(self._argument(part) for part in given)
        if isinstance(given, torch.dtype):
            return Constant("dtype", str(given).removeprefix("torch."))
        if isinstance(given, torch.layout):
            return Constant("layout", str(given).removeprefix("torch."))
        if isinstance(given, torch.memory_format):
            return Constant("memory_format", str(given).removeprefix("torch."))
        if isinstance(given, torch.device):
            return None  # where a graph runs is decided later
        if given is None or isinstance(given, (bool, int, float, str, complex)):
            return given
        return self.symbols(given)


def own_names(module: torch.nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Every parameter's and buffer's FQN -> its first FQN, and the tied ones alone."""
    first: dict[int, str] = {}
    own: dict[str, str] = {}
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in named:
        own[name] = first.setdefault(id(tensor), name)
    return own, {name: target for name, target in own.items() if name != target}


def _varies(value: Argument) -> bool:
    return isinstance(value, Size) or (isinstance(value, tuple) and any(map(_varies, value)))


def _unknown(node: torch.fx.Node) -> ToolkitError:
    path, kind = nodes.module(node)
    return formulas.unknown_op(str(node.target), f"{path} ({kind})", nodes.source(node))
