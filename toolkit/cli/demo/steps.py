"""The demo's steps. Each runs toolkit commands as a user would and returns what was found."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import toolkit as package
from toolkit import record
from toolkit.cli.demo import child
from toolkit.errors import ToolkitError, UsageError
from toolkit.hardware.affinity import usable_cores
from toolkit.timeline import Timeline, files
from toolkit.units import format_bytes, format_count, format_rate, format_seconds

PLANNED = "gpt-tiny"
_SHOWN = 4  # plans, of those considered
SERVED = "smollm2-135m"
CHAT = "Explain in two sentences what a computer program is."
QUESTION = "What does the with statement do?"
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Setting:
    """Where the demo writes, and how much it does."""

    folder: Path
    quick: bool

    @property
    def cores(self) -> int:
        return usable_cores()

    def path(self, name: str) -> str:
        return str(self.folder / name)


@dataclass(frozen=True)
class Row:
    """One line of the table at the end; a figure is predicted or measured, never both at once."""

    part: str
    what: str
    predicted: str = ""
    measured: str = ""


@dataclass(frozen=True)
class Found:
    """What a step found: lines for the table, timelines for the page, facts for machines."""

    rows: tuple[Row, ...]
    timelines: tuple[Timeline, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def probe(setting: Setting) -> Found:
    """Measure this machine, so that predictions are for it and not for a catalogue row."""
    found = child.toolkit("hardware", "probe", "--quick", threads=setting.cores)
    best = found["threads"][-1]
    gemm, read = best["gemm_flops"]["float32"], best["memory_bandwidth"]
    flops = f"{gemm / 1e9:.0f} GFLOP/s" if gemm else "not measured"
    speed = format_rate(read) if read else "not measured"
    rows = (
        Row("machine", f"float32 GEMM, {best['num_threads']} threads", measured=flops),
        Row("machine", "memory read", measured=speed),
    )
    facts = {"threads": best["num_threads"], "gemm_flops": gemm, "memory_bandwidth": read}
    return Found(rows, facts=facts)


def plan(setting: Setting) -> Found:
    """Trace a GPT and search its plan for two ranks of this machine."""
    made = child.toolkit(
        "plan", "search", PLANNED, "--cluster", "cpux2", "--batch", "8",
        "-o", setting.path("plan.json"), "--timeline", setting.path("planned.json"),
        threads=setting.cores,
    )  # fmt: skip
    planned = made["plan"]
    prediction = planned["prediction"]
    chosen = {"description": made["description"], "step_s": prediction["step_s"]}
    considered = [chosen, *planned["considered"]]
    rows = tuple(
        Row(
            "plan",
            f"{PLANNED}: {entry['description']}, a step",
            predicted=format_seconds(entry["step_s"]),
        )
        for entry in considered[:_SHOWN]
    )
    facts = {
        "strategy": planned["strategy"],
        "considered": considered,
        "prediction": prediction,
    }
    return Found(rows, facts=facts)


def train(setting: Setting) -> Found:
    """Train under the plan on two processes, the first step checked against one device."""
    recipe = Path(package.__file__).resolve().parent.parent / "recipes" / "train.py"
    if not recipe.exists():
        raise UsageError(
            f"the demo trains with {recipe}, which is not there",
            remedy="run the demo from a source checkout",
        )
    metrics = setting.path("training.json")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(recipe), "--plan", setting.path("plan.json"), "--check-parity", "1",
        "--steps", "6" if setting.quick else "40",
        "--timeline", setting.path("trained.json"), "--json", metrics,
    ]  # fmt: skip
    child.run(command, max(1, setting.cores // 2), _TIMEOUT_S)
    body = record.read(Path(metrics), kind="training-metrics", version=1)["body"]
    check = body["parity"][0]
    losses = body["losses"]
    rows = (
        Row(
            "train", f"a step on {body['ranks']} processes, {body['strategy']}",
            predicted=format_seconds(body["predicted_step_s"]),
            measured=format_seconds(body["measured_step_s"]),
        ),
        Row(
            "train", f"loss, over {len(losses)} steps of {body['data']}",
            measured=f"{losses[0]:.3f} to {losses[-1]:.3f}",
        ),
        Row(
            "train", f"worst of {check['num_gradients']} gradients against one device",
            predicted=f"<= {check['tolerance']:g}", measured=f"{check['gradient_error']:.1g}",
        ),
    )  # fmt: skip
    planned = files.load(setting.folder / "planned.json")
    trained = files.load(setting.folder / "trained.json")
    title = f"{PLANNED} by {body['strategy']}: one training step"
    both = planned.merged(trained, title=title)
    return Found(rows, (both,), body)


def verify(setting: Setting) -> Found:
    """Count what the plan's ranks really send, and compare with what was predicted."""
    found = child.toolkit("plan", "verify", setting.path("plan.json"), threads=1)
    report = found["reports"][0]
    rows = tuple(
        Row(
            "plan",
            f"rank at position {row['position']}: {row['kind']}, calls and bytes",
            predicted=f"{row['predicted'][0]}, {format_bytes(row['predicted'][1])}",
            measured=f"{row['counted'][0]}, {format_bytes(row['counted'][1])}",
        )
        for row in report["traffic"]
    )
    return Found(rows, facts=report)


