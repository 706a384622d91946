"""What Optuna's sampler has suggested so far, in Optuna's journal, and what it suggests next."""

import warnings
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmup.data.errors import UserError
from depthmup.data.files import write_atomically
from depthmup.launch.joint_config import TuneConfig
from depthmup.launch.runs.space import find_value, make_distributions, make_hashable

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.storages import JournalStorage
    from optuna.trial import FrozenTrial

LEAST_STARTUP, MOST_STARTUP = 4, 8  # suggestions before TPE's model: evenly spread over the space
SIDE_BY_SIDE = 8  # suggestions at once where several processes, a GPU or Slurm train them
# of Optuna's study, and the keys under which it keeps what it belongs to and how many suggestions are made at once
NAME, SPACE, BATCH = "search", "space", "batch"


class Journal:
    """The journal in the file `path`; `belongs` is what all of its suggestions have in common, `batch` is for a search
    that begins now, where the settings state none."""

    def __init__(self, path: Path, belongs: dict[str, Any], settings: TuneConfig, batch: int) -> None:
        self.path, self.belongs, self.settings, self._batch = path, belongs, settings, batch

    @cached_property
    def batch(self) -> int:
        """How many suggestions are made at once. Where none is stated, a search keeps what it began with: on another
        machine, too, it goes on as if it had not been stopped."""
        if self.settings.batch:
            return self.settings.batch
        begun = self.read()
        if begun is None:
            return self._batch
        # a journal of before it was kept has SIDE_BY_SIDE
        kept: int = begun.user_attrs.get(BATCH, SIDE_BY_SIDE if begun.get_trials(deepcopy=False) else self._batch)
        return kept

    @property
    def startup(self) -> int:
        """How many suggestions are spread evenly."""
        return min(max(self.batch, LEAST_STARTUP), MOST_STARTUP)

    @cached_property
    def _storage(self) -> "JournalStorage":
        if not all(map(find_spec, ("optuna", "sklearn"))):
            raise UserError("a search needs Optuna and scikit-learn: pip install 'depthmup[tune]'")
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        class NoLock(JournalFileOpenLock):
            """Who writes holds the search's own lock, which, unlike Optuna's, no killed process leaves behind."""

            def acquire(self) -> bool:
                return True

            def release(self) -> None:
                pass

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # what is used of these has been stable for years
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        path = str(self.path)
        return JournalStorage(JournalFileBackend(path, NoLock(path)))

    def read(self) -> "optuna.Study | None":
        """None where there is none. Raises UserError for one of another space."""
        if not self.path.exists():
            return None
        storage = self._read_storage()
        import optuna

        if NAME not in optuna.get_all_study_names(storage):
            return None
        return self._refuse_other(optuna.load_study(study_name=NAME, storage=storage))

    def _read_storage(self) -> "JournalStorage":
        """Raises UserError for a file with a damaged line before its last one, which no cut leaves behind."""
        try:
            return self._storage
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:  # no JSON, or another's
            raise UserError(
                f"{self.path}: damaged ({type(error).__name__}: {error}): move this file away; the same command "
                "suggests the same again, and finds the runs that are done"
            ) from None

    def open(self) -> "optuna.Study":
        """As `read`, for who writes: it is made where there is none, and a line that a killed process, or a full disk,
        cut short is taken off."""
        if self.path.exists() and not (content := self.path.read_bytes()).endswith(b"\n"):
            write_atomically(self.path, content[: content.rfind(b"\n") + 1])
        storage = self._read_storage()
        import optuna

        found = optuna.create_study(study_name=NAME, storage=storage, direction="minimize", load_if_exists=True)
        if SPACE not in found.user_attrs:
            found.set_user_attr(SPACE, self.belongs)
        if not (self.settings.batch or BATCH in found.user_attrs or found.get_trials(deepcopy=False)):
            found.set_user_attr(BATCH, self.batch)
        return self._refuse_other(found)

    def _refuse_other(self, found: "optuna.Study") -> "optuna.Study":
        if found.user_attrs.get(SPACE, self.belongs) != self.belongs:
            raise UserError(
                f"{self.path} is the journal of a search over another space: choose another study.name, or delete "
                "the file to begin anew (runs that fit stay valid)"
            )
        return found

    @cached_property
    def _distributions(self) -> "dict[str, BaseDistribution]":
        return make_distributions(self.settings.space)

    def _sampler(self, number: int) -> "BaseSampler":
        """The same for suggestion `number` in every launcher: one that was lost is suggested again."""
        from optuna.samplers import RandomSampler, TPESampler

        seed, space = self.settings.seed * 1_000_003 + number, self._distributions
        if self.settings.sampler == "random" or number < self.startup:
            return RandomSampler(seed=seed)

        class Sampler(TPESampler):
            """All suggestions are of one space, which TPE would look for in every one of them, for each new one."""

            def infer_relative_search_space(
                self, study: "optuna.Study", trial: "FrozenTrial"
            ) -> "dict[str, BaseDistribution]":
                return dict(sorted(space.items()))

        return Sampler(seed=seed, n_startup_trials=1, multivariate=True, constant_liar=True)

    @cached_property
    def _spread(self) -> list[dict[str, Any]]:
        """The first suggestions, which nothing is known for: scrambled Sobol points."""
        from scipy.stats import qmc

        space = dict(sorted(self.settings.space.items()))
        points = qmc.Sobol(len(space), seed=self.settings.seed).random(MOST_STARTUP)[: self.startup].tolist()
        return [{key: find_value(space[key], at) for key, at in zip(space, point, strict=True)} for point in points]

    @cached_property
    def _copy(self) -> "optuna.Study":
        """What the sampler works on, in memory: its own many lines of a suggestion might be cut in between."""
        import optuna

        return optuna.create_study()

    def _update_copy(self, opened: "optuna.Study") -> int:
        """Takes over what was told and suggested since the last batch; returns the number of suggestions."""
        from optuna.trial import create_trial

        copied = self._copy.get_trials(deepcopy=False)
        trials = opened.get_trials(deepcopy=False)
        for trial, known in zip(trials, copied, strict=False):
            if trial.state != known.state:
                self._copy.tell(trial.number, trial.value, state=trial.state)
        for trial in trials[len(copied) :]:
            params = {key: make_hashable(value) for key, value in trial.params.items()}
            one = create_trial(state=trial.state, value=trial.value, params=params, distributions=self._distributions)
            self._copy.add_trial(one)
        return len(trials)

    def suggest(self, opened: "optuna.Study", count: int, first: dict[str, Any] | None) -> None:
        """Writes `count` more suggestions, each in one line. `first`: the values of the very first one."""
        from optuna.trial import TrialState, create_trial

        known = self._update_copy(opened)
        for number in range(known, known + count):
            if number == 0 and first:
                self._copy.enqueue_trial(first)
            elif number < self.startup and self.settings.sampler != "random":
                self._copy.enqueue_trial(self._spread[number])
            self._copy.sampler = self._sampler(number)
            params = self._copy.ask(self._distributions).params
            one = create_trial(state=TrialState.RUNNING, params=params, distributions=self._distributions)
            opened.add_trial(one)
