"""What one microbatch keeps alive on a rank, operator by operator: forward, then backward.

Forward holds what autograd saves (ir/saved.py) and, besides, results until their last reader has
run. Backward frees what was saved as it goes; gradients of activations live from the first
operator whose backward makes them to the one whose forward made the activation. An addition, or a
view, hands its gradient on as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from toolkit.ir import formulas
from toolkit.ir.backward import Kernels, gradients
from toolkit.ir.graph import Op, OpGraph, Tensor
from toolkit.ir.saved import saved
from toolkit.plan.chain import Segment

# The gradient of the first operand, or of both, is the one that arrives.
_HANDS_ON = {"aten.add", "aten.sub", "aten.clone", "aten.contiguous", "aten.detach"}
_PARTS = {"aten.slice", "aten.select", "aten.narrow", "aten.split", "aten.chunk", "aten.unbind",
          "aten.split_with_sizes", "aten.expand", "aten.expand_as"}  # fmt: skip


@dataclass(frozen=True)
class Moment:
    """Bytes at the fullest operator of a piece: saved by then, passing, and whole gradients of
    parameters that are there by then.
    """

    saved: int
    passing: int
    gradients: int = 0

    @property
    def total(self) -> int:
        return self.saved + self.passing + self.gradients


@dataclass(frozen=True)
class Life:
    """A stage's microbatch: the fullest moment of each piece, in the order forward and backward
    run them, and what is `kept` in between.

    Where backward is in halves, `inputs` are the moments of the first, `owed` what it leaves to
    the second, and `put_off` the bytes of the weights whose gradients that one makes.
    """

    forward: tuple[Moment, ...]
    backward: tuple[Moment, ...]
    kept: int
    inputs: tuple[Moment, ...] = ()
    owed: int = 0
    put_off: int = 0
    largest_put_off: int = 0


class Alive:
    """Follows the memory of one rank's graph."""

    def __init__(self, graph: OpGraph, kernels: Kernels) -> None:
        self.graph = graph
        self.kernels = kernels
        self.size: dict[str, int] = {}
        self.keepers: dict[str, set[str]] = {}
        for piece in saved(graph, kernels=kernels):
            self.size[piece.name] = piece.num_bytes
            self.keepers[piece.name] = set(piece.ops)
        self.kept_by: dict[str, list[str]] = {}
        for name, ops in self.keepers.items():
            for op in ops:
                self.kept_by.setdefault(op, []).append(name)

    @cached_property
    def last_reader(self) -> dict[str, str]:
        """Storage -> the last operator that reads it, or any view of it."""
        found: dict[str, str] = {}
        for op in self.graph.ops:
            for name in (*op.outputs, *op.inputs):
                found[self.graph.tensors[name].storage] = op.name
        return found

    def life(
        self,
        segments: Sequence[Segment],
        recompute: Iterable[str],
        outputs: Iterable[str],
        *,
        halves: bool = False,
    ) -> Life:
        """Follow a stage of these segments, of which `recompute` are run again in backward;
        `outputs` are kept for as long as the microbatch is.
        """
        again = frozenset(recompute)
        ops = [op for segment in segments for op in segment.ops]
        made = {name for op in ops for name in op.outputs}
        made |= {name for op in ops for name in self.kept_by.get(op.name, ()) if "!" in name}
        held: dict[str, int] = {}
        forward = []
        for segment in segments:
            recomputed = segment.path in again
            kept = dict(held)
            forward.append(self._forward(segment.ops, kept, made, keep=not recomputed))
            held = held | self._entering(segment, made) if recomputed else kept
        for storage in {self.graph.tensors[name].storage for name in outputs} & made:
            held[storage] = self.graph.tensors[storage].num_bytes
        life = Life(
            tuple(forward),
            self._backward(segments, again, held, made).moments,
            sum(held.values()),
        )
        if not halves:
            return life
        off = {op.name for op in ops if is_put_off(op, self.graph)}
        weights = {op.arguments["weight"].name for op in ops if op.name in off}
        sizes = [self.graph.tensors[name].num_bytes for name in weights]
        first = self._backward(segments, again, held, made, frozenset(off))
        return replace(
            life,
            inputs=first.moments,
            owed=first.owed,
            put_off=sum(sizes),
            largest_put_off=max(sizes, default=0),
        )

    def _entering(self, segment: Segment, made: set[str]) -> dict[str, int]:
        """The activations a segment reads from outside, which recomputation keeps."""
        own = {name for op in segment.ops for name in op.outputs}
        tensors = (self.graph.tensors[name] for op in segment.ops for name in op.inputs)
        return {
            tensor.storage: self.graph.tensors[tensor.storage].num_bytes
            for tensor in tensors
            if tensor.role == "activation" and tensor.storage not in own and tensor.storage in made
        }

    def _forward(
        self, ops: Sequence[Op], held: dict[str, int], made: set[str], *, keep: bool
    ) -> Moment:
        """Run `ops`: adds to `held` what is saved; returns the fullest moment."""
        passing: dict[str, int] = {}
        best = Moment(sum(held.values()), 0)
        total = best.saved
        for op in ops:
            extra = 0
            for name in op.outputs:
                tensor = self.graph.tensors[name]
                if not tensor.is_view and name not in held:
                    passing[name] = tensor.num_bytes
            for name in self.kept_by.get(op.name, ()):
                if not keep:
                    extra += self.size[name] if "!" in name else 0
                elif name not in held and name in made:
                    passing.pop(name, None)
                    held[name] = self.size[name]
                    total += self.size[name]
            extra += _workspace(op, self.graph, self.kernels)
            moment = Moment(total, sum(passing.values()) + extra)
            best = max(best, moment, key=lambda one: one.total)
            for name in {self.graph.tensors[n].storage for n in (*op.inputs, *op.outputs)}:
                if self.last_reader.get(name) == op.name:
                    passing.pop(name, None)
        return best

    def _backward(
        self,
        segments: Sequence[Segment],
        again: frozenset[str],
        held: dict[str, int],
        made: set[str],
        put_off: frozenset[str] = frozenset(),
    ) -> _Backward:
        """Run backward through all segments. Operators in `put_off` leave their weight's gradient,
        and keep what it is made from.
        """
        held = dict(held)
        grads = _Gradients(self.graph, {op.name for s in segments for op in s.ops}, put_off)
        factors: dict[str, int] = {}  # storages that are kept for what was put off
        owed = 0
        moments = []
        for segment in reversed(segments):
            best = Moment(0, 0)
            if segment.path in again:
                once = self._forward(segment.ops, held, made, keep=True)
                best = Moment(once.saved + owed, once.passing + grads.passing, grads.arrived)
            total = sum(held.values())
            for op in reversed(segment.ops):
                if op.name in self.graph.differentiated:
                    grads.through(op)
                    extra = _backward_workspace(op, self.graph, self.kernels)
                    moment = Moment(total + owed, grads.passing + extra, grads.arrived)
                    best = max(best, moment, key=lambda one: one.total)
                    grads.done(op)
                    if op.name in put_off:
                        owed += self.graph.tensors[op.outputs[0]].num_bytes
                        entered = self.graph.tensors[op.inputs[0]].storage
                        if entered in made and entered not in factors:
                            factors[entered] = self.graph.tensors[entered].num_bytes
                            owed += factors[entered]
                            total -= held.pop(entered, 0)
                for name in self.kept_by.get(op.name, ()):
                    if name in held and grads.first_keeper(self.keepers[name]) == op.name:
                        total -= held.pop(name)
            moments.append(best)
        return _Backward(tuple(moments), owed)


