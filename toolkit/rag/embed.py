"""Texts into unit vectors: any Hugging Face encoder, in batches of equal length, resumable.

Shape legend: B texts of a batch, T tokens, D dimensions of a vector.

Texts of a batch have the same number of tokens, so nothing is padded and no attention mask is
needed: no work is spent on padding, the mask-free attention kernel runs, and a vector does not
depend on which texts happened to be its neighbours (beyond the order in which a GEMM adds up).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toolkit import record
from toolkit.errors import FormatError, ToolkitError, UsageError, require
from toolkit.models import weights

if TYPE_CHECKING:
    import torch

Progress = Callable[[int], None]  # called with the number of texts that have just been embedded

# Tokens a forward pass takes at once: enough to feed a core, small enough for its caches.
_BATCH_TOKENS = 4096

# Below this cosine a passage is taken to be about something else. Known by trying for the encoder
# that comes with the toolkit (docs/concepts/retrieval.md); encoders differ too much to share one.
_MIN_SCORE = {"minilm-l6": 0.35}


@dataclass(frozen=True)
class EncoderInfo:
    """What makes two encoders give the same vectors; an index keeps it and checks it.

    `ref` is a built-in name or a folder, `fingerprint` the SHA-256 of its configuration, tokenizer
    and weights. Prefixes are what some encoders expect ("query: ", "passage: ").
    """

    ref: str
    fingerprint: str
    dims: int
    max_tokens: int
    pooling: str
    query_prefix: str = ""
    document_prefix: str = ""

    @property
    def min_score(self) -> float | None:
        """The cosine below which a passage does not answer, or None when nobody has found it."""
        return _MIN_SCORE.get(self.ref)


class Encoder:
    """Mean- or CLS-pooled, L2-normalised embeddings; inner products of them are cosines."""

    def __init__(self, info: EncoderInfo, module: torch.nn.Module, tokenizer: Any) -> None:
        self.info = info
        self.num_truncated = 0  # texts cut at max_tokens so far
        self._module = module
        self._tokenizer = tokenizer

    @classmethod
    def load(
        cls,
        ref: str = "minilm-l6",
        *,
        max_tokens: int | None = None,
        query_prefix: str = "",
        document_prefix: str = "",
        fetching: Callable[[int, int], None] | None = None,
    ) -> Encoder:
        """Load `ref`: `minilm-l6`, a Hugging Face folder, or a hub id.

        `max_tokens` defaults to what the encoder was trained on (256 for MiniLM); `fetching` is
        told (done, total) bytes when the weights are not on this disk yet. Raises UsageError when
        there is no such encoder, FormatError when its files are not one.
        """
        folder = _folder(ref, fetching)
        module, tokenizer = _files(folder)
        limit = _trained_tokens(folder, module.config, tokenizer)
        if max_tokens is not None and not 3 <= max_tokens <= limit:
            raise UsageError(f"{ref} reads between 3 and {limit} tokens, not {max_tokens}")
        info = EncoderInfo(
            ref=ref if folder != Path(ref).expanduser() else str(folder.resolve()),
            fingerprint=_fingerprint(folder),
            dims=int(module.config.hidden_size),
            max_tokens=max_tokens or limit,
            pooling=_pooling(folder),
            query_prefix=query_prefix,
            document_prefix=document_prefix,
        )
        return cls(info, module.eval(), tokenizer)

    @classmethod
    def matching(cls, info: EncoderInfo) -> Encoder:
        """Load the encoder an index was built with; FormatError when it is no longer the same."""
        encoder = cls.load(
            info.ref,
            max_tokens=info.max_tokens,
            query_prefix=info.query_prefix,
            document_prefix=info.document_prefix,
        )
        if encoder.info != info:
            raise FormatError(
                f"the encoder {info.ref} is not the one this index was built with",
                remedy="restore it, or build the index again",
            )
        return encoder

    def documents(self, texts: Sequence[str], *, progress: Progress | None = None) -> np.ndarray:
        """Return the unit vectors of passages, float32 [len(texts), dims], in their order."""
        return self._embed([self.info.document_prefix + text for text in texts], progress)

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """Return the unit vectors of questions, float32 [len(texts), dims], in their order."""
        return self._embed([self.info.query_prefix + text for text in texts], None)

    def _embed(self, texts: list[str], progress: Progress | None) -> np.ndarray:
        import torch

        out = np.empty((len(texts), self.info.dims), dtype=np.float32)
        if not texts:
            return out
        # Truncated here, so that what is lost can be counted.
        tokens = self._tokenizer(texts, truncation=True, max_length=self.info.max_tokens + 1)[
            "input_ids"
        ]
        by_length: dict[int, list[int]] = {}
        for i, ids in enumerate(tokens):
            if len(ids) > self.info.max_tokens:
                self.num_truncated += 1
                del ids[self.info.max_tokens - 1 : -1]  # the closing token stays
            by_length.setdefault(len(ids), []).append(i)
        with torch.inference_mode():
            for length in sorted(by_length):
                rows = by_length[length]
                size = max(1, _BATCH_TOKENS // length)
                for start in range(0, len(rows), size):
                    batch = rows[start : start + size]
                    ids_BT = torch.tensor([tokens[i] for i in batch])  # noqa: N806
                    hidden_BTD = self._module(input_ids=ids_BT).last_hidden_state  # noqa: N806
                    pooled_BD = (  # noqa: N806
                        hidden_BTD.mean(dim=1) if self.info.pooling == "mean" else hidden_BTD[:, 0]
                    )
                    out[batch] = torch.nn.functional.normalize(pooled_BD, dim=1).numpy()
                    if progress:
                        progress(len(batch))
        return out


class ShardStore:
    """Embedded shards on disk, named by what they are the embedding of.

    A shard's name is the digest of the encoder and of its texts, so an interrupted build finds what
    it has done, and a changed text or encoder cannot be mistaken for it.
    """

    def __init__(self, folder: Path, encoder: Encoder) -> None:
        self.num_reused = 0
        self._folder = folder
        self._encoder = encoder

    def embed(self, texts: Sequence[str], *, progress: Progress | None = None) -> Path:
        """Return the .npy file of the texts' vectors, computing it unless it is there."""
        path = self._folder / f"{self._name(texts)}.npy"
        if self._holds(path, len(texts)):
            self.num_reused += len(texts)
            if progress:
                progress(len(texts))
            return path
        vectors = self._encoder.documents(texts, progress=progress)
        if not np.isfinite(vectors).all():
            raise ToolkitError(f"the encoder {self._encoder.info.ref} returned values not finite")
        with record.atomic(path) as file:
            np.save(file, vectors)
        return path

    def _name(self, texts: Sequence[str]) -> str:
        what = json.dumps([asdict(self._encoder.info), list(texts)], sort_keys=True)
        return hashlib.sha256(what.encode()).hexdigest()[:32]

    def _holds(self, path: Path, num_texts: int) -> bool:
        # Shards are written whole; this only catches a disk that lost one.
        try:
            return np.load(path, mmap_mode="r").shape == (num_texts, self._encoder.info.dims)
        except (FileNotFoundError, ValueError, EOFError):
            return False


