"""A search: a study whose runs are suggestions of Optuna's samplers, in batches, and then its winners with new seeds.

Optuna's journal in the search's folder remembers what was suggested: a launcher that is killed, and the next one on
any machine, go on from there. The runs are ordinary runs, found again by their hash; what is suggested follows from
them and from the seed alone, so that even a journal that was cut is written again as it was.
"""

import fcntl
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmup.data.errors import UserError
from depthmup.data.files import write_atomically
from depthmup.data.lock import flock
from depthmup.launch.config import StudyFile
from depthmup.launch.findings.failures import ERRORS, LEAST_SEED_NOISE
from depthmup.launch.joint_config import TuneConfig
from depthmup.launch.runs.cost import count_flops
from depthmup.launch.runs.grouping import trains_one_by_one
from depthmup.launch.runs.joint import JointStudy
from depthmup.launch.runs.journal import SIDE_BY_SIDE, Journal
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.space import check_space, choose_default_values
from depthmup.launch.values import Range
from depthmup.train.reading import to_plain
from depthmup.train.rundir import Limits, parse_lines, read_object

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

WHOLE_BEFORE_PRUNING = 5  # suggestions trained to their end, as of Optuna's MedianPruner


class Search(JointStudy):
    """A study's file with a section `tune`, and the runs that follow from what was suggested so far."""

    verb = "tune"

    def __init__(self, path: Path, file: StudyFile, overrides: Sequence[str] = ()) -> None:
        """Raises UserError for a key of the space that cannot be tuned, and for a value that is none for this run."""
        super().__init__(path, file, overrides)
        check_space(self._base, self.settings.space, f"{path}: tune.space")
        if self.settings.prune and file.study.metric != "minival_loss":
            raise UserError(
                f"{path}: tune.prune looks at minival_loss, and study.metric is {file.study.metric}: add minival to "
                "train.evaluate, or leave tune.prune out"
            )
        if self.settings.flops and not self.expected:
            least = 1.005 * (len(self.settings.seeds) * self.flops + self.rerun_flops)  # three digits may round it down
            raise UserError(
                f"{path}: tune.flops {self.settings.flops:.3g} pays for no suggestion: a run is {self.flops:.3g}, and "
                f"the winners' new seeds are {self.rerun_flops:.3g}; raise it, or lower tune.rerun ({least:.3g} pays "
                "for one)"
            )
        unlimited = math.ceil(WHOLE_BEFORE_PRUNING / self.batch) * self.batch
        if self.settings.prune and self.expected <= unlimited:
            raise UserError(
                f"{path}: tune.prune would do nothing: it begins after {unlimited} suggestions, and there are "
                f"{self.expected}: leave it out, or make more of them"
            )

    @property
    def settings(self) -> TuneConfig:
        assert self.file.tune is not None
        return self.file.tune

    @cached_property
    def points(self) -> list[PlannedRun]:
        """The runs of all valid suggestions, and those of the winners."""
        tried = [run for trial in self.trials() for run in self.plan_trial_runs(trial)]
        return [*tried, *(run for number in self.winners() for run in self.plan_reruns(number))]

    def own_values(self) -> dict[str, Any] | None:
        """The file's own values where the space holds all of them: the first suggestion."""
        return choose_default_values(self._base, self.settings.space)

    @property
    def new_seeds(self) -> tuple[int, ...]:
        """Of the winners' runs."""
        first = max(self.settings.seeds) + 1
        return tuple(range(first, first + self.settings.rerun_seeds))

    def plan_trial_runs(self, trial: "FrozenTrial") -> list[PlannedRun]:
        """The runs of one suggestion, read and checked once; none where its values do not go together."""
        if trial.number not in self._runs_tried:
            runs: list[PlannedRun] = []
            with suppress(UserError):
                runs = self.runs_of(trial.params, self.settings.seeds)
            self._runs_tried[trial.number] = runs
        return self._runs_tried[trial.number]

    @cached_property
    def _runs_tried(self) -> dict[int, list[PlannedRun]]:
        return {}

    def plan_reruns(self, number: int) -> list[PlannedRun]:
        """The runs with new seeds of trial `number`."""
        return self.runs_of(self.trials()[number].params, self.new_seeds)

    # ------------------------------------------------------------ what was suggested

    @cached_property
    def _space(self) -> dict[str, Any]:
        """What a journal belongs to."""
        plain = to_plain(self.settings)
        found = {"space": plain["space"], "metric": self.file.study.metric}
        return {**found, "prune": plain["prune"]} if self.settings.prune else found

    @cached_property
    def journal(self) -> Journal:
        path = self.file.directory / "search.journal"
        return Journal(path, self._space, self.settings, 1 if trains_one_by_one(self.file) else SIDE_BY_SIDE)

    @property
    def batch(self) -> int:
        """How many suggestions are made at once, with nothing known of each other."""
        return self.journal.batch

    def trials(self) -> "list[FrozenTrial]":
        """All suggestions so far, by number."""
        journal = self.journal.read()
        return journal.get_trials(deepcopy=False) if journal else []

    # ------------------------------------------------------------ results

    def loss(self, runs: list[PlannedRun]) -> float | None:
        """Mean over `runs` of the metric, where none is worse than a guess; None while one is not done, and where one
        was ended early."""
        chance, losses = self.chance, []
        for run in runs:
            if run.is_pruned() or (loss := run.loss(self.file.study.metric)) is None:
                return None
            losses.append(min(loss, chance) if math.isfinite(loss) else chance)
        return sum(losses) / len(losses) if losses else None

    @property
    def choices(self) -> list[PlannedRun]:
        found = []
        for key, dimension in self.settings.space.items():
            for value in () if isinstance(dimension, Range) else dimension:
                with suppress(UserError):  # which alone goes with none of the others
                    found += self.runs_of({key: value}, self.settings.seeds[:1])
        return found

    # ------------------------------------------------------------ cost

    @cached_property
    def flops(self) -> int:
        """Of one run to its end."""
        return count_flops(self.examples)[self.examples[0].size][1]

    @property
    def rerun_flops(self) -> int:
        return self.settings.most_winners * self.settings.rerun_seeds * self.flops

    @property
    def total_flops(self) -> int:
        """Of all suggestions, each trained to its end, and of the best with new seeds."""
        return self.expected * len(self.settings.seeds) * self.flops + self.rerun_flops

    def affordable(self, begun: int) -> int:
        """How many more suggestions the budget pays for. Those from number `begun` on count as trained to their end,
        those before it as far as they were trained."""
        trials = self.trials()
        if self.settings.flops is None:
            return max(self.settings.most_trials - len(trials), 0)
        shares = [run.share_trained() for trial in trials[:begun] for run in self.plan_trial_runs(trial)]
        seeds = len(self.settings.seeds)
        spent = (sum(shares) + seeds * (len(trials) - min(begun, len(trials)))) * self.flops + self.rerun_flops
        return max(math.floor((self.settings.flops - spent) / (seeds * self.flops) + 1e-9), 0)

    @property
    def expected(self) -> int:
        """Suggestions in all; more where some are ended early and the budget is one of FLOPs."""
        trials = len(self.trials())
        return trials + self.affordable(trials)

    @property
    def runs_to_come(self) -> int:
        """Those of the suggestions that are not made yet, and the winners' new seeds."""
        settings, trials = self.settings, len(self.trials())
        again = 0 if self.winners() else settings.most_winners * settings.rerun_seeds
        return self.affordable(trials) * len(settings.seeds) + again

    # ------------------------------------------------------------ early ends

    def find_limits(self, number: int) -> dict[int, float | None]:
        """Step -> the loss above which the runs of suggestion `number` end there, None where none do: the median of the
        runs to their end of the batches before its own, as of Optuna's MedianPruner. It hangs on nothing else: a
        search that was stopped ends the same runs."""
        begin = number - number % self.batch
        if begin not in self._limits:
            steps = prune_steps(self.settings.prune, self.file.train.num_steps)
            ended = [self.plan_trial_runs(trial) for trial in self.trials()[:begin]]
            whole = [runs for runs in ended if self.loss(runs) is not None]
            losses = [self._losses_on_the_way(run) for runs in whole for run in runs]
            self._limits[begin] = {
                step: statistics.median(found)
                if len(whole) >= WHOLE_BEFORE_PRUNING and (found := [at[step] for at in losses if step in at])
                else None
                for step in steps
            }
        return self._limits[begin]

    @cached_property
    def _limits(self) -> dict[int, dict[int, float | None]]:
        return {}

    def _losses_on_the_way(self, run: PlannedRun) -> dict[int, float]:
        """Step -> the run's metric there."""
        metric, name = self.file.study.metric, run.directory.path.name
        if name not in self._on_the_way:
            lines = parse_lines(run.directory.metrics, "step")
            self._on_the_way[name] = {line["step"]: line[metric] for line in lines if metric in line}
        return self._on_the_way[name]

    @cached_property
    def _on_the_way(self) -> dict[str, dict[int, float]]:
        return {}

    def early_ends(self) -> Iterator[tuple[PlannedRun, Limits]]:
        """Where the suggestions' runs end early."""
        if self.settings.prune:
            for trial in self.trials():
                for run in self.plan_trial_runs(trial):
                    yield run, Limits(self.find_limits(trial.number))

    # ------------------------------------------------------------ going on

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps a second launcher from suggesting at the same time. Raises UserError where one does."""
        self.file.directory.mkdir(parents=True, exist_ok=True)
        with open(self.file.directory / "search.lock", "w") as lock:
            if not flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                raise UserError(f"{self.file.directory}: another process is continuing this search now")
            yield

    def plan_next_batch(self) -> tuple[int, str]:
        """(number of runs to train now, why): tells Optuna what has ended, and asks for the next batch; after the last
        one chooses the winners. Durable: every later command sees them. To be called when no run is pending.

        What is suggested follows from the runs of earlier batches alone: where the journal lost its end, the same is
        suggested again, and its runs are found. So a batch that is not whole is first completed, with nothing told of
        its own runs. One that the budget cuts short is the last.
        """
        with self._alone():
            journal = self.journal.open()
            while why := self._advance(journal):
                self._forget_runs()
                if pending := self.pending():
                    return len(pending), why
            return 0, "the search has ended"

    def _advance(self, journal: "optuna.Study") -> str | None:
        """Asks for one batch, whose runs may all be done, or chooses the winners; None when it has."""
        batch, asked = self.batch, len(journal.get_trials(deepcopy=False))
        begin, left = asked - asked % batch, batch - asked % batch
        if asked == begin or not self.affordable(begin):
            begin, left = asked, batch if asked == begin else 0
        self._tell(journal, begin)
        if count := min(left, self.affordable(begin)):
            self.journal.suggest(journal, count, self.own_values())
            of_all = "" if self.settings.flops else f" of {self.settings.most_trials}"
            numbers = f"suggestion {asked + 1}" if count == 1 else f"suggestions {asked + 1} to {asked + count}"
            return f"{numbers}{of_all}"
        return None if self.winners() else self._choose_winners()

    def _tell(self, journal: "optuna.Study", begin: int) -> None:
        """What became of the suggestions before number `begin`."""
        from optuna.trial import TrialState

        for trial in journal.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            runs = self.plan_trial_runs(trial)
            if trial.number >= begin:
                continue
            if not runs:  # its values do not go together
                journal.tell(trial.number, state=TrialState.FAIL)
            elif any(run.is_pruned() for run in runs):
                journal.tell(trial.number, state=TrialState.PRUNED)
            else:
                journal.tell(trial.number, self.loss(runs))

    @property
    def _winners_file(self) -> Path:
        return self.file.directory / "winners.json"

    def winners(self) -> list[int]:
        """Numbers of the trials that are run anew; none before the search's end."""
        content = read_object(self._winners_file, "of", "trials")
        if not content:
            return []
        found: list[int] = content["trials"]
        return found if content["of"] == len(self.trials()) else []  # others: the search was made longer since

    def rank_learned(self) -> list[int]:
        """Numbers of the suggestions that learned something, the best first. Raises UserError where none did."""
        tried = {trial.number: self.plan_trial_runs(trial) for trial in self.trials()}
        losses = {number: loss for number, runs in tried.items() if (loss := self.loss(runs)) is not None}
        guess = self.chance * math.exp(-ERRORS * LEAST_SEED_NOISE)  # of many guesses some lie below chance by noise
        if learned := [number for number, loss in losses.items() if loss < guess]:
            return sorted(learned, key=lambda number: (losses[number], number))
        pruned = sum(any(run.is_pruned() for run in runs) for runs in tried.values())
        mend = "move tune.space, or give the runs more train.samples"
        if pruned > len(losses):
            mend = "leave tune.prune out, or give it later shares"
        early = f", {pruned} ended early" if pruned else ""
        raise UserError(
            f"{self.path}: none of {len(tried)} suggestions learned anything ({len(losses)} finished{early}): "
            f"{mend}, under another study.name"
        )

    def _choose_winners(self) -> str:
        best = self.rank_learned()[: self.settings.rerun]
        chosen = {"of": len(self.trials()), "trials": best}
        write_atomically(self._winners_file, json.dumps(chosen).encode())
        return f"the best {len(best)} with {self.settings.rerun_seeds} new seeds"


def prune_steps(shares: Sequence[float], num_steps: int) -> list[int]:
    """The steps at which runs may end early."""
    return sorted({min(max(round(share * num_steps), 1), num_steps - 1) for share in shares})
