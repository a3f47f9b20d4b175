#!/usr/bin/env python
"""Serving against its peers on this machine: same weights, same requests, one after another.

    python recipes/bench/serve_vs_peers --contenders toolkit-int8 llama.cpp-q8_0 -o int8.json
    python recipes/bench/serve_vs_peers --list
    python recipes/bench/serve_vs_peers --make-models --peers-folder /opt/peers
    python recipes/bench/serve_vs_peers --quality -o quality.json

Every contender is started once and warmed; then, round by round in alternating order, each runs
every case while the others are stopped. Servers are driven over HTTP by the client of `toolkit
serve bench`, on the same cores; OpenVINO and transformers in the process that holds them. Prompts
are real English as token ids, the same for all, new ones each round, so no cache helps anyone;
outputs are greedy and forced to length. What is compared is the ratio within a round.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import judged
import models
from cases import CASES, Case, Passages, at_once, measured
from contenders import CONTENDERS, Contender, Place, how_to_install
from rich.console import Console
from rich.table import Table
from running import Running

from toolkit import record
from toolkit.hardware.affinity import usable_cores
from toolkit.models import weights
from toolkit.serve.model.tokenizer import Tokenizer

# Wide tables, also where the output is a file.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
_CASES = ("single", "prefill", "batch")
_SETTLE_S = 1.0


def main() -> None:
    options = _options()
    # Ended from outside, it still ends those it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = options.peers_folder
    logs = Path(tempfile.mkdtemp(prefix="toolkit-peers-"))
    threads = options.threads or usable_cores()
    place = Place(folder, folder / "models", threads, logs, options.sequences)
    body: dict[str, Any] = {}
    if options.list:
        listed(place)
    elif options.make_models:
        models.make(place)
    elif options.quality:
        body = judged.all_of(place)
        console.print(_quality_table(body))
    else:
        body = compared(place, options)
    if options.output and body:
        record.write(options.output, kind="serve-vs-peers", version=1, body=body)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(_CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of each contender; default every core")
    parser.add_argument("--sequences", type=int, default=32, help="computed at once, at most (N)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers-folder", type=Path, default=Path.home() / ".cache/toolkit-peers")
    parser.add_argument("--list", action="store_true", help="say who is installed, and how to")
    parser.add_argument("--make-models", action="store_true", help="write the forms peers read")
    parser.add_argument("--quality", action="store_true", help="perplexities instead of speed")
    parser.add_argument("-o", "--output", type=Path)
    return parser.parse_args()


def listed(place: Place) -> None:
    """Print every contender's settings, and the commands for those that are not there."""
    for each in CONTENDERS.values():
        missing = each.missing(place)
        state = "here" if missing is None else f"not installed (no {missing})"
        said = f"{each.name}, {each.weights}: {state}; {each.settings}"
        console.print(said, markup=False, soft_wrap=True)
    _advise([each for each in CONTENDERS.values() if each.missing(place)], place)


def _advise(absent: Sequence[Contender], place: Place) -> None:
    """Say who is left out, and how each family is installed."""
    for family in dict.fromkeys(each.install for each in absent):
        names = ", ".join(each.name for each in absent if each.install == family)
        said = f"\nto have {names}:\n{how_to_install(family, place)}"
        console.print(said, markup=False, soft_wrap=True)


def compared(place: Place, options: argparse.Namespace) -> dict[str, Any]:
    """Run the rounds; return every run's figures."""
    chosen = [CONTENDERS[name] for name in options.contenders]
    here = [each for each in chosen if each.missing(place) is None]
    _advise([each for each in chosen if each not in here], place)
    passages = Passages(Tokenizer.load(weights.resolve("smollm2-135m").path).encode)
    running: dict[str, Running] = {}
    rounds: list[dict[str, Any]] = []
    try:
        for each in here:
            running[each.name] = _started(each, place, passages)
        for number in range(options.rounds):
            order = here if number % 2 == 0 else list(reversed(here))
            rounds.append({"order": [each.name for each in order], "load": os.getloadavg()})
            for each in order:
                rounds[-1][each.name] = _turn(
                    each, running[each.name], [CASES[name] for name in options.cases],
                    passages, options.seed + number,
                )  # fmt: skip
    finally:
        for each in running.values():
            each.close()
    body = {
        "cases": {name: CASES[name].about for name in options.cases},
        "contenders": {each.name: each.settings for each in here},
        "weights": {each.name: each.weights for each in here},
        "threads": place.threads,
        "sequences": place.sequences,
        "seed": options.seed,
        "command": " ".join(sys.argv),
        "rounds": rounds,
    }
    for name in options.cases:
        console.print(_table(CASES[name], body))
    return body


