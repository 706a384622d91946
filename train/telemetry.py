"""What a metrics line says beyond the loss: throughput, MFU, memory, and the RMS of gradients and updates per role."""

import math
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from depthmup.train.distributed import sum_over_ranks
from depthmup.train.tensors import take_local

# Dense peak, FLOP/s: (bf16, TF32 or fp32 on tensor cores), from the makers' data sheets, without sparsity. The
# first name that stands as whole words in the device's name counts.
PEAK_FLOPS: tuple[tuple[str, float, float], ...] = (
    ("GB300", 2500e12, 1250e12),
    ("GB200", 2500e12, 1250e12),
    ("B300", 2250e12, 1125e12),
    ("B200", 2250e12, 1125e12),
    ("GH200", 989e12, 494.7e12),
    ("H200", 989e12, 494.7e12),
    ("H100 PCIe", 756e12, 378e12),
    ("H100 NVL", 835e12, 417.5e12),
    ("H100", 989e12, 494.7e12),
    ("H800", 989e12, 494.7e12),
    ("H20", 148e12, 74e12),
    ("A100", 312e12, 156e12),
    ("A800", 312e12, 156e12),
    ("L40S", 362e12, 183e12),
    ("L40", 181e12, 90.5e12),
    ("A40", 149.7e12, 74.8e12),
    ("A30", 165e12, 82e12),
    ("A10", 125e12, 62.5e12),
    ("L4", 121e12, 60e12),
    ("RTX 4090", 165.2e12, 82.6e12),
    ("MI300X", 1307.4e12, 653.7e12),
)


def find_peak_row(device_name: str) -> tuple[str, float, float] | None:
    """'NVIDIA L40' is no L4, and no L40S."""
    return next((row for row in PEAK_FLOPS if re.search(rf"\b{row[0]}\b", device_name)), None)


def find_peak_flops(device: torch.device, dtype: torch.dtype | None) -> float | None:
    """The device's dense peak in FLOP/s for `dtype` (None: float32), or None for a device that is not in the table."""
    if device.type != "cuda":
        return None
    row = find_peak_row(torch.cuda.get_device_name(device))
    return None if row is None else row[1] if dtype == torch.bfloat16 else row[2]


def measure_memory(device: torch.device) -> float:
    """Most memory that was ever held, in GB: the allocator's on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


T = TypeVar("T")


@dataclass
class Clock:
    """Seconds of training since the last log line, and how many of them went into waiting for data."""

    step: int
    since: float = field(default_factory=time.monotonic)
    waited: float = 0.0

    def wait(self, get: Callable[[], T]) -> T:
        start = time.monotonic()
        value = get()
        self.waited += time.monotonic() - start
        return value

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What the block does, such as an evaluation, is no training, and its time does not count."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.since += time.monotonic() - start

    def lap(self, step: int, batch_size: int) -> tuple[float, float]:
        """(images per second, share of the time spent waiting for data) since the last call."""
        now = time.monotonic()
        elapsed = max(now - self.since, 1e-9)
        rates = (step - self.step) * batch_size / elapsed, self.waited / elapsed
        self.step, self.since, self.waited = step, now, 0.0
        return rates


class RoleStatistics:
    """RMS of weights, of gradients and of updates for each role of parameters, and the effective learning rate: the
    update's RMS over the weights' before it. An update costs a copy of the weights, so it is measured on log steps
    only."""

    def __init__(self, network: nn.Module, role_of: dict[str, str]) -> None:
        """`role_of`: parameter name -> its role."""
        self.by_role: dict[str, list[nn.Parameter]] = {}
        for name, parameter in network.named_parameters():
            self.by_role.setdefault(role_of[name], []).append(parameter)
        self.sharded = any(isinstance(p, DTensor) for p in network.parameters())
        self.before: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def before_step(self) -> None:
        self.before = {role: [take_local(p).clone() for p in parameters] for role, parameters in self.by_role.items()}

    @torch.no_grad()
    def after_step(self) -> dict[str, float]:
        """{"grad_rms/ROLE": ..., "update_rms/ROLE": ..., "weight_rms/ROLE": ..., "effective_lr/ROLE": ...}; the last
        is left out where the weights were all zero. Waits for the device."""
        squares: list[Tensor] = []
        for role, parameters in self.by_role.items():
            updates = torch._foreach_sub([take_local(p) for p in parameters], self.before[role])
            squares += [
                sum_squares([take_local(p.grad) for p in parameters if p.grad is not None]),
                sum_squares(updates),
                sum_squares(self.before[role]),
            ]
        self.before = {}
        totals = torch.stack(squares)
        values = (sum_over_ranks(totals) if self.sharded else totals).tolist()
        line: dict[str, float] = {}
        for index, (role, parameters) in enumerate(self.by_role.items()):
            count = sum(p.numel() for p in parameters)
            gradient, update, weight = (math.sqrt(value / count) for value in values[3 * index : 3 * index + 3])
            line |= {f"grad_rms/{role}": gradient, f"update_rms/{role}": update, f"weight_rms/{role}": weight}
            if weight:
                line[f"effective_lr/{role}"] = update / weight
        return line


def sum_squares(tensors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return torch.stack([norm.float() ** 2 for norm in torch._foreach_norm(tensors)]).sum()