def shards(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    """Group texts by `size`, in order.

    >>> list(shards(iter("abcde"), 2))
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    held: list[str] = []
    for text in texts:
        held.append(text)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held


def _folder(ref: str, fetching: Callable[[int, int], None] | None) -> Path:
    """Return the Hugging Face folder behind `ref`."""
    found = weights.resolve(ref, fetching)
    if found.kind != "huggingface":
        raise UsageError(
            f"{ref} is a {found.kind} file, and an encoder is a Hugging Face folder",
            remedy="try minilm-l6",
        )
    return found.path


def _files(folder: Path) -> tuple[Any, Any]:
    """Return the (model, tokenizer) of a folder, with every weight found in its files."""
    transformers = require("transformers", extra="rag")
    safetensors = require("safetensors", extra="rag")
    transformers.utils.logging.disable_progress_bar()
    remedy = "give a folder with config.json, a tokenizer and whole weights"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        module, loading = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, dtype="float32", output_loading_info=True
        )
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        reason = str(error).strip().split("\n", maxsplit=1)[0]
        raise FormatError(f"{folder} does not hold an encoder: {reason}", remedy=remedy) from error
    # transformers fills in what is missing at random. The pooler is not used here.
    missing = sorted(key for key in loading["missing_keys"] if "pooler" not in key)
    if missing:
        raise FormatError(
            f"{folder} lacks {len(missing)} weights of its model, {missing[0]} first", remedy=remedy
        )
    return module, tokenizer


def _fingerprint(folder: Path) -> str:
    """Return the SHA-256 of everything in the folder that decides the vectors."""
    found = hashlib.sha256()
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in (".json", ".safetensors", ".bin", ".model", ".txt") and path.is_file()
    ]
    for path in files:
        found.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                found.update(block)
    return found.hexdigest()


def _trained_tokens(folder: Path, config: Any, tokenizer: Any) -> int:
    # sentence-transformers notes the length that the encoder was trained on; positions alone allow
    # more, and are wrong where some are reserved.
    noted = folder / "sentence_bert_config.json"
    if noted.is_file():
        return int(json.loads(noted.read_text())["max_seq_length"])
    limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length, 512]
    return min(int(limit) for limit in limits if limit and limit > 0)


def _pooling(folder: Path) -> str:
    noted = folder / "1_Pooling" / "config.json"
    if not noted.is_file():
        return "mean"
    modes = json.loads(noted.read_text())
    for mode, name in (("pooling_mode_mean_tokens", "mean"), ("pooling_mode_cls_token", "cls")):
        if modes.get(mode):
            return name
    raise FormatError(
        f"{noted} asks for a pooling that is not known here",
        remedy="use an encoder with mean or CLS pooling",
    )
