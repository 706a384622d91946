"""What stands in a study's folder before its runs train: the study's file, which can be read from anywhere and is
compared with another, and each run's configuration."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmup.data.errors import UserError
from depthmup.data.files import refuse_locked, write_atomically
from depthmup.data.storage import is_remote
from depthmup.launch.config import StudyFile
from depthmup.launch.reading import CONFIGURATION_FOLDER, list_configuration_folders, read_settings
from depthmup.launch.runs.planned import PlannedRun
from depthmup.train.config import find_identity, flatten
from depthmup.train.reading import from_plain, read_yaml, to_yaml
from depthmup.train.trunk import write_trunk
from depthmup.train.yaml_text import dump_yaml

if TYPE_CHECKING:
    from depthmup.launch.runs.study import Study

COMPARED = ("model", "optimizer", "schedule", "data", "train")


def make_paths_absolute(file: StudyFile) -> StudyFile:
    """The file as it can be read in another folder."""
    root = file.data.root if is_remote(file.data.root) else str(Path(file.data.root).absolute())
    study = replace(file.study, directory=str(Path(file.study.directory).absolute()))
    return replace(file, data=replace(file.data, root=root), study=study)


def list_portable_settings(path: Path, file: StudyFile) -> dict[str, Any]:
    """The file read from `path` as it can be read in another folder, with where it was written from."""
    written_from = {CONFIGURATION_FOLDER: str(list_configuration_folders(path)[0].absolute())}
    return written_from | read_settings(make_paths_absolute(file))


def refuse_other_study(file: StudyFile) -> None:
    """Raises UserError when the file's folder holds a study that differs in more than its grid."""
    written = file.directory / "study.yaml"
    if not written.exists():
        return
    try:
        old = list_comparable_settings(from_plain(StudyFile, read_yaml(written), str(written)))
    except UserError as error:
        raise UserError(f"{error} (written by another version? choose another study.name, or delete it)") from None
    new = list_comparable_settings(file)
    different = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    if different:
        key = different[0]
        raise UserError(
            f"{file.directory} holds another study ({key} is {old.get(key)} there and {new.get(key)} here"
            f"{f', and {len(different) - 1} more' if different[1:] else ''}): choose another study.name"
        )


def refuse_overridden(path: Path, file: StudyFile) -> None:
    """Raises UserError when the study in the file's folder was run with other settings than this file, read from
    `path`."""
    written = file.directory / "study.yaml"
    if not written.exists():
        return
    old = list_settings_by_key(from_plain(StudyFile, read_yaml(written), str(written)))
    new = list_settings_by_key(make_paths_absolute(file))
    if different := sorted(key for key in {*old, *new} if old.get(key) != new.get(key)):
        key = different[0]
        raise UserError(
            f"{path} is not what this study was run with ({key} was {old.get(key)} and is {new.get(key)}): "
            f"give its folder instead: {file.directory}"
        )


def list_settings_by_key(file: StudyFile) -> dict[str, Any]:
    """What changes a result, by dotted key; what is no run's or study's setting is left out."""
    return flatten({name: section for name, section in find_identity(file).items() if name in (*COMPARED, "study")})


def list_comparable_settings(file: StudyFile) -> dict[str, Any]:
    """What must be the same in all runs of a study, by dotted key: all but grid, hardware and logging."""
    found = {key: value for key, value in list_settings_by_key(file).items() if key.split(".")[0] in COMPARED}
    for key in ("model.width", "model.depth", file.study.hyperparameter):
        found.pop(key, None)
    return {**found, "study.hyperparameter": file.study.hyperparameter}


def check_writable(folder: Path) -> None:
    """Raises UserError when a study's folder could not be made there. Makes nothing."""
    root = folder.absolute()
    refuse_locked(root, "set study.directory to a folder that is", root)


def write_study(study: "Study") -> None:
    """Writes the study's file, every run's configuration, and where runs end early. Raises UserError for an unwritable
    folder, and for one that holds another study."""
    refuse_other_study(study.file)
    root = study.file.directory
    try:
        root.mkdir(parents=True, exist_ok=True)
        write_atomically(root / "study.yaml", dump_yaml(list_portable_settings(study.path, study.file)).encode())
        for run in study.pending():
            write_run(run)
        for run, limits in study.early_ends():
            if not run.done():
                run.directory.write_limits(limits)
    except OSError as error:
        raise UserError(
            f"{root}: cannot write there ({error.strerror}); set study.directory to a folder that is writable"
        ) from None


def write_run(run: PlannedRun) -> None:
    """Writes what the run's worker reads."""
    content = to_yaml(run.config)
    run.directory.path.mkdir(parents=True, exist_ok=True)
    if run.directory.failed() and not run.failed():
        (run.directory.path / "failed.json").unlink()  # of another run, which would keep this one back
    if run.trunk and not (run.directory.path / "trunk.json").exists():
        write_trunk(run.directory, run.trunk)
    if not run.directory.config.exists() or run.directory.config.read_text() != content:
        write_atomically(run.directory.config, content.encode())
