"""Tensors that may be sharded over processes."""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All of it, gathered from the processes where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's shard; the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copy_shard(parameter: nn.Parameter, value: Tensor) -> None:
    """Copies `value`, which every process has whole, into what this one keeps of `parameter`. They exchange nothing."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)
