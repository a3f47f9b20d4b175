"""Python's collector of cycles, held off where nearly all that is built stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Look for no cycles meanwhile; as a context or a decorator.

    What nobody refers to is freed as ever. Walking the hundred thousand objects of a large model's
    graph again and again was a sixth of tracing and of searching.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
