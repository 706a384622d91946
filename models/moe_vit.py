"""timm's ViT with a mixture of experts in the place of each MLP: routing per token, dropless, balanced by biases.

    gate    g = 2 sigmoid(router(x)), so that it is 1 where the router says nothing: one expert is the dense ViT
    chosen  the k experts of largest sigmoid + balance; balance is not trained: it loses rate * (load - k / E) a step
    output  mean over the chosen experts of g * down(gelu(up(x)))

Sigmoid gates, the mean over active experts and the balance are 2601.20205's; no bias in experts, as is usual.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthmup.models import vit
from depthmup.models.config import MixtureVitConfig
from depthmup.models.family import Family, ParameterRule, Roles, Slot
from depthmup.models.parameterization import Role


class GroupedLinear(nn.Module):
    """A matrix of its own for each of several groups of rows. `weight` is (groups, out, in)."""

    def __init__(self, groups: int, features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, out_features, features))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """(rows, in), rising ends of the groups' rows (groups,) -> (rows, out)."""
        if len(self.weight) == 1 or x.is_meta:  # sizes and costs are the same whichever expert takes a row
            return F.linear(x, self.weight[0])
        if x.is_cuda and x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm"):
            return F.grouped_mm(x, self.weight.to(x.dtype).transpose(1, 2), offs=ends.int())
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        return torch.cat([F.linear(rows, matrix) for rows, matrix in zip(x.split(sizes), self.weight, strict=True)])


class MixtureOfExperts(nn.Module):
    """(batch, tokens, width) -> the same. `load` counts the tokens of each expert, and `entropy` sums the gates'
    entropies, until a step of training takes them (train.expert_load)."""

    balance: Tensor  # (experts,)
    load: Tensor  # (experts,)
    entropy: Tensor  # (1,)

    def __init__(self, width: int, expert_width: int, num_experts: int, active: int, rate: float) -> None:
        super().__init__()
        self.active, self.rate = active, rate
        self.router = nn.Linear(width, num_experts, bias=False) if num_experts > 1 else None
        self.up = GroupedLinear(num_experts, width, expert_width)
        self.down = GroupedLinear(num_experts, expert_width, width)
        self.register_buffer("balance", torch.zeros(num_experts))
        self.register_buffer("load", torch.zeros(num_experts), persistent=False)
        self.register_buffer("entropy", torch.zeros(1), persistent=False)

    def reset_running_stats(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if self.router is None:
            return self.down(F.gelu(self.up(rows, self.load)), self.load).view_as(x)
        scores = self.router(rows)
        rows, gates = rows.to(scores.dtype), scores.float().sigmoid()  # autocast's type, in which all products are
        experts = (gates.detach() + self.balance).topk(self.active).indices
        load = F.one_hot(experts, gates.shape[1]).sum((0, 1)) if not x.is_meta else self.load
        if self.training:
            self.count(gates.detach(), load)
        order = experts.flatten().argsort(stable=True)  # (rows * active,), by expert
        ends = load.cumsum(0)
        hidden = F.gelu(self.up(rows[order // self.active], ends))
        outputs = self.down(hidden, ends)[order.argsort()].view(*experts.shape, -1)  # (rows, active, width)
        weights = gates.gather(1, experts) * (2 / self.active)
        return (outputs * weights[..., None].to(outputs.dtype)).sum(1).view_as(x)

    @torch.no_grad()
    def count(self, gates: Tensor, load: Tensor) -> None:
        shares = gates / gates.sum(1, keepdim=True)
        self.load += load
        self.entropy -= torch.special.xlogy(shares, shares).sum()


def find_mixtures(network: nn.Module) -> dict[str, MixtureOfExperts]:
    """Those that route, by name."""
    found = {name: module for name, module in network.named_modules() if isinstance(module, MixtureOfExperts)}
    return {name: module for name, module in found.items() if module.router is not None}


def build(config: MixtureVitConfig) -> nn.Module:
    network: Any = vit.build(config)
    sizes = config.width, config.expert_width, config.num_experts, config.active_experts, config.balance_rate
    for block in network.blocks:
        block.mlp = MixtureOfExperts(*sizes)
    return network


def roles(config: MixtureVitConfig) -> Roles:
    """Those of the plain ViT (`vit.roles`), with a mixture in place of each MLP: router (experts, N), and `up` and
    `down` of all experts, as one parameter each. All three start as timm's matrices: normal, std 0.02."""
    plain, mixture = vit.roles(config), r"blocks\.\d+\.mlp"
    experts = (
        ParameterRule(rf"{mixture}\.router\.weight", Role.ROUTER, vit.TIMM),
        ParameterRule(rf"{mixture}\.up\.weight", Role.EXPERT_UP, vit.TIMM),
        ParameterRule(rf"{mixture}\.down\.weight", Role.EXPERT_DOWN, vit.TIMM),
    )
    return Roles(
        parameters=plain.parameters + experts,
        branches=(plain.branches[0], Slot(r"(blocks\.\d+)\.ls2", r"\1.mlp.down")),
        readout=plain.readout,
        queries=plain.queries,
        keys=plain.keys,
        blocks=plain.blocks,
        routers=rf"{mixture}\.router" if config.num_experts > 1 else None,
    )


MOE_VIT = Family(name="moe_vit", build=build, roles=roles)
