"""A network as a stranger would write it, who never heard of scaling rules: nothing of depthmup is imported here.

An image transformer in two stages, with attention of grouped keys and rotary positions, gated MLPs, registers, and
modules within modules. Test helpers; no tests.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Settings:
    """Everything that describes one network."""

    width: int
    depth: int  # of the two stages together
    head_dim: int = 8
    heads_per_key: int = 2
    mlp_ratio: int = 2
    num_registers: int = 2
    patch_size: int = 2
    num_classes: int = 10
    channels: int = 3

    @property
    def num_heads(self) -> int:
        return self.width // self.head_dim

    @property
    def num_keys(self) -> int:
        return self.num_heads // self.heads_per_key

    def blocks_of_stages(self) -> tuple[int, int]:
        return self.depth // 2, self.depth - self.depth // 2


class RootMeanSquareNorm(nn.Module):
    """Divides by the root mean square of the features; one gain a feature."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.gain


class RotaryPositions(nn.Module):
    """Turns pairs of features by angles that depend on a token's place; it has no parameters."""

    frequencies: Tensor

    def __init__(self, head_dim: int, base: float = 100.0) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2) / head_dim
        self.register_buffer("frequencies", base**-exponents, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, heads, tokens, head_dim) -> the same."""
        places = torch.arange(x.shape[-2], device=x.device, dtype=x.dtype)
        angles = places[:, None] * self.frequencies  # (tokens, head_dim / 2)
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = torch.stack(
            (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()), dim=-1
        )
        return turned.flatten(-2)


class GroupedAttention(nn.Module):
    """Attention in which several heads share one key and one value."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.head_dim, self.heads_per_key = settings.head_dim, settings.heads_per_key
        self.to_queries = nn.Linear(settings.width, settings.num_heads * settings.head_dim, bias=False)
        self.to_keys = nn.Linear(settings.width, settings.num_keys * settings.head_dim, bias=False)
        self.to_values = nn.Linear(settings.width, settings.num_keys * settings.head_dim, bias=False)
        self.positions = RotaryPositions(settings.head_dim)
        self.project = nn.Linear(settings.num_heads * settings.head_dim, settings.width)

    def heads_of(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.positions(self.heads_of(self.to_queries(x)))
        keys = self.positions(self.heads_of(self.to_keys(x)))
        values = self.heads_of(self.to_values(x))
        keys = keys.repeat_interleave(self.heads_per_key, dim=1)
        values = values.repeat_interleave(self.heads_per_key, dim=1)
        weights = (queries @ keys.transpose(-2, -1) / math.sqrt(self.head_dim)).softmax(dim=-1)
        return self.project((weights @ values).transpose(1, 2).flatten(-2))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        hidden = settings.mlp_ratio * settings.width
        self.gate = nn.Linear(settings.width, hidden, bias=False)
        self.up = nn.Linear(settings.width, hidden, bias=False)
        self.down = nn.Linear(hidden, settings.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Residual(nn.Module):
    """x + gain * inner(norm(x))"""

    def __init__(self, width: int, inner: nn.Module) -> None:
        super().__init__()
        self.norm = RootMeanSquareNorm(width)
        self.inner = inner
        self.gain = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x)) * self.gain


class Block(nn.Module):
    """Attention, then a gated MLP."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.mix = nn.ModuleDict(
            {
                "tokens": Residual(settings.width, GroupedAttention(settings)),
                "features": Residual(settings.width, GatedMLP(settings)),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        for part in self.mix.values():
            x = part(x)
        return x


class Stage(nn.Module):
    """Blocks of one kind, one after another."""

    def __init__(self, settings: Settings, num_blocks: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(settings) for _ in range(num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Patches(nn.Module):
    """Cuts images into patches, embeds each, and puts the registers before them."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.embed = nn.Conv2d(settings.channels, settings.width, settings.patch_size, settings.patch_size)
        self.registers = nn.Parameter(torch.randn(1, settings.num_registers, settings.width) * 0.02)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).transpose(1, 2)  # (batch, patches, width)
        return torch.cat((self.registers.expand(len(images), -1, -1), patches), dim=1)


class Network(nn.Module):
    """(batch, channels, height, width) images -> (batch, num_classes) logits."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        first, second = settings.blocks_of_stages()
        self.patches = Patches(settings)
        self.encoder = nn.ModuleDict({"early": Stage(settings, first), "late": Stage(settings, second)})
        self.between = nn.Linear(settings.width, settings.width)  # not residual
        self.norm = RootMeanSquareNorm(settings.width)
        self.classifier = nn.Linear(settings.width, settings.num_classes)

    def features(self, images: Tensor) -> Iterator[Tensor]:
        """What each stage puts out."""
        x = self.encoder["early"](self.patches(images))
        yield x
        yield self.encoder["late"](F.gelu(self.between(x)))

    def forward(self, images: Tensor) -> Tensor:
        *_, last = self.features(images)
        tokens = self.norm(last)[:, self.settings.num_registers :]
        return self.classifier(tokens.mean(dim=1))


def make_network(width: int, depth: int) -> Network:
    return Network(Settings(width=width, depth=depth))
