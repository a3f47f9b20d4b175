"""A Llama-family decoder over paged KV: one forward pass for a mixed batch of slices.

Shape suffixes: N tokens of the step, H query heads, K key-value heads, G = H / K query heads per
key-value head, D head size, E hidden size, F feed-forward size, V vocabulary, B sequences of a
decode group, T tokens of a chunk, C context tokens read.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from toolkit.serve.model.config import DecoderConfig
from toolkit.serve.model.inputs import StepInput
from toolkit.serve.model.linear import Linear


@dataclass(frozen=True)
class Layer:
    """One layer's weights. Query, key, value are one matrix, gate and up another: fewer calls."""

    attention_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: Linear
    ffn_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class PagedKV:
    """The KV cache: per layer `[blocks, block size, 2, K, D]`, each key beside its value."""

    def __init__(self, config: DecoderConfig, num_blocks: int, block_size: int) -> None:
        shape = (num_blocks, block_size, 2, config.num_kv_heads, config.head_size)
        # Zeros, because padding is read and 0 x NaN is NaN; numpy's, because the system hands out
        # their pages only as blocks are first written, while torch touches all of them at once.
        zeros = (np.zeros(shape, np.float32) for _ in range(config.num_layers))
        self.layers = [torch.from_numpy(layer) for layer in zeros]
        self.block_size = block_size

    @property
    def num_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def write(self, layer: int, slots_N: torch.Tensor, kv_N2KD: torch.Tensor) -> None:
        """Store one key and value per token at its slot (block x block size + offset)."""
        self.layers[layer].flatten(0, 1).index_copy_(0, slots_N, kv_N2KD)

    def read(self, layer: int, tables: torch.Tensor) -> torch.Tensor:
        """Return `[B, C, 2, K, D]` for block tables `[B, blocks]`, C covering whole blocks."""
        pool = self.layers[layer]
        found = pool.flatten(1).index_select(0, tables.flatten())
        return found.view(tables.shape[0], -1, *pool.shape[2:])


class Decoder:
    """Weights and the forward pass. Stateless: the KV cache is passed in."""

    def __init__(self, config: DecoderConfig, weights: MutableMapping[str, torch.Tensor]) -> None:
        """Empty `weights` (float32, `loaded.expected`'s names) into layers.

        Emptied as it goes, so that joining matrices never holds the model twice.
        """
        self.config = config
        self.embedding = weights.pop("embed_tokens.weight")
        self.norm = weights.pop("norm.weight")
        self.head = Linear(self.embedding if config.tied_head else weights.pop("lm_head.weight"))
        self.layers = [_layer(weights, f"layers.{i}.") for i in range(config.num_layers)]
        self._cos, self._sin = _rotary(config)
        assert not weights, f"weights nobody reads: {sorted(weights)}"

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as held: a tied embedding is there twice, once laid out as head."""
        held = self.embedding.nbytes + self.norm.nbytes + self.head.num_bytes
        for layer in self.layers:
            norms = (layer.attention_norm, layer.ffn_norm, layer.q_norm, layer.k_norm)
            held += sum(norm.nbytes for norm in norms if norm is not None)
            products = (layer.qkv, layer.output, layer.gate_up, layer.down)
            held += sum(product.num_bytes for product in products)
        return held

    @torch.inference_mode()
    def forward(
        self, step: StepInput, cache: PagedKV, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return float32 logits `[len(sample_rows), V]`; the KV of every token is in `cache`.

        The normed last hidden states of `pooled_rows` are written to `hidden`
        `[len(pooled_rows), E]`, if given.
        """
        eps, size = self.config.rms_norm_eps, (self.config.hidden_size,)
        cos_N1D = self._cos[step.positions].unsqueeze(1)
        sin_N1D = self._sin[step.positions].unsqueeze(1)
        x_NE = F.embedding(step.tokens, self.embedding)
        for index, layer in enumerate(self.layers):
            normed_NE = F.rms_norm(x_NE, size, layer.attention_norm, eps)
            qkv_NHD = self._project(layer, normed_NE, cos_N1D, sin_N1D)
            mixed_NE = self._attend(index, qkv_NHD, step, cache)
            x_NE = x_NE + layer.output(mixed_NE)
            normed_NE = F.rms_norm(x_NE, size, layer.ffn_norm, eps)
            gate_NF, up_NF = layer.gate_up(normed_NE).chunk(2, dim=-1)
            x_NE = x_NE + layer.down(F.silu(gate_NF).mul_(up_NF))
        if hidden is not None:
            hidden.copy_(F.rms_norm(x_NE[step.pooled_rows], size, self.norm, eps))
        last = F.rms_norm(x_NE[step.sample_rows], size, self.norm, eps)
        return self.head(last)

    def _project(
        self, layer: Layer, x_NE: torch.Tensor, cos_N1D: torch.Tensor, sin_N1D: torch.Tensor
    ) -> torch.Tensor:
        """Return queries, keys and values `[N, H + 2K, D]`, the first two rotated."""
        config = self.config
        qkv_NHD = layer.qkv(x_NE).view(len(x_NE), -1, config.head_size)
        num_heads, num_kv = config.num_heads, config.num_kv_heads
        if layer.q_norm is not None and layer.k_norm is not None:
            size, eps = (config.head_size,), config.rms_norm_eps
            q_NHD, k_NKD = qkv_NHD[:, :num_heads], qkv_NHD[:, num_heads : num_heads + num_kv]
            q_NHD.copy_(F.rms_norm(q_NHD, size, layer.q_norm, eps))
            k_NKD.copy_(F.rms_norm(k_NKD, size, layer.k_norm, eps))
        qk = qkv_NHD[:, : num_heads + num_kv]
        half = config.head_size // 2
        turned = torch.cat((-qk[..., half:], qk[..., :half]), dim=-1)
        qk.mul_(cos_N1D).addcmul_(turned, sin_N1D)
        return qkv_NHD

    def _attend(
        self, layer: int, qkv_NHD: torch.Tensor, step: StepInput, cache: PagedKV
    ) -> torch.Tensor:
        """Store the step's keys and values, then return the attention's output `[N, H * D]`."""
        config, num_tokens = self.config, len(qkv_NHD)
        kv_heads, size = config.num_kv_heads, config.head_size
        kv_N2KD = qkv_NHD[:, config.num_heads :].view(num_tokens, 2, kv_heads, size)
        q_NKGD = qkv_NHD[:, : config.num_heads].unflatten(1, (kv_heads, config.group_size))
        cache.write(layer, step.slots, kv_N2KD)
        mixed_NKGD = torch.empty(q_NKGD.shape)
        for chunk in step.chunks:
            rows = slice(chunk.first, chunk.last)
            if chunk.table is None or chunk.mask is None:
                kv_C2KD = kv_N2KD[rows]
            else:
                kv_C2KD = cache.read(layer, chunk.table)[0, : chunk.mask.shape[1]]
            mixed_NKGD[rows] = _chunk_attention(q_NKGD[rows], kv_C2KD, chunk.mask)
        for group in step.groups:
            kv_BC2KD = cache.read(layer, group.tables)[:, : group.context]
            # The G heads of a group stand where query positions would: keys are never repeated.
            mixed_NKGD[group.rows] = F.scaled_dot_product_attention(
                q_NKGD[group.rows],
                kv_BC2KD[:, :, 0].transpose(1, 2),
                kv_BC2KD[:, :, 1].transpose(1, 2),
                attn_mask=group.mask,
            )
        return mixed_NKGD.view(num_tokens, -1)


