"""Embeddings: equal to a plain reference, whatever the order and the batch, and resumable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from toolkit.errors import FormatError, UsageError
from toolkit.rag.embed import Encoder, ShardStore

MakeEncoder = Callable[..., Path]

TEXTS = [
    "How do I use the with statement?",
    "A spade digs.",
    "x",
    "",
    "The context manager's exit method is called even when the block raises an exception. " * 3,
    "Aphids are eaten by ladybirds.",
    "A spade digs!",
]


def _reference(folder: Path, texts: list[str], max_tokens: int) -> np.ndarray:
    """Embed one padded, masked batch the way model cards write it."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    batch = tokenizer(
        texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
    )
    with torch.no_grad():
        hidden_BTD = model(**batch).last_hidden_state
    mask_BT1 = batch["attention_mask"].unsqueeze(-1).float()
    mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
    return torch.nn.functional.normalize(mean_BD, dim=1).numpy()


def test_vectors_equal_a_padded_reference(tiny_dir: Path) -> None:
    encoder = Encoder.load(str(tiny_dir))
    found = encoder.documents(TEXTS)
    assert found.shape == (len(TEXTS), 32)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(found, _reference(tiny_dir, TEXTS, 64), atol=1e-5)
    assert encoder.num_truncated == 1


def test_minilm_equals_its_reference(minilm_dir: Path) -> None:
    encoder = Encoder.load(str(minilm_dir))
    assert (encoder.info.dims, encoder.info.max_tokens) == (384, 256)
    found = encoder.documents(TEXTS)
    np.testing.assert_allclose(found, _reference(minilm_dir, TEXTS, 256), atol=1e-5)
    close, far = found[1] @ found[6], found[1] @ found[0]
    assert close > 0.9 > 0.4 > far


def test_order_and_batch_do_not_matter(tiny_dir: Path) -> None:
    encoder = Encoder.load(str(tiny_dir))
    together = encoder.documents(TEXTS)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    shuffled = encoder.documents([TEXTS[i] for i in order])
    np.testing.assert_allclose(shuffled, together[order], atol=1e-6)
    alone = np.concatenate([encoder.documents([text]) for text in TEXTS])
    np.testing.assert_allclose(alone, together, atol=1e-6)
    assert encoder.documents([]).shape == (0, 32)


def test_progress_counts_every_text(tiny_dir: Path) -> None:
    counted: list[int] = []
    Encoder.load(str(tiny_dir)).documents(TEXTS, progress=counted.append)
    assert sum(counted) == len(TEXTS)


def test_prefixes_are_put_before_what_they_are_for(tiny_dir: Path) -> None:
    plain = Encoder.load(str(tiny_dir))
    prefixed = Encoder.load(str(tiny_dir), query_prefix="query: ", document_prefix="passage: ")
    np.testing.assert_array_equal(prefixed.queries(["a"]), plain.queries(["query: a"]))
    np.testing.assert_array_equal(prefixed.documents(["a"]), plain.documents(["passage: a"]))
    assert prefixed.info != plain.info


def test_pooling_is_the_encoders_own(
    tmp_path: Path, tiny_dir: Path, make_encoder: MakeEncoder
) -> None:
    cls = Encoder.load(str(make_encoder(tmp_path / "cls", pooling="cls_token")))
    assert cls.info.pooling == "cls"
    assert not np.allclose(cls.documents(TEXTS), Encoder.load(str(tiny_dir)).documents(TEXTS))
    with pytest.raises(FormatError, match="pooling that is not known"):
        Encoder.load(str(make_encoder(tmp_path / "max", pooling="max_tokens")))


def test_truncation_is_counted_and_keeps_the_closing_token(tiny_dir: Path) -> None:
    short = Encoder.load(str(tiny_dir), max_tokens=8)
    np.testing.assert_allclose(short.documents(TEXTS), _reference(tiny_dir, TEXTS, 8), atol=1e-5)
    assert short.num_truncated == 5
    with pytest.raises(UsageError, match="between 3 and 64 tokens, not 65"):
        Encoder.load(str(tiny_dir), max_tokens=65)


def test_a_changed_encoder_is_refused(tmp_path: Path, make_encoder: MakeEncoder) -> None:
    folder = make_encoder(tmp_path / "encoder")
    info = Encoder.load(str(folder)).info
    assert Encoder.matching(info).info == info
    make_encoder(folder, seed=1)
    with pytest.raises(FormatError, match="is not the one this index was built with"):
        Encoder.matching(info)


def test_torn_weights_are_named(tmp_path: Path, make_encoder: MakeEncoder) -> None:
    folder = make_encoder(tmp_path / "encoder")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FormatError, match=f"{folder} does not hold an encoder"):
        Encoder.load(str(folder))


def test_weights_that_are_not_there_are_not_made_up(
    tmp_path: Path, make_encoder: MakeEncoder
) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_encoder(tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layer.1.output" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"lacks 4 weights of its model, encoder\.layer\.1"):
        Encoder.load(str(folder))


def test_a_folder_without_an_encoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=f"{tmp_path} holds no weights"):
        Encoder.load(str(tmp_path))
    with pytest.raises(UsageError, match="did you mean 'minilm-l6'"):
        Encoder.load("minilm-l5")


def test_shards_are_reused_only_for_the_same_texts_and_encoder(
    tiny_dir: Path, tmp_path: Path
) -> None:
    encoder = Encoder.load(str(tiny_dir))
    store = ShardStore(tmp_path, encoder)
    first = store.embed(TEXTS)
    np.testing.assert_array_equal(np.load(first), encoder.documents(TEXTS))
    again = ShardStore(tmp_path, encoder)
    assert again.embed(TEXTS) == first
    assert again.num_reused == len(TEXTS)
    assert again.embed(TEXTS[:-1]) != first
    assert ShardStore(tmp_path, Encoder.load(str(tiny_dir), max_tokens=8)).embed(TEXTS) != first
    # A shard that the disk lost is made again.
    whole = first.read_bytes()
    first.write_bytes(whole[:50])
    healed = ShardStore(tmp_path, encoder)
    assert healed.embed(TEXTS).read_bytes() == whole
    assert healed.num_reused == 0
