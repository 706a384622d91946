"""torch's own ways to spread a network over processes: the whole of it in each, or a shard."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from depthmup.train.engines.base import Engine, OptimizerFactory


class DistributedDataParallel(Engine):
    """Every process holds the whole model; gradients are averaged."""

    name = "ddp"

    def __init__(self, network: nn.Module, make_optimizer: OptimizerFactory) -> None:
        super().__init__(network, make_optimizer)
        device = next(network.parameters()).device
        self.module: nn.parallel.DistributedDataParallel = nn.parallel.DistributedDataParallel(
            network,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            # Otherwise it sorts gradients into other buckets after its first step. Three processes or more then sum
            # them in another order, and a resumed run would not be bit for bit the one that never stopped.
            find_unused_parameters=device.type == "cpu" and dist.get_world_size() > 2,
        )
        # BatchNorm's statistics are averaged where they are read: see average_buffers. The argument of this name is
        # deprecated, and the one that replaces it is newer than the oldest torch that is supported.
        self.module.broadcast_buffers = False

    def start_micro_batch(self, last: bool) -> None:
        self.module.require_backward_grad_sync = last


class FullyShardedDataParallel(Engine):
    """FSDP2: parameters, gradients and optimizer state are sharded block by block."""

    name = "fsdp"

    def __init__(
        self,
        network: nn.Module,
        make_optimizer: OptimizerFactory,
        blocks: list[str],
        device: torch.device,
        fill: Callable[[], None],
    ) -> None:
        """`network` is on meta; `fill` moves what a process keeps of it to `device`, with initial weights. So no
        process ever holds the whole of it."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        # No MixedPrecisionPolicy: autocast takes bf16 where the other engines do. Gathered in bf16, the embeddings of
        # positions would turn the residual stream to bf16, and the weights of norms would be rounded.
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for name in blocks:
            fully_shard(network.get_submodule(name), mesh=mesh)
        sharded = fully_shard(network, mesh=mesh)
        assert isinstance(sharded, FSDPModule)
        self.sharded = sharded
        fill()
        super().__init__(network, make_optimizer)

    def start_micro_batch(self, last: bool) -> None:
        self.sharded.set_requires_gradient_sync(last)

    def reshard(self) -> None:
        self.sharded.reshard()  # the blocks do it by themselves; what lies outside of them waits for a backward pass
