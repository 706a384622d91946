"""A study whose sizes differ in batch and samples: the exponent of the optimum, and a target that follows it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from depthmup.data.errors import UserError
from depthmup.launch.cli import cli
from depthmup.launch.config import Size
from depthmup.launch.findings.analysis import Result
from depthmup.launch.findings.training_exponents import Exponent, measure_exponents
from depthmup.launch.findings.verdict import analyse
from depthmup.launch.reading import read_run, read_study
from depthmup.launch.report.collect import collect
from depthmup.launch.runs.planned import compute_scaling
from depthmup.launch.runs.study import Study
from depthmup.models.build import build
from depthmup.models.optimizer import parameter_groups
from depthmup.train.config import run_hash

BASE = {"width": 8, "depth": 3}
BATCHES = [BASE, {**BASE, "batch": 64}, {**BASE, "batch": 128}]


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def with_study(study_file: Path, run: dict[str, Any] | None = None, **study: Any) -> Path:
    """The file with keys of its study, and sections of its run, replaced."""
    settings = yaml.safe_load(study_file.read_text())
    given = {"parameterizations": ["depth_mup"], "seeds": [0, 1, 2], "values": [2.0**-k for k in range(9, 0, -1)]}
    settings["study"] |= {**given, **study}
    for section, values in (run or {}).items():
        settings[section] = {**settings.get(section, {}), **values}
    study_file.write_text(yaml.safe_dump(settings))
    return study_file


def finish(study: Study, batch: float = 0.0, samples: float = 0.0, noise: float = 1e-3) -> None:
    """Marks every run done. The swept value's optimum is 2^-5 at the base and goes as these powers of the axes."""
    study.write()
    train = study.file.train
    for run in study.pending():
        ratios = (run.size.batch or 1) / train.global_batch_size, (run.size.samples or 1) / train.samples
        best = -5 + sum(
            power * math.log2(ratio) for power, ratio in zip((batch, samples), ratios, strict=True) if power
        )
        drawn = np.random.default_rng((run.seed, run.size.batch or 0, run.size.samples or 0, int(1 / run.value)))
        loss = 0.3 * math.exp(0.05 * (math.log2(run.value) - best) ** 2 + noise * drawn.standard_normal())
        run.directory.write_done({"outcome": "completed", "step": 12, "minival_loss": loss, "seconds": 1.0})


def simulated(true: float, rule: float, seed: int, bend: float = 0.0) -> Exponent:
    """What is measured over batches of 32 to 256 where the best rate goes as batch^true, and runs had batch^rule."""
    generator, results = np.random.default_rng(seed), []
    sizes = [Size(width=8, depth=3, batch=batch) for batch in (32, 64, 128, 256)]
    for octaves, size in enumerate(sizes):
        best = -5 + (true - rule) * octaves + bend * octaves**2
        for value in (2.0**-k for k in range(12, 0, -1)):
            for number in range(3):
                excess = 0.05 * (math.log2(value) - best) ** 2 + 0.005 * generator.standard_normal()
                results.append(Result("depth_mup", size, value, number, 0.3 * math.exp(excess)))
    (found,) = measure_exponents(analyse(results, sizes[0]), sizes[0], "optimizer.lr", {"depth_mup": {"batch": rule}})
    return found


@pytest.mark.parametrize(("true", "rule"), [(0.5, 0.5), (0.5, 1.0), (1.0, 0.0), (-1 / 3, 0.0)])
def test_a_known_exponent_is_recovered_within_its_interval(true: float, rule: float) -> None:
    held = 0
    for seed in range(6):
        found = simulated(true, rule, seed)
        assert found.measured == pytest.approx(true, abs=0.1)
        assert found.is_known
        assert found.interval
        held += found.interval[0] <= true <= found.interval[1]
    assert held >= 4  # of 6 intervals of 90 %


def test_a_wrong_exponent_of_the_rule_is_seen_and_a_right_one_is_not_blamed() -> None:
    wrong, right = simulated(0.5, 1.0, 0), simulated(0.5, 0.5, 0)
    assert wrong.agrees is False
    assert "batch^0.5" in str(wrong)
    assert "the rule has 1, which lies outside of it" in str(wrong)
    assert right.agrees is True


def test_optima_that_lie_on_no_power_law_give_no_exponent_to_use() -> None:
    bent = simulated(0.5, 0.5, 0, bend=0.3)
    assert not bent.is_known
    assert "the optima do not lie on one power law" in str(bent)


