"""`depthmup scale`: from a finished proxy study to the large run's configuration."""

import math
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from depthmup.data.errors import UserError
from depthmup.data.files import refuse_locked, write_atomically
from depthmup.data.index import show_count
from depthmup.data.paths import protect
from depthmup.launch.axes import MODEL_AXES, TRAINING_AXES
from depthmup.launch.config import Size, StudyFile, show_label
from depthmup.launch.findings.analysis import Curve
from depthmup.launch.findings.forecast import Forecast, foretell_loss
from depthmup.launch.findings.verdict import CARRIED, explain_missing_optimum
from depthmup.launch.paths import quote_command
from depthmup.launch.reading import apply_profile, read_named_cluster, read_settings, read_study_or_run
from depthmup.launch.report.collect import Report
from depthmup.launch.runs.foretold import Foretold, write_foretold
from depthmup.launch.runs.study import Study
from depthmup.models.config import MixtureVitConfig, VisionTransformerConfig
from depthmup.models.parameterization_config import ParameterizationConfig
from depthmup.models.training_scale import list_lr_exponents
from depthmup.train.config import RunConfig, find_identity
from depthmup.train.reading import from_plain, read_yaml, set_dotted
from depthmup.train.yaml_text import dump_yaml, load_yaml

# What an optimum belongs to: with another one of these the proxy's says nothing. Of a model it is everything but what
# has a rule: width, depth and how depth is spread over stages. Heads are looked at in the base: from there they may
# grow in number or in their dim.
KEPT = ("optimizer.name", "schedule.name", "data.name")
WITH_RULES = ("width", "depth", "blocks", "head_dim", "num_heads")
WITH_RULES_OF_EXPERTS = ("num_experts", "active_share", "mlp_ratio")
# Of what has no rule: why, and what there is in its place.
WITHOUT_RULE = {
    "model.mlp_ratio": "family moe_vit with num_experts 1, a dense ViT, has a rule for mlp_ratio",
    "model.head_dim at base_width": "heads of one head_dim grow in number with width",
    "model.patch_size": "another patch has another fan-in, and another number of tokens",
    "model.image_size": "another image has another number of positions that share each weight",
}
# What moves an optimum, too, but belongs to the target: it is named.
NAMED = ("data", "train")
NOT_NAMED = (*KEPT, "train.samples", "train.global_batch_size", "train.evaluate")  # batch and samples have their lines
SECTIONS = ("model", "optimizer", "schedule", "data", "train", "parallel", "track", "seed", "launch")


class Doubtful(UserError):
    """The study does not say that its value holds for the target; `force` scales all the same."""


@dataclass(frozen=True)
class Transferred:
    """The target's configuration, and what is to be said of it: a line each."""

    config: dict[str, Any]
    facts: list[str]
    forecast: Forecast
    metric: str  # that is foretold

    def text(self) -> str:
        return "".join(f"# {line}\n" for line in self.facts) + dump_yaml(self.config)


def find_carried_value(report: Report, base: Curve) -> float | None:
    """What the verdict is about: the very value that was run, where the design has run it at every size."""
    found = next(each for each in report.analysis.comparisons if each.curve is base)
    if found.carried is None:
        return None
    if found.measured:
        return float(base.values[base.at(found.carried)])
    return report.study.file.study.value_at(found.carried)


