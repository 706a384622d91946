"""The scaling rules as data: which factor each role of parameter gets when width and depth grow.

`TABLE` is the table of the papers, one row a role, one formula a cell (forward multipliers, which belong to modules,
are methods of `Scale`), in
    N      = width / base_width            (m_N)
    L      = depth / base_depth            (m_L)
    alpha  = depth exponent of the residual branches
Every factor is relative to the base model and is 1 at N = L = 1, where the model is the ordinary one with ordinary
optimizer settings. The absolute form of Bordelon et al. (beta / sqrt(L)) is the same with base_depth = 1.

Sources: Bordelon et al. (arXiv 2309.16620) and Tensor Programs VI (2310.02244) for depth, Tensor Programs V
(2203.03466, table 8) for width, CompleteP (2505.01618, table 1) for alpha = 1 and AdamW's weight decay.

AdamW's epsilon stands beside a gradient, and scales as the parameter's gradient does in the form used here. The
multiplier 1/N of the readout's input makes every gradient N times smaller but that of the readout's bias, which comes
after it, and those of parameters that N heads share. Published tables have 1 for the readout, for vectors outside of
branches, or for both (2512.22382, 2505.01618): they belong to a readout without multiplier.

Muon's cells are for torch's `match_rms_adamw`, which multiplies a matrix's update by 0.2 sqrt(max(rows, columns)) and
so carries N^(1/2): N^(-1/2) here is the factor 1 of the original Muon in width (2603.00541), and L^(alpha - 1) lets L
branches, each multiplied by L^-alpha, move the stream by a step that does not depend on L.

A mixture of experts (models.moe_vit) has two more ratios, in EXPERTS: R of an expert's width over the network's to the
base's, and E of the number of experts. A share 1/E of the tokens' gradient reaches an expert, whatever share of the
experts is active: the mean over active experts divides by as many as the share brings. The second matrix has init std
N^(1/2) / M and rate 1 / M with M = N R, the expert's width (2601.20205); the router is like a readout, of std 1/N
(the same); rates of SGD are those times E (2605.14200). eps is again that of the gradients in this form, where the
down matrix has 1/N and not 2601.20205's N / M^2.

gamma0 divides the readout's product, and so every gradient but that of the readout's bias. Learning rates times
gamma0^2 (SGD) or gamma0 (AdamW and Muon, whose steps do not see a gradient's size; eps over gamma0) let the features
move gamma0 times as far while the logits, to first order, move as at gamma0 = 1 (2309.16620, eq. 2). The bias gets no
factor, and lr * decay none for any parameter.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Literal


class Role(str, Enum):
    """What a parameter is to the scaling rules. Decided by name, once, in the family's table."""

    INPUT = "input"  # patch embedding, stem conv, position embedding, class token: fan-in does not grow
    BRANCH_HIDDEN = "branch_hidden"  # matrix or conv inside a residual branch
    HIDDEN = "hidden"  # matrix or conv outside of branches: downsampling shortcut, transition
    BRANCH_VECTOR = "branch_vector"  # norm gain, bias, depthwise conv inside a branch
    VECTOR = "vector"  # norm gain, bias, depthwise conv outside of branches
    BRANCH_SCALAR = "branch_scalar"  # in a branch, no dimension grows: QK-norm gain of a fixed head dim
    STREAM_VECTOR = "stream_vector"  # on the stream itself, in every block: gain and bias of a post-norm
    SCALAR = "scalar"  # outside of branches, no dimension grows: the classifier's bias
    READOUT = "readout"  # the classifier's matrix
    ROUTER = "router"  # in a branch: reads the width, puts out what does not grow, as one number an expert, or a gate
    GATE = "gate"  # the same outside of branches, before the readout: the scores of attention pooling
    EXPERT_UP = "expert_up"  # first matrices of all experts, (experts, expert width, width)
    EXPERT_DOWN = "expert_down"  # second matrices, (experts, width, expert width)


Formula = Callable[[float, float, float], float]  # (N, L, alpha) -> factor on the base value


@dataclass(frozen=True)
class Row:
    """One role's factors. Variances multiply the base init variance, the others the base hyperparameter."""

    init_variance_sp: Formula
    init_variance: Formula
    lr_sgd: Formula
    lr_adam: Formula
    eps_adam: Formula
    weight_decay: Formula  # of torch's AdamW, whose decay is coupled to the learning rate
    lr_muon: Formula | None = None  # None: AdamW trains this role beside Muon


