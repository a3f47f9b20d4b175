"""Where activations can be split by tokens over the tensor axis, found in the graph.

Megatron's sequence parallelism (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2): between
the split regions of a block every rank holds 1/n of the tokens. A region's input is gathered and
its output reduce-scattered, where tensor parallelism alone all-reduces; norms and residuals, which
it repeats on every rank, are divided. What mixes tokens and is no region (an attention with a
learned bias) is computed whole: gathered before, cut after. Parameters that see a part of the
tokens have gradients that are partial sums over the tensor axis.

A run is a stretch of blocks that hand one tensor on; it is cut by tokens before the first and
gathered after the last. For each microbatch, of bytes S of a whole activation:

    run       backward: all-gather S of its input's gradient, if it needs one; forward: all-gather
              S of its output
    region    forward: all-gather S of the input, reduce-scatter S of the output; backward:
              all-gather S of the output's gradient, reduce-scatter S of the input's, if needed
    whole     forward: all-gather S of the input; backward: all-gather S of the output's gradient

Recomputing a block gathers the inputs of both again, and repeats a region's reduce-scatter where it
repeats its all-reduce (`Region.repeated`). At the end of a step the partial gradients are
all-reduced over the tensor axis in one call a dtype (FSDP2's padded shards, where they are).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from toolkit.errors import InfeasibleError
from toolkit.ir.graph import Op, OpGraph, Tensor
from toolkit.plan import chain, transform
from toolkit.plan.chain import Segment
from toolkit.plan.transform import Region

# Tokens lie along this dim of an activation: [batch, tokens, features].
TOKENS = 1
# Work on each token by itself; their first input is the activation.
_BY_TOKEN = {"aten.layer_norm", "aten.rms_norm", "aten.linear", "aten.dropout"}


@dataclass(frozen=True)
class Gathered:
    """A module inside a block that reads all tokens: of a region, or computed whole (None)."""

    module: str
    input: str
    output: str
    region: Region | None = None


@dataclass(frozen=True)
class Run:
    """Blocks that hand on one tensor split by tokens. `split` are all tensors that are; `partial`
    the parameters whose gradients are partial sums.
    """

    blocks: tuple[str, ...]
    input: str
    output: str
    inside: tuple[Gathered, ...]
    split: frozenset[str]
    partial: tuple[Tensor, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """What a plan places as `sequence`: the blocks, and in them what is computed whole."""
        return (*self.blocks, *(found.module for found in self.inside if found.region is None))


def runs(graph: OpGraph, regions: Sequence[Region], degree: int) -> tuple[Run, ...]:
    """Return the runs of all blocks. Raises InfeasibleError, with the operator, where a block
    cannot be split by tokens, or when `degree` does not divide them.
    """
    found: list[Run] = []
    for segment in chain.segments(graph):
        if segment.path is None:
            continue
        block = _Walk(graph, segment, regions, degree).run()
        last = found[-1] if found else None
        if last and last.output == block.input and _follows(last.blocks[-1], segment.path):
            found[-1] = Run(
                (*last.blocks, *block.blocks), last.input, block.output,
                (*last.inside, *block.inside), last.split | block.split,
                (*last.partial, *block.partial),
            )  # fmt: skip
        else:
            found.append(block)
    return tuple(found)


def local(graph: OpGraph, found: Sequence[Run], degree: int) -> OpGraph:
    """Return the graph with the tensors of the runs at one rank's share of the tokens."""
    tensors = dict(graph.tensors)
    for name in {name for run in found for name in run.split}:
        shape = list(tensors[name].shape)
        shape[TOKENS] //= degree
        tensors[name] = replace(tensors[name], shape=tuple(shape))
    return replace(graph, tensors=tensors, scaling=None)


def around(region_modules: Sequence[str]) -> str:
    """Return the path of the smallest module that holds all of these.

    >>> around(["blocks.0.ffn.up", "blocks.0.ffn.down"])
    'blocks.0.ffn'
    """
    split = [path.split(".")[:-1] for path in region_modules]
    together = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        together.append(names[0])
    return ".".join(together)


def _follows(before: str, after: str) -> bool:
    """Whether two paths are neighbours in one list of blocks."""
    (one, _, first), (two, _, second) = before.rpartition("."), after.rpartition(".")
    return one == two and int(second) == int(first) + 1


