"""A tiny encoder with random weights, and a small folder of documents to index."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GUIDE = """# Garden guide

Water the tomatoes every morning. They wilt when the soil is dry.

## Tools

A spade digs, a rake levels. Keep both clean and dry.
Oil the wooden handles once a year.

## Pests

Snails eat lettuce at night; collect them by hand.
Aphids are eaten by ladybirds, so do not spray.
"""
PAGE = """<html><head><title>Bread &amp; butter</title><style>p {color: red}</style></head>
<body><nav>Home | About</nav>
<h1>Bread</h1>
<p>Knead the <b>dough</b> for ten
minutes.</p><p>Bake it hot.</p>
<pre>flour  500 g
water  350 g</pre>
<script>alert("never read")</script>
</body></html>
"""


def _make_encoder(folder: Path, *, pooling: str | None = None, seed: int = 0) -> Path:
    """Write a BERT of 2 layers and 32 dimensions, reading characters, into `folder`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    characters = [*string.ascii_letters, *string.digits, *string.punctuation]
    vocabulary = {token: i for i, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]",
        cls_token="[CLS]", sep_token="[SEP]", model_max_length=64,
    )  # fmt: skip
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    if pooling:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(f'{{"pooling_mode_{pooling}": true}}')
    return folder


@pytest.fixture(scope="session")
def make_encoder() -> Callable[..., Path]:
    return _make_encoder


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make_encoder(tmp_path_factory.mktemp("tiny-encoder"))


@pytest.fixture(scope="session")
def garden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Markdown, HTML, JSONL, and things that are not text."""
    root = tmp_path_factory.mktemp("garden")
    (root / "guide.md").write_text(GUIDE)
    (root / "kitchen").mkdir()
    (root / "kitchen" / "bread.html").write_text(PAGE)
    (root / "notes.jsonl").write_text(
        '{"title": "Frost", "text": "Cover the beds before the first frost."}\n\n'
        '{"text": "Seeds keep for three years."}\n'
    )
    (root / "photo.jpg").write_bytes(b"\xff\xd8\0\0")
    (root / "binary.txt").write_bytes(b"a\0b")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "secret.md").write_text("never read")
    return root


@pytest.fixture(scope="session")
def garden_index(garden: Path, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of the garden; copy it before damaging it."""
    from toolkit.rag import Encoder, build_index, find_corpus

    path = tmp_path_factory.mktemp("garden-index") / "index"
    # Several shards, so that their order matters.
    build_index(
        find_corpus(str(garden)), path, Encoder.load(str(tiny_dir)),
        passage_words=12, shard_passages=3,
    )  # fmt: skip
    return path


def _make_store(
    path: Path, vectors: np.ndarray, *, num_lists: int = 24, encoding: str = "f32",
    segments: int = 1, texts: bool = False,
) -> Path:  # fmt: skip
    from toolkit.rag import changes
    from toolkit.rag.corpus import Passage
    from toolkit.rag.quantizer import Quantizer

    changes.create(path, Quantizer.train(vectors, num_lists, encoding))
    for rows in np.array_split(np.arange(len(vectors)), segments):
        passages = [Passage(0, "s", "t", f"text {i}", 1, 1) for i in rows]
        # Two batches, so that ids go on from one to the next.
        changes.add(path, np.array_split(vectors[rows], 2), passages if texts else None)
    return path


@pytest.fixture(scope="session")
def make_store() -> Callable[..., Path]:
    """Make a store of vectors [N, D] with ids 0, 1, ...; passage i is "text i"."""
    return _make_store


class Plain:
    """Plain FAISS IVF over the lists of a store: what every search must equal, bit for bit."""

    def __init__(self, vectors: np.ndarray, path: Path) -> None:
        import faiss

        from toolkit.rag.store import Store

        self.vectors = vectors
        store = Store.open(path)
        quantizer = store.quantizer
        coarse = faiss.IndexFlatIP(quantizer.dims)
        coarse.add(quantizer.centroids_LD)
        shape = (coarse, quantizer.dims, quantizer.num_lists)
        if quantizer.encoding == "f32":
            self.index = faiss.IndexIVFFlat(*shape, faiss.METRIC_INNER_PRODUCT)
        else:
            kinds = {"f16": faiss.ScalarQuantizer.QT_fp16, "sq8": faiss.ScalarQuantizer.QT_8bit}
            self.index = faiss.IndexIVFScalarQuantizer(
                *shape, kinds[quantizer.encoding], faiss.METRIC_INNER_PRODUCT, False
            )
            faiss.copy_array_to_vector(quantizer.limits, self.index.sq.trained)
        self.index.is_trained = True
        self.index.add(vectors)
        store.close()

    def search(
        self, query: np.ndarray, probes: np.ndarray, k: int, deleted: Any = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """All that the probed lists hold, ordered by (score down, id up), the first k of it."""
        self.index.nprobe = len(probes)
        found = self.index.search_preassigned(query[None], self.index.ntotal, probes[None], None)
        scores, ids = found[0][0], found[1][0]
        alive = (ids >= 0) & ~np.isin(ids, deleted)
        scores, ids = scores[alive], ids[alive]
        order = np.lexsort((ids, -scores))[:k]
        return scores[order], ids[order]


@pytest.fixture(scope="session")
def plain() -> type[Plain]:
    return Plain


@pytest.fixture(scope="session")
def cloud() -> Callable[..., np.ndarray]:
    """Unit vectors in clusters, some of them equal: make(count, dims, seed)."""

    def make(count: int, dims: int = 24, seed: int = 0) -> np.ndarray:
        draw = np.random.default_rng(seed)
        centres = draw.normal(size=(12, dims))
        vectors = centres[draw.integers(0, 12, count)] + draw.normal(size=(count, dims))
        vectors[count // 2 : count // 2 + count // 20] = vectors[0]
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    return make
