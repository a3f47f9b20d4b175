"""Scheduling policies: small classes that say which request goes first."""

from __future__ import annotations

from toolkit.errors import unknown_name
from toolkit.serve.policy.attained import (
    FeedbackQueue,
    LeastAttainedService,
    ProgramLeastAttained,
    QueueConfig,
    ThreadedLeastAttained,
)
from toolkit.serve.policy.base import Policy
from toolkit.serve.policy.fcfs import FirstComeFirstServed
from toolkit.serve.policy.mlfq import SkipJoinMLFQ
from toolkit.serve.policy.priority import StaticPriority
from toolkit.serve.policy.spf import ShortestPromptFirst

POLICIES: dict[str, type[Policy]] = {
    "atlas": ThreadedLeastAttained,
    "fcfs": FirstComeFirstServed,
    "feedback": FeedbackQueue,
    "mlfq": SkipJoinMLFQ,
    "plas": ProgramLeastAttained,
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
    "FeedbackQueue",
    "FirstComeFirstServed",
    "LeastAttainedService",
    "Policy",
    "ProgramLeastAttained",
    "QueueConfig",
    "ShortestPromptFirst",
    "SkipJoinMLFQ",
    "StaticPriority",
    "ThreadedLeastAttained",
    "make",
]
