"""Any of timm's networks with width and depth of its own is a family: it is built, checked, trained and exported."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import depthmup.models.torchvision_ops  # noqa: F401  isort: skip  (must run before timm)
import timm

from depthmup.models import ParameterizationConfig, Size
from depthmup.models import parameterization as rules
from depthmup.models.build import build, build_meta
from depthmup.models.check_record import Position, list_positions
from depthmup.models.config import TimmConfig
from depthmup.models.coordinate_check import Line, Settings, align, check, select_positions, subtract_bias
from depthmup.models.discovery.branches import find_branches
from depthmup.models.discovery.trace import trace
from depthmup.models.errors import ModelError
from depthmup.models.export import folded_state
from depthmup.models.optimizer_config import OptimizerConfig
from depthmup.models.parameterization import Role, Scale
from depthmup.models.timm_registry import find_timm_call
from depthmup.train.loop import run
from train_configs import losses, pack_digits, run_config

COMPLETEP = ParameterizationConfig(name="completep")
CONVNEXT = TimmConfig(
    **{"timm_name": "convnext_atto", "width": 16, "depth": 1, "base_width": 16, "base_depth": 1},
    **{"image_size": 8, "num_classes": 10, "in_channels": 1, "arguments": {"patch_size": 1}},
)
SWIN = TimmConfig(
    **{"timm_name": "swinv2_tiny_window8_256", "width": 32, "depth": 2, "base_width": 16, "base_depth": 1},
    **{"image_size": 32, "num_classes": 10, "head_dim": 16, "arguments": {"window_size": 4, "patch_size": 2}},
)
LONG = pytest.mark.long


def off(lines: list[Line]) -> set[str]:
    return {f"{line.axis} {line.quantity}" for line in lines if line.verdict != "ok"}


def short_check() -> set[str]:
    settings = Settings(factors=(1, 4), steps=1, num_seeds=2)
    return off(check(CONVNEXT, COMPLETEP, OptimizerConfig(name="adamw", lr=1e-3), settings))


def test_convnext_passes_the_coordinate_check_over_width_and_depth() -> None:
    assert short_check() == set()


@pytest.mark.parametrize(
    ("fault", "caught"),
    [
        (("branch_multiplier", lambda self: 1.0), "depth branch"),
        (("readout_multiplier", lambda self: 1.0), "width logits"),
    ],
    ids=["no branch multiplier", "no readout multiplier"],
)
def test_a_fault_in_a_multiplier_is_caught(
    fault: tuple[str, Callable[[Scale], float]], caught: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scale, *fault)
    assert caught in short_check()


def test_a_fault_in_the_rate_of_hidden_weights_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(rules.TABLE[Role.BRANCH_HIDDEN], lr_adam=lambda N, L, a: 1.0)
    monkeypatch.setitem(rules.TABLE, Role.BRANCH_HIDDEN, row)
    assert any("width branch_hidden" in line for line in short_check())


def test_buffers_that_timm_computes_are_kept() -> None:
    scaled = build(SWIN, COMPLETEP, seed=0)
    plain = timm.create_model(find_timm_call(SWIN)[0], **find_timm_call(SWIN)[1])
    buffers = dict(plain.named_buffers(remove_duplicate=False))
    assert buffers
    for name, buffer in scaled.network.named_buffers(remove_duplicate=False):
        assert torch.equal(buffer, buffers[name]), name


def test_initial_weights_are_a_function_of_the_seed() -> None:
    first, again, other = (build(CONVNEXT, COMPLETEP, seed).network.stem[0].weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_run_by_configuration_trains(tmp_path: Path) -> None:
    model: dict[str, Any] = {"family": "timm", "timm_name": "convnext_atto", "width": 8, "depth": 1}
    model |= {"base_width": 8, "base_depth": 1, "arguments": {"patch_size": 1}}
    overrides = ("optimizer.name=adamw", "optimizer.lr=0.003", "parameterization.name=completep")
    run(run_config(pack_digits(tmp_path / "digits"), *overrides, model=model), tmp_path / "run")
    trained = losses(tmp_path / "run")
    assert sum(trained[-5:]) < 0.95 * sum(trained[:5])


def test_exported_weights_give_the_plain_network_the_same_outputs() -> None:
    larger = replace(CONVNEXT, width=32, depth=2)
    scaled = build(larger, COMPLETEP, seed=0)
    assert scaled.multipliers
    name, arguments = find_timm_call(larger)
    plain = timm.create_model(name, **arguments)
    plain.load_state_dict(folded_state(scaled))
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain.eval()(images), scaled.network.eval()(images))


def test_an_export_that_timm_has_no_call_for_is_refused() -> None:
    mixer = TimmConfig(
        timm_name="resmlp_12_224", width=32, depth=2, base_width=16, base_depth=1, image_size=64, num_classes=10
    )
    build_meta(mixer, COMPLETEP)
    with pytest.raises(ModelError, match=r"cannot export: timm.create_model\('resmlp_12_224'\) takes no size"):
        find_timm_call(mixer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timm_name": "convnext_ato"}, "unknown to timm; nearest: convnext_atto"),
        ({"timm_name": "vgg11"}, "vgg11 at width 16 and depth 1: no argument of its class is a width"),
        ({"width": 12, "base_width": 12, "timm_name": "tiny_vit_5m_224", "head_dim": 4}, "5 times 3/2 is no whole"),
        ({"timm_name": "convnext_atto.d2_in1k"}, "has a tag of weights"),
        ({"head_dim": 16}, "head_dim would do nothing"),
        ({"arguments": {"dims": [1, 2, 3, 4]}}, "dims follows from the model's other keys"),
        ({"arguments": {"pach_size": 2}}, "timm cannot build convnext_atto"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_meta(replace(CONVNEXT, **changes), COMPLETEP)


def test_heads_need_their_dimension() -> None:
    with pytest.raises(ModelError, match="state head_dim"):
        build_meta(replace(SWIN, head_dim=None), COMPLETEP)


def test_heads_grow_with_width() -> None:
    assert SWIN.size == Size(width=32, depth=2)
    scaled = build_meta(SWIN, COMPLETEP)
    assert not scaled.roles.queries
    assert scaled.network.layers[0].blocks[0].attn.num_heads == 2


def test_as_many_positions_are_compared_where_blocks_are_no_multiple_of_the_bases() -> None:
    """As in networks with a block of their own between stages, of which a deeper one has no more."""
    values = [float(number) for number in range(13)]
    assert select_positions(values, 4, "stream") == [2, 5, 8, 12]
    assert select_positions(values, 4, "branch") == [0, 3, 6, 9]
    assert select_positions(values[:12], 4, "stream") == [2, 5, 8, 11]


def test_positions_are_compared_container_by_container() -> None:
    """As in networks whose class attention has as many blocks at every depth."""
    names = [f"blocks.{number}.ls1" for number in range(6)] + ["token.0.ls1", "token.1.ls1"]
    deep = list_positions(names, [name.removesuffix(".ls1") for name in names])
    base = [deep[0], deep[1], *deep[6:]]
    assert [position[0] for position in base] == ["blocks.#.ls1"] * 2 + ["token.#.ls1"] * 2
    values = {position: float(number) for number, position in enumerate(deep)}
    assert align(values, dict.fromkeys(base, 0.0), "branch") == [0, 3, 6, 7]
    assert align(values, dict.fromkeys(base, 0.0), "stream") == [2, 5, 6, 7]


def test_positions_of_blocks_that_take_turns_are_the_nearest_of_the_same_kind() -> None:
    names = [f"blocks.{number}" for number in range(8)]
    kinds = {name: "ab"[number % 2] for number, name in enumerate(names)}
    values = {position: float(number) for number, position in enumerate(list_positions(names, names, kinds))}
    base = dict.fromkeys(list_positions(names[:2], names[:2], kinds), 0.0)
    assert align(values, base, "branch") == [0, 3]  # a half of the blocks before it: 4, which is of the other kind
    assert align(values, base, "stream") == [2, 7]
    without = {position._replace(kind=""): value for position, value in values.items()}
    assert align(without, {position._replace(kind=""): 0.0 for position in base}, "stream") == [3, 7]


def test_the_streams_positions_are_not_those_of_a_kind_that_a_deeper_network_has_no_more_of() -> None:
    """As of a stage's first block, which alone has a projection."""
    names = [f"stage.{number}" for number in range(8)]
    kinds = {name: "a" if number == 0 else "b" for number, name in enumerate(names)}
    values = {position: float(number) for number, position in enumerate(list_positions(names, names, kinds))}
    base = dict.fromkeys(list_positions(names[:2], names[:2], kinds), 0.0)
    assert align(values, base, "stream") == [3, 7]
    assert align(values, base, "branch") == [0, 4]