def one(N: float, L: float, a: float) -> float:
    return 1.0


def zero(N: float, L: float, a: float) -> float:
    return 0.0


# fmt: off
TABLE: dict[Role, Row] = {
    Role.INPUT: Row(
        init_variance_sp=one, init_variance=one,
        lr_sgd=lambda N, L, a: N,
        lr_adam=one,
        eps_adam=lambda N, L, a: 1 / N,
        weight_decay=one,
    ),
    Role.BRANCH_HIDDEN: Row(
        init_variance_sp=lambda N, L, a: 1 / N, init_variance=lambda N, L, a: 1 / N,
        lr_sgd=lambda N, L, a: L ** (2 * a - 1),
        lr_adam=lambda N, L, a: 1 / N * L ** (a - 1),
        eps_adam=lambda N, L, a: 1 / N * L ** -a,
        weight_decay=lambda N, L, a: N,
        lr_muon=lambda N, L, a: N ** -0.5 * L ** (a - 1),
    ),
    Role.HIDDEN: Row(
        init_variance_sp=lambda N, L, a: 1 / N, init_variance=lambda N, L, a: 1 / N,
        lr_sgd=one,
        lr_adam=lambda N, L, a: 1 / N,
        eps_adam=lambda N, L, a: 1 / N,
        weight_decay=lambda N, L, a: N,
        lr_muon=lambda N, L, a: N ** -0.5,
    ),
    Role.BRANCH_VECTOR: Row(
        init_variance_sp=one, init_variance=one,
        lr_sgd=lambda N, L, a: N * L ** (2 * a - 1),
        lr_adam=lambda N, L, a: L ** (a - 1),
        eps_adam=lambda N, L, a: 1 / N * L ** -a,
        weight_decay=zero,
    ),
    Role.VECTOR: Row(
        init_variance_sp=one, init_variance=one,
        lr_sgd=lambda N, L, a: N,
        lr_adam=one,
        eps_adam=lambda N, L, a: 1 / N,
        weight_decay=zero,
    ),
    Role.BRANCH_SCALAR: Row(
        init_variance_sp=one, init_variance=one,
        lr_sgd=lambda N, L, a: L ** (2 * a - 1),
        lr_adam=lambda N, L, a: L ** (a - 1),
        eps_adam=lambda N, L, a: L ** -a,
        weight_decay=zero,
    ),
    Role.SCALAR: Row(
        init_variance_sp=one, init_variance=one,
        lr_sgd=one,
        lr_adam=one,
        eps_adam=one,
        weight_decay=zero,
    ),
    Role.READOUT: Row(
        init_variance_sp=lambda N, L, a: 1 / N, init_variance=one,
        lr_sgd=lambda N, L, a: N,
        lr_adam=one,
        eps_adam=lambda N, L, a: 1 / N,
        weight_decay=one,
    ),
    Role.ROUTER: Row(
        init_variance_sp=lambda N, L, a: 1 / N, init_variance=lambda N, L, a: N ** -2,
        lr_sgd=lambda N, L, a: 1 / N * L ** (2 * a - 1),
        lr_adam=lambda N, L, a: 1 / N * L ** (a - 1),
        eps_adam=lambda N, L, a: L ** -a,
        weight_decay=lambda N, L, a: N,
    ),
}
TABLE[Role.STREAM_VECTOR] = Row(  # a vector; L of them, which no multiplier makes smaller, move one stream [own]
    init_variance_sp=one, init_variance=one,
    lr_sgd=lambda N, L, a: N / L,
    lr_adam=lambda N, L, a: 1 / L,
    eps_adam=lambda N, L, a: 1 / N,
    weight_decay=zero,
)
TABLE[Role.GATE] = Row(  # a router at L = 1
    init_variance_sp=lambda N, L, a: 1 / N, init_variance=lambda N, L, a: N ** -2,
    lr_sgd=lambda N, L, a: 1 / N,
    lr_adam=lambda N, L, a: 1 / N,
    eps_adam=one,
    weight_decay=lambda N, L, a: N,
)
TABLE[Role.EXPERT_UP] = TABLE[Role.EXPERT_DOWN] = replace(TABLE[Role.BRANCH_HIDDEN], lr_muon=None)


ExpertFormula = Callable[[float, float], float]  # (R, E) -> factor


@dataclass(frozen=True)
class ExpertRow:
    """What multiplies a row of TABLE as experts grow in width and number."""

    lr_sgd: ExpertFormula
    eps_adam: ExpertFormula
    lr_adam: ExpertFormula = lambda R, E: 1.0
    init_variance_sp: ExpertFormula = lambda R, E: 1.0
    init_variance: ExpertFormula = lambda R, E: 1.0