@dataclass
class _Walk:
    """Follows the split by tokens through one block."""

    graph: OpGraph
    segment: Segment
    regions: Sequence[Region]
    degree: int
    whole: set[str] = field(default_factory=set)

    def run(self) -> Run:
        while True:
            mixing = self._walk()
            if mixing is None:
                break
            self.whole.add(mixing)
        split = frozenset(self.split)
        return Run(
            (self.path,), self.stream.name, self.result, tuple(self.inside), split,
            tuple(self._partial()),
        )  # fmt: skip

    @property
    def path(self) -> str:
        assert self.segment.path is not None
        return self.segment.path

    def _walk(self) -> str | None:
        """Walk once; return a module that turned out to mix tokens, to be computed whole."""
        self.result = self._result()
        self.stream = self._stream()
        self.split: dict[str, int] = {self.stream.name: TOKENS}
        self.inside: list[Gathered] = []
        held = self._modules()
        done: set[str] = set()
        for op in self.segment.ops:
            module = next((path for path in held if _within(op.module_path, path)), None)
            if module is not None:
                if module not in done:
                    done.add(module)
                    self._enter(module, held[module])
                continue
            read = {name: self.split[name] for name in op.inputs if name in self.split}
            if read and not self._by_token(op, read):
                if op.module_path == self.path or op.module_path in self.whole:
                    raise self._infeasible(f"{op.kind} mixes tokens outside any module of its own")
                return op.module_path
        if self.split.get(self.result) != TOKENS:
            raise self._infeasible("what it returns is not split by tokens")
        return None

    def _result(self) -> str:
        inside = {op.name for op in self.segment.ops}
        made = [name for op in self.segment.ops for name in op.outputs]
        used = [
            name
            for name in made
            if name in self.graph.outputs
            or any(user.name not in inside for user in self.graph.consumers[name])
        ]
        if len(used) != 1:
            raise self._infeasible(f"it hands on {len(used)} tensors, and one can be followed")
        return used[0]

    def _stream(self) -> Tensor:
        """The activation the block adds to: the first it reads that is shaped as its result."""
        shape = self.graph.tensors[self.result].shape
        given = {tensor.name for tensor in self.graph.tensors.values() if tensor.role == "input"}
        followed = given | self.graph.learned
        made = {name for op in self.segment.ops for name in op.outputs}
        for op in self.segment.ops:
            for name in op.inputs:
                tensor = self.graph.tensors[name]
                if name in followed - made and tensor.shape == shape:
                    return self._checked(tensor)
        raise self._infeasible(f"it reads no activation of its result's shape {list(shape)}")

    def _checked(self, tensor: Tensor) -> Tensor:
        if len(tensor.shape) != 3:
            raise self._infeasible(
                f"its activations are {list(tensor.shape)}, not [batch, tokens, features]"
            )
        if tensor.shape[TOKENS] % self.degree:
            raise InfeasibleError(
                f"{tensor.shape[TOKENS]} tokens do not divide over {self.degree} ranks",
                remedy=f"use a number of tokens that is a multiple of {self.degree}",
            )
        return tensor

    def _modules(self) -> dict[str, Region | None]:
        """The modules of this block that read all tokens."""
        found: dict[str, Region | None] = dict.fromkeys(self.whole)
        for region in self.regions:
            if not _within(region.row, self.path):
                continue
            module = around((*region.columns, region.row))
            if not _within(module, self.path) or module == self.path:
                raise self._infeasible(
                    f"{region.row} and what it follows share no module below the block"
                )
            found[module] = region
        return found

    def _enter(self, module: str, region: Region | None) -> None:
        """Gather what a module reads, and take up the split where it ends."""
        ops = [op for op in self.segment.ops if _within(op.module_path, module)]
        names = {name for op in ops for name in op.inputs if name in self.split}
        made = [name for op in ops for name in op.outputs]
        inside = {op.name for op in ops}
        out = [
            name
            for name in made
            if any(user.name not in inside for user in self.graph.consumers[name])
        ]
        shape = self.graph.tensors[self.result].shape
        alone = len(names) == len(out) == 1
        if not alone or (region and (names, out) != ({region.input}, [region.output])):
            raise self._infeasible(
                f"{module} reads {len(names)} split tensors and gives {len(out)}; one of each, and "
                "a region's own, can be gathered"
            )
        if region and {user.module_path for user in self.graph.consumers[region.input]} - set(
            region.columns
        ):
            raise self._infeasible(f"the input of {region.columns[0]} is read by others too")
        if self.graph.tensors[out[0]].shape[: TOKENS + 1] != shape[: TOKENS + 1]:
            raise self._infeasible(f"{module} does not keep tokens where they are")
        self.split[out[0]] = TOKENS
        self.inside.append(Gathered(module, names.pop(), out[0], region))

    def _by_token(self, op: Op, read: Mapping[str, int]) -> bool:
        """Note the outputs of an operator as split; False when it mixes tokens."""
        if op.kind in _BY_TOKEN:
            if set(read) != {op.inputs[0]} or len(self.graph.tensors[op.inputs[0]].shape) != 3:
                return False
            self.split.update(dict.fromkeys(op.outputs, TOKENS))
            return True
        found = transform.through(op, self.graph, read)
        if found is None or set(found.values()) != {TOKENS}:
            return False
        self.split.update(found)
        return True

    def _partial(self) -> Iterator[Tensor]:
        divided = {name for region in self.regions for name in region.dims}
        complete = {f"{region.row}.bias" for region in self.regions}
        read = {name for op in self.segment.ops for name in op.inputs}
        for tensor in self.graph.parameters():
            name = tensor.fqn or tensor.name
            if (
                tensor.name in read
                and tensor.requires_grad
                and tensor.name not in divided
                and name not in complete
                and not any(_within(name, module) for module in self.whole)
            ):
                if not _within(name, self.path):
                    raise self._infeasible(f"it reads {name}, which lies outside it")
                yield tensor

    def _infeasible(self, why: str) -> InfeasibleError:
        return InfeasibleError(
            f"{self.path} of {self.graph.name} cannot be split by tokens: {why}",
            remedy="use tp or fsdp-tp",
        )


def _within(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")
