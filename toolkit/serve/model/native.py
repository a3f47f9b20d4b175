"""A decoder on the CPU kernels: packed weights, one call a step."""

from __future__ import annotations

import copy
import ctypes
from collections import Counter
from collections.abc import MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from toolkit.serve.model.cache import PagedKV
from toolkit.serve.model.config import DecoderConfig
from toolkit.serve.model.decoder import rotary
from toolkit.serve.model.grouped import Weight, dense
from toolkit.serve.model.inputs import StepInput
from toolkit.serve.model.kernels.library import (
    CCache,
    CLayer,
    CModel,
    CNorm,
    CStep,
    Team,
    library,
)
from toolkit.serve.model.kernels.packed import Arena, Format, PackedMatrix, pack, side_by_side
from toolkit.serve.model.loaded import NormWeights, take_layer, take_norm

# Activations are padded to this many numbers, and so are the weights they are scaled by.
_PADDING = 32


class NativeDecoder:
    """Weights in the kernels' layout and the forward pass. The KV cache is passed in.

    A token's logits are the same bits whatever shares the step with it, however its prompt was
    cut into chunks, and on any number of threads.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: MutableMapping[str, Weight],
        *,
        kv_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Empty `weights` (`loaded.expected`'s names) into packed matrices, layer by layer.

        `kv_dtype` is float32 or float16. Raises ToolkitError where the kernels cannot be built.
        """
        self.config, self.library, self.kv_dtype = config, library(), kv_dtype
        self._arena = Arena()
        self._kept: list[np.ndarray] = []
        self._matrices: list[PackedMatrix] = []
        embedding = weights.pop("embed_tokens.weight")
        head = embedding if config.tied_head else weights.pop("lm_head.weight")
        norm = take_norm(weights, "norm")
        # Whichever is null says that positions come the other way.
        positions = cos = sin = None
        if config.positions == "learned":
            positions = self._keep(dense(weights.pop("embed_positions.weight")))
        else:
            cos, sin = (self._keep(each[:, : config.head_size // 2]) for each in rotary(config))
        self._head = pack(head, self.library, arena=self._arena)
        self._matrices.append(self._head)
        layers = (CLayer * config.num_layers)(
            *(self._layer(weights, f"layers.{i}.") for i in range(config.num_layers))
        )
        self._model = CModel(
            layers=config.num_layers,
            hidden=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_size=config.head_size,
            ffn=config.ffn_size,
            vocab=config.vocab_size,
            eps=config.norm_eps,
            gelu=config.ffn == "gelu",
            layer=layers,
            norm=self._norm(norm),
            head=self._head.c,
            # A tied embedding is read out of the head, so that it is held once.
            embedding=None
            if config.tied_head
            else self._keep(dense(embedding)[:, : config.hidden_size]),
            positions=positions,
            cos=cos,
            sin=sin,
        )
        assert not weights, f"weights nobody reads: {sorted(weights)}"
        self._team: Team | None = None
        self._logits = torch.empty(0, self._head.padded_rows)
        self._caches: tuple[PagedKV | None, Any] = (None, None)

    @property
    def kernels(self) -> str:
        """What computes, in words."""
        return self.library.instruction_set

    @property
    def dtype(self) -> str:
        """The format that most of the weights are held in."""
        held: Counter[Format] = Counter()
        for matrix in self._matrices:
            held[matrix.format] += matrix.num_bytes
        return held.most_common(1)[0][0].name.lower()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as held; rotary tables are counted with them."""
        return sum(matrix.num_bytes for matrix in self._matrices) + sum(
            array.nbytes for array in self._kept
        )

    @property
    def matrices(self) -> Sequence[PackedMatrix]:
        """The matrices as held: the head, then those of each layer."""
        return tuple(self._matrices)

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a step reads: every matrix once."""
        return sum(matrix.num_bytes for matrix in self._matrices)

    def twin(self) -> NativeDecoder:
        """Return a decoder on the same weights whose threads and memory for a step are its own.

        The two may compute at once, over one cache too, where no block is written by both.
        """
        made = copy.copy(self)
        made._team = None
        made._logits = torch.empty(0, self._head.padded_rows)
        made._caches = (None, None)
        return made

    def start(self, threads: int, cpus: Sequence[int] = ()) -> None:
        """Compute with `threads` from here on, the caller among them, tied to `cpus` if given."""
        if self._team is not None:
            self._team.close()
        self._team = Team(self.library, threads, cpus)

    def make_cache(self, num_blocks: int, block_size: int) -> PagedKV:
        """Return a KV cache as this decoder reads it."""
        lanes = self.library.lanes
        return PagedKV(self.config, num_blocks, block_size, lanes=lanes, dtype=self.kv_dtype)

    def forward(
        self, step: StepInput, cache: PagedKV, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return float32 logits `[len(sample_rows), V]`, valid until the next call.

        The KV of every token of the step is in `cache` afterwards. The normed last hidden states of
        `pooled_rows` are written to `hidden` `[len(pooled_rows), E]`, if given.
        """
        if self._team is None:
            self.start(torch.get_num_threads())
        assert self._team is not None
        logits = self._room(len(step.sample_rows))
        num_pooled = 0 if hidden is None else len(step.pooled_rows)
        pooled = torch.empty(num_pooled, -(-self.config.hidden_size // _PADDING) * _PADDING)
        self._team.step(
            self._model,
            self._cache(cache),
            CStep(
                num_tokens=len(step.tokens),
                num_sequences=len(step.sequences),
                num_samples=len(step.sample_rows),
                logits_stride=logits.shape[1],
                tokens=step.tokens.ctypes.data,
                positions=step.positions.ctypes.data,
                slots=step.slots.ctypes.data,
                tables=step.tables.ctypes.data,
                sample_rows=step.sample_rows.ctypes.data,
                sequences=step.sequences.ctypes.data,
                logits=logits.data_ptr(),
                pooled_rows=step.pooled_rows.ctypes.data,
                hidden=pooled.data_ptr(),
                num_pooled=num_pooled,
                hidden_stride=pooled.shape[1],
            ),
        )
        if hidden is not None:
            hidden.copy_(pooled[:, : self.config.hidden_size])
        return logits[:, : self.config.vocab_size]

    def likeliest(self, logits: torch.Tensor) -> list[int]:
        """Return the likeliest token of each row `[rows, V]`, the first of equals.

        On the decoder's own threads: torch's would spin on when the next step begins.
        """
        assert self._team is not None
        rows, columns = logits.shape
        return self._team.argmax(logits.data_ptr(), (rows, columns), logits.stride(0))

    def _room(self, rows: int) -> torch.Tensor:
        """Return memory for logits, kept from step to step: fresh pages would cost more to map."""
        if len(self._logits) < rows:
            self._logits = torch.empty(rows, self._logits.shape[1])
        return self._logits[:rows]

    def _cache(self, cache: PagedKV) -> CCache:
        if self._caches[0] is not cache:
            pointers = _addresses(cache.keys), _addresses(cache.values)
            half = cache.keys[0].dtype is torch.float16
            made = CCache(
                *pointers, cache.block_size, cache.padded_block, cache.padded_head, int(half)
            )
            self._caches = (cache, made)
        return self._caches[1]

    def _layer(self, weights: MutableMapping[str, Weight], prefix: str) -> CLayer:
        taken = take_layer(weights, prefix)
        return CLayer(
            attention_norm=self._norm(taken.attention_norm),
            q_norm=None if taken.q_norm is None else self._keep(taken.q_norm),
            k_norm=None if taken.k_norm is None else self._keep(taken.k_norm),
            ffn_norm=self._norm(taken.ffn_norm),
            qkv=self._matrix(taken.qkv, taken.qkv_bias),
            output=self._matrix(taken.output, taken.output_bias),
            gate_up=self._matrix(
                taken.up
                if taken.gate is None
                else side_by_side(taken.gate, taken.up, self.library),
                taken.up_bias,
            ),
            down=self._matrix(taken.down, taken.down_bias),
        )

    def _matrix(self, weight: Weight, bias: torch.Tensor | None = None) -> Any:
        self._matrices.append(pack(weight, self.library, bias, self._arena))
        return self._matrices[-1].c

    def _norm(self, norm: NormWeights) -> CNorm:
        bias = None if norm.bias is None else self._padded(norm.bias)
        return CNorm(self._padded(norm.weight), bias)

    def _padded(self, vector: torch.Tensor) -> int:
        return self._keep(F.pad(vector, (0, -len(vector) % _PADDING)))

    def _keep(self, tensor: torch.Tensor) -> int:
        """Hold a float32 tensor and return its address."""
        self._kept.append(self._arena.place(tensor))
        return int(self._kept[-1].ctypes.data)


def _addresses(pools: Sequence[torch.Tensor]) -> Any:
    """Return an array of the addresses of a cache's layers."""
    return (ctypes.c_void_p * len(pools))(*(pool.data_ptr() for pool in pools))
