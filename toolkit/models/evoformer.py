"""The Evoformer of AlphaFold 2 (Jumper et al. 2021, supplement 1.6), with recycling.

Shape suffixes: B batch, S sequences of the alignment, R residues (i, j, k where two or three
meet), M width of the alignment, Z width of a pair, H heads, K head width, P width of an outer
product, E hidden width of a triangle multiplication, V amino-acid vocabulary, U distance bins.
Algorithm numbers are the supplement's. Masks, dropout, templates, the extra alignment stack and
the structure module are left out; what remains is trained as there by predicting residues and the
distances between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.models.inputs import Example, random_ids

FAMILY = "evoformer"
STACK = "blocks"

_VOCAB_SIZE = 23  # 20 amino acids, unknown, gap, mask
_NUM_BINS = 64  # of distance (supplement 1.9.8)
_MAX_OFFSET = 32  # relative positions are told apart up to this distance (algorithm 4)


@dataclass(frozen=True)
class Config:
    """The numbers that make an Evoformer stack and how often it is run."""

    num_layers: int
    msa_dim: int
    pair_dim: int
    source: str
    head_dim: int = 32
    outer_dim: int = 32
    triangle_dim: int = 128
    num_passes: int = 3  # forwards per sample, of which only the last has gradients
    default_sequences: int = 128
    default_residues: int = 256

    @property
    def sizes(self) -> Mapping[str, int]:
        return {
            "batch": 1, "tokens": self.default_residues, "sequences": self.default_sequences
        }  # fmt: skip

    @property
    def summary(self) -> str:
        return (
            f"{self.num_layers} layers, widths {self.msa_dim} and {self.pair_dim}, "
            f"{self.num_passes} passes"
        )


class GatedAttention(nn.Module):
    """Attention along the last position, gated, with an optional bias per head (algorithm 7).

    x is [B, rows, positions, dim]; each row attends within itself.
    """

    def __init__(self, dim: int, head_dim: int, bias_dim: int | None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self.bias = nn.Linear(bias_dim, dim // head_dim, bias=False) if bias_dim else None

    def forward(self, x_BSRM: Tensor, pair_BRRZ: Tensor | None = None) -> Tensor:
        B, S, R, _ = x_BSRM.shape
        normed_BSRM = self.norm(x_BSRM)
        q_BSHRK = self.query(normed_BSRM).view(B, S, R, -1, self.head_dim).transpose(2, 3)
        k_BSHRK = self.key(normed_BSRM).view(B, S, R, -1, self.head_dim).transpose(2, 3)
        v_BSHRK = self.value(normed_BSRM).view(B, S, R, -1, self.head_dim).transpose(2, 3)
        scores_BSHRR = (q_BSHRK * self.head_dim**-0.5) @ k_BSHRK.transpose(-2, -1)
        if self.bias is not None and pair_BRRZ is not None:
            bias_BHRR = self.bias(pair_BRRZ).permute(0, 3, 1, 2)
            scores_BSHRR = scores_BSHRR + bias_BHRR.unsqueeze(1)
        mixed_BSHRK = scores_BSHRR.softmax(dim=-1) @ v_BSHRK
        mixed_BSRM = mixed_BSHRK.transpose(2, 3).reshape(B, S, R, -1)
        return self.output(mixed_BSRM * self.gate(normed_BSRM).sigmoid())


class MsaRowAttention(nn.Module):
    """Residues of one sequence attend to each other, biased by the pairs (algorithm 7)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.pair_norm = nn.LayerNorm(config.pair_dim)
        self.attention = GatedAttention(config.msa_dim, config.head_dim, config.pair_dim)

    def forward(self, msa_BSRM: Tensor, pair_BRRZ: Tensor) -> Tensor:
        return self.attention(msa_BSRM, self.pair_norm(pair_BRRZ))


