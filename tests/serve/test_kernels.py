"""The CPU kernels against their torch references, and the same bits however work is shared out."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from toolkit.errors import ToolkitError
from toolkit.serve.batch import Batch, Slice
from toolkit.serve.model import gpt2, native, quantisation
from toolkit.serve.model.config import DecoderConfig
from toolkit.serve.model.decoder import Decoder
from toolkit.serve.model.grouped import Grouped, Weight, dense, from_gguf, quantise
from toolkit.serve.model.inputs import prepare
from toolkit.serve.model.kernels import build
from toolkit.serve.model.kernels.library import Library, Team, library, load
from toolkit.serve.model.kernels.packed import pack
from toolkit.serve.model.linear import product
from toolkit.serve.model.loaded import LoadedModel, expected
from toolkit.serve.model.native import NativeDecoder
from toolkit.serve.model.quantisation import MODES, Mode, converted
from toolkit.serve.request import Phase, Request, SamplingParams


@pytest.fixture(scope="session")
def kernels() -> Library:
    try:
        return library()
    except ToolkitError as error:
        pytest.skip(str(error))


def weights_of(rows: int, columns: int) -> dict[str, Weight]:
    """The same matrix in each format a kernel has; the last has scales that no half holds."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    four = quantise(weight, 4)
    assert four.minima is not None
    wide = Grouped(4, four.levels, four.scales * 1.001, four.minima * 1.001)
    return {"float32": weight, "int8": quantise(weight, 8), "int4": four, "int4_wide": wide}


def multiplied(team: Team, kernels: Library, weight: Weight, x: torch.Tensor) -> torch.Tensor:
    matrix = pack(weight, kernels, torch.arange(weight.shape[0]) / 8)
    x = torch.nn.functional.pad(x, (0, matrix.columns - x.shape[1]))
    y = torch.full((len(x), matrix.padded_rows), torch.nan)
    team.multiply(matrix.c, x.data_ptr(), len(x), y.data_ptr())
    return y[:, : matrix.rows]


@pytest.mark.parametrize("kind", ["float32", "int8", "int4", "int4_wide"])
@pytest.mark.parametrize(("rows", "columns"), [(99, 48), (64, 576), (16, 33)])
def test_products(kernels: Library, kind: str, rows: int, columns: int) -> None:
    """As torch's, and a row's bits the same alone, among others, and on any number of threads."""
    check_products(kernels, kind, rows, columns)


def check_products(kernels: Library, kind: str, rows: int, columns: int) -> None:
    weight = weights_of(rows, columns)[kind]
    x = torch.randn(131, columns, generator=torch.Generator().manual_seed(1))
    x[3] = 0
    wanted = product(weight, torch.arange(rows) / 8)(x)
    team = Team(kernels, 1)
    found = multiplied(team, kernels, weight, x)
    assert (found - wanted).abs().max() < 1e-5 * columns
    for row in (0, 3, 130):
        assert torch.equal(multiplied(team, kernels, weight, x[row : row + 1])[0], found[row])
    assert torch.equal(multiplied(Team(kernels, 3), kernels, weight, x), found)


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_rows_in_any_number(kernels: Library, kind: str) -> None:
    """However many rows there are, and whichever tile and block a row falls into."""
    weight, team = weights_of(40, 70)[kind], Team(kernels, 2)
    x = torch.randn(901, 70, generator=torch.Generator().manual_seed(2))
    found = multiplied(team, kernels, weight, x)
    for rows in (*range(1, 40), 144, 145, 157, 288, 289, 300, 433, 600):
        assert torch.equal(multiplied(team, kernels, weight, x[:rows]), found[:rows]), rows
    alone = [multiplied(team, kernels, weight, row[None]) for row in x]
    assert torch.equal(torch.cat(alone), found)


