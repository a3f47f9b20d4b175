"""What a text must be, and the contract of whatever keeps it so while it is generated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Structured:
    """A constraint on the whole output.

    `source` is a JSON schema (as JSON), a regular expression, or a grammar in xgrammar's EBNF.
    """

    kind: Literal["json", "regex", "grammar"]
    source: str


class Grammar(Protocol):
    """One request's way through its constraint. Hears every token drawn, in order."""

    @property
    def ended(self) -> bool:
        """Whether the text is complete and nothing may follow."""
        ...

    def accept(self, token_id: int) -> None:
        """Go on by a token that `mask` allowed."""
        ...

    def mask(self, logits: Any) -> None:
        """Set the logits of all tokens that may not follow to minus infinity, in place."""
        ...
