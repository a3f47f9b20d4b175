"""A tiny encoder with random weights, and a small folder of documents to index."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path

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
