"""What a model family states about itself: how to build it, and the role and init of each of its parameters."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic.dataclasses
import torch
from pydantic import AfterValidator, Field
from torch import nn

from depthmup.models.config_errors import STRICT, checked_model
from depthmup.models.errors import ModelError
from depthmup.models.parameterization import Role


@checked_model
@pydantic.dataclasses.dataclass(config=STRICT, frozen=True)
class Init:
    """A base model's init. `scale` is a standard deviation, a constant, or a gain on 1 / sqrt(fan)."""

    kind: Literal[
        "constant", "normal", "uniform", "normal_fan_in", "normal_fan_out", "normal_fan_avg",
        "uniform_fan_in", "uniform_fan_avg",
    ]  # fmt: skip
    scale: float

    def base_std(self, base_shape: tuple[int, ...]) -> float:
        """Standard deviation at base size for a weight of `base_shape` (out, in, *kernel)."""
        kernel = math.prod(base_shape[2:])
        match self.kind:
            case "constant":
                return 0.0
            case "normal" | "uniform":
                return self.scale
            case "normal_fan_in" | "uniform_fan_in":
                return self.scale / math.sqrt(base_shape[1] * kernel)
            case "normal_fan_out":
                return self.scale / math.sqrt(base_shape[0] * kernel)
            case "normal_fan_avg" | "uniform_fan_avg":  # Glorot's
                return self.scale / math.sqrt((base_shape[0] + base_shape[1]) / 2 * kernel)


def compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return pattern


RegularExpression = Annotated[str, AfterValidator(compiles)]  # that a whole name has to match
ZEROS, ONES = Init("constant", 0.0), Init("constant", 1.0)


@checked_model
@pydantic.dataclasses.dataclass(config=STRICT, frozen=True)
class ParameterRule:
    """Every parameter whose whole name matches `pattern` has this role and this base init."""

    pattern: RegularExpression
    role: Role
    init: Init
    decays: bool = True  # False: no weight decay, though its role has one, as timm's position embedding


@checked_model
@pydantic.dataclasses.dataclass(config=STRICT, frozen=True)
class Slot:
    """Modules of one kind whose output gets a multiplier, such as the ends of all attention branches.

    An export folds the multiplier into a slot's own weights or, when it has none, into those of `last`.
    """

    output: RegularExpression  # on module names
    last: str  # template over the match: the last module with weights before the slot
    share: Annotated[float, Field(gt=0, le=1)] = 1.0  # of `last`'s rows: 1/3 for the queries in timm's qkv

    def last_before(self, name: str) -> str:
        """The last module with weights before the slot's module `name`. Raises ModelError for a bad template."""
        match = re.fullmatch(self.output, name)
        assert match is not None
        try:
            return match.expand(self.last)
        except (re.error, IndexError) as error:
            raise ModelError(f"Slot.last {self.last!r} is no template over {self.output!r}: {error}") from None


@checked_model
@pydantic.dataclasses.dataclass(config=STRICT, frozen=True)
class Roles:
    """What the scaling rules have to know about a network: the role of each parameter, and where multipliers sit."""

    parameters: tuple[ParameterRule, ...]
    branches: tuple[Slot, ...]  # the ends of residual branches
    readout: str  # name of the module whose input gets the readout multiplier
    queries: tuple[Slot, ...] = ()  # modules whose output is the queries
    keys: RegularExpression | None = None  # modules whose output is the keys; only the coordinate check looks at them
    # Modules that put out the residual stream, around the ends of their branches. None: the coordinate check, which
    # alone needs them in a network of your own, finds them in a forward pass (models.stream).
    blocks: RegularExpression | None = None
    routers: RegularExpression | None = None  # modules whose output routes tokens to experts; for the check, too
    # Modules whose output is a distribution over what grows, times a constant of the base: they get a multiplier N.
    distributions: tuple[Slot, ...] = ()
    more_readouts: tuple[str, ...] = ()  # other such modules, whose outputs are added to the readout's

    @property
    def readouts(self) -> tuple[str, ...]:
        return self.readout, *self.more_readouts


@dataclass(frozen=True)
class Family:
    """One row per family: the scaling code knows families only through this."""

    name: str
    build: Callable[[Any], nn.Module]  # ModelConfig -> module, on the current default device
    roles: Callable[[Any], Roles]  # ModelConfig -> roles
    finds_roles: bool = False  # by looking at a network that others wrote: its sizes are checked, its buffers kept


class UnmatchedParameterError(ModelError):
    """A parameter that no rule, or more than one rule, gives a role."""


def match_rules(names: Iterable[str], rules: tuple[ParameterRule, ...]) -> dict[str, ParameterRule]:
    """The one rule of each parameter name. Raises UnmatchedParameterError for names with none or several."""
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    matched: dict[str, ParameterRule] = {}
    problems = []
    for name in names:
        hits = [rule for pattern, rule in compiled if pattern.fullmatch(name)]
        if len(hits) == 1:
            matched[name] = hits[0]
        elif not hits:
            problems.append(f"{name}: no rule gives it a role")
        else:
            problems.append(f"{name}: matched by {' and '.join(repr(rule.pattern) for rule in hits)}")
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise UnmatchedParameterError(
            "parameters without exactly one role; give each name one ParameterRule(pattern, role, init), "
            "see docs/your-model.md: " + "; ".join(shown)
        )
    return matched


def find_matching_modules(model: nn.Module, pattern: str) -> list[str]:
    """Names of the modules whose whole name matches `pattern`; raises ModelError for none."""
    names = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    if not names:
        raise ModelError(f"no module of {type(model).__name__} matches {pattern!r}")
    return names


def list_stated_blocks(model: nn.Module, roles: Roles, branches: Iterable[str]) -> tuple[str, ...]:
    """Names of the residual blocks, in the model's order; none where `roles` does not state them. Raises ModelError
    for a branch that ends outside of every block."""
    if roles.blocks is None:
        return ()
    blocks = find_matching_modules(model, roles.blocks)
    for name in branches:
        if not any(name.startswith(f"{block}.") for block in blocks):
            raise ModelError(f"Roles.blocks {roles.blocks!r}: the branch that ends in {name} is in none of them")
    return tuple(blocks)


def compute_base_shape(shape: torch.Size, role: Role, width_ratio: float) -> tuple[int, ...]:
    """The weight's shape in the model of base width: dimensions that grow with width are divided by N."""
    grows = {
        Role.INPUT: (True, False),
        Role.HIDDEN: (True, True),
        Role.BRANCH_HIDDEN: (True, True),
        Role.VECTOR: (True, False),
        Role.BRANCH_VECTOR: (True, False),
        Role.SCALAR: (False, False),
        Role.STREAM_VECTOR: (True, False),
        Role.BRANCH_SCALAR: (False, False),
        Role.READOUT: (False, True),
        Role.ROUTER: (False, True),
        Role.GATE: (False, True),
        Role.EXPERT_UP: (False, True, True),
        Role.EXPERT_DOWN: (False, True, True),
    }[role]
    head = tuple(round(size / width_ratio) if grow else size for size, grow in zip(shape, grows, strict=False))
    return head + tuple(shape[len(grows) :])
