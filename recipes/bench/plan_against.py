#!/usr/bin/env python
"""A searched plan against what one would write by hand, measured on this machine's ranks.

    python recipes/bench/plan_against.py --model gpt --memory 360MiB -o against-gpt.json

Contenders: accelerate with DDP; FSDP2 by hand; torch's 1F1B by hand; and the plan that
`toolkit plan search --measure 4` finds. All train the same model from the same weights on the same
batch with AdamW in float32. Each variant of a hand-written one (gradient accumulation,
microbatches, recomputation) is run alone first, for what its ranks hold: a process's resident
memory beyond what it began with, which the searched plan has to keep within the cap, too. Those
within it then take their steps in turn in one pair of processes, in rounds of alternating order, so
that a machine that gets slower does so for all; in several sessions, built in another order each,
as where something lies in memory stays for a session. That picks the fastest variant of each. What
is compared is the ratio within a round of new sessions with these alone: the least of a dozen
medians would be partly luck.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from training_steps import MAKERS, Step

from toolkit import record
from toolkit.errors import ToolkitError
from toolkit.plan import io, launch, runtime
from toolkit.plan.plan import Plan
from toolkit.units import format_bytes, format_seconds, parse_bytes

_HERE = Path(__file__).resolve().parent
_WARM_UP = 2
_RANKS = 2
_SESSIONS = 3
_SEARCHES = 8  # until what is found stays within the cap
console = Console(stderr=True, highlight=False)

# What a rank runs -----------------------------------------------------------------------------


def rank_main(contenders: str, plan_path: str, rounds: str, out: str) -> None:
    """Run contenders on this rank, step by step in turn; rank 0 writes what was found."""
    plan = io.load(Path(plan_path))
    with runtime.session() as here:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        steps = {}
        for contender in json.loads(contenders):
            name, _, option = contender.partition(":")
            steps[contender] = MAKERS[name](plan, here, **json.loads(option or "{}"))
        for _ in range(_WARM_UP):
            for step in steps.values():
                step()
        held = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        found: list[Any] = [None] * here.num_ranks
        dist.all_gather_object(found, held)
        seconds = []
        for number in range(int(rounds)):
            order = list(steps) if number % 2 == 0 else list(reversed(steps))
            seconds.append({contender: _seconds(steps[contender]) for contender in order})
        if here.rank == 0:
            Path(out).write_text(json.dumps({"rounds": seconds, "peak_bytes": max(found)}))


def _seconds(step: Step) -> float:
    dist.barrier()
    started_s = time.perf_counter()
    step()
    dist.barrier()
    return time.perf_counter() - started_s


# The comparison -------------------------------------------------------------------------------


def measure(contenders: Sequence[str], plan: Path, rounds: int = 0) -> dict[str, Any]:
    """Run contenders in one fresh pair of processes: what a rank held, and rounds of steps."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        arguments = [str(Path(__file__)), "--rank", json.dumps(contenders), str(plan), str(rounds)]
        launch.run([*arguments, str(out)], _RANKS, timeout_s=1800)
        found: dict[str, Any] = json.loads(out.read_text())
    return found


def in_turn(contenders: Sequence[str], plan: Path, rounds: int) -> list[dict[str, float]]:
    """Run rounds of all contenders' steps, in sessions that build them in another order each."""
    found: list[dict[str, float]] = []
    for number in range(_SESSIONS):
        first = number * len(contenders) // _SESSIONS
        order = [*contenders[first:], *contenders[:first]]
        share = rounds // _SESSIONS + (number < rounds % _SESSIONS)
        found += measure(order, plan, share)["rounds"]
    return found


def variants(plan: Plan, cut: str) -> dict[str, list[dict[str, Any]]]:
    """What each hand-written contender is tuned over."""
    own = plan.provenance.sizes["batch"] // _RANKS
    accumulations = [count for count in (1, 2, 4) if own % count == 0]
    data = [
        {"accumulate": count, "recompute": recompute}
        for recompute in (False, True)
        for count in accumulations
    ]
    batch = plan.provenance.sizes["batch"]
    pipes = [{"microbatches": count, "cut": cut} for count in (2, 4, 8) if batch % count == 0]
    ddp = [{**option, "views": views} for views in (False, True) for option in data]
    return {"ddp": ddp, "fsdp2": data, "1f1b": pipes}


def held(
    wanted: dict[str, list[dict[str, Any]]], path: Path, cap: int | None
) -> list[dict[str, Any]]:
    """Run every variant alone, and return what its fullest rank held and whether that fits."""
    tried = []
    for name, option in [("toolkit", None), *((n, o) for n, all_ in wanted.items() for o in all_)]:
        contender = f"{name}:{json.dumps(option)}" if option else name
        entry: dict[str, Any] = {"name": name, "contender": contender, "fits": False}
        try:
            entry["peak_bytes"] = measure([contender], path)["peak_bytes"]
            over = cap is not None and entry["peak_bytes"] > cap
            # Of a searched one that was known when it was found; of one given it is said.
            entry["fits"] = name == "toolkit" or not over
            said = format_bytes(entry["peak_bytes"]) + (", over the cap" if over else "")
        except ToolkitError as error:
            entry["error"] = str(error)[-400:]
            said = str(error).splitlines()[-1]
        tried.append(entry)
        console.print(f"{contender}: {said}", markup=False)
    return tried


