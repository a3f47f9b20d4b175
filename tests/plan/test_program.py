"""Plans are written with three primitives; what cannot be, or cannot run, is refused by name."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from toolkit import ir
from toolkit.errors import InfeasibleError, UsageError
from toolkit.hardware import find_cluster
from toolkit.plan.program import FrozenProgram, Program, Replicate, Split, check
from toolkit.plan.tensors import Chunk, Mask


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))


@pytest.fixture(scope="module")
def mlp():
    return ir.trace(Mlp(), (torch.zeros(4, 8),), name="mlp", axes={})


@pytest.fixture
def program(mlp):
    return Program(mlp)


def test_operators_are_chosen_by_module_pattern_and_kind(tiny):
    program = Program(tiny.graph)
    blocks = 4
    assert [part.op for part in program.ops("blocks.1.ffn.up")] == ["blocks.1.ffn.up:linear"]
    assert len(program.ops("blocks.*.ffn.up")) == blocks
    assert len(program.ops("blocks.*.ffn")) == 3 * blocks
    assert len(program.ops("blocks.*", kind="linear")) == 6 * blocks
    assert program.ops("blocks.1.ffn.up:linear") == program.ops(
        "blocks.1.ffn.up", kind="aten.linear"
    )
    assert len(program.ops()) == len(tiny.graph.ops)
    with pytest.raises(
        UsageError, match=r"unknown .*'blocks.0.fnn.up'; did you mean 'blocks.0.ffn.up'"
    ):
        program.ops("blocks.0.fnn.up")
    with pytest.raises(UsageError, match=r"unknown kind .* 'liner'.* did you mean 'linear'"):
        program.ops("blocks.0", kind="liner")


def test_splitting_changes_the_masks_of_the_operator_alone(program):
    first, second = program.trans("up:linear", Split("n", 2))
    found = program.annotation("up:linear")
    assert [str(mask) for _, mask in second.reads(found)] == ["[0:4, 0:8]", "[6:12, 0:8]", "[6:12]"]
    assert [str(mask) for mask in first.outputs(found)] == ["[0:4, 0:6]"]
    assert [part.name for part in program.ops()] == [
        "up:linear[n 0:6]", "up:linear[n 6:12]", ":gelu", "down:linear",
    ]  # fmt: skip


def test_the_bias_of_a_split_sum_is_shared_out(program):
    parts = program.trans("down:linear", Split("k", 2))
    found = program.annotation("down:linear")
    for index, part in enumerate(parts):
        x, weight, bias = (mask for _, mask in part.reads(found))
        assert (x.box[1], weight.box[1]) == ((6 * index, 6 * index + 6),) * 2
        assert bias == Mask(((0, 8),), Chunk.part(index, 2))
        assert part.outputs(found)[0].chunk == Chunk.part(index, 2)


def test_algorithms_compose_on_the_parts(program):
    names = []
    for part in program.trans("down:linear", Split(0, 2)):
        for half in program.trans(part, Split("k", 3)):
            names += [copy.name for copy in program.trans(half, Replicate(2))]
    assert len(set(names)) == 12
    assert names[:3] == ["down:linear[a 0:2, k 0:4]#0", "down:linear[a 0:2, k 0:4]#1",
                         "down:linear[a 0:2, k 4:8]#0"]  # fmt: skip
    # One half of a sum split further is still whole.
    for name in names[-2:]:
        program.trans(name, Split("k", 2))
    program.assign(program.ops("up", ":gelu"), 0)
    for device, part in enumerate(program.ops("down")):
        program.assign(part, device)
    program.freeze()


@pytest.mark.parametrize(
    ("part", "algorithm", "message"),
    [
        ("up:linear", Split("z", 2), "cannot be split along 'z'; of .* these can: a .4., k .8., n"),
        (
            "up:linear",
            Split("n", 5),
            r"5 parts do not divide n=12 of up:linear; use 2, 3, 4, 6, 12",
        ),
        ("up:linear", Split(2, 2), "cannot be split along dim 2 of its output"),
        ("up:linear", Split("n", 0), "cannot be divided into 0 parts"),
        ("up:linar", Split("n", 2), "unknown part or operator .*did you mean 'up:linear'"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_what_can(program, part, algorithm, message):
    with pytest.raises(UsageError, match=message):
        program.trans(part, algorithm)


def test_a_dim_that_stays_whole_is_refused(tiny):
    program = Program(tiny.graph)
    with pytest.raises(UsageError, match="layer_norm cannot be split along 'c'; of 'a b c"):
        program.trans("final_norm:layer_norm", Split("c", 2))


def test_a_part_that_was_divided_is_no_more(program):
    program.trans("up:linear", Split("n", 2))
    with pytest.raises(UsageError, match=r"up:linear was divided into up:linear\[n 0:6\]"):
        program.assign("up:linear", 0)


def test_a_flow_follows_a_dim_until_it_is_summed_or_needed_whole(tiny):
    program = Program(tiny.graph)
    hidden = program.flow("blocks.0.ffn.up", dim=-1)
    assert hidden == {"blocks.0.ffn.up:linear": "n", "blocks.0.ffn:gelu": "c",
                      "blocks.0.ffn.down:linear": "k"}  # fmt: skip
    batch = program.flow("ids_BT", dim=0)
    assert ":arange" not in batch
    assert {part.op for part in program.ops("blocks")} <= set(batch)
    assert ":cross_entropy_loss" in batch
    with pytest.raises(UsageError, match="did you mean 'ids_BT'"):
        program.flow("ids_TB", dim=0)
    with pytest.raises(UsageError, match="has no dim 2"):
        program.flow("ids_BT", dim=2)


def test_every_part_needs_a_device(program):
    program.assign(program.ops("up"), 0)
    with pytest.raises(UsageError, match="2 of 3 parts have no device: :gelu, down:linear"):
        program.freeze()
    with pytest.raises(UsageError, match="no device -1"):
        program.assign(program.ops(), -1)


def test_parts_inherit_device_and_order(program):
    program.assign(program.ops(), 1)
    one, other = program.trans("up:linear", Split(0, 2))
    program.order(one, other)
    program.trans(one, Split("n", 2))
    frozen = program.freeze()
    assert frozen.devices == (1,)
    assert frozen.order == (("up:linear[a 0:2, n 0:6]", "up:linear[a 2:4]"),
                            ("up:linear[a 0:2, n 6:12]", "up:linear[a 2:4]"))  # fmt: skip


def test_dependencies_come_from_masks_that_overlap(program):
    program.trans("up:linear", Split(0, 2))
    program.trans(":gelu", Split(0, 4))
    program.assign(program.ops(), 0)
    waits = program.freeze().dependencies
    assert set(waits.predecessors(":gelu[a 1:2]")) == {"up:linear[a 0:2]"}
    assert set(waits.predecessors(":gelu[a 2:3]")) == {"up:linear[a 2:4]"}
    assert len(set(waits.predecessors("down:linear"))) == 4
    assert waits.edges["up:linear[a 0:2]", ":gelu[a 1:2]"]["why"] == ("up:linear",)


def test_a_consumer_waits_for_the_replica_beside_it(program):
    for name in ("up:linear", ":gelu"):
        for device, part in enumerate(program.trans(name, Replicate(2))):
            program.assign(part, device)
    program.assign("down:linear", 1)
    frozen = program.freeze()
    assert list(frozen.dependencies.predecessors("down:linear")) == [":gelu#1"]
    assert frozen.communication(find_cluster("cpux2")) == "nothing is communicated"


def test_a_cycle_names_the_operators(program):
    program.assign(program.ops(), 0)
    program.order("down:linear", "up:linear")
    with pytest.raises(InfeasibleError, match="can never run") as caught:
        program.freeze()
    for step in ("up:linear -> :gelu (up:linear)", "down:linear -> up:linear (ordered)"):
        assert step in caught.value.message
    with pytest.raises(UsageError, match="cannot run before itself"):
        program.order(":gelu", ":gelu")


def test_a_missing_piece_is_named(program):
    program.trans("up:linear", Split("n", 3))
    program.trans("down:linear", Split("k", 2))
    program.assign(program.ops(), 0)
    frozen = program.freeze()

    def without(name):
        kept = tuple(sub_op for sub_op in frozen.sub_ops if sub_op.name != name)
        return dataclasses.replace(frozen, sub_ops=kept)

    with pytest.raises(
        UsageError, match=r":gelu reads up:linear, and its part \[0:4, 4:8\] is missi"
    ):
        check.check(without("up:linear[n 4:8]"))
    with pytest.raises(
        UsageError, match=r"output of mlp, and its part \[0:4, 0:8\] is missing: .*v0/2"
    ):
        check.check(without("down:linear[k 6:12]"))
    with pytest.raises(UsageError, match=r"down:linear.* reads :gelu, .* nothing makes that"):
        check.check(without(":gelu"))


def test_replicas_on_one_device_are_refused(program):
    program.trans("up:linear", Replicate(2))
    program.assign(program.ops(), 0)
    with pytest.raises(UsageError, match="up:linear#0 and up:linear#1 do the same on device 0"):
        program.freeze()


def test_replicas_divided_differently_are_refused(program):
    program.assign(program.ops(":gelu", "down"), 0)
    for device, part in enumerate(program.trans("up:linear", Replicate(2))):
        program.assign(program.trans(part, Split("n", device + 2)), device)
    with pytest.raises(UsageError, match=r"replicas of up:linear are divided differently"):
        program.freeze()


def test_co_shards_run_one_after_another_on_one_device(program):
    hidden = program.flow("up", dim=-1)
    shards = program.co_shard(program.ops(*hidden), hidden, 3)
    program.assign(program.ops(), 0)
    frozen = program.freeze()
    done = [sub_op.name for sub_op in frozen.sub_ops]
    assert done == [part.name for shard in shards for part in shard]
    assert {s.recompute for s in frozen.sub_ops} == {
        f"up:linear to down:linear {i}/3" for i in range(3)
    }
    program.assign(shards[1], 1)
    with pytest.raises(UsageError, match=r"up:linear to down:linear is on devices \[0, 1\]"):
        program.freeze()
    with pytest.raises(UsageError, match="co-shard has no dim for :gelu"):
        program.co_shard(program.ops(":gelu"), {}, 2)


def test_a_frozen_program_survives_a_file(program):
    program.trans("down:linear", Split("k", 2))
    program.assign(program.ops(), 0)
    program.order("up:linear", ":gelu")
    frozen = program.freeze()
    body = json.loads(json.dumps(frozen.to_body()))
    assert FrozenProgram.from_body(body) == frozen
    body["sub_ops"] = body["sub_ops"][1:]
    with pytest.raises(UsageError, match="up:linear is ordered and not part of mlp"):
        FrozenProgram.from_body(body)