def test_an_optimum_on_an_edge_gives_no_exponent_and_is_named(study_file: Path) -> None:
    study = Study(study_file, read_study(with_study(study_file, sizes=BATCHES)))
    finish(study, batch=3)
    (found,) = collect(study).exponents
    assert found.measured is None
    assert "batch 128 has its optimum on the high edge" in str(found)


def test_each_size_trains_with_its_batch_and_samples_and_their_ratios_to_the_base(study_file: Path) -> None:
    before = {run_hash(run.config) for run in Study(study_file, read_study(with_study(study_file, sizes=[BASE]))).runs}
    sizes = [BASE, {**BASE, "batch": 64}, {**BASE, "samples": 768}, {"width": 16, "depth": 3, "batch": 64}]
    study = Study(study_file, read_study(with_study(study_file, sizes=sizes)))
    settings = {
        (run.size, train.global_batch_size, train.samples, optimizer.batch_ratio, optimizer.samples_ratio)
        for run in study.runs
        for train, optimizer in [(run.config.train, run.config.optimizer)]
    }
    assert settings == {
        (Size(width=8, depth=3, batch=32, samples=384), 32, 384, 1, 1),
        (Size(width=8, depth=3, batch=64, samples=384), 64, 384, 2, 1),
        (Size(width=8, depth=3, batch=32, samples=768), 32, 768, 1, 2),
        (Size(width=16, depth=3, batch=64, samples=384), 64, 384, 2, 1),
    }
    at_base = {run_hash(run.config) for run in study.runs if run.size == study.file.study.sizes[0]}
    assert at_base == before  # runs that were trained before the study had these axes are its base's


def test_parameterizations_that_differ_in_an_exponent_alone_share_the_base(study_file: Path) -> None:
    two = ["depth_mup", {"name": "depth_mup", "batch_lr": "1/2"}]
    study = Study(study_file, read_study(with_study(study_file, sizes=BATCHES, parameterizations=two)))
    points, runs = len(study.points), len(study.runs)
    assert (points, runs) == (2 * 3 * 27, (1 + 2 * 2) * 27)
    exponent = {run.config.parameterization.batch_lr for run in study.runs}
    assert exponent == {None, 0.5}


def test_values_that_a_curve_got_before_the_study_had_the_axis_stay(study_file: Path) -> None:
    study = Study(study_file, read_study(with_study(study_file, sizes=[BASE], extend=1)))
    study.write()
    assert study.grow({("depth_mup", study.file.study.sizes[0]): "low"})
    runs = {run.directory.path for run in study.runs}
    wider = Study(study_file, read_study(with_study(study_file, sizes=BATCHES, extend=1)))
    assert runs < {run.directory.path for run in wider.runs}


def test_the_report_says_the_exponent_the_rules_and_what_a_value_costs_that_is_carried_along_it(
    study_file: Path,
) -> None:
    study = Study(study_file, read_study(with_study(study_file, sizes=BATCHES)))
    finish(study, batch=-0.5)  # of the swept value; SGD's runs had batch^1, so that the best rate goes as batch^0.5
    report = collect(study)
    (exponent,) = report.exponents
    assert exponent.measured == pytest.approx(0.5, abs=0.05)
    assert report.along_exponents["depth_mup"].verdict == "transfers"
    assert report.analysis.judgements[0].verdict in ("costs", "does not transfer")  # by the rule's own exponent
    said = " ".join(invoke("report", study_file).split())
    assert f"the optimum of optimizer.lr goes as {exponent.power}" in said
    assert "the rule has 1, which lies outside of it" in said
    assert f"carried along {exponent.power}: transfers" in said
    root = study.file.directory
    (record,) = json.loads((root / "report.json").read_text())["exponents"]
    assert (record["axis"], record["rule"], record["is_known"]) == ("batch", 1.0, True)
    assert exponent.power in (root / "report.html").read_text()
    assert "128" in (root / "report.csv").read_text()


def test_scale_follows_the_measured_exponent_and_says_so_in_the_file(study_file: Path) -> None:
    study = Study(study_file, read_study(with_study(study_file, sizes=BATCHES)))
    finish(study, batch=-0.5)
    (exponent,) = collect(study).exponents
    assert exponent.measured is not None
    invoke("scale", study_file, "train.global_batch_size=256", "train.samples=3072")
    target = read_run(study.target_file)
    assert (target.optimizer.batch_ratio, target.optimizer.samples_ratio) == (8, 1)  # samples were not measured
    assert target.parameterization.batch_lr == round(exponent.measured, 3)
    carried = target.optimizer.lr
    assert math.log2(carried) == pytest.approx(-5, abs=0.05)
    scaled = build(target.model, target.parameterization, seed=0)
    groups = parameter_groups(scaled.network, scaled.rules, scaled.scale, target.optimizer)
    # by hand: 8 times the batch, 8^0.5 = 2.83 times the rate of every role: at the base's size nothing else moves it
    assert {round(group["lr"] / carried, 6) for group in groups} == {round(8 ** round(exponent.measured, 3), 6)}
    text = study.target_file.read_text()
    assert "# Batch 8 times the proxy's: scaled by the optimizer's rules, the learning rate times" in text
    assert f"by the measured batch^{round(exponent.measured, 3):g} (90% interval" in text
    assert "2 times beyond what was measured" in text
    assert "# Samples 8 times the proxy's, and nothing was scaled for that (--scale-batch does, by the rule" in text


