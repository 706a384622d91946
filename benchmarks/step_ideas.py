"""What makes a ViT's step faster: each idea beside the step as it is, in turns on the same device.

    python -m benchmarks.step_ideas                                                     # on a GPU: ViT-S/16, ViT-B/16
    python -m benchmarks.step_ideas --models tiny --batch 8 --steps 1 --rounds 2 --compile off     # on a CPU

Batches of random pixels lie on the device, and the step is that of train.loop, with AdamW. Each idea takes turns with
the step as it is, so that a device that slows down slows both; the figure is the median over the rounds of the ratio of
their times, with its lowest and highest. An idea that fails says so, and the others go on. --after leaves out what a
file of an earlier call has figures of.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.rows import BEGUN, describe_failure, find_unmeasured
from benchmarks.train_throughput import CASES, IMAGE_SIZE, NUM_CLASSES, configuration
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import depthmup.models.torchvision_ops  # noqa: F401  isort: skip  (must run before timm)
from timm.layers import Mlp

from depthmup.models.build import build_meta
from depthmup.models.flops import count_training_flops
from depthmup.train.config import RunConfig
from depthmup.train.distributed import World, process_group
from depthmup.train.one_network import OneNetwork
from depthmup.train.prepare import choose_autocast_dtype
from depthmup.train.telemetry import find_peak_flops

WARM = 3  # steps that compile, and search algorithms


@contextmanager
def replaced(owner: Any, name: str, by: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, before)


def attend_token_by_token(query: Tensor, key: Tensor, value: Tensor, **others: Any) -> Tensor:
    """(batch, heads, tokens, head width) in and out, as F.scaled_dot_product_attention, by FlashAttention's own layout
    (all tokens, heads, head width), in which nothing is copied on the way in and out."""
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, tokens, width = query.shape
    flat = [part.transpose(1, 2).reshape(batch * tokens, heads, width) for part in (query, key, value)]
    ends = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=query.device)
    found: Tensor = varlen_attn(*flat, ends, ends, tokens, tokens)
    return found.view(batch, tokens, heads, width).transpose(1, 2)


class LinearGelu(torch.autograd.Function):
    """GELU by tanh of a linear layer, in the epilogue of cuBLASLt's product. That does not keep what GELU's derivative
    is of, so the backward pass multiplies again. On a CPU torch's operator computes GELU exactly."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        context.save_for_backward(x, weight, bias)
        flat = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
        return flat.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias = context.saved_tensors
        flat, kind = x.flatten(0, -2), "tanh" if x.is_cuda else "none"
        of_sums = torch.ops.aten.gelu_backward(
            gradient.flatten(0, -2), torch.addmm(bias, flat, weight.t()), approximate=kind
        )
        return (of_sums @ weight).view(x.shape), of_sums.t() @ flat, of_sums.sum(0)


def apply_linear_gelu(mlp: Any, x: Tensor) -> Tensor:
    """timm's Mlp without dropout, its first layer and GELU by LinearGelu, in autocast's type."""
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    hidden: Tensor = LinearGelu.apply(x.to(dtype), mlp.fc1.weight.to(dtype), mlp.fc1.bias.to(dtype))
    found: Tensor = mlp.fc2(hidden)
    return found


@contextmanager
def all_of(*contexts: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    with ExitStack() as entered:
        for context in contexts:
            entered.enter_context(context())
        yield


@dataclass(frozen=True)
class Idea:
    """config: what the run's configuration becomes. context: in which the step is built and taken."""

    config: Callable[[RunConfig], RunConfig] = lambda config: config
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def with_train(**changes: Any) -> Callable[[RunConfig], RunConfig]:
    return lambda config: replace(config, train=replace(config.train, **changes))


def inductor(**settings: Any) -> Callable[[], AbstractContextManager[Any]]:
    import torch._inductor.config as of_inductor

    return lambda: of_inductor.patch({key.replace("__", "."): value for key, value in settings.items()})


def no_copies() -> AbstractContextManager[Any]:
    return replaced(F, "scaled_dot_product_attention", attend_token_by_token)


GRAPHS = inductor(triton__cudagraphs=True)
IN_TRITON = inductor(max_autotune_gemm=True, max_autotune_gemm_backends="ATEN,TRITON", epilogue_fusion=True)
IDEAS = {  # what may hang or take minutes to compile comes last
    "the same again (noise)": Idea(),
    "norms, sums, GELU not fused": Idea(with_train(compile="off")),
    "bf16_residual": Idea(with_train(precision="bf16", bf16_residual=True)),
    "attention: cudnn": Idea(context=lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION)),
    "attention: flash": Idea(context=lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)),
    "attention: efficient": Idea(context=lambda: sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION)),
    "attention: flash, no copies": Idea(context=no_copies),
    "196 tokens (another network)": Idea(
        lambda config: replace(config, model=replace(config.model, class_token=False, global_pool="avg"))
    ),
    "GELU by tanh (another network)": Idea(
        context=lambda: replaced(torch.nn.GELU, "forward", lambda self, x: F.gelu(x, approximate="tanh"))
    ),
    "CUDA graphs of compiled code": Idea(context=GRAPHS),
    "compile: block": Idea(with_train(compile="block")),
    "GELU by tanh in cuBLASLt": Idea(context=lambda: replaced(Mlp, "forward", apply_linear_gelu)),
    "no copies, CUDA graphs": Idea(context=lambda: all_of(no_copies, GRAPHS)),
    "products in Triton, GELU fused": Idea(context=IN_TRITON),
    "no copies, graphs, Triton": Idea(context=lambda: all_of(no_copies, GRAPHS, IN_TRITON)),
}


