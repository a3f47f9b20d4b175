"""The same weights for everyone: SmolLM2's GGUF, dequantised once, in the forms that peers read."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from contenders import Place
from rich.console import Console

from toolkit.errors import ToolkitError
from toolkit.models import weights

console = Console(stderr=True, highlight=False)


def make(place: Place) -> None:
    """Write every form whose tool is installed and that is not there yet."""
    source = weights.resolve("smollm2-135m").path
    place.models.mkdir(parents=True, exist_ok=True)
    folder = place.models / "hf"
    _unless(folder, lambda: hugging_face(source, folder))
    quantize = place.peers / "llama.cpp" / "bin" / "llama-quantize"
    if quantize.exists():
        dense = place.models / "f32.gguf"
        _unless(dense, lambda: _run(quantize, "--allow-requantize", source, dense, "F32"))
        for kind in ("q8_0", "q4_0"):
            file = place.models / f"{kind}.gguf"
            _unless(file, lambda file=file, kind=kind: _run(quantize, dense, file, kind.upper()))
        if not (place.models / "q4_1.gguf").exists():
            (place.models / "q4_1.gguf").symlink_to(source.resolve())
    export = place.peers / "openvino" / "bin" / "optimum-cli"
    if export.exists():
        made = place.models / "openvino-int8"
        _unless(
            made,
            lambda: _run(
                export, "export", "openvino", "-m", folder, "--task", "text-generation-with-past",
                "--weight-format", "int8", made,
            ),
        )  # fmt: skip


def hugging_face(source: Path, folder: Path) -> None:
    """Write the file's weights in float32, and its tokenizer, as a Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    # A fresh model: the one that was read still says that it is quantised.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    # Readers older than the writer look for this one at the top.
    written = folder / "config.json"
    theta = config.rope_parameters["rope_theta"]
    written.write_text(json.dumps(json.loads(written.read_text()) | {"rope_theta": theta}))
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def _unless(path: Path, action) -> None:
    if not path.exists():
        console.print(f"making {path}", markup=False)
        action()


def _run(program: Path, *arguments: object) -> None:
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode:
        raise ToolkitError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}"
        )
