"""The comparison with peers: what is sent, what a driver says of it, and what counts as failed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from toolkit.errors import ToolkitError
from toolkit.serve.bench.load import Arrival

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "bench" / "serve_vs_peers"
# Answers as the drivers of OpenVINO and transformers do: the last request fails, the one before it
# comes a token short.
DRIVER = """
import json, sys
print('"ready"', flush=True)
for line in sys.stdin:
    asked = json.loads(line)["requests"]
    found = [
        {"sent_s": r["at_s"], "piece_s": [r["at_s"] + 0.5, r["at_s"] + 1.5],
         "end_s": r["at_s"] + 1.5, "output_tokens": r["output_tokens"]}
        for r in asked
    ]
    found[-2]["output_tokens"] -= 1
    found[-1]["error"] = "dropped"
    print(json.dumps(found), flush=True)
"""


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The recipe's modules, found as they are when its folder is run."""
    monkeypatch.syspath_prepend(str(RECIPE))
    yield importlib.import_module("cases")
    for name in ("cases", "running"):
        sys.modules.pop(name, None)


def test_prompts_have_their_length_and_repeat_by_seed(recipe: ModuleType) -> None:
    passages = recipe.Passages(lambda text: [ord(letter) for letter in text[:5000]])
    for case in recipe.CASES.values():
        arrivals = case.arrivals(3)
        prompts = passages.prompts(arrivals, 3)
        assert [len(ids) for ids in prompts] == [each.prompt_tokens for each in arrivals]
        assert arrivals == case.arrivals(3)
        assert prompts == passages.prompts(arrivals, 3) != passages.prompts(arrivals, 4)
        assert case.figure in recipe.measured([])


def test_what_fails_or_comes_short_counts(recipe: ModuleType, tmp_path: Path) -> None:
    running = importlib.import_module("running")
    driver = running.Driver([sys.executable, "-c", DRIVER], {}, tmp_path / "log")
    arrivals = [Arrival(0.0, 2, 3)] * 4
    # Stopped as a contender is while another is measured, it answers when it goes on.
    driver.pause()
    driver.resume()
    figures = recipe.measured(driver.send(arrivals, [[1, 2]] * 4))
    driver.close()
    assert (figures["num_served"], figures["num_failed"]) == (3, 2)
    assert figures["decode_tokens_per_s"] == pytest.approx(2 / 1.0)
    assert figures["prefill_tokens_per_s"] == pytest.approx(2 / 0.5)
    assert figures["output_tokens_per_s"] == pytest.approx((3 + 3 + 2) / 1.5)


def test_a_contender_that_dies_says_why(recipe: ModuleType, tmp_path: Path) -> None:
    running = importlib.import_module("running")
    with pytest.raises(ToolkitError, match="no such weights"):
        running.Driver([sys.executable, "-c", "exit('no such weights')"], {}, tmp_path / "log")
