"""From a file to the study or the search that it describes."""

from collections.abc import Sequence
from pathlib import Path

from depthmup.launch.config import StudyFile
from depthmup.launch.reading import read_study_or_run
from depthmup.launch.runs.study import Study


def open_planned(path: Path, file: StudyFile, overrides: Sequence[str] = ()) -> Study:
    """A search where the file has a section `tune`, else a study."""
    if file.tune is None:
        return Study(path, file, overrides)
    from depthmup.launch.runs.search import Search

    return Search(path, file, overrides)


def targets_of(study: Study) -> list[Study]:
    """The targets that were scaled from the study, each as a study of one run. Raises UserError."""
    return [Study(file, read_study_or_run(file)) for file in study.written_targets()]
