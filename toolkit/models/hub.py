"""The Hugging Face hub: files by id, from its cache when it cannot be reached."""

from __future__ import annotations

from pathlib import Path

from toolkit.errors import ToolkitError, require

_TIMEOUT_S = 5.0


def snapshot(hub_id: str, patterns: list[str]) -> Path:
    """Return a local folder with the files of `hub_id` that match `patterns`.

    Raises ToolkitError when there is no such model, or the hub cannot be reached and its cache
    does not have the model either.
    """
    hub = require("huggingface_hub", extra="serve")
    unreachable = _unreachable()
    try:
        folder = hub.snapshot_download(
            hub_id, allow_patterns=patterns, local_files_only=unreachable is not None
        )
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        reason = unreachable or str(error).strip().partition("\n")[0] or repr(error)
        raise ToolkitError(
            f"cannot get {hub_id!r} from the Hugging Face hub: {reason}",
            remedy="check the name and the network, or give a local folder (a path with a slash)",
        ) from error
    return Path(folder)


def _unreachable() -> str | None:
    """Say why the hub cannot be reached. Its client retries for half a minute; we ask once."""
    constants = require("huggingface_hub.constants", extra="serve")
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    httpx = require("httpx", extra="serve")
    try:
        httpx.head(constants.ENDPOINT, timeout=_TIMEOUT_S)
    except httpx.HTTPError as error:
        return f"{constants.ENDPOINT} does not answer ({error})"
    return None