def test_a_ladder_measures_the_whole_exponent_of_samples_and_scale_says_what_its_runs_had_alike(
    study_file: Path,
) -> None:
    sizes = [BASE, {**BASE, "samples": 768}, {**BASE, "samples": 1536}]
    run = {"schedule": {"name": "wsd", "warmup": 0.25, "decay": 0.25}}
    study = Study(study_file, read_study(with_study(study_file, run, sizes=sizes, ladder=True)))
    finish(study, samples=-0.3)
    (exponent,) = collect(study).exponents
    assert (exponent.axis, exponent.rule) == ("samples", 0)
    assert exponent.measured == pytest.approx(-0.3, abs=0.05)
    said = invoke("scale", study_file, "train.samples=3072")
    target = read_run(study.target_file)
    assert (target.optimizer.samples_ratio, target.parameterization.samples_lr) == (8, round(exponent.measured, 3))
    assert "the ladder's runs had one weight decay a step" in said


def test_without_a_measured_exponent_scale_uses_the_rules_own_and_says_so(study_file: Path) -> None:
    study = Study(study_file, read_study(with_study(study_file, sizes=[BASE, {"width": 8, "depth": 6}])))
    finish(study)
    said = invoke("scale", study_file, "train.global_batch_size=64", "--scale-batch")
    target = read_run(study.target_file)
    assert (target.optimizer.batch_ratio, target.parameterization.batch_lr) == (2, None)
    assert "the learning rate as batch^1, which the study did not measure." in said


def test_another_hyperparameter_than_the_rate_is_moved_itself(study_file: Path) -> None:
    swept = {"hyperparameter": "optimizer.weight_decay", "values": [2.0**-k for k in range(9, 2, -1)]}
    run = {"optimizer": {"weight_decay": 0.001, "name": "sgd", "lr": 0.0625}}
    study = Study(study_file, read_study(with_study(study_file, run, sizes=BATCHES, **swept)))
    finish(study, batch=-0.5)
    invoke("scale", study_file, "train.global_batch_size=128")
    target = read_run(study.target_file)
    assert target.optimizer.batch_ratio == 4
    assert math.log2(target.optimizer.weight_decay) == pytest.approx(-5 - 0.5 * 2, abs=0.1)


def test_a_study_over_the_batch_trains_on_digits(study_file: Path) -> None:
    few = {"sizes": BATCHES[:2], "values": [2.0**-6, 2.0**-5, 2.0**-4], "seeds": [0]}
    path = with_study(study_file, **few)
    said = invoke("plan", path)
    assert "width  depth  batch" in said
    assert "width 8, depth 3, batch 64" in said
    said = invoke("transfer", path, "launch.cluster=debug")
    assert "Report:" in said
    study = Study(path, read_study(path))
    steps = {(run.size.batch, (run.done() or {})["step"]) for run in study.runs}
    assert steps == {(32, 12), (64, 6)}


@pytest.mark.parametrize(
    ("study", "run", "message"),
    [
        (
            {"sizes": [{**BASE, "batch": 64}, {**BASE, "batch": 32}]},
            {},
            "must be the base: leave its batch out, or state",
        ),
        ({"sizes": BATCHES}, {"model": {"norm": "batch"}}, r"BatchNorm .* State train\.batch_norm_images=32"),
        (
            {"sizes": [BASE, {"width": 16, "depth": 3}], "parameterizations": [{"samples_lr": -0.5}]},
            {},
            "samples_lr would do nothing: no two of study.sizes differ in samples",
        ),
        ({"sizes": BATCHES, "hyperparameter": "optimizer.batch_ratio"}, {}, "is the batch of study.sizes, too"),
        ({"sizes": [BASE, {**BASE, "batch": 40}]}, {}, "batch 40.*num_streams"),
    ],
    ids=["base", "batch_norm", "idle", "swept", "streams"],
)
def test_axes_that_do_not_go_together_are_refused_with_what_to_do(
    study: dict[str, Any], run: dict[str, Any], message: str, study_file: Path
) -> None:
    path = with_study(study_file, run, **study)
    with pytest.raises(UserError, match=message) as error:
        invoke("plan", path)
    assert "\n" not in str(error.value)


