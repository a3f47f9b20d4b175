"""A decoder in torch over paged KV: one forward pass for a mixed batch of slices.

The reference that the kernels (native.py) are held to, and what runs where they cannot be built.

Shape suffixes: N tokens of the step, H query heads, K key-value heads, G = H / K query heads per
key-value head, D head size, E hidden size, F feed-forward size, V vocabulary, T tokens of a
sequence, C context tokens read.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from toolkit.serve.model.cache import PagedKV
from toolkit.serve.model.config import DecoderConfig
from toolkit.serve.model.grouped import Weight, dense, joined
from toolkit.serve.model.inputs import StepInput
from toolkit.serve.model.linear import Product, product
from toolkit.serve.model.loaded import NormWeights, take_layer, take_norm
from toolkit.serve.model.sampler import likeliest

# A layer's number and its queries, keys and values `[N, H + 2K, D]` to `[N, H * D]`; what it is
# made of stores keys and values first.
Attend = Callable[[int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """One layer's weights. Query, key, value are one matrix, gate and up another: fewer calls.

    `gate_up` is up alone where nothing is gated.
    """

    attention_norm: NormWeights
    qkv: Product
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: Product
    ffn_norm: NormWeights
    gate_up: Product
    down: Product


class Decoder:
    """Weights and the forward pass. Stateless: the KV cache is passed in."""

    kernels = "torch"
    dtype = "float32"

    def __init__(
        self,
        config: DecoderConfig,
        weights: MutableMapping[str, Weight],
        *,
        kv_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Empty `weights` (`loaded.expected`'s names) into layers.

        Emptied as it goes, so that joining matrices never holds the model twice.
        """
        self.config, self.kv_dtype = config, kv_dtype
        embedding = weights.pop("embed_tokens.weight")
        self.embedding = dense(embedding)[:, : config.hidden_size]
        self.positions: torch.Tensor | None = None
        if config.positions == "learned":
            self.positions = dense(weights.pop("embed_positions.weight"))
        self.norm = take_norm(weights, "norm")
        self.head = product(embedding if config.tied_head else weights.pop("lm_head.weight"))
        self.layers = [_layer(weights, f"layers.{i}.") for i in range(config.num_layers)]
        self._cos, self._sin = rotary(config)
        assert not weights, f"weights nobody reads: {sorted(weights)}"

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as held: a tied embedding is there twice, once laid out as head."""
        held = self.embedding.nbytes + self.head.num_bytes
        vectors = [self.positions, self.norm.weight, self.norm.bias]
        for layer in self.layers:
            for norm in (layer.attention_norm, layer.ffn_norm):
                vectors += [norm.weight, norm.bias]
            vectors += [layer.q_norm, layer.k_norm]
            products = (layer.qkv, layer.output, layer.gate_up, layer.down)
            held += sum(product.num_bytes for product in products)
        return held + sum(vector.nbytes for vector in vectors if vector is not None)

    def start(self, threads: int, cpus: Sequence[int] = ()) -> None:
        """Nothing to start: torch's pool belongs to the thread that calls."""

    def make_cache(self, num_blocks: int, block_size: int) -> PagedKV:
        """Return a KV cache as this decoder reads it."""
        return PagedKV(self.config, num_blocks, block_size, dtype=self.kv_dtype)

    @torch.inference_mode()
    def likeliest(self, logits: torch.Tensor) -> list[int]:
        """Return the likeliest token of each row `[rows, V]`."""
        return likeliest(logits)

    def forward(
        self, step: StepInput, cache: PagedKV, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return float32 logits `[len(sample_rows), V]`; the KV of every token is in `cache`.

        The normed last hidden states of `pooled_rows` are written to `hidden`
        `[len(pooled_rows), E]`, if given.
        """
        attend = self._attention(step, cache)
        x_NE = self._walk(self._placed(step.tokens), self._placed(step.positions), attend)
        if hidden is not None:
            hidden.copy_(self._normed(x_NE[self._placed(step.pooled_rows)], self.norm))
        return self._logits(x_NE[self._placed(step.sample_rows)])

    def _walk(
        self, tokens_N: torch.Tensor, positions_N: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Return the last hidden states `[N, E]`, before the last norm."""
        x_NE = F.embedding(tokens_N, self.embedding)
        if self.positions is not None:
            x_NE += self.positions[positions_N]
        for index, layer in enumerate(self.layers):
            normed_NE = self._normed(x_NE, layer.attention_norm)
            mixed_NE = attend(index, self._project(layer, normed_NE, positions_N))
            x_NE = x_NE + self._whole(layer.output(mixed_NE))
            fed_NF = layer.gate_up(self._normed(x_NE, layer.ffn_norm))
            x_NE = x_NE + self._whole(layer.down(self._activated(fed_NF)))
        return x_NE

    def _logits(self, x_NE: torch.Tensor) -> torch.Tensor:
        """Return float32 logits `[N, V]` of last hidden states."""
        return self.head(self._normed(x_NE, self.norm))

    def _whole(self, part_NE: torch.Tensor) -> torch.Tensor:
        """Return the sum of a product over all who hold a part of its inputs: here nobody else."""
        return part_NE

    def _placed(self, numbers: np.ndarray) -> torch.Tensor:
        """Return a step's numbers where the decoder computes."""
        return torch.from_numpy(numbers)

    def _attention(self, step: StepInput, cache: PagedKV) -> Attend:
        """Return the attention of one step."""
        return lambda layer, qkv_NHD: self._attend(layer, qkv_NHD, step, cache)

    def _normed(self, x_NE: torch.Tensor, norm: NormWeights) -> torch.Tensor:
        size, eps = (self.config.hidden_size,), self.config.norm_eps
        if self.config.norm == "layer":
            return F.layer_norm(x_NE, size, norm.weight, norm.bias, eps)
        return F.rms_norm(x_NE, size, norm.weight, eps)

    def _activated(self, fed_NF: torch.Tensor) -> torch.Tensor:
        if self.config.ffn == "gelu":
            return F.gelu(fed_NF, approximate="tanh")
        gate_NF, up_NF = fed_NF.chunk(2, dim=-1)
        return F.silu(gate_NF).mul_(up_NF)

    def _project(self, layer: Layer, x_NE: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        """Return queries, keys and values `[N, H + 2K, D]`, the first two rotated if they are."""
        config = self.config
        qkv_NHD = layer.qkv(x_NE).view(len(x_NE), -1, config.head_size)
        num_heads, num_kv = config.num_heads, config.num_kv_heads
        if layer.q_norm is not None and layer.k_norm is not None:
            size, eps = (config.head_size,), config.norm_eps
            q_NHD, k_NKD = qkv_NHD[:, :num_heads], qkv_NHD[:, num_heads : num_heads + num_kv]
            q_NHD.copy_(F.rms_norm(q_NHD, size, layer.q_norm, eps))
            k_NKD.copy_(F.rms_norm(k_NKD, size, layer.k_norm, eps))
        if self.positions is not None:
            return qkv_NHD
        cos_N1D = self._cos[positions_N].unsqueeze(1)
        sin_N1D = self._sin[positions_N].unsqueeze(1)
        qk = qkv_NHD[:, : num_heads + num_kv]
        half = config.head_size // 2
        turned = torch.cat((-qk[..., half:], qk[..., :half]), dim=-1)
        qk.mul_(cos_N1D).addcmul_(turned, sin_N1D)
        return qkv_NHD

    def _attend(
        self, layer: int, qkv_NHD: torch.Tensor, step: StepInput, cache: PagedKV
    ) -> torch.Tensor:
        """Store the step's keys and values, then return the attention's output `[N, H * D]`."""
        config = self.config
        q_NHD, k_NKD, v_NKD = qkv_NHD.split(
            (config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1
        )
        cache.write(layer, torch.from_numpy(step.slots).long(), k_NKD, v_NKD)
        mixed_NHD = torch.empty(q_NHD.shape)
        for first, rows, start, table in step.sequences.tolist():
            context = start + rows
            blocks = step.tables[table : table + -(-context // cache.block_size)]
            k_1KCD, v_1KCD = cache.read(layer, torch.from_numpy(blocks).unsqueeze(0).long())
            hidden_TC = torch.ones(rows, context, dtype=torch.bool).triu_(start + 1)
            mixed_1HTD = F.scaled_dot_product_attention(
                q_NHD[first : first + rows].transpose(0, 1).unsqueeze(0),
                k_1KCD[:, :, :context].repeat_interleave(config.group_size, dim=1),
                v_1KCD[:, :, :context].repeat_interleave(config.group_size, dim=1),
                attn_mask=~hidden_TC,
            )
            mixed_NHD[first : first + rows] = mixed_1HTD[0].transpose(0, 1)
        return mixed_NHD.flatten(1)


def _layer(weights: MutableMapping[str, Weight], prefix: str) -> Layer:
    """Take one layer's weights, joining the matrices that read the same input."""
    taken = take_layer(weights, prefix)
    return Layer(
        attention_norm=taken.attention_norm,
        qkv=product(taken.qkv, taken.qkv_bias),
        q_norm=taken.q_norm,
        k_norm=taken.k_norm,
        output=product(taken.output, taken.output_bias),
        ffn_norm=taken.ffn_norm,
        gate_up=product(
            taken.up if taken.gate is None else joined((taken.gate, taken.up)), taken.up_bias
        ),
        down=product(taken.down, taken.down_bias),
    )


def rotary(config: DecoderConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines `[max_context, D]` of the rotary embedding (RoFormer, eq. 34)."""
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_divisors is not None:
        frequencies = frequencies / torch.tensor(config.rope_divisors)
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        turns = scaling.original_context * frequencies / (2 * torch.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        # 0: slower than `low` turns over the old context, divide; 1: fast, keep; between: blend.
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / scaling.factor
    angles = torch.outer(torch.arange(config.max_context, dtype=torch.float32), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()
