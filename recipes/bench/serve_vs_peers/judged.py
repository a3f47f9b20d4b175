"""What a contender's weight format costs: the likelihood of a text that no model here wrote.

toolkit's and OpenVINO's are the mean over all tokens of windows of 512; llama.cpp's own tool counts
the second half of each window only. So each is compared with float32 judged in the same way.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, Place
from running import Driver

from toolkit.errors import ToolkitError

_TOKENS, _WINDOW = 8192, 512


def all_of(place: Place) -> dict[str, Any]:
    """Return perplexities of every lossy format that can be judged here, and of float32."""
    from toolkit.models import weights
    from toolkit.serve.assemble import EngineSettings, assemble
    from toolkit.serve.model.quality import held_text, mean_nll

    found: dict[str, Any] = {}
    path, ids, text = weights.resolve("smollm2-135m").path, [], ""
    for mode in ("none", "int8", "int4"):
        settings = EngineSettings(quantize=mode, threads=place.threads, kv_bytes=2**28)
        assembly = assemble(path, settings)
        assembly.executor.start()
        ids = assembly.tokenizer.encode(held_text()[: 8 * _TOKENS])[:_TOKENS]
        text = assembly.tokenizer.decode(ids)
        name = "toolkit-fp32" if mode == "none" else f"toolkit-{mode}"
        found[name] = _entry(mean_nll(assembly.executor.decoder, ids), found, "toolkit-fp32")
    openvino = CONTENDERS["openvino-int8"]
    if openvino.missing(place) is None:
        running = openvino.start(place, place.logs / "openvino-quality.log")
        assert isinstance(running, Driver)
        windows = [ids[first : first + _WINDOW] for first in range(0, len(ids), _WINDOW)]
        found[openvino.name] = _entry(running.ask(windows=windows), found, "toolkit-fp32")
        running.close()
    tool = place.peers / "llama.cpp" / "bin" / "llama-perplexity"
    for kind in ("f32", "q8_0", "q4_1", "q4_0"):
        file = place.models / f"{kind}.gguf"
        if tool.exists() and file.exists():
            nll = _llama(tool, file, text, place.threads)
            found[f"llama.cpp-{kind}"] = _entry(nll, found, "llama.cpp-f32")
    return found


def _entry(nll: float, found: dict[str, Any], reference: str) -> dict[str, Any]:
    exact = found.get(reference, {"nll": nll})["nll"]
    return {
        "nll": nll,
        "perplexity": math.exp(nll),
        "change": math.exp(nll - exact) - 1,
        "against": reference,
    }


def _llama(tool: Path, file: Path, text: str, threads: int) -> float:
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as written:
        written.write(text)
        written.flush()
        command = [str(tool), "-m", str(file), "-f", written.name]
        command += ["-c", str(_WINDOW), "-t", str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = re.search(r"Final estimate: PPL = ([0-9.]+)", done.stdout + done.stderr)
    if said is None:
        raise ToolkitError(f"{tool} judged nothing: {done.stderr[-1000:]}")
    return math.log(float(said[1]))
