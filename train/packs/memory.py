"""How many replicas fit: the memory that a packed step takes, measured on one replica and on two."""

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from depthmup.train.config import RunConfig
from depthmup.train.packs.packing import list_common, pack_limit
from depthmup.train.packs.replicas import Replicas
from depthmup.train.prepare import choose_autocast_dtype

MEMORY_SHARE = 0.8  # of what is free: the rest is for libraries' workspaces and the allocator's gaps


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside it, and the most of them that live at once.

    The same on every device: torch itself counts what is allocated on GPUs only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.seen = WeakIdKeyDictionary()  # storages

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.seen:
            self.seen[storage] = size = storage.nbytes()
            weakref.finalize(storage, self.free, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def free(self, size: int) -> None:
        self.live -= size


counted: dict[Any, int] = {}  # a worker asks to choose a pack, the pack itself asks again, and the next ones do


def pack_bytes(config: RunConfig, num_replicas: int, device: torch.device) -> int:
    """The most memory that is taken at once while so many replicas of `config` are built and make their first step.
    Of what may differ in a pack, stochastic depth alone takes any that counts."""
    key = repr(list_common(config)), config.train.drop_path > 0, num_replicas, device
    if key not in counted:
        counted[key] = count_bytes(config, num_replicas, device)
    return counted[key]


def count_bytes(config: RunConfig, num_replicas: int, device: torch.device) -> int:
    model, batch = config.model, config.train.global_batch_size
    with PeakBytes() as memory:
        replicas = Replicas([config] * num_replicas, device, choose_autocast_dtype(config.train, device))
        images = torch.zeros(1, batch, model.in_channels, model.image_size, model.image_size, device=device)
        replicas.eager_step(images, torch.zeros(1, batch, dtype=torch.int64, device=device))
    return memory.peak


def measure_free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(available.split()[1]) * 1024  # what the page cache holds counts as free


def find_largest_pack(config: RunConfig, device: torch.device) -> int:
    """Most replicas of `config` that fit into the memory that is free on `device`; 0 when not even one does."""
    free = measure_free_bytes(device) * MEMORY_SHARE
    one, two = (pack_bytes(config, number, device) for number in (1, 2))
    return 1 + int((free - one) / (two - one)) if free >= one else 0


def pack_size(config: RunConfig, device: torch.device) -> int:
    """How many such runs to train together: train.pack or what pays, but no more than fit."""
    limit = pack_limit(config, device.type == "cuda")
    return min(limit, max(find_largest_pack(config, device), 1)) if limit > 1 else 1
