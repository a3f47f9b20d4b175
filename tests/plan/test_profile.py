"""Profiling finds every operator's time, and what is fitted gives it back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from toolkit import models
from toolkit.cost import roofline
from toolkit.cost.calibration import Calibration, Operator
from toolkit.cost.roofline import Coefficients
from toolkit.cost.work import Work
from toolkit.errors import UsageError
from toolkit.hardware import find_cluster
from toolkit.ir import interpret
from toolkit.plan import planner, predict, profile, subject
from toolkit.plan.predict import costs
from toolkit.plan.profile import operators
from toolkit.plan.profile.fit import Observation

CLUSTER = find_cluster("generic-cpux2")
DEVICE = CLUSTER.device(0)


def made_up(slow: float = 1.0) -> list[Observation]:
    """A device with known coefficients, on which `gelu` is slower than what else is elementwise."""
    true = {
        "elementwise": Coefficients(0.5, 0.7, 3e-6),
        "matmul": Coefficients(0.6, 0.5, 5e-6),
        "reduction": Coefficients(0.5, 0.4, 3e-6),
    }

    def seconds(*works: Work) -> float:
        return sum(roofline.evaluate(w, DEVICE, true[w.op_class], 1.0).seconds for w in works)

    found = []
    for power in range(10, 24):
        size = 2.0**power
        add = Work("elementwise", size, 8 * size, 4 * size)
        product = Work("matmul", 64 * size**1.2, 8 * size, 4 * size)
        bias = Work("reduction", size, 4 * size, 64)
        found += [
            Observation("aten.add", (add,), seconds(add)),
            Observation("aten.mul", (add,), seconds(add)),
            Observation("aten.gelu", (add,), slow * seconds(add)),
            Observation("aten.linear", (product,), seconds(product)),
            Observation(
                "aten.linear backward", (product, product, bias),
                seconds(product, product, bias),
            ),
            Observation("aten.view", (Work("view"),), 7e-6),
        ]  # fmt: skip
    return found


def predicted_s(found: Calibration, one: Observation) -> float:
    own = found.operator(one.name)
    works = sum(roofline.seconds(work, DEVICE, calibration=found) for work in one.works)
    return own.factor * works + own.overhead_s


def test_a_known_device_is_found():
    observations = made_up()
    found = profile.calibration(observations, DEVICE)
    for one in observations:
        assert predicted_s(found, one) == pytest.approx(one.seconds, rel=0.1)
    assert found.operator("aten.view") == Operator(overhead_s=pytest.approx(7e-6))


def test_an_operator_may_be_slower_than_its_class():
    observations = made_up(slow=4.0)
    found = profile.calibration(observations, DEVICE)
    for name in ("aten.gelu", "aten.add"):
        own = [one for one in observations if one.name == name]
        total = sum(predicted_s(found, one) for one in own)
        assert total == pytest.approx(sum(one.seconds for one in own), rel=1e-6)
    assert found.operator("aten.gelu").factor > 3 * found.operator("aten.add").factor


def test_it_survives_the_disk(tmp_path):
    found = profile.calibration(made_up(slow=2.0), DEVICE)
    found.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == found
    again = Calibration.load(tmp_path / "calibration.json")
    assert dict(again.operators) == dict(found.operators)


def test_a_calibration_of_a_slice_is_that_slices():
    found = profile.calibration(made_up(), DEVICE)
    assert found.coefficients("matmul", DEVICE) is not None
    with pytest.raises(UsageError, match="measured on"):
        found.coefficients("matmul", find_cluster("generic-cpux4").device(0))


def test_every_operator_is_seen_and_the_gradients_are_right():
    graph = subject.load("gpt-tiny", batch=2, tokens=8).graph
    module = models.load("gpt-tiny").build("cpu")
    args, _ = models.load("gpt-tiny").example(batch=2, tokens=8, device="cpu")
    tensors = {
        **interpret.weights(graph, module),
        **dict(zip(graph.inputs, args, strict=True)),
    }
    begun = []
    found = operators.observe(graph, tensors, lambda: begun.append(1))
    assert begun
    assert all(one.seconds > 0 for one in found)
    names = [one.name for one in found]
    for name in {op.kind for op in graph.ops}:
        assert names.count(name) == sum(op.kind == name for op in graph.ops)
    differentiated = [op for op in graph.ops if op.kind == "aten.linear"]
    assert names.count("aten.linear backward") == len(differentiated)
    seen = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.zero_grad()
    module(*args).backward()
    for name, parameter in module.named_parameters():
        assert torch.allclose(seen[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_prediction_follows_the_calibration():
    traced = subject.load("gpt-tiny", batch=8, tokens=16)
    plan = planner.make(traced, CLUSTER, "dp", num_ranks=2)
    found = profile.calibration(made_up(), DEVICE)
    base = predict.predict(plan, traced, CLUSTER, calibration=found).prediction
    slower = Calibration(
        found.device, found.classes, (),
        {**found.operators, "aten.linear": Operator(factor=50.0), costs.UPDATE: Operator(2.0, 1.0)},
    )  # fmt: skip
    more = predict.predict(plan, traced, CLUSTER, calibration=slower).prediction
    assert base is not None
    assert more is not None
    assert more.step_s > base.step_s + 1.0


def test_only_this_machines_cores_are_profiled():
    with pytest.raises(UsageError, match="cores"):
        profile.calibrate([("gpt-tiny", {"batch": 1})], find_cluster("h100x2"))
    with pytest.raises(UsageError, match="no model"):
        profile.observe([], 2)


def test_two_ranks_profile_together():
    seen = []
    found = profile.observe([("gpt-tiny", {"batch": 1, "tokens": 8})], 2, progress=seen.append)
    names = {one.name for one in found}
    assert {"aten.linear", "aten.linear backward", costs.UPDATE} <= names
    assert {costs.SPLIT_LINEAR, costs.SPLIT_UPDATE, costs.GATHER, costs.REDUCE} <= names


def test_what_a_runtime_adds_is_a_line():
    found = profile.calibration(
        [
            *made_up(),
            Observation(costs.GATHER, (), 1e-3 + 2e-9 * 1e5, 1e5),
            Observation(costs.GATHER, (), 1e-3 + 2e-9 * 1e7, 1e7),
            Observation(costs.SPLIT_LINEAR, (), 5e-4),
        ],
        DEVICE,
    )
    assert found.operator(costs.GATHER).overhead_s == pytest.approx(1e-3)
    assert found.operator(costs.GATHER).per_byte_s == pytest.approx(2e-9)
    assert found.operator(costs.SPLIT_LINEAR).overhead_s == pytest.approx(5e-4)


@pytest.mark.parametrize(
    ("strategy", "added"),
    [
        ("fsdp", costs.GATHER),
        ("fsdp", costs.REDUCE),
        ("fsdp", costs.SPLIT_UPDATE),
        ("tp", costs.SPLIT_LINEAR),
        ("tp", f"{costs.SPLIT_LINEAR} backward"),
        ("tp", costs.SPLIT_UPDATE),
        ("tp-sp", costs.SPLIT_LINEAR),
        ("tp-sp", f"{costs.SPLIT_LINEAR} backward"),
    ],
)
def test_what_a_runtime_adds_is_predicted_where_it_runs(strategy, added):
    traced = subject.load("gpt-tiny", batch=8, tokens=16)
    plain = profile.calibration(made_up(), DEVICE)
    slow = replace(plain, operators={**plain.operators, added: Operator(overhead_s=0.5)})

    def step_s(name, calibration):
        plan = planner.make(traced, CLUSTER, name, num_ranks=2, calibration=calibration)
        return plan.prediction.step_s

    assert step_s(strategy, slow) > step_s(strategy, plain) + 0.4
    assert step_s("dp", slow) == pytest.approx(step_s("dp", plain))


def test_linears_that_read_gathered_tokens_compute_all_of_them():
    """Sequence parallelism divides norms and residuals, and leaves a region's products as they
    are under tensor parallelism.
    """
    traced = subject.load("gpt-tiny", batch=8, tokens=64)
    plain = profile.calibration(made_up(), DEVICE)
    linear = {"aten.linear": Operator(factor=1e6), "aten.linear backward": Operator(factor=1e6)}
    slow = replace(plain, operators=linear)
    steps = [
        planner.make(traced, CLUSTER, name, num_ranks=2, calibration=slow).prediction.step_s
        for name in ("tp", "tp-sp")
    ]
    assert steps[1] == pytest.approx(steps[0], rel=0.02)