EXPERTS = {
    "model": {
        **{"family": "moe_vit", "width": 8, "depth": 3, "base_width": 8, "base_depth": 3, "head_dim": 8},
        **{"num_experts": 4, "base_num_experts": 1, "active_share": 0.25, "mlp_ratio": 2, "base_mlp_ratio": 2},
        **{"patch_size": 4, "num_classes": 10, "image_size": 8, "in_channels": 1},
    },
    "optimizer": {"name": "adamw", "lr": 2.0**-5},
}
MIXTURES = [{**BASE, "num_experts": number} for number in (1, 4, 8)]


def experts_study(study_file: Path, model: dict[str, Any] | None = None, **study: Any) -> Path:
    """Of a dense ViT and of mixtures of experts."""
    settings = yaml.safe_load(study_file.read_text())
    study_file.write_text(yaml.safe_dump({key: value for key, value in settings.items() if key not in EXPERTS}))
    run = EXPERTS | {"model": EXPERTS["model"] | (model or {})}
    return with_study(study_file, run, **{"sizes": MIXTURES, **study})


def test_each_size_has_its_number_of_experts_and_the_dense_network_is_the_base(study_file: Path) -> None:
    study = Study(study_file, read_study(experts_study(study_file)))
    found = {(run.size.num_experts, model.num_experts) for run in study.runs for model in [run.config.model]}
    assert found == {(1, 1), (4, 4), (8, 8)}
    assert {compute_scaling(run.config)[0].experts_ratio for run in study.runs} == {1, 4, 8}
    finish(study)
    assert collect(study).analysis.judgements[0].verdict == "transfers"
    assert "experts 8" in " ".join(invoke("report", study_file).split())
    assert "width  depth  num_experts" in invoke("plan", study_file)


def test_values_and_seeds_that_are_added_keep_the_number_of_experts(study_file: Path) -> None:
    study = Study(study_file, read_study(experts_study(study_file, extend=1, more_seeds=1)))
    study.write()
    largest = ("depth_mup", study.file.study.sizes[-1])
    before = {run.directory.path for run in study.runs}
    assert study.grow({largest: "low"})
    assert study.add_seeds({largest: [2.0**-5]})
    added = [run for run in Study(study_file, read_study(study_file)).runs if run.directory.path not in before]
    assert added
    assert {run.size.num_experts for run in added} == {8}


def test_a_law_over_width_and_depth_foretells_no_other_mixture(study_file: Path) -> None:
    shapes = [{**BASE, "depth": depth} for depth in (3, 6, 12)]
    study = Study(study_file, read_study(experts_study(study_file, sizes=shapes)))
    finish(study)
    said = invoke("scale", study_file, "model.num_experts=8", "model.depth=24")
    assert "none: the target differs from the study in num_experts 4 -> 8" in " ".join(said.split())
    both = [{**shape, "num_experts": 1} for shape in shapes] + MIXTURES[1:]
    study = Study(study_file, read_study(experts_study(study_file, sizes=both, name="both")))
    finish(study)
    assert {(each.target.depth, each.target.num_experts) for each in collect(study).forecasts} == {(12, 1)}
    said = " ".join(invoke("scale", study_file, "model.num_experts=8", "model.depth=24").split())
    assert "differs from the study" not in said
    assert "none: the smaller sizes do not differ in depth" in said


@pytest.mark.parametrize(
    ("sizes", "model", "words"),
    [
        (MIXTURES, {"base_num_experts": 2}, r"must be the base: state num_experts 2, which is model\.base_num_experts"),
        (MIXTURES[1:], {}, r"must be the base: state num_experts 1, which is model\.base_num_experts"),
        ([*MIXTURES, {**BASE, "num_experts": 3}], {}, "of num_experts 3 is no whole number of experts"),
    ],
)
def test_sizes_whose_experts_do_not_fit_are_refused(
    study_file: Path, sizes: list[dict[str, int]], model: dict[str, Any], words: str
) -> None:
    path = experts_study(study_file, model, sizes=sizes)
    with pytest.raises(UserError, match=words):
        list(Study(path, read_study(path)).runs)


def test_experts_are_an_axis_of_a_mixture_alone(study_file: Path) -> None:
    with pytest.raises(UserError, match=r"num_experts is of family moe_vit, and model\.family is conv_resnet"):
        read_study(with_study(study_file, sizes=MIXTURES))
