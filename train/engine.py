"""Four ways to spread one run over processes, behind one interface: wrap, backward, step (with clipping), state.

All of them take the same parameter groups and give the same losses. The loop and the checkpoints see `network`, whose
parameter names are those of the plain model, and `optimizer`, whose groups are found by name.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from depthmup.data.errors import UserError
from depthmup.train.config import ParallelConfig

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]
TensorState = dict[str, dict[str, Any]]


class Engine:
    """One process. The other engines override what differs."""

    name = "none"
    optimizer: Any  # torch.optim.Optimizer, or DeepSpeed's wrapper of one

    def __init__(self, network: nn.Module, make_optimizer: OptimizerFactory) -> None:
        self.network = network  # plain parameter names
        self.module = network  # what is called
        self.optimizer = make_optimizer(network)

    def start_micro_batch(self, last: bool) -> None:
        """Before the forward pass; gradients are exchanged in the backward pass of the last one only."""

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def reshard(self) -> None:
        """After forward passes without backward ones: frees gathered weights, where weights are sharded."""

    def step(self, clip_norm: float | None) -> Tensor | None:
        """Updates the weights. Scales all gradients first so that their norm is at most `clip_norm`, and returns the
        norm before that, on the device; None when there is nothing to clip."""
        norm = None
        if clip_norm:
            norm = whole(nn.utils.clip_grad_norm_(self.network.parameters(), clip_norm))
        self.optimizer.step()
        return norm

    def gradient_norm(self) -> Tensor:
        """Norm of the gradients that the last step used."""
        return whole(nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None]))

    def state(self) -> TensorState:
        """Tensors of the model and the optimizer by qualified name. Hyperparameters are no part of it: the
        configuration alone sets them."""
        return {
            "model": get_model_state_dict(self.network),
            "optimizer": cast(dict[str, Any], get_optimizer_state_dict(self.network, self.optimizer)["state"]),
        }

    def load_state(self, state: TensorState) -> None:
        """Puts back what `state` gave, of any engine and number of processes."""
        set_model_state_dict(self.network, state["model"])
        settings = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        groups = get_optimizer_state_dict(self.network, self.optimizer)["param_groups"]
        set_optimizer_state_dict(self.network, self.optimizer, {"state": state["optimizer"], "param_groups": groups})
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)

    def full_weights(self) -> dict[str, Tensor]:
        """Parameters and buffers on the CPU of rank 0, whole; other ranks get an empty dict."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return cast(dict[str, Tensor], get_model_state_dict(self.network, options=options))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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

    def __init__(self, network: nn.Module, make_optimizer: OptimizerFactory, blocks: list[str]) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        # No MixedPrecisionPolicy: autocast takes bf16 where the other engines do. Gathered in bf16, the embeddings of
        # positions would turn the residual stream to bf16, and the weights of norms would be rounded.
        mesh = init_device_mesh(next(network.parameters()).device.type, (dist.get_world_size(),))
        for name in blocks:
            fully_shard(network.get_submodule(name), mesh=mesh)
        sharded = fully_shard(network, mesh=mesh)
        assert isinstance(sharded, FSDPModule)
        self.sharded = sharded
        super().__init__(network, make_optimizer)

    def start_micro_batch(self, last: bool) -> None:
        self.sharded.set_requires_gradient_sync(last)

    def reshard(self) -> None:
        self.sharded.reshard()  # the blocks do it by themselves; what lies outside of them waits for a backward pass


def choose(config: ParallelConfig, world_size: int) -> str:
    """The engine's name. Raises UserError for several processes without an engine that joins them."""
    if config.engine == "auto":
        return "none" if world_size == 1 else "ddp"
    if config.engine == "none" and world_size > 1:
        raise UserError(f"parallel.engine is none, but {world_size} processes were started: use ddp, fsdp or deepspeed")
    return config.engine


def make_engine(
    name: str,
    network: nn.Module,
    make_optimizer: OptimizerFactory,
    *,
    blocks: list[str],
    config: ParallelConfig,
    autocast_dtype: torch.dtype | None,
    clip_norm: float | None,
    micro_batches: int,
    micro_batch_size: int,
) -> Engine:
    """Wraps `network`. `blocks`: names of its residual blocks, the units of sharding."""
    if name == "none":
        return Engine(network, make_optimizer)
    if name == "ddp":
        return DistributedDataParallel(network, make_optimizer)
    if name == "fsdp":
        return FullyShardedDataParallel(network, make_optimizer, blocks)
    from depthmup.train.zero import ZeroRedundancy

    return ZeroRedundancy(
        network,
        make_optimizer,
        stage=config.zero_stage,
        autocast_dtype=autocast_dtype,
        clip_norm=clip_norm,
        micro_batches=micro_batches,
        micro_batch_size=micro_batch_size,
    )


@torch.no_grad()
def average_buffers(network: nn.Module) -> None:
    """BatchNorm's running statistics become the mean over the processes: before they are evaluated or saved."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for buffer in network.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()
