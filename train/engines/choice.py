"""Which engine a run has, from its configuration and its number of processes."""

import torch
from torch import nn

from depthmup.data.errors import UserError
from depthmup.train.config import ParallelConfig
from depthmup.train.engines.base import Engine, Fill, OptimizerFactory
from depthmup.train.engines.parallel import DistributedDataParallel, FullyShardedDataParallel
from depthmup.train.engines.zero import ZeroRedundancy


def choose(config: ParallelConfig, world_size: int) -> str:
    """The engine's name. Raises UserError for several processes without an engine that joins them."""
    if config.engine == "auto":
        return "none" if world_size == 1 else "ddp"
    if config.engine == "none" and world_size > 1:
        raise UserError(f"parallel.engine is none, but {world_size} processes were started: use ddp, fsdp or deepspeed")
    return config.engine


def starts_on_meta(name: str, config: ParallelConfig) -> bool:
    """Whether an engine is given a network on meta, which it fills (moves to the device, with initial weights) shard by
    shard; the others are given one that is filled."""
    return name == "fsdp" or (name == "deepspeed" and config.zero_stage == 3)


def make_engine(
    name: str,
    network: nn.Module,
    make_optimizer: OptimizerFactory,
    *,
    blocks: list[str],
    device: torch.device,
    fill: Fill,
    config: ParallelConfig,
    autocast_dtype: torch.dtype | None,
    clip_norm: float | None,
    micro_batches: int,
    micro_batch_size: int,
) -> Engine:
    """Wraps `network`. `blocks`: names of its residual blocks, the units of sharding; `fill`: see `starts_on_meta`."""
    if name == "none":
        return Engine(network, make_optimizer)
    if name == "ddp":
        return DistributedDataParallel(network, make_optimizer)
    if name == "fsdp":
        return FullyShardedDataParallel(network, make_optimizer, blocks, device, fill, config)
    return ZeroRedundancy(
        network,
        make_optimizer,
        device=device,
        fill=fill,
        stage=config.zero_stage,
        autocast_dtype=autocast_dtype,
        clip_norm=clip_norm,
        micro_batches=micro_batches,
        micro_batch_size=micro_batch_size,
    )
