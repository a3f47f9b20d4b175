"""Graph files: an OpGraph as a JSON record of kind "graph", read back exactly equal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit import record
from toolkit.errors import FormatError, ToolkitError
from toolkit.ir.graph import Argument, Constant, Op, OpGraph, Ref, Tensor
from toolkit.ir.scale import Scaling, Size

KIND = "graph"
VERSION = 1


def save(graph: OpGraph, path: Path) -> str:
    """Write `graph` to `path`; return its digest."""
    return record.write(path, kind=KIND, version=VERSION, body=to_body(graph))


def load(path: Path) -> OpGraph:
    """Read a graph. Raises UsageError when missing, FormatError when torn, foreign or not sound."""
    body = record.read(path, kind=KIND, version=VERSION)["body"]
    try:
        return from_body(body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            f"{path} has a sound digest and is not a graph: {type(error).__name__} {error}",
            remedy="trace the model again",
        ) from error
    except ToolkitError as error:
        raise FormatError(f"{path}: {error.message}", remedy="trace the model again") from error


def to_body(graph: OpGraph) -> dict[str, Any]:
    """Return the graph as a JSON value."""
    scaling = graph.scaling
    return {
        "name": graph.name,
        "training": graph.training,
        "sizes": dict(graph.sizes),
        "fixed": dict(graph.fixed),
        "inputs": list(graph.inputs),
        "outputs": list(graph.outputs),
        "modules": dict(graph.modules),
        "tied": dict(graph.tied),
        "tensors": [_tensor(tensor) for tensor in graph.tensors.values()],
        "ops": [_op(op) for op in graph.ops],
        "scaling": None if scaling is None else {
            "bounds": {name: list(bounds) for name, bounds in scaling.bounds.items()},
            "shapes": {name: _encode(shape) for name, shape in scaling.shapes.items()},
            "arguments": {
                op: {key: _encode(value) for key, value in arguments.items()}
                for op, arguments in scaling.arguments.items()
            },
        },
    }  # fmt: skip


def from_body(body: Mapping[str, Any]) -> OpGraph:
    """Return the graph that `to_body` gave; raises KeyError and the like when it is none."""
    tensors = [_read_tensor(item) for item in body["tensors"]]
    scaling = body["scaling"]
    return OpGraph(
        name=body["name"],
        ops=tuple(_read_op(item) for item in body["ops"]),
        tensors={tensor.name: tensor for tensor in tensors},
        inputs=tuple(body["inputs"]),
        outputs=tuple(body["outputs"]),
        modules=body["modules"],
        training=body["training"],
        sizes=body["sizes"],
        tied=body["tied"],
        fixed=body["fixed"],
        scaling=None if scaling is None else Scaling(
            bounds={name: (low, high) for name, (low, high) in scaling["bounds"].items()},
            shapes={name: _decode(shape) for name, shape in scaling["shapes"].items()},
            arguments={
                op: {key: _decode(value) for key, value in arguments.items()}
                for op, arguments in scaling["arguments"].items()
            },
        ),
    )  # fmt: skip


def _tensor(tensor: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "role": tensor.role,
    }
    if tensor.fqn is not None:
        found["fqn"] = tensor.fqn
    if tensor.requires_grad:
        found["requires_grad"] = True
    if tensor.is_view:
        found["storage"] = tensor.storage
    return found


def _read_tensor(item: Mapping[str, Any]) -> Tensor:
    return Tensor(
        name=item["name"],
        shape=tuple(item["shape"]),
        dtype=item["dtype"],
        role=item["role"],
        fqn=item.get("fqn"),
        requires_grad=item.get("requires_grad", False),
        storage=item.get("storage", item["name"]),
    )


def _op(op: Op) -> dict[str, Any]:
    return {
        "name": op.name,
        "target": op.target,
        "arguments": {key: _encode(value) for key, value in op.arguments.items()},
        "num_positional": op.num_positional,
        "outputs": list(op.outputs),
        "module_path": op.module_path,
        "source": op.source,
        "grad_enabled": op.grad_enabled,
        "autocast": op.autocast,
    }


def _read_op(item: Mapping[str, Any]) -> Op:
    arguments = {key: _decode(value) for key, value in item["arguments"].items()}
    outputs = tuple(item["outputs"])
    return Op(**{**item, "arguments": arguments, "outputs": outputs})


def _encode(value: Argument) -> Any:
    if isinstance(value, Ref):
        return {"tensor": value.name}
    if isinstance(value, Size):
        return {"size": value.expression}
    if isinstance(value, Constant):
        return {value.kind: value.value}
    if isinstance(value, tuple):
        return [_encode(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": str(value)}
    return value


def _decode(value: Any) -> Argument:
    if isinstance(value, list):
        return tuple(_decode(part) for part in value)
    if not isinstance(value, dict):
        return value
    ((kind, given),) = value.items()
    if kind == "tensor":
        return Ref(given)
    if kind == "size":
        return Size(given)
    if kind in ("float", "complex"):
        return {"float": float, "complex": complex}[kind](given)
    return Constant(kind, given)
