from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from toolkit.errors import UsageError
from toolkit.plan import export, planner
from toolkit.plan.order import families
from toolkit.plan.plan import Axis, Split, Stage

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture(scope="module")
def plans(tiny, two_ranks):
    return {name: planner.make(tiny, two_ranks, name) for name in ("dp", "fsdp", "tp", "1f1b")}


def torchtitan(plan, tiny) -> dict:
    return tomllib.loads(
        export.export(plan, "torchtitan", tiny.graph.modules).files["torchtitan.toml"]
    )


def test_torchtitan_gets_the_mesh_the_schedule_and_the_batch(plans, tiny) -> None:
    degrees = {name: torchtitan(plan, tiny)["parallelism"] for name, plan in plans.items()}
    assert degrees["dp"]["data_parallel_replicate_degree"] == 2
    assert degrees["fsdp"]["data_parallel_shard_degree"] == 2
    assert degrees["tp"]["tensor_parallel_degree"] == 2
    pipeline = degrees["1f1b"]
    assert (pipeline["pipeline_parallel_degree"], pipeline["pipeline_parallel_schedule"]) == (
        2,
        "1F1B",
    )
    assert pipeline["pipeline_parallel_split_points"] == ["blocks.2"]
    training = torchtitan(plans["1f1b"], tiny)["training"]
    assert training == {
        "local_batch_size": 8,
        "global_batch_size": 8,
        "seq_len": tiny.graph.sizes["tokens"],
    }


def test_every_degree_multiplies_to_the_number_of_ranks(plans, tiny) -> None:
    for plan in plans.values():
        found = torchtitan(plan, tiny)["parallelism"]
        product = 1
        for key, value in found.items():
            product *= value if key.endswith("_degree") else 1
        assert product == plan.num_ranks


def test_a_table_torch_has_no_name_for_goes_as_a_file(plans, tiny) -> None:
    plan = plans["1f1b"]
    other = families.build("zb-h1", 2, plan.microbatches)
    custom = replace(plan, schedule="custom", order=other.rows)
    made = export.export(custom, "torchtitan", tiny.graph.modules)
    found = tomllib.loads(made.files["torchtitan.toml"])["parallelism"]
    assert found["pipeline_parallel_schedule_csv"] == "schedule.csv"
    assert made.files["schedule.csv"].startswith("0F0,0F1,")


def test_accelerate_reads_what_is_written(plans, tiny, tmp_path) -> None:
    config = pytest.importorskip("accelerate.commands.config.config_args")
    made = export.export(plans["fsdp"], "accelerate", tiny.graph.modules)
    path = tmp_path / "accelerate.yaml"
    path.write_text(made.files["accelerate.yaml"])
    found = config.load_config_from_file(str(path))
    assert found.num_processes == 2
    assert found.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] == "Block"
    assert "--config_file accelerate.yaml" in made.command


@pytest.mark.parametrize(
    ("change", "form", "message"),
    [
        ({"splits": (Split("blocks.*.ffn.up", "n", "data"),)}, "torchtitan", "one by one"),
        ({"stages": (Stage(None, (), (0, 1)),)}, "accelerate", "several positions"),
        ({"stages": (Stage(None, (), (0,), no_grad=True),)}, "torchtitan", "without gradient"),
        ({"mesh": (Axis("pipeline", 2),)}, "accelerate", "cannot express pipeline"),
        ({}, "torchtitam", "did you mean 'torchtitan'"),
    ],
)
def test_what_a_tool_cannot_express_is_refused_by_name(change, form, message, plans, tiny) -> None:
    with pytest.raises(UsageError, match=message):
        export.export(replace(plans["dp"], **change), form, tiny.graph.modules)