def choose_curve(report: Report, parameterization: str | None, force: bool) -> tuple[Curve, float, list[str]]:
    """The base's curve of the parameterization to use, the value to carry over, and how sure it is.

    Without a name: the one with the best verdict of CARRIED, of several the one whose value has the lowest loss at the
    largest size: at the base they may be the same network. Raises Doubtful where no verdict says what the value
    costs, unless `force`.
    """
    path, base_size = report.study.path, report.study.file.study.sizes[0]
    curves = {curve.parameterization: curve for curve in report.analysis.curves if curve.size == base_size}
    judgements = {judgement.parameterization: judgement for judgement in report.analysis.judgements}
    judgements |= report.along_exponents  # which the target's batch and samples follow
    if not judgements:
        raise UserError(f"{path}: no run of the base size is finished: first {report.study.command('transfer')}")
    if parameterization and parameterization not in judgements:
        raise UserError(
            f"{path}: no parameterization {parameterization!r} in the study; it has {', '.join(judgements)}"
        )
    names = [parameterization] if parameterization else list(judgements)
    ranked = ([name for name in names if judgements[name].verdict == verdict] for verdict in CARRIED)
    good = [] if report.unfinished else next(filter(None, ranked), [])
    if not good and not force:
        why = [f"{len(report.unfinished)} runs are not finished"] if report.unfinished else []
        why += [f"{name} {judgements[name].verdict} ({judgements[name].reason})" for name in names]
        reasons = "; ".join(why)
        raise Doubtful(f"{path}: this study does not say which value to use: {reasons}")
    at_largest = {direct.parameterization: direct.transferred for direct in report.direct}
    candidates = good or names
    curve = min(
        (curves[name] for name in candidates),
        key=lambda c: (at_largest.get(c.parameterization, math.inf), c.optimum.metric),
    )
    carried = find_carried_value(report, curve)
    if carried is None:
        raise UserError(
            f"{path}: {curve.parameterization}: nothing to transfer: the base: {explain_missing_optimum(curve)}"
        )
    judgement = judgements[curve.parameterization]
    study, train = report.study.file.study, report.study.file.train
    low, high = (study.show(bound) for bound in curve.optimum.interval or (0, 0))
    interval = f", 90% interval {low} to {high}" if curve.optimum.interval and not curve.optimum.censored else ""
    facts = [
        f"Transferred from study {study.name} with {curve.parameterization}: {judgement.verdict} ({judgement.reason}).",
        f"{study.hyperparameter} {study.show(study.octaves(carried))}{interval}"
        + (f", censored on the {curve.optimum.censored} edge of the grid" if curve.optimum.censored else "")
        + f", from {show_count(curve.num_seeds, 'seed')} at {curve.size}.",
        f"Horizon of the proxy: {train.samples} samples in batches of {train.global_batch_size} "
        f"({train.num_steps} steps).",
    ]
    if len(candidates) > 1 and curve.parameterization in at_largest:
        facts.append(
            f"Chosen of {', '.join(candidates)} for the lowest loss at the largest size of the study "
            f"({at_largest[curve.parameterization]:.3g}); --parameterization names another."
        )
    if curve.num_seeds == 1:
        facts.append("One seed only: nothing is known of the noise between seeds.")
    return curve, carried, facts


def list_task_values(run: RunConfig) -> dict[str, Any]:
    """Dotted key -> value of what the optimum of `run` belongs to."""
    mixture = isinstance(run.model, MixtureVitConfig)
    with_rules = WITH_RULES + (WITH_RULES_OF_EXPERTS if mixture else ())
    found = {f"model.{key}": value for key, value in find_identity(run.model).items() if key not in with_rules}
    if isinstance(run.model, VisionTransformerConfig):
        found["model.head_dim at base_width"] = run.model.heads(run.model.base_width)[1]
    if run.model.family == "timm":  # a fixed size of the network there, as num_classes is
        found["model.head_dim"] = run.model.head_dim
    return found | {key: attrgetter(key)(run) for key in KEPT}


def list_expert_values(run: RunConfig, base: Size) -> dict[str, Any]:
    """Key -> value of what a mixture of experts may change by a rule, and no axis of the study says."""
    return {key: getattr(run.model, key, None) for key in WITH_RULES_OF_EXPERTS if key not in base.axes}


def describe_differences(a: dict[str, Any], b: dict[str, Any]) -> str:
    """'key VALUE -> VALUE, ...' of all that is not the same."""
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    return ", ".join(f"{key} {a.get(key)} -> {b.get(key)}" for key in keys)


def list_movable_values(run: RunConfig) -> dict[str, Any]:
    """Dotted key -> value of what a target may change, and what has no rule."""
    return {
        f"{section}.{field.name}": getattr(getattr(run, section), field.name)
        for section in NAMED
        for field in fields(getattr(run, section))
        if field.metadata.get("identity", True) and f"{section}.{field.name}" not in NOT_NAMED
    }


