"""What a step asks of a device: the work of each kernel, linear in a few counts of the step.

Every kernel of a decoder does so many FLOPs and moves so many bytes per step (its weights), per
sequence, per new token, per token of context, per pair of query and key, and per token drawn. With
those six coefficients known, a step of any batch is priced without looking at a graph again.
Nexus (arXiv 2507.06608 v5, section 4.1) takes the same inputs: prompt tokens of the chunk, cached
tokens of either phase, and the size of the decode batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from toolkit.cost.work import OpClass
from toolkit.serve.batch import Slice


@dataclass(frozen=True, slots=True)
class Load:
    """Counts over the slices of a step, or of one phase's part of it.

    `tokens` are computed; `context` sums, over the sequences, how many keys its last token attends
    to; `pairs` sums how many every token attends to, itself included; `samples` are drawn.

    >>> Load.chunk(0, 3) + Load.chunk(9, 10, samples=1)
    Load(sequences=2, tokens=4, context=13, pairs=16, samples=1)
    """

    sequences: int = 0
    tokens: int = 0
    context: int = 0
    pairs: int = 0
    samples: int = 0

    @classmethod
    def chunk(cls, start: int, end: int, *, samples: int = 0) -> Load:
        """Return the load of one sequence's tokens at positions [start, end)."""
        tokens = end - start
        return cls(1, tokens, end, tokens * end - tokens * (tokens - 1) // 2, samples)

    @classmethod
    def decoding(cls, sequences: int, context: int) -> Load:
        """Return the load of one token each of `sequences`, which attend to `context` in all."""
        return cls(sequences, sequences, context, context, sequences)

    @classmethod
    def of(cls, slices: Iterable[Slice]) -> Load:
        """Return the load of a batch's slices."""
        sequences = tokens = context = pairs = samples = 0
        for piece in slices:
            num, end = piece.end - piece.start, piece.end
            sequences += 1
            tokens += num
            context += end
            pairs += num * end - num * (num - 1) // 2
            samples += piece.samples
        return cls(sequences, tokens, context, pairs, samples)

    def first(self, tokens: int) -> Load:
        """Return about what computing only `tokens` of these would be: fewer of all in proportion.

        >>> Load.chunk(0, 256).first(64)
        Load(sequences=1, tokens=64, context=256, pairs=8224, samples=0)
        """
        if tokens >= self.tokens:
            return self
        # Contexts stay: a part of a chunk attends to all that came before.
        return Load(
            max(1, self.sequences * tokens // self.tokens),
            tokens,
            self.context,
            max(tokens, self.pairs * tokens // self.tokens),
            self.samples * tokens // self.tokens,
        )

    def __add__(self, other: Load) -> Load:
        return Load(
            self.sequences + other.sequences,
            self.tokens + other.tokens,
            self.context + other.context,
            self.pairs + other.pairs,
            self.samples + other.samples,
        )

    def __bool__(self) -> bool:
        return self.tokens > 0


@dataclass(frozen=True, slots=True)
class PerCount:
    """An amount as a linear function of a load: `constant` is per step, whatever is in it."""

    constant: float = 0.0
    sequences: float = 0.0
    tokens: float = 0.0
    context: float = 0.0
    pairs: float = 0.0
    samples: float = 0.0

    @property
    def terms(self) -> tuple[float, ...]:
        """The amount per step and per count of each kind, in the order of the fields."""
        return (
            *(self.constant, self.sequences, self.tokens),
            *(self.context, self.pairs, self.samples),
        )

    def scaled(self, factor: float) -> PerCount:
        """Return `factor` times this amount."""
        return PerCount(*(factor * value for value in self.terms))

    def __add__(self, other: PerCount) -> PerCount:
        return PerCount(*(a + b for a, b in zip(self.terms, other.terms, strict=True)))

    def at(self, load: Load) -> float:
        """Return the amount for a load.

        >>> PerCount(constant=10, tokens=2, context=0.5).at(Load.chunk(2, 4))
        16.0
        """
        return (
            self.constant
            + self.sequences * load.sequences
            + self.tokens * load.tokens
            + self.context * load.context
            + self.pairs * load.pairs
            + self.samples * load.samples
        )


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that a step launches `count` times; FLOPs and bytes are those of one launch."""

    name: str
    op_class: OpClass
    dtype: str
    flops: PerCount
    moved_bytes: PerCount
    count: int = 1


@dataclass(frozen=True)
class ModelWork:
    """A decoder as its kernels; bytes are in the model's dtype.

    `kv_bytes_per_token` is over all layers, `hidden_bytes` one token's hidden state.
    """

    name: str
    kernels: tuple[Kernel, ...]
    weight_bytes: int
    kv_bytes_per_token: int
    hidden_bytes: int
    max_context: int | None = None

    @property
    def num_launches(self) -> int:
        """Kernels launched per step."""
        return sum(kernel.count for kernel in self.kernels)

    def flops(self, load: Load) -> float:
        """Return the FLOPs of a step."""
        return sum(kernel.count * kernel.flops.at(load) for kernel in self.kernels)

    def moved_bytes(self, load: Load) -> float:
        """Return the bytes a step moves."""
        return sum(kernel.count * kernel.moved_bytes.at(load) for kernel in self.kernels)
