"""Read and write quantities. Rates are SI (TFLOP/s, GB/s); memory is binary (GiB)."""

from __future__ import annotations

import math
import re

from toolkit.errors import UsageError

KIB, MIB, GIB = 1024, 1024**2, 1024**3
KILO, MEGA, GIGA, TERA, PETA = 1e3, 1e6, 1e9, 1e12, 1e15

_BYTES = {
    "": 1, "b": 1,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": 1024**4,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9, "min": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([a-zA-Z]*)\s*")


def _parse(text: str, what: str, units: dict[str, float] | dict[str, int]) -> float:
    found = _QUANTITY.fullmatch(text)
    unit = found[2].lower() if found else ""
    if not found or unit not in units:
        known = ", ".join(name for name in units if name)
        raise UsageError(f"{text!r} is not {what}", remedy=f"write a number and one of: {known}")
    value = float(found[1]) * units[unit]
    if not math.isfinite(value):
        raise UsageError(f"{text!r} is too large for {what}")
    return value


def parse_bytes(text: str) -> int:
    """Return bytes.

    >>> parse_bytes("2 GiB"), parse_bytes("500MB"), parse_bytes("64")
    (2147483648, 500000000, 64)
    """
    return round(_parse(text, "a size in bytes", _BYTES))


def parse_seconds(text: str) -> float:
    """Return seconds.

    >>> parse_seconds("1.5ms"), parse_seconds("2min")
    (0.0015, 120.0)
    """
    return _parse(text, "a duration", _SECONDS)


def _scaled(value: float, steps: list[tuple[float, str]]) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {steps[0][1]}"
    size, unit = steps[0]
    for next_size, next_unit in steps[1:]:
        # 999.95 would print as "1000": move up a unit as soon as three digits round over.
        if abs(value) >= next_size * 0.9995:
            size, unit = next_size, next_unit
    shown = value / size
    # Binary units run to 1023 before the next one begins.
    return f"{shown:.3g} {unit}" if abs(shown) < 999.5 else f"{shown:.0f} {unit}"


def format_bytes(num_bytes: float) -> str:
    """Memory, binary.

    >>> format_bytes(3 * GIB), format_bytes(700)
    ('3 GiB', '700 B')
    """
    return _scaled(
        num_bytes, [(1, "B"), (KIB, "KiB"), (MIB, "MiB"), (GIB, "GiB"), (1024**4, "TiB")]
    )


def format_rate(bytes_per_s: float) -> str:
    """Bandwidth, SI.

    >>> format_rate(3.35e12)
    '3.35 TB/s'
    """
    return _scaled(
        bytes_per_s, [(1, "B/s"), (KILO, "kB/s"), (MEGA, "MB/s"), (GIGA, "GB/s"), (TERA, "TB/s")]
    )


def format_flops(flops: float, *, per_second: bool = False) -> str:
    """Floating-point operations, SI.

    >>> format_flops(2.5e12), format_flops(989.5e12, per_second=True)
    ('2.5 TFLOP', '990 TFLOP/s')
    """
    steps = [
        (1.0, ""),
        (KILO, "k"),
        (MEGA, "M"),
        (GIGA, "G"),
        (TERA, "T"),
        (PETA, "P"),
        (1e18, "E"),
    ]
    tail = "FLOP/s" if per_second else "FLOP"
    return _scaled(flops, [(size, prefix + tail) for size, prefix in steps])


def format_seconds(seconds: float) -> str:
    """Duration.

    >>> format_seconds(0.00125), format_seconds(41.12), format_seconds(90), format_seconds(7300)
    ('1.25 ms', '41.1 s', '1 min 30 s', '2 h 1 min')
    """
    if seconds == 0:
        return "0 s"
    if seconds < 0:
        return f"-{format_seconds(-seconds)}"
    if seconds < 59.95:
        return _scaled(seconds * 1e9, [(1, "ns"), (1e3, "us"), (1e6, "ms"), (1e9, "s")])
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def format_count(count: float) -> str:
    """Parameters, tokens, passages.

    >>> format_count(134_515_008), format_count(950)
    ('135M', '950')
    """
    steps = [(1.0, ""), (KILO, "k"), (MEGA, "M"), (GIGA, "B"), (TERA, "T")]
    return _scaled(count, steps).replace(" ", "")
