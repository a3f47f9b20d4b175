"""What a node of an exported fx graph says of itself: module, source line, what it writes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from toolkit.ir.graph import Argument


def written(target: torch._ops.OpOverload, arguments: Mapping[str, Argument]) -> str | None:
    """The tensor an in-place operator writes, if it is one."""
    for argument in target._schema.arguments:
        given = arguments.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and given is not None:
            return str(given.name)
    return None


def is_submodule(argument: Any) -> bool:
    return isinstance(argument, torch.fx.Node) and argument.op == "get_attr"


def plain_path(path: str) -> str:
    return re.sub(r"@\d+", "", path)


def class_name(kind: Any) -> str:
    return (kind if isinstance(kind, str) else kind.__qualname__).rpartition(".")[2]


def module(node: torch.fx.Node) -> tuple[str, str]:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return (plain_path(stack[-1][0]), class_name(stack[-1][1])) if stack else ("", "")


def source(node: torch.fx.Node) -> str:
    """`package/file.py:line` of the innermost frame that is not torch's own."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    outside = [f for f in frames if "/torch/" not in f[0]] or frames
    file, line = outside[-1]
    return f"{'/'.join(file.split('/')[-2:])}:{line}"
