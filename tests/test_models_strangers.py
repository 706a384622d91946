"""What strangers' networks do that the rules would scale once more, or lose, is refused by name, or has its rule."""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from depthmup import models
from depthmup.models import OptimizerConfig, ParameterizationConfig, Role, Size
from depthmup.models.coordinate_check import Settings, check_sizes
from depthmup.models.discovery.find import find_roles
from depthmup.models.errors import ModelError
from depthmup.models.family import match_rules

TOKENS = torch.zeros(2, 5, 12)
BASE = Size(width=16, depth=2)


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


Forward = Callable[["Block", Tensor], Tensor]


class Block(nn.Module):
    """A block of width features whose forward pass is a function of it and the stream."""

    def __init__(self, width: int, depth: int, number: int, run: Forward) -> None:
        super().__init__()
        self.width, self.depth, self.number, self.run = width, depth, number, run
        self.mlp, self.end = MLP(width), nn.Identity()

    def norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:])

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Net(nn.Module):
    """(batch, tokens, 12) -> (batch, 10). `add` puts parameters and buffers of its own into each block."""

    def __init__(self, width: int, depth: int, run: Forward, add: Callable[[Block], object] | None = None) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(12, width), nn.Linear(width, 10)
        self.blocks = nn.ModuleList(Block(width, depth, number, run) for number in range(depth))
        for block in self.blocks:
            if add:
                add(block)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def roles_of(run: Forward, add: Callable[[Block], object] | None = None) -> dict[str, Role]:
    found = find_roles(lambda width, depth: Net(width, depth, run, add), TOKENS, BASE.width, BASE.depth).roles
    names = [name for name, _ in Net(32, 5, run, add).named_parameters()]
    return {name: rule.role for name, rule in match_rules(names, found.parameters).items()}


def plain(block: Block, x: Tensor) -> Tensor:
    return x + block.mlp(block.norm(x))


def parameter(shape: Callable[[int], tuple[int, ...]], value: Callable[[tuple[int, ...]], Tensor] = torch.randn):
    """Gives a block a parameter `extra` of a shape that depends on the width."""

    def add(block: Block) -> None:
        block.extra = nn.Parameter(value(shape(block.width)))

    return add


def scale_of_embedding(block: Block, x: Tensor) -> Tensor:
    return plain(block, x * math.sqrt(block.width) if block.number == 0 else x)


def equalised(block: Block, x: Tensor) -> Tensor:
    return x + block.mlp(F.linear(block.norm(x), block.extra * block.width**-0.5))


def stochastic(block: Block, x: Tensor) -> Tensor:
    keep = 1 - 0.2 * block.number / (block.depth - 1)
    return x + block.mlp(block.norm(x)) / keep * x.new_empty(len(x), 1, 1).bernoulli_(keep)


def memory(block: Block, x: Tensor) -> Tensor:
    return x + block.mlp((block.norm(x) @ block.extra.T).softmax(-1) @ block.extra)


def by_hand(block: Block, x: Tensor) -> Tensor:
    return x + block.mlp(x * torch.rsqrt(x.square().sum(-1, keepdim=True) / block.width + 1e-6))


