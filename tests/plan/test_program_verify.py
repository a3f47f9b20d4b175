"""Programs compute what the model computes, gradients too: run part by part, and compared."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from toolkit import ir, models
from toolkit.errors import InfeasibleError, UsageError
from toolkit.hardware import find_cluster
from toolkit.ir import interpret
from toolkit.plan.program import Program, Replicate, Split

SIZES = {"batch": 4, "tokens": 8}
EXACT = 1e-12  # of float64


def doubles(tensors):
    """Floating-point tensors in float64, where rounding cannot hide a mistake."""
    return {
        name: value.detach().to(torch.float64) if value.is_floating_point() else value
        for name, value in tensors.items()
    }


def zoo(name):
    """A model of the zoo as a graph, and its tensors by name."""
    model = models.load(name)
    graph = ir.trace_model(model, **SIZES)
    args, _ = model.example(**SIZES, device="cpu")
    weights = interpret.weights(graph, model.build("cpu"))
    return graph, doubles({**weights, **dict(zip(graph.inputs, args, strict=True))})


@pytest.fixture(scope="module")
def gpt():
    return zoo("gpt-tiny")


@pytest.fixture(scope="module")
def llama():
    return zoo("llama-tiny")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


def traced(module, *inputs):
    """A module as a graph, and its tensors by name."""
    torch.manual_seed(0)
    graph = ir.trace(module, inputs, name="model", axes={})
    tensors = {**interpret.weights(graph, module), **dict(zip(graph.inputs, inputs, strict=True))}
    return graph, doubles(tensors)


@pytest.fixture(scope="module")
def mlp():
    return traced(Mlp(), torch.randn(4, 8))


def spread(program, dims, num):
    """Part i of every operator on device i: split along `dims` where named, else replicated."""
    for op in program.ops():
        algorithm = Split(dims[op.op], num) if op.op in dims else Replicate(num)
        for device, part in enumerate(program.trans(op, algorithm)):
            program.assign(part, device)


def kinds(program, num):
    """How often each kind of communication happens, by kind."""
    found: dict[str, int] = {}
    for adapter in program.freeze().adapters(find_cluster(f"h100x{max(num, 2)}")):
        for step in adapter.communication:
            found[step.kind] = found.get(step.kind, 0) + 1
    return found


@pytest.mark.parametrize("num", [2, 4])
@pytest.mark.parametrize("which", ["gpt", "llama"])
def test_data_parallel_communicates_nothing_forward(request, which, num):
    graph, tensors = request.getfixturevalue(which)
    program = Program(graph)
    spread(program, program.flow("ids_BT", dim=0), num)
    assert program.verify(tensors).max_error < EXACT
    assert kinds(program, num) == {}
    reduced = program.freeze().reducers(find_cluster(f"h100x{num}"))
    # What is computed alike everywhere, from no batch, needs no reduction.
    batched = {tensor.name for tensor in graph.parameters()} - {"position_embedding.weight"}
    assert {reducer.weight for reducer in reduced} == batched
    assert {reducer.ranks for reducer in reduced} == {tuple(range(num))}


def test_a_mean_loss_counts_the_targets_of_all_parts(gpt):
    graph, tensors = gpt
    ignored = tensors["targets_BT"].clone()
    ignored[:3, 1:] = -100
    program = Program(graph)
    spread(program, program.flow("ids_BT", dim=0), 2)
    assert program.verify({**tensors, "targets_BT": ignored}).max_error < EXACT


HEADS = tuple(f"blocks.*.attention.{name}" for name in ("query", "key", "value"))


@pytest.mark.parametrize(("which", "columns"), [("gpt", ("up",)), ("llama", ("up", "gate"))])
def test_megatron_reduces_twice_a_block(request, which, columns):
    graph, tensors = request.getfixturevalue(which)
    program = Program(graph)
    hidden = program.flow(*(f"blocks.*.ffn.{name}" for name in columns), dim=-1)
    heads = program.flow(*HEADS, dim=-1)
    spread(program, {**hidden, **heads}, 2)
    assert program.verify(tensors).max_error < EXACT
    assert kinds(program, 2) == {"all_reduce": 2 * 4}
    assert program.freeze().reducers(find_cluster("h100x2")) == ()


def test_the_vocabulary_splits_in_embedding_and_head(gpt):
    graph, tensors = gpt
    program = Program(graph)
    rows = program.flow("token_embedding.weight", dim=0)
    assert rows == {"token_embedding:embedding": "v"}
    spread(program, {**rows, **program.flow("head", dim=-1)}, 4)
    assert program.verify(tensors).max_error < EXACT
    assert kinds(program, 4) == {"all_reduce": 1, "all_gather": 1}


def test_batch_and_heads_split_on_four_devices(llama):
    graph, tensors = llama
    program = Program(graph)
    batch = program.flow("ids_BT", dim=0)
    inner = {**program.flow(*HEADS, dim=-1), **program.flow("blocks.*.ffn.up", dim=-1)}
    for op in program.ops():
        outer = Split(batch[op.op], 2) if op.op in batch else Replicate(2)
        for row, part in enumerate(program.trans(op, outer)):
            algorithm = Split(inner[op.op], 2) if op.op in inner else Replicate(2)
            for column, piece in enumerate(program.trans(part, algorithm)):
                program.assign(piece, 2 * row + column)
    assert program.verify(tensors).max_error < EXACT
    groups = {step.ranks for adapter in program.freeze().adapters(find_cluster("h100x4"))
              for step in adapter.communication}  # fmt: skip
    assert groups == {(0, 1), (2, 3)}


def test_sums_split_by_value_with_their_bias(mlp):
    graph, tensors = mlp
    program = Program(graph)
    for name in ("up:linear", "down:linear"):
        for device, part in enumerate(program.trans(name, Split("k", 4))):
            program.assign(part, device)
    program.assign(program.ops(":gelu", ":add"), 3)
    assert program.verify(tensors).max_error < EXACT


def test_a_bias_that_is_copied_and_not_shared_out_is_caught(mlp, monkeypatch):
    from toolkit.plan.program import local

    graph, tensors = mlp
    program = Program(graph)
    program.trans("down:linear", Split("k", 2))
    program.assign(program.ops(), 0)
    monkeypatch.setattr(
        local, "_part", lambda tensor, mask: tensor[tuple(slice(*span) for span in mask.box)]
    )
    assert program.verify(tensors).max_error > 1e-3


def test_gradients_of_different_parts_taken_for_one_are_caught(mlp, monkeypatch):
    from toolkit.plan.program import gradient

    graph, tensors = mlp
    program = Program(graph)
    spread(program, program.flow("down", dim=-1), 2)
    found = program.verify(tensors)
    assert set(found.gradients) == {"up.weight", "up.bias", "down.weight", "down.bias"}
    assert found.max_error < EXACT
    true = gradient.mirror

    def all_alike(tensor, producers, consumers):
        return true(tensor, producers, [dataclasses.replace(view, op="same") for view in consumers])

    monkeypatch.setattr(gradient, "mirror", all_alike)
    found = program.verify(tensors)
    assert max(found.outputs.values()) < EXACT
    assert found.max_error > 1e-3


def test_co_shards_of_heads_and_hidden(gpt):
    graph, tensors = gpt
    program = Program(graph)
    for block in range(4):
        for flow in (
            program.flow(f"blocks.{block}.ffn.up", dim=-1),
            program.flow(*(name.replace("*", str(block)) for name in HEADS), dim=-1),
        ):
            program.co_shard(program.ops(*flow), flow, 4)
    program.assign(program.ops(), 0)
    frozen = program.freeze()
    assert len({sub_op.recompute for sub_op in frozen.sub_ops} - {""}) == 4 * 2 * 4
    assert program.verify(tensors).max_error < EXACT
    assert kinds(program, 1) == {}


def test_a_plan_of_no_library_splits_the_batch_before_the_hidden_dim(gpt):
    graph, tensors = gpt
    program = Program(graph)
    batch = program.flow("ids_BT", dim=0)
    hidden = program.flow("blocks.*.ffn.up", dim=-1)
    spread(program, {**batch, **hidden}, 2)
    assert program.verify(tensors).max_error < EXACT
    found = kinds(program, 2)
    # The batch is gathered before each feed-forward half, and its sum scattered after.
    assert found == {"all_gather": 4, "reduce_scatter": 4}


def test_micro_batches_flow_through_a_pipeline_in_the_order_given(mlp):
    graph, tensors = mlp
    program = Program(graph)
    batch = program.flow("x", dim=0)
    parts = [program.trans(op, Split(batch[op.op], 4)) for op in program.ops()]
    for stage, ops in enumerate((parts[:2], parts[2:])):
        for several in ops:
            program.assign(several, stage)
    # One at a time: the second stage is done with one before the first begins the next.
    for micro in range(3):
        program.order(parts[-1][micro], parts[0][micro + 1])
    frozen = program.freeze()
    names = [sub_op.name for sub_op in frozen.sub_ops]
    assert names[:8:4] == ["up:linear[a 0:1]", "up:linear[a 1:2]"]
    assert program.verify(tensors).max_error < EXACT
    assert kinds(program, 2) == {"send": 4}


def test_a_tensor_read_in_two_ways_by_one_operator_is_cut_twice():
    class Gram(nn.Module):
        def forward(self, x):
            return x @ x

    graph, tensors = traced(Gram(), torch.randn(6, 6))
    program = Program(graph)
    (part,) = program.ops()
    for device, piece in enumerate(program.trans(part, Split("m", 3))):
        program.assign(piece, device)
    assert program.verify(tensors).max_error < EXACT


def test_what_draws_random_numbers_is_not_verified():
    graph, tensors = traced(
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train(), torch.ones(2, 4)
    )
    program = Program(graph)
    program.assign(program.ops(), 0)
    with pytest.raises(UsageError, match=r"draws random numbers.*eval mode"):
        program.verify(tensors)


def test_what_is_missing_to_verify_is_named(mlp):
    graph, tensors = mlp
    program = Program(graph)
    program.assign(program.ops(), 2)
    with pytest.raises(UsageError, match=r"uses 3 devices and cpux2 has 2"):
        program.verify(tensors, find_cluster("cpux2"))
    with pytest.raises(UsageError, match=r"needs the tensors up\.weight"):
        program.verify({name: value for name, value in tensors.items() if name != "up.weight"})


class Small(nn.Module):
    """One of everything that splits: products, heads, a table, norms, sums and means."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.out = nn.Linear(8, 8)

    def forward(self, ids, targets):
        x = self.table(ids)
        q, k, v = (part(self.norm(x)).view(4, 6, -1, 2).transpose(1, 2) for part in self.qkv)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(4, 6, -1))
        logits = torch.einsum("btd,vd->btv", x, self.table.weight)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss, x.mean((0, 2)), x.sum(1), logits.softmax(-1)


