"""DeepSpeed's ZeRO as an engine. It gets our torch optimizer and our learning rates, and does nothing but shard.

Its own checkpoints are pickles that do not load into another world size or stage, so they are not used: weights and
moments are gathered one parameter at a time and saved by qualified name, like those of every other engine.
"""

import inspect
import math
import os
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from depthmup.data.errors import UserError
from depthmup.train.engines.base import Engine, Fill, OptimizerFactory, TensorState

STEP = "step"  # Adam's count of steps: a number, the same for all parameters


def import_deepspeed(device: torch.device) -> Any:
    """Raises UserError when DeepSpeed is not installed."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # it insists on it, and makes this GPU the current one
    try:
        import deepspeed
    except ImportError:
        raise UserError(
            "parallel.engine is deepspeed, which is not installed: pip install 'depthmup[deepspeed]', or use fsdp"
        ) from None
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo serves; this one is compiled for a minute
    if hasattr(dist, "all_gather_single"):  # torch 2.13's names; of those that DeepSpeed calls it warns in every step
        from deepspeed.comm.torch import TorchBackend

        TorchBackend.get_all_gather_function = lambda self: dist.all_gather_single
        TorchBackend.get_reduce_scatter_function = lambda self: dist.reduce_scatter_single
    return deepspeed


class ZeroRedundancy(Engine):
    """DeepSpeed ZeRO, stage 0 to 3."""

    name = "deepspeed"
    module: Any  # a DeepSpeedEngine, which has no types

    def __init__(
        self,
        network: nn.Module,
        make_optimizer: OptimizerFactory,
        *,
        device: torch.device,
        fill: Fill,
        stage: int,
        autocast_dtype: torch.dtype | None,
        clip_norm: float | None,
        micro_batches: int,
        micro_batch_size: int,
    ) -> None:
        """For stage 3 `network` may be on meta: `fill` moves it to `device`, and each module's weights are sharded as
        soon as they are filled, so that no process ever holds the whole of it."""
        deepspeed = import_deepspeed(device)
        shard = partial(deepspeed.zero.Init, mem_efficient_linear=False, dtype=torch.float32)
        fill(take=shard if stage == 3 else None)
        optimizer = make_optimizer(network)
        if not isinstance(optimizer, torch.optim.SGD | torch.optim.AdamW):
            raise UserError(
                f"{type(optimizer).__name__} looks at whole matrices, which ZeRO's flat shards do not show it: "
                "use parallel.engine=fsdp or ddp"
            )
        settings = {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": micro_batches,
            "gradient_clipping": (clip_norm or 0.0) if stage else 0.0,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "torch_autocast": {
                "enabled": autocast_dtype is not None,
                "dtype": "bfloat16",
                # By default it rounds the gradients of convs and linear layers to bf16 before it averages them.
                "lower_precision_safe_modules": [],
            },
        }
        self.stage, self.network = stage, network
        self.module, self.optimizer, _, _ = deepspeed.initialize(
            model=network, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.norm = torch.zeros(())

    def start_micro_batch(self, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        self.module.backward(loss, scale_wrt_gas=False)

    def zero_grad(self) -> None:
        """DeepSpeed's step does it."""

    def step(self, clip_norm: float | None) -> Tensor | None:
        if self.stage == 0:  # plain averaged gradients, whose norm DeepSpeed does not tell
            parameters = list(self.network.parameters())
            self.norm = nn.utils.clip_grad_norm_(parameters, clip_norm or math.inf)
            self.module.step()
        else:
            self.module.step()
            self.norm = torch.as_tensor(self.module.get_global_grad_norm())
        return self.norm

    def gradient_norm(self) -> Tensor:
        return self.norm

    def materialize_optimizer(self) -> list[str]:
        """Gives every flat shard zero moments where it has none yet; returns the names of what the optimizer keeps."""
        base = getattr(self.optimizer, "optimizer", self.optimizer)
        device = next(self.network.parameters()).device
        probe = nn.Parameter(torch.zeros(1, device=device))
        probe.grad = torch.zeros_like(probe)
        known = inspect.signature(type(base)).parameters
        example = type(base)([probe], **{key: value for key, value in base.defaults.items() if key in known})
        example.step()
        kept = {key: value for key, value in example.state[probe].items() if isinstance(value, Tensor)}
        zero = self.optimizer
        for flat in zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups:
            for key, value in kept.items():  # fused optimizers count their steps on the GPU, others on the CPU
                base.state[flat].setdefault(key, torch.zeros_like(value if key == STEP else flat))
        if self.stage in (1, 2):
            zero._hp_optimizer_states_linked = False  # DeepSpeed linked all groups when only the first had moments
            zero._lazy_init_hp_params_optimizer_state()
        return list(kept)

    def state(self) -> TensorState:
        if self.stage == 0:
            return super().state()
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        keys, base = self.materialize_optimizer(), self.optimizer.optimizer
        steps = next((state[STEP] for state in base.state.values() if STEP in state), None)
        saved = self.network.state_dict().keys()
        model: dict[str, Tensor] = {name: buffer for name, buffer in self.network.named_buffers() if name in saved}
        moments: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.network.named_parameters():
            model[name] = safe_get_full_fp32_param(parameter).cpu()  # one at a time: a GPU need not hold all of them
            moments[name] = {key: safe_get_full_optimizer_state(parameter, key).cpu() for key in keys if key != STEP}
            if steps is not None:
                moments[name][STEP] = steps
        return {"model": model, "optimizer": moments}

    def load_state(self, state: TensorState) -> None:
        if self.stage == 0:
            super().load_state(state)
            return
        import deepspeed

        self.materialize_optimizer()
        with torch.no_grad():
            for name, buffer in self.network.named_buffers():
                if name in state["model"]:
                    buffer.copy_(state["model"][name])
            for name, parameter in self.network.named_parameters():
                weight, moments = state["model"][name], state["optimizer"][name]
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
                    parameter.data.copy_(weight)
                self.set_fp32(parameter, weight)
                for key, value in moments.items():
                    if key == STEP:
                        for flat_state in self.optimizer.optimizer.state.values():
                            flat_state[STEP].copy_(value)
                    else:
                        self.set_fp32(parameter, value, key)

    def set_fp32(self, parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """Sets the fp32 weight, or the optimizer's tensor `key`, where this process keeps a part of it; `value` whole.

        DeepSpeed's setter of whole tensors for stage 3 fails where the processes do not divide a tensor's size.
        """
        from deepspeed import utils

        if self.stage == 3:
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # DeepSpeed's: this process's part, padded
            padded = nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
            value = padded.narrow(0, size * dist.get_rank(), size)
            set_weight, set_moment = utils.safe_set_local_fp32_param, utils.safe_set_local_optimizer_state
        else:
            set_weight, set_moment = utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state
        if key is None:
            set_weight(parameter, value)
        else:
            set_moment(parameter, value, key)

    def full_weights(self) -> dict[str, Tensor]:
        weights = super().full_weights() if self.stage < 3 else self.state()["model"]
        return {name: tensor.cpu() for name, tensor in weights.items()} if dist.get_rank() == 0 else {}
