"""The report of a search or of a verification."""

from rich.console import Console

from depthmup.launch.runs.joint import JointStudy
from depthmup.launch.runs.search import Search
from depthmup.launch.runs.study import Study
from depthmup.launch.runs.tuned import after_file, study_after
from depthmup.launch.runs.verification import Verification


def show_joint(study: JointStudy, console: Console) -> Study | None:
    """Writes and prints it. Returns the study that is kept for after a search, now with the tuned values. Raises
    UserError before the runs' end."""
    if isinstance(study, Verification):
        from depthmup.launch.report.verification import show_verification

        show_verification(study, console)
        return None
    from depthmup.launch.report.search import show_search

    assert isinstance(study, Search)
    found = show_search(study, console)
    return study_after(study, found.winners[0].values) if after_file(study).exists() else None
