"""What a device does next: one action is one pass of one microbatch through one stage."""

from __future__ import annotations

import re
from typing import NamedTuple

from toolkit.errors import FormatError

# F forward; B whole backward; I and W its two halves: gradient of the input, of the weights.
KINDS = ("F", "B", "I", "W")


class Action(NamedTuple):
    """A pass (`kind`, one of KINDS) of `microbatch` through `stage`.

    >>> str(Action(1, "F", 3)), Action.parse("0W12")
    ('1F3', Action(stage=0, kind='W', microbatch=12))
    """

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @staticmethod
    def parse(text: str) -> Action:
        """Read `<stage><F|B|I|W><microbatch>`. Raises FormatError when it is none."""
        found = re.fullmatch(r"(\d+)([FBIW])(\d+)", text)
        if found is None:
            raise FormatError(f"{text!r} is not <stage><F|B|I|W><microbatch>, such as 0F3")
        return Action(int(found[1]), found[2], int(found[3]))


# One row of actions per device, in the order the device runs them.
Rows = tuple[tuple[Action, ...], ...]


def write(rows: Rows) -> str:
    """Return `rows` as text, a line a device, an action a comma-separated cell.

    >>> write(((Action(0, "F", 0), Action(0, "B", 0)),))
    '0F0,0B0'
    """
    return "\n".join(",".join(map(str, row)) for row in rows)


def read(text: str) -> Rows:
    """Read what `write` wrote; empty cells (a device waiting) are skipped.

    >>> write(read("0F0,,0B0"))
    '0F0,0B0'
    """
    return tuple(
        tuple(Action.parse(cell.strip()) for cell in line.split(",") if cell.strip())
        for line in text.splitlines()
    )