@pytest.mark.slow
def test_the_portable_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a processor without the instructions gets: plain C++, the same checks."""
    compiler = shutil.which("g++") or pytest.skip("no compiler")
    source, built = Path(build.__file__).parent / "decoder.cpp", tmp_path / "portable.so"
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-pthread"]
    subprocess.run([compiler, *flags, "-o", str(built), str(source)], check=True)
    portable = load(built)
    assert portable.instruction_set == "portable C++"
    for kind in ("float32", "int8", "int4", "int4_wide"):
        check_products(portable, kind, 99, 48)
    test_exponentials(portable)
    monkeypatch.setattr(native, "library", lambda: portable)
    check_attention((4, 2, 12), torch.float16)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q4_K"])
def test_the_files_own_blocks(kind: str) -> None:
    """Blocks of a GGUF file, kept as they are, stand for exactly the numbers gguf reads there."""
    import gguf

    size, scales = {"Q8_0": (34, 1), "Q4_0": (18, 1), "Q4_1": (20, 2), "Q4_K": (144, 2)}[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (6, 3, size), np.uint8)
    halves = np.random.default_rng(1).normal(0, 0.01, (6, 3, scales)).astype(np.float16)
    blocks[..., : 2 * scales] = halves.view(np.uint8)
    data = blocks.reshape(6, -1)
    kept = from_gguf(kind, data)
    assert kept is not None
    wanted = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(kept.dequantised().numpy(), wanted)


TINY = DecoderConfig(
    architecture="llama",
    num_layers=3,
    hidden_size=72,
    num_heads=6,
    num_kv_heads=2,
    head_size=12,
    ffn_size=100,
    vocab_size=83,
    max_context=256,
    norm_eps=1e-5,
    rope_theta=1e4,
    tied_head=True,
    qkv_bias=True,
    qk_norm=True,
)


# Its sizes are no whole vectors.
TINY_GPT2 = gpt2.describe(
    num_layers=3,
    hidden_size=76,
    num_heads=4,
    ffn_size=100,
    vocab_size=83,
    max_context=256,
    norm_eps=1e-5,
    tied_head=True,
)


def tiny_weights(mode: Mode, config: DecoderConfig = TINY) -> dict[str, Weight]:
    draw = torch.Generator().manual_seed(5)
    return {
        name: converted(name, torch.randn(shape, generator=draw) * 0.25, mode)
        for name, shape in expected(config).items()
    }


def run(
    decoder: Decoder | NativeDecoder,
    chunks: Sequence[int],
    neighbours: int,
    block_size: int = 8,
    context: int = 128,
) -> torch.Tensor:
    """Logits of every token of one prompt, computed in chunks beside `neighbours` sequences."""
    num_blocks = context // block_size
    cache = decoder.make_cache(num_blocks * (neighbours + 1), block_size)
    draw = np.random.default_rng(0)
    requests = []
    for i in range(neighbours + 1):
        ids = tuple(draw.integers(0, TINY.vocab_size, context - 8).tolist())
        blocks = list(range(i, num_blocks * (neighbours + 1), neighbours + 1))
        requests.append(Request(f"r{i}", ids, SamplingParams(), block_ids=blocks))
    start, rows = 0, []
    for chunk in chunks:
        mine = requests[0]
        piece = Slice(mine, Phase.PREFILL, start, start + chunk)
        others = [Slice(r, Phase.DECODE, start, start + 1) for r in requests[1:]]
        step = prepare(Batch(0, (*others, piece)), block_size)
        wanted = np.arange(len(step.tokens), dtype=np.int32)[-chunk:]
        object.__setattr__(step, "sample_rows", wanted)
        rows.append(decoder.forward(step, cache).clone())
        start += chunk
    return torch.cat(rows)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("config", [TINY, TINY_GPT2], ids=["llama", "gpt2"])
def test_logits_do_not_depend_on_company(
    kernels: Library, config: DecoderConfig, mode: Mode
) -> None:
    """Bit-equal logits: alone or in a batch, in one chunk or token by token, on 1, 2, 3 threads."""
    decoder = NativeDecoder(config, tiny_weights(mode, config))
    decoder.start(1)
    alone = run(decoder, [1] * 90, 0)
    reference = run(Decoder(config, tiny_weights(mode, config)), [90], 0)
    # A rounding of an activation may fall to the other side: a step of 1 / 127 of its group.
    assert (reference[-1] - alone[-1]).abs().max() < (1e-3 if mode == "none" else 0.2)
    assert torch.equal(run(decoder, [90], 0), alone)
    for threads in (2, 3):
        decoder.start(threads)
        assert torch.equal(run(decoder, [7, 13, 1, 40, 29], 5), alone)


# Query heads, key-value heads, head size.
HEADS = [(3, 3, 32), (9, 3, 64), (8, 2, 80), (8, 1, 96), (12, 1, 44), (2, 2, 128)]


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention(kernels: Library, heads: tuple[int, int, int], kv_dtype: torch.dtype) -> None:
    """As torch's, and the same bits decoded, in one chunk, and in chunks beside others."""
    check_attention(heads, kv_dtype)


def check_attention(heads: tuple[int, int, int], kv_dtype: torch.dtype) -> None:
    num_heads, num_kv_heads, head_size = heads
    config = replace(
        TINY, num_layers=1, hidden_size=48, ffn_size=32, max_context=640,
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size,
    )  # fmt: skip
    decoder = NativeDecoder(config, tiny_weights("none", config), kv_dtype=kv_dtype)
    decoder.start(1)
    whole = run(decoder, [600], 0, 16, 640)
    reference = Decoder(config, tiny_weights("none", config), kv_dtype=kv_dtype)
    near = (whole - run(reference, [600], 0, 16, 640)).abs().max()
    assert near < (1e-3 if kv_dtype is torch.float32 else 2e-2)
    assert torch.equal(run(decoder, [1] * 600, 0, 16, 640), whole)
    decoder.start(2)
    assert torch.equal(run(decoder, [255, 2, 1, 97, 3, 242], 17, 16, 640), whole)