def trace(setting: Setting) -> Found:
    """Trace the model to be served, so that its answer times can be predicted from its work."""
    made = child.toolkit(
        "trace", SERVED, "--inference", "-o", setting.path("served.json"), threads=setting.cores
    )
    return Found((), facts={"digest": made["digest"], "path": setting.path("served.json")})


def build(setting: Setting) -> Found:
    """Index Python's own documentation: passages, embeddings, inverted lists."""
    limit = "120" if setting.quick else "1500"
    found = child.toolkit(
        "rag", "build", "python-docs", "-o", setting.path("index"), "--limit", limit,
        "--threads", str(setting.cores), threads=setting.cores,
    )  # fmt: skip
    fresh = found["num_passages"] - found["num_reused"]
    speed = fresh / max(found["seconds"]["embedding"], 1e-9)
    rows = (
        Row("rag", "passages indexed", measured=format_count(found["num_passages"])),
        Row("rag", "embedding", measured=f"{speed:.0f} passages/s"),
    )
    return Found(rows, facts=found)


def serve_and_ask(setting: Setting) -> Found:
    """Serve a real model; chat with it over HTTP; have it answer from the index, with sources."""
    arguments = ("serve", "run", SERVED, "--port", "0")
    with child.server(*arguments, threads=setting.cores) as ready:
        url = f"{ready['url']}/v1"
        said = _chat(url, ready["model"], 16 if setting.quick else 64)
        answer = child.toolkit(
            "rag", "ask", setting.path("index"), QUESTION, "--url", url,
            "--max-tokens", "32" if setting.quick else "120",
            "--timeline", setting.path("asked.json"), threads=1,
        )  # fmt: skip
        engine = _fetch(f"{ready['url']}/timeline", setting.folder / "engine.json")
    cited = {citation["number"] for citation in answer["citations"]}
    prompt, output = said["usage"]["prompt_tokens"], said["usage"]["completion_tokens"]
    expected = _expected(setting, prompt, prompt + output // 2)
    rows = (
        Row(
            "serve", f"time to first token, {prompt} tokens of prompt",
            predicted=format_seconds(expected["ttft_s"]), measured=format_seconds(said["ttft_s"]),
        ),
        Row(
            "serve", "a token after the first",
            predicted=format_seconds(expected["tbt_s"]), measured=format_seconds(said["tbt_s"]),
        ),
        Row("rag", "search", measured=format_seconds(answer["timings"]["scan_s"])),
        Row("rag", "the whole answer", measured=format_seconds(answer["timings"]["total_s"])),
        Row("rag", "passages cited, of those given", measured=f"{len(cited)} of "
            f"{len(answer['hits'])}"),
    )  # fmt: skip
    asked = files.load(setting.folder / "asked.json")
    facts = {"chat": said, "expected": expected, "answer": answer, "server": ready}
    return Found(rows, (engine, asked), facts)


def _expected(setting: Setting, prompt_tokens: int, context: int) -> dict[str, float]:
    """Predict TTFT and TBT: the work of every operator at those sizes, on this machine as probed.

    Queueing, scheduling and HTTP are not in it.
    """
    from toolkit.cost import roofline
    from toolkit.hardware import find_device
    from toolkit.ir import OpGraph, formulas

    graph, device = OpGraph.load(setting.folder / "served.json"), find_device("cpu")

    def seconds(**sizes: int) -> float:
        at = graph.at(**sizes)
        return sum(roofline.seconds(formulas.work(op, at), device) for op in at.ops)

    return {"ttft_s": seconds(tokens=prompt_tokens), "tbt_s": seconds(tokens=1, context=context)}


def _chat(url: str, model: str, max_tokens: int) -> dict[str, Any]:
    """Ask once, streaming, and time the pieces as a client sees them."""
    import httpx

    body = {
        "model": model, "messages": [{"role": "user", "content": CHAT}], "temperature": 0,
        "max_tokens": max_tokens, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    started_s = time.perf_counter()
    pieces: list[str] = []
    seen_s: list[float] = []
    usage: dict[str, int] = {}
    with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=120.0) as response:
        if response.status_code != 200:
            response.read()
            raise ToolkitError(f"the server answered {response.status_code}: {response.text}")
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                if choice["delta"].get("content"):
                    seen_s.append(time.perf_counter())
                    pieces.append(choice["delta"]["content"])
    if not pieces:
        raise ToolkitError("the server answered the chat request with no text")
    decoded = max(1, usage.get("completion_tokens", len(pieces)) - 1)
    return {
        "question": CHAT, "text": "".join(pieces), "usage": usage,
        "ttft_s": seen_s[0] - started_s, "tbt_s": (seen_s[-1] - seen_s[0]) / decoded,
    }  # fmt: skip


def _fetch(url: str, path: Path) -> Timeline:
    """Keep the engine's timeline, which it serves as the file other commands read."""
    import httpx

    record.write_bytes(path, httpx.get(url, timeout=30.0).raise_for_status().content)
    return files.load(path)
