"""The work of a step of a decoder as it is held here: read off its matrices, not off a trace.

A model from a GGUF file in 8 bits has no traced graph, and its weights' bytes are those of the
format it is served in. The kernels are counted as `traced.py` counts them: products read their
weights once a step, attention its sequences' keys and values, and what lies between two products
its rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from toolkit.serve.model.config import DecoderConfig
from toolkit.serve.split.work import Kernel, ModelWork, PerCount

# Arithmetic is priced against the device's float32 peak whatever a format multiplies in: how much
# faster its products are is in their efficiency, which a calibration finds.
_DTYPE = "float32"
_ITEM = 4


class MatrixSize(NamedTuple):
    """A weight matrix as held: outputs, inputs, and the bytes it is read as."""

    rows: int
    columns: int
    num_bytes: int


def decoder_work(
    name: str,
    config: DecoderConfig,
    layers: Iterable[MatrixSize],
    head: MatrixSize,
    *,
    kv_item_bytes: int,
    weight_bytes: int,
) -> ModelWork:
    """Return a decoder's kernels; `layers` are all matrices but the head, of every layer."""
    counts: dict[MatrixSize, int] = {}
    for matrix in layers:
        counts[matrix] = counts.get(matrix, 0) + 1
    kernels = [
        Kernel(
            f"{rows} x {columns}",
            "matmul",
            _DTYPE,
            PerCount(tokens=2.0 * rows * columns),
            PerCount(constant=num_bytes, tokens=_ITEM * (rows + columns)),
            count,
        )
        for (rows, columns, num_bytes), count in counts.items()
    ]
    width, hidden = config.num_heads * config.head_size, config.hidden_size
    kv_bytes = 2 * kv_item_bytes * config.num_kv_heads * config.head_size
    kernels += [
        Kernel(
            "attention",
            "attention",
            _DTYPE,
            PerCount(pairs=4.0 * width),
            PerCount(tokens=2.0 * _ITEM * width, context=kv_bytes),
            config.num_layers,
        ),
        # Two norms a layer with their quantisation; what is rotated and gated rides in products.
        Kernel(
            "rows",
            "norm",
            _DTYPE,
            PerCount(tokens=8.0 * hidden),
            PerCount(tokens=2.0 * _ITEM * hidden),
            2 * config.num_layers,
        ),
        Kernel(
            "head",
            "matmul",
            _DTYPE,
            PerCount(samples=2.0 * head.rows * head.columns),
            PerCount(constant=head.num_bytes, samples=_ITEM * (head.rows + head.columns)),
        ),
    ]
    return ModelWork(
        name,
        tuple(kernels),
        weight_bytes=weight_bytes,
        kv_bytes_per_token=config.num_layers * kv_bytes,
        hidden_bytes=_ITEM * hidden,
        max_context=config.max_context,
    )
