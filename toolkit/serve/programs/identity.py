"""Which program a call belongs to, by whatever its client or router says.

Clients name their sessions in many ways and most in none. All known ways are read and mapped to
one name; where several are given, the more specific one counts (`CARRIERS` is in that order).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.errors import UsageError

# An identity ends up in logs, metrics and tables: it must not be able to flood them.
MOST_CHARS = 256


@dataclass(frozen=True)
class Carrier:
    """A header, or a field of the body by its path, and who sends it."""

    kind: str  # "header" or "field"
    path: tuple[str, ...]
    says: str  # "program", "thread", "parent", "end" or "ttl"
    source: str
    # OpenAI's own fields may hold anything: what is no name in them says nothing.
    lenient: bool = False

    def read(self, headers: Mapping[str, str], body: Mapping[str, Any]) -> object | None:
        """Return what the call says here, or None. Header names are matched in lower case."""
        if self.kind == "header":
            return headers.get(self.path[0])
        found: object = body
        for step in self.path:
            if not isinstance(found, Mapping):
                return None
            found = found.get(step)
        return found


def _header(name: str, source: str, says: str = "program") -> Carrier:
    return Carrier("header", (name,), says, source)


def _field(path: str, source: str, says: str = "program") -> Carrier:
    return Carrier("field", tuple(path.split(".")), says, source, source.startswith("OpenAI"))


CARRIERS: tuple[Carrier, ...] = (
    _header("x-program-id", "toolkit"),
    _header("x-thread-id", "toolkit", "thread"),
    _header("x-program-end", "toolkit", "end"),
    _field("program_id", "ThunderAgent"),
    _field("thread_id", "toolkit", "thread"),
    _field("agent_hint.session_id", "vLLM RFC #52113"),
    _field("agent_hint.parent_session_id", "vLLM RFC #52113", "parent"),
    _field("agent_hint.cache_control.ttl", "vLLM RFC #52113", "ttl"),
    _field("vllm_xargs.agentic_context", "vLLM"),
    _field("session_params.id", "SGLang"),
    _field("nvext.session_control.session_id", "Dynamo"),
    _header("x-session-id", "routers"),
    _header("x-llm-d-inference-fairness-id", "llm-d"),
    _field("metadata.program_id", "OpenAI metadata"),
    _field("metadata.session_id", "OpenAI metadata"),
    _field("prompt_cache_key", "OpenAI"),
    # The weakest: one user may run many programs at once.
    _field("user", "OpenAI"),
)

# What of a body is looked at.
FIELDS: frozenset[str] = frozenset(each.path[0] for each in CARRIERS if each.kind == "field")


@dataclass(frozen=True)
class Identity:
    """What a call says of itself: its program, the thread in it, and whether it is the last.

    `source` names the carrier that gave the program; `ttl_s` asks to keep the program's KV so long.
    """

    program_id: str
    source: str
    thread_id: str | None = None
    parent_id: str | None = None
    ends: bool = False
    ttl_s: float | None = None


def identify(headers: Mapping[str, str], body: Mapping[str, Any]) -> Identity | None:
    """Return the call's identity, or None where it says nothing.

    Raises UsageError for a name that is no text, is empty, or is too long, but not in OpenAI's own
    fields.

    >>> identify({"X-Session-ID": "agent-7"}, {"user": "ann"})
    Identity(program_id='agent-7', source='routers', thread_id=None, parent_id=None, ends=False, \
ttl_s=None)
    >>> identify({}, {"model": "m"}) is None
    True
    """
    lower = {name.lower(): value for name, value in headers.items()}
    said: dict[str, tuple[object, Carrier]] = {}
    for carrier in CARRIERS:
        value = carrier.read(lower, body)
        if value is None or carrier.says in said:
            continue
        if not carrier.lenient or _is_name(value):
            said[carrier.says] = (value, carrier)
    if "program" not in said:
        return None
    program, carrier = said["program"]
    return Identity(
        _name(program, carrier),
        carrier.source,
        _name(*said["thread"]) if "thread" in said else None,
        _name(*said["parent"]) if "parent" in said else None,
        "end" in said and str(said["end"][0]).lower() in ("1", "true", "yes"),
        _seconds(*said["ttl"]) if "ttl" in said else None,
    )


def _is_name(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return False
    text = str(value)
    return 0 < len(text) <= MOST_CHARS and text.isprintable()


def _name(value: object, carrier: Carrier) -> str:
    where = f"{carrier.kind} {'.'.join(carrier.path)}"
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise UsageError(f"{where} is {value!r}; a name is text")
    text = str(value)
    if not _is_name(value):
        raise UsageError(
            f"{where} has {len(text)} characters; a name has 1 to {MOST_CHARS}, all printable"
        )
    return text


def _seconds(value: object, carrier: Carrier) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
        raise UsageError(f"field {'.'.join(carrier.path)} is {value!r}; it must be seconds")
    return float(value)


class PrefixInference:
    """Finds the program of a call that says nothing: the one whose context it continues.

    A call of an agent repeats everything said before and adds to it, so the names of its full
    blocks begin with those of the call before (`kv.prefix`). Only prefixes longer than
    `least_blocks` count: a system prompt is shared by strangers. Several programs continuing one
    context are told apart from where they part on.
    """

    def __init__(self, *, least_blocks: int = 8, most: int = 100_000) -> None:
        """`most`: contexts remembered, the oldest forgotten first."""
        self.least_blocks = least_blocks
        self._most = most
        # Name of a context's last full block -> program; the newest at the end.
        self._ends: dict[bytes, str] = {}
        self.num_inferred = 0

    def find(self, names: list[bytes]) -> str | None:
        """Return the program whose known context is the longest prefix of these blocks."""
        for index in range(len(names) - 1, self.least_blocks - 2, -1):
            program_id = self._ends.get(names[index])
            if program_id is not None:
                self.num_inferred += 1
                return program_id
        return None

    def note(self, names: list[bytes], program_id: str) -> None:
        """Remember that a program's context now ends with the last of these blocks."""
        if len(names) < self.least_blocks:
            return
        self._ends.pop(names[-1], None)
        self._ends[names[-1]] = program_id
        while len(self._ends) > self._most:
            del self._ends[next(iter(self._ends))]
