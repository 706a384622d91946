"""A study over sizes whose file has a section `tune`: first the search at its base, then the study with what it found.

The search has a folder of its own, NAME_tune. There the file of the study is kept while it is searched (after.yaml),
and then written with the tuned values (NAME.yaml).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmup.data.errors import UserError
from depthmup.data.files import write_atomically
from depthmup.launch.config import StudyConfig, StudyFile
from depthmup.launch.reading import read_study
from depthmup.launch.runs.space import apply_values, list_examples
from depthmup.launch.runs.study import Study
from depthmup.launch.runs.written import check_writable, list_portable_settings
from depthmup.train.reading import from_plain, to_plain
from depthmup.train.yaml_text import dump_yaml

if TYPE_CHECKING:
    from depthmup.launch.runs.search import Search


def is_over_sizes(file: StudyFile) -> bool:
    return len(file.study.sizes) > 1


def search_of(file: StudyFile) -> StudyFile:
    """The search alone, as the file of one run: of the first parameterization at the base, in a folder of its own."""
    if not is_over_sizes(file):
        return file
    first, base = file.study.parameterizations[0], file.study.sizes[0]
    study = replace(
        file.study,
        name=f"{file.study.name}_tune",
        parameterizations=(first,),
        sizes=(base,),
        hyperparameter="optimizer.lr",
        values=(file.optimizer.lr,),
        seeds=(file.seed,),
        budget=StudyConfig.budget,
        extend=0,
        more_seeds=0,
    )
    return replace(
        file, model=replace(file.model, width=base.width, depth=base.depth), parameterization=first, study=study
    )


def apply_tuned(file: StudyFile, values: Mapping[str, Any], source: str) -> StudyFile:
    """The study with the tuned `values`, by dotted key; what the parameterization has of them, all that are compared
    have. Raises UserError where one of these has no such key."""
    plain: dict[str, Any] = to_plain(file)
    del plain["tune"], plain["parameterization"]
    of_all = {key: value for key, value in values.items() if key.startswith("parameterization.")}
    plain = apply_values(plain, {key: value for key, value in values.items() if key not in of_all})
    for preset in plain["study"]["parameterizations"]:
        preset |= {key.removeprefix("parameterization."): value for key, value in of_all.items()}
    found: StudyFile = from_plain(StudyFile, plain, source)
    return found


def locate_following_study(search: "Search") -> Path:
    """The study that is to come, as the user wrote it."""
    return search.file.directory / "after.yaml"


def locate_tuned_file(search: "Search", study: StudyFile) -> Path:
    return search.file.directory / f"{study.study.name}.yaml"


def keep_study(search: "Search", file: StudyFile) -> None:
    """Writes the study that is to come after `search`, read from the same file. Raises UserError for a file without
    one, and where the tuned values would be none for it: before anything is trained."""
    path = locate_following_study(search)
    if not is_over_sizes(file):
        if path.exists():  # the search's own folder was given, and its study is there
            return
        raise UserError(
            f"{search.path} has no sizes to transfer over: add study.sizes and study.values, the base first; to tune "
            f"alone: {search.command('tune')}"
        )
    apply_tuned(file, {key: list_examples(each)[0] for key, each in search.settings.space.items()}, str(search.path))
    check_writable(search.file.directory)
    search.file.directory.mkdir(parents=True, exist_ok=True)
    write_atomically(path, dump_yaml(list_portable_settings(search.path, file)).encode())


def write_following_study(search: "Search", values: Mapping[str, Any]) -> Study:
    """The kept study with the tuned `values`, written beside it."""
    file = read_study(locate_following_study(search))
    path = locate_tuned_file(search, file)
    tuned = apply_tuned(file, values, str(path))
    content = dump_yaml(list_portable_settings(locate_following_study(search), tuned)).encode()
    if not path.exists() or path.read_bytes() != content:  # a colleague, who may not write there, finds it
        write_atomically(path, content)
    return Study(path, tuned)


def find_study_after(search: "Search") -> Study | None:
    """The study that follows, once its file is written."""
    if not locate_following_study(search).exists():
        return None
    path = locate_tuned_file(search, read_study(locate_following_study(search)))
    return Study(path, read_study(path)) if path.exists() else None