def two_streams(block: Block, x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    a = a + block.end(block.mlp(torch.cat([b, b], -1)).chunk(2, dim=-1)[0])
    b = b + block.extra(torch.relu(a))
    return torch.cat([a, b], dim=-1)


square = parameter(lambda width: (width, width), lambda shape: torch.randn(shape) * shape[0] ** -0.5)
BAD: dict[str, tuple[Forward, Callable[[Block], object] | None, str]] = {
    "an embedding times the root of the width": (
        scale_of_embedding,
        None,
        r"blocks\.0 multiplies by a number that depends on the width, 4 here and 5\.66 at twice the width",
    ),
    "a weight times the root of its fan": (
        equalised,
        square,
        r"blocks\.0 multiplies by .* width, 0\.25 here and 0\.177",
    ),
    "branches divided by the root of the depth": (
        lambda block, x: x + block.mlp(block.norm(x)) * block.depth**-0.5,
        None,
        r"blocks\.0 multiplies by a number that depends on the depth, 0\.707 here and 0\.5 at twice the depth",
    ),
    "branches added with a factor of the depth": (
        lambda block, x: torch.add(x, block.mlp(block.norm(x)), alpha=block.depth**-0.5),
        None,
        "number that depends on the depth",
    ),
    "a gate by a sum over the width": (
        lambda block, x: x + block.mlp(x * torch.sigmoid((block.norm(x) * x).sum(-1, keepdim=True))),
        None,
        r"blocks\.0 applies sum over the width, .*: take the mean",
    ),
    "features of length one": (
        lambda block, x: x + block.mlp(F.normalize(x, dim=-1)),
        None,
        r"blocks\.0 applies normalize over the width, .* multiply by a root of the width",
    ),
    "features over their length": (
        lambda block, x: x + block.mlp(x / x.norm(dim=-1, keepdim=True)),
        None,
        "applies norm over the width",
    ),
    "a softmax over the width": (
        lambda block, x: x + block.mlp(block.norm(x).softmax(-1)),
        None,
        "applies softmax over the width",
    ),
    "a matrix that is read from and written with": (
        memory,
        parameter(lambda width: (8, width)),
        r"blocks\.0\.extra reads the width in one place, and puts it out in another",
    ),
    "a stream that each block shrinks": (
        lambda block, x: plain(block, x) * 0.5**0.5,
        None,
        r"the stream itself goes through mul in every block, as in blocks\.0, .*: write x \+ branch\(x\)",
    ),
    "a second branch that is no sum": (
        lambda block, x: torch.lerp(plain(block, x), torch.tanh(x), 0.5),
        None,
        r"the stream itself goes through lerp in every block",
    ),
    "two streams that add to each other": (
        two_streams,
        lambda block: setattr(block, "extra", nn.Linear(block.width // 2, block.width // 2)),
        r"a part of a branch in blocks\.0 is read outside of it",
    ),
    "an identity": (
        lambda block, x: x + block.mlp(x) @ block.extra,
        parameter(lambda width: (width, width), lambda shape: torch.eye(shape[0])),
        r"blocks\.0\.extra starts from the same numbers whatever the seed, .*: make it a buffer",
    ),
    "a gain about one": (
        lambda block, x: x + block.mlp(x) * block.extra,
        parameter(lambda width: (width,), lambda shape: 1 + 0.02 * torch.randn(shape)),
        r"blocks\.\d\.extra starts at (1|0\.99\d|1\.0\d*) on average, with a deviation of 0\.0\d+, .*: start it there",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_the_rules_would_scale_twice_or_lose_is_refused_by_name(case: str) -> None:
    run, add, words = BAD[case]
    with pytest.raises(ModelError, match=words):
        roles_of(run, add)


RIGHT: dict[str, Forward] = {
    "a constant factor": lambda block, x: torch.add(x, block.mlp(block.norm(x)), alpha=0.5) * 1,
    "rates of stochastic depth": stochastic,
    "a root mean square by hand": by_hand,
    "a root mean square by its sum": lambda block, x: (
        x + block.mlp(x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) * block.width**0.5)
    ),
    "a root mean square by its length": lambda block, x: x + block.mlp(F.normalize(x, dim=-1) * block.width**0.5),
    "blocks left out at random": lambda block, x: x if block.training and random.random() < 0.5 else plain(block, x),
    "blocks left out by torch": lambda block, x: x if block.training and torch.rand(1) < 0.5 else plain(block, x),
    "a sum of some tokens": lambda block, x: torch.cat([x[:, :1], x[:, 1:] + block.mlp(block.norm(x[:, 1:]))], 1),
}  # fmt: skip


@pytest.mark.parametrize("case", RIGHT)
def test_what_looks_like_it_and_is_right_is_found(case: str) -> None:
    roles = roles_of(RIGHT[case])
    assert roles["blocks.4.mlp.up.weight"] is roles["blocks.0.mlp.down.weight"] is Role.BRANCH_HIDDEN


def test_a_parameter_that_is_changed_before_a_product_has_the_role_of_what_the_product_sums_over() -> None:
    """(width, 8), whose last dimension does not grow."""

    def run(block: Block, x: Tensor) -> Tensor:
        return x + block.mlp(block.norm(x) * torch.sigmoid(x @ (block.extra * 2.0)).mean(-1, keepdim=True))

    assert roles_of(run, parameter(lambda width: (width, 8)))["blocks.4.extra"] is Role.ROUTER


def test_a_matrix_for_each_of_a_growing_number_of_heads_is_a_vector() -> None:
    def run(block: Block, x: Tensor) -> Tensor:
        heads = block.norm(x).unflatten(-1, (-1, 8)).transpose(1, 2)
        return x + block.mlp((heads @ block.extra).transpose(1, 2).flatten(2))

    assert roles_of(run, parameter(lambda width: (width // 8, 8, 8)))["blocks.4.extra"] is Role.BRANCH_VECTOR


def test_a_matrix_that_the_stream_goes_through_in_every_block_is_warned_of_by_name() -> None:
    with pytest.warns(
        UserWarning, match=r"blocks\.0\.extra multiplies the stream itself in every block, .* no rule of depth"
    ):
        roles = roles_of(lambda block, x: torch.relu(F.linear(plain(block, x), block.extra)), square)
    assert roles["blocks.4.extra"] is Role.HIDDEN


class PostNorm(nn.Module):
    """torch's own encoder, which norms the stream itself after each branch."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, width // 8, 2 * width, dropout=0.0, batch_first=True)
        self.embed, self.head = nn.Linear(12, width), nn.Linear(width, 10)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


def check_post_norm(role: Role) -> list[str]:
    """What is off over depth, the gains and biases of the stream's norms having `role`."""
    roles = find_roles(PostNorm, TOKENS, 16, 2).roles
    rules = (replace(rule, role=role) if rule.role is Role.STREAM_VECTOR else rule for rule in roles.parameters)
    roles = replace(roles, parameters=tuple(rules))

    def build_at(size: Size, seed: int) -> models.ScaledModel:
        completep, network = ParameterizationConfig(name="completep", beta=1 / 4), PostNorm(size.width, size.depth)
        return models.apply(completep, network, size=size, base=BASE, roles=roles, seed=seed)

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((8, 5, 12), generator=generator), torch.arange(8) % 10

    lines = check_sizes(build_at, batch, BASE, OptimizerConfig(name="adamw", lr=1e-3), Settings((1, 4), 2), ("depth",))
    return sorted({line.quantity for line in lines if line.verdict != "ok"})


def test_norms_of_the_stream_itself_in_every_block_take_a_rate_over_the_depth() -> None:
    found = find_roles(PostNorm, TOKENS, 16, 2).roles
    rules = match_rules([name for name, _ in PostNorm(32, 5).named_parameters()], found.parameters)
    of_stream = {f"encoder.layers.{i}.norm{j}.{what}" for i in range(5) for j in (1, 2) for what in ("weight", "bias")}
    assert {name for name, rule in rules.items() if rule.role is Role.STREAM_VECTOR} == of_stream
    assert check_post_norm(Role.STREAM_VECTOR) == []
    assert "stream" in check_post_norm(Role.VECTOR)


class Attention(nn.Module):
    """Two heads, whose size grows with the width; logits are divided by what `divisor` gives."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.kind, root = kind, (width // 2) ** 0.5
        if kind == "buffer":
            self.register_buffer("divisor", torch.sqrt(torch.tensor(root**2)))
        elif kind == "the whole of a buffer":
            self.register_buffer("divisor", torch.tensor(root**2))
        elif kind == "tensor":
            self.divisor = torch.FloatTensor([root])
        elif kind == "parameter":
            self.divisor = nn.Parameter(torch.tensor(root))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        divisor = torch.sqrt(torch.tensor(float(k.shape[-1]))) if self.kind == "in the pass" else self.divisor
        return ((q @ k.mT / divisor).softmax(-1) @ v).transpose(1, 2).flatten(2)


def roles_of_attention(kind: str) -> dict[str, Role]:
    def add(block: Block) -> None:
        block.mlp = Attention(block.width, kind)

    return roles_of(plain, add)


@pytest.mark.parametrize("kind", ["buffer", "tensor", "in the pass"])
def test_a_constant_tensor_by_which_attention_divides_is_evaluated(kind: str) -> None:
    assert roles_of_attention(kind)["blocks.4.mlp.q.weight"] is Role.BRANCH_HIDDEN


@pytest.mark.parametrize(
    ("kind", "by"), [("the whole of a buffer", r"0\.125 and 0\.0625"), ("parameter", "a number that is not known")]
)
def test_another_constant_and_a_learned_one_are_refused_where_the_head_dim_grows(kind: str, by: str) -> None:
    with pytest.raises(ModelError, match=rf"head dim grows with width \(8 to 16\) .* are multiplied by {by}"):
        roles_of_attention(kind)


def test_a_side_that_grows_beyond_the_sizes_that_were_looked_at_alone_is_refused_by_name() -> None:
    """As squeeze-excitation with a least number of channels."""

    def build(width: int, depth: int) -> nn.Module:
        net = Net(width, depth, plain)
        for block in net.blocks:
            block.mlp.up, block.mlp.down = nn.Linear(width, max(8, width // 8)), nn.Linear(max(8, width // 8), width)
        return net

    models.build_scaled(build, size=Size(width=64, depth=4), base=BASE, inputs=TOKENS)
    with pytest.raises(ModelError, match=r"up\.weight is of shape \(16, 128\) at 8 times .* \(8, 128\) follows"):
        models.build_scaled(build, size=Size(width=128, depth=4), base=BASE, inputs=TOKENS)
