"""Coordinate check: do activations and their updates keep their size when the model grows?

The model is trained for a few steps on one fixed batch at several widths, then at several depths, and the RMS of what
flows through it is measured: every position of the residual stream, every branch's output, attention logits, logits,
and the weights of each role; on demand what every layer inside a branch puts out, split into the part of its own
weights and the part that is passed on. Per quantity the log2-log2 slope of its RMS over size is compared with the slope
that the feature-learning limit demands (models.check_targets), which does not depend on the optimizer. The idea is that
of Tensor Programs V (2203.03466, appendix D.1), taken over depth as in CompleteP (2505.01618, figure 5).

A parameterization without a rule (`sp` over width, `mup` over depth) is held to the same limit, so that it fails.

The band. Exponents in the table are multiples of 1/2, so the smallest mistake shifts a slope by 1/2 and a slope within
`BAND` = 1/4 of its target is nearest to the right exponent; what is left below that is finite size. Each slope has a
standard error, from seeds. It is off when it is outside the band by more than two of them, ok when it is inside and two
of them are narrower than the band, and unclear otherwise, so that noise neither raises an alarm nor hides a fault.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from depthmup.models.build import ScaledModel, build
from depthmup.models.check_record import ONLY, Inside, Position, Values, list_branch_layers, observe, recording
from depthmup.models.check_targets import INSIDE, Span, Target, find_target, list_targets
from depthmup.models.config import AnyModelConfig, MixtureVitConfig, Size
from depthmup.models.errors import ModelError
from depthmup.models.optimizer import build_optimizer, parameter_groups
from depthmup.models.optimizer_config import OptimizerConfig
from depthmup.models.parameterization import Role
from depthmup.models.parameterization_config import ParameterizationConfig

Axis = Literal["width", "depth", "num_experts", "mlp_ratio"]
Verdict = Literal["ok", "off", "unclear"]
Value = TypeVar("Value")
BAND = 0.25  # half of the smallest difference between two exponents
AXES: tuple[Axis, ...] = ("width", "depth")
EXPERT_AXES: tuple[Axis, ...] = ("num_experts", "mlp_ratio")  # of a mixture of experts


@dataclass(frozen=True)
class Settings:
    """What a check runs: sizes as multiples of the base, steps of training, images. At least two seeds."""

    factors: tuple[int, ...] = (1, 2, 4, 8)
    steps: int = 8
    batch_size: int = 16
    num_seeds: int = 4
    inside: bool = False  # judge each layer inside branches, too


@dataclass(frozen=True)
class Line:
    """One judged slope: RMS of `quantity` at `factors` times the base, at step 0 the value, later the update."""

    axis: Axis
    quantity: str
    step: int
    factors: tuple[int, ...]
    rms: tuple[float, ...]  # geometric mean over seeds, at the position whose slope is furthest off
    slope: float  # not a number where a run diverged
    error: float  # standard error of the slope over seeds
    allowed: Span

    @property
    def deviation(self) -> float:
        """Distance of the slope from what is allowed: 0 inside, infinite for a slope that is not a number."""
        low, high = self.allowed
        return max(low - self.slope, self.slope - high, 0.0) if math.isfinite(self.slope) else math.inf

    @property
    def verdict(self) -> Verdict:
        if self.deviation == math.inf or self.deviation > BAND + 2 * self.error:
            return "off"
        return "ok" if self.deviation <= BAND and 2 * self.error <= BAND else "unclear"


Batch = tuple[Tensor, Tensor]  # inputs (batch, ...), labels (batch,)


def rms(tensor: Tensor) -> float:
    return float(tensor.float().square().mean().sqrt())


def measure_sizes(target: Target, at: dict[Position, Tensor]) -> dict[Position, float]:
    """RMS at each position, or the one RMS of matrices' spectral norms."""
    if target.spectral:
        return {ONLY: rms(torch.stack([torch.linalg.matrix_norm(matrix, ord=2) for matrix in at.values()]))}
    return {position: rms(tensor) for position, tensor in at.items()}


def subtract_bias(logits: Tensor, scaled: ScaledModel) -> Tensor:
    """Logits at step 0 less the readout's bias, which some networks draw: a constant, whatever the width."""
    biases = [getattr(scaled.network.get_submodule(name), "bias", None) for name in scaled.roles.readouts]
    bias = biases[0] if len(biases) == 1 else None  # how several are weighted in their sum is not known
    return logits - bias.detach() if isinstance(bias, Tensor) and bias.shape == logits.shape[-1:] else logits


