"""`toolkit serve bench`: load on an OpenAI-compatible URL, and what it bears."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from toolkit.cli import view
from toolkit.errors import UsageError, require
from toolkit.units import format_seconds, parse_seconds


def bench(
    url: Annotated[str, typer.Argument(help="Base URL of an OpenAI-compatible API, up to /v1.")],
    *,
    model: Annotated[
        str | None, typer.Option(help="Its model; default the first it lists.")
    ] = None,
    rate: Annotated[
        str, typer.Option(help="Requests a second (Poisson); several by comma; inf: all at once.")
    ] = "1",
    num: Annotated[int, typer.Option(help="Requests sent at each rate.")] = 40,
    prompt: Annotated[str, typer.Option(help="Prompt tokens, e.g. 128 or 50-300.")] = "50-300",
    output: Annotated[str, typer.Option(help="Output tokens, e.g. 128 or 50-150.")] = "50-150",
    trace: Annotated[
        Path | None, typer.Option(help="A trace instead: JSON lines or Azure's CSV.", exists=True)
    ] = None,
    speed: Annotated[float, typer.Option(help="How much faster than it was the trace is.")] = 1.0,
    max_tokens: Annotated[
        int | None, typer.Option(help="Leave out a trace's requests of more tokens than this.")
    ] = None,
    shared: Annotated[int, typer.Option(help="Tokens that all prompts have in common.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Chat instead of plain completions.")
    ] = False,
    ignore_eos: Annotated[bool, typer.Option(help="Force the length (beyond OpenAI).")] = True,
    slo_ttft: Annotated[str | None, typer.Option(help="Good: first token within this.")] = None,
    slo_tpot: Annotated[
        str | None, typer.Option(help="Good: mean time a token within this.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw latency against load, e.g. load.png.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Its key.")] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals, lengths and texts.")] = 0,
    as_json: view.Json = False,
) -> None:
    """Send streamed requests in open loop and measure them from outside.

    Texts are real English. Times are the client's: it should have a core to itself.

    Example: toolkit serve bench http://127.0.0.1:8000/v1 --rate 0.5,1,2 --picture load.png
    """
    require("httpx", extra="serve")
    if picture is not None:
        require("matplotlib.figure", extra="plots")
    from toolkit.serve.bench import client, load, report
    from toolkit.serve.bench.exchange import on_a_loop

    lengths = load.Lengths.parse(prompt, "prompt"), load.Lengths.parse(output, "output")
    rates = parse_rates(rate)
    if trace is not None:
        arrivals = load.trace(trace, num=num, speed=speed, max_tokens=max_tokens)
        plans = {round(len(arrivals) / max(arrivals[-1].at_s, 1e-9), 3): arrivals}
    else:
        plans = {each: load.poisson(each, num, *lengths, seed=seed) for each in rates}
    promise = report.Promise(
        None if slo_ttft is None else parse_seconds(slo_ttft),
        None if slo_tpot is None else parse_seconds(slo_tpot),
    )
    base = url.rstrip("/")
    target = client.Target(
        base, model or client.first_model(base, api_key), chat, api_key, ignore_eos
    )
    texts = load.Texts(chars_per_token=client.probe(target), shared_tokens=shared, seed=seed)
    runs: list[dict[str, Any]] = []
    with view.progress(quiet=as_json) as bar:
        for each, arrivals in plans.items():
            task = bar.add_task(f"{each:g} requests/s", total=len(arrivals))
            done = client.run(
                target,
                arrivals,
                texts.prompts(arrivals),
                on_done=lambda task=task: bar.advance(task),  # type: ignore[misc]
            )
            # JSON knows no infinity: None stands for all at once.
            sent = each if math.isfinite(each) else None
            runs.append({"rate": sent} | report.summary(on_a_loop(done), promise))
    if picture is not None:
        report.draw(runs, picture, f"{target.model} at {base}")
    body = {"url": base, "model": target.model, "seed": seed, "runs": runs}
    view.emit(body, as_json=as_json, render=lambda: _table(body))


def parse_rates(text: str) -> list[float]:
    """Return requests a second, one or several by comma. Raises UsageError."""
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(rate > 0 for rate in rates):
        raise UsageError(f"{text!r} is no rate", remedy="use requests a second, e.g. 0.5,1,2")
    return rates


def _table(body: dict[str, Any]) -> Any:
    columns = ["rate/s>", "served>", "failed>", "out tok/s>", "TTFT p50>", "p95>"]
    columns += ["TBT p50>", "p99>", "e2e p50>", "p95>", "good/s>"]
    rows = []
    for run in body["runs"]:
        sent = "at once" if run["rate"] is None else f"{run['rate']:g}"
        cells = [sent, run["num_served"], run["num_requests"] - run["num_served"]]
        cells.append(f"{run['output_tokens_per_s']:.1f}")
        for key, low, high in (("ttft_s", 50, 95), ("tbt_s", 50, 99), ("e2e_s", 50, 95)):
            spread = run[key] or {}
            cells += [shown(spread.get(f"p{low}")), shown(spread.get(f"p{high}"))]
        rows.append([*cells, f"{run['goodput_per_s']:.2f}"])
    return view.table(f"{body['model']} at {body['url']}, measured", columns, rows)


def shown(seconds: float | None) -> str:
    """Return seconds as text, "-" for None."""
    return "-" if seconds is None else format_seconds(seconds)
