"""What Optuna's sampler has suggested so far, in Optuna's journal, and what it suggests next."""

import warnings
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmup.data.errors import UserError
from depthmup.data.storage import write_atomically
from depthmup.launch.joint_config import TuneConfig
from depthmup.launch.runs.space import distributions, hashable

if TYPE_CHECKING:
    import optuna
    from optuna.samplers import BaseSampler
    from optuna.storages import JournalStorage

STARTUP = 10  # random suggestions before TPE's model
NAME, SPACE = "search", "space"  # of Optuna's study, and the key under which it keeps what it belongs to


class Journal:
    """The journal in the file `path`; `belongs` is what all of its suggestions have in common."""

    def __init__(self, path: Path, belongs: dict[str, Any], settings: TuneConfig) -> None:
        self.path, self.belongs, self.settings = path, belongs, settings

    @cached_property
    def _storage(self) -> "JournalStorage":
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
        except ImportError:
            raise UserError("a search needs Optuna: pip install 'depthmup[tune]'") from None

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
        storage = self._storage
        import optuna

        if NAME not in optuna.get_all_study_names(storage):
            return None
        return self._refuse_other(optuna.load_study(study_name=NAME, storage=storage))

    def open(self) -> "optuna.Study":
        """As `read`, for who writes: it is made where there is none, and a line that a killed process, or a full disk,
        cut short is taken off."""
        if self.path.exists() and not (content := self.path.read_bytes()).endswith(b"\n"):
            write_atomically(self.path, content[: content.rfind(b"\n") + 1])
        storage = self._storage
        import optuna

        found = optuna.create_study(study_name=NAME, storage=storage, direction="minimize", load_if_exists=True)
        if SPACE not in found.user_attrs:
            found.set_user_attr(SPACE, self.belongs)
        return self._refuse_other(found)

    def _refuse_other(self, found: "optuna.Study") -> "optuna.Study":
        if found.user_attrs.get(SPACE, self.belongs) != self.belongs:
            raise UserError(
                f"{self.path} is the journal of a search over another space: choose another study.name, or delete "
                "the file to begin anew (runs that fit stay valid)"
            )
        return found

    def _sampler(self, number: int) -> "BaseSampler":
        """The same for suggestion `number` in every launcher: one that was lost is suggested again."""
        from optuna.samplers import RandomSampler, TPESampler

        seed = self.settings.seed * 1_000_003 + number
        if self.settings.sampler == "random":
            return RandomSampler(seed=seed)
        return TPESampler(seed=seed, n_startup_trials=STARTUP, multivariate=True, constant_liar=True)

    def suggest(self, opened: "optuna.Study", count: int, first: dict[str, Any] | None) -> None:
        """Writes `count` more suggestions, each in one line, as the sampler's own many might be cut in between: it
        works on a copy in memory. `first`: the values of the very first one."""
        import optuna
        from optuna.trial import TrialState, create_trial

        space = distributions(self.settings.space)
        copy = optuna.create_study()
        for trial in opened.get_trials(deepcopy=False):
            params = {key: hashable(value) for key, value in trial.params.items()}
            copy.add_trial(create_trial(state=trial.state, value=trial.value, params=params, distributions=space))
        known = len(copy.get_trials(deepcopy=False))
        if known == 0 and first:
            copy.enqueue_trial(first)
        for number in range(known, known + count):
            copy.sampler = self._sampler(number)
            params = copy.ask(space).params
            opened.add_trial(create_trial(state=TrialState.RUNNING, params=params, distributions=space))