class MsaColumnAttention(nn.Module):
    """Sequences attend to each other at one residue (algorithm 8)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = GatedAttention(config.msa_dim, config.head_dim, None)

    def forward(self, msa_BSRM: Tensor) -> Tensor:
        return self.attention(msa_BSRM.transpose(1, 2)).transpose(1, 2)


class Transition(nn.Module):
    """Two linear layers around a ReLU, four times as wide inside (algorithms 9 and 15)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(self.norm(x))))


class OuterProductMean(nn.Module):
    """What residues i and j have in common over the sequences, for the pairs (algorithm 10)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.msa_dim)
        self.left = nn.Linear(config.msa_dim, config.outer_dim)
        self.right = nn.Linear(config.msa_dim, config.outer_dim)
        self.output = nn.Linear(config.outer_dim**2, config.pair_dim)

    def forward(self, msa_BSRM: Tensor) -> Tensor:
        normed_BSRM = self.norm(msa_BSRM)
        B, S, R, _ = normed_BSRM.shape
        # One matrix product over the sequences: (R P) x S times S x (R P).
        left_BRPS = self.left(normed_BSRM).permute(0, 2, 3, 1).reshape(B, -1, S)
        right_BSRP = self.right(normed_BSRM).reshape(B, S, -1)
        outer_BRPRP = (left_BRPS @ right_BSRP).view(B, R, -1, R, right_BSRP.shape[-1] // R)
        outer_BRRPP = outer_BRPRP.transpose(2, 3).reshape(B, R, R, -1)
        return self.output(outer_BRRPP / S)


class TriangleMultiplication(nn.Module):
    """Edge ij from the edges that close triangles with it (algorithms 11 and 12).

    Outgoing: sum over k of a_ik * b_jk; incoming: sum over k of a_ki * b_kj.
    """

    def __init__(self, config: Config, *, outgoing: bool) -> None:
        super().__init__()
        dim, hidden_dim = config.pair_dim, config.triangle_dim
        self.outgoing = outgoing
        self.norm = nn.LayerNorm(dim)
        self.left = nn.Linear(dim, hidden_dim)
        self.left_gate = nn.Linear(dim, hidden_dim)
        self.right = nn.Linear(dim, hidden_dim)
        self.right_gate = nn.Linear(dim, hidden_dim)
        self.hidden_norm = nn.LayerNorm(hidden_dim)
        self.output = nn.Linear(hidden_dim, dim)
        self.gate = nn.Linear(dim, dim)

    def forward(self, pair_BRRZ: Tensor) -> Tensor:
        normed_BRRZ = self.norm(pair_BRRZ)
        a_BRRE = self.left(normed_BRRZ) * self.left_gate(normed_BRRZ).sigmoid()
        b_BRRE = self.right(normed_BRRZ) * self.right_gate(normed_BRRZ).sigmoid()
        if self.outgoing:  # [E, i, k] @ [E, k, j]
            hidden_BERR = a_BRRE.permute(0, 3, 1, 2) @ b_BRRE.permute(0, 3, 2, 1)
        else:
            hidden_BERR = a_BRRE.permute(0, 3, 2, 1) @ b_BRRE.permute(0, 3, 1, 2)
        hidden_BRRE = self.hidden_norm(hidden_BERR.permute(0, 2, 3, 1))
        return self.output(hidden_BRRE) * self.gate(normed_BRRZ).sigmoid()


class TriangleAttention(nn.Module):
    """Edges that share a node attend to each other (algorithms 13, starting; 14, ending)."""

    def __init__(self, config: Config, *, starting: bool) -> None:
        super().__init__()
        self.starting = starting
        self.norm = nn.LayerNorm(config.pair_dim)
        self.attention = GatedAttention(config.pair_dim, config.head_dim, config.pair_dim)

    def forward(self, pair_BRRZ: Tensor) -> Tensor:
        pair_BRRZ = pair_BRRZ if self.starting else pair_BRRZ.transpose(1, 2)
        mixed_BRRZ = self.attention(pair_BRRZ, self.norm(pair_BRRZ))
        return mixed_BRRZ if self.starting else mixed_BRRZ.transpose(1, 2)


class Block(nn.Module):
    """One Evoformer block: (msa, pair) -> (msa, pair) (algorithm 6)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.row_attention = MsaRowAttention(config)
        self.column_attention = MsaColumnAttention(config)
        self.msa_transition = Transition(config.msa_dim)
        self.outer_product = OuterProductMean(config)
        self.triangle_outgoing = TriangleMultiplication(config, outgoing=True)
        self.triangle_incoming = TriangleMultiplication(config, outgoing=False)
        self.triangle_starting = TriangleAttention(config, starting=True)
        self.triangle_ending = TriangleAttention(config, starting=False)
        self.pair_transition = Transition(config.pair_dim)

    def forward(self, msa_BSRM: Tensor, pair_BRRZ: Tensor) -> tuple[Tensor, Tensor]:
        msa_BSRM = msa_BSRM + self.row_attention(msa_BSRM, pair_BRRZ)
        msa_BSRM = msa_BSRM + self.column_attention(msa_BSRM)
        msa_BSRM = msa_BSRM + self.msa_transition(msa_BSRM)
        pair_BRRZ = pair_BRRZ + self.outer_product(msa_BSRM)
        pair_BRRZ = pair_BRRZ + self.triangle_outgoing(pair_BRRZ)
        pair_BRRZ = pair_BRRZ + self.triangle_incoming(pair_BRRZ)
        pair_BRRZ = pair_BRRZ + self.triangle_starting(pair_BRRZ)
        pair_BRRZ = pair_BRRZ + self.triangle_ending(pair_BRRZ)
        pair_BRRZ = pair_BRRZ + self.pair_transition(pair_BRRZ)
        return msa_BSRM, pair_BRRZ


