"""Calibration recovers known coefficients, reports its error, and survives the disk."""

from __future__ import annotations

import json
import random

import pytest

from toolkit.cost import calibration, roofline
from toolkit.cost.calibration import Calibration, Measurement
from toolkit.cost.roofline import Coefficients, Saturation
from toolkit.cost.work import Work
from toolkit.errors import FormatError, UsageError
from toolkit.hardware import find_cluster, find_device

DEVICE = find_device("a100")
TRUE = Coefficients(0.62, 0.71, 9e-6)


def measurements(true=TRUE, *, noise=0.0, shares=(1.0,), count=60, op="matmul", seed=0):
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        work = Work(op, 10 ** rng.uniform(6, 13), 10 ** rng.uniform(4, 10), 0, "bfloat16")
        share = rng.choice(shares)
        seconds = roofline.evaluate(work, DEVICE, true, share).seconds
        found.append(Measurement(work, seconds * rng.uniform(1 - noise, 1 + noise), share))
    return found


def test_known_coefficients_are_recovered():
    fit = calibration.fit(measurements(), DEVICE).classes["matmul"]
    got = fit.coefficients
    assert got.compute_efficiency == pytest.approx(0.62, rel=1e-2)
    assert got.memory_efficiency == pytest.approx(0.71, rel=1e-2)
    assert got.overhead_s == pytest.approx(9e-6, rel=1e-2)
    assert fit.fitted.maximum < 0.01
    assert fit.held_out is not None
    assert fit.held_out.maximum < 0.01
    assert (fit.fitted.num_samples, fit.held_out.num_samples) == (45, 15)


def test_saturation_is_recovered_from_several_shares():
    true = Coefficients(0.6, 0.7, 8e-6, Saturation(0.55, 0.4), Saturation(0.3, 0.15))
    data = measurements(true, noise=0.01, shares=(0.2, 0.4, 0.6, 0.8, 1.0), count=120)
    got = calibration.fit(data, DEVICE).classes["matmul"].coefficients
    for name in ("compute_saturation", "memory_saturation"):
        for share in (0.2, 0.5, 0.8):
            expected = getattr(true, name).scale(share)
            assert getattr(got, name).scale(share) == pytest.approx(expected, rel=0.05)


def test_noise_shows_up_in_the_reported_error():
    quiet = calibration.fit(measurements(noise=0.01), DEVICE).classes["matmul"].held_out
    loud = calibration.fit(measurements(noise=0.3), DEVICE).classes["matmul"].held_out
    assert quiet is not None
    assert loud is not None
    assert quiet.p90 < 0.02 < 0.1 < loud.p90 < 0.5


def test_one_wild_measurement_does_not_move_the_fit():
    data = measurements()
    data[7] = Measurement(data[7].work, data[7].seconds * 50)
    got = calibration.fit(data, DEVICE, held_out=0.0).classes["matmul"]
    assert got.coefficients.compute_efficiency == pytest.approx(0.62, rel=0.1)
    assert got.fitted.maximum > 0.9  # and is not hidden
    assert got.held_out is None


def test_what_was_not_seen_keeps_its_default():
    data = [
        Measurement(Work("norm", 0.0, size), 1e-5 + size / (0.5 * DEVICE.memory_bandwidth))
        for size in (1e7, 1e8, 1e9, 1e10, 2e10, 5e10)
    ]
    made = calibration.fit([*data, Measurement(Work("conv", 1e9), 1.0)], DEVICE, held_out=0.0)
    default = roofline.default_coefficients("norm", DEVICE)
    got = made.classes["norm"].coefficients
    assert got.memory_efficiency == pytest.approx(0.5, rel=0.02)
    assert got.compute_efficiency == pytest.approx(default.compute_efficiency, rel=0.02)
    assert any("norm: nothing measured is compute-bound" in note for note in made.notes)
    assert any("conv: 1 measurements" in note for note in made.notes)
    assert "conv" not in made.classes


def test_the_roofline_uses_it():
    made = calibration.fit(measurements(), DEVICE)
    work = Work("matmul", 1e12, 1e8, dtype="bfloat16")
    expected = roofline.evaluate(work, DEVICE, TRUE, 1.0).seconds
    assert roofline.seconds(work, DEVICE, calibration=made) == pytest.approx(expected, rel=0.01)
    other = Work("norm", 1e6, 1e9)
    assert roofline.seconds(other, DEVICE, calibration=made) == roofline.seconds(other, DEVICE)
    with pytest.raises(UsageError, match="measured on a100-80g, not on h100-sxm"):
        roofline.seconds(work, find_device("h100"), calibration=made)


def test_a_slice_of_a_device_uses_its_calibration():
    half = find_cluster("generic-cpux2").device(0)
    made = Calibration("generic-cpu", {})
    assert made.coefficients("matmul", half) is None


def test_saved_and_loaded_are_equal(tmp_path):
    path = tmp_path / "calibration.json"
    made = calibration.fit(measurements(noise=0.05, shares=(0.3, 0.6, 1.0)), DEVICE)
    made.save(path)
    again = Calibration.load(path)
    assert again == made
    assert again.classes == made.classes


def test_bad_files(tmp_path):
    path = tmp_path / "calibration.json"
    with pytest.raises(UsageError, match="no such file"):
        Calibration.load(path)
    calibration.fit(measurements(), DEVICE).save(path)
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "version": 99}))
    with pytest.raises(FormatError, match="version 99"):
        Calibration.load(path)
    whole["body"]["classes"]["matmul"]["coefficients"]["overhead_s"] = 1.0
    path.write_text(json.dumps(whole))
    with pytest.raises(FormatError, match="digest"):
        Calibration.load(path)
    from toolkit import record

    record.write(path, kind="calibration", version=1, body={"device": "x"})
    with pytest.raises(FormatError, match="not a whole calibration"):
        Calibration.load(path)


def test_nothing_to_fit():
    with pytest.raises(UsageError, match="no op class has 4 measurements"):
        calibration.fit(measurements(count=2), DEVICE)
    with pytest.raises(UsageError, match="held_out"):
        calibration.fit(measurements(), DEVICE, held_out=1.0)
    with pytest.raises(UsageError, match="seconds > 0"):
        Measurement(Work("matmul"), 0.0)
