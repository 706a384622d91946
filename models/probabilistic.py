"""The Probabilistic Transformer on the patches of an image: mean-field inference in a conditional random field, by one
block of tied weights that is iterated (Wu and Tu, 2311.15211; its scaling with width: 2604.25409).

    Z_i, N labels     x_i = N Q(Z_i), Q(Z_i) = softmax(scores_i)             `width` is N, and x has entries of order 1
    H_ci, patches     Q(H_ci = j) ~ exp(tau (U_c x_i) . (V_c x_j) / sqrt r)  in channel c patch j is the head of patch i
    G_i, N topics     y_i = N Q(G_i), Q(G_i) ~ exp(tau B x_i)                one variable of a patch's own
    scores_i          tau (S_i + sum_c (U_c' sum_j Q(H_ci = j) V_c x_j + V_c' sum_j Q(H_cj = i) U_c x_j) + B' y_i)
    readout           of the mean over patches of norm(scores)

S is the unary factor, an embedding of the patch and of its place. The ternary factor U_c' V_c is of rank N / channels,
B is the binary one. Every iteration has the same weights, so there is no residual branch and no factor of depth: the
iterations go to a fixed point, and so do the gradients.

In 2604.25409 Q has no factor and potentials have: tau S, tau N U' V, tau M B, with M topics. A factor N on Q is the
same: N Q(Z) is what U and V read, M Q(G) what B passes on, with M = N here. A channel's scores have temperature N / r,
as attention whose head dim grows has. What is left open there, and is decided here, is in docs/models.md.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from depthmup.models.config import ProbabilisticConfig
from depthmup.models.family import ONES, ZEROS, Family, Init, ParameterRule, Roles, Slot
from depthmup.models.parameterization import Role


class Factors(nn.Module):
    """The ternary and the binary factors, which all iterations share: U, V (channels * r, N) and B (N, N)."""

    def __init__(self, config: ProbabilisticConfig) -> None:
        super().__init__()
        self.channels, self.base_width, self.tau = config.channels, config.base_width, config.tau
        self.ternary_u = nn.Linear(config.width, config.width, bias=False)
        self.ternary_v = nn.Linear(config.width, config.width, bias=False)
        self.binary = nn.Linear(config.width, config.width, bias=False)

    def split(self, x: Tensor) -> Tensor:
        """(batch, patches, channels * r) -> (batch, channels, patches, r)."""
        return x.unflatten(-1, (self.channels, -1)).transpose(1, 2)


class Iteration(nn.Module):
    """One round of messages: (batch, patches, N) scores -> the same. It has no weights, but a place for everything that
    the rules multiply and the coordinate check looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.labels, self.topics, self.queries, self.keys = (nn.Identity() for _ in range(4))

    def forward(self, scores: Tensor, unary: Tensor, factors: Factors) -> Tensor:
        x = self.labels(factors.base_width * scores.softmax(-1))  # at the base N Q
        u, v = factors.split(factors.ternary_u(x)), factors.split(factors.ternary_v(x))
        heads = self.queries(u) @ self.keys(v).transpose(-2, -1) * (factors.tau * u.shape[-1] ** -0.5)
        itself = heads.new_ones(heads.shape[-2:]).tril().triu().bool()
        heads = heads.masked_fill(itself, float("-inf")).softmax(-1)  # (batch, channels, patches, patches)
        of_heads = (heads @ v).transpose(1, 2).flatten(2) @ factors.ternary_u.weight
        of_dependents = (heads.transpose(-2, -1) @ u).transpose(1, 2).flatten(2) @ factors.ternary_v.weight
        y = self.topics(factors.base_width * (factors.tau * factors.binary(x)).softmax(-1))
        of_topics = F.linear(y, factors.binary.weight.T)
        return factors.tau * (unary + of_heads + of_dependents + of_topics)


class ProbabilisticTransformer(nn.Module):
    """(batch, in_channels, image_size, image_size) images -> (batch, num_classes) logits."""

    def __init__(self, config: ProbabilisticConfig) -> None:
        super().__init__()
        self.unary = nn.Conv2d(config.in_channels, config.width, config.patch_size, config.patch_size)
        self.position = nn.Parameter(self.unary.weight.new_empty((1, config.num_patches, config.width)))
        self.factors = Factors(config)
        self.iterations = nn.ModuleList(Iteration() for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        unary = self.unary(images).flatten(2).transpose(1, 2) + self.position  # (batch, patches, N)
        scores = self.factors.tau * unary
        for iteration in self.iterations:
            scores = iteration(scores, unary, self.factors)
        return self.head(self.norm(scores).mean(1))


def roles(config: ProbabilisticConfig) -> Roles:
    """2604.25409's three groups, in the form used here: its output weights of variance 1/N^2 and rate eta/N are the
    readout's 1 and eta with the input multiplied by 1/N.

    | group  | parameter                          | shape           | initial values of the base |
    |--------|------------------------------------|-----------------|----------------------------|
    | input  | unary.weight                       | (N, c, p, p)    | normal, std fan_in^-1/2    |
    | input  | position                           | (1, patches, N) | normal, std 1              |
    | input  | unary.bias, norm.bias, norm.weight | (N,)            | 0, 0, 1                    |
    | hidden | factors' ternary_u, _v, binary     | (N, N)          | normal, 0.3 fan_in^-1/2    |
    | output | head.weight                        | (classes, N)    | normal, std fan_in^-1/2    |
    | output | head.bias                          | (classes,)      | 0                          |
    """
    fan_in = Init("normal_fan_in", 1.0)
    of_each = r"iterations\.\d+"
    return Roles(
        parameters=(
            ParameterRule(r"unary\.weight", Role.INPUT, fan_in),
            ParameterRule(r"position", Role.INPUT, Init("normal", 1.0), decays=False),
            ParameterRule(r"(unary|norm)\.bias", Role.VECTOR, ZEROS),
            ParameterRule(r"norm\.weight", Role.VECTOR, ONES),
            ParameterRule(r"factors\.(ternary_[uv]|binary)\.weight", Role.HIDDEN, Init("normal_fan_in", 0.3)),
            ParameterRule(r"head\.weight", Role.READOUT, fan_in),
            ParameterRule(r"head\.bias", Role.SCALAR, ZEROS),
        ),
        branches=(),
        readout="head",
        queries=(Slot(rf"{of_each}\.queries", r"\g<0>"),),
        keys=rf"{of_each}\.keys",
        blocks=of_each,
        distributions=(Slot(rf"{of_each}\.(labels|topics)", r"\g<0>"),),
    )


PROBABILISTIC = Family(name="probabilistic", build=ProbabilisticTransformer, roles=roles)