def draw_fixed_batch(config: AnyModelConfig, settings: Settings, seed: int) -> Batch:
    """Images that a network can tell apart, a coarse pattern per class under noise, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    size, channels = config.image_size, config.in_channels
    labels = torch.randint(config.num_classes, (settings.batch_size,), generator=generator)
    patterns = torch.randn((config.num_classes, channels, 4, 4), generator=generator)
    noise = torch.randn((settings.batch_size, channels, size, size), generator=generator)
    return F.interpolate(patterns[labels], size=(size, size)) + 0.5 * noise, labels


Measured = dict[tuple[str, int], dict[Position, float]]  # (quantity, step) -> RMS at each position


def measure(
    scaled: ScaledModel,
    batch: Batch,
    optimizer_config: OptimizerConfig,
    steps: int,
    targets: dict[str, Target],
) -> Measured:
    """Trains `scaled`: RMS of every quantity at step 0, and of its change after 1 and after `steps` steps.

    The loss sees the logits minus those of step 0. These shrink with width (see TARGETS), and with them the first
    gradients would change from width to width for a reason that has nothing to do with the rules.
    """
    groups = parameter_groups(scaled.network, scaled.rules, scaled.scale, optimizer_config)
    optimizer = build_optimizer(groups, optimizer_config)
    inputs, labels = batch
    by_muon = {id(p) for group in groups if group["algorithm"] == "muon" for p in group["params"]}
    names = {name for name, parameter in scaled.network.named_parameters() if id(parameter) in by_muon}
    measured: Measured = {}
    initial: Values = {}
    layers = Inside(scaled, list_branch_layers(scaled, inputs) if targets.keys() >= INSIDE.keys() else [])
    with recording(scaled, inputs) as values, closing(layers):
        for step in range(steps + 1):
            logits = scaled.network(inputs)
            if step == 0:
                initial = observe(scaled, values, names)
                logits_at = {ONLY: subtract_bias(initial["logits"][ONLY], scaled)}
                measured |= {
                    (q, 0): measure_sizes(targets[q], at) for q, at in {**initial, "logits": logits_at}.items()
                }
            elif step in (1, steps):
                now = observe(scaled, values, names)
                changes = {q: {i: at[i] - initial[q][i] for i in at} for q, at in now.items()} | layers.changes()
                measured |= {(q, step): measure_sizes(find_target(q, targets), at) for q, at in changes.items()}
            optimizer.zero_grad()
            F.cross_entropy(logits - initial["logits"][ONLY], labels).backward()
            optimizer.step()
    return measured


def select_positions(values: Sequence[Value], count: int, quantity: str) -> list[Value]:
    """`count` of `values`, at the same relative depth in a deeper network: of each run of equal length, as far as
    `count` divides them, the last for the stream, which is what blocks put out, and the first for what follows from a
    block's input."""
    ends = [number * len(values) // count for number in range(count + 1)]
    return [values[end - 1] for end in ends[1:]] if quantity == "stream" else [values[start] for start in ends[:-1]]


def align(values: dict[Position, float], base: dict[Position, float], quantity: str) -> list[float]:
    """Of a larger network's `values` those that stand where the base's do: container by container, and of the kinds
    of block that take turns in one the nearest of the same kind. What acts on the stream between two blocks, at every
    depth once, parts a container in two."""
    parted = {(each.group, each.before) for each in values} == {(each.group, each.before) for each in base}

    def section(each: Position) -> tuple[str, int]:
        return each.group, each.before if parted else 0

    places = dict[tuple[str, int], list[Position]]()
    for each in values:
        places.setdefault(section(each), []).append(each)
    counts = Counter(map(section, base))
    wanted = {at: iter(select_positions(range(len(places[at])), count, quantity)) for at, count in counts.items()}
    kinds = [Counter((section(each), each.kind) for each in network) for network in (values, base)]
    found = []
    for each in base:
        at = section(each)
        target, here = next(wanted[at]), list(enumerate(places[at]))
        takes_turns = kinds[0][at, each.kind] * counts[at] == kinds[1][at, each.kind] * len(here)
        kept = quantity != "stream" or takes_turns  # the stream's last place stays, of whatever kind its block is
        alike = [(number, place) for number, place in here if kept and place.kind == each.kind] or here
        found.append(values[min(alike, key=lambda at: abs(at[0] - target))[1]])
    return found


def judge(
    axis: Axis, runs: Sequence[Sequence[Measured]], settings: Settings, targets: dict[str, Target], alpha: float
) -> list[Line]:
    """`runs[size][seed]` -> one line per quantity and step that has a target."""
    lines = []
    log_factors = np.log2(settings.factors)
    centred = log_factors - log_factors.mean()
    for (quantity, step), base_values in runs[0][0].items():
        target = find_target(quantity, targets)
        formula = getattr(target, f"update_{axis}" if step else axis)
        values = np.array([[align(run[quantity, step], base_values, quantity) for run in size] for size in runs])
        values = values[:, :, values.any(axis=(0, 1))]  # without positions where nothing flows: a branch of zero
        if formula is None or not values.size:
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            log_rms = np.log2(values)  # (sizes, seeds, positions)
            slopes = np.tensordot(centred / (centred @ centred), log_rms, axes=1)  # least squares: (seeds, positions)
            error = math.sqrt(slopes.var(axis=0, ddof=1).mean() / len(slopes))  # pooled over positions
        at_each_position = [
            Line(axis, quantity, step, settings.factors, tuple(2**curve), float(slope), error, formula(alpha))
            for curve, slope in zip(log_rms.mean(axis=1).T, slopes.mean(axis=0), strict=True)
        ]
        lines.append(max(at_each_position, key=lambda line: line.deviation))
    return lines


def refuse_unmoved(measured: Measured, lines: list[Line], steps: int) -> None:
    """Raises ModelError where the weights of a role never moved, so that a check of them would pass whatever their rule
    is: behind a readout that starts at zero the first step moves nothing."""
    roles = {quantity for quantity, _ in measured if quantity.removeprefix("muon ") in {role.value for role in Role}}
    if still := sorted(roles - {line.quantity for line in lines}):
        raise ModelError(
            f"in {steps} step{'s' if steps > 1 else ''} of the check no weight moves whose role is "
            f"{', '.join(still)}, as where the readout or the ends of branches start at zero: let it take more steps"
        )


def check_sizes(
    build_at: Callable[[Size, int], ScaledModel],
    batch: Callable[[int], Batch],
    base: Size,
    optimizer: OptimizerConfig,
    settings: Settings,
    axes: tuple[Axis, ...] = AXES,
    head_dim_grows: bool = False,
    progress: Callable[[str], None] = lambda size: None,
) -> list[Line]:
    """Trains networks at multiples of the base width, then of the base depth, and judges every slope.

    build_at: (size, seed) -> a network of that width and depth, scaled from `base` by `models.apply` or built here.
    batch: seed -> the one batch that it is trained on. `progress` is told each size before it runs. Raises ModelError
    where the weights of a role never move in so few steps.
    """
    targets = list_targets(optimizer, head_dim_grows) | (INSIDE if settings.inside else {})
    alpha = build_at(base, 0).scale.parameterization.alpha
    lines: list[Line] = []
    for axis in axes:
        runs: list[list[Measured]] = []
        for size in [replace(base, **{axis: getattr(base, axis) * factor}) for factor in settings.factors]:
            progress(f"{axis} {getattr(size, axis)}")
            networks = ((seed, build_at(size, seed)) for seed in range(settings.num_seeds))
            runs.append([measure(scaled, batch(seed), optimizer, settings.steps, targets) for seed, scaled in networks])
        lines += judge(axis, runs, settings, targets, alpha)
        refuse_unmoved(runs[0][0], lines, settings.steps)
    return lines


def check(
    config: AnyModelConfig,
    parameterization: ParameterizationConfig,
    optimizer: OptimizerConfig,
    settings: Settings,
    axes: tuple[Axis, ...] = AXES,
    progress: Callable[[str], None] = lambda size: None,
) -> list[Line]:
    """`check_sizes` of a model of the families here. Raises ModelError when a size does not fit it."""

    keys = AXES + (EXPERT_AXES if isinstance(config, MixtureVitConfig) else ())

    def make_config_at(size: Size) -> AnyModelConfig:
        return replace(config, **{key: getattr(size, key) for key in keys})

    def build_at(size: Size, seed: int) -> ScaledModel:
        return build(make_config_at(size), parameterization, seed)

    for axis, factor in product(axes, settings.factors):  # before the first is trained
        value = factor * getattr(config.base_size, axis)
        try:
            make_config_at(replace(config.base_size, **{axis: value}))
        except ModelError as error:
            raise ModelError(
                f"the check has a network of {axis} {value}, {factor} times the base's: {error}. State another "
                f"model.base_{axis}, other factors, or check the other axes alone"
            ) from None
    return check_sizes(
        build_at,
        lambda seed: draw_fixed_batch(config, settings, seed),
        config.base_size,
        optimizer,
        settings,
        axes,
        head_dim_grows=config.head_dim_grows,
        progress=progress,
    )