def _started(contender: Contender, place: Place, passages: Passages) -> Running:
    """Start a contender, let it meet every shape it will be asked, and stop it."""
    start_s = time.monotonic()
    running = contender.start(place, place.logs / f"{contender.name}.log")
    for arrivals in (at_once(1, 1024, 2), at_once(32, 64, 8)):
        running.send(arrivals, passages.prompts(arrivals, seed=-1))
    running.pause()
    console.print(f"{contender.name}: ready after {time.monotonic() - start_s:.0f} s", markup=False)
    return running


def _turn(
    contender: Contender, running: Running, cases: Sequence[Case], passages: Passages, seed: int
) -> dict[str, Any]:
    """Let one contender run every case; the median of a case's runs counts."""
    running.resume()
    time.sleep(_SETTLE_S)
    found = {}
    for case in cases:
        if contender.only is not None and case.name not in contender.only:
            continue
        runs = []
        for again in range(case.runs):
            arrivals = case.arrivals(seed)
            prompts = passages.prompts(arrivals, seed * 100 + again)
            runs.append(measured(running.send(arrivals, prompts)))
        runs.sort(key=lambda run: run[case.figure] or 0.0)
        found[case.name] = runs[len(runs) // 2] | {
            "num_failed": sum(run["num_failed"] for run in runs)
        }
        figure, failed = _figure(found[case.name][case.figure]), found[case.name]["num_failed"]
        said = f"{contender.name} {case.name}: {figure} {case.unit}, {failed} failed"
        console.print(said, markup=False)
    running.pause()
    return found


def _table(case: Case, body: dict[str, Any]) -> Table:
    """One case: medians over rounds, with the lowest and highest; the ratio within a round."""
    first = next(iter(body["contenders"]))
    table = Table(title=f"{case.name}: {case.about}; measured, medians", title_justify="left")
    table.add_column("contender")
    for column in (case.figure, "lowest to highest", f"{first} / it", "out tok/s", "TTFT p50",
                   "TTFT p95", "TBT p50", "TBT p99", "failed"):  # fmt: skip
        table.add_column(column, justify="right")
    for name in body["contenders"]:
        runs = [each[name][case.name] for each in body["rounds"] if case.name in each[name]]
        if not runs:
            continue
        values = [run[case.figure] for run in runs if run[case.figure] is not None]
        ratios = [
            each[first][case.name][case.figure] / each[name][case.name][case.figure]
            for each in body["rounds"]
            if each[name][case.name][case.figure] and each[first][case.name][case.figure]
        ]
        spread = f"{_figure(min(values))} to {_figure(max(values))}" if values else "-"
        ratio = ""
        if ratios and name != first:
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        others = [
            _figure(_median(run[key] for run in runs))
            for key in ("output_tokens_per_s", "ttft_p50_s", "ttft_p95_s", "tbt_p50_s", "tbt_p99_s")
        ]
        failed = str(sum(run["num_failed"] for run in runs))
        table.add_row(name, _figure(_median(values)), spread, ratio, *others, failed)
    return table


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _quality_table(body: dict[str, Any]) -> Table:
    table = Table(title="perplexity of a held text, measured", title_justify="left")
    for column in ("contender", "perplexity", "change", "against"):
        table.add_column(column, justify="left" if column in ("contender", "against") else "right")
    for name, found in body.items():
        table.add_row(
            name, f"{found['perplexity']:.3f}", f"{found['change']:+.2%}", found["against"]
        )
    return table


if __name__ == "__main__":
    main()
