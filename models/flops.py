"""Floating-point operations, counted on the built network rather than estimated from a formula."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_forward_flops(network: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """FLOPs (a multiply-add is 2) of one image (channels, height, width) through a network on the meta device."""
    image = torch.empty((1, *image_shape), device="meta")
    training = network.training
    network.eval()  # BatchNorm refuses a batch of one otherwise
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    network.train(training)
    return counter.get_total_flops()


def count_training_flops(network: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """FLOPs of one image in training: forward, and twice that for the gradients of inputs and of weights."""
    return 3 * count_forward_flops(network, image_shape)


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