def make_step(config: RunConfig, device: torch.device) -> Callable[[], None]:
    network = OneNetwork(config, "none", 1, World(), device)
    size = config.train.global_batch_size
    images = torch.randn(1, size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    labels = torch.randint(NUM_CLASSES, (1, size), device=device)

    def step() -> None:
        network.step(images, labels)

    return step


def seconds(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Of one step, the mean over `steps`."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps


def measure(
    config: RunConfig, idea: Idea, plain: Callable[[], None], arguments: argparse.Namespace, device: torch.device
) -> str:
    """The idea's row. plain: the step as it is, warm."""
    other_config = idea.config(config)
    with idea.context():
        other = make_step(other_config, device)
        seconds(other, WARM, device)
    before, after = [], []
    for _ in range(arguments.rounds):
        before.append(seconds(plain, arguments.steps, device))
        with idea.context():
            after.append(seconds(other, arguments.steps, device))
    network = build_meta(other_config.model, other_config.parameterization).network
    flops = count_training_flops(network, (3, IMAGE_SIZE, IMAGE_SIZE)) * config.train.global_batch_size
    peak = find_peak_flops(device, choose_autocast_dtype(config.train, device))
    mfu = f"{flops / statistics.median(after) / peak:.1%}" if peak else "n/a"
    ratios = sorted(theirs / ours for ours, theirs in zip(before, after, strict=True))
    milliseconds = " ".join(f"{statistics.median(times) * 1000:9.1f}" for times in (before, after))
    return f"{milliseconds} {statistics.median(ratios):7.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}) {mfu:>7}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--models", nargs="+", default=["vit_s16", "vit_b16"], choices=list(CASES))
    parser.add_argument("--ideas", nargs="+", default=list(IDEAS), choices=list(IDEAS), metavar="IDEA")
    parser.add_argument("--compile", default="model", choices=["off", "block", "model"])
    parser.add_argument("--batch", type=int, help="images a step [default: per model]")
    parser.add_argument("--steps", type=int, default=10, help="in a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--after", type=Path, help="what earlier calls printed")
    arguments = parser.parse_args()
    arguments.precision, arguments.bf16_residual = "bf16" if on_gpu else "fp32", False
    device = torch.device("cuda" if on_gpu else "cpu")
    print(f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}, torch {torch.__version__}, {vars(arguments)}")
    print(f"{'network':10} {'idea':32} ms: as it is, with it; ratio (lowest to highest); MFU with it", flush=True)
    failed = False
    for model in arguments.models:
        labels = {f"{model:10} {name:32}": name for name in arguments.ideas}
        left = find_unmeasured(list(labels), arguments.after)
        if not left:
            continue
        config = configuration(CASES[model], Path("unused"), arguments)
        with process_group(World(), device, config.parallel, "none"):
            plain = make_step(config, device)
            try:
                seconds(plain, WARM, device)
            except Exception as error:  # no compiler, say
                print(f"{model:10} as it is, with compile={config.train.compile}: {describe_failure(error)}")
                config = with_train(compile="off")(config)
                plain = make_step(config, device)
                seconds(plain, WARM, device)
            for label in left:
                if arguments.after:
                    print(label, BEGUN, flush=True)
                try:
                    found = measure(config, IDEAS[labels[label]], plain, arguments, device)
                except Exception as error:  # one idea's; the row says so
                    found, failed = describe_failure(error), True
                print(label, found, flush=True)
                gc.collect()
                if on_gpu:
                    torch.cuda.empty_cache()
        torch.compiler.reset()
    sys.exit(failed)


if __name__ == "__main__":
    main()