class InputEmbedding(nn.Module):
    """Residue ids to the two representations (algorithms 3 and 4)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.msa = nn.Embedding(_VOCAB_SIZE, config.msa_dim)
        self.target = nn.Embedding(_VOCAB_SIZE, config.msa_dim)
        self.left = nn.Embedding(_VOCAB_SIZE, config.pair_dim)
        self.right = nn.Embedding(_VOCAB_SIZE, config.pair_dim)
        self.offset = nn.Embedding(2 * _MAX_OFFSET + 1, config.pair_dim)

    def forward(self, ids_BSR: Tensor) -> tuple[Tensor, Tensor]:
        target_BR = ids_BSR[:, 0]  # the sequence whose structure is wanted comes first
        msa_BSRM = self.msa(ids_BSR) + self.target(target_BR).unsqueeze(1)
        at_R = torch.arange(ids_BSR.shape[2], device=ids_BSR.device)
        offset_RR = (at_R[:, None] - at_R[None, :]).clamp(-_MAX_OFFSET, _MAX_OFFSET) + _MAX_OFFSET
        pair_BRRZ = self.left(target_BR).unsqueeze(2) + self.right(target_BR).unsqueeze(1)
        return msa_BSRM, pair_BRRZ + self.offset(offset_RR)


class Recycling(nn.Module):
    """Adds a pass's result to the next pass's input (algorithm 32, without the distances)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.msa_norm = nn.LayerNorm(config.msa_dim)
        self.pair_norm = nn.LayerNorm(config.pair_dim)

    def forward(
        self, msa_BSRM: Tensor, pair_BRRZ: Tensor, first_BRM: Tensor, last_BRRZ: Tensor
    ) -> tuple[Tensor, Tensor]:
        first_B1RM = msa_BSRM[:, :1] + self.msa_norm(first_BRM).unsqueeze(1)
        msa_BSRM = torch.cat((first_B1RM, msa_BSRM[:, 1:]), dim=1)
        return msa_BSRM, pair_BRRZ + self.pair_norm(last_BRRZ)


