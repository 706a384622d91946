"""A report as plain data: what report.json holds, and what docs/results keeps of a study."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from depthmup.launch.findings.analysis import Result
from depthmup.launch.findings.convergence import Rate
from depthmup.launch.findings.forecast import Forecast, describe_calibration
from depthmup.launch.findings.theory import describe_drifts, predict_drifts
from depthmup.launch.report.collect import Report, analyse_results, describe_targets
from depthmup.launch.runs.planned import PlannedRun, compute_scaling
from depthmup.launch.runs.pool import count_origins
from depthmup.launch.runs.study import Run, Study
from depthmup.launch.wording import show_number
from depthmup.models.parameterization import Role
from depthmup.train.rundir import PRUNED, parse_lines

CURVE_POINTS = 50  # of a training curve: 500 runs stay under 2 MB with the page's scripts


def convert_number(value: float | None) -> float | None:
    """JSON knows no infinite numbers: they become null."""
    return value if value is not None and math.isfinite(value) else None


def convert_interval(interval: tuple[float, float] | None) -> list[float | None] | None:
    return [convert_number(bound) for bound in interval] if interval else None


def restore_interval(bounds: Sequence[float | None]) -> tuple[float, float]:
    """A record's interval with infinite numbers where it is open."""
    low, high = bounds
    return (float("-inf") if low is None else low), (float("inf") if high is None else high)


def make_rate_record(rate: Rate) -> dict[str, Any]:
    """What `converge` and `limit` keep of a fitted rate."""
    return {
        "measure": rate.law.measure,
        "sizes": rate.sizes.tolist(),
        "distance": [convert_number(d) for d in rate.distance.tolist()],
        "error": [convert_number(e) for e in rate.error.tolist()],
        "noise": [convert_number(n) for n in rate.noise.tolist()],
        "exponent": convert_number(rate.exponent),
        "interval": convert_interval(rate.interval),
        "theory": rate.law.exponent,
        "remark": rate.remark,
    }


def list_hopeless(report: Report) -> set[Run]:
    """The runs that ended early at the loss of a guess."""
    return {report.study.owned(run) for run, _ in report.finished if run.ended_hopeless()}


def make_size_records(report: Report) -> list[dict[str, Any]]:
    owners = report.study.owners
    hopeless = Counter(run[:2] for run in list_hopeless(report))
    return [
        {
            "parameterization": c.curve.parameterization,
            **c.curve.size.axes,
            "seeds": c.curve.num_seeds,
            "learns": c.curve.learns,
            "runs": int((~np.isnan(c.curve.metric)).sum()),
            "failed_runs": int(c.curve.failed.sum()),
            "diverged_runs": int(np.isinf(c.curve.metric).sum()),
            "ended_early": hopeless[owners[c.curve.parameterization, c.curve.size], c.curve.size],
            "optimum_log2": convert_number(c.curve.optimum.x),
            "optimum_interval_log2": convert_interval(c.curve.optimum.interval),
            "censored": c.curve.optimum.censored,
            "drift_octaves": convert_number(c.drift),
            "drift_interval_octaves": convert_interval(c.interval),
            "best_metric": convert_number(c.curve.optimum.metric),
            "best_fails": math.isinf(c.curve.optimum.metric),
            "metric_at_base_optimum": convert_number(c.at_base_optimum),
            "fails_at_base_optimum": math.isinf(c.at_base_optimum),
            "runs_at_base_optimum": vars(c.failures),
            "regret": convert_number(c.regret),
            "regret_interval": convert_interval(c.regret_interval),
            "regret_bound": convert_number(c.regret_bound),
        }
        for c in report.analysis.comparisons
    ]


def make_point_records(report: Report) -> list[dict[str, Any]]:
    """Every finished point, and of an adaptive design the first round that asked for it."""
    study = report.study
    asked = [*enumerate(study.list_asked_runs(), start=1)] if study.file.study.adaptive else []
    rounds = {run: number for number, runs in reversed(asked) for run in runs}
    hopeless = list_hopeless(report)
    return [
        {
            "parameterization": each.parameterization,
            **each.size.axes,
            "value": each.value,
            "seed": each.seed,
            "metric": convert_number(each.metric),
        }
        | ({"round": rounds[study.owned(each)]} if rounds else {})
        | ({"ended_early": True} if study.owned(each) in hopeless else {})
        for each in report.results
    ]


