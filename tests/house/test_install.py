"""What a user installs: a wheel with everything in it, which runs without the source tree."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import toolkit

ROOT = Path(__file__).resolve().parents[2]


def tracked():
    """Return the project's files: those git knows where there is a checkout, else all sources."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True
        )
        # A file removed and not yet committed is still listed.
        return [
            Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()
        ]
    roots = [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE", "toolkit")]
    return [
        path.relative_to(ROOT)
        for root in roots
        for path in ([root] if root.is_file() else sorted(root.rglob("*")))
        if path.is_file() and "__pycache__" not in path.parts
    ]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    for path in tracked():
        (folder / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / "source" / path)
    # The build backend of this environment where there is one: tests need no network.
    here = [] if importlib.util.find_spec("setuptools") is None else ["--no-build-isolation"]
    pip("wheel", "--no-deps", *here, "--wheel-dir", folder, folder / "source")
    (built,) = folder.glob("toolkit-*.whl")
    return built


def pip(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {path.as_posix() for path in tracked() if path.parts[0] == "toolkit"}
    assert {
        "toolkit/py.typed", "toolkit/timeline/page.html", "toolkit/hardware/catalogue.toml"
    } <= wanted  # fmt: skip
    assert wanted - inside == set()


def test_nothing_else_is_in_the_wheel(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"toolkit", f"toolkit-{toolkit.__version__}.dist-info"}


def test_the_installed_package_runs_away_from_its_source(wheel, tmp_path):
    target = tmp_path / "site"
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    environment = {**os.environ, "PYTHONPATH": str(target), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    where = run("-c", "import toolkit; print(toolkit.__file__)").stdout.strip()
    assert Path(where).is_relative_to(target), where
    assert run("-m", "toolkit", "--version").stdout == f"toolkit {toolkit.__version__}\n"
    script = (
        "from pathlib import Path\n"
        "from toolkit.timeline import Span, Timeline, html\n"
        "html.write(Timeline('t', (Span('a', 't', 0, 1),)), Path('page.html'))\n"
    )
    done = run("-c", script)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_the_wheel_names_the_command_and_the_versions_it_needs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        about = f"toolkit-{toolkit.__version__}.dist-info"
        assert (
            "toolkit = toolkit.cli.main:main" in archive.read(f"{about}/entry_points.txt").decode()
        )
        written = archive.read(f"{about}/METADATA").decode()
    assert "Requires-Python: >=3.10" in written
    assert "Requires-Dist: torch>=2.13" in written