EXPERTS: dict[Role, ExpertRow] = {
    Role.ROUTER: ExpertRow(lr_sgd=lambda R, E: E, eps_adam=lambda R, E: 1 / E),
    Role.EXPERT_UP: ExpertRow(lr_sgd=lambda R, E: R * E, eps_adam=lambda R, E: 1 / (R * E)),
    Role.EXPERT_DOWN: ExpertRow(
        init_variance_sp=lambda R, E: 1 / R, init_variance=lambda R, E: R ** -2,
        lr_sgd=lambda R, E: E / R,
        lr_adam=lambda R, E: 1 / R,
        eps_adam=lambda R, E: 1 / E,
    ),
}
# fmt: on
NO_EXPERTS = ExpertRow(lr_sgd=lambda R, E: 1.0, eps_adam=lambda R, E: 1.0)

BRANCH_ROLES = (
    *(Role.BRANCH_HIDDEN, Role.BRANCH_VECTOR, Role.BRANCH_SCALAR),
    *(Role.ROUTER, Role.EXPERT_UP, Role.EXPERT_DOWN),
)


@dataclass(frozen=True)
class Parameterization:
    """One choice of rules. The presets are rows; each disputed exponent stays a field that a config can override.

    alpha            depth exponent: branches are multiplied by beta * L^-alpha
    adam_depth_lr    exponent of L in AdamW's learning rate inside branches; None is alpha - 1 (Tensor Programs VI,
                     CompleteP), 0 is what Bordelon et al. are reported to have used
    eps_scaling      "table" (every parameter's), "branch" (in residual blocks only), or "none"
    weight_decay_scaling   exponent of N in a hidden matrix's coupled weight decay: 1 keeps lr * decay constant
    batch_lr, samples_lr   exponents of the learning rate in m_B and m_D, the global batch and the samples over the
                     base's; None is the optimizer's row of models.training_scale.TRAINING_TABLE
    beta, gamma0     tunable constants that transfer: branch scale and feature-learning strength
    """

    name: str
    width_rules: bool
    depth_rules: bool
    alpha: float
    adam_depth_lr: float | None = None
    eps_scaling: Literal["table", "branch", "none"] = "table"
    weight_decay_scaling: float = 1.0
    batch_lr: float | None = None
    samples_lr: float | None = None
    beta: float = 1.0
    gamma0: float = 1.0


PRESETS: dict[str, Parameterization] = {
    preset.name: preset
    for preset in (
        Parameterization("sp", width_rules=False, depth_rules=False, alpha=0.0),
        # neither 2203.03466 nor its package scales eps
        Parameterization("mup", width_rules=True, depth_rules=False, alpha=0.0, eps_scaling="none"),
        Parameterization("depth_mup", width_rules=True, depth_rules=True, alpha=0.5),
        # 2505.01618, table 1, which scales eps in residual blocks
        Parameterization("completep", width_rules=True, depth_rules=True, alpha=1.0, eps_scaling="branch"),
    )
}


@dataclass(frozen=True)
class Choice:
    """What `auto` means for networks of one kind, and the published studies that say so.

    absolute   branches of beta * (depth / base_depth)^-alpha with beta = base_depth^-alpha, not 1: the form of
               2309.16620, under which a base of any depth is a network of the same family
    """

    preset: Literal["sp", "mup", "depth_mup", "completep"]
    absolute: bool
    studies: tuple[str, ...]  # of docs/RESULTS.md; docs/models.md has the figures


# (kind of network, optimizer): a kind without a study has no row, and is refused
AUTO: dict[tuple[str, str], Choice] = {
    ("conv_resnet with no norm and 1 layer a branch", "sgd"): Choice("depth_mup", True, ("paper_rules_resnet",)),
    ("conv_resnet with no norm and 2 layers a branch", "sgd"): Choice("completep", True, ("paper_rules_resnet_k2",)),
    ("vit", "adamw"): Choice("completep", False, ("paper_vit",)),
}


