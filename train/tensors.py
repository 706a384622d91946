"""Tensors that may be sharded over processes."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def gather_full(tensor: Tensor) -> Tensor:
    """All of it, gathered from the processes where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def take_local(tensor: Tensor) -> Tensor:
    """This process's shard; the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread_like(value: Tensor, parameter: Tensor) -> Tensor:
    """`value`, which every process has whole, sharded as `parameter` is. The processes exchange nothing."""
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
