"""What a report says of a study: its finished runs analysed, what they cost, and what is missing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from depthmup.data.errors import UserError
from depthmup.data.index import show_count
from depthmup.launch.axes import TRAINING_AXES
from depthmup.launch.config import Size, show_label
from depthmup.launch.findings.analysis import Carry, Result, carry_optimum
from depthmup.launch.findings.design import plan_round
from depthmup.launch.findings.direct import Direct, compare_with_direct
from depthmup.launch.findings.forecast import Forecast, make_forecasts
from depthmup.launch.findings.points import Round, carry_run
from depthmup.launch.findings.training_exponents import Exponent, judge_along, measure_exponents
from depthmup.launch.findings.verdict import Analysis, Judgement, analyse, describe_rule
from depthmup.launch.reading import read_study_or_run
from depthmup.launch.runs.cost import count_flops
from depthmup.launch.runs.design import build_design, find_limits
from depthmup.launch.runs.foretold import read_foretold
from depthmup.launch.runs.grouping import count_processes_per_gpu
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.pool import describe_mixtures, refuse_mixture
from depthmup.launch.runs.study import Study
from depthmup.launch.runs.written import refuse_other_study
from depthmup.launch.wording import show_quantity, show_seeds, show_times
from depthmup.models.training_scale import list_lr_exponents


@dataclass(frozen=True)
class Report:
    """What a report is made from."""

    study: Study
    results: list[Result]  # of every point that is done; points may share a run
    analysis: Analysis
    unfinished: list[str]  # a line for each run that is not done
    num_failed: int  # of these

    @property
    def base(self) -> Size:
        return self.study.file.study.sizes[0]

    @property
    def rule(self) -> str:
        return describe_rule(find_limits(self.study))

    @cached_property
    def planned(self) -> dict[str, Judgement]:
        """By parameterization, the verdict on study.seeds alone where seeds were added: they are added until a verdict
        is settled, which makes one that is just so look surer than it is."""
        seeds = self.study.file.study.seeds
        if self.study.file.study.adaptive:
            return {}  # its error rates are known with its rounds
        grown = {result.parameterization for result in self.results if result.seed not in seeds}
        found = analyse_results(self.study, [result for result in self.results if result.seed in seeds])
        return {each.parameterization: each for each in found.judgements if each.parameterization in grown}

    @cached_property
    def next_round(self) -> Round:
        """Of an adaptive design: what it asks for after these runs, or why it has ended."""
        return plan_round(build_design(self.study), self.results)

    @property
    def has_next_round(self) -> bool:
        """Whether an adaptive design, all of whose runs are done, asks for more."""
        return self.study.file.study.adaptive and not self.unfinished and bool(self.next_round.points)

    @property
    def ended(self) -> str | None:
        """Of an adaptive design that has ended: why."""
        if not self.study.file.study.adaptive or self.unfinished or self.has_next_round:
            return None
        return self.next_round.reason

    @property
    def rounds(self) -> str:
        """Of an adaptive design: how many there were, and what comes next; '' for a grid."""
        if not self.study.file.study.adaptive:
            return ""
        budget = build_design(self.study).budget
        spent = f"{show_count(len(self.study.rounds()), 'round')}, {self.total_flops / budget:.0%} of the budget"
        if self.unfinished:
            return f"Adaptive design: {spent}; the last round is not finished."
        return f"Adaptive design: {spent}; " + (f"ended: {self.ended}." if self.ended else "it goes on.")

    @cached_property
    def forecasts(self) -> list[Forecast]:
        return make_forecasts(self.analysis, self.study.file.study.sizes)

    @cached_property
    def exponents(self) -> list[Exponent]:
        """How the optimum moves with batch and samples; empty for a study without these axes."""
        settings, optimizer = self.study.file.study, self.study.file.optimizer.name
        rules = {}
        if settings.hyperparameter == "optimizer.lr":
            for each in settings.parameterizations:
                rules[show_label(each)] = dict(
                    zip(TRAINING_AXES, list_lr_exponents(each.resolve(), optimizer), strict=True)
                )
                if settings.ladder:
                    rules[show_label(each)]["samples"] = 0.0  # one trunk has one rate
        name = ("1 - " if settings.complement else "") + settings.hyperparameter
        return measure_exponents(self.analysis, self.base, name, rules)

    def list_known_exponents(self, parameterization: str) -> list[Exponent]:
        """Those that are measured well enough to carry a value along."""
        return [each for each in self.exponents if each.is_known and each.parameterization == parameterization]

    @cached_property
    def along_exponents(self) -> dict[str, Judgement]:
        """By parameterization that has such exponents: the verdict on its value carried along them."""
        found = {}
        for base in (each for each in self.analysis.comparisons if each.curve.size == self.base):
            name = base.curve.parameterization
            if (known := self.list_known_exponents(name)) and base.carried is not None:
                found[name] = judge_along(self.analysis, name, self.base, base.carried, known, find_limits(self.study))
        return found

    @property
    def scaling(self) -> list[str]:
        """Sentences on the exponents, and on what a value costs that is carried along them."""
        said = [f"{each}." for each in self.exponents]
        return said + [
            f"{name}, carried along {' and '.join(e.power for e in self.list_known_exponents(name))}: {found.verdict} "
            f"({found.reason}); the exponent is fitted to these same runs."
            for name, found in self.along_exponents.items()
        ]

    @cached_property
    def flops(self) -> dict[Size, float]:
        """Of one run of each size, all samples."""
        return {size: float(each) for size, (_, each) in count_flops(self.study.runs).items()}

    @cached_property
    def direct(self) -> list[Direct]:
        return compare_with_direct(self.analysis, self.results, self.base, self.flops)

    @cached_property
    def finished(self) -> list[tuple[PlannedRun, dict[str, Any]]]:
        """The runs that are done, each once, with their markers."""
        return [(run, done) for run in self.study.runs if (done := run.done())]

    @property
    def num_diverged(self) -> int:
        """Runs."""
        return sum(done["outcome"] == "diverged" for _, done in self.finished)

    @property
    def total_flops(self) -> float:
        """Of the finished runs at their full length; of branches from where they branch off."""
        return sum(run.share * self.flops[run.size] for run, _ in self.finished)

    @property
    def hours(self) -> float:
        """Of all processes that trained, as the done markers say; the runs of a pack share its seconds."""
        return sum(done.get("seconds", 0.0) for _, done in self.finished) / 3600

    @property
    def gpu_hours(self) -> float:
        """The same, divided by the processes that share a GPU as the study is launched now. Without a GPU each process
        counts as one that has one to itself."""
        return self.hours / count_processes_per_gpu(self.study.file.launch)

    @property
    def facts(self) -> str:
        """What was run, in two sentences."""
        file = self.study.file
        hopeless = sum(run.ended_hopeless() for run, _ in self.finished)
        early = f", {hopeless} ended early at the loss of a guess" if hopeless else ""
        return (
            f"{file.model.title}, {file.optimizer.name}, {file.schedule.name} schedule with "
            f"{100 * file.schedule.warmup:.0f} % warm-up, {file.train.samples} samples in batches of "
            f"{file.train.global_batch_size} ({file.train.num_steps} steps), data set {file.data.name}, "
            f"{100 * file.data.minival:g} % of the training set held out as minival, seeds "
            f"{show_seeds(result.seed for result in self.results)}. {len(self.finished)} runs, "
            f"{self.num_diverged} of them diverged{early}; {show_quantity(self.total_flops)}FLOPs "
            f"({show_times(self.total_flops / max(self.flops.values()))} times one run of the costliest size), "
            f"{self.hours:.2f} hours of training processes."
            f"{''.join(f' Results of {mixture}.' for mixture in describe_mixtures(self.study))}"
            f"{' ' + target if (target := describe_targets(self.study)) else ''}"
        )

    @property
    def missing(self) -> str:
        """How much is not in this report; '' when nothing is missing."""
        if not self.unfinished:
            return f"The next round is not in this report: {self.next_round.reason}" if self.has_next_round else ""
        failed = f", {self.num_failed} of them because they failed" if self.num_failed else ""
        return (
            f"{len(self.unfinished)} of {len(self.study.runs)} runs are not in this report{failed}: every number "
            f"may still change{self.unjudged}. The first: {self.unfinished[0]}"
        )

    @property
    def unjudged(self) -> str:
        """Which parameterizations have runs, but none of the base, and so no verdict; '' where all have one."""
        judged = {judgement.parameterization for judgement in self.analysis.judgements}
        names = dict.fromkeys(run.parameterization for run in self.results if run.parameterization not in judged)
        if not names:
            return ""
        verb, base = "have" if len(names) > 1 else "has", self.study.file.study.sizes[0]
        return f", and {', '.join(names)} {verb} no verdict before runs at {base} are finished"

    @property
    def go_on(self) -> str:
        """The command that trains what is missing."""
        return self.study.command("retry" if 0 < self.num_failed == len(self.unfinished) else "transfer")


def describe_targets(study: Study) -> str | None:
    """How the runs of the targets ended that were scaled from this study; None when there is no target."""
    lines = []
    for path in study.written_targets():
        run = Study(path, read_study_or_run(path)).runs[0]
        done = run.done() or {"outcome": "not finished"}
        numbers = "".join(f", {key} {value:.4g}" for key, value in done.items() if isinstance(value, int | float))
        at = f"{study.file.study.hyperparameter} {run.value:.4g}"
        lines.append(f"Target of {run.size} at {at}: {done['outcome']}{numbers}{judge_forecast(path, done)}.")
    return " ".join(lines) or None


def judge_forecast(target: Path, done: dict[str, Any]) -> str:
    """What was foretold of the target before it was launched, and whether it held; '' where nothing was written."""
    if (foretold := read_foretold(target)) is None:
        return ""
    seen = math.inf if done["outcome"] == "diverged" else done.get(foretold.metric)
    judged = foretold.judge(seen) if isinstance(seen, int | float) else ""
    return f"; forecast of {foretold.metric} before it: {foretold.said}{judged and f': {judged}'}"


def analyse_results(study: Study, results: Sequence[Result]) -> Analysis:
    settings = study.file.study
    carry: Carry = carry_optimum
    if settings.adaptive:
        carry = carry_run(
            min(settings.octaves(end) for end in (settings.grid[0], settings.grid[-1])), find_limits(study)
        )
    return analyse(results, settings.sizes[0], find_limits(study), settings.octaves, study.chance, carry)


def check_swept(study: Study) -> None:
    """Raises UserError for a search or a verification, whose runs differ in several hyperparameters: no curve follows
    from them."""
    for verb in ("tune", "verify"):
        if getattr(study.file, verb):
            raise UserError(
                f"{study.path} has a section {verb}: and no sweep of one hyperparameter; its own command trains and "
                f"prints it: {study.command(verb)}"
            )


def collect(study: Study) -> Report:
    """Reads the done markers of all runs and analyses them. Raises UserError where one has no metric, where they come
    from different code or images, and as `check_swept`."""
    check_swept(study)
    settings, results = study.file.study, []
    refuse_other_study(study.file)
    refuse_mixture(study)
    for point in study.points:
        if (metric := point.loss(settings.metric)) is not None:
            results.append(Result(point.parameterization, point.size, point.value, point.seed, metric))
    failures, waiting = [], []
    for run in study.pending():
        line = f"{run.directory.path.name} {run.parameterization}, {run.size}, seed {run.seed}"
        if failed := run.failed():
            failures.append(f"{line}: failed: {failed['error']}")
        else:
            waiting.append(f"{line}: not finished")
    return Report(study, results, analyse_results(study, results), [*failures, *waiting], len(failures))