def make_round_records(report: Report) -> list[dict[str, Any]]:
    """Of an adaptive design: what each round asked for and why, how many of its runs are done, their FLOPs, and the
    verdicts on all runs up to it. Empty for a grid."""
    study = report.study
    if not study.file.study.adaptive:
        return []
    owned = [(study.owned(each), each) for each in report.results]
    found, known = [], list[Result]()
    for number, (added, asked) in enumerate(zip(study.rounds(), study.list_asked_runs(), strict=True), start=1):
        known += [each for run, each in owned if run in asked]
        finished = {run for run, _ in owned} & asked  # points of several parameterizations may share one
        found.append(
            {
                "round": number,
                "runs": len(asked),
                "finished": len(finished),
                "reason": added.reason,
                "flops": sum(report.flops[size] for _, size, _, _ in finished),
                "verdicts": {each.parameterization: each.verdict for each in analyse_results(study, known).judgements},
            }
        )
    return found


def make_task_record(study: Study) -> dict[str, Any]:
    """What the runs of a study have in common."""
    path, file = study.path, study.file
    return {
        "study": file.study.name,
        "config": str(path.name if path.is_absolute() else path),
        "model": file.model.family,
        "optimizer": file.optimizer.name,
        "schedule": file.schedule.name,
        "data": file.data.name,
        "image_size": file.model.image_size,
        "metric": file.study.metric,
        "samples": file.train.samples,
        "steps": file.train.num_steps,
        "global_batch_size": file.train.global_batch_size,
        "minival": file.data.minival,
    }


def make_record(report: Report) -> dict[str, Any]:
    """What a report says of a study; infinite numbers (a run that diverged, an open interval) are null."""
    file, study = report.study.file, report.study.file.study
    price = file.launch.price_per_gpu_hour
    return {
        **make_task_record(report.study),
        "hyperparameter": study.hyperparameter,
        "octaves_of": study.axis,
        "warmup": file.schedule.warmup,
        "regret_limit": study.regret_limit,
        "cost_limit": study.cost_limit,
        "rule": report.rule,
        "base": report.base.axes,
        "num_runs": len(report.finished),
        "num_diverged": report.num_diverged,
        "num_unfinished": len(report.unfinished),
        "origins": count_origins(report.study),  # code and shards: fingerprint -> number of runs
        "cost": {
            "flops": report.total_flops,
            "hours": report.hours,
            "flops_of_the_costliest_run": max(report.flops.values()),
            "gpu_hours": report.gpu_hours,
            "money": convert_number(None if price is None else price * report.gpu_hours),
        },
        "predicted_drifts": [
            {"parameterization": name, "depth": depth, "octaves": drift}
            for name, drifts in predict_drifts(file).items()
            for depth, drift in drifts.items()
        ],
        "verdicts": [
            {
                "parameterization": j.parameterization,
                "verdict": j.verdict,
                "reason": j.reason,
                "at_planned_seeds": {"seeds": study.seeds, "verdict": report.planned[j.parameterization].verdict}
                if j.parameterization in report.planned
                else None,
            }
            for j in report.analysis.judgements
        ],
        "rounds": make_round_records(report),
        "rounds_ended": report.ended,
        "sizes": make_size_records(report),
        "forecasts": [
            {
                "parameterization": f.parameterization,
                "target": f.target.axes,
                "fitted_sizes": f.fitted,
                "law": f.law,
                "predicted": convert_number(f.predicted),
                "interval": convert_interval(f.interval),
                "seen": convert_number(f.seen),
                "diverged": f.seen is not None and math.isinf(f.seen),
                "inside": f.inside,
                "remark": f.remark,
            }
            for f in report.forecasts
        ],
        "exponents": [
            {
                "parameterization": e.parameterization,
                "axis": e.axis,
                "rule": e.rule,
                "measured": e.measured,
                "interval": convert_interval(e.interval),
                "sizes": e.sizes,
                "is_known": e.is_known,
                "said": str(e),
            }
            for e in report.exponents
        ],
        "direct": [
            {
                "parameterization": d.parameterization,
                "target": d.target.axes,
                "cost_share": d.cost_share,
                "cost_share_of_targets_sweep": d.share_of_sweep,
                "transferred": convert_number(d.transferred),
                "tuned": convert_number(d.tuned),
                "regret": convert_number(d.regret),
                "regret_interval": convert_interval(d.regret_interval),
            }
            for d in report.direct
        ],
        "points": make_point_records(report),
        "unfinished": report.unfinished,
    }


