"""The cost model fitted to steps: it finds what made them, keeps it whole, and knows its own."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from toolkit.cli import main
from toolkit.cost.roofline import Coefficients, Saturation
from toolkit.errors import FormatError, UsageError
from toolkit.hardware import find_device
from toolkit.serve import divide
from toolkit.serve.assemble import Assembly, EngineSettings, build
from toolkit.serve.calibrate import Bench
from toolkit.serve.executor.phases import PhasedCpuExecutor
from toolkit.serve.model.native import NativeDecoder
from toolkit.serve.request import Phase
from toolkit.serve.split import layouts
from toolkit.serve.split.calibration import (
    Point,
    ServeCalibration,
    default_path,
    fit,
    predicted_s,
)
from toolkit.serve.split.controller import Dynamic
from toolkit.serve.split.cost_model import StepOverhead
from toolkit.serve.split.settings import SplitSettings
from toolkit.serve.split.work import Load

sys.path.append(str(Path(__file__).parent))
from split_cases import by_hand
from tiny_models import tiny_model

DEVICE = replace(find_device("generic-cpu").sliced(4), num_units=4)
CURVES = Saturation(0.25, 0.8), Saturation(0.25, 0.4)
TRUTH = ServeCalibration(
    "a processor",
    DEVICE,
    by_hand("float32"),
    products=Coefficients(0.5, 0.6, 0.0, *CURVES),
    attention=Coefficients(0.2, 0.3, 0.0, *CURVES),
    rows=Coefficients(0.5, 0.8, 0.0, *CURVES),
    overhead=StepOverhead(2e-3, 1e-4),
    bandwidth=1.5e10,
)


def made_up(noise: float = 0.0) -> list[Point]:
    """What a device that is exactly like TRUTH would have measured."""
    source, cost, points = random.Random(5), TRUTH.cost_model(), []
    chunks = [Load.chunk(start, start + n) for n in (16, 64, 256) for start in (0, 500, 1500)]
    decodes = [Load.decoding(n, n * c) for n in (1, 2, 4, 8, 16, 32) for c in (50, 300, 1000)]
    wanted = [(load, Load(), units, None) for load in chunks for units in (1, 2, 3, 4)]
    wanted += [(Load(), load, units, None) for load in decodes for units in (1, 2, 3, 4)]
    wanted += [(chunk, decode, 4, None) for chunk in chunks[:4] for decode in decodes[:4]]
    wanted += [(chunk, Load(), 2, decode) for chunk in chunks for decode in decodes[::3]]
    wanted += [(Load(), decode, 2, chunk) for chunk in chunks for decode in decodes[::3]]
    for prefill, decode, units, beside in wanted:
        point = Point(prefill, decode, units, 1.0, beside)
        seconds = predicted_s(cost, point) * source.lognormvariate(0.0, noise)
        points.append(replace(point, seconds=seconds))
    return points


@pytest.fixture(scope="module")
def found() -> ServeCalibration:
    return fit(made_up(0.03), TRUTH.work, DEVICE, "a processor")


def test_it_finds_what_made_the_steps(found: ServeCalibration) -> None:
    assert set(found.errors) == {
        *("prefill", "decode", "mixed", "prefill beside the other", "decode beside the other"),
    }
    for name, errors in found.errors.items():
        assert errors.fitted.median < 0.06, name
        assert errors.held_out is not None
        assert errors.held_out.median < 0.06, name
        assert errors.held_out.num_samples > 0
    # Of a model it has never seen at these sizes, on shares it has.
    truth, cost = TRUTH.cost_model(), found.cost_model()
    for load in (Load.chunk(700, 828), Load.chunk(0, 400)):
        for share in (0.25, 0.5, 1.0):
            wanted = truth.alone(load, Phase.PREFILL, share).seconds
            assert cost.alone(load, Phase.PREFILL, share).seconds == pytest.approx(wanted, rel=0.1)


def test_the_file_is_whole_and_knows_its_model(found: ServeCalibration, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    found.save(path)
    again = ServeCalibration.load(path)
    # Of the device only what the cost model asks for is kept.
    assert replace(again, device=found.device) == found
    assert dict(again.errors) == dict(found.errors)
    point = made_up()[7]
    assert predicted_s(again.cost_model(), point) == predicted_s(found.cost_model(), point)
    again.check(TRUTH.work, 4, "a processor")
    with pytest.raises(UsageError, match="another processor: a processor, and this is another"):
        again.check(TRUTH.work, 4, "another")
    with pytest.raises(UsageError, match="another threads: 4, and this is 2"):
        again.check(TRUTH.work, 2, "a processor")
    with pytest.raises(UsageError, match="as it is held here; run"):
        again.check(by_hand(), 4, "a processor")
    path.write_text(path.read_text()[:-100])
    with pytest.raises(FormatError, match="corrupt"):
        ServeCalibration.load(path)


def test_a_file_that_lacks_something_is_refused(found: ServeCalibration, tmp_path: Path) -> None:
    from toolkit import record

    path = tmp_path / "kept.json"
    found.save(path)
    body = json.loads(path.read_text())["body"]
    for name in ("bandwidth", "products", "work"):
        less = {key: value for key, value in body.items() if key != name}
        record.write(path, kind="serve-calibration", version=1, body=less)
        with pytest.raises(FormatError, match="not a whole calibration"):
            ServeCalibration.load(path)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(UsageError, match="too few"):
        fit(made_up()[:5], TRUTH.work, DEVICE, "a processor")


SETTINGS = EngineSettings(
    threads=2, kv_bytes=2**22, max_context=256, max_batch=4, step_tokens=64,
    split=SplitSettings("auto"),
)  # fmt: skip


def test_real_steps_are_measured_on_every_share(tmp_path: Path) -> None:
    _, executor = build(tiny_model(), SETTINGS)
    assert isinstance(executor, PhasedCpuExecutor)
    executor.start()
    bench = Bench(executor, max_batch=4, step_tokens=64, max_context=256)
    points = [bench.measure(trial, seconds=0.0) for trial in bench.trials()]
    executor.close()
    assert {(point.kind, point.units) for point in points if point.beside is None} == {
        (Phase.PREFILL, 1), (Phase.PREFILL, 2), (Phase.DECODE, 1), (Phase.DECODE, 2), (None, 2),
    }  # fmt: skip
    assert sum(point.beside is not None for point in points) >= 4
    assert all(point.seconds > 0 for point in points)
    decoder = executor.decoder
    assert isinstance(decoder, NativeDecoder)
    work, device = divide.work_of(decoder), divide.device_of(2)
    path = tmp_path / "kept.json"
    fit(points, work, device, divide.processor_name()).save(path)
    chosen = replace(SETTINGS, split=SplitSettings("auto", calibration=path))
    calibrated, _ = build(tiny_model(), chosen)
    controller = calibrated.controller  # type: ignore[attr-defined]
    assert isinstance(controller, Dynamic)
    assert controller.cost.bandwidth == ServeCalibration.load(path).bandwidth
    assert layouts.undivided(controller.cost.device) in controller.layouts
    with pytest.raises(UsageError, match="another model, as it is held here"):
        build(tiny_model(), replace(chosen, quantize="int8"))
    assert [str(layout) for layout in controller.layouts] == ["undivided", "1 | 1"]


def test_work_read_off_the_weights_is_the_traced_graphs() -> None:
    """FLOPs of a float32 model, which both count: products and attention."""
    _, executor = build(tiny_model(), SETTINGS)
    assert isinstance(executor, PhasedCpuExecutor)
    work = divide.work_of(executor.decoder)
    config = executor.decoder.config
    matrices = 2 * (32 * (4 + 4) * 8 + 32 * 32 + 3 * 32 * 48)
    load = Load.chunk(10, 30, samples=1)
    products = 2.0 * matrices * load.tokens + 2.0 * 32 * 49_152
    attention = 2 * 4.0 * 32 * load.pairs
    norms = 2 * 2 * 8.0 * 32 * load.tokens
    # Heads are padded to whole panels.
    assert work.flops(load) == pytest.approx(products + attention + norms, rel=0.05)
    assert work.kv_bytes_per_token == 2 * config.num_layers * 2 * 8 * 4


class TestCommandLine:
    @pytest.fixture
    def tiny(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A small model under any name, few steps of it, and no time for each."""
        monkeypatch.setattr(
            "toolkit.serve.assemble.assemble",
            lambda ref, settings: Assembly(*build(tiny_model(), settings), None),  # type: ignore[arg-type]
        )
        measure = Bench.measure
        monkeypatch.setattr(
            Bench, "measure", lambda bench, trial: measure(bench, trial, seconds=0.0)
        )

    OPTIONS = ("--threads", "2", "--max-batch", "4", "--step-tokens", "64", "--max-context", "256")

    def test_measured_here_and_simulated_with(self, tiny: None, tmp_path: Path) -> None:
        path = tmp_path / "kept.json"
        done = CliRunner().invoke(
            main.app, ["serve", "calibrate", "tiny", *self.OPTIONS, "-o", str(path), "--json"]
        )
        assert done.exit_code == 0, done.output
        body = json.loads(done.stdout)
        assert body["errors"]["decode"]["held_out"]["num_samples"] > 0
        assert len(body["points"]) == body["num_points"] > 12
        simulated = [
            *("serve", "simulate", "tiny", "--calibration", str(path), "--json", "--num", "5"),
            *("--system", "auto,chunked-spf", "--max-batch", "4", "--step-tokens", "64"),
        ]
        done = CliRunner().invoke(main.app, simulated)
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert found["source"] == "simulated"
        assert found["device"] == ServeCalibration.load(path).device.name
        simulated[2] = "other"
        done = CliRunner().invoke(main.app, simulated)
        assert isinstance(done.exception, UsageError)
        assert "measured for tiny on one device, not for other" in str(done.exception)

    def test_its_table_tells_errors_and_where_the_file_is(
        self, tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path))
        done = CliRunner().invoke(main.app, ["serve", "calibrate", "tiny", *self.OPTIONS])
        assert done.exit_code == 0, done.output
        for word in ("held out", "median", "decode beside the other", "tiny-none-2.json"):
            assert word in " ".join(done.output.replace("\n", "").split())
        assert default_path("tiny", "none", 2).is_file()