def _chunk_attention(
    q_TKGD: torch.Tensor, kv_C2KD: torch.Tensor, mask_TC: torch.Tensor | None
) -> torch.Tensor:
    """Return `[T, K, G, D]`: each token attends to the context up to and including itself."""
    q_KGTD = q_TKGD.permute(1, 2, 0, 3)
    # A stride of zero stands for the G heads that share a key: nothing is copied.
    k_KGCD = kv_C2KD[:, 0].transpose(0, 1).unsqueeze(1).expand(-1, q_KGTD.shape[1], -1, -1)
    v_KGCD = kv_C2KD[:, 1].transpose(0, 1).unsqueeze(1).expand(-1, q_KGTD.shape[1], -1, -1)
    mixed_KGTD = F.scaled_dot_product_attention(
        q_KGTD, k_KGCD, v_KGCD, attn_mask=mask_TC, is_causal=mask_TC is None
    )
    return mixed_KGTD.permute(2, 0, 1, 3)


def _layer(weights: MutableMapping[str, torch.Tensor], prefix: str) -> Layer:
    """Take one layer's weights, joining the matrices that read the same input."""

    def optional(name: str) -> torch.Tensor | None:
        return weights.pop(prefix + name, None)

    def joined(*names: str) -> torch.Tensor:
        return torch.cat([weights.pop(prefix + name) for name in names])

    qkv = [f"self_attn.{name}_proj" for name in "qkv"]
    biased = f"{prefix}{qkv[0]}.bias" in weights
    return Layer(
        attention_norm=joined("input_layernorm.weight"),
        qkv=Linear(
            joined(*(f"{name}.weight" for name in qkv)),
            joined(*(f"{name}.bias" for name in qkv)) if biased else None,
        ),
        q_norm=optional("self_attn.q_norm.weight"),
        k_norm=optional("self_attn.k_norm.weight"),
        output=Linear(joined("self_attn.o_proj.weight"), optional("self_attn.o_proj.bias")),
        ffn_norm=joined("post_attention_layernorm.weight"),
        gate_up=Linear(joined("mlp.gate_proj.weight", "mlp.up_proj.weight")),
        down=Linear(joined("mlp.down_proj.weight")),
    )


def _rotary(config: DecoderConfig) -> tuple[torch.Tensor, torch.Tensor]:
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
