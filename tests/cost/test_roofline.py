"""The roofline's shape: monotone in work and share, continuous at saturation, below the peaks."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from toolkit.cost import roofline
from toolkit.cost.roofline import Coefficients, Saturation
from toolkit.cost.work import OP_CLASSES, Work
from toolkit.errors import UsageError
from toolkit.hardware import Share, catalogue, find_device
from toolkit.hardware.device import UnitRate

DEVICES = sorted(catalogue.builtin().devices)
OPS = [op for op in OP_CLASSES if op != "view"]
flops = st.floats(0, 1e16)
num_bytes = st.floats(0, 1e12)


@given(st.sampled_from(DEVICES), st.sampled_from(OPS), flops, num_bytes, flops, num_bytes)
def test_more_work_never_takes_less_time(name, op, f1, b1, f2, b2):
    device = find_device(name)
    low = Work(op, min(f1, f2), min(b1, b2))
    high = Work(op, max(f1, f2), max(b1, b2))
    assert roofline.seconds(low, device) <= roofline.seconds(high, device)


@given(st.sampled_from(DEVICES), st.sampled_from(OPS), flops, num_bytes)
def test_nothing_beats_the_peaks(name, op, f, b):
    device = find_device(name)
    work = Work(op, f, b)
    floor = max(f / device.peak("float32"), b / device.memory_bandwidth)
    assert roofline.seconds(work, device) >= floor + device.launch_overhead_s


@given(
    st.sampled_from(["h100", "l20", "generic-cpu"]), st.sampled_from(OPS), flops, num_bytes,
    st.data(),
)  # fmt: skip
def test_a_larger_share_is_never_slower(name, op, f, b, data):
    device = find_device(name)
    step = device.unit_granularity[0]
    sizes = st.integers(1, device.num_units // step).map(lambda k: Share(device, k * step))
    shares = sorted([data.draw(sizes), data.draw(sizes)], key=lambda share: share.fraction)
    small, large = (roofline.seconds(Work(op, f, b), device, share=share) for share in shares)
    assert small >= large * (1 - 1e-12)
    assert large >= roofline.seconds(Work(op, f, b), device) * (1 - 1e-12)


@given(st.floats(0.05, 1), st.floats(0, 1), st.floats(0.01, 1))
def test_saturation_is_continuous_monotone_and_one_at_the_whole(point, slope, share):
    one = Saturation(point, slope)
    assert one.scale(1.0) == pytest.approx(1)
    assert one.scale(share) <= 1 + 1e-12
    near = 1e-9
    assert one.scale(max(point - near, near)) == pytest.approx(one.scale(min(point + near, 1)))
    # Past the point the time is c / (C (R + lambda (r - R))), relative to that of the whole.
    assume(share >= point)
    whole = point + slope * (1 - point)
    assert one.scale(share) == pytest.approx((point + slope * (share - point)) / whole)


def test_default_saturations_repeat_the_published_shapes():
    h100 = find_device("h100")
    prefill = roofline.default_coefficients("matmul", h100).compute_saturation
    decode = roofline.default_coefficients("attention", h100).memory_saturation
    assert prefill.scale(0.3) / prefill.scale(0.4) <= 0.75 + 1e-9  # over 25 % faster
    assert prefill.scale(0.7) / prefill.scale(0.8) == pytest.approx(0.9, abs=0.02)
    assert decode.scale(0.5) / decode.scale(0.6) > 0.97  # under 3 %


def test_small_matrices_do_not_reach_the_peak():
    device = find_device("h100")

    def rate(n):
        work = Work("matmul", 2 * n**3, 4 * n * n, 2 * n * n, "bfloat16")
        return work.flops / roofline.seconds(work, device) / device.peak("bfloat16")

    rates = [rate(n) for n in (128, 512, 2048, 8192)]
    assert rates == sorted(rates)
    assert rates[0] < 0.01
    assert 0.6 < rates[-1] < 0.75


def test_what_binds():
    device = find_device("a100")
    assert roofline.estimate(Work("matmul", 1e13, 1e6), device).bound == "compute"
    assert roofline.estimate(Work("elementwise", 1e6, 1e9), device).bound == "memory"
    assert roofline.estimate(Work("norm", 10, 10), device).bound == "overhead"
    assert roofline.estimate(Work("view"), device).seconds == 0


def test_vector_work_does_not_run_on_matrix_units():
    device = find_device("h100")
    work = Work("elementwise", 1e12, 0, dtype="bfloat16")
    assert roofline.arithmetic_peak(work, device) == device.peak("float32")
    # Integers and booleans have no matrix peak and need none.
    assert roofline.seconds(Work("gather", 1e6, 1e6, dtype="int64"), device) > 0


def test_errors():
    device = find_device("v100")
    with pytest.raises(UsageError, match="no bfloat16 peak"):
        roofline.seconds(Work("matmul", 1e9, dtype="bfloat16"), device)
    with pytest.raises(UsageError, match="share is one of l4"):
        roofline.seconds(Work("norm"), device, share=Share.whole(find_device("l4")))
    with pytest.raises(UsageError, match=r"a share of a device is in \(0, 1\]"):
        roofline.evaluate(Work("norm"), device, Coefficients(1, 1, 0), 0.0)
    with pytest.raises(UsageError, match="saturation needs"):
        Saturation(0.0, 0.5)


def test_measured_unit_rates_decide_how_a_cpu_scales():
    import dataclasses

    rates = (
        UnitRate(1, {"float32": 90e9}, 16e9),
        UnitRate(2, {"float32": 180e9}, 20e9),
    )
    device = dataclasses.replace(
        find_device("generic-cpu"), num_units=2, unit_rates=rates, measured=True,
        peak_flops={"float32": 180e9}, memory_bandwidth=20e9,
    )  # fmt: skip
    half = Share(device, 1)
    read = Work("copy", 0, 1e9)
    overhead = device.launch_overhead_s
    slower = roofline.seconds(read, device, share=half) - overhead
    assert slower / (roofline.seconds(read, device) - overhead) == pytest.approx(20 / 16, rel=0.02)
    gemm = Work("matmul", 1e12)
    ratio = roofline.seconds(gemm, device, share=half) / roofline.seconds(gemm, device)
    assert ratio == pytest.approx(2, rel=0.01)
    assert device.sliced(1).memory_bandwidth == 16e9