def run_settings(file: StudyFile) -> dict[str, Any]:
    """The sections of a study's file that a run of its own has, as plain data."""
    plain = read_settings(file)
    return {key: plain[key] for key in SECTIONS if key in plain}


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with every section of `changes` laid over it."""
    merged = {**base}
    for key, value in changes.items():
        merged[key] = merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return merged


def scale(
    report: Report,
    name: str,
    changes: dict[str, Any],
    parameterization: str | None = None,
    scale_batch: bool = False,
    force: bool = False,
) -> Transferred:
    """The study's configuration with `changes` (sections of the target) and the transferred hyperparameters. Its run
    goes to the folder `name` beside the study's.

    Raises Doubtful when the study is inconclusive or the target differs in what the optimum belongs to (KEPT), both
    unless `force`, and UserError when the target is no valid run.
    """
    file: StudyFile = report.study.file
    curve, carried, facts = choose_curve(report, parameterization, force)
    chosen = next(p for p in file.study.parameterizations if show_label(p) == curve.parameterization)
    config = run_settings(file)
    config["parameterization"] = {key: value for key, value in vars(chosen).items() if value is not None}
    set_dotted(config, f"{file.study.hyperparameter}={carried!r}")
    if read_named_cluster(changes):
        config.pop("launch", None)  # another place to run: the proxy's settings would win over its profile
    proxy = run_of(config, str(report.study.path))
    config, source = merge(config, changes), f"{report.study.path}, scaled to {name}"
    target = run_of(config, source)
    ours, theirs = list_task_values(proxy), list_task_values(target)
    if (changed := describe_differences(ours, theirs)) and not force:
        why = "".join(f" ({said})" for key, said in WITHOUT_RULE.items() if ours.get(key) != theirs.get(key))
        raise Doubtful(
            f"{report.study.path}: the proxy's optimum does not hold for a target with {changed}: the rules cover "
            f"width and depth alone{why}. Leave it as the proxy has it, or run the study anew with the target's"
        )
    if changed:
        facts.append(f"Forced: no rule covers {changed}.")
    if other := describe_differences(list_movable_values(proxy), list_movable_values(target)):
        facts.append(f"No rule covers {other}: an optimum may move with it.")
    for section in ("optimizer", "schedule"):
        for key in changes.get(section, {}):
            facts.append(f"Not transferred: {section}.{key} was given.")
    longer = {
        axis: ratio
        for axis, key in TRAINING_AXES.items()
        if (ratio := getattr(target.train, key) / getattr(proxy.train, key)) != 1
    }
    for axis, ratio in longer.items():
        facts.append(scale_training(config, report, curve, axis, ratio, scale_batch))
    for axis in TRAINING_AXES:
        if config["optimizer"].get(f"{axis}_ratio", 1) == 1:  # an exponent of a ratio of 1 would do nothing
            config["parameterization"].pop(f"{axis}_lr", None)
    run_of(config, source)  # not every ratio leaves betas
    if "batch" in longer and getattr(target.model, "norm", None) == "batch" and not target.train.batch_norm_images:
        facts.append(
            "Each BatchNorm takes its statistics over the whole batch, which is another here: "
            f"train.batch_norm_images={proxy.train.global_batch_size} keeps the proxy's."
        )
    model = target.model
    wider, deeper = model.width / model.base_width, model.depth / model.base_depth
    what = f"{model.title} of width {model.width} and depth {model.depth} ({wider:g} and {deeper:g} times the base's)"
    config["study"] = {"name": name, "directory": protect(file.study.directory)}
    experts = describe_differences(list_expert_values(proxy, report.base), list_expert_values(target, report.base))
    reasons = [changed, experts, other, " and ".join(longer)]
    reasons += [f"{section}.{key}" for section in ("optimizer", "schedule") for key in changes.get(section, {})]
    forecast = foretell_target(report, curve, carried, target, ", ".join(filter(None, reasons)))
    facts.append(f"Forecast of its {file.study.metric}: {forecast.said}.")
    return Transferred(config, [f"{name}: {what}, {curve.parameterization}.", *facts], forecast, file.study.metric)


def scale_training(config: dict[str, Any], report: Report, curve: Curve, axis: str, ratio: float, by_rule: bool) -> str:
    """Writes what a target's batch or samples, `ratio` times the proxy's, make of the hyperparameters into `config`:
    by the exponent that the study measured, else by the rule if the study had that axis or exponent, or `by_rule`.
    Returns what was done."""
    study, optimizer, parameterization = report.study.file.study, config["optimizer"], config["parameterization"]
    ratio_key, lr_key, times = f"{axis}_ratio", f"{axis}_lr", f"{axis.capitalize()} {ratio:g} times the proxy's"
    exponent = next((each for each in report.list_known_exponents(curve.parameterization) if each.axis == axis), None)
    if not (exponent or axis in report.base.axes or lr_key in parameterization or by_rule):
        return (
            f"{times}, and nothing was scaled for that (--scale-batch does, by the rule; a study whose sizes differ in "
            f"{axis} measures it): an optimum moves with it."
        )
    optimizer[ratio_key] = optimizer.get(ratio_key, 1.0) * ratio
    scaled = f"{times}: scaled by the optimizer's rules"
    if exponent is None:
        resolved = ParameterizationConfig(**parameterization).resolve()
        rule = dict(zip(TRAINING_AXES, list_lr_exponents(resolved, optimizer["name"]), strict=True))[axis]
        unknown = next((f" ({each})" for each in report.exponents if each.axis == axis and not each.is_known), "")
        return f"{scaled}, the learning rate as {axis}^{rule:.3g}, which the study did not measure{unknown}."
    assert exponent.interval is not None
    assert exponent.measured is not None
    low, high = exponent.interval
    known = f"(90% interval {low:.2f} to {high:.2f}, {exponent.span[0]} to {exponent.span[1]})"
    if exponent.rule is not None:
        power = parameterization[lr_key] = round(exponent.measured, 3)
        moved = f"the learning rate times {ratio**power:.4g} by the measured {axis}^{power:g} {known}"
    else:
        key, name = study.hyperparameter.split(".", 1)
        octaves = study.octaves(config[key][name]) + exponent.slope * math.log2(ratio)
        config[key][name] = study.value_at(octaves)
        moved = f"{exponent.hyperparameter} times {ratio**exponent.slope:.4g} by the measured {exponent.power} {known}"
    own = getattr(report.base, axis) * ratio
    beyond = max(own / exponent.span[1], exponent.span[0] / own)
    far = f", {beyond:.3g} times beyond what was measured" if beyond > 1 else ""
    alike = (
        "; the ladder's runs had one weight decay a step and the same betas at every length; the target's follow rules"
        if axis == "samples" and study.ladder
        else ""
    )
    return f"{scaled}, {moved}{far}{alike}."


def foretell_target(report: Report, curve: Curve, carried: float, target: RunConfig, reasons: str) -> Forecast:
    """Of the target's loss at the carried value; no number where it differs from the study in more than its size."""
    own = [each for each in report.analysis.curves if each.parameterization == curve.parameterization]
    axes = [axis for axis in MODEL_AXES if axis in report.base.axes]
    size = report.study.file.complete(Size(**{axis: getattr(target.model, axis) for axis in axes}))
    found = foretell_loss(own, report.study.file.study.octaves(carried), size)
    if reasons:
        remark = f"the target differs from the study in {reasons}"
        return replace(found, predicted=None, interval=None, remark=remark)
    return found


