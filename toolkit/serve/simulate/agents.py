"""Programs that agents run: calls that depend on one another, with tools between, by kind.

Autellix's workloads (arXiv 2502.13965, section 6.1), from its table of calls a program and of
tokens a call. What the table does not say is assumed, and said here:

- `sharegpt`: chat, one thread. A turn adds 256 tokens and is answered with 277; its prompt is all
  that was said before.
- `bfcl`: an agent with tools, one thread. A call answers 34 tokens, its tool adds 16; the system
  prompt is chosen so that prompts come to the table's 735 tokens on average.
- `lats`: tree search, many threads. Rounds of five expansions, each scored by a call of its own;
  the next round begins when all are scored. Prompts repeat a path of the tree.
- `agents`: one of the three, equally often.

Calls a program are geometric for the first two (the table's mean and maximum). Between a call and
those that follow it a tool runs: 86.5 % within a second, 8.6 % up to 10 s, 4.9 % up to 30 s, after
the waits that vLLM-router issue #285 reports of agents.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit import record
from toolkit.errors import FormatError, UsageError, unknown_name

FILE_KIND, FILE_VERSION = "program-workload", 1


@dataclass(frozen=True, slots=True)
class Call:
    """One call: its prompt is the context of `follows` (with its output), then `new_tokens`.

    It is sent `tool_s` after all of `after` are answered. Calls are numbered in their program;
    `follows` None begins with the system prompt of the kind.
    """

    after: tuple[int, ...]
    follows: int | None
    new_tokens: int
    output_tokens: int
    tool_s: float


@dataclass(frozen=True, slots=True)
class AgentProgram:
    """A program: when it begins, the system prompt it shares with its kind, and its calls."""

    at_s: float
    kind: str
    system_tokens: int
    calls: tuple[Call, ...]

    @property
    def num_tokens(self) -> int:
        """Output tokens of all calls."""
        return sum(call.output_tokens for call in self.calls)

    def prompts(self) -> list[int]:
        """Return the prompt tokens of each call."""
        found: list[int] = []
        for call in self.calls:
            before = self.system_tokens
            if call.follows is not None:
                before = found[call.follows] + self.calls[call.follows].output_tokens
            found.append(before + call.new_tokens)
        return found


def _lognormal(source: random.Random, mean: float, sigma: float) -> int:
    return max(1, round(source.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)))


def _geometric(source: random.Random, mean: float, most: int) -> int:
    drawn = math.floor(math.log(1.0 - source.random()) / math.log(1.0 - 1.0 / mean)) + 1
    return min(most, drawn)


def _tool_s(source: random.Random) -> float:
    kind = source.random()
    if kind < 0.865:
        return source.uniform(0.05, 1.0)
    return source.uniform(1.0, 10.0) if kind < 0.951 else source.uniform(10.0, 30.0)


def _chain(
    source: random.Random, num: int, new: float, output: float, first: int
) -> tuple[Call, ...]:
    calls = []
    for index in range(num):
        added = _lognormal(source, new, 0.6) if index else first
        after = (index - 1,) if index else ()
        tool_s = _tool_s(source) if index else 0.0
        follows = index - 1 if index else None
        calls.append(Call(after, follows, added, _lognormal(source, output, 0.6), tool_s))
    return tuple(calls)


def _sharegpt(source: random.Random, at_s: float) -> AgentProgram:
    num = _geometric(source, 6.66, 80)
    first = _lognormal(source, 256, 0.6)
    return AgentProgram(at_s, "sharegpt", 32, _chain(source, num, 256, 277, first))


def _bfcl(source: random.Random, at_s: float) -> AgentProgram:
    num = _geometric(source, 10.75, 70)
    first = _lognormal(source, 60, 0.6)
    return AgentProgram(at_s, "bfcl", 240, _chain(source, num, 16, 34.14, first))


_WIDTH = 5


def _lats(source: random.Random, at_s: float) -> AgentProgram:
    """Rounds of expanding one node into five and scoring each; 159.7 calls on average."""
    rounds = max(1, round(source.gauss(159.7 / (2 * _WIDTH), 3.0)))
    calls: list[Call] = []
    question = _lognormal(source, 40, 0.4)
    joined: tuple[int, ...] = ()
    # The calls that made each node of the tree, and how deep it lies.
    nodes: list[tuple[int | None, int]] = [(None, 0)]
    for _ in range(rounds):
        parent, depth = nodes[max(source.randrange(len(nodes)) for _ in range(2))]
        if depth >= 5:
            parent, depth = None, 0
        scored = []
        for _ in range(_WIDTH):
            expand = len(calls)
            new = _lognormal(source, 24, 0.5) if parent is not None else question
            output = _lognormal(source, 85, 0.6)
            calls.append(Call(joined, parent, new, output, _tool_s(source) if joined else 0.0))
            calls.append(Call((expand,), expand, 24, _lognormal(source, 60, 0.6), _tool_s(source)))
            nodes.append((expand, depth + 1))
            scored.append(expand + 1)
        joined = tuple(scored)
    return AgentProgram(at_s, "lats", 150, tuple(calls))


_KINDS: Mapping[str, Callable[[random.Random, float], AgentProgram]] = {
    "sharegpt": _sharegpt,
    "bfcl": _bfcl,
    "lats": _lats,
}
WORKLOADS = (*_KINDS, "agents")


def programs(workload: str, rate: float, num: int, *, seed: int) -> Iterator[AgentProgram]:
    """Yield `num` programs, `rate` a second on average (Poisson; inf: all at once).

    What they do depends on the seed and not on the rate. Raises UsageError.
    """
    if workload not in WORKLOADS:
        raise unknown_name("program workload", workload, WORKLOADS)
    if not rate > 0 or num < 1:
        raise UsageError(f"{num} programs at {rate} a second are none", remedy="use values above 0")
    gaps, source = random.Random(f"gaps {seed}"), random.Random(f"programs {seed}")
    at_s = 0.0
    for _ in range(num):
        at_s += gaps.expovariate(1.0) / rate
        kind = workload if workload != "agents" else source.choice(tuple(_KINDS))
        yield _KINDS[kind](source, at_s)


# -- files -----------------------------------------------------------------------------------


def write(made: Iterator[AgentProgram] | tuple[AgentProgram, ...], path: Path) -> str:
    """Write programs as a file that simulations and live benchmarks share; return its digest."""
    body = [
        {
            "at_s": one.at_s,
            "kind": one.kind,
            "system_tokens": one.system_tokens,
            "calls": [
                [list(c.after), c.follows, c.new_tokens, c.output_tokens, c.tool_s]
                for c in one.calls
            ],
        }
        for one in made
    ]
    return record.write(path, kind=FILE_KIND, version=FILE_VERSION, body=body)


def read(path: Path) -> tuple[AgentProgram, ...]:
    """Return the programs of a file. Raises FormatError where it is none, or torn."""
    body = record.read(path, kind=FILE_KIND, version=FILE_VERSION)["body"]
    try:
        made = tuple(_program(one) for one in body)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path} holds no programs: {error!r}") from error
    if not made:
        raise FormatError(f"{path} holds no programs")
    return made


def _program(one: Mapping[str, Any]) -> AgentProgram:
    calls = tuple(
        Call(tuple(map(int, after)), follows, int(new), int(output), float(tool_s))
        for after, follows, new, output, tool_s in one["calls"]
    )
    for index, call in enumerate(calls):
        if any(not 0 <= before < index for before in call.after):
            raise ValueError(f"call {index} comes after {call.after}, which is not before it")
        if call.follows is not None and call.follows not in _before(calls, index):
            raise ValueError(f"call {index} continues {call.follows} and does not wait for it")
        if call.new_tokens < 1 or call.output_tokens < 1 or call.tool_s < 0:
            raise ValueError(f"call {index} has no tokens, or a tool that ends before it begins")
    if not calls:
        raise ValueError("a program without calls")
    return AgentProgram(float(one["at_s"]), str(one["kind"]), int(one["system_tokens"]), calls)


def _before(calls: tuple[Call, ...], index: int) -> set[int]:
    """The calls that are answered before one is sent."""
    found: set[int] = set()
    left = list(calls[index].after)
    while left:
        at = left.pop()
        if at not in found:
            found.add(at)
            left += calls[at].after
    return found
