"""`toolkit serve simulate`: serving systems compared on a device that need not be here."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit.cli import view
from toolkit.cli.serve import simulate_programs
from toolkit.cli.serve.bench import parse_rates, shown
from toolkit.cli.trace import Dtype, traced
from toolkit.errors import UsageError, require
from toolkit.units import format_bytes, format_seconds, parse_bytes, parse_seconds

if TYPE_CHECKING:
    from toolkit.serve.bench.load import Arrival
    from toolkit.serve.simulate.systems import Setup
    from toolkit.serve.split.cost_model import CostModel

_SYSTEMS = "chunked,chunked-spf,split-spf,auto"
_PROGRAM_HELP = "Agents' programs instead: sharegpt, bfcl, lats, agents, or a file of programs."


def simulate(
    model: Annotated[str, typer.Argument(help="A zoo name, hf:<id or folder>, module:factory.")],
    *,
    device: Annotated[str, typer.Option(help="A device of the catalogue, or this.")] = "l20",
    devices: Annotated[
        int, typer.Option(help="Devices that share the model, tensor-parallel.")
    ] = 1,
    system: Annotated[
        str | None,
        typer.Option(
            help=f"Which systems, by comma; all for every one of them. Default {_SYSTEMS}, "
            "with --programs all."
        ),
    ] = None,
    programs: Annotated[str | None, typer.Option(help=_PROGRAM_HELP)] = None,
    save_programs: Annotated[
        Path | None, typer.Option(help="Write the programs of the one rate as a file.")
    ] = None,
    workload: Annotated[
        str,
        typer.Option(
            help="sharegpt, long, arxiv, mixed, azure-code, azure-conv, or a CSV of lengths."
        ),
    ] = "mixed",
    rate: Annotated[
        str,
        typer.Option(help="Requests or programs a second; several by comma; inf: all at once."),
    ] = "1",
    num: Annotated[int, typer.Option(help="Requests or programs sent at each rate.")] = 200,
    cv: Annotated[float, typer.Option(help="Burstiness: 1 is Poisson, more comes in bursts.")] = 1,
    trace: Annotated[
        Path | None, typer.Option(help="A trace instead: JSON lines or Azure's CSV.", exists=True)
    ] = None,
    speed: Annotated[float, typer.Option(help="How much faster than it was the trace is.")] = 1.0,
    max_tokens: Annotated[
        int | None, typer.Option(help="Leave out a trace's requests of more tokens than this.")
    ] = None,
    dtype: Dtype = "bfloat16",
    max_batch: Annotated[int, typer.Option(help="Requests computed at once.")] = 256,
    step_tokens: Annotated[int, typer.Option(help="Tokens a step computes at most.")] = 2048,
    kv_memory: Annotated[
        str | None, typer.Option(help="KV cache; default what the weights leave of 90 %.")
    ] = None,
    prefill_part: Annotated[
        float, typer.Option(help="A static split's part of the units for prefill.")
    ] = 0.5,
    tbt_target: Annotated[
        str | None, typer.Option(help="auto divides where a mixed step takes longer, e.g. 50ms.")
    ] = None,
    mixed_factor: Annotated[
        float, typer.Option(help="How much longer mixed steps take than their kernels.")
    ] = 1.0,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="A file of `toolkit serve calibrate`: its model, as held there, on its cores.",
            exists=True,
        ),
    ] = None,
    noise: Annotated[float, typer.Option(help="Deviation of the logarithm of step times.")] = 0.0,
    slo_ttft: Annotated[str | None, typer.Option(help="Good: first token within this.")] = None,
    slo_tpot: Annotated[
        str | None, typer.Option(help="Good: mean time a token within this.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw latency against rate, e.g. rates.png.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write curves and tables of the sweep as one HTML page.")
    ] = None,
    timeline: Annotated[
        Path | None, typer.Option(help="Write one run's timeline (one system, one rate).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals, lengths and noise.")] = 0,
    as_json: view.Json = False,
) -> None:
    """Run the engine's own scheduler on virtual time, with step times from the cost model.

    Everything shown is simulated: no model is loaded and nothing is computed. Systems are like
    those they name, in scheduling; kernels and memory are the same for all.

    Example: toolkit serve simulate qwen2.5-3b --device l20 --workload long --rate 1,2 --num 100

    Agents: toolkit serve simulate llama3-8b --device a100-80g --programs agents --rate 0.5,1
    """
    from toolkit.hardware import find_cluster, find_device
    from toolkit.serve.simulate import systems
    from toolkit.serve.simulate import workload as workloads

    rates = parse_rates(rate)
    cluster = find_cluster(f"{device}x{devices}") if devices > 1 else None
    place = cluster.device(0) if cluster else find_device(device)
    kept = None
    if calibration is not None:
        from toolkit.serve.split.calibration import ServeCalibration

        kept = ServeCalibration.load(calibration)
        if kept.work.name != model or devices > 1:
            raise UsageError(
                f"{calibration} was measured for {kept.work.name} on one device, not for {model} "
                f"on {devices}",
                remedy="simulate that model, or leave the calibration out",
            )
        place = kept.cost_model().device

    def priced() -> CostModel:
        if kept is not None:
            return kept.cost_model(mixed_factor=mixed_factor)
        graph = traced(model, {}, dtype=dtype, inference=True, quiet=as_json)
        from toolkit.serve.split.cost_model import CostModel
        from toolkit.serve.split.sharded import sharded
        from toolkit.serve.split.traced import model_work

        work, exchange = model_work(graph), None
        if cluster is not None:
            work, exchange = sharded(work, cluster)
        return CostModel(work, place, exchange=exchange, mixed_factor=mixed_factor)

    def setup_for(longest: int) -> Setup:
        from toolkit.serve.split.controller import ControllerConfig

        target_s = None if tbt_target is None else parse_seconds(tbt_target)
        return systems.Setup(
            priced(),
            max_context=longest + 1,
            kv_bytes=None if kv_memory is None else parse_bytes(kv_memory),
            max_batch=max_batch,
            step_tokens=step_tokens,
            prefill_part=prefill_part,
            controller=ControllerConfig(tbt_target_s=target_s),
            noise=noise,
            seed=seed,
        )

    common = {
        "model": model, "device": place.name, "num_devices": devices, "dtype": dtype, "seed": seed,
        "source": "simulated",
    }  # fmt: skip
    if programs is not None:
        given = (("timeline", timeline), ("picture", picture), ("report", report), ("trace", trace))
        for name, value in given:
            if value is not None:
                raise UsageError(f"--{name} is of requests, and --programs are none")
        names = simulate_programs.ALL if system in (None, "all") else system
        assert names is not None
        made = simulate_programs.plans(programs, rates, num, seed=seed, save=save_programs)
        setup = setup_for(simulate_programs.longest(made))
        served = simulate_programs.run(made, names.split(","), setup, quiet=as_json)
        kv_tokens = setup.num_blocks * setup.block_size
        body = common | {"workload": programs, "kv_tokens": kv_tokens, "runs": served}
        view.emit(body, as_json=as_json, render=lambda: simulate_programs.table(body))
        return
    if save_programs is not None:
        raise UsageError("there are no programs to save", remedy="name some with --programs")
    names = ",".join(systems.SYSTEMS) if system == "all" else system or _SYSTEMS
    chosen = [systems.find(name) for name in names.split(",")]
    if timeline is not None and (len(chosen) > 1 or len(rates) > 1):
        raise UsageError(
            f"a timeline is of one run, not of {len(chosen)} systems at {len(rates)} rates",
            remedy="name one system and one rate",
        )
    if picture is not None:
        require("matplotlib.figure", extra="plots")
    from toolkit.serve.bench import load
    from toolkit.serve.bench.report import Promise

    if trace is not None:
        found = load.trace(trace, num=num, speed=speed, max_tokens=max_tokens)
        plans = {round(len(found) / max(found[-1].at_s, 1e-9), 3): found}
    else:
        kind = workloads.find(workload)
        plans = {each: kind.arrivals(each, num, seed=seed, cv=cv) for each in rates}
    promise = Promise(
        None if slo_ttft is None else parse_seconds(slo_ttft),
        None if slo_tpot is None else parse_seconds(slo_tpot),
    )
    setup = setup_for(
        max(one.prompt_tokens + one.output_tokens for each in plans.values() for one in each)
    )
    runs: list[dict[str, Any]] = []
    with view.progress(quiet=as_json) as bar:
        for each, arrivals in plans.items():
            for one in chosen:
                task = bar.add_task(f"{one.name}, {each:g} requests/s", total=len(arrivals))
                runs.append(
                    _run(
                        one,
                        setup,
                        arrivals,
                        promise,
                        lambda task=task: bar.advance(task),  # type: ignore[misc]
                        timeline,
                    )
                    | {"rate": each if math.isfinite(each) else None}
                )
    if picture is not None:
        from toolkit.serve.simulate.report import draw

        draw(runs, picture, f"{model} on {place.name}, {trace or workload}")
    body = common | {
        "workload": str(trace) if trace else workload,
        "kv_tokens": setup.num_blocks * setup.block_size,
        "runs": runs,
    }
    if report is not None:
        from toolkit.serve.simulate import page

        page.write(body, report)
    view.emit(body, as_json=as_json, render=lambda: _shown(body, setup))


def _run(
    system: Any,
    setup: Setup,
    arrivals: tuple[Arrival, ...],
    promise: Any,
    on_done: Any,
    timeline: Path | None,
) -> dict[str, Any]:
    from toolkit.serve.clock import VirtualClock
    from toolkit.serve.simulate import report
    from toolkit.serve.simulate.drive import drive

    clock, began_s = VirtualClock(), time.perf_counter()
    engine = system.build(setup, clock)
    # A timeline shows every step; without one, many alike are taken at once.
    stepwise = timeline is not None
    samples = drive(engine, clock, arrivals, on_done=on_done, stepwise=stepwise)
    took_s = time.perf_counter() - began_s
    if timeline is not None:
        from toolkit.timeline import files

        files.save(engine.timeline(f"{system.name}, {setup.cost.device.name}"), timeline)
    return {"system": system.name, "took_s": took_s} | report.summary(samples, engine, promise)


def _shown(body: dict[str, Any], setup: Setup) -> Any:
    from rich.console import Group

    columns = ["system", "rate/s>", "out tok/s>", "TTFT p50>", "p95>", "TBT p50>", "p99>"]
    columns += ["e2e p50>", "e2e/token>", "changes>"]
    rows = []
    for run in body["runs"]:
        sent = "at once" if run["rate"] is None else f"{run['rate']:g}"
        cells = [run["system"], sent, f"{run['output_tokens_per_s']:.1f}"]
        for key, names in (
            ("ttft_s", ("p50", "p95")),
            ("tbt_s", ("p50", "p99")),
            ("e2e_s", ("p50",)),
            ("normalised_s", ("mean",)),
        ):
            cells += [shown((run[key] or {}).get(name)) for name in names]
        split = run["split"] or {}
        rows.append([*cells, split.get("num_changes", "-")])
    place = (
        f"{body['num_devices']} x {body['device']}" if body["num_devices"] > 1 else body["device"]
    )
    title = f"{body['model']} on {place}, {body['workload']}, simulated"
    tokens = sum(run["prompt_tokens"] + run["output_tokens"] for run in body["runs"])
    took_s = sum(run["took_s"] for run in body["runs"])
    virtual_s = sum(run["duration_s"] for run in body["runs"])
    kv_bytes = body["kv_tokens"] * setup.cost.model.kv_bytes_per_token
    return Group(
        view.table(title, columns, rows),
        f"KV cache {format_bytes(kv_bytes)}"
        f" ({body['kv_tokens']} tokens); {format_seconds(virtual_s)} of serving simulated in "
        f"{format_seconds(took_s)} ({tokens / took_s:,.0f} tokens/s)",
    )