def run_of(config: dict[str, Any], source: str) -> RunConfig:
    """The run that a target's file describes. Raises UserError."""
    return from_plain(RunConfig, {key: value for key, value in config.items() if key != "launch"}, source)


def write_target(transferred: Transferred, path: Path) -> None:
    """Writes the target's file. Raises UserError when that of another run is there: it may have been edited. Where it
    runs, and what comments say of it, does not make it another."""
    refuse_locked(path, "--out FILE names another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    ours = load_yaml(transferred.text(), path.name)
    if path.exists() and {**read_yaml(path), "launch": None} != {**ours, "launch": None}:
        raise UserError(
            f"{path} exists and differs: delete it to have it written again, choose another --out, or start it as it "
            f"is: {quote_command('launch', path)}"
        )
    write_atomically(path, transferred.text().encode())


def write_forecast(transferred: Transferred, path: Path) -> None:
    """Beside the target's file, before its run begins: one that has begun keeps its forecast, or has none."""
    run = Study(path, read_study_or_run(path)).runs[0]
    if run.directory.path.exists():
        return
    low, high = transferred.forecast.interval or (None, None)
    write_foretold(path, Foretold(metric=transferred.metric, said=transferred.forecast.said, low=low, high=high))


def read_changes(target: Path | None, overrides: tuple[str, ...]) -> dict[str, Any]:
    """The sections of a target's file (which may hold a few keys only), and KEY=VALUE on top."""
    changes = read_yaml(target) if target else {}
    changes.pop("study", None)  # a target that was itself written by scale has one
    if unknown := sorted(set(changes) - set(SECTIONS)):
        source = target or "KEY=VALUE"
        raise UserError(f"{source}: unknown section {unknown[0]!r} of a target; known: {', '.join(SECTIONS)}")
    for override in overrides:
        set_dotted(changes, override)
    apply_profile(changes, target or Path())
    return changes