def find_effective_rate(run: PlannedRun) -> float:
    """The learning rate of the weights in residual branches, with the factors of the rules at the run's size, batch and
    samples."""
    optimizer, (scale, training) = run.config.optimizer, compute_scaling(run.config)
    return optimizer.lr * scale.factors(Role.BRANCH_HIDDEN, optimizer.name).lr * training.lr


def thin_training_curve(run: PlannedRun) -> dict[str, list[float | None]] | None:
    """At most CURVE_POINTS of the run's logged losses, evenly spread, the last included; None where none is logged."""
    lines = [line for line in parse_lines(run.directory.metrics, "step") if "loss" in line]
    if not lines:
        return None
    by_step = {line["step"]: line["loss"] for line in lines}  # a run that went on from a checkpoint repeats steps
    steps = sorted(by_step)
    kept = sorted({round(at) for at in np.linspace(0, len(steps) - 1, min(len(steps), CURVE_POINTS))})
    losses = [by_step[steps[at]] for at in kept]
    return {
        "steps": [steps[at] for at in kept],
        "loss": [None if loss is None or not math.isfinite(loss) else float(f"{loss:.4g}") for loss in losses],
    }


def describe_report(report: Report) -> dict[str, Any]:
    """What a report says in words. `missing` and `go_on` hold as long as the study stands as it does."""
    return {
        "facts": report.facts,
        "missing": report.missing,
        "go_on": report.go_on,
        "rounds": report.rounds,
        "scaling": report.scaling,
        "direct": [f"{each}." for each in report.direct],
        "expected_drifts": [f"{each}." for each in describe_drifts(report.study.file)],
        "forecasts": forecast_sentences(report.forecasts),
        "calibration": describe_calibration(report.forecasts),
        "target": describe_targets(report.study),
    }


def forecast_sentences(forecasts: Sequence[Forecast]) -> list[str]:
    """One for each forecast; one for all parameterizations that have none of a size for the same reason."""
    found = dict[str, list[str]]()  # what is said: of which parameterizations
    for each in forecasts:
        if each.predicted is None:
            said = f"no forecast for {each.target}: {each.remark}."
        else:
            seen = "" if each.seen is None else f", seen {show_number(each.seen)}"
            said = f"forecast for {each.target}: {each.said}{seen}{f' ({each.remark})' if each.remark else ''}."
        found.setdefault(said, []).append(each.parameterization)
    return [f"{', '.join(names)}: {said}" for said, names in found.items()]


def make_told_record(report: Report) -> dict[str, Any]:
    """The record with `said`, for tables and pages of a study whose runs are here."""
    return make_record(report) | {"said": describe_report(report)}


def make_page_record(report: Report) -> dict[str, Any]:
    """`make_told_record` with every run, for the page: its folder, its training curve and its address on W&B if it has
    one. One entry of `runs` per point; points may share a folder."""
    study = report.study.file.study
    runs = []
    for point in report.study.points:
        if done := point.done():
            metric = done.get(study.metric) if done["outcome"] == "completed" else None
            address = point.directory.wandb_address
            runs.append(
                {
                    "folder": point.directory.path.name,
                    "parameterization": point.parameterization,
                    **point.size.axes,
                    "value": point.value,
                    "effective_value": find_effective_rate(point) if study.hyperparameter == "optimizer.lr" else None,
                    "seed": point.seed,
                    "metric": convert_number(metric),
                    "failed": "ended early" if done["outcome"] == PRUNED else "diverged" if metric is None else None,
                    "seconds": done.get("seconds"),
                    "flops": report.flops[point.size],
                    "wandb": address.read_text().strip() if address.exists() else None,
                }
            )
    curves = {run.directory.path.name: thin_training_curve(run) for run, _ in report.finished}
    return make_told_record(report) | {"runs": runs, "training_curves": {name: c for name, c in curves.items() if c}}


def dump(record: Mapping[str, Any]) -> str:
    """JSON with one line per item of a list at the top: short, and its changes can be read."""

    def item(value: Any) -> str:
        return json.dumps(value, allow_nan=False)

    def entry(value: Any) -> str:
        return "[\n  " + ",\n  ".join(map(item, value)) + "\n ]" if isinstance(value, list) and value else item(value)

    return "{\n" + ",\n".join(f" {item(key)}: {entry(value)}" for key, value in record.items()) + "\n}\n"


def read_record(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
