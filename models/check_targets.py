"""What the coordinate check holds each quantity to: the slopes that the feature-learning limit demands."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from depthmup.models.optimizer_config import OptimizerConfig
from depthmup.models.parameterization import Role

Span = tuple[float, float]  # lowest and highest slope that the limit allows
Allowed = Callable[[float], Span]  # alpha -> span


def slope(value: float) -> Allowed:
    return lambda alpha: (value, value)


def span(low: float, high: float) -> Allowed:
    return lambda alpha: (low, high)


def as_multiplier(alpha: float) -> Span:
    return -alpha, -alpha


def as_update(alpha: float) -> Span:
    """L branches, each L^-alpha strong, move the stream together by a step of constant size."""
    return alpha - 1, alpha - 1


def branch_update(alpha: float) -> Span:
    """Of order 1/L through the branch's own weights, of order L^-alpha through the stream that moves below it."""
    return min(-1.0, -alpha), max(-1.0, -alpha)


def attention_update(alpha: float) -> Span:
    """The same two sources, before the branch multiplier."""
    return min(alpha - 1, 0.0), max(alpha - 1, 0.0)


FLAT = slope(0.0)


@dataclass(frozen=True)
class Target:
    """Slopes of log2 RMS over log2 width and over log2 depth: of the value at step 0, and of its update at later
    steps. None is not judged. `spectral`: of matrices' spectral norms, not of their entries. Then those over the number
    of experts, at a fixed active share, and over an expert's width at a fixed width of the network."""

    width: Allowed | None
    depth: Allowed | None
    update_width: Allowed
    update_depth: Allowed | None
    spectral: bool = False
    num_experts: Allowed | None = None
    update_num_experts: Allowed = FLAT
    mlp_ratio: Allowed | None = None
    update_mlp_ratio: Allowed = FLAT


# At first experts disagree: a mean over more of them, and a wider one's output, is noise that shrinks.
MIXED: dict[str, Any] = {"num_experts": span(-0.5, 0.0), "mlp_ratio": span(-0.5, 0.0)}
STEADY: dict[str, Any] = {"num_experts": FLAT, "mlp_ratio": FLAT}
# fmt: off
TARGETS: dict[str, Target] = {
    #                                  width         depth          update: width    depth
    "stream input":             Target(FLAT,         FLAT,          FLAT,            FLAT,            **STEADY),
    "stream":                   Target(FLAT,         FLAT,          FLAT,            FLAT,            **STEADY),
    "branch":                   Target(FLAT,         as_multiplier, FLAT,            branch_update,   **MIXED),
    # logits are a mean over a random readout at first, attention logits a mean over the head dim: noise that shrinks
    "logits":                   Target(slope(-0.5),  FLAT,          FLAT,            FLAT,            **STEADY),
    "router logits":            Target(slope(-0.5),  FLAT,          FLAT,            attention_update, **STEADY),
    "attention logits":         Target(slope(-0.5),  FLAT,          span(-0.5, 0.0), attention_update),
    Role.INPUT.value:           Target(None,         None,          FLAT,            FLAT),
    Role.BRANCH_HIDDEN.value:   Target(None,         None,          slope(-1.0),     as_update),
    Role.HIDDEN.value:          Target(None,         None,          slope(-1.0),     FLAT),
    Role.BRANCH_VECTOR.value:   Target(None,         None,          FLAT,            as_update),
    Role.VECTOR.value:          Target(None,         None,          FLAT,            FLAT),
    Role.STREAM_VECTOR.value:   Target(None,         None,          FLAT,            slope(-1.0)),
    # a QK-norm gain is shared by heads that disagree at first: its SGD update starts N^-1/2 low
    Role.BRANCH_SCALAR.value:   Target(None,         None,          span(-0.5, 0.0), as_update),
    Role.SCALAR.value:          Target(None,         None,          FLAT,            FLAT),
    Role.READOUT.value:         Target(None,         None,          FLAT,            FLAT),
    Role.ROUTER.value:          Target(None,         None,          slope(-1.0),     as_update),
    Role.GATE.value:            Target(None,         None,          slope(-1.0),     FLAT),
    Role.EXPERT_UP.value:       Target(None,         None,          slope(-1.0),     as_update),
    Role.EXPERT_DOWN.value:     Target(None,         None,          slope(-1.0),     as_update,
                                       update_mlp_ratio=slope(-1.0)),
}
FIXED_HEAD_DIM = {
    "attention logits":         Target(FLAT,         FLAT,          span(-0.5, 0.0), attention_update),
}
# A router's gradient is a product of the stream's and an expert's output over the width: noise at first, which SGD,
# unlike AdamW, follows in size. So its update starts up to a root of the width, or of an expert's width, low.
SGD = {
    "router logits":            Target(slope(-0.5),  FLAT,          span(-0.5, 0.0), attention_update, **STEADY,
                                       update_mlp_ratio=span(-0.5, 0.0)),
    Role.ROUTER.value:          Target(None,         None,          span(-1.5, -1.0), as_update,
                                       update_mlp_ratio=span(-0.5, 0.0)),
    Role.GATE.value:            Target(None,         None,          span(-1.5, -1.0), FLAT),
}
# Muon gives each matrix's update a spectral norm, so that is measured of it: RMS mixes it with its rank.
# It orthogonalises q, k and v as one matrix, in which the share of q and k changes with depth.
MUON = {
    f"muon {Role.BRANCH_HIDDEN.value}": Target(None, None,      FLAT,            as_update, spectral=True),
    f"muon {Role.HIDDEN.value}": Target(None,        None,          FLAT,            FLAT,      spectral=True),
}
# What a layer inside a branch puts out, before the branch's multiplier, changes by its own weights' change, and by what
# moves below it and is passed on; the sum of the two says little, as the second does not shrink. Where the branch is
# one layer, its own part is asked for no more than its share of the stream's step, and so is the last of several. But
# features between two layers of a branch have to move by their own weights however deep the network is (2505.01618):
# at L^(alpha - 1) they freeze unless alpha is 1.
INSIDE = {
    "only layer, own":         Target(None,          None,          FLAT,            as_update),
    "last layer, own":         Target(None,          None,          FLAT,            as_update),
    "inner layer, own":        Target(None,          None,          FLAT,            FLAT),
    "only layer, passed":      Target(None,          None,          FLAT,            FLAT),
    "last layer, passed":      Target(None,          None,          FLAT,            FLAT),
    "inner layer, passed":     Target(None,          None,          FLAT,            FLAT),
}
# fmt: on


def find_target(quantity: str, targets: dict[str, Target]) -> Target:
    """Its own, or that of what it is a part of: 'inner layer, own 2.1' is one of 'inner layer, own'."""
    return targets.get(quantity) or targets[quantity.rpartition(" ")[0]]


def list_targets(optimizer: OptimizerConfig, head_dim_grows: bool) -> dict[str, Target]:
    """What each quantity is held to."""
    targets = TARGETS if head_dim_grows else TARGETS | FIXED_HEAD_DIM
    if optimizer.name == "sgd":
        return targets | SGD
    if optimizer.name != "muon":
        return targets
    return targets | MUON | {"attention logits": replace(targets["attention logits"], update_depth=None)}
