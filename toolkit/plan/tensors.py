"""pTensor, vTensor and mask: which part of a logical tensor an operator sees, and where.

A mask is a box of indices and a chunk of the value. Operators that were split along a dim see
boxes; the parts of a split reduction produce chunks: partial sums that add up to the tensor.
Terms of SuperScaler (arXiv 2301.08984, section 3.3), where a pTensor is a tensor of the original
model and a vTensor one operator's view of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from toolkit.errors import UsageError
from toolkit.ir.graph import item_bytes

Interval = tuple[int, int]  # [start, end)
Box = tuple[Interval, ...]  # one interval a dim


@dataclass(frozen=True, order=True)
class Chunk:
    """Partial sums `start` to `stop` (exclusive) of `parts`; kept in lowest terms.

    The value of a tensor is laid out on [0, 1): a chunk holds [start/parts, stop/parts). Which
    numbers that is, is up to who computes them; chunks that tile [0, 1) add up to the tensor.

    >>> Chunk.part(1, 2) & Chunk.part(1, 3), Chunk(2, 4, 4) == Chunk.part(1, 2)
    (Chunk(start=3, stop=4, parts=6), True)
    """

    start: int
    stop: int
    parts: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= self.parts:
            raise UsageError(
                f"partial sums {self.start} to {self.stop} of {self.parts} are none",
                remedy="needs 0 <= start < stop <= parts",
            )
        common = math.gcd(self.start, self.stop, self.parts)
        for name in ("start", "stop", "parts"):
            object.__setattr__(self, name, getattr(self, name) // common)

    @staticmethod
    def part(index: int, parts: int) -> Chunk:
        """Return the `index`-th of `parts` partial sums."""
        return Chunk(index, index + 1, parts)

    @property
    def is_whole(self) -> bool:
        return self.parts == 1

    @property
    def low(self) -> Fraction:
        return Fraction(self.start, self.parts)

    @property
    def high(self) -> Fraction:
        return Fraction(self.stop, self.parts)

    def _on(self, parts: int) -> Interval:
        return self.start * (parts // self.parts), self.stop * (parts // self.parts)

    def __and__(self, other: Chunk) -> Chunk | None:
        """Return what both hold, or None."""
        if self == other:
            return self
        parts = math.lcm(self.parts, other.parts)
        (a, b), (c, d) = self._on(parts), other._on(parts)
        return Chunk(max(a, c), min(b, d), parts) if max(a, c) < min(b, d) else None

    def __contains__(self, other: Chunk) -> bool:
        return self & other == other

    def minus(self, other: Chunk) -> tuple[Chunk, ...]:
        """Return what `other` does not hold, in order."""
        parts = math.lcm(self.parts, other.parts)
        (a, b), (c, d) = self._on(parts), other._on(parts)
        return tuple(
            Chunk(low, high, parts) for low, high in ((a, min(b, c)), (max(a, d), b)) if low < high
        )

    def at(self, inner: Chunk) -> Chunk:
        """Return the chunk that `inner` is when it is taken of this one.

        >>> Chunk.part(1, 2).at(Chunk.part(0, 2)) == Chunk.part(2, 4)
        True
        """
        width = self.stop - self.start
        base = self.start * inner.parts
        return Chunk(
            base + width * inner.start, base + width * inner.stop, self.parts * inner.parts
        )

    def __str__(self) -> str:
        if self.stop == self.start + 1:
            return f"{self.start}/{self.parts}"
        return f"{self.start}..{self.stop}/{self.parts}"


WHOLE = Chunk(0, 1, 1)


@dataclass(frozen=True, order=True)
class Mask:
    """A box of indices of a tensor, and the chunk of its value.

    >>> mask = Mask.whole((8, 6)).split(0, 1, 2).share(0, 2)
    >>> print(mask, mask.shape, mask.split(1, 2, 3))
    [4:8, 0:6] v0/2 (4, 6) [4:8, 4:6] v0/2
    """

    box: Box
    chunk: Chunk = WHOLE

    def __post_init__(self) -> None:
        for start, end in self.box:
            if not 0 <= start < end:
                raise UsageError(f"a mask needs 0 <= start < end in each dim, not {self.box}")

    @staticmethod
    def whole(shape: Sequence[int]) -> Mask:
        """Return the mask of a whole tensor."""
        return Mask(tuple((0, size) for size in shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(end - start for start, end in self.box)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def __and__(self, other: Mask) -> Mask | None:
        """Return what both masks hold, or None."""
        box = overlap(self.box, other.box)
        chunk = self.chunk & other.chunk if box is not None else None
        return Mask(box, chunk) if box is not None and chunk is not None else None

    def __contains__(self, other: Mask) -> bool:
        return self & other == other

    def minus(self, other: Mask) -> tuple[Mask, ...]:
        """Return disjoint masks that hold exactly what `other` does not."""
        both = self & other
        if both is None:
            return (self,)
        found = [Mask(box, self.chunk) for box in cut_away(self.box, both.box)]
        found += [Mask(both.box, chunk) for chunk in self.chunk.minus(both.chunk)]
        return tuple(found)

    def at(self, inner: Mask) -> Mask:
        """Return the mask that `inner` is when it counts from this one's corner and value.

        Raises UsageError when `inner` reaches outside.
        """
        fits = len(inner.box) == len(self.box) and all(
            end <= size for (_, end), size in zip(inner.box, self.shape, strict=True)
        )
        if not fits:
            raise UsageError(f"{inner} reaches outside of a part of shape {self.shape}")
        box = tuple(
            (low + start, low + end)
            for (low, _), (start, end) in zip(self.box, inner.box, strict=True)
        )
        return Mask(box, self.chunk.at(inner.chunk))

    def within(self, holder: Mask) -> Box:
        """Return this mask's box counted from the corner of `holder`, which must contain it."""
        assert all(
            low <= start and end <= high
            for (start, end), (low, high) in zip(self.box, holder.box, strict=True)
        ), f"{self} is not within {holder}"
        return tuple(
            (start - low, end - low)
            for (start, end), (low, _) in zip(self.box, holder.box, strict=True)
        )

    def split(self, dim: int, index: int, parts: int) -> Mask:
        """Return the `index`-th of `parts` slices along `dim`; the first are longer if uneven.

        Raises UsageError when there is no such part.
        """
        if not -len(self.box) <= dim < len(self.box):
            raise UsageError(f"{self} has no dim {dim}")
        size = self.shape[dim]
        if not 0 <= index < parts or parts > size:
            raise UsageError(f"there is no part {index} of {parts} along dim {dim} of size {size}")
        short, longer = divmod(size, parts)
        start = index * short + min(index, longer)
        inner = [(0, length) for length in self.shape]
        inner[dim] = (start, start + short + (index < longer))
        return self.at(Mask(tuple(inner)))

    def share(self, index: int, parts: int) -> Mask:
        """Return the `index`-th of `parts` partial sums of this."""
        return Mask(self.box, self.chunk.at(Chunk.part(index, parts)))

    def __str__(self) -> str:
        box = ", ".join(f"{start}:{end}" for start, end in self.box)
        return f"[{box}]" + ("" if self.chunk.is_whole else f" v{self.chunk}")


