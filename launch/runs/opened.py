"""From a file to the study or the search that it describes."""

from collections.abc import Sequence
from pathlib import Path

from depthmup.launch.config import StudyFile
from depthmup.launch.reading import read_study_or_run
from depthmup.launch.runs.study import Study


def open_planned(path: Path, file: StudyFile, overrides: Sequence[str] = ()) -> Study:
    """A search where the file has a section `tune`, a verification where it has a section `verify`, else a study."""
    if file.tune:
        from depthmup.launch.runs.search import Search
        from depthmup.launch.runs.tuned import search_of

        return Search(path, search_of(file), overrides)
    if file.verify:
        from depthmup.launch.runs.verification import Verification

        return Verification(path, file, overrides)
    return Study(path, file, overrides)


def list_studies(study: Study) -> list[Study]:
    """The study, after a search the study that follows it, and each target that was scaled from that as a study of one
    run. Raises UserError."""
    from depthmup.launch.runs.search import Search
    from depthmup.launch.runs.tuned import find_study_after

    after = find_study_after(study) if isinstance(study, Search) else None
    studies = [study, after] if after else [study]
    return [*studies, *(Study(file, read_study_or_run(file)) for file in studies[-1].written_targets())]
