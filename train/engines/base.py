"""Four ways to spread one run over processes, behind one interface: wrap, backward, step (with clipping), state.

All of them take the same parameter groups and give the same losses. The loop and the checkpoints see `network`, whose
parameter names are those of the plain model, and `optimizer`, whose groups are found by name.
"""

from collections.abc import Callable
from typing import Any, Protocol, cast

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

from depthmup.train.tensors import gather_full

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]
TensorState = dict[str, dict[str, Any]]


class Fill(Protocol):
    """models.build.fill for one network, or nothing where that is filled already."""

    def __call__(self, *, take: Callable[[nn.Module], object] | None = None) -> None: ...


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
            norm = gather_full(nn.utils.clip_grad_norm_(self.network.parameters(), clip_norm))
        self.optimizer.step()
        return norm

    def gradient_norm(self) -> Tensor:
        """Norm of the gradients that the last step used."""
        return gather_full(nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None]))

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


@torch.no_grad()
def average_buffers(network: nn.Module) -> None:
    """BatchNorm's running statistics become the mean over the processes: before they are evaluated or saved."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for buffer in network.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()