@dataclass(frozen=True)
class PTensor:
    """A logical tensor of the model, as it was before any operator was split."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.shape):
            raise UsageError(f"tensor {self.name} of shape {self.shape} has nothing to divide")
        item_bytes(self.dtype)

    @property
    def item_bytes(self) -> int:
        return item_bytes(self.dtype)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes


@dataclass(frozen=True)
class VTensor:
    """What operator `op` on device `rank` sees of a tensor: the part its mask says.

    Views of the same `op` on several ranks are replicas: the same operator run more than once.
    """

    tensor: PTensor
    mask: Mask
    rank: int
    op: str = ""

    def __post_init__(self) -> None:
        if self.mask not in Mask.whole(self.tensor.shape):
            raise UsageError(
                f"{self.op or 'an operator'} on rank {self.rank} sees {self.mask} of "
                f"{self.tensor.name}, which has shape {self.tensor.shape}"
            )

    @property
    def num_bytes(self) -> int:
        return self.mask.numel * self.tensor.item_bytes

    def __str__(self) -> str:
        op = f"{self.op} " if self.op else ""
        return f"{op}{self.tensor.name}{self.mask} on rank {self.rank}"


def depends(producer: VTensor, consumer: VTensor) -> bool:
    """Whether what one produces is (part of) what the other consumes: their masks intersect."""
    return producer.tensor == consumer.tensor and (producer.mask & consumer.mask) is not None


def overlap(first: Box, second: Box) -> Box | None:
    """Return the box both hold, or None.

    >>> overlap(((0, 4), (2, 6)), ((3, 8), (0, 3)))
    ((3, 4), (2, 3))
    """
    found = []
    for (a, b), (c, d) in zip(first, second, strict=True):
        low, high = max(a, c), min(b, d)
        if low >= high:
            return None
        found.append((low, high))
    return tuple(found)


def cut_away(box: Box, inside: Box) -> Iterator[Box]:
    """Yield disjoint boxes that make up `box` without `inside`, which it contains."""
    rest = list(box)
    for dim, (low, high) in enumerate(inside):
        start, end = rest[dim]
        for piece in ((start, low), (high, end)):
            if piece[0] < piece[1]:
                yield (*rest[:dim], piece, *rest[dim + 1 :])
        rest[dim] = (low, high)


def atoms(boxes: Sequence[Box]) -> dict[Box, list[int]]:
    """Cut space along every face of every box; return which boxes (by index) hold each atom.

    Atoms that no box holds are left out.
    """
    if not boxes:
        return {}
    dims = range(len(boxes[0]))
    cuts = [sorted({face for box in boxes for face in box[dim]}) for dim in dims]
    place = [{face: i for i, face in enumerate(faces)} for faces in cuts]
    found: dict[Box, list[int]] = {}
    for index, box in enumerate(boxes):
        spans = []
        for dim, (start, end) in enumerate(box):
            faces = cuts[dim][place[dim][start] : place[dim][end] + 1]
            spans.append(list(itertools.pairwise(faces)))
        for atom in itertools.product(*spans):
            found.setdefault(atom, []).append(index)
    return found


def family(chunks: Iterable[Chunk]) -> tuple[Chunk, ...] | None:
    """Return the fewest of `chunks` that add up to the whole value, in order, or None.

    >>> family([Chunk.part(0, 2), Chunk.part(2, 4), Chunk.part(3, 4), Chunk.part(1, 2)])
    (Chunk(start=0, stop=1, parts=2), Chunk(start=1, stop=2, parts=2))
    """
    reached: dict[Fraction, tuple[Chunk, ...]] = {Fraction(0): ()}
    for chunk in sorted(set(chunks), key=lambda chunk: (chunk.low, chunk.high)):
        before = reached.get(chunk.low)
        known = reached.get(chunk.high)
        if before is not None and (known is None or len(before) + 1 < len(known)):
            reached[chunk.high] = (*before, chunk)
    return reached.get(Fraction(1))


def _useful(chunks: set[Chunk]) -> set[Chunk]:
    """The chunks that belong to some family."""
    ahead, behind = {Fraction(0)}, {Fraction(1)}
    for chunk in sorted(chunks, key=lambda chunk: chunk.low):
        if chunk.low in ahead:
            ahead.add(chunk.high)
    for chunk in sorted(chunks, key=lambda chunk: -chunk.high):
        if chunk.high in behind:
            behind.add(chunk.low)
    return {chunk for chunk in chunks if chunk.low in ahead and chunk.high in behind}


def missing(tensor: PTensor, masks: Sequence[Mask]) -> tuple[Box, ...]:
    """Return the boxes of a tensor whose value the masks do not add up to, one an atom.

    Masks may repeat (replicas) and overlap.
    """
    whole = Mask.whole(tensor.shape)
    distinct = sorted(set(masks))
    found = atoms([whole.box, *(mask.box for mask in distinct)])
    return tuple(
        box
        for box, holders in found.items()
        if family(distinct[i - 1].chunk for i in holders if i) is None
    )


def check_tiling(tensor: PTensor, producers: Sequence[VTensor]) -> None:
    """Raise UsageError unless `producers` make every element of the tensor, all its partial sums
    included, and no partial sum that nothing completes. Replicas may repeat.
    """
    for view in producers:
        if view.tensor != tensor:
            raise UsageError(f"{view} is no part of {tensor.name} {tensor.shape}")
    gaps = missing(tensor, [view.mask for view in producers])
    if gaps:
        near = [str(view) for view in producers if overlap(view.mask.box, gaps[0]) is not None]
        known = f"there are only {', '.join(near[:4])}" if near else "nothing produces it"
        raise UsageError(
            f"{tensor.name}{Mask(gaps[0])} is not whole: {known}",
            remedy="let the operators' parts cover it, and its partial sums add up",
        )
    for holders in atoms([view.mask.box for view in producers]).values():
        used = _useful({producers[i].mask.chunk for i in holders})
        for view in (producers[i] for i in holders):
            if view.mask.chunk not in used:
                raise UsageError(f"{view} is a partial sum that no others complete")
