"""The formulas that spare a plan the import of torch say what torch counts."""

from pathlib import Path

import pytest

from depthmup.launch.reading import read_study
from depthmup.launch.runs.cost import count_flops, locate_cache
from depthmup.launch.runs.flops import count_by_formula
from depthmup.launch.runs.study import Study
from depthmup.models.build import build_meta
from depthmup.models.config import AnyModelConfig, ConvResNetConfig, ResNetConfig, VisionTransformerConfig
from depthmup.models.flops import count_forward_flops, count_parameters
from depthmup.models.parameterization_config import ParameterizationConfig

SMALL = {"width": 64, "depth": 6, "base_width": 64, "base_depth": 3, "num_classes": 10, "image_size": 32}
VIT = {**SMALL, "patch_size": 4}


@pytest.mark.parametrize(
    "model",
    [
        ConvResNetConfig(**SMALL),
        ConvResNetConfig(**{**SMALL, "image_size": 9, "in_channels": 1}, convs_per_branch=2, norm="batch"),
        VisionTransformerConfig(**VIT, head_dim=16),
        VisionTransformerConfig(
            **VIT, num_heads=2, class_token=False, global_pool="avg", mlp_ratio=2.5, qk_norm=True, layer_scale=1e-5
        ),
        VisionTransformerConfig(
            width=64, depth=2, base_width=64, base_depth=2, head_dim=64, timm_name="deit_tiny_patch16_224"
        ),
    ],
    ids=lambda model: model.family,
)
def test_the_formula_equals_the_count(model: AnyModelConfig) -> None:
    network = build_meta(model, ParameterizationConfig()).network
    shape = (model.in_channels, model.image_size, model.image_size)
    assert count_by_formula(model) == (count_parameters(network), count_forward_flops(network, shape))


def test_other_networks_are_left_to_torch() -> None:
    assert count_by_formula(ResNetConfig(width=64, depth=4, base_width=64, base_depth=4)) is None
    registers = VisionTransformerConfig(**VIT, head_dim=16, timm_name="vit_base_patch14_reg4_dinov2")
    assert count_by_formula(registers) is None


def test_counts_are_kept_on_disk_and_a_damaged_file_of_them_only_costs_time(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    runs = Study(study_file, read_study(study_file)).runs
    counted = count_flops(runs)
    kept = locate_cache().read_text()
    for damaged in ("", "[]", kept[:-9]):
        locate_cache().write_text(damaged)
        assert count_flops(runs) == counted
        assert locate_cache().read_text() == kept
    monkeypatch.setattr("depthmup.launch.runs.cost.count_network", None)  # not asked again
    assert count_flops(runs) == counted