def test_what_acts_on_the_stream_once_at_every_depth_parts_its_positions() -> None:
    """As the position encoding behind a stage's first block: before it there is one position at every depth."""

    def stream(count: int, before: Callable[[int], int]) -> dict[Position, float]:
        return {Position("blocks.#", number, before=before(number)): float(number) for number in range(count)}

    def once(number: int) -> int:
        return min(number, 1)

    assert align(stream(8, once), stream(2, once), "stream") == [0, 7]
    every = stream(8, lambda number: number)  # between any two blocks
    assert align(every, stream(2, once), "stream") == [3, 7]


def test_a_head_dim_that_grows_with_width_gives_the_queries_a_multiplier() -> None:
    config = TimmConfig(
        timm_name="iformer_t", width=64, depth=2, base_width=32, base_depth=1, num_classes=10, image_size=64
    )
    scaled = build_meta(config, COMPLETEP)
    queries = [name for name in scaled.multipliers if name.endswith(".q")]
    assert queries
    assert {scaled.multipliers[name].value for name in queries} == {2**-0.5}


def test_a_readouts_bias_that_is_drawn_is_no_mean_over_the_width() -> None:
    drawn = replace(CONVNEXT, arguments={**CONVNEXT.arguments, "head_init_scale": 1.0})
    scaled = build(drawn, COMPLETEP, seed=0)
    torch.nn.init.ones_(scaled.network.head.fc.bias)
    logits = torch.randn(2, 10)
    torch.testing.assert_close(subtract_bias(logits, scaled), logits - 1)


