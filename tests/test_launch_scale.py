"""From a finished study to the target's configuration, and grids that grow, on studies whose results are known."""

import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from depthmup.data.errors import UserError
from depthmup.launch.cli import cli
from depthmup.launch.findings.verdict import find_wanted_seeds
from depthmup.launch.reading import read_run, read_study, read_study_or_run
from depthmup.launch.report.collect import collect, describe_targets
from depthmup.launch.runs.foretold import forecast_file
from depthmup.launch.runs.study import Study
from depthmup.launch.scale import WITHOUT_RULE
from depthmup.launch.transfer import grow


def finish(study: Study, best: float, moves: str = "sp", noise: float = 0.0) -> None:
    """Marks every run done, with a loss that is lowest at 2^best, under `moves` half an octave lower a layer."""
    study.write()
    for run in study.pending():
        moved = best - (run.size.depth - run.config.model.base_depth) / 2 * (run.parameterization == moves)
        loss = 0.3 * math.exp(0.05 * (math.log2(run.value) - moved) ** 2 + 0.001 * run.seed)
        loss *= 1 + noise * np.random.default_rng((run.seed, run.size.depth, int(1 / run.value))).standard_normal()
        result = {"outcome": "completed", "step": 12, "minival_loss": loss, "seconds": 1.0}
        run.directory.write_done(result)