def _searched(search: list[str], path: Path, cap: int | None) -> int | None:
    """Search a plan whose ranks stay within the cap as measured, like everybody's; return the limit
    that the search was given. A plan that does not is ruled out by what it was predicted to hold:
    what a process holds beside tensors is none of the search's business.
    """
    limit = cap
    for _ in range(_SEARCHES):
        memory = ["--memory", f"{limit}B"] if limit is not None else []
        _toolkit("plan", "search", *search, *memory, "-o", str(path))
        if cap is None:
            return None
        plan = io.load(path)
        assert plan.prediction is not None
        over = measure(["toolkit"], path)["peak_bytes"] - cap
        if over <= 0:
            return limit
        predicted = format_bytes(plan.prediction.peak_bytes)
        console.print(
            f"searched: {_described(plan)}, predicted {predicted}: {format_bytes(over)} over"
            " the cap",
            markup=False,
        )
        limit = plan.prediction.peak_bytes - 1
    raise ToolkitError(f"{_SEARCHES} searched plans held more than {search[0]}'s cap as measured")


def _described(plan: Plan) -> str:
    mesh = " x ".join(f"{axis.name} {axis.size}" for axis in plan.mesh)
    ways = sorted({entry.how for entry in plan.placements})
    return f"{mesh}, {plan.microbatches} microbatches, {', '.join(ways) or 'operators split'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("gpt", "swin", "evoformer"), required=True)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--memory", help="the cap on what a rank holds, e.g. 1GiB")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--contenders", nargs="+", default=["ddp", "fsdp2", "1f1b"])
    parser.add_argument(
        "--measure",
        type=int,
        default=4,
        help="how many of the search's plans are timed, as variants are; 0: none",
    )
    parser.add_argument("--plan", type=Path, help="compare this plan instead of searching one")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    ref = f"small_models:{options.model}"
    search = [ref, "--cluster", f"cpux{_RANKS}"]
    search += ["--batch", str(options.batch)] if options.batch else []
    search += ["--measure", str(options.measure)] if options.measure else []
    cap = parse_bytes(options.memory) if options.memory else None
    folder = Path(tempfile.mkdtemp(prefix="toolkit-against-"))
    path = options.plan or folder / "searched.json"
    limit = _searched(search, path, cap) if options.plan is None else None
    reference = folder / "1f1b.json"
    _toolkit("plan", "make", *search[:3], *search[3:5] * bool(options.batch),
             "--strategy", "1f1b", "-o", str(reference))  # fmt: skip
    plan = io.load(path)
    cut = io.load(reference).stages[1].begins_at
    assert cut is not None
    wanted = {name: variants(plan, cut)[name] for name in options.contenders}
    tried = held(wanted, path, cap)
    able = [entry["contender"] for entry in tried if entry["fits"]]
    tuning = in_turn(able, path, options.rounds)
    best = _fastest([entry for entry in tried if entry["fits"]], tuning)
    console.print(f"fastest of each: {', '.join(best)}", markup=False)
    rounds = in_turn(best, path, options.rounds)
    body = {
        "model": ref,
        "sizes": dict(plan.provenance.sizes),
        "plan": _described(plan),
        "recompute": list(plan.recompute),
        "predicted_step_s": plan.prediction.step_s if plan.prediction else None,
        "cap_bytes": cap,
        "search_limit_bytes": limit,
        "predicted_bytes": plan.prediction.peak_bytes if plan.prediction else None,
        "tried": tried,
        "tuning": tuning,
        "rounds": rounds,
    }
    record.write(options.output, kind="plan-against", version=4, body=body)
    show(body)


def _fastest(able: list[dict[str, Any]], rounds: list[dict[str, float]]) -> list[str]:
    """Return the variant of each contender whose ratio to the searched plan was the least."""
    best: dict[str, tuple[float, str]] = {}
    for entry in able:
        contender = entry["contender"]
        ratio = statistics.median(one[contender] / one["toolkit"] for one in rounds)
        best[entry["name"]] = min((ratio, contender), best.get(entry["name"], (ratio, contender)))
    return [contender for _, contender in best.values()]


def show(body: dict[str, Any]) -> None:
    """Print each contender's fastest variant and its ratios to the searched plan."""
    table = Table(title=f"{body['model']}, {len(body['rounds'])} rounds, measured",
                  title_justify="left")  # fmt: skip
    for column in ("contender", "step", "memory", "toolkit is faster by"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    console.print(f"searched: {body['plan']}", markup=False)
    peaks = {entry["contender"]: entry.get("peak_bytes") for entry in body["tried"]}
    for contender in body["rounds"][0]:
        ratios = [one[contender] / one["toolkit"] for one in body["rounds"]]
        step = statistics.median(one[contender] for one in body["rounds"])
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        table.add_row(contender, format_seconds(step), format_bytes(peaks[contender]),
                      spread if contender != "toolkit" else "")  # fmt: skip
    Console(highlight=False).print(table)


def _toolkit(*arguments: str) -> None:
    import subprocess

    environment = {**os.environ, "PYTHONPATH": str(_HERE)}
    subprocess.run(
        [sys.executable, "-m", "toolkit", *arguments],
        check=True, env=environment, stdout=subprocess.DEVNULL,
    )  # fmt: skip


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_HERE), os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, str(_HERE))
    if sys.argv[1:2] == ["--rank"]:
        rank_main(*sys.argv[2:6])
        runtime.leave()
    else:
        main()
