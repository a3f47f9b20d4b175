#!/usr/bin/env python
"""Chats of 8 turns through the HTTP server: what the prefix cache finds, and time to first token.

    python recipes/bench/serve_prefix.py smollm2-135m --chats 3

Two servers run, one without the cache, and each chat is played on both, turn by turn, in
alternating order; greedy, so that both must answer alike (checked). A chat has a salt of its own:
its first turn finds nothing. *Shareable* are the whole blocks of a prompt whose tokens the server
had computed before: all of the last turn's prompt and answer but the token drawn last.
Timings need a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

SYSTEM = (
    "You are the keeper of a small lighthouse on a rocky coast. You have watched the sea for "
    "forty years and written down the weather every evening. You know the ships that pass, "
    "the birds that rest on the gallery, and the people of the village behind the dunes, who "
    "bring bread and news on Thursdays. You answer in plain words and short sentences, you "
    "say so when you do not know, and you never make up a number. When somebody asks about "
    "the lamp, you explain how it is lit, how the lens is turned, and why the light of every "
    "tower has a rhythm of its own."
)
TURNS = (
    "Good evening. I walked along the coast all day, and yours is the first light that I have"
    " seen since noon. How long have you been up here, and what do you do when the fog comes "
    "in?",
    "What would a ship's captain see of the lamp from ten miles away, and how would he know "
    "that it is yours and not the tower on the other side of the bay?",
    "Tell me about the worst storm that you have written down. What did you hear first, and "
    "what did you do while it lasted?",
    "The people of the village told me that the birds come before the wind turns. Is that so,"
    " and which of them would you trust more than a barometer?",
    "If I wanted to learn your work, what would you teach me in the first week, and what "
    "would you keep for the second?",
    "I have a bottle of oil from the harbour here. How would I know whether it is good enough"
    " for the lamp, and what happens when it is not?",
    "It is late and the tide is coming in. Which way back is the safest, and what should I "
    "look for where the path meets the rocks?",
    "Thank you. Before I leave, please say again what matters most of all that you have told "
    "me, so that I can write it in my own book tonight.",
)


@dataclass(frozen=True)
class Turn:
    """One answer as its client saw it; times in seconds, `drawn` and `cached` in tokens."""

    prompt: int
    drawn: int
    cached: int
    ttft_s: float
    text: str


def shareable_blocks(prompt: int, before: int, drawn: int, size: int) -> int:
    """Return how many whole blocks of a prompt were computed a turn before.

    That turn had `before` prompt tokens and drew `drawn`, the last of which was not computed. The
    last token of a prompt always is, for its logits.
    """
    return min(before + drawn - 1, prompt - 1) // size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--chats", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with ExitStack() as servers:
        ready = [
            servers.enter_context(server(options, cache)) for cache in ("", "--no-prefix-cache")
        ]
        chats = asyncio.run(play(ready, options))
    size = ready[0]["block_size"]
    print(table(chats, size))
    if options.output:
        told = [[[asdict(turn) for turn in side] for side in chat] for chat in chats]
        options.output.write_text(json.dumps({"server": ready[0], "chats": told}, indent=2) + "\n")


@contextmanager
def server(options: argparse.Namespace, cache: str) -> Iterator[dict[str, Any]]:
    """Start a server, yield what it says of itself, and end it."""
    command = [sys.executable, "-m", "toolkit", "serve", "run", options.model, "--port", "0"]
    command += ["--quantize", options.quantize, "--kv-memory", "512MiB", "--json"]
    process = subprocess.Popen([*command, *filter(None, [cache])], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the server did not start: {' '.join(command)}")
        yield json.loads(line)
    finally:
        process.terminate()
        process.wait()


async def play(ready: list[dict[str, Any]], options: argparse.Namespace) -> list[list[list[Turn]]]:
    """Return every chat's turns on each server, `[chat][server][turn]`; the first chat is not kept.

    It warms the servers up.
    """
    from toolkit.serve.bench.client import Target

    targets = [Target(f"{each['url']}/v1", each["model"], chat=True) for each in ready]
    chats: list[list[list[Turn]]] = []
    for number in range(options.chats + 1):
        sides: list[list[Turn]] = [[], []]
        messages = [{"role": "system", "content": SYSTEM}]
        for at, question in enumerate(TURNS):
            messages.append({"role": "user", "content": question})
            for side in (0, 1) if (number + at) % 2 else (1, 0):
                body = {
                    "model": ready[side]["model"],
                    "messages": messages,
                    "max_tokens": options.max_tokens,
                    "temperature": 0,
                    "cache_salt": f"chat {number}",
                }
                sides[side].append(await turn(targets[side], body))
            answers = [side[-1].text for side in sides]
            if answers[0] != answers[1]:
                raise SystemExit(f"with and without the cache, turn {at + 1} differs: {answers}")
            messages.append({"role": "assistant", "content": answers[0]})
        chats.append(sides)
    return chats[1:]


async def turn(target: Any, body: dict[str, Any]) -> Turn:
    """Ask once and return what came."""
    from toolkit.serve.bench.client import ask

    start_s = time.perf_counter()
    record = await ask(target, body)
    if record.error is not None:
        raise SystemExit(f"a request failed: {record.error}")
    usage = record.usage
    return Turn(
        prompt=usage["prompt_tokens"],
        drawn=usage["completion_tokens"],
        cached=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        ttft_s=record.piece_s[0] - start_s,
        text=record.text,
    )


def table(chats: list[list[list[Turn]]], size: int) -> str:
    """Return the turns' medians over chats as a table, and the share of shareable blocks hit."""
    lines = [
        "| turn | prompt tokens | cached share | blocks hit of shareable | TTFT with cache "
        "| without | ratio (smallest to largest) |",
        "|---|---|---|---|---|---|---|",
    ]
    hit = shareable = 0
    for at in range(len(TURNS)):
        cached, plain = ([chat[side][at] for chat in chats] for side in (0, 1))
        first = cached[0]
        could = 0
        if at:
            before = chats[0][0][at - 1]
            could = shareable_blocks(first.prompt, before.prompt, before.drawn, size)
        assert len({(each.prompt, each.cached) for each in cached}) == 1, "chats are alike"
        hit, shareable = hit + first.cached // size, shareable + could
        ratios = [b.ttft_s / a.ttft_s for a, b in zip(cached, plain, strict=True)]
        times = [statistics.median(each.ttft_s for each in side) * 1e3 for side in (cached, plain)]
        lines.append(
            f"| {at + 1} | {first.prompt} | {first.cached / first.prompt:.0%} "
            f"| {first.cached // size} of {could} | {times[0]:.0f} ms | {times[1]:.0f} ms "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    lines.append(f"\n{hit} of {shareable} shareable blocks were hit: {hit / shareable:.1%}.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