@dataclass(frozen=True)
class _Backward:
    moments: tuple[Moment, ...]
    owed: int


class _Gradients:
    """Gradients in backward: which buffers are alive, several names sharing one."""

    def __init__(self, graph: OpGraph, inside: set[str], put_off: frozenset[str]) -> None:
        self.graph = graph
        self.put_off = put_off
        self.place = {op.name: i for i, op in enumerate(graph.ops) if op.name in inside}
        self.buffers: dict[int, list[int]] = {}  # id -> [bytes, names that share it]
        self.of: dict[str, int] = {}
        self.passing = 0
        self.arrived = 0
        self._next = 0
        self._temporary = 0

    def first_keeper(self, ops: set[str]) -> str:
        return min((op for op in ops if op in self.place), key=self.place.__getitem__)

    def through(self, op: Op) -> None:
        """The gradients of the op's inputs come to be."""
        first_out = self.of.get(op.outputs[0])
        given = [name for name in op.outputs if name in self.of]
        if not given:  # the loss, or what another stage sends back
            for name in op.outputs:
                if self.graph.tensors[name].requires_grad:
                    self._new(name)
            first_out = self.of.get(op.outputs[0])
        for tensor in self._gradients(op):
            same = tensor.numel == self.graph.tensors[op.outputs[0]].numel
            handed = same and first_out is not None and _hands_on(op, self.graph)
            if tensor.name in self.of:
                # Added to what another reader left: for a moment both and their sum are there.
                self._temporary += tensor.num_bytes * (1 if handed else 2)
            elif handed:
                assert first_out is not None
                self.buffers[first_out][1] += 1
                self.of[tensor.name] = first_out
            else:
                self._new(tensor.name)
        self.passing += self._temporary

    def done(self, op: Op) -> None:
        """The op's backward is over: its outputs' gradients go, parameters' are complete."""
        self.passing -= self._temporary
        self._temporary = 0
        for name in op.outputs:
            self._drop(name)
        for tensor in self._gradients(op):
            if tensor.role == "parameter" and self._is_first_reader(op, tensor.name):
                self._drop(tensor.name)
                self.arrived += tensor.num_bytes
            elif tensor.role == "input":
                self._drop(tensor.name)

    def _gradients(self, op: Op) -> Iterator[Tensor]:
        """The inputs whose gradients are made now."""
        for tensor in gradients(op, self.graph):
            if op.name not in self.put_off or tensor.name != op.arguments["weight"].name:
                yield tensor

    def _is_first_reader(self, op: Op, name: str) -> bool:
        readers = (
            reader.name
            for reader in self.graph.consumers[name]
            if reader.name in self.place and reader.name in self.graph.differentiated
        )
        return next(readers, None) == op.name

    def _new(self, name: str) -> None:
        size = self.graph.tensors[name].num_bytes
        self._next += 1
        self.buffers[self._next] = [size, 1]
        self.of[name] = self._next
        self.passing += size

    def _drop(self, name: str) -> None:
        buffer = self.of.pop(name, None)
        if buffer is not None:
            self.buffers[buffer][1] -= 1
            if not self.buffers[buffer][1]:
                self.passing -= self.buffers.pop(buffer)[0]


