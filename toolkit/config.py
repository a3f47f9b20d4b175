"""Settings: TOML into frozen dataclasses (an unknown key is an error), and where files live."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, TypeVar, cast

from toolkit.errors import FormatError, UsageError, unknown_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


def cache_dir() -> Path:
    """Where downloaded weights and built indexes are kept: $TOOLKIT_CACHE, else XDG's cache."""
    chosen = os.environ.get("TOOLKIT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "toolkit"


def read_toml(path: Path) -> dict[str, Any]:
    """Return the file's tables. Raises UsageError when missing, FormatError when not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UsageError(f"no such file: {path}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not valid TOML: {error}") from error


def parse(kind: type[T], values: dict[str, Any], *, where: str) -> T:
    """Build the dataclass `kind` from plain values, checking types; unknown keys are errors.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Server:
    ...     port: int = 8000
    >>> parse(Server, {"port": 9000}, where="server.toml")
    Server(port=9000)
    >>> parse(Server, {"prot": 1}, where="server.toml")
    Traceback (most recent call last):
    toolkit.errors.UsageError: unknown key in server.toml 'prot'; did you mean 'port'?
    """
    # pydantic costs 70 ms to import and only files need it.
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    known = list(getattr(kind, "__dataclass_fields__", {}))
    for key in values:
        if known and key not in known:
            raise unknown_name(f"key in {where}", key, known)
    strict = cast("type[Any]", type(kind.__name__, (kind,), {}))
    strict.__pydantic_config__ = ConfigDict(extra="forbid")
    try:
        # Validation happens on a subclass so that `kind` itself stays a plain dataclass.
        checked = TypeAdapter(strict).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{where}: {key}: {first['msg']} (got {first['input']!r})") from error
    return kind(**{name: getattr(checked, name) for name in known})


def load(kind: type[T], path: Path) -> T:
    """Read the TOML file `path` as `kind`. Raises UsageError or FormatError naming the key."""
    return parse(kind, read_toml(path), where=str(path))
