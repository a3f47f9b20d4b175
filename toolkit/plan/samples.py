"""What a planned model is trained on: batches under the names of its inputs.

Language models read real text (text.py), an encoder and decoder read a stretch of it and write
the stretch after it; images and alignments are synthetic (synthetic.py), and say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from toolkit import models
from toolkit.errors import UsageError
from toolkit.plan import runtime, synthetic, text
from toolkit.plan.plan import Plan

# Distances of AlphaFold 2's head (supplement 1.9.8).
_NUM_BINS = 64


class Samples(Protocol):
    """Batches as a pure function of (seed, step): the same on every rank, in any order of restarts
    and under any plan. `source` is said to the user; `digest` tells one data set from another.
    """

    @property
    def source(self) -> str: ...
    @property
    def digest(self) -> str: ...
    def batch(self, step: int, *, batch: int, seed: int) -> dict[str, Tensor]:
        """Return `batch` samples by input name, on the CPU."""


def of(plan: Plan, dataset: str | None = None) -> Samples:
    """Return what the plan's model can be trained on; `dataset` is text, as `text.load` takes it.

    Raises UsageError for a model whose inputs nothing here makes, or a dataset for images.
    """
    names = runtime.input_names(plan)
    sizes = plan.provenance.sizes
    if names in (_IMAGES, _ALIGNMENTS) and dataset is not None:
        raise UsageError(
            f"{plan.provenance.model} takes {', '.join(names)}, and {dataset} would be text",
            remedy="leave --dataset out: this family trains on synthetic data",
        )
    if names == _IMAGES:
        shape = runtime.example_shapes(plan)["image_BCII"]
        config = models.load(plan.provenance.model).config
        return synthetic.Images(shape[-1], shape[1], getattr(config, "num_labels", 2))
    if names == _ALIGNMENTS:
        _, sequences, residues = runtime.example_shapes(plan)["ids_BSR"]
        return synthetic.Alignments(sequences, residues, _NUM_BINS)
    if names == _PAIRS:
        data = text.load(dataset)
        return Continuation(data, sizes["source_tokens"], sizes["tokens"])
    return Language(text.load(dataset), *runtime.text_inputs(plan), sizes["tokens"])


_IMAGES = ("image_BCII", "labels_B")
_ALIGNMENTS = ("ids_BSR", "residues_BSR", "bins_BRR")
_PAIRS = ("source_BS", "target_BT", "labels_BT")


@dataclass(frozen=True)
class Language:
    """Stretches of text as ids, and the same one further on as targets."""

    text: text.Text
    ids: str
    targets: str
    tokens: int

    @property
    def source(self) -> str:
        return self.text.source

    @property
    def digest(self) -> str:
        return self.text.digest

    def batch(self, step: int, *, batch: int, seed: int) -> dict[str, Tensor]:
        made = self.text.batch(step, batch=batch, tokens=self.tokens, seed=seed)
        # A transformers model calls its targets labels and shifts them by one itself.
        wanted = made["ids"] if self.targets == "labels" else made["targets"]
        return {self.ids: made["ids"], self.targets: wanted}


@dataclass(frozen=True)
class Continuation:
    """A stretch of text to read, and the stretch after it to write."""

    text: text.Text
    source_tokens: int
    target_tokens: int

    @property
    def source(self) -> str:
        return f"{self.text.source}, each stretch to be continued"

    @property
    def digest(self) -> str:
        return self.text.digest

    def batch(self, step: int, *, batch: int, seed: int) -> dict[str, Tensor]:
        tokens = self.source_tokens + self.target_tokens
        made = self.text.batch(step, batch=batch, tokens=tokens, seed=seed)
        first = self.source_tokens
        return {
            "source_BS": made["ids"][:, :first].contiguous(),
            "target_BT": made["ids"][:, first:].contiguous(),
            "labels_BT": made["targets"][:, first:].contiguous(),
        }
