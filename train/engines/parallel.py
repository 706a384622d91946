"""torch's own ways to spread a network over processes: the whole of it in each, or a shard."""

import torch
import torch.distributed as dist
from torch import nn

from depthmup.data.errors import UserError
from depthmup.train.config import ParallelConfig
from depthmup.train.engines.base import Engine, Fill, OptimizerFactory


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


def list_rounded_by_autocast(block: nn.Module) -> list[nn.Module]:
    """The modules whose weights autocast rounds to bf16 before each use. Not their subclasses, which others may use
    without a call, as attention's own output projection: a hook gathers the weights of what is called."""
    return [module for module in block.modules() if type(module) in (nn.Linear, nn.Conv2d)]


class FullyShardedDataParallel(Engine):
    """FSDP2: parameters, gradients and optimizer state are sharded block by block."""

    name = "fsdp"

    def __init__(
        self,
        network: nn.Module,
        make_optimizer: OptimizerFactory,
        blocks: list[str],
        device: torch.device,
        fill: Fill,
        config: ParallelConfig,
    ) -> None:
        """`network` is on meta; `fill` moves what a process keeps of it to `device`, with initial weights. So no
        process ever holds the whole of it. Raises UserError where shard_size does not divide the processes."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        world_size = dist.get_world_size()
        try:
            copies = config.copies(world_size)
        except ValueError as error:
            raise UserError(str(error)) from None
        shape = (copies, world_size // copies) if copies > 1 else (world_size,)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        # Autocast takes bf16 where the other engines do. Only what it would round all the same is gathered in bf16: so
        # would the embeddings of positions turn the residual stream to bf16, and the weights of norms be rounded.
        in_bf16 = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for name in blocks:
            block = network.get_submodule(name)
            if config.gather == "bf16":
                fully_shard(list_rounded_by_autocast(block), mesh=mesh, mp_policy=in_bf16)
            fully_shard(block, mesh=mesh)
        sharded = fully_shard(network, mesh=mesh)
        assert isinstance(sharded, FSDPModule)
        self.sharded = sharded
        fill()
        super().__init__(network, make_optimizer)

    def start_micro_batch(self, last: bool) -> None:
        self.sharded.set_requires_gradient_sync(last)

    def reshard(self) -> None:
        self.sharded.reshard()  # the blocks do it by themselves; what lies outside of them waits for a backward pass
