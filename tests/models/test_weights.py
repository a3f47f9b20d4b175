"""Built-in weights: fetched once, verified, placed whole or not at all, whatever goes wrong."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from toolkit.errors import FormatError, ToolkitError, UsageError
from toolkit.models import fetch, weights
from toolkit.models.fetch import Package

# Stands in for pip in a child process: `python -m pip` finds it first on PYTHONPATH.
FAKE_PIP = """
import os, pathlib, shutil, sys, time
home = pathlib.Path(os.environ["FAKE_PIP"])
with (home / "calls").open("a") as calls:
    calls.write(f"{os.getpid()}\\n")
mode = (home / "mode").read_text()
if mode == "absent":
    sys.exit("python: No module named pip")
if mode == "offline":
    print("WARNING: Retrying")
    sys.exit("ERROR: No matching distribution found for tiny==1")
if mode == "full":
    sys.exit("ERROR: [Errno 28] No space left on device")
(pathlib.Path(os.environ["TMPDIR"]) / "part").write_bytes(b"x" * 100)
time.sleep({"hang": 60, "slow": 0.6}.get(mode, 0))
target = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
target.mkdir()
shutil.copy(home / "tiny-1-py3-none-any.whl", target)
if mode == "altered":
    (target / "tiny-1-py3-none-any.whl").write_bytes(b"something else")
