"""Scheduling policies: small classes that say which request goes first."""

from __future__ import annotations

from toolkit.errors import unknown_name
from toolkit.serve.policy.base import Policy
from toolkit.serve.policy.fcfs import FirstComeFirstServed
from toolkit.serve.policy.mlfq import SkipJoinMLFQ
from toolkit.serve.policy.priority import StaticPriority
from toolkit.serve.policy.spf import ShortestPromptFirst

POLICIES: dict[str, type[Policy]] = {
    "fcfs": FirstComeFirstServed,
    "mlfq": SkipJoinMLFQ,
    "priority": StaticPriority,
    "spf": ShortestPromptFirst,
}


def make(name: str) -> Policy:
    """Return a new policy by name, with its default settings.

    >>> make("spf").name
    'spf'
    """
    if name not in POLICIES:
        raise unknown_name("policy", name, POLICIES)
    return POLICIES[name]()


__all__ = [
    "POLICIES",
    "FirstComeFirstServed",
    "Policy",
    "ShortestPromptFirst",
    "SkipJoinMLFQ",
    "StaticPriority",
    "make",
]
