"""One optimizer step of one network."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from depthmup.train.batch_norm import BatchStatistics
from depthmup.train.engines.base import Engine
from depthmup.train.stochastic_depth import Draws


@dataclass(frozen=True)
class StepResult:
    """Of this process's share, still on the device."""

    loss: Tensor  # mean, ()
    grad_norm: Tensor | None  # of all processes, before clipping; None without clipping
    logits: Tensor  # of the last micro-batch, (images, classes)


def take_step(
    engine: Engine,
    images: Tensor,
    targets: Tensor,
    *,
    micro_batches: int = 1,
    statistics: BatchStatistics | None = None,
    draws: Draws | None = None,
    uniform: Tensor | None = None,
    autocast_dtype: torch.dtype | None = None,
    label_smoothing: float = 0.0,
    clip_norm: float | None = None,
) -> StepResult:
    """One step on this process's share of a global batch; never waits for the device.

    images: (batch, channels, size, size) float; targets: (batch,) classes or (batch, classes) probabilities;
    statistics: BatchNorm's, where they are installed; uniform: (branches, batch) numbers of this step that `draws` is
    to show to the hooks of stochastic depth, where there are any.
    """
    engine.zero_grad()
    total = torch.zeros((), device=images.device)
    parts = zip(images.chunk(micro_batches), targets.chunk(micro_batches), strict=True)
    for number, (micro_images, micro_targets) in enumerate(parts, start=1):
        engine.start_micro_batch(last=number == micro_batches)
        if draws and uniform is not None:
            draws.now = uniform.chunk(micro_batches, dim=1)[number - 1]
        with autocast(images.device, autocast_dtype):
            logits = engine.module(micro_images)  # (micro batch, classes)
            loss = F.cross_entropy(logits.float(), micro_targets, label_smoothing=label_smoothing) / micro_batches
        engine.backward(loss)
        if statistics:
            statistics.move(number - 1, micro_batches)
        total += loss.detach()
    norm = engine.step(clip_norm)
    return StepResult(total, norm, logits.detach())


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    return torch.autocast(device.type, dtype) if dtype else nullcontext()
