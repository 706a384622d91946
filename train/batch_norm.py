"""BatchNorm over a stated number of images, however a global batch is spread over processes and micro-batches.

The n = global_batch_size / train.batch_norm_images statistics of a step are taken over images whose place in the global
batch is the same modulo n. A process has the places of one remainder modulo the number W of processes, so that each
group of images lies in W / gcd(n, W) of them: in a single one where W divides n. Running statistics move once a step,
by the mean over all groups. Recomputing a forward pass changes nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from depthmup.data.errors import UserError
from depthmup.train.config import RunConfig


@dataclass(frozen=True)
class Grouping:
    """How the groups of images of one statistic lie in a layout of processes and micro-batches."""

    num_groups: int  # in a global batch
    images: int  # of one group in each of the processes that share it
    processes: int  # that share a group

    def order(self, places: np.ndarray) -> np.ndarray:
        """The order in which the images at `places` of the global batch lie group by group, int64. Processes that share
        groups have them in the same order."""
        return np.lexsort((places, places % self.num_groups))


def choose_grouping(config: RunConfig, world_size: int, micro_batches: int) -> Grouping:
    """Raises UserError when a process would need more images for a statistic than it has at once."""
    global_batch_size = config.train.global_batch_size
    images = config.train.batch_norm_images or global_batch_size
    num_groups = global_batch_size // images
    processes = world_size // math.gcd(num_groups, world_size)
    each, at_once = images // processes, global_batch_size // world_size // micro_batches
    if at_once % each:
        raise UserError(
            f"BatchNorm takes each statistic over {images} images (train.batch_norm_images; null: the whole global "
            f"batch), for which each of {world_size} process(es) needs {each} at once and has {at_once} "
            f"(parallel.micro_batch_size): use parallel.micro_batch_size={each}, more processes, or, as another run, "
            f"train.batch_norm_images={at_once}"
        )
    return Grouping(num_groups, each, processes)


def find_process_group(shared: Grouping) -> Any:
    """The group of processes that this one shares its statistics with; None where it shares none."""
    if shared.processes == 1:
        return None
    world_size = dist.get_world_size()
    step = world_size // shared.processes
    groups = [dist.new_group(list(range(first, world_size, step))) for first in range(step)]  # each process makes all
    return groups[dist.get_rank() % step]


class SharedBatchNorm(torch.autograd.Function):
    """BatchNorm of (images, channels, height, width) with statistics over the images of several processes.

    Returns also the mean and the unbiased variance, (channels,) each. Raises what torch.distributed raises.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        mine = torch.stack(torch.var_mean(x.to(weight.dtype), (0, 2, 3), correction=0))
        everybody = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everybody, mine, group=group)
        variances, means = torch.stack(everybody).unbind(1)
        mean, variance = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        count = x.numel() // x.shape[1] * len(everybody)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.group, ctx.count = eps, group, count
        unbiased = variance * (count / (count - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, unbiased

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, variance = ctx.saved_tensors
        gradient, scale = gradients[0].to(weight.dtype), (variance + ctx.eps).rsqrt()
        normal = (x.to(weight.dtype) - broadcast_channels(mean)) * broadcast_channels(scale)
        to_bias, to_weight = gradient.sum((0, 2, 3)), (gradient * normal).sum((0, 2, 3))
        sums = torch.stack([to_bias, to_weight])
        dist.all_reduce(sums, group=ctx.group)
        through_statistics = (broadcast_channels(sums[0]) + normal * broadcast_channels(sums[1])) / ctx.count
        to_x = broadcast_channels(weight * scale) * (gradient - through_statistics)
        return to_x.to(x.dtype), to_weight, to_bias, None, None


def broadcast_channels(values: Tensor) -> Tensor:
    """(channels,) -> a shape that broadcasts over (images, channels, height, width)."""
    return values[None, :, None, None]


def make_grouped_forward(module: Any, images: int | None, group: Any) -> Callable[[Tensor], Tensor]:
    """The forward pass of a BatchNorm2d, or timm's BatchNormAct2d, with a statistic for each `images` images in a row
    (None: for all that it is given).

    In training it leaves the mean over the groups' statistics in the buffers batch_mean and batch_variance.
    """

    def forward(x: Tensor) -> Tensor:  # (images of all groups, channels, height, width)
        if not module.training:
            x = F.batch_norm(
                x, module.running_mean, module.running_var, module.weight, module.bias, False, 0.0, module.eps
            )
        else:
            x = normalise(x)
        return module.act(module.drop(x)) if hasattr(module, "act") else x

    def normalise(x: Tensor) -> Tensor:
        """A group's channels as channels of their own: then one call normalises all groups."""
        groups, weight, bias = len(x) // (images or len(x)), module.weight, module.bias
        mean, variance = module.batch_mean, module.batch_variance
        if groups > 1:
            x = x.unflatten(0, (groups, images)).transpose(0, 1).flatten(1, 2)
            weight, bias = weight.repeat(groups), bias.repeat(groups)
            mean, variance = (x.new_zeros(x.shape[1], dtype=mean.dtype) for _ in range(2))
        if group is None:  # torch moves what it is given by `momentum` towards the batch's: here all the way
            x = F.batch_norm(x, mean, variance, weight, bias, True, 1.0, module.eps)
        else:
            x, mean, variance = SharedBatchNorm.apply(x, weight, bias, module.eps, group)
        if mean is not module.batch_mean:
            module.batch_mean.copy_(mean.unflatten(0, (groups, -1)).mean(0))
            module.batch_variance.copy_(variance.unflatten(0, (groups, -1)).mean(0))
        return x if groups == 1 else x.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)

    return forward


def find_batch_norms(network: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}


class BatchStatistics:
    """The running statistics of all BatchNorms of a network, whose forward passes no longer move them."""

    def __init__(self, network: nn.Module, images: int | None, group: Any = None) -> None:
        """Installs forward passes with statistics over `images` images (None: all that are passed at once) of each
        process in `group` (None: this one)."""
        self.modules = find_batch_norms(network)
        for module in self.modules.values():
            for name, like in (("batch_mean", module.running_mean), ("batch_variance", module.running_var)):
                assert like is not None
                module.register_buffer(name, torch.zeros_like(like), persistent=False)
            module.forward = make_grouped_forward(module, images, group)  # type: ignore[method-assign, assignment]

    @torch.no_grad()
    def move(self, number: int, micro_batches: int) -> None:
        """After micro-batch `number` (from 0) of a step: the mean over the step's statistics counts `momentum`."""
        for module in self.modules.values():
            move(dict(module.named_buffers()), read_momentum(module), number, micro_batches)


def read_momentum(module: nn.BatchNorm2d) -> float:
    assert module.momentum is not None  # torch's cumulative mean, which no family has
    return module.momentum


def move(buffers: dict[str, Tensor], momentum: float, number: int = 0, micro_batches: int = 1) -> None:
    """As BatchStatistics.move, of one BatchNorm, whose tensors may have further dimensions in front."""
    for running, batch in (("running_mean", "batch_mean"), ("running_var", "batch_variance")):
        if number == 0:
            buffers[running].mul_(1 - momentum)
        buffers[running].add_(buffers[batch], alpha=momentum / micro_batches)
    if number == 0:
        buffers["num_batches_tracked"].add_(1)
