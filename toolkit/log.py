"""Logging to stderr, one logger per module: text for people or JSON for machines."""

from __future__ import annotations

import json
import logging
import os
import sys


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def get_logger(name: str) -> logging.Logger:
    """Return the logger for a module (pass `__name__`)."""
    return logging.getLogger(name)


def event(logger: logging.Logger, what: str, **fields: object) -> None:
    """Log that something happened: as text `what key=value ...`, as JSON with keys of its own.

    A value of None is left out of the text.
    """
    told = " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
    logger.info("%s %s", what, told, extra={"fields": {"message": what, **fields}})


def setup(*, verbose: bool = False, as_json: bool | None = None) -> None:
    """Send toolkit's logs to stderr. `as_json` None reads TOOLKIT_LOG=json."""
    if as_json is None:
        as_json = os.environ.get("TOOLKIT_LOG", "").lower() == "json"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _JsonFormatter() if as_json else logging.Formatter("%(levelname)s %(name)s: %(message)s")
    )
    root = logging.getLogger("toolkit")
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbose else logging.WARNING)
    root.propagate = False
