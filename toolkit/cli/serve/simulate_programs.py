"""`toolkit serve simulate --programs`: agents' programs on a device that need not be here."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.cli import view
from toolkit.cli.serve.bench import shown
from toolkit.errors import UsageError
from toolkit.units import format_seconds

if TYPE_CHECKING:
    from toolkit.serve.simulate.agents import AgentProgram
    from toolkit.serve.simulate.systems import Setup

ALL = "fcfs,fcfs-cached,mlfq,plas,atlas,srpt"


def plans(
    workload: str, rates: Sequence[float], num: int, *, seed: int, save: Path | None
) -> Mapping[float, tuple[AgentProgram, ...]]:
    """Return the programs of each rate; a workload is a name or a file. Raises UsageError."""
    from toolkit.serve.simulate import agents

    if Path(workload).suffix == ".json":
        made = agents.read(Path(workload))
        last_s = max(one.at_s for one in made)
        found = {round(len(made) / last_s, 3) if last_s else math.inf: made}
    else:
        found = {rate: tuple(agents.programs(workload, rate, num, seed=seed)) for rate in rates}
    if save is not None:
        if len(found) > 1:
            raise UsageError(
                f"a file holds the programs of one rate, not of {len(found)}", remedy="name one"
            )
        agents.write(next(iter(found.values())), save)
    return found


def longest(found: Mapping[float, tuple[AgentProgram, ...]]) -> int:
    """Return the tokens of the longest call, prompt and output."""
    return max(
        prompt + call.output_tokens
        for made in found.values()
        for one in made
        for prompt, call in zip(one.prompts(), one.calls, strict=True)
    )


def run(
    found: Mapping[float, tuple[AgentProgram, ...]],
    systems: Sequence[str],
    setup: Setup,
    *,
    quiet: bool,
) -> list[dict[str, Any]]:
    """Simulate every system at every rate; return their figures."""
    from toolkit.serve.simulate import program_report, program_systems

    chosen = [program_systems.find(name) for name in systems]
    runs = []
    with view.progress(quiet=quiet) as bar:
        for rate, made in found.items():
            for system in chosen:
                task = bar.add_task(f"{system.name}, {rate:g} programs/s", total=len(made))
                began_s = time.perf_counter()
                figures, _ = program_report.simulate(
                    system,
                    setup,
                    made,
                    on_done=lambda task=task: bar.advance(task),  # type: ignore[misc]
                )
                took_s = time.perf_counter() - began_s
                sent = rate if math.isfinite(rate) else None
                runs.append({"system": system.name, "rate": sent, "took_s": took_s} | figures)
    return runs


def table(body: Mapping[str, Any]) -> Any:
    """Return the runs for people."""
    from rich.console import Group

    columns = ["system", "sent/s>", "latency mean>", "p95>", "a token mean>", "p95>"]
    columns += ["waiting>", "cached>", "out tok/s>", "preempt>", "promote>"]
    rows = []
    for one in body["runs"]:
        sent = "at once" if one["rate"] is None else f"{one['rate']:g}"
        rows.append(
            [
                *(one["system"], sent),
                *(shown(one["latency_s"][name]) for name in ("mean", "p95")),
                *(shown(one["per_token_s"][name]) for name in ("mean", "p95")),
                *(f"{100 * one[key]:.0f} %" for key in ("waiting_part", "prefix_hit")),
                f"{one['output_tokens_per_s']:.0f}",
                *(one["num_preemptions"], one["num_promotions"]),
            ]
        )
    calls = sum(one["num_calls"] for one in body["runs"])
    took_s = sum(one["took_s"] for one in body["runs"])
    title = f"{body['model']} on {body['device']}, programs {body['workload']}, simulated"
    return Group(
        view.table(title, columns, rows),
        "Latency is a program's from its beginning to its end without the tools on its way; a "
        "token: that over its output tokens.",
        f"{calls:,} calls simulated in {format_seconds(took_s)} ({calls / took_s:,.0f} a second)",
    )
