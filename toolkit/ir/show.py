"""What a graph costs, by module: FLOPs, bytes, parameters and activations, repeated blocks once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from toolkit import units
from toolkit.cost.work import Work
from toolkit.ir import backward, formulas
from toolkit.ir.graph import Op, OpGraph

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Totals:
    """Sums over a module and everything in it. Predicted by formula; nothing is measured.

    FLOPs count products, attention and convolutions; bytes are compulsory traffic.
    """

    num_ops: int = 0
    num_parameters: int = 0
    forward_flops: float = 0.0
    backward_flops: float = 0.0
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    saved_bytes: int = 0

    def add(self, other: Totals) -> None:
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


@dataclass(frozen=True)
class Row:
    """One module of the tree: `times` instances fold into it, its totals are those of one."""

    path: str
    module: str
    depth: int
    times: int
    totals: Totals


PRODUCTS = frozenset({"matmul", "attention", "conv"})


def flops(works: Iterable[Work]) -> float:
    """Return the FLOPs of products, attention and convolutions, as FlopCounterMode counts them."""
    return sum(work.flops for work in works if work.op_class in PRODUCTS)


def totals(graph: OpGraph, *, kernels: backward.Kernels = "cuda") -> dict[str, Totals]:
    """Return every module's totals by path, nested modules included; "" is the whole model.

    Memory saved by several operators counts at the first that saves it.
    """
    found: dict[str, Totals] = {}

    def count(path: str, amount: Totals) -> None:
        while True:
            found.setdefault(path, Totals()).add(amount)
            if not path:
                return
            path = path.rpartition(".")[0]

    for op in graph.ops:
        count(op.module_path, of_op(op, graph, kernels=kernels))
    for parameter in graph.parameters():
        path = (parameter.fqn or "").rpartition(".")[0]
        count(path, Totals(num_parameters=parameter.numel))
    for kept in backward.saved(graph, kernels=kernels):
        count(graph.op(kept.ops[0]).module_path, Totals(saved_bytes=kept.num_bytes))
    return found


def of_op(op: Op, graph: OpGraph, *, kernels: backward.Kernels = "cuda") -> Totals:
    """Return what one operator adds (saved memory is counted over the whole graph)."""
    forward, back = formulas.work(op, graph), backward.work(op, graph, kernels=kernels)
    return Totals(
        num_ops=1,
        forward_flops=flops((forward,)),
        backward_flops=flops(back),
        forward_bytes=forward.moved_bytes,
        backward_bytes=sum(work.moved_bytes for work in back),
    )


def rows(
    graph: OpGraph, *, depth: int | None = None, kernels: backward.Kernels = "cuda"
) -> tuple[Row, ...]:
    """Return the tree of modules, down to `depth` names (None: all), repeated blocks folded."""
    found = totals(graph, kernels=kernels)
    times: dict[str, int] = {}
    hidden: set[str] = set()
    for block in graph.blocks():
        times[block.name] = block.num_instances
        hidden.update(block.paths[1:])
    children: dict[str, list[str]] = {}
    for path in found:
        if path:
            children.setdefault(path.rpartition(".")[0], []).append(path)

    def walk(path: str, level: int) -> Iterator[Row]:
        if path in hidden:
            return
        yield Row(path, graph.modules.get(path, ""), level, times.get(path, 1), found[path])
        if depth is None or level < depth:
            for child in sorted(children.get(path, []), key=order.__getitem__):
                yield from walk(child, level + 1)

    order = _first_use(graph, found)
    return tuple(walk("", 0))


def _first_use(graph: OpGraph, paths: dict[str, Totals]) -> dict[str, int]:
    """Module path -> when it first runs; one that never runs comes last."""
    order: dict[str, int] = {}
    for index, op in enumerate(graph.ops):
        path = op.module_path
        while path not in order:
            order[path] = index
            path = path.rpartition(".")[0]
    return {path: order.get(path, len(graph.ops)) for path in paths}


def render(graph: OpGraph, found: tuple[Row, ...]) -> Table:
    """Return the tree of `rows` as a table for the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    sizes = ", ".join(f"{name} {value}" for name, value in graph.sizes.items()) or "fixed sizes"
    mode = "training" if graph.training else "inference"
    table = Table(
        title=f"{graph.name} at {sizes} ({mode}), predicted; a row with times is one of them",
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    # A narrow terminal cuts names short, never figures: the column may shrink, its cells not wrap.
    table.add_column("module", min_width=8)
    columns = ["times", "ops", "parameters", "forward", "moved"]
    if graph.training:
        columns += ["backward", "saved"]
    lines: list[tuple[Text, list[str]]] = []
    for row in found:
        name = row.path.rpartition(".")[2] or graph.name
        label = Text("  " * row.depth + name, no_wrap=True, overflow="ellipsis")
        if row.module:
            label.append(f" {row.module}", style="dim")
        values = row.totals
        cells = [
            f"x {row.times}" if row.times > 1 else "",
            str(values.num_ops),
            _cell(values.num_parameters, units.format_count),
            _cell(values.forward_flops, units.format_flops),
            _cell(values.forward_bytes, units.format_bytes),
        ]
        if graph.training:
            cells.append(_cell(values.backward_flops, units.format_flops))
            cells.append(_cell(values.saved_bytes, units.format_bytes))
        lines.append((label, cells))
    for index, column in enumerate(columns):
        width = max(len(cells[index]) for _, cells in lines)
        table.add_column(column, justify="right", no_wrap=True, min_width=max(width, len(column)))
    for label, cells in lines:
        table.add_row(label, *cells)
    return table


def _cell(value: float, write: Callable[[float], str]) -> str:
    return write(value) if value else ""
