"""The paged-attention kernel: as its reference, in Triton's interpreter; compiled for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from toolkit.serve.model import paged

CASES = Path(__file__).with_name("paged_cases.py")


def test_the_reference_is_attention_over_what_the_tables_name() -> None:
    draw = torch.Generator().manual_seed(5)
    keys, values = (torch.randn(9, 2, 4, 16, generator=draw) for _ in range(2))
    tables = torch.tensor([[3, 8, 1], [5, 0, 0]], dtype=torch.int32)
    lengths = torch.tensor([10, 3], dtype=torch.int32)
    q_BHD = torch.randn(2, 6, 16, generator=draw)
    mixed = paged.attend(q_BHD, keys, values, tables, lengths)
    for row, length in enumerate(lengths.tolist()):
        held = [each[tables[row].long()].transpose(0, 1).flatten(1, 2) for each in (keys, values)]
        k_KCD, v_KCD = (each[:, :length].repeat_interleave(3, dim=0) for each in held)
        wanted = F.scaled_dot_product_attention(q_BHD[row].unsqueeze(1), k_KCD, v_KCD)
        torch.testing.assert_close(mixed[row], wanted.flatten())


def test_the_kernel_equals_its_reference() -> None:
    """On no GPU: Triton's interpreter runs it."""
    pytest.importorskip("triton", reason="triton is not installed (pip install 'toolkit[gpu]')")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(CASES)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_kernel_compiles_for_a_gpu_with_tensor_cores_and_wide_loads() -> None:
    """Compiled, not run: there need be no GPU."""
    pytest.importorskip("triton", reason="triton is not installed (pip install 'toolkit[gpu]')")
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from toolkit.serve.model.kernels import paged as kernel

    rows, dims = kernel.sizes(4, 128)
    fixed = {"GROUP": 4, "HEAD": 128, "BLOCK": 16, "SPAN": 256, "TILE": 64}
    fixed |= {"ROWS": rows, "DIMS": dims}
    types = dict.fromkeys(("queries", "keys", "values"), "*bf16") | {"scale": "fp32"}
    types |= {"tables": "*i32", "lengths": "*i32", "mixed": "*fp32", "weights": "*fp32"}
    aligned = ("queries", "keys", "values", "query_stride", "key_stride", "value_stride")

    def ptx(function: Any, types: dict[str, str]) -> str:
        known = {name: value for name, value in fixed.items() if name in function.arg_names}
        kinds = dict.fromkeys(function.arg_names, "i32") | types | dict.fromkeys(known, "constexpr")
        hints = {(at,): [["tt.divisibility", 16]] for at, n in enumerate(kinds) if n in aligned}
        source = ASTSource(function, kinds, constexprs=known, attrs=hints)
        return str(compiled(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])

    attend = ptx(kernel.attend_spans, types)
    assert "mma.sync" in attend
    assert "ld.global.b16" not in attend, "keys or values are read two bytes at a time"
    joined = {"parts": "*fp32", "weights": "*fp32", "lengths": "*i32", "mixed": "*bf16"}
    assert "st.global" in ptx(kernel.join_spans, joined)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_the_kernel_on_a_gpu_equals_its_reference(dtype: torch.dtype, most: float) -> None:
    draw = torch.Generator().manual_seed(6)
    keys, values = (torch.randn(90, 2, 16, 128, generator=draw).to("cuda", dtype) for _ in range(2))
    tables = torch.randint(0, 90, (5, 40), generator=draw, dtype=torch.int32).cuda()
    lengths = torch.tensor([0, 1, 300, 64, 640], dtype=torch.int32).cuda()
    q_BHD = torch.randn(5, 8, 128, generator=draw).to("cuda", dtype)
    given = (q_BHD, keys, values, tables, lengths)
    gap = (paged.attend(*given).float() - paged.reference(*given).float()).abs().max()
    assert float(gap) < most
