"""What 8 and 4 bits cost in likelihood of a held text."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.serve.model import weights
from toolkit.serve.model.quality import held_text, mean_nll
from toolkit.serve.model.quantisation import MODES, make_decoder
from toolkit.serve.model.tokenizer import Tokenizer


@pytest.mark.slow
def test_perplexity(smollm2_gguf: Path, tokenizer: Tokenizer) -> None:
    """8 bits, and the file's own 4, are within half a per cent of float32's likelihood."""
    ids = tokenizer.encode(held_text()[:8000])[:1536]
    found = {}
    for mode in MODES:
        model = weights.load(smollm2_gguf, keep_blocks=mode != "none")
        found[mode] = mean_nll(make_decoder(model, mode), ids)
    assert 2 < found["none"] < 4
    assert found["int8"] == pytest.approx(found["none"], rel=0.005)
    assert found["int4"] == pytest.approx(found["none"], rel=0.005)
