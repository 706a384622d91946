"""Precision: what is rounded to what, under every family."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import stranger_network
from depthmup.data.errors import UserError
from depthmup.models.build import ScaledModel, build, build_meta
from depthmup.models.parameterization_config import ParameterizationConfig
from depthmup.train.config import RunConfig, TrainConfig
from depthmup.train.packs.replicas import Replicas
from depthmup.train.prepare import choose_autocast_dtype, set_stream_type, set_tf32
from depthmup.train.reading import from_plain
from depthmup.train.step import autocast

CPU = torch.device("cpu")
SIZE = {"width": 16, "depth": 8, "base_width": 8, "base_depth": 4, "num_classes": 10, "in_channels": 1}
MODELS: dict[str, dict[str, Any]] = {
    "vit": {"family": "vit", "num_heads": 2, "patch_size": 2, "image_size": 8},
    "vit with LayerScale": {"family": "vit", "num_heads": 2, "patch_size": 2, "image_size": 8, "layer_scale": 1e-5},
    **{
        f"{kind}, norm {norm}": {"family": "resnet", "image_size": 32, **norm_of, **more}
        for kind, more in {
            "ResNet": {},
            "ResNet of bottlenecks": {"block": "bottleneck"},
            "ResNetV2": {"preactivation": True},
        }.items()
        for norm, norm_of in {
            "batch": {"norm": "batch"},
            "group": {"norm": "group", "num_groups": 4},
            "none": {"norm": "none"},
        }.items()
    },
    **{
        f"conv_resnet, norm {norm}": {"family": "conv_resnet", "image_size": 8, "norm": norm, "num_stages": 2}
        for norm in ("none", "batch", "layer")
    },
    "timm's ConvNeXt": {
        **{"family": "timm", "timm_name": "convnext_atto", "image_size": 8, "arguments": {"patch_size": 1}},
        **{"depth": 2, "base_depth": 1},
    },
    "timm's CaiT": {
        **{"family": "timm", "timm_name": "cait_xxs24_224", "image_size": 8, "arguments": {"patch_size": 2}},
        **{"head_dim": 8, "depth": 2, "base_depth": 1},
    },
    "mixture of experts": {
        **{"family": "moe_vit", "num_heads": 2, "patch_size": 2, "image_size": 8},
        **{"num_experts": 4, "base_num_experts": 2, "active_share": 0.5},
    },
}
FP32_ALWAYS: dict[str, dict[str, Any]] = {  # what they add to their streams is multiplied by fp32 numbers
    "own": {
        **{"family": "own", "builder": f"{stranger_network.__file__}:make_network", "image_size": 8, "in_channels": 3},
        **{"width": 32, "base_width": 16, "depth": 4, "base_depth": 2},
    },
    "probabilistic": {"family": "probabilistic", "patch_size": 2, "image_size": 8},
}


def run_of(name: str) -> RunConfig:
    raw = {
        "model": {**SIZE, **(MODELS | FP32_ALWAYS)[name]},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "data": {"name": "none", "root": "nowhere", "num_streams": 4},
        "train": {"samples": 64, "global_batch_size": 4, "precision": "bf16"},
    }
    return from_plain(RunConfig, raw, "test")


def stream_types(scaled: ScaledModel, images: Tensor) -> set[torch.dtype]:
    """Of what enters and leaves each block and of what each branch adds, in a pass under autocast whose branches are
    bf16."""
    of_branches = set()
    types = record_stream_types(scaled.network, scaled)
    for name, module in scaled.network.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and name not in scaled.branches:  # their ends are cast
            module.register_forward_hook(lambda module, inputs, output: of_branches.add(output.dtype))
    with autocast(CPU, torch.bfloat16):
        scaled.network(images)
    assert of_branches == {torch.bfloat16}
    return types


def record_stream_types(network: torch.nn.Module, scaled: ScaledModel) -> set[torch.dtype]:
    """Filled by each pass: the types of what enters and leaves each block, and of what each branch adds."""
    types = set[torch.dtype]()

    def record(module: Any, inputs: Any, output: Tensor) -> None:
        types.update({inputs[0].dtype, output.dtype})

    for block in scaled.blocks:
        network.get_submodule(block).register_forward_hook(record)
    for branch in scaled.branches:
        network.get_submodule(branch).register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
    return types


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*product(MODELS, (torch.float32, torch.bfloat16)), *((name, torch.float32) for name in FP32_ALWAYS)],
)
def test_the_residual_stream_has_the_stated_type_throughout(name: str, dtype: torch.dtype) -> None:
    config = run_of(name)
    scaled = build(config.model, ParameterizationConfig(name="mup" if name == "probabilistic" else "depth_mup"), 0)
    set_stream_type(scaled.network, scaled.blocks, scaled.branches, dtype)
    size = config.model.image_size
    assert stream_types(scaled, torch.randn(4, config.model.in_channels, size, size)) == {dtype}


@pytest.mark.parametrize("name", ["vit", "conv_resnet, norm none", "conv_resnet, norm batch", "ResNetV2, norm batch"])
def test_the_residual_stream_of_a_pack_is_fp32_too(name: str) -> None:
    config = run_of(name)
    replicas = Replicas([config, config], CPU, torch.bfloat16)
    types = record_stream_types(replicas.network, build_meta(config.model, config.parameterization))
    replicas.forward(torch.randn(1, 4, 1, config.model.image_size, config.model.image_size))
    assert types == {torch.float32}


def test_precisions_are_what_is_stated_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def stated(precision: str) -> TrainConfig:
        return TrainConfig(samples=8, global_batch_size=8, precision=precision)  # type: ignore[arg-type]

    assert TrainConfig(samples=8, global_batch_size=8).precision == "fp32"
    for device in (CPU, torch.device("cuda")):
        assert choose_autocast_dtype(stated("fp32"), device) is None
    assert choose_autocast_dtype(stated("bf16"), CPU) == torch.bfloat16
    with pytest.raises(UserError, match="precision is tf32, which a CPU lacks: use fp32"):
        choose_autocast_dtype(stated("tf32"), CPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")
    for has_bf16 in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has_bf16=has_bf16, **_: has_bf16)
        for precision, dtype in (("bf16", torch.bfloat16), ("tf32", None)):
            if has_bf16:
                assert choose_autocast_dtype(stated(precision), torch.device("cuda")) == dtype
            else:
                with pytest.raises(UserError, match=f"precision is {precision}, which Old GPU lacks: use fp32"):
                    choose_autocast_dtype(stated(precision), torch.device("cuda"))


def test_fp32_is_fp32_and_tf32_is_asked_for() -> None:
    for precision in ("tf32", "bf16", "tf32", "fp32"):
        set_tf32(TrainConfig(samples=8, global_batch_size=8, precision=precision))
        allowed = {torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32}
        assert allowed == {precision == "tf32"}


def test_auto_is_refused_with_what_to_write() -> None:
    with pytest.raises(UserError, match=r"precision: auto meant another result on another device: state bf16 .* fp32"):
        TrainConfig(samples=8, global_batch_size=8, precision="auto")  # type: ignore[arg-type]
