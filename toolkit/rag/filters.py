"""Which passages a search may find: conditions on where they come from and on their metadata.

    source=guide/*      source, title or a metadata field; * matches any run of characters
    year>=2020          <, <=, >, >=: numbers as numbers, other text by its characters
    lang!=de

A condition on a field that a passage lacks is false, `!=` among them. The conditions become a set
of ids once, by reading all passages; searches then test a bit for each vector they score.
"""

from __future__ import annotations

import fnmatch
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from toolkit.errors import UsageError
from toolkit.rag.corpus import Passage
from toolkit.rag.store import Store

_CONDITION = re.compile(r"\s*([\w.-]+)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*")
_ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """One condition on a passage.

    >>> Condition.parse("year >= 2020")
    Condition(field='year', sign='>=', value='2020')
    """

    field: str
    sign: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read a condition. Raises UsageError saying how one is written."""
        found = _CONDITION.fullmatch(text)
        if not found:
            raise UsageError(
                f"{text!r} is no condition",
                remedy="write FIELD=PATTERN, FIELD!=PATTERN or FIELD>=N",
            )
        return cls(*found.groups())

    def holds(self, passage: Passage) -> bool:
        """Say whether a passage meets it."""
        held = {"source": passage.source, "title": passage.title, **passage.meta}.get(self.field)
        if held is None:
            return False
        if self.sign in _ORDERS:
            try:
                return _ORDERS[self.sign](float(held), float(self.value))
            except ValueError:
                return _ORDERS[self.sign](str(held), self.value)
        if isinstance(held, bool):
            held = str(held).lower()
        return fnmatch.fnmatchcase(str(held), self.value) == (self.sign == "=")


def ids(store: Store, conditions: Sequence[Condition]) -> np.ndarray:
    """Return the ids (int64, ascending) of the passages that meet all conditions."""
    found = [
        passage.id
        for passage in store.passages()
        if not store.is_deleted(passage.id) and all(each.holds(passage) for each in conditions)
    ]
    return np.array(found, np.int64)