@dataclass(frozen=True)
class Factors:
    """What an optimizer gets for one role at one size, as factors on the base values (all without unit)."""

    lr: float
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class Scale:
    """A parameterization at one size: ratios of width, depth and attention head dim to the base model's, and of
    experts' width (over the network's) and number."""

    parameterization: Parameterization
    width_ratio: float
    depth_ratio: float
    head_dim_ratio: float = 1.0
    mlp_ratio: float = 1.0
    experts_ratio: float = 1.0

    @property
    def _experts(self) -> tuple[float, float]:
        return (self.mlp_ratio, self.experts_ratio) if self.parameterization.width_rules else (1.0, 1.0)

    @property
    def _N(self) -> float:
        return self.width_ratio if self.parameterization.width_rules else 1.0

    @property
    def _L(self) -> float:
        return self.depth_ratio if self.parameterization.depth_rules else 1.0

    def branch_multiplier(self) -> float:
        """beta * L^-alpha, on the output of every residual branch (2309.16620, eq. 1)."""
        return self.parameterization.beta * self._L**-self.parameterization.alpha

    def readout_multiplier(self) -> float:
        """1 / (gamma0 * N), on the input of the readout (2203.03466, table 8; gamma0: 2309.16620, eq. 2)."""
        return 1 / (self.parameterization.gamma0 * self._N)

    def attention_multiplier(self) -> float:
        """sqrt(d0 / d), which turns the usual 1 / sqrt(d) into sqrt(d0) / d (2203.03466, definition 4.1)."""
        return self.head_dim_ratio**-0.5 if self.parameterization.width_rules else 1.0

    def distribution_multiplier(self) -> float:
        """N, on probabilities of as many values as the network is wide, which are of order 1 / N (2604.25409)."""
        return self._N

    def all_factors(self, optimizer: Literal["sgd", "adamw", "muon"]) -> tuple[Any, ...]:
        """Everything that the rules change. Where two scales have it in common, they train the same network alike."""
        multipliers = (
            *(self.branch_multiplier(), self.readout_multiplier()),
            *(self.attention_multiplier(), self.distribution_multiplier()),
        )
        return *multipliers, *((self.init_variance(role), self.factors(role, optimizer)) for role in Role)

    def init_variance(self, role: Role) -> float:
        """Factor on the base init variance. Init follows the real fan-in also under `sp`, which sees the true N."""
        row, p = TABLE[role], self.parameterization
        formula = row.init_variance if p.width_rules else row.init_variance_sp
        experts = EXPERTS.get(role, NO_EXPERTS)
        of_experts = experts.init_variance if p.width_rules else experts.init_variance_sp
        return formula(self.width_ratio, self._L, p.alpha) * of_experts(self.mlp_ratio, self.experts_ratio)

    def factors(self, role: Role, optimizer: Literal["sgd", "adamw", "muon"]) -> Factors:
        """The factors of `role` under `optimizer`, the disputed exponents resolved."""
        p, row, N, L = self.parameterization, TABLE[role], self._N, self._L
        decays, experts, ratios = row.weight_decay(1, 1, 0) != 0, EXPERTS.get(role, NO_EXPERTS), self._experts
        gamma0 = 1.0 if role is Role.SCALAR else p.gamma0  # the readout's bias is not divided by it
        if optimizer == "sgd":
            lr = row.lr_sgd(N, L, p.alpha) * experts.lr_sgd(*ratios) * gamma0**2
            # SGD's decay is coupled to the learning rate as well: lr * decay stays constant.
            return Factors(lr=lr, eps=1.0, weight_decay=1 / lr if decays else 0.0)
        if optimizer == "muon" and row.lr_muon:
            # lr * decay stays constant in N, as below.
            weight_decay = row.lr_muon(N, 1, p.alpha) ** -p.weight_decay_scaling / gamma0
            lr = row.lr_muon(N, L, p.alpha) * gamma0
            return Factors(lr=lr, eps=1.0, weight_decay=weight_decay if decays else 0.0)
        in_branch = role in BRANCH_ROLES
        lr = row.lr_adam(N, L, p.alpha) * experts.lr_adam(*ratios) * gamma0
        if in_branch and p.adam_depth_lr is not None:
            lr *= L ** (p.adam_depth_lr - (p.alpha - 1))
        eps_scales = p.eps_scaling == "table" or (p.eps_scaling == "branch" and in_branch)
        eps = (row.eps_adam(N, L, p.alpha) * experts.eps_adam(*ratios) if eps_scales else 1.0) / gamma0
        growth = row.weight_decay(N, L, p.alpha) / experts.lr_adam(*ratios)  # lr * decay stays constant
        weight_decay = growth**p.weight_decay_scaling / gamma0 if decays else 0.0
        return Factors(lr=lr, eps=eps, weight_decay=weight_decay)
