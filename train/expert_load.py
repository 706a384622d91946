"""The experts' balance in training: moved after every step by the load that each one had, which metrics show."""

from collections.abc import Callable

import torch
from torch import Tensor

from depthmup.models.moe_vit import MixtureOfExperts

# A load is off by |load / (k / E) - 1|. Of what is beyond this, some experts learn little and others everything.
MEAN_DEVIATION, LARGEST_DEVIATION = 0.25, 0.50


@torch.no_grad()
def balance_experts(
    mixtures: dict[str, MixtureOfExperts], sum_over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Tensor:
    """Moves the biases by the load of the forward passes in training since the last call, once a step. Returns
    (mixtures, experts + 1): the share of tokens that each expert served, and the mean entropy of the gates over its
    largest, ln(experts)."""
    counts = sum_over_ranks(torch.stack([torch.cat([m.load, m.entropy]) for m in mixtures.values()]))
    active = next(iter(mixtures.values())).active
    tokens = counts[:, :-1].sum(1, keepdim=True) / active
    counts /= tokens
    counts[:, -1] /= torch.tensor(float(counts.shape[1] - 1)).log()
    for module, load in zip(mixtures.values(), counts[:, :-1], strict=True):
        module.balance -= module.rate * (load - active / len(load))
        module.load.zero_()
        module.entropy.zero_()
    return counts


def load_metrics(mixtures: dict[str, MixtureOfExperts], counts: Tensor) -> dict[str, float]:
    """A metrics line's part: for each mixture the load of each expert, how far loads are off, and the entropy."""
    line: dict[str, float] = {}
    for (name, module), row in zip(mixtures.items(), counts.tolist(), strict=True):
        *loads, entropy = row
        off = [abs(load * len(loads) / module.active - 1) for load in loads]
        line |= {f"expert_load/{name}.{number}": load for number, load in enumerate(loads)}
        line |= {f"expert_load_mean_deviation/{name}": sum(off) / len(off)}
        line |= {f"expert_load_largest_deviation/{name}": max(off), f"router_entropy/{name}": entropy}
    return line


def describe_imbalance(metrics: dict[str, float]) -> str | None:
    """Which mixture's loads are beyond what lets every expert learn, in words."""
    limits = {"mean": MEAN_DEVIATION, "largest": LARGEST_DEVIATION}
    for key, value in metrics.items():
        for which, limit in limits.items():
            if key.startswith(f"expert_load_{which}_deviation/") and not value <= limit:
                name = key.partition("/")[2]
                return f"the experts of {name} are not balanced: {which} deviation of load {value:.2f}, above {limit}"
    return None