@pytest.mark.parametrize(
    ("name", "head_dim", "width"),
    [
        *[("gernet_s", None, 48), ("mvitv2_tiny", 16, 32), ("nf_resnet26", None, 32), ("xcit_nano_12_p16_224", 16, 32)],
        pytest.param("efficientnet_b0", None, 32, marks=LONG),
        pytest.param("regnetx_002", None, 32, marks=LONG),
        pytest.param("mobilevit_s", None, 32, marks=LONG),
        pytest.param("lcnetv2_base", None, 64, marks=LONG),
        pytest.param("cspresnet50", None, 64, marks=LONG),
    ],
)
def test_sizes_that_lie_in_a_configuration_of_timms_are_changed_there(
    name: str, head_dim: int | None, width: int
) -> None:
    shape: dict[str, Any] = {"num_classes": 10, "image_size": 64, "head_dim": head_dim}
    depth = 2 if name == "lcnetv2_base" else 1  # whose later blocks of a stage are of another kind than the first
    config = TimmConfig(timm_name=name, width=2 * width, depth=2 * depth, base_width=width, base_depth=depth, **shape)
    scaled = build_meta(config, COMPLETEP)
    assert scaled.branches
    widest = max(parameter.shape[0] for parameter in build_at_base(config).parameters())
    assert max(parameter.shape[0] for parameter in scaled.network.parameters()) == 2 * widest
    assert len(scaled.blocks) > len(build_meta(replace(config, depth=depth), COMPLETEP).blocks)


def build_at_base(config: TimmConfig) -> torch.nn.Module:
    return build_meta(replace(config, width=config.base_width, depth=config.base_depth), COMPLETEP).network


NOT_RESIDUAL = {  # whose sums, if they have any, are none of a stream and a branch
    "concatenates": ["densenet121", "inception_v3", "inception_v4", "rdnet_tiny", "selecsls42"],
    "has no shortcuts": ["vgg11"],
    "concatenates cells": ["nasnetalarge", "pnasnet5large"],
}


def every(module: str) -> bool:
    return True


@pytest.mark.parametrize("name", [name for names in NOT_RESIDUAL.values() for name in names])
def test_modules_that_do_not_count_as_residual_have_no_residual_stream(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
    nodes = trace(network, (torch.zeros(2, 3, 299, 299),))
    if name in NOT_RESIDUAL["concatenates cells"]:
        with pytest.raises(ModelError, match="neither addend alone is the residual stream"):
            find_branches(nodes, every)
    else:
        assert find_branches(nodes, every) == []


def test_a_residual_network_has_a_stream_in_the_same_look() -> None:
    with torch.device("meta"):
        network = timm.create_model("resnet18")
    assert len(find_branches(trace(network, (torch.zeros(2, 3, 64, 64),)), every)) == 8
