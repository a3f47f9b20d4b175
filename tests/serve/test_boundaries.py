"""The bookkeeping stays pure: no torch, no clock, no sleep, so that a simulator can run it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import toolkit.serve

HERE = Path(toolkit.serve.__file__).parent
PURE = sorted(
    [
        *(
            HERE / f"{name}.py"
            for name in ("batch", "engine", "journal", "queue", "request", "structured")
        ),
        HERE / "scheduler.py",
        HERE / "executor" / "base.py",
        *(HERE / "kv").glob("*.py"),
        *(HERE / "policy").glob("*.py"),
        *(HERE / "programs").glob("*.py"),
        # Reading a graph is ir's, which needs torch; everything after it does not.
        *(path for path in (HERE / "split").glob("*.py") if path.stem not in ("traced", "along")),
    ]
)
# The simulator prices many steps at once, as arrays.
SIMULATED = sorted(
    [
        HERE / "executor" / "simulated.py",
        HERE / "split" / "along.py",
        *(HERE / "simulate").glob("*.py"),
    ]
)
TIMED = {"time", "datetime", "asyncio", "threading", "sched", "signal"}


def _module(path: Path) -> str:
    parts = path.relative_to(HERE.parent.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@pytest.mark.parametrize(
    ("paths", "without"),
    [
        (PURE, {"torch", "transformers", "fastapi", "numpy"}),
        (SIMULATED, {"torch", "transformers", "fastapi"}),
    ],
)
def test_bookkeeping_brings_no_torch(paths: list[Path], without: set[str]) -> None:
    names = [_module(path) for path in paths]
    code = (
        "import importlib, sys\n"
        f"for name in {names}: importlib.import_module(name)\n"
        f"heavy = {without} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", PURE + SIMULATED, ids=_module)
def test_bookkeeping_reads_no_clock(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
            assert "WallClock" not in {alias.name for alias in node.names}
    assert not imported & TIMED
