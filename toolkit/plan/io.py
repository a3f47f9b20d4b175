"""plan.json: a plan as a record (kind "plan", version 2), checked when it is read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from toolkit import record
from toolkit.errors import FormatError
from toolkit.plan import check
from toolkit.plan.order.action import Action
from toolkit.plan.plan import Plan

KIND, VERSION = "plan", 2


def to_body(plan: Plan) -> dict[str, Any]:
    """Return the plan as a JSON value; a row of actions is one text (`0F0 0B0`)."""
    body = dataclasses.asdict(dataclasses.replace(plan, order=()))
    body["order"] = [" ".join(map(str, row)) for row in plan.order]
    return body


def save(plan: Plan, path: Path) -> str:
    """Write plan.json; return its digest."""
    return record.write(path, kind=KIND, version=VERSION, body=to_body(plan))


def load(path: Path) -> Plan:
    """Read plan.json.

    Raises UsageError when the file is missing, and FormatError when it is torn, edited, of another
    kind or version, has a key this toolkit does not know, or holds a schedule that cannot run.
    """
    return from_body(record.read(path, kind=KIND, version=VERSION)["body"], where=str(path))


def from_body(body: Any, *, where: str) -> Plan:
    """Build the plan from a JSON value, naming the first key that is wrong."""
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(body, dict):
        raise FormatError(f"{where}: the plan is not a JSON object")
    try:
        order = tuple(
            tuple(Action.parse(text) for text in row.split()) for row in body.get("order", ())
        )
    except (TypeError, AttributeError, FormatError) as error:
        raise FormatError(f"{where}: order: {error}") from error
    text = json.dumps({**body, "order": []})
    try:
        plan = TypeAdapter(Plan).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise FormatError(
            f"{where}: {key}: {first['msg']}", remedy="write it again with `toolkit plan make`"
        ) from error
    plan = dataclasses.replace(plan, order=order)
    check.check(plan, where=where)
    return plan
