"""The tasks that `depthmup limit` trains networks on, and the limit of each."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from depthmup.data.batch import to_float
from depthmup.data.errors import UserError
from depthmup.data.loader import evaluation_batches
from depthmup.launch.config import StudyFile
from depthmup.models.config import OptimizerConfig, ParameterizationConfig, Size
from depthmup.models.limit.drift import network_under_rules
from depthmup.models.limit.network import Training, to_infinite_depth
from depthmup.models.limit.rich import train_rich
from depthmup.train.loop import open_data

SAMPLES, STEPS, PIXELS = 6, 8, 8  # inputs; steps; images are shrunk to PIXELS x PIXELS


WIDTHS, DEPTHS = (32, 64, 128, 256), (3, 6, 12, 24)  # of the finite networks


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


@dataclass(frozen=True)
class Limit:
    """Of one parameterization and task, by quantity and depth, of which math.inf is one: what the infinitely wide
    network does, and the relative error of the Monte Carlo, from its two halves."""

    values: dict[str, dict[float, np.ndarray]]
    error: dict[str, dict[float, float]]


def normalized(inputs: Tensor) -> Tensor:
    return F.normalize(inputs.flatten(1).double()).float() * math.sqrt(inputs[0].numel())


def gaussian_task(inputs: int) -> Task:
    generator = torch.Generator().manual_seed(0)
    drawn = normalized(torch.randn((SAMPLES, inputs), generator=generator))
    return Task("Gaussian inputs", drawn, torch.tensor([1.0, -1.0] * (SAMPLES // 2)))


def image_task(file: StudyFile) -> Task:
    """The first SAMPLES different images of the study's held-out split; one half of the classes against the other.
    Raises UserError where there are too few."""
    data, split = file.data, "minival" if file.data.minival else "val"
    batches = evaluation_batches(data, open_data(file), split, 4 * SAMPLES, PIXELS, file.model.in_channels)
    images, labels = to_float(next(iter(batches)), data, "cpu")
    inputs, kept = normalized(images), list[int]()
    for index in range(len(inputs)):
        cosines = inputs[kept] @ inputs[index] / inputs.shape[1]
        if not len(kept) or float(cosines.max()) < 0.99:
            kept.append(index)
    if len(kept) < SAMPLES:
        raise UserError(f"{data.root}: {split} has fewer than {SAMPLES} different images among its first {len(inputs)}")
    kept = kept[:SAMPLES]
    return Task("images", inputs[kept], (labels[kept] >= file.model.num_classes / 2).float() * 2 - 1)


def quantities(outputs: np.ndarray, features: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """What is compared, as vectors: outputs (..., T + 1, P), features (..., P, P)."""
    lead = outputs.shape[:-2]
    loss = ((outputs - targets) ** 2).mean(axis=-1)[..., 1:] / 2
    values = loss, outputs[..., 1:, :].reshape(*lead, -1), features.reshape(*lead, -1)
    return dict(zip(QUANTITIES, values, strict=True))


def solve(p: ParameterizationConfig, base: Size, task: Task, optimizer: OptimizerConfig) -> Limit:
    """By Monte Carlo at DEPTHS, twice, extrapolated to infinite depth."""
    targets, found = task.targets.double().numpy(), dict[int, list[dict[str, np.ndarray]]]()
    for depth in DEPTHS:
        size = Size(width=base.width, depth=depth)
        network, unit = network_under_rules(p.resolve(), size, base, task.inputs.shape[1])
        training = Training(task.kernel, targets, optimizer.lr * unit, STEPS, optimizer.momentum)
        runs = [train_rich(network, training, SITES, seed) for seed in (0, 1)]
        found[depth] = [quantities(run.outputs, run.forward[-1][-SAMPLES:, -SAMPLES:], targets) for run in runs]
    limit = Limit({}, {})
    for quantity in QUANTITIES:
        both: list[dict[float, np.ndarray]] = [
            {depth: runs[seed][quantity] for depth, runs in found.items()} for seed in (0, 1)
        ]
        for each in both:
            each[math.inf] = to_infinite_depth(each, 2)
        mean = {depth: (both[0][depth] + both[1][depth]) / 2 for depth in both[0]}
        limit.values[quantity] = mean
        limit.error[quantity] = {
            depth: float(np.linalg.norm(both[0][depth] - both[1][depth]) / 2 / np.linalg.norm(mean[depth]))
            for depth in mean
        }
    return limit
