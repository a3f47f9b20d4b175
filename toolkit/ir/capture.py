"""torch.export with dynamic shapes: which input dims are sizes, and what if export balks."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io as streams
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from toolkit import log
from toolkit.errors import ToolkitError, UsageError, unknown_name
from toolkit.ir import repeat

_log = log.get_logger(__name__)

# size -> input (dotted path for a nested one) -> the dim, or dims, of it that have this size
Axes = Mapping[str, Mapping[str, int | tuple[int, ...]]]
Example = Callable[..., tuple[Sequence[Any], Mapping[str, Any]]]


@dataclass(frozen=True)
class Captured:
    """What torch.export made of a module, and which of its inputs' dims are named sizes."""

    program: torch.export.ExportedProgram
    inputs: tuple[str, ...]  # the name of every leaf of the call, in order
    sizes: Mapping[str, int]  # as traced
    axes: Axes
    fixed: Mapping[str, str]  # size -> why it does not vary
    calls: Mapping[int, str]  # number of a block's call, in repeat.py's operators -> its path


def capture(
    module: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    axes: Axes | None,
    *,
    own: Mapping[str, str] | None = None,
) -> Captured:
    """Export `module` with every dim named in `axes` (None: guessed) left free to vary.

    With `own` (see repeat.py) equal calls of repeated blocks are traced once.
    """
    leaves = _leaves(module, args, kwargs)
    axes = guess_axes(leaves) if axes is None else axes
    sizes = _sizes(leaves, axes)
    fixed = {
        name: "it was 1 in the traced example, and torch.export fixes a size of 1"
        for name, value in sizes.items()
        if value == 1
    }
    varying = {name: dims for name, dims in axes.items() if name not in fixed}
    try:
        program, calls = _export(module, args, kwargs, varying, own)
    except Exception as error:
        # Some models only trace at fixed sizes; a graph that cannot vary is still a graph.
        fixed |= dict.fromkeys(varying, f"torch.export: {_first_line(error)}")
        program, calls = _export_fixed(module, args, kwargs, own)
    names = tuple(name for name, _ in leaf_names(module, args, kwargs))
    return Captured(program, names, sizes, axes, fixed, calls)


def guess_axes(leaves: Mapping[str, torch.Tensor]) -> Axes:
    """Guess which dims are sizes: dim 0 of every input is `batch`; dim 1 of ids is `tokens`.

    A guess is only made where it is unanimous. Ids are integer tensors of two or more dims.

    >>> guess_axes({"input_ids": torch.zeros(2, 8, dtype=torch.long)})
    {'batch': {'input_ids': 0}, 'tokens': {'input_ids': 1}}
    """
    found: dict[str, dict[str, int | tuple[int, ...]]] = {}
    tensors = {name: leaf for name, leaf in leaves.items() if leaf.dim() > 0}
    if tensors and len({leaf.shape[0] for leaf in tensors.values()}) == 1:
        found["batch"] = dict.fromkeys(tensors, 0)
    ids = {n: t for n, t in tensors.items() if t.dim() >= 2 and not t.is_floating_point()}
    if ids and len({leaf.shape[1] for leaf in ids.values()}) == 1:
        found["tokens"] = dict.fromkeys(ids, 1)
    return found


def example_axes(module: torch.nn.Module, example: Example, sizes: Mapping[str, int]) -> Axes:
    """Find which input dims are sizes by asking `example` for inputs of another size.

    A dim belongs to the one size that changes it, and must change to exactly that size.
    """
    base = _leaves(module, *example(**sizes))
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for size, value in sizes.items():
        # Some sizes go in steps (an image of whole patches) or are at their largest already.
        for other in (value + 1, value - 1, 2 * value, value // 2):
            if other < 1:
                continue
            try:
                changed = _leaves(module, *example(**{**sizes, size: other}))
            except ToolkitError as error:
                _log.info("%s does not become %d: %s", size, other, error)
                continue
            dims = _changed(base, changed, value, other)
            if dims:
                found[size] = dims
            break
    return found


def _changed(
    base: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], was: int, now: int
) -> dict[str, tuple[int, ...]]:
    """The dims that became `now` from `was`; none at all when any changed in another way."""
    found: dict[str, tuple[int, ...]] = {}
    for name, leaf in base.items():
        if name not in other or other[name].dim() != leaf.dim():
            return {}
        pairs = list(zip(leaf.shape, other[name].shape, strict=True))
        dims = tuple(dim for dim, (a, b) in enumerate(pairs) if a != b)
        if any(pairs[dim] != (was, now) for dim in dims):
            _log.info("%s does not follow one size: %s becomes %s", name, leaf.shape, pairs)
            return {}
        if dims:
            found[name] = dims
    return found


