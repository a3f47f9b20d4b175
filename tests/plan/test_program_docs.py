"""The how-to on writing plans runs as it stands, and does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from toolkit.errors import UsageError

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "write-a-plan.md"


def test_the_how_to_runs_as_it_stands(capsys):
    text = PAGE.read_text()
    scope: dict[str, object] = {}
    shown = []
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), scope)
        shown.append(capsys.readouterr().out)
    chosen, data, megatron, co_shard, own, rows = shown[0], *shown[2:]
    assert "a b k+, n k+, ~n -> a b n" in chosen
    assert "nothing is communicated\n" in data
    assert re.search(r"^[1-9]\d* gradients are summed over both devices", data, re.MULTILINE)
    assert megatron.count("-all_reduce->") == 2 * 4
    for start, out in ((r"blocks\.0\.ffn\.down", megatron), (r"blocks\.1\.attention_norm", rows)):
        said = re.search(rf"```\n({start}.*?)\n```", text, re.DOTALL)
        assert said
        assert said[1].removesuffix("...") in out
    assert own.count("-all_gather->") == own.count("-reduce_scatter->") == 4
    assert "1 [a] [b] c -> 1 a b c" in rows
    assert rows.count("each part by sends") == 2
    for out in (data, megatron, co_shard, own, rows.partition("\n")[2]):
        assert float(out.splitlines()[0]) < 1e-5

    fault = re.search(r">>> (.*)\nUsageError: (.*)", text)
    assert fault
    fresh = scope["Program"](scope["graph"])  # type: ignore[operator]
    with pytest.raises(UsageError) as caught:
        exec(fault[1], scope, {"program": fresh})
    assert str(caught.value) == fault[2]
