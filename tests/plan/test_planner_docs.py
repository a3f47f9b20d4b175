"""The planner's page is run as it is written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_PAGE = _ROOT / "docs" / "howto" / "plan-and-train.md"


@pytest.mark.slow
def test_every_command_of_the_page_runs_in_order(tmp_path: Path) -> None:
    text = _PAGE.read_text()
    (code,) = re.findall(r"```python\n# mymodel.py\n(.*?)```", text, re.DOTALL)
    (tmp_path / "mymodel.py").write_text(code)
    (tmp_path / "recipes").symlink_to(_ROOT / "recipes")
    folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    commands = [
        line
        for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(commands) >= 8
    for line in commands:
        arguments = shlex.split(line)
        if not (folder / arguments[0]).exists():
            pytest.skip(f"{arguments[0]} is not installed beside this Python")
        done = subprocess.run(
            arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (tmp_path / "exported" / "accelerate.yaml").exists()
