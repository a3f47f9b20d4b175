"""Swin Transformer (arXiv 2103.14030): attention in windows, every second block's shifted by half.

Shape suffixes: B batch, C channels, I image side, Y and X rows and columns of patches, W window
side, N = W*W positions of a window, G windows of an image, D width, H heads, K head width,
L labels. A block is a function of x_BYXD alone, so a pipeline may be cut between any two.

The scores of a window are made explicitly, as the paper's code does: their memory is what
co-shard was invented for. There is no dropout and no stochastic depth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.errors import UsageError
from toolkit.models.inputs import Example, random_ids, random_values

FAMILY = "swin"


@dataclass(frozen=True)
class Config:
    """The numbers that make a Swin; width and heads double from stage to stage."""

    image_side: int
    window_side: int
    depths: tuple[int, ...]
    embed_dim: int
    num_heads: int  # of the first stage
    source: str
    patch_side: int = 4
    num_channels: int = 3
    num_labels: int = 1000

    def __post_init__(self) -> None:
        for stage in range(len(self.depths)):
            side = self.map_side(stage)
            if side % self.window(stage) or side * 2**stage != self.map_side(0):
                raise UsageError(
                    f"windows of {self.window_side} do not tile the {side} x {side} patches of "
                    f"stage {stage} (image {self.image_side}, patch {self.patch_side})",
                    remedy="choose an image side of patch * window * 2^(stages - 1)",
                )

    def map_side(self, stage: int) -> int:
        """Rows (and columns) of patches in a stage."""
        return self.image_side // self.patch_side // 2**stage

    def window(self, stage: int) -> int:
        """The window's side in a stage: never more than the whole map."""
        return min(self.window_side, self.map_side(stage))

    @property
    def sizes(self) -> Mapping[str, int]:
        return {"batch": 1}

    @property
    def summary(self) -> str:
        return (
            f"image {self.image_side}, window {self.window_side}, depths "
            f"{'-'.join(map(str, self.depths))}, width {self.embed_dim}, {self.num_heads} heads"
        )


def to_windows(x_BYXD: Tensor, window: int) -> Tensor:
    """Cut maps into windows: [B, Y, X, D] -> [B*G, N, D]."""
    B, Y, X, D = x_BYXD.shape
    cut = x_BYXD.view(B, Y // window, window, X // window, window, D)
    return cut.transpose(2, 3).reshape(-1, window * window, D)


def from_windows(x_GND: Tensor, window: int, side: int) -> Tensor:
    """Undo `to_windows`: [B*G, N, D] -> [B, Y, X, D]."""
    count = side // window
    cut = x_GND.view(-1, count, count, window, window, x_GND.shape[-1])
    return cut.transpose(2, 3).reshape(-1, side, side, x_GND.shape[-1])


def relative_index(window: int, device: torch.device) -> Tensor:
    """Return [N*N]: the row of the bias table for every pair of positions (paper, section 3.2)."""
    offset_W = torch.arange(window, device=device)
    delta_WW = offset_W[:, None] - offset_W[None, :] + window - 1
    index_WWWW = delta_WW[:, None, :, None] * (2 * window - 1) + delta_WW[None, :, None, :]
    return index_WWWW.reshape(-1)


def shift_mask(side: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Return [G, 1, N, N], true where two positions of a shifted window were never neighbours."""
    at_Y = torch.arange(side, device=device)
    part_Y = (at_Y >= side - window).long() + (at_Y >= side - shift).long()
    region_YX = part_Y[:, None] * 3 + part_Y[None, :]
    region_GN = to_windows(region_YX[None, :, :, None], window)[..., 0]
    return (region_GN[:, None, :] != region_GN[:, :, None]).unsqueeze(1)


class WindowAttention(nn.Module):
    """Self-attention within each window, with a learned bias per relative position and head."""

    def __init__(self, dim: int, num_heads: int, window: int, side: int, shift: int) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.window, self.side, self.shift = window, side, shift
        self.position_bias = nn.Embedding((2 * window - 1) ** 2, num_heads)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, x_GND: Tensor) -> Tensor:
        G, N, _ = x_GND.shape
        q_GHNK = self.query(x_GND).view(G, N, -1, self.head_dim).transpose(1, 2)
        k_GHNK = self.key(x_GND).view(G, N, -1, self.head_dim).transpose(1, 2)
        v_GHNK = self.value(x_GND).view(G, N, -1, self.head_dim).transpose(1, 2)
        bias_HNN = self.position_bias(relative_index(self.window, x_GND.device))
        bias_HNN = bias_HNN.view(N, N, -1).permute(2, 0, 1)
        scores_GHNN = (q_GHNK * self.head_dim**-0.5) @ k_GHNK.transpose(-2, -1) + bias_HNN
        if self.shift:
            mask_G1NN = shift_mask(self.side, self.window, self.shift, x_GND.device)
            num_windows = mask_G1NN.shape[0]
            scores_BGHNN = scores_GHNN.view(-1, num_windows, *scores_GHNN.shape[1:])
            scores_GHNN = scores_BGHNN.masked_fill(mask_G1NN, float("-inf")).flatten(0, 1)
        mixed_GHNK = scores_GHNN.softmax(dim=-1) @ v_GHNK
        return self.output(mixed_GHNK.transpose(1, 2).reshape(G, N, -1))


class FeedForward(nn.Module):
    """Two linear layers around a GELU, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x_BYXD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BYXD)))


