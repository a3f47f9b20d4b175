"""Einsum equations, with their ellipses written out."""

from __future__ import annotations

import string
from collections.abc import Sequence


def labels(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """Return one label a dim for every operand (of those ranks), and for the result.

    An ellipsis becomes labels of its own, the last dims aligned; without `->` the result is the
    labels that occur once, in alphabetical order.

    >>> labels("...qc, ...kc -> ...qk", [3, 3])
    (['Aqc', 'Akc'], 'Aqk')
    """
    left, arrow, result = equation.replace(" ", "").partition("->")
    parts = left.split(",")
    spare = [letter for letter in string.ascii_letters[::-1] if letter not in equation]
    spare.sort(key=lambda letter: (letter.islower(), letter))
    covered = [rank - len(part.replace("...", "")) if "..." in part else 0
               for part, rank in zip(parts, ranks, strict=True)]  # fmt: skip
    names = "".join(spare[: max(covered, default=0)])
    written = [
        part.replace("...", names[len(names) - count :] if count else "")
        for part, count in zip(parts, covered, strict=True)
    ]
    if not arrow:
        every = "".join(part.replace("...", "") for part in parts)
        result = "..." + "".join(sorted(name for name in set(every) if every.count(name) == 1))
    return written, result.replace("...", names)
