"""Graph files come back exactly equal, and a file that is not one is told apart."""

from __future__ import annotations

import json

import pytest

from toolkit import ir, models, record
from toolkit.errors import FormatError, UsageError


def test_a_graph_comes_back_equal(traced, tmp_path):
    path = tmp_path / "graph.json"
    digest = traced.graph.save(path)
    again = ir.OpGraph.load(path)
    assert again == traced.graph
    assert again.digest == traced.graph.digest == digest == json.loads(path.read_text())["digest"]
    assert [block.paths for block in again.blocks()] == [b.paths for b in traced.graph.blocks()]


def test_a_graph_read_from_a_file_scales(subject, tmp_path):
    graph = subject("zoo:llama-tiny").graph
    graph.save(tmp_path / "graph.json")
    again = ir.OpGraph.load(tmp_path / "graph.json")
    assert again.at(batch=7, tokens=13) == graph.at(batch=7, tokens=13)


def test_tracing_twice_gives_the_same_digest(subject):
    graph = subject("zoo:gpt-tiny").graph
    sizes = dict(graph.sizes)
    assert ir.trace_model(models.load("gpt-tiny"), **sizes).digest == graph.digest
    assert graph.at(batch=3).digest != graph.digest


def test_wrong_files_are_told(subject, tmp_path):
    path = tmp_path / "graph.json"
    with pytest.raises(UsageError, match="no such file"):
        ir.OpGraph.load(path)
    subject("zoo:gpt-tiny").graph.save(path)
    good = json.loads(path.read_text())
    path.write_text(json.dumps({**good, "version": 2}))
    with pytest.raises(FormatError, match=r"version 2 .* reads version 1"):
        ir.OpGraph.load(path)
    path.write_text(json.dumps({**good, "body": {**good["body"], "name": "other"}}))
    with pytest.raises(FormatError, match="does not match its digest"):
        ir.OpGraph.load(path)
    path.write_text(json.dumps(good)[:-50])
    with pytest.raises(FormatError, match="corrupt"):
        ir.OpGraph.load(path)
    record.write(path, kind="plan", version=1, body={})
    with pytest.raises(FormatError, match="not a graph file"):
        ir.OpGraph.load(path)


@pytest.mark.parametrize("spoil", ["drop a key", "cut a tensor", "swap operators", "odd dtype"])
def test_a_sound_record_that_is_no_graph_is_refused(subject, tmp_path, spoil):
    path = tmp_path / "graph.json"
    subject("zoo:gpt-tiny").graph.save(path)
    body = json.loads(path.read_text())["body"]
    if spoil == "drop a key":
        del body["ops"]
    elif spoil == "cut a tensor":
        del body["tensors"][10]
    elif spoil == "odd dtype":
        body["tensors"][3]["dtype"] = "float7"
    else:
        body["ops"].reverse()
    record.write(path, kind="graph", version=1, body=body)
    with pytest.raises(FormatError):
        ir.OpGraph.load(path)


def test_infinities_and_constants_survive(tmp_path):
    import torch
    from torch import nn

    class Model(nn.Module):
        def forward(self, x):
            return x.masked_fill(x > 0, float("-inf")).to(torch.bfloat16)

    graph = ir.trace(Model(), (torch.zeros(3, 4),), name="model")
    graph.save(tmp_path / "graph.json")
    assert ir.OpGraph.load(tmp_path / "graph.json") == graph