class Block(nn.Module):
    """Window attention and feed-forward, each after a norm and around a residual."""

    def __init__(self, config: Config, stage: int, *, shifted: bool) -> None:
        super().__init__()
        dim, num_heads = config.embed_dim * 2**stage, config.num_heads * 2**stage
        self.side, self.window = config.map_side(stage), config.window(stage)
        # A map that is one window has no neighbours to shift towards.
        self.shift = self.window // 2 if shifted and self.window < self.side else 0
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, num_heads, self.window, self.side, self.shift)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim)

    def forward(self, x_BYXD: Tensor) -> Tensor:
        normed_BYXD = self.attention_norm(x_BYXD)
        if self.shift:
            normed_BYXD = normed_BYXD.roll((-self.shift, -self.shift), dims=(1, 2))
        mixed_GND = self.attention(to_windows(normed_BYXD, self.window))
        mixed_BYXD = from_windows(mixed_GND, self.window, self.side)
        if self.shift:
            mixed_BYXD = mixed_BYXD.roll((self.shift, self.shift), dims=(1, 2))
        x_BYXD = x_BYXD + mixed_BYXD
        return x_BYXD + self.ffn(self.ffn_norm(x_BYXD))


class PatchMerging(nn.Module):
    """Each 2 x 2 patches become one of twice the width: [B, Y, X, D] -> [B, Y/2, X/2, 2D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduce = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x_BYXD: Tensor) -> Tensor:
        B, Y, X, D = x_BYXD.shape
        four = x_BYXD.view(B, Y // 2, 2, X // 2, 2, D).permute(0, 1, 3, 4, 2, 5)
        return self.reduce(self.norm(four.reshape(B, Y // 2, X // 2, 4 * D)))


class Swin(nn.Module):
    """Images in; class logits out, or the mean cross-entropy when labels are given.

    `blocks` is one flat list, the mergings between stages included.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.patches = nn.Conv2d(
            config.num_channels, config.embed_dim, config.patch_side, stride=config.patch_side
        )
        self.patch_norm = nn.LayerNorm(config.embed_dim)
        self.blocks = nn.ModuleList()
        for stage, depth in enumerate(config.depths):
            if stage:
                self.blocks.append(PatchMerging(config.embed_dim * 2 ** (stage - 1)))
            self.blocks.extend(Block(config, stage, shifted=i % 2 == 1) for i in range(depth))
        final_dim = config.embed_dim * 2 ** (len(config.depths) - 1)
        self.final_norm = nn.LayerNorm(final_dim)
        self.head = nn.Linear(final_dim, config.num_labels)

    def forward(self, image_BCII: Tensor, labels_B: Tensor | None = None) -> Tensor:
        x_BYXD = self.patch_norm(self.patches(image_BCII).permute(0, 2, 3, 1))
        for block in self.blocks:
            x_BYXD = block(x_BYXD)
        logits_BL = self.head(self.final_norm(x_BYXD).mean(dim=(1, 2)))
        return logits_BL if labels_B is None else F.cross_entropy(logits_BL, labels_B)


def build(config: Config) -> Swin:
    """Return the module (on whatever device is torch's current default)."""
    return Swin(config)


def inputs(
    config: Config,
    sizes: Mapping[str, int],
    *,
    device: str,
    dtype: torch.dtype,
    seed: int,
    targets: bool,
) -> Example:
    """Return random image_BCII, and labels_B when `targets`."""
    shape = (sizes["batch"], config.num_channels, config.image_side, config.image_side)
    image_BCII = random_values(shape, dtype, device, seed)
    labels_B = random_ids((sizes["batch"],), config.num_labels, device, seed)
    return ((image_BCII, labels_B) if targets else (image_BCII,)), {}


# Heads double by stage as in nnScaler's Swin example, whose 1.8B row has 16, 32, 64 and 128.
_LADDER = "nnScaler (OSDI'24) artifact"

CONFIGS: Mapping[str, Config] = {
    "swin-nano": Config(32, 4, (2, 2), 32, 2, "ours: for tests", num_labels=10),
    "swin-tiny": Config(224, 7, (2, 2, 6, 2), 96, 3, "arXiv 2103.14030, section 3.3"),
    "swin-large": Config(224, 7, (2, 2, 18, 2), 192, 6, "arXiv 2103.14030, section 3.3"),
    "swin-1.8b": Config(1536, 48, (2, 2, 26, 2), 512, 16, f"{_LADDER}, 4 GPUs"),
    "swin-4.9b": Config(1536, 48, (2, 2, 34, 2), 768, 24, f"{_LADDER}, 8 GPUs"),
    "swin-10b": Config(1536, 48, (2, 2, 42, 2), 1024, 32, f"{_LADDER}, 16 GPUs"),
    "swin-27b": Config(1536, 48, (2, 2, 50, 2), 1536, 32, f"{_LADDER}, 32 GPUs"),
}
