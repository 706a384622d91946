"""`parameterization.name: auto`: what published studies say of a kind of network, and nothing where none does."""

import math
from pathlib import Path
from typing import Any

import pytest

from depthmup.data.errors import UserError
from depthmup.launch.config import show_label
from depthmup.launch.reading import read_study
from depthmup.launch.report.record import read_record
from depthmup.models.build import build_meta
from depthmup.models.config import AnyModelConfig, ConvResNetConfig, VisionTransformerConfig
from depthmup.models.errors import ModelError
from depthmup.models.parameterization import AUTO
from depthmup.models.parameterization_config import ParameterizationConfig, find_kind
from depthmup.train.config import RunConfig, find_identity
from depthmup.train.reading import from_plain, to_yaml

RESULTS = Path(__file__).parents[1] / "docs/results"
AUTOMATIC = ParameterizationConfig(name="auto")
SHAPE: dict[str, Any] = {"width": 32, "depth": 12, "base_width": 16, "base_depth": 3, "image_size": 32}
NETWORKS: list[tuple[AnyModelConfig, str]] = [
    (ConvResNetConfig(**SHAPE), "sgd"),
    (ConvResNetConfig(**SHAPE, convs_per_branch=2), "sgd"),
    (VisionTransformerConfig(**SHAPE, head_dim=16, patch_size=4), "adamw"),
]


def named(choice: ParameterizationConfig) -> list[str]:
    """Its labels in the published studies, where beta has five digits."""
    beta = float(f"{choice.beta:.5f}")
    return [show_label(ParameterizationConfig(name=choice.name, beta=beta, eps_scaling=eps)) for eps in (None, "table")]


def worst_bound(record: dict[str, Any], name: str) -> float:
    """What the carried value costs at most at any size, as a share of the loss; infinite where that is not known."""
    sizes = [each for each in record["sizes"] if each["parameterization"] == name]
    everywhere = len(sizes) == len({(each["width"], each["depth"]) for each in record["sizes"]})
    bounds = [each["regret_bound"] for each in sizes]
    return math.inf if not everywhere or None in bounds else max(bounds)


@pytest.mark.parametrize(("model", "optimizer"), NETWORKS)
def test_every_choice_is_what_its_studies_know_to_cost_least(model: AnyModelConfig, optimizer: str) -> None:
    choice, row = AUTOMATIC.choose(model, optimizer), AUTO[find_kind(model), optimizer]
    assert row.studies
    for study in row.studies:
        record = read_record(RESULTS / f"{study}.json")
        assert (record["model"], record["optimizer"], record["base"]["depth"]) == (model.family, optimizer, 3)
        bounds = {
            each["parameterization"]: worst_bound(record, each["parameterization"]) for each in record["verdicts"]
        }
        (own,) = (name for name in named(choice) if name in bounds)
        assert math.isfinite(bounds[own])
        assert bounds[own] == min(bounds.values())


def test_every_row_has_a_network_here() -> None:
    assert {(find_kind(model), optimizer) for model, optimizer in NETWORKS} == AUTO.keys()


def test_a_run_is_what_auto_meant_and_not_its_name(run_settings: dict[str, Any]) -> None:
    automatic = from_plain(RunConfig, run_settings | {"parameterization": {"name": "auto"}}, "auto")
    chosen = AUTOMATIC.choose(automatic.model, automatic.optimizer.name)
    stated = from_plain(RunConfig, run_settings | {"parameterization": {**vars(chosen)}}, "stated")
    assert chosen.name != "auto"
    assert find_identity(automatic) == find_identity(stated)
    assert "name: auto" not in to_yaml(automatic)


def test_a_study_compares_what_auto_meant_and_counts_it_once(study_file: Path) -> None:
    """A report names it so too: its parameterizations are the study's."""
    chosen = read_study(study_file, ("study.parameterizations=[auto]",)).study.parameterizations
    assert [each.name for each in chosen] != ["auto"]
    twice = f"study.parameterizations=[sp, auto, {{name: {chosen[0].name}, beta: {chosen[0].beta!r}}}]"
    assert [each.name for each in read_study(study_file, (twice,)).study.parameterizations] == ["sp", chosen[0].name]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": {"name": "adamw", "lr": 0.01}}, "1 layer a branch under adamw"),
        ({"model": {"norm": "batch"}}, "conv_resnet with batch norm"),
        ({"model": {"convs_per_branch": 3}}, "3 layers a branch under sgd"),
    ],
)
def test_without_a_study_of_such_networks_auto_is_refused(
    run_settings: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    raw = run_settings | {"parameterization": {"name": "auto"}}
    raw |= {name: (run_settings[name] if name == "model" else {}) | section for name, section in changes.items()}
    with pytest.raises(UserError) as error:
        from_plain(RunConfig, raw, "my.yaml")
    assert "parameterization auto has no evidence for" in str(error.value)
    assert words in str(error.value)
    assert "name a preset" in str(error.value)
    assert "\n" not in str(error.value)


def test_auto_takes_no_exponent_beside_it_and_no_place_without_an_optimizer(run_settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="auto chooses alpha and beta itself"):
        from_plain(RunConfig, run_settings | {"parameterization": {"name": "auto", "alpha": 1, "beta": 0.5}}, "x")
    with pytest.raises(ModelError, match="depends on the model and the optimizer"):
        build_meta(NETWORKS[0][0], AUTOMATIC)