def invoke(*arguments: object) -> str:
    """Standard output of a command. Raises what the command raises."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def two_seeds(study_file: Path) -> None:
    """With one, no verdict is possible."""
    settings = yaml.safe_load(study_file.read_text())
    settings["study"]["seeds"] = [0, 1]
    study_file.write_text(yaml.safe_dump(settings))


def test_scale_writes_a_configuration_that_carries_the_optimum_to_another_size(study_file: Path) -> None:
    two_seeds(study_file)
    finish(Study(study_file, read_study(study_file)), best=-5.2)
    out = study_file.parent / "large.yaml"
    arguments = ("model.width=16", "model.depth=12", "--parameterization", "depth_mup", "--out", out)
    said = invoke("scale", study_file, *arguments)
    large = yaml.safe_load(out.read_text())
    assert math.log2(large["optimizer"]["lr"]) == pytest.approx(-5.2, abs=0.05)
    assert (large["model"]["width"], large["model"]["depth"], large["model"]["base_width"]) == (16, 12, 8)
    assert large["parameterization"]["name"] == "depth_mup"
    assert "transfers" in said
    assert "1 run " in invoke("plan", out)  # the written file is a configuration that the other commands take
    invoke("scale", study_file, *arguments, "launch.max_running=3")  # the same run, launched otherwise
    assert yaml.safe_load(out.read_text()) == {**large, "launch": {"max_running": 3}}
    out.write_text(yaml.safe_dump({**large, "seed": 7}))
    with pytest.raises(UserError, match=r"exists and differs: .* start it as it is: depthmup launch "):
        invoke("scale", study_file, *arguments)


def test_a_censored_study_is_refused_unless_forced(study_file: Path) -> None:
    finish(Study(study_file, read_study(study_file)), best=-8)
    with pytest.raises(UserError, match=rf"^{re.escape(str(study_file))}: .*on the low edge"):
        invoke("scale", study_file)
    assert "censored on the low edge" in invoke("scale", study_file, "--force")


def test_an_open_side_of_an_interval_is_shown_as_the_value_that_it_is(study_file: Path) -> None:
    rate = read_study(study_file).study
    momentum = read_study(
        study_file,
        ("optimizer.momentum=0.9", "study.hyperparameter=optimizer.momentum", "study.values=[0.5, 0.75, 0.9]"),
    ).study
    assert [rate.show(octaves) for octaves in (-math.inf, -3, math.inf)] == ["0", "2^-3.0", "inf"]
    assert momentum.show(-math.inf) == "1"


def test_scale_batch_hands_the_ratios_to_the_optimizer_which_knows_the_rule(study_file: Path) -> None:
    two_seeds(study_file)
    adamw = ("optimizer={name: adamw, lr: 0.01}", "study.name=adamw")
    study = Study(study_file, read_study(study_file, adamw))
    finish(study, best=-5)
    larger = ("train.global_batch_size=128", f"train.samples={16 * 12 * 32}", "--scale-batch")
    invoke("scale", study.file.directory, *larger)
    optimizer = read_run(study.target_file).optimizer
    assert (optimizer.batch_ratio, optimizer.samples_ratio) == (4, 16)
    assert optimizer.scaled_betas[1] == 1 - 0.001 / 4
    with pytest.raises(UserError, match=r", scaled to \w+: .*make a beta of \(0.9, 0.999\) negative: use beta_scaling"):
        invoke("scale", study.file.directory, "train.global_batch_size=384", "--scale-batch")


def test_a_study_that_was_run_with_overrides_is_found_by_its_folder(study_file: Path) -> None:
    two_seeds(study_file)
    study = Study(
        study_file, read_study(study_file, ("study.values=[2**-7, 2**-6, 2**-5, 2**-4, 2**-3]", "study.name=other"))
    )
    finish(study, best=-5)
    folder = study.file.directory
    with pytest.raises(UserError, match=f"its folder instead: {folder}"):
        invoke("scale", study_file, "study.name=other")
    said = invoke("scale", folder, "model.depth=12", "--parameterization", "depth_mup")
    target = folder / "other_target.yaml"
    assert said.startswith("other_target: conv_resnet of width 8 and depth 12 (1 and 4 times the base's), depth_mup.")
    assert target.read_text().startswith("# other_target: conv_resnet")
    of_study, _, of_target = invoke("status", folder).partition(f"\nTarget: {folder.parent / 'other_target'}\n")
    assert of_study == "30 done\n"  # the base is shared
    assert of_target.endswith("1 new\n")
    assert "1 new" in invoke("status", target)


def test_a_profile_on_the_command_line_holds_for_a_folder_and_a_target_whatever_they_ran_on_before(
    study_file: Path,
) -> None:
    two_seeds(study_file)
    profiles = study_file.parent / "runs" / "tiny" / "cluster"
    profiles.mkdir(parents=True)
    (profiles / "mine.yaml").write_text("partition: gpu_of_mine\naccount: us\ntimeout_min: 77\n")
    (profiles / "other.yaml").write_text("partition: elsewhere\n")
    study = Study(study_file, read_study(study_file))
    finish(study, best=-5)
    invoke("scale", study_file, "model.depth=12", "--parameterization", "depth_mup")
    assert "launch" not in yaml.safe_load(study.target_file.read_text())  # a default there would win over a profile
    script = invoke("launch", study.target_file, "--cluster", "mine", "launch.account=them", "--dry-run")
    assert "--partition=gpu_of_mine" in script
    assert "--time=77" in script
    assert "--account=them" in script  # what is on the command line wins

    folder = study.file.directory
    Study(folder, read_study(study_file, ("launch.cluster=slurm", "launch.account=old", "launch.qos=old"))).write()
    next(study.file.directory.glob("runs/*/done.json")).unlink()
    profiles.rename(folder.parent / "cluster")
    script = invoke("launch", folder, "--cluster", "other", "--dry-run")
    assert "--partition=elsewhere" in script
    assert "old" not in script
    assert "--account=old" in invoke("launch", folder, "--cluster", "slurm", "--dry-run")  # the same: its own keys


def test_a_target_that_the_optimum_does_not_belong_to_is_refused_by_what_differs(study_file: Path) -> None:
    two_seeds(study_file)
    finish(Study(study_file, read_study(study_file)), best=-5)
    wrong = ("model.base_depth=6", "optimizer.name=adamw", "schedule.name=constant")
    differs = "model.base_depth 3 -> 6, optimizer.name sgd -> adamw, schedule.name cosine -> con"
    with pytest.raises(UserError, match=rf"^{re.escape(str(study_file))}: .*{differs}"):
        invoke("scale", study_file, *wrong)
    invoke("scale", study_file, *wrong, "--force")


FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # the proxy, and another value of each of its keys
    "conv_resnet": (
        {"family": "conv_resnet"},
        {
            "num_classes": 20,
            "activation": "tanh",
            "image_size": 16,
            "in_channels": 3,
            "num_stages": 1,
            "convs_per_branch": 2,
            "norm": "layer",
        },
    ),
    "resnet": (
        {"family": "resnet", "base_depth": 4, "depth": 4, "base_width": 16, "width": 16},
        {
            **{"num_classes": 20, "image_size": 16, "in_channels": 3, "block": "bottleneck", "preactivation": True},
            **{"norm": "none", "num_groups": 8},
        },
    ),
    "vit": (
        {"family": "vit", "patch_size": 2, "head_dim": 4, "mlp_ratio": 4.0},
        {
            **{"num_classes": 20, "image_size": 16, "in_channels": 3, "patch_size": 4, "mlp_ratio": 2.0, "head_dim": 8},
            **{"qk_norm": True, "layer_scale": 0.1, "timm_name": "vit_small_patch16_224", "class_token": True},
            **{"global_pool": "avg"},
        },
    ),
}
WITH_RULES = {"width", "depth", "base_width", "base_depth", "family", "blocks", "num_heads"}


@pytest.mark.parametrize("family", FAMILIES)
def test_scale_refuses_by_name_every_change_of_the_model_that_no_rule_covers(family: str, study_file: Path) -> None:
    model, others = FAMILIES[family]
    settings = yaml.safe_load(study_file.read_text())
    settings["model"] |= model
    base = {"width": settings["model"]["base_width"], "depth": settings["model"]["base_depth"]}
    settings["study"] |= {"seeds": [0, 1], "sizes": [base, {**base, "depth": 2 * base["depth"]}]}
    study_file.write_text(yaml.safe_dump(settings))
    study = Study(study_file, read_study(study_file))
    assert {field.name for field in fields(study.file.model)} == {*others, *WITH_RULES & set(vars(study.file.model))}
    finish(study, best=-5)
    for key, value in others.items():
        beside = ["model.norm=group"] if key == "num_groups" else []  # without which it would do nothing
        with pytest.raises(UserError, match=rf"target with .*\.{key}.* -> {value}: the rules cover width and depth"):
            invoke("scale", study_file, f"model.{key}={value}", *beside)
    for key, why in WITHOUT_RULE.items():
        name = key.split()[0].partition(".")[2]
        if name in others:
            with pytest.raises(UserError, match=re.escape(f"width and depth alone ({why})")):
                invoke("scale", study_file, f"model.{name}={others[name]}")
    larger = ("model.depth=12", "--parameterization", "depth_mup")
    assert "rule" not in invoke("scale", study_file, *larger)
    out = ("--out", study_file.parent / "forced.yaml", "--force")
    assert "Forced: no rule covers model.image_size 8 -> 16" in invoke("scale", study_file, "model.image_size=16", *out)


def test_from_one_base_heads_may_grow_in_number_or_in_their_dim(study_file: Path) -> None:
    two_seeds(study_file)
    vit = ("model.family=vit", "model.patch_size=2", "model.head_dim=4", "study.name=vit")
    study = Study(study_file, read_study(study_file, vit))
    finish(study, best=-5)
    growing = ("model.width=32", "model.head_dim=null", "--parameterization", "depth_mup")
    invoke("scale", study.file.directory, *growing, "model.num_heads=2")
    assert read_run(study.target_file).model.size.head_dim == 16
    with pytest.raises(UserError, match=r"model.head_dim at base_width 4 -> 2"):
        invoke("scale", study.file.directory, *growing, "model.num_heads=4")


def test_scale_names_what_moves_an_optimum_and_belongs_to_the_target(study_file: Path) -> None:
    two_seeds(study_file)
    finish(Study(study_file, read_study(study_file)), best=-5)
    said = invoke("scale", study_file, "train.label_smoothing=0.1", "data.augment=crop_flip", "train.log_every=3")
    assert (
        "No rule covers data.augment none -> crop_flip, train.label_smoothing 0.0 -> 0.1: an optimum may move" in said
    )


def test_without_a_name_scale_takes_the_parameterization_that_is_best_at_the_largest_size(study_file: Path) -> None:
    """At the base they are the same network, whose loss says nothing of them."""
    two_seeds(study_file)
    study = Study(study_file, read_study(study_file, ("study.parameterizations=[completep, depth_mup]",)))
    finish(study, best=-5)
    for point in study.points:
        if point.parameterization == "depth_mup" and point.size.depth > 3:
            result = point.directory.done()
            assert result
            point.directory.write_done({**result, "minival_loss": result["minival_loss"] - 0.1})
    assert "Chosen of completep, depth_mup for the lowest loss at the largest size" in invoke(
        "scale", study.file.directory
    )
    assert read_run(study.target_file).parameterization.name == "depth_mup"


def test_a_grid_grows_only_by_values_that_a_run_may_have(study_file: Path) -> None:
    warmup = ("study.hyperparameter=schedule.warmup", "study.values=[0.1, 0.2, 0.4]", "study.extend=2")
    study = Study(study_file, read_study(study_file, warmup))
    finish(study, best=3)
    assert grow(study)[0] == 3 * 1  # 0.8; not 1.6
    finish(study, best=3)
    assert grow(study)[0] == 0
    assert max(run.value for run in Study(study_file, study.file).runs) == 0.8


def test_a_censored_curve_grows_on_its_side_twice_at_most(study_file: Path) -> None:
    file = read_study(study_file, ("study.extend=2",))
    study = Study(study_file, file)
    finish(study, best=-12, moves="")
    for size in (6, 8):
        assert grow(study)[0] == 3 * 2  # two parameterizations, two depths; at the base they share their runs
        finish(study, best=-12, moves="")
        curves = collect(study).analysis.curves
        assert {len(curve.x) for curve in curves} == {size}
    assert grow(study)[0] == 0
    assert min(run.value for run in Study(study_file, file).runs) == 2**-11  # a later command sees the values


def test_an_optimum_inside_the_grid_adds_nothing(study_file: Path) -> None:
    study = Study(study_file, read_study(study_file, ("study.extend=2",)))
    finish(study, best=-5, moves="")
    assert grow(study)[0] == 0


def test_another_study_in_the_same_folder_is_refused_by_the_key_that_differs(study_file: Path) -> None:
    Study(study_file, read_study(study_file)).write()
    with pytest.raises(UserError, match=r"holds another study \(train.samples is 384 there and 640 here"):
        Study(study_file, read_study(study_file, ("train.samples=640",))).write()
    old = study_file.parent / "runs" / "tiny" / "study.yaml"
    old.write_text(old.read_text() + "forgotten_key: 1\n")
    with pytest.raises(UserError, match="another version"):
        Study(study_file, read_study(study_file)).write()


def test_the_report_has_figures_a_cost_and_a_link_to_every_run(study_file: Path) -> None:
    study = Study(study_file, read_study(study_file))
    finish(study, best=-5)
    invoke("report", study_file)
    root = study.file.directory
    page = (root / "report.html").read_text()
    assert page.count("<figure") == 3
    assert all(f'href="runs/{run.directory.path.name}/"' in page for run in study.runs)
    assert {"curves.png", "drift.png", "loss.png", "report.md"} <= {path.name for path in root.iterdir()}
    assert json.loads((root / "report.json").read_text())["cost"]["flops"] > 0


def test_points_share_a_run_exactly_where_their_parameterizations_have_the_same_factors(study_file: Path) -> None:
    sizes = "[{width: 8, depth: 3}, {width: 8, depth: 6}, {width: 16, depth: 3}, {width: 16, depth: 6}]"
    overrides = ("study.parameterizations=[sp, mup, depth_mup, completep]", f"study.sizes={sizes}")
    study = Study(study_file, read_study(study_file, overrides))
    names: dict[tuple[int, int], dict[Path, list[str]]] = {}
    for point in study.points:
        at_size = names.setdefault((point.size.width, point.size.depth), {})
        at_size.setdefault(point.directory.path, []).append(point.parameterization)
    everything = ["sp", "mup", "depth_mup", "completep"]
    expected = {
        (8, 3): [everything],
        (8, 6): [["sp", "mup"], ["depth_mup"], ["completep"]],
        (16, 3): [["sp"], ["mup", "depth_mup", "completep"]],
        (16, 6): [[name] for name in everything],
    }
    for size, groups in expected.items():
        assert sorted(names[size].values()) == sorted(groups * 4)  # four rates
    assert len(study.runs) == 4 * sum(map(len, expected.values()))


def test_seeds_are_added_where_the_verdict_hangs_on_them_and_a_later_command_sees_them(study_file: Path) -> None:
    file = read_study(study_file, ("study.more_seeds=2",))
    study = Study(study_file, file)
    finish(study, best=-5.5, moves="", noise=0.02)
    analysis = collect(study).analysis
    assert {judgement.verdict for judgement in analysis.judgements} == {"inconclusive"}
    wanted = find_wanted_seeds(analysis)
    assert {(name, size.depth) for name, size in wanted} == {("sp", 6), ("depth_mup", 6)}  # the base's value is fixed
    assert grow(study)[0] == sum(map(len, wanted.values())) > 0
    assert {run.seed for run in Study(study_file, file).runs} == {0, 1}
    assert {run.size.depth for run in study.pending()} == {6}


@pytest.mark.parametrize(
    ("hyperparameter", "values"),
    [("optimizer.lr", [2.0**-x for x in range(9, 1, -1)]), ("optimizer.momentum", [1 - 2.0**-x for x in range(2, 8)])],
)
def test_a_grid_runs_the_carried_value_where_it_lies_beside_one_that_fails(
    study_file: Path, hyperparameter: str, values: list[float]
) -> None:
    """Whole octaves, the optimum at 2^-4.4; at the larger size, which moves by nothing, 2^-4 fails."""
    settings = yaml.safe_load(study_file.read_text())
    settings["optimizer"] = {"name": "sgd", "lr": 0.1, "momentum": 0.5}
    names = {"hyperparameter": hyperparameter, "values": values, "parameterizations": ["depth_mup"]}
    settings["study"] |= {**names, "design": "grid", "seeds": 3, "more_seeds": 1}
    study_file.write_text(yaml.safe_dump(settings))
    study = Study(study_file, read_study(study_file))
    study.write()
    for run in study.pending():
        x = study.file.study.octaves(run.value)
        noise = 0.001 * np.random.default_rng((run.seed, run.size.depth, int(-8 * x))).standard_normal()
        loss = {"outcome": "completed", "minival_loss": 0.3 * math.exp(0.05 * (x + 4.4) ** 2 + noise)}
        fails = run.size.depth == 6 and x > -4.2
        run.directory.write_done({"step": 12, "seconds": 1.0} | ({"outcome": "diverged"} if fails else loss))
    (judgement,) = collect(study).analysis.judgements
    assert judgement.verdict == "inconclusive"
    assert "beside the carried value, which was not run there" in judgement.reason
    assert grow(study)[0] > 0
    added = {run.value for run in Study(study_file, study.file).runs if run.seed == 3} - set(values)
    assert [study.file.study.octaves(value) for value in added] == [pytest.approx(-4.4, abs=0.1)]


def test_no_seed_is_added_where_that_is_switched_off_or_was_done_often_enough_or_nothing_is_open(
    study_file: Path,
) -> None:
    switched_off = Study(study_file, read_study(study_file, ("study.more_seeds=0",)))
    finish(switched_off, best=-5.5, noise=0.05)
    assert grow(switched_off)[0] == 0
    study = Study(study_file, read_study(study_file, ("study.more_seeds=1",)))
    assert grow(study)[0] > 0
    finish(study, best=-5.5, noise=0.05)
    assert "inconclusive" in {judgement.verdict for judgement in collect(study).analysis.judgements}
    assert grow(study)[0] == 0
    two_seeds(study_file)
    settled = Study(study_file, read_study(study_file, ("study.more_seeds=1", "study.name=settled")))
    finish(settled, best=-5.5)
    assert [each.verdict for each in collect(settled).analysis.judgements] == ["does not transfer", "transfers"]
    assert grow(settled)[0] == 0


def test_a_grid_of_momentum_grows_towards_one_and_never_reaches_it(study_file: Path) -> None:
    values = "study.values=[0.5, 0.75, 0.875]"
    study = Study(study_file, read_study(study_file, ("study.hyperparameter=optimizer.momentum", values)))
    assert study.grow({("sp", study.file.study.sizes[0]): "low"}) == 0  # study.extend is 0 here
    study = Study(
        study_file, read_study(study_file, ("study.hyperparameter=optimizer.momentum", values, "study.extend=1"))
    )
    study.write()
    assert study.grow({("sp", study.file.study.sizes[0]): "low"}) == 2
    assert max(run.value for run in study.runs) == 0.96875  # 1 - 2^-5
    with pytest.raises(UserError, match="must be below 1"):
        read_study(study_file, ("study.hyperparameter=optimizer.momentum", "study.values=[0.5, 0.9, 1]"))


def test_a_targets_loss_is_foretold_before_it_is_launched_and_judged_after_it(study_file: Path) -> None:
    settings = yaml.safe_load(study_file.read_text())
    settings["study"] |= {"seeds": [0, 1, 2], "parameterizations": ["depth_mup"]}
    settings["study"]["sizes"] = [{"width": 8, "depth": depth} for depth in (3, 6, 12)]
    study_file.write_text(yaml.safe_dump(settings))
    study = Study(study_file, read_study(study_file))
    study.write()

    def law(depth: int, value: float, seed: int) -> float:
        noise = np.random.default_rng([depth, seed, int(1 / value)]).standard_normal()
        return (0.3 + 0.6 / depth) * math.exp(0.05 * (math.log2(value) + 5.5) ** 2 + 0.001 * noise)

    for run in study.pending():
        loss = law(run.size.depth, run.value, run.seed)
        run.directory.write_done({"outcome": "completed", "step": 12, "minival_loss": loss, "seconds": 1.0})
    said = " ".join(invoke("scale", study_file, "model.depth=24").split())
    forecast = re.search(r"Forecast of its minival_loss: ([\d.]+), 90% interval ([\d.]+) to ([\d.]+)\.", said)
    assert forecast, said
    _, low, high = map(float, forecast.groups())
    (target,) = Study(study.target_file, read_study_or_run(study.target_file)).runs
    seen = law(24, target.value, 0)
    assert low <= seen <= high
    target.directory.path.mkdir(parents=True)
    target.directory.write_done({"outcome": "completed", "minival_loss": seen})
    before = forecast_file(study.target_file).read_text()
    assert f"forecast of minival_loss before it: {forecast[0][30:-1]}: held." in (describe_targets(study) or "")
    target.directory.write_done({"outcome": "completed", "minival_loss": 2 * seen})
    assert ": missed." in (describe_targets(study) or "")
    forecast_file(study.target_file).write_text(before.replace("90%", "marked"))
    invoke("scale", study_file, "model.depth=24")  # the run has begun: what was foretold stands
    assert "marked" in forecast_file(study.target_file).read_text()
    other = invoke("scale", study_file, "model.depth=24", "schedule.warmup=0.2", "--out", study_file.parent / "b.yaml")
    assert "Forecast of its minival_loss: none: the target differs from the study in schedule.warmup" in other
    forecast_file(study.target_file).write_text("[]")
    with pytest.raises(UserError, match="forecast"):
        describe_targets(study)


def test_runs_of_two_horizons_are_never_one_study(study_file: Path) -> None:
    two_seeds(study_file)
    study = Study(study_file, read_study(study_file))
    finish(study, best=-5)
    longer = Study(study_file, read_study(study_file, ("train.samples=768",)))
    with pytest.raises(UserError, match=r"holds another study \(train.samples is 384 there and 768 here\): choose"):
        collect(longer)