def is_put_off(op: Op, graph: OpGraph) -> bool:
    """Whether the gradient of the operator's weight can be left to the second half of backward: a
    Linear's, of a parameter itself (see lower/deferred.py).
    """
    if op.kind != "aten.linear" or op.name not in graph.differentiated:
        return False
    weight = formulas.tensor_of(op, graph, "weight")
    return weight.role == "parameter" and weight.requires_grad


def _hands_on(op: Op, graph: OpGraph) -> bool:
    if op.kind in _HANDS_ON:
        return op.arguments.get("alpha", 1) == 1
    return op.kind not in _PARTS and formulas.moves_nothing(op, graph)


def _scores(op: Op, graph: OpGraph, kernels: Kernels) -> int:
    """Bytes of the scores an unfused attention makes."""
    if op.kind != "aten.scaled_dot_product_attention" or formulas.is_fused(op, graph, kernels):
        return 0
    query, key = (formulas.tensor_of(op, graph, name) for name in ("query", "key"))
    return query.num_bytes // query.shape[-1] * key.shape[-2]


def _workspace(op: Op, graph: OpGraph, kernels: Kernels) -> int:
    """Bytes an operator needs inside itself, beside its inputs and results."""
    return _scores(op, graph, kernels)


def _backward_workspace(op: Op, graph: OpGraph, kernels: Kernels) -> int:
    if op.kind == "aten.cross_entropy_loss":
        return formulas.tensor_of(op, graph, "self").num_bytes
    return 2 * _scores(op, graph, kernels)
