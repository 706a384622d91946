"""The tasks that `depthmup limit` trains networks on, and the limit of each."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from depthmup.data.errors import UserError
from depthmup.launch.config import StudyFile
from depthmup.models.config import Size
from depthmup.models.limit.drift import build_network_under_rules
from depthmup.models.limit.network import ActivationName, Training, extrapolate_depth
from depthmup.models.limit.rich import train_rich
from depthmup.models.optimizer_config import OptimizerConfig
from depthmup.models.parameterization_config import ParameterizationConfig
from depthmup.train.evaluate import read_held_out

SAMPLES, STEPS, PIXELS = 6, 8, 8  # inputs; steps; images are shrunk to PIXELS x PIXELS
SAME = 0.99  # images whose cosine is above it count as one: the kernel of two would be nearly singular
WIDTHS, DEPTHS = (32, 64, 128, 256, 512), (3, 4, 6, 8, 12, 24)  # of the finite networks
SOLVED_DEPTHS = (*DEPTHS, 48)  # of the infinitely wide ones: deeper ones make a surer limit
SITES = 12000  # of the Monte Carlo limit, twice
QUANTITIES = ("loss curve", "outputs", "feature kernel")


@dataclass(frozen=True)
class Task:
    """What the networks learn: inputs (P, D) of mean square 1, targets (P,) of +-1."""

    name: str
    inputs: Tensor
    targets: Tensor

    @property
    def kernel(self) -> np.ndarray:
        """X X^T / D."""
        found: np.ndarray = (self.inputs @ self.inputs.T / self.inputs.shape[1]).double().numpy()
        return found


# Of one parameterization and task, quantity -> depth, of which math.inf is one -> (2, entries): what infinitely wide
# networks do, from two independent halves of the Monte Carlo.
Limit = dict[str, dict[float, np.ndarray]]


@dataclass(frozen=True)
class Grid:
    """The trained networks of one parameterization on one task."""

    task: Task
    parameterization: str
    has_limit: bool
    lr: float
    seeds: int
    values: dict[str, dict[tuple[int, int], np.ndarray]]  # quantity -> (width, depth) -> (seeds, entries)
    diverged: list[tuple[int, int]]  # sizes at which a network did: no distance says anything of them


def normalize_inputs(inputs: Tensor) -> Tensor:
    return F.normalize(inputs.flatten(1).double()).float() * math.sqrt(inputs[0].numel())


def draw_task(inputs: int) -> Task:
    generator = torch.Generator().manual_seed(0)
    drawn = normalize_inputs(torch.randn((SAMPLES, inputs), generator=generator))
    return Task("Gaussian inputs", drawn, torch.tensor([1.0, -1.0] * (SAMPLES // 2)))


def load_task(file: StudyFile) -> Task:
    """The first SAMPLES different images that are held out; one half of the classes against the other. An image that is
    0 everywhere has no direction and does not count. Raises UserError where there are too few."""
    images, labels = read_held_out(file, 4 * SAMPLES, PIXELS)
    inputs, kept = normalize_inputs(images), list[int]()
    for index in range(len(inputs)):
        cosines = inputs[kept] @ inputs[index] / inputs.shape[1]
        if inputs[index].any() and (not len(kept) or float(cosines.max()) < SAME):
            kept.append(index)
    if len(kept) < SAMPLES:
        raise UserError(
            f"{file.data.root}: what is held out has fewer than {SAMPLES} different images among its first "
            f"{len(inputs)}, and repeated inputs make the kernel singular: use data with more of them"
        )
    kept = kept[:SAMPLES]
    return Task("images", inputs[kept], (labels[kept] >= file.model.num_classes / 2).float() * 2 - 1)


def flatten_quantities(outputs: np.ndarray, features: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """What is compared, as vectors: outputs (..., T + 1, P), features (..., P, P)."""
    lead = outputs.shape[:-2]
    loss = ((outputs - targets) ** 2).mean(axis=-1)[..., 1:] / 2
    values = loss, outputs[..., 1:, :].reshape(*lead, -1), features.reshape(*lead, -1)
    return dict(zip(QUANTITIES, values, strict=True))


def solve_limit(
    p: ParameterizationConfig, base: Size, activation: ActivationName, task: Task, optimizer: OptimizerConfig
) -> Limit:
    """By Monte Carlo at SOLVED_DEPTHS, twice, extrapolated to infinite depth."""
    targets, limit = task.targets.double().numpy(), Limit((quantity, {}) for quantity in QUANTITIES)
    for depth in SOLVED_DEPTHS:
        size = Size(width=base.width, depth=depth)
        network, unit = build_network_under_rules(p.resolve(), size, base, task.inputs.shape[1], activation)
        training = Training(task.kernel, targets, optimizer.lr * unit, STEPS, optimizer.momentum)
        runs = [train_rich(network, training, SITES, seed) for seed in (0, 1)]
        found = [flatten_quantities(run.outputs, run.forward[-1][-SAMPLES:, -SAMPLES:], targets) for run in runs]
        for quantity in QUANTITIES:
            limit[quantity][depth] = np.array([each[quantity] for each in found])
    for by_depth in limit.values():
        by_depth[math.inf] = extrapolate_depth(by_depth, 2)
    return limit