class Evoformer(nn.Module):
    """An alignment's residue ids in; residue and distance logits out, or with labels the loss.

    The loss weighs the two cross-entropies as the paper does (supplement, equation 7).
    Every call runs the stack `num_passes` times, each pass starting from the one before; the
    passes before the last run without gradients (supplement 1.10), which is what a 3F1B schedule
    exploits.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = InputEmbedding(config)
        self.recycling = Recycling(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.msa_dim)
        self.residue_head = nn.Linear(config.msa_dim, _VOCAB_SIZE)
        self.distance_head = nn.Linear(config.pair_dim, _NUM_BINS)

    def one_pass(self, ids_BSR: Tensor, previous: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Embed, add what the previous pass found, and run the blocks: -> (msa, pair)."""
        msa_BSRM, pair_BRRZ = self.embedding(ids_BSR)
        msa_BSRM, pair_BRRZ = self.recycling(msa_BSRM, pair_BRRZ, *previous)
        for block in self.blocks:
            msa_BSRM, pair_BRRZ = block(msa_BSRM, pair_BRRZ)
        return msa_BSRM, pair_BRRZ

    def nothing_yet(self, ids_BSR: Tensor) -> tuple[Tensor, Tensor]:
        """Return the zeros that the first pass starts from: the first row's msa, and the pairs."""
        B, _, R = ids_BSR.shape
        weight = self.final_norm.weight
        return weight.new_zeros(B, R, self.config.msa_dim), weight.new_zeros(
            B, R, R, self.config.pair_dim
        )

    def forward(
        self, ids_BSR: Tensor, residues_BSR: Tensor | None = None, bins_BRR: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        previous = self.nothing_yet(ids_BSR)
        with torch.no_grad():
            for _ in range(self.config.num_passes - 1):
                msa_BSRM, pair_BRRZ = self.one_pass(ids_BSR, previous)
                previous = (msa_BSRM[:, 0], pair_BRRZ)
        msa_BSRM, pair_BRRZ = self.one_pass(ids_BSR, previous)
        residue_BSRV = self.residue_head(self.final_norm(msa_BSRM))
        distance_BRRU = self.distance_head(pair_BRRZ)
        distance_BRRU = distance_BRRU + distance_BRRU.transpose(1, 2)
        if residues_BSR is None or bins_BRR is None:
            return residue_BSRV, distance_BRRU
        residue_loss = F.cross_entropy(residue_BSRV.flatten(0, 2), residues_BSR.flatten())
        distance_loss = F.cross_entropy(distance_BRRU.flatten(0, 2), bins_BRR.flatten())
        return 2.0 * residue_loss + 0.3 * distance_loss


def build(config: Config) -> Evoformer:
    """Return the module (on whatever device is torch's current default)."""
    return Evoformer(config)


def inputs(
    config: Config,
    sizes: Mapping[str, int],
    *,
    device: str,
    dtype: torch.dtype,
    seed: int,
    targets: bool,
) -> Example:
    """Return random ids_BSR (R is the size "tokens"), and what to predict when `targets`."""
    batch, residues = sizes["batch"], sizes["tokens"]
    shape = (batch, sizes["sequences"], residues)
    ids_BSR = random_ids(shape, _VOCAB_SIZE, device, seed)
    if not targets:
        return (ids_BSR,), {}
    residues_BSR = random_ids(shape, _VOCAB_SIZE, device, seed + 1)
    bins_BRR = random_ids((batch, residues, residues), _NUM_BINS, device, seed + 2)
    return (ids_BSR, residues_BSR, bins_BRR), {}


# SuperScaler (arXiv 2301.08984) reports an AlphaFold 2 ladder of 87 M to 3.2 B. The first is the
# published model's own stack; the widths of the others could not be verified, so they are ours.
_OURS = "ours: widths chosen for {}"

CONFIGS: Mapping[str, Config] = {
    "evoformer-tiny": Config(
        2, 32, 16, "ours: for tests", head_dim=8, outer_dim=8, triangle_dim=16,
        default_sequences=4, default_residues=16,
    ),
    "evoformer-87m": Config(48, 256, 128, "AlphaFold 2, supplement 1.6"),
    "evoformer-930m": Config(64, 768, 384, _OURS.format("930 M")),
    "evoformer-2.4b": Config(96, 1024, 512, _OURS.format("2.4 B")),
    "evoformer-3.2b": Config(128, 1024, 512, _OURS.format("3.2 B")),
}  # fmt: skip