@pytest.fixture(scope="module")
def small():
    ids = torch.randint(12, (4, 6), generator=torch.Generator().manual_seed(0))
    return traced(Small(), ids, ids.roll(1))


def _algorithms(program, part):
    """Every algorithm that divides a part in two or three."""
    found = program.annotation(part.op)
    # Replicas have to be divided alike; here they are not divided.
    for name in () if part.replica else found.splittable:
        low, high = part.interval(name, found)
        yield from (Split(name, num) for num in (2, 3) if (high - low) % num == 0)
    yield Replicate(2)


@settings(
    deadline=None,
    max_examples=25,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_random_programs_compute_what_the_model_does(small, data):
    graph, tensors = small
    program = Program(graph)
    for _ in range(data.draw(st.integers(1, 20))):
        part = data.draw(st.sampled_from(program.ops()))
        algorithms = list(_algorithms(program, part))
        if len(list(program.ops(part.op))) < 5:
            program.trans(part, data.draw(st.sampled_from(algorithms)))
    # Any order that keeps to the model's own, or is among the parts of one operator, has no cycle.
    parts = program.ops()
    for _ in range(data.draw(st.integers(0, 4))):
        first, second = sorted(data.draw(st.tuples(*[st.integers(0, len(parts) - 1)] * 2)))
        if first != second:
            program.order(parts[first], parts[second])
    # Replicas have to be apart: as many devices as an operator has parts, beginning anywhere.
    for op in graph.ops:
        first = data.draw(st.integers(0, 5))
        for index, part in enumerate(program.ops(op.name)):
            program.assign(part, (first + index) % 8)
    try:
        found = program.verify(tensors)
    except InfeasibleError as error:
        # Shares of a bias may be read by differing numbers of parts: refused, and never wrong.
        if "partial sums are read by" not in error.message:
            raise
        assume(False)
    assert found.max_error < EXACT


def test_an_exchange_is_taken_apart_where_parts_must_wait_for_its_readers(mlp):
    graph, tensors = mlp
    program = Program(graph)
    halves = program.trans("up:linear", Split(0, 2))
    # What reads both halves ties them together; a quarter needs only one of them.
    first, rest = program.trans(":gelu", Split("b", 2))
    quarters = program.trans(first, Split(0, 2))
    program.assign(program.ops(), 0)
    program.assign(halves[1], 1)
    program.order(quarters[0], halves[1])
    frozen = program.freeze()
    names = [sub_op.name for sub_op in frozen.sub_ops]
    assert names.index(quarters[0].name) < names.index(halves[1].name) < names.index(rest.name)
    assert program.verify(tensors).max_error < EXACT
