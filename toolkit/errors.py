"""Errors a user sees: one sentence with the values, the constraint, the remedy; an exit code."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType

# Users install extras, not the distribution a module happens to come from.
_INSTALL = "pip install 'toolkit[{extra}]'"


class ToolkitError(Exception):
    """Something the user asked for could not be done. `remedy` says what to do about it."""

    exit_code = 1
    kind = "failure"

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


class UsageError(ToolkitError):
    """The request itself is wrong: an unknown name, a bad option, a missing file."""

    exit_code = 2
    kind = "usage"


class InfeasibleError(ToolkitError):
    """The request is well formed and nothing satisfies it; the message says what is nearest."""

    exit_code = 3
    kind = "infeasible"


class FormatError(ToolkitError):
    """A file is not what it should be: torn, foreign, corrupt, or of another version."""

    kind = "format"


class MissingExtraError(ToolkitError):
    """A feature needs an optional dependency that is not installed."""

    kind = "missing-extra"


def unknown_name(what: str, name: str, known: Iterable[str]) -> UsageError:
    """Return the error for a `name` that is none of the `known` ones, nearest matches first.

    >>> str(unknown_name("device", "h10", ["h100", "h200", "l4"]))
    "unknown device 'h10'; did you mean 'h100'?"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    if near:
        return UsageError(
            f"unknown {what} {name!r}", remedy=f"did you mean {' or '.join(map(repr, near))}?"
        )
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return UsageError(f"unknown {what} {name!r}", remedy=f"known: {shown or 'none'}")


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional dependency, or raise MissingExtraError naming the pip command.

    >>> require("json", extra="serve").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        raise MissingExtraError(
            f"{missing!r} is not installed, and this needs it",
            remedy=f"install it with: {_INSTALL.format(extra=extra)}",
        ) from error