def leaf_names(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    """Every leaf of a call's arguments with its name: the parameter's, dotted when nested."""
    signature = inspect.signature(module.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(
            f"{type(module).__name__}.forward cannot be called with these inputs: {error}"
        ) from error
    positional = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    flat, _ = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
    named = []
    for path, leaf in flat:
        keys = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path[1:]]
        if str(path[0]) == "[0]":
            index = int(keys[0])
            keys[0] = positional[index] if index < len(positional) else f"args.{index}"
        named.append((".".join(keys), leaf))
    return named


def _leaves(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    named = leaf_names(module, args, kwargs)
    return {name: leaf for name, leaf in named if isinstance(leaf, torch.Tensor)}


def places(dims: Mapping[str, int | tuple[int, ...]]) -> Iterator[tuple[str, int]]:
    """Yield every (input, dim) of one size of `Axes`."""
    for name, given in dims.items():
        for dim in (given,) if isinstance(given, int) else given:
            yield name, dim


def _sizes(leaves: Mapping[str, torch.Tensor], axes: Axes) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for size, dims in axes.items():
        if not size.isidentifier():
            raise UsageError(f"{size!r} is not a name a size can have")
        seen = set()
        for name, dim in places(dims):
            if name not in leaves:
                raise unknown_name("model input", name, leaves)
            if dim >= leaves[name].dim():
                raise UsageError(f"input {name!r} has {leaves[name].dim()} dims, no dim {dim}")
            seen.add(leaves[name].shape[dim])
        if len(seen) > 1:
            raise UsageError(f"the inputs disagree about {size}: {sorted(seen)}")
        sizes[size] = seen.pop()
    return sizes


_Exported = tuple[torch.export.ExportedProgram, Mapping[int, str]]


def _export(
    module: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    axes: Axes,
    own: Mapping[str, str] | None,
) -> _Exported:
    """Export with the dims in `axes` free. Raises whatever torch.export raises, which is much."""
    dynamic = _dynamic_shapes(module, args, kwargs, axes) if axes else None
    call = (tuple(args), dict(kwargs))
    if _on_meta(module):
        try:
            return _run_export(*_on_fake_cpu(module, *call), dynamic, own)
        except Exception as error:
            _log.info("export on a fake CPU failed (%s); trying on meta", _first_line(error))
    return _run_export(module, *call, dynamic, own)


def _export_fixed(
    module: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    own: Mapping[str, str] | None,
) -> _Exported:
    try:
        return _export(module, args, kwargs, {}, own)
    except Exception as error:
        raise ToolkitError(
            f"torch.export cannot trace {type(module).__name__}: {_first_line(error)}",
            remedy="the model must be one torch.export(strict=False) takes; "
            "docs/concepts/graph.md says what that excludes",
        ) from error


def _run_export(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic: Any,
    own: Mapping[str, str] | None,
) -> _Exported:
    with contextlib.ExitStack() as around:
        around.enter_context(_quiet())
        around.enter_context(_tensors_out(module))
        calls: Mapping[int, str] = {}
        if own is not None:
            calls = around.enter_context(repeat.tracing_once(module, own))
        program = torch.export.export(module, args, kwargs, strict=False, dynamic_shapes=dynamic)
    return program, calls


def _on_fake_cpu(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Move a meta module and its inputs to a CPU that has shapes and no memory.

    Better than meta itself: fused attention lays its output out as real kernels do (so what is a
    view and what a copy comes out right), and models that ask for a device's abilities (autocast)
    get an answer.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Weights on meta weigh nothing, so this copies structure only.
    moved = copy.deepcopy(module)
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        moved = moved.to_empty(device="cpu")

        def fake(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="cpu")
            return made.requires_grad_(leaf.requires_grad)

        args, kwargs = pytree.tree_map(fake, (args, kwargs))
    return moved, args, kwargs


@contextlib.contextmanager
def _tensors_out(module: torch.nn.Module) -> Iterator[None]:
    """Let `module` return its tensors only: export refuses caches and other objects."""

    def keep(_module: torch.nn.Module, _args: Any, output: Any) -> tuple[torch.Tensor, ...]:
        return tuple(x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor))

    hook = module.register_forward_hook(keep)
    try:
        yield
    finally:
        hook.remove()


def _dynamic_shapes(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], axes: Axes
) -> Any:
    free: dict[str, dict[int, Any]] = {}
    for dims in axes.values():
        for name, dim in places(dims):
            free.setdefault(name, {})[dim] = torch.export.Dim.AUTO

    named = leaf_names(module, args, kwargs)
    shapes = [free.get(name) if isinstance(leaf, torch.Tensor) else None for name, leaf in named]
    _, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    of_args, of_kwargs = pytree.tree_unflatten(shapes, spec)
    # Export wants one mapping by parameter name, in the order of the call.
    bound = inspect.signature(module.forward).bind(*of_args, **of_kwargs)
    return dict(bound.arguments)


def _on_meta(module: torch.nn.Module) -> bool:
    return any(tensor.is_meta for tensor in module.parameters())


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep export's own chatter out of the user's terminal; what matters is raised."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.fx", "torch._export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(streams.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
