"""A search: a study whose runs are suggestions of Optuna's samplers, in batches, and then its winners with new seeds.

Optuna's journal in the search's folder is the only memory of what was suggested: a launcher that is killed, and the
next one on any machine, go on from there. The runs are ordinary runs, found again by their hash.
"""

import fcntl
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmup.data.errors import UserError
from depthmup.data.lock import flock
from depthmup.data.storage import write_atomically
from depthmup.launch.config import StudyFile, TuneConfig
from depthmup.launch.runs.joint import JointStudy
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.space import check_space, default_values, distributions
from depthmup.train.reading import to_plain

if TYPE_CHECKING:
    import optuna
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

STARTUP = 10  # random suggestions before TPE's model
SPACE = "space"  # key of Optuna's study under which the space is kept


class Search(JointStudy):
    """A study's file with a section `tune`, and the runs that follow from what was suggested so far."""

    verb = "tune"

    def __init__(self, path: Path, file: StudyFile, overrides: Sequence[str] = ()) -> None:
        """Raises UserError for a key of the space that cannot be tuned, and for a value that is none for this run."""
        super().__init__(path, file, overrides)
        check_space(self._base, self.settings.space, f"{path}: tune.space")

    @property
    def settings(self) -> TuneConfig:
        assert self.file.tune is not None
        return self.file.tune

    @cached_property
    def points(self) -> list[PlannedRun]:
        """The runs of all valid suggestions, and those of the winners."""
        tried = [run for trial in self.trials() for run in self.runs_tried(trial)]
        return [*tried, *(run for number in self.winners() for run in self.reruns_of(number))]

    def own_values(self) -> dict[str, Any] | None:
        """The file's own values where the space holds all of them: the first suggestion."""
        return default_values(self._base, self.settings.space)

    @property
    def new_seeds(self) -> tuple[int, ...]:
        """Of the winners' runs."""
        first = max(self.settings.seeds) + 1
        return tuple(range(first, first + self.settings.rerun_seeds))

    def runs_tried(self, trial: "FrozenTrial") -> list[PlannedRun]:
        """The runs of one suggestion, read and checked once."""
        if not self.is_whole(trial):
            return []
        if trial.number not in self._runs_tried:
            self._runs_tried[trial.number] = self.runs_of(trial.params, self.settings.seeds)
        return self._runs_tried[trial.number]

    @cached_property
    def _runs_tried(self) -> dict[int, list[PlannedRun]]:
        return {}

    def reruns_of(self, number: int) -> list[PlannedRun]:
        """The runs with new seeds of trial `number`."""
        return self.runs_of(self.trials()[number].params, self.new_seeds)

    # ------------------------------------------------------------ what was suggested

    @cached_property
    def _space(self) -> dict[str, Any]:
        return {"space": to_plain(self.settings)["space"], "metric": self.file.study.metric}

    def _sampler(self, asked: int) -> "BaseSampler":
        """The same for every launcher after `asked` suggestions: a search that was stopped goes on as if it had not."""
        from optuna.samplers import RandomSampler, TPESampler

        seed = self.settings.seed * 1_000_003 + asked
        if self.settings.sampler == "random":
            return RandomSampler(seed=seed)
        return TPESampler(seed=seed, n_startup_trials=STARTUP, multivariate=True, constant_liar=True)

    def open_search(self) -> "optuna.Study":
        """Optuna's study in this folder, with the sampler for its next suggestion; it is made where there is none.
        Raises UserError for one of another space."""
        self._opened.sampler = self._sampler(len(self._opened.get_trials(deepcopy=False)))
        return self._opened

    @cached_property
    def _opened(self) -> "optuna.Study":
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError:
            raise UserError("a search needs Optuna: pip install 'depthmup[tune]'") from None

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # what is used of these has been stable for years
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.file.directory.mkdir(parents=True, exist_ok=True)
        storage = JournalStorage(JournalFileBackend(str(self._journal)))
        found = optuna.create_study(study_name="search", storage=storage, direction="minimize", load_if_exists=True)
        if SPACE not in found.user_attrs:
            found.set_user_attr(SPACE, self._space)
        elif found.user_attrs[SPACE] != self._space:
            raise UserError(
                f"{self._journal} is the journal of a search over another space: choose another study.name, or delete "
                "the file to begin anew (runs that fit stay valid)"
            )
        return found

    @property
    def _journal(self) -> Path:
        return self.file.directory / "search.journal"

    def trials(self) -> "list[FrozenTrial]":
        """All suggestions so far, by number. One whose launcher was killed while it asked lacks values."""
        return self._opened.get_trials(deepcopy=False) if self._journal.exists() else []

    def is_whole(self, trial: "FrozenTrial") -> bool:
        return trial.params.keys() == self.settings.space.keys()

    def loss(self, runs: list[PlannedRun]) -> float | None:
        """Mean over `runs` of the metric, where none is worse than a guess; None while one is not done."""
        chance, losses = math.log(self.file.model.num_classes), []
        for run in runs:
            if (loss := run.loss(self.file.study.metric)) is None:
                return None
            losses.append(min(loss, chance) if math.isfinite(loss) else chance)
        return sum(losses) / len(losses) if losses else None

    # ------------------------------------------------------------ going on

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps a second launcher from suggesting at the same time. Raises UserError where one does."""
        self.file.directory.mkdir(parents=True, exist_ok=True)
        with open(self.file.directory / "search.lock", "w") as lock:
            if not flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                raise UserError(f"{self.file.directory}: another process goes on with this search just now")
            yield

    def go_on(self) -> tuple[int, str]:
        """(number of new runs, why): tells Optuna what has ended, and asks for the next batch; after the last one
        chooses the winners. Durable: every later command sees them. To be called when no run is pending."""
        with self._alone():
            before = len(self.runs)
            self._tell()
            added = self._ask() or self._choose_winners()
            self._forget_runs()
            return len(self.runs) - before, added or "the search has ended"

    def _tell(self) -> None:
        from optuna.trial import TrialState

        search = self.open_search()
        for trial in search.get_trials(states=(TrialState.RUNNING,)):
            loss = self.loss(self.runs_tried(trial))
            if loss is None:  # its values do not go together, or its launcher was killed while it asked
                search.tell(trial.number, state=TrialState.FAIL)
            else:
                search.tell(trial.number, loss)

    def _ask(self) -> str | None:
        """Asks for a batch; None when the budget is spent."""
        search, space = self.open_search(), distributions(self.settings.space)
        first = len(search.get_trials(deepcopy=False))
        last = min(first + self.settings.batch, self.settings.trials)
        if first >= self.settings.trials:
            return None
        if first == 0 and (values := self.own_values()):
            search.enqueue_trial(values)
        for _ in range(first, last):
            search.ask(space)
        return f"suggestions {first + 1} to {last} of {self.settings.trials}"

    def winners(self) -> list[int]:
        """Numbers of the trials that are run anew; none before the search's end."""
        file = self.file.directory / "winners.json"
        return json.loads(file.read_text()) if file.exists() else []

    def _choose_winners(self) -> str | None:
        from optuna.trial import TrialState

        if self.winners():
            return None
        finished = self.open_search().get_trials(states=(TrialState.COMPLETE,))
        chance = math.log(self.file.model.num_classes)
        learned = [trial for trial in finished if trial.value is not None and trial.value < chance]
        if not learned:
            raise UserError(
                f"{self.path}: none of {self.settings.trials} suggestions learned anything ({len(finished)} finished): "
                "move tune.space, or give the runs more train.samples, under another study.name"
            )
        best = sorted(learned, key=lambda trial: (trial.value, trial.number))[: self.settings.rerun]
        write_atomically(self.file.directory / "winners.json", json.dumps([trial.number for trial in best]).encode())
        return f"the best {len(best)} with {self.settings.rerun_seeds} new seeds"
