"""What stands for a group, the same on every page: a colour, and a glyph where there is none.

The first eight colours are Okabe and Ito's, told apart with any colour vision; the rest are from
Paul Tol's muted scheme and lean on the labels, the legend and the glyphs.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#c9b400", "#8c8c8c",
    "#44aa99", "#aa4499", "#999933", "#88673a", "#6a5acd", "#cc6677",
)  # fmt: skip
GLYPHS = "=~#>+*%-o@x:^&"

# Groups seen together in one figure are apart here; any other name takes a place by its checksum.
_KNOWN = {
    "": 7,
    "forward": 0, "backward": 1, "optimizer": 2, "communication": 3, "recompute": 4, "wait": 7,
    "send": 3, "recv": 9, "all_reduce": 5, "all_gather": 8, "reduce_scatter": 11, "all_to_all": 10,
    "broadcast": 13,
    "prefill": 5, "decode": 0, "queue": 7, "swap": 3, "prefetch": 2, "read": 8, "search": 12,
    "generate": 1, "embed": 4, "merge": 10,
}  # fmt: skip


def places(groups: Iterable[str]) -> dict[str, int]:
    """Return each group's place in COLOURS and GLYPHS, its own while there are places left.

    Groups keep the order in which they first appear; their places do not depend on it.

    >>> places(["forward", "backward", ""])
    {'forward': 0, 'backward': 1, '': 7}
    """
    order = list(dict.fromkeys(groups))
    chosen: dict[str, int] = {}
    # Known names choose first, in their own order, so that no other pushes them aside.
    known = [name for name in _KNOWN if name in order]
    for name in known + sorted(set(order) - set(known)):
        wanted = _KNOWN.get(name, zlib.crc32(name.encode("utf-8", "replace")) % len(COLOURS))
        ahead = [(wanted + step) % len(COLOURS) for step in range(len(COLOURS))]
        taken = set(chosen.values())
        chosen[name] = next((place for place in ahead if place not in taken), wanted)
    return {name: chosen[name] for name in order}


def colours(groups: Iterable[str]) -> dict[str, str]:
    """Return each group's colour, "#rrggbb".

    >>> colours(["forward"])
    {'forward': '#0072b2'}
    """
    return {name: COLOURS[place] for name, place in places(groups).items()}


def ink(colour: str) -> str:
    """Return the text colour, black or white, that reads better on `colour` ("#rrggbb").

    >>> ink("#0072b2"), ink("#e69f00")
    ('#ffffff', '#000000')
    """
    linear = []
    for at in (1, 3, 5):
        part = int(colour[at : at + 2], 16) / 255
        linear.append(part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # WCAG contrast against white and against black are equal at luminance 0.179.
    return "#ffffff" if luminance < 0.179 else "#000000"


def shade(colour: str) -> str:
    """Return a darker `colour`, dark enough for white letters.

    >>> shade("#e69f00")
    '#735000'
    """
    return "#" + "".join(f"{round(int(colour[at : at + 2], 16) / 2):02x}" for at in (1, 3, 5))