def test_exponentials(kernels: Library) -> None:
    """Within 2 units in the last place, and next to nothing below what a float32 holds."""
    x = torch.linspace(-87, 88, 80_000)
    y = torch.empty_like(x)
    kernels.calls.kernels_exp(x.data_ptr(), y.data_ptr(), len(x))
    assert ((y.double() / x.double().exp() - 1).abs() < 2**-22).all()
    x = torch.full((16,), -torch.inf)
    kernels.calls.kernels_exp(x.data_ptr(), y.data_ptr(), len(x))
    assert (y[:16] < 1e-37).all()


@pytest.mark.parametrize("finer", ["v_proj", "gate_proj", "down_proj"])
def test_a_file_that_mixes_bits(kernels: Library, finer: str) -> None:
    """As Q4_K_M does: what is finer than 4 bits has 8, and whatever one product reads with it."""
    weights = tiny_weights("none")
    exact = {name: dense(weight).clone() for name, weight in weights.items()}
    model = LoadedModel(
        TINY, weights, frozenset(), frozenset(name for name in exact if finer in name)
    )
    decoder = quantisation.make_decoder(model, "int4")
    assert isinstance(decoder, NativeDecoder)
    held = Counter(matrix.format.name for matrix in decoder._matrices)
    # The head and, of each layer, the one product that `finer` is in.
    assert held == {"INT8": 1 + TINY.num_layers, "INT4": 3 * TINY.num_layers}
    mixed = {
        name: converted(name, weight, "int4", finer=finer in name) for name, weight in exact.items()
    }
    near = run(decoder, [90], 0)[-1] - run(Decoder(TINY, mixed), [90], 0)[-1]
    assert near.abs().max() < 0.2


@pytest.mark.parametrize("config", [TINY, TINY_GPT2], ids=["llama", "gpt2"])
def test_activations_far_from_zero(kernels: Library, config: DecoderConfig) -> None:
    """Where e^x leaves float32, a gate is shut or open."""
    made: list[Decoder | NativeDecoder] = []
    for kind in (NativeDecoder, Decoder):
        weights = tiny_weights("none", config)
        for name, weight in weights.items():
            if name.endswith(("gate_proj.weight", "up_proj.weight")):
                weights[name] = dense(weight) * 400
        made.append(kind(config, weights))
    ours, reference = (run(each, [40], 0)[-1] for each in made)
    assert (ours - reference).abs().max() < 1e-3


@pytest.mark.parametrize("columns", [5, 83, 4096])
def test_the_likeliest_token(kernels: Library, columns: int) -> None:
    """The first of the largest, of rows further apart than they are long."""
    room = torch.randint(-9, 9, (13, columns + 16), generator=torch.Generator().manual_seed(2))
    logits = room.float()
    logits[1] = -torch.inf
    logits[2, :columns] = -torch.inf
    logits[2, columns - 1] = -1e30
    logits[:, columns:] = 99
    found = Team(kernels, 2).argmax(logits.data_ptr(), (13, columns), logits.stride(0))
    assert found == np.argmax(logits[:, :columns].numpy(), axis=1).tolist()


def test_blocks_of_any_size(kernels: Library) -> None:
    decoder = NativeDecoder(TINY, tiny_weights("none"))
    decoder.start(1)
    wanted = run(decoder, [50, 1, 19], 2)
    for block_size in (1, 5, 16, 128):
        assert (run(decoder, [50, 1, 19], 2, block_size) - wanted).abs().max() < 1e-4


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda _: None)
    with pytest.raises(ToolkitError, match=r"no C\+\+ compiler.*install g\+\+"):
        build.library_path(tmp_path)


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(ToolkitError, match="could not build"):
        build.library_path(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]


def test_two_builders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One builds, the other waits and finds the file."""
    calls, compiler = tmp_path / "calls", tmp_path / "compiler"
    compiler.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && exit\n'
        f"echo call >> {calls}\nsleep 0.3\n"
        'while [ "$1" != -o ]; do shift; done; echo built > "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    found: list[Path] = []
    builders = [
        threading.Thread(target=lambda: found.append(build.library_path(tmp_path / "cache")))
        for _ in range(2)
    ]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert found[0] == found[1]
    assert found[0].read_text() == "built\n"
    assert calls.read_text() == "call\n"


def test_auto_takes_what_was_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 bits only for a file that has no more; float32 where there are no kernels."""
    took = {"none": 3.0, "int8": 2.0, "int4": 1.0}
    monkeypatch.setattr(quantisation, "step_seconds", lambda *_: took)
    monkeypatch.setattr(quantisation, "library", lambda: None)
    weight = torch.randn(64, 64)
    assert quantisation.chosen("auto", [quantise(weight, 4), weight[:1]], 1) == "int4"
    assert quantisation.chosen("auto", [weight], 1) == "int8"
    took["none"] = 0.5
    assert quantisation.chosen("auto", [quantise(weight, 8)], 1) == "none"
    assert quantisation.chosen("int4", [weight], 1) == "int4"
    monkeypatch.undo()
    monkeypatch.setattr(quantisation, "library", _raise)
    assert quantisation.chosen("auto", [weight], 1) == "none"


def _raise() -> None:
    raise ToolkitError("no compiler")