"""
FILES = {"a.bin": b"a" * 3000, "sub/b.json": b"{}", "unwanted.py": b"raise SystemExit"}


class Index:
    """A pretended package index with one package, and what pip was asked of it."""

    def __init__(self, home):
        self.home = home
        self.wheel = home / "tiny-1-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            for name, data in FILES.items():
                archive.writestr(f"tiny/{name}", data)
        data = self.wheel.read_bytes()
        self.package = Package(
            requirement="tiny==1",
            wheel_sha256=hashlib.sha256(data).hexdigest(),
            wheel_bytes=len(data),
            files_bytes=3002,
            prefix="tiny/",
            files=("a.bin", "sub/b.json"),
        )
        self.mode = "serves"

    @property
    def mode(self):
        return (self.home / "mode").read_text()

    @mode.setter
    def mode(self, mode):
        (self.home / "mode").write_text(mode)

    @property
    def calls(self):
        path = self.home / "calls"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def index(tmp_path, monkeypatch, cache):
    home = tmp_path / "index"
    (home / "pip").mkdir(parents=True)
    (home / "pip" / "__init__.py").touch()
    (home / "pip" / "__main__.py").write_text(FAKE_PIP)
    monkeypatch.setenv("PYTHONPATH", str(home))
    monkeypatch.setenv("FAKE_PIP", str(home))
    return Index(home)


def leftovers(cache):
    return [path.name for path in cache.glob(".*") if not path.name.endswith(".lock")]


def start(index, **settings):
    """Run `ensure` in a process of its own."""
    code = (
        "from toolkit.models import fetch\n"
        f"print(fetch.ensure('tiny', fetch.Package(**{vars(index.package)!r})))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **settings,
    )  # fmt: skip


def test_fetches_once_and_keeps_only_what_is_wanted(index, cache):
    seen = []
    folder = fetch.ensure(
        "tiny", index.package, progress=lambda done, total: seen.append((done, total))
    )
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == {"a.bin": FILES["a.bin"], "sub/b.json": b"{}"}
    total = index.package.wheel_bytes + 3002
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
    assert fetch.ensure("tiny", index.package, verify=True) == folder
    assert len(index.calls) == 1
    assert leftovers(cache) == []


@pytest.mark.parametrize(
    ("mode", "said", "remedy"),
    [
        ("absent", "this Python has no pip", "-m ensurepip"),
        ("offline", "No matching distribution found for tiny==1", "PIP_FIND_LINKS"),
        ("full", "no room to fetch tiny==1", "TOOLKIT_CACHE"),
        ("altered", "the index served another file", "pip config list"),
    ],
)
def test_when_it_cannot_be_fetched(index, cache, mode, said, remedy):
    index.mode = mode
    with pytest.raises(ToolkitError) as caught:
        fetch.ensure("tiny", index.package)
    assert said in caught.value.message
    assert remedy in caught.value.remedy
    assert "WARNING" not in str(caught.value)
    assert fetch.cached("tiny", index.package) is None
    assert leftovers(cache) == []
    index.mode = "serves"
    assert (fetch.ensure("tiny", index.package) / "a.bin").is_file()


def test_no_room_is_seen_before_anything_is_fetched(index, monkeypatch):
    usage = type("Usage", (), {"free": 2 * 1024**2})
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ToolkitError, match=r"has 2 MiB free, and fetching tiny==1 needs"):
        fetch.ensure("tiny", index.package)
    assert index.calls == []


def test_a_disk_that_fills_while_unpacking_leaves_nothing(index, cache, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetch, "_unpack", full)
    with pytest.raises(ToolkitError, match="free space, or set TOOLKIT_CACHE"):
        fetch.ensure("tiny", index.package)
    assert leftovers(cache) == []
    assert fetch.cached("tiny", index.package) is None


def test_a_cache_that_cannot_be_written(index, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ToolkitError, match="set TOOLKIT_CACHE to a folder that can be written"):
        fetch.ensure("tiny", index.package)


def truncate(home):
    (home / "files" / "a.bin").write_bytes(b"a" * 10)


def delete(home):
    (home / "files" / "sub" / "b.json").unlink()


def tear_manifest(home):
    text = (home / "manifest.json").read_text()
    (home / "manifest.json").write_text(text[: len(text) // 2])


def alter_manifest(home):
    text = (home / "manifest.json").read_text()
    (home / "manifest.json").write_text(text.replace("3000", "10"))


@pytest.mark.parametrize("damage", [truncate, delete, tear_manifest, alter_manifest])
def test_a_damaged_cache_is_noticed_and_fetched_again(index, cache, damage):
    fetch.ensure("tiny", index.package)
    damage(cache / "tiny")
    assert fetch.cached("tiny", index.package) is None
    folder = fetch.ensure("tiny", index.package)
    assert (folder / "a.bin").read_bytes() == FILES["a.bin"]
    assert len(index.calls) == 2
    assert leftovers(cache) == []


def test_a_damaged_cache_offline_is_an_error_and_not_used(index, cache):
    fetch.ensure("tiny", index.package)
    truncate(cache / "tiny")
    index.mode = "offline"
    with pytest.raises(ToolkitError, match="pip could not fetch"):
        fetch.ensure("tiny", index.package)


def test_a_flipped_byte_is_found_by_verify(index):
    folder = fetch.ensure("tiny", index.package)
    (folder / "a.bin").write_bytes(b"b" + FILES["a.bin"][1:])
    assert fetch.ensure("tiny", index.package) == folder, "sizes alone cannot tell"
    assert len(index.calls) == 1
    fetch.ensure("tiny", index.package, verify=True)
    assert len(index.calls) == 2
    assert (folder / "a.bin").read_bytes() == FILES["a.bin"]


def test_another_pinned_version_replaces_the_cached_one(index):
    folder = fetch.ensure("tiny", index.package)
    with zipfile.ZipFile(index.wheel, "a") as archive:
        archive.writestr("tiny/new", b"")
    data = index.wheel.read_bytes()
    fields = vars(index.package) | {
        "wheel_sha256": hashlib.sha256(data).hexdigest(), "files": ("a.bin", "new"),
    }  # fmt: skip
    assert fetch.ensure("tiny", Package(**fields)) == folder
    assert (folder / "new").is_file()
    assert not (folder / "sub").exists()


def test_two_processes_at_once_fetch_once(index):
    index.mode = "slow"
    both = [start(index), start(index)]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len(index.calls) == 1


def test_killed_halfway_the_next_one_finishes_and_cleans_up(index, cache):
    index.mode = "hang"
    process = start(index)
    while not index.calls:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    process.communicate()
    os.kill(int(index.calls[0]), signal.SIGKILL)
    assert len(leftovers(cache)) == 1
    index.mode = "serves"
    assert (fetch.ensure("tiny", index.package) / "a.bin").is_file()
    assert leftovers(cache) == []


def test_an_interrupt_ends_pip_too(index, cache):
    index.mode = "hang"

    def interrupt(done, total):
        if index.calls and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch.ensure("tiny", index.package, progress=interrupt)
    assert leftovers(cache) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(index.calls[0]), 0)


def test_importing_weights_imports_no_torch():
    code = "import sys; from toolkit.models import weights; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def gguf(path):
    path.write_bytes(b"GGUF" + bytes(20))
    return path


def test_resolve_files_and_folders(tmp_path):
    file = gguf(tmp_path / "a.gguf")
    assert weights.resolve(str(file)) == weights.Weights("gguf", file)
    assert weights.resolve(str(tmp_path)) == weights.Weights("gguf", file)
    gguf(tmp_path / "b.gguf")
    with pytest.raises(UsageError, match="holds 2 GGUF files; name one"):
        weights.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    assert weights.resolve(f"hf:{tmp_path}") == weights.Weights("huggingface", tmp_path)


@pytest.mark.parametrize(
    ("ref", "kind", "said"),
    [
        ("minilm-l7", UsageError, "unknown weights 'minilm-l7'"),
        ("minilm-l7", UsageError, "did you mean 'minilm-l6'"),
        ("llama3-8b", UsageError, "no file, folder or hub id (owner/name) either; known: minilm"),
        ("./none", UsageError, "no such file or folder"),
        ("none.gguf", UsageError, "no such file or folder"),
        ("{here}/empty", FormatError, "holds no weights"),
        ("{here}/text", FormatError, "is not a GGUF file"),
    ],
)
def test_resolve_errors(tmp_path, monkeypatch, ref, kind, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    with pytest.raises(kind) as caught:
        weights.resolve(ref.format(here=tmp_path))
    assert said in str(caught.value)


def test_resolve_a_hub_id_offline(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ToolkitError, match="cannot get 'no-one/nothing' from the Hugging Face hub"):
        weights.resolve("no-one/nothing")


def test_the_real_ones(smollm2_gguf, minilm_dir):
    assert weights.resolve("smollm2-135m") == weights.Weights("gguf", smollm2_gguf)
    assert weights.resolve("minilm-l6") == weights.Weights("huggingface", minilm_dir)
    assert weights.get("minilm-l6", verify=True) == minilm_dir
    assert (Path(minilm_dir) / "tokenizer.json").is_file()


def test_the_zoo_has_the_shape_of_the_real_smollm2(smollm2_gguf):
    gguf_reader = pytest.importorskip("gguf").GGUFReader(smollm2_gguf)
    from toolkit import models

    def field(name):
        return gguf_reader.get_field(f"llama.{name}").contents()

    config = models.load("smollm2-135m").config
    assert config.num_layers == field("block_count")
    assert config.model_dim == field("embedding_length")
    assert config.ffn_dim == field("feed_forward_length")
    assert config.num_heads == field("attention.head_count")
    assert config.num_kv_heads == field("attention.head_count_kv")
    assert config.rope_theta == field("rope.freq_base")
    assert config.max_tokens == field("context_length")
    assert config.vocab_size == field("vocab_size")
    assert config.norm_eps == pytest.approx(field("attention.layer_norm_rms_epsilon"))
