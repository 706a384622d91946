"""From a file to the configuration of a study or a run: overrides, and the profile that `launch.cluster` names."""

from operator import attrgetter
from pathlib import Path
from typing import Any

from depthmup.data.errors import UserError
from depthmup.data.paths import expand_path, protect
from depthmup.launch.axes import TRAINING_AXES
from depthmup.launch.config import LaunchConfig, StudyFile
from depthmup.launch.paths import PACKAGE, find_user_folder, quote_command
from depthmup.train.config import RunConfig
from depthmup.train.reading import from_plain, read_yaml, run_in, set_dotted, to_plain
from depthmup.train.yaml_text import load_yaml

PLACES = ("local", "debug", "slurm")  # that need no profile
CONFIGURATION_FOLDER = "x-configuration-folder"  # a key of a study's own file: where it was written from


def list_configuration_folders(path: Path) -> list[Path]:
    """The folder of the configuration `path`. Of a study's folder, and of a file in it: where the study was written
    from, that folder, and the one above it."""
    folder = path if path.is_dir() else path.parent
    file = folder / "study.yaml"
    written = load_yaml(file.read_text(encoding="utf-8-sig"), str(file)) if file.exists() else None
    if not isinstance(written, dict):
        return [folder]
    return [Path(written.get(CONFIGURATION_FOLDER, folder)), folder, folder.resolve().parent]


def find_profile(name: str, path: Path) -> Path:
    """The profile `name` for the configuration `path`: a path is that file; a name is looked for in the working folder,
    beside the configuration, in the user's configuration folder and among the examples. Raises UserError."""
    if "/" in name or name.endswith((".yaml", ".yml")):
        file = Path(expand_path(name))
        if not file.is_file():
            raise UserError(f"cluster {name}: no such file")
        return file
    own = find_user_folder("XDG_CONFIG_HOME", ".config")
    places = [Path("configs"), Path(), *list_configuration_folders(path), *([own] if own else []), PACKAGE / "configs"]
    folders = list(dict.fromkeys((place / "cluster").resolve() for place in places))
    for folder in folders:
        if (file := folder / f"{name}.yaml").exists():
            return file
    known = sorted({*PLACES, *(file.stem for folder in folders for file in folder.glob("*.yaml"))})
    raise UserError(f"cluster {name!r}: no {name}.yaml in {' or '.join(map(str, folders))}; known: {', '.join(known)}")


def apply_profile(raw: dict[str, Any], path: Path) -> None:
    """Replaces `launch.cluster: NAME` by the keys of the profile NAME.yaml; the file's own launch keys win. Raises
    UserError."""
    launch = raw.get("launch")
    if not isinstance(launch, dict) or (name := launch.get("cluster", "local")) in PLACES:
        return
    found = find_profile(str(name), path)
    profile = read_yaml(found)
    from_plain(LaunchConfig, {"cluster": "slurm", **profile}, str(found))
    raw["launch"] = {**profile, **launch, "cluster": profile.get("cluster", "slurm")}


def read_settings(file: StudyFile) -> dict[str, Any]:
    """The file as plain data to be written. Of launch only what is not the default: a file's keys win over a profile's,
    and nobody chose these."""
    plain: dict[str, Any] = to_plain(file)
    defaults = to_plain(LaunchConfig())
    launch = {key: value for key, value in plain.pop("launch").items() if value != defaults[key]}
    return {**plain, "launch": launch} if launch else plain


def read_named_cluster(raw: dict[str, Any]) -> Any:
    launch = raw.get("launch")
    return launch.get("cluster") if isinstance(launch, dict) else None


def override(raw: dict[str, Any], overrides: tuple[str, ...]) -> None:
    """Applies them to a file's plain data. A section launch that names its cluster is about that cluster: another one
    on the command line takes its place as a whole."""
    given: dict[str, Any] = {}
    for one in overrides:
        set_dotted(given, one)
    if read_named_cluster(raw) and read_named_cluster(given) not in (None, read_named_cluster(raw)):
        del raw["launch"]
    for one in overrides:
        set_dotted(raw, one)


def read_raw(path: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """The file as plain data with `overrides`; for a study's folder, the file that the study wrote there."""
    if path.is_dir():
        file = path / "study.yaml"
        if not file.exists():
            raise UserError(f"{path}: no study.yaml in this folder: give a YAML file, or a study's folder as runs/NAME")
        raw = read_yaml(file)
        raw["study"] |= {"name": path.resolve().name, "directory": protect(str(path.resolve().parent))}
    else:
        raw = read_yaml(path)
    override(raw, overrides)
    apply_profile(raw, path)
    return raw


# By launch.cluster: the keys of the section that it alone reads.
READ_BY = {"slurm": ("partition", "account", "qos", "constraint", "sbatch", "continuation"), "local": ("slots",)}
SAME_MACHINE = ("local", "debug")  # debug is one slot


def refuse_idle_overrides(file: StudyFile, overrides: tuple[str, ...], path: Path) -> None:
    """Raises UserError for what a command line changes and no run of the study takes: `depthmup train` reads these keys
    of the same file, so that they may stand there. So may what one kind of cluster alone reads."""
    study, joint = file.study, file.tune or file.verify
    takes = {
        **{f"model.{axis}": [getattr(size, axis) for size in study.sizes] for axis in ("width", "depth")},
        "seed": [*(joint.seeds if joint else ()), *(study.seeds if not joint or len(study.sizes) > 1 else ())],
    }
    if not joint:
        takes[study.hyperparameter] = list(study.grid)
    section = "tune" if file.tune else "verify" if file.verify else "study"
    instead = {"seed": f"{section}.seeds", study.hyperparameter: "study.values"}
    given = [one.partition("=")[0].strip() for one in overrides]
    for cluster, key in ((cluster, key) for cluster in READ_BY for key in given):
        of, name = [*key.split("."), ""][:2]
        others = SAME_MACHINE if cluster in SAME_MACHINE else (cluster,)
        if of == "launch" and name in READ_BY[cluster] and file.launch.cluster not in others:
            raise UserError(
                f"{path}: {key} would do nothing: launch.cluster is {file.launch.cluster}: add --cluster {cluster}, or "
                "leave it out"
            )
    for key in (key for key in takes if key in given):
        if (value := attrgetter(key)(file)) not in takes[key]:
            raise UserError(
                f"{path}: {key}={value} would do nothing: {instead.get(key, 'study.sizes')} says what the study's runs "
                "have; change that"
            )


def read_study(path: Path, overrides: tuple[str, ...] = ()) -> StudyFile:
    """Reads and checks a study's file. Raises UserError."""
    file = parse_study(read_raw(path, overrides), path)
    refuse_idle_overrides(file, overrides, path)
    return file


def parse_study(raw: dict[str, Any], path: Path) -> StudyFile:
    """The study in the plain data of the file `path`, which may be a pipe: nothing is read twice. Raises UserError."""
    if "study" not in raw:
        raise UserError(f"{path}: no section study:, for a study; for this one run: {quote_command('train', path)}")
    file = from_plain(StudyFile, raw, str(path))
    base = file.study.sizes[0]
    if len(file.study.sizes) == len(file.study.grid) == 1:
        return file  # one run, of any size
    if (base.width, base.depth) != (file.model.base_width, file.model.base_depth):
        raise UserError(
            f"{path}: the first of study.sizes ({base}) must be the base, model.base_width {file.model.base_width} and "
            f"model.base_depth {file.model.base_depth}"
        )
    for axis in file.optional_axes:
        key = f"train.{TRAINING_AXES[axis]}" if axis in TRAINING_AXES else f"model.base_{axis}"
        if getattr(base, axis) != (own := attrgetter(key)(file)):
            leave = f"leave its {axis} out, or " if file.own_axes[axis] == own else ""
            raise UserError(
                f"{path}: the first of study.sizes ({base}) must be the base: {leave}state {axis} {own}, which is {key}"
            )
    return file


OF_ONE_RUN = {"name", "directory", "metric", "regret_limit", "pool_different"}  # what a run's file may have of a study


def read_study_or_run(path: Path, overrides: tuple[str, ...] = ()) -> StudyFile:
    """A study's file, or one run's configuration as a study of that one run, named like the file. Raises UserError."""
    raw = read_raw(path, overrides)
    given = raw.get("study", {})
    if not isinstance(given, dict) or set(given) - OF_ONE_RUN:
        file = parse_study(raw, path)
    else:
        run = run_in(raw, str(path))
        study = {
            "name": f"{path.stem}_verify" if "verify" in raw else path.stem,
            "parameterizations": [vars(run.parameterization)],
            "sizes": [{"width": run.model.width, "depth": run.model.depth}],
            "values": [run.optimizer.lr],
            "seeds": [run.seed],
            "metric": "minival_loss" if "minival" in run.train.evaluate else "train_loss",
            "extend": 0,
            "more_seeds": 0,
            **given,
        }
        file = from_plain(StudyFile, {**raw, "study": study}, str(path))
    refuse_idle_overrides(file, overrides, path)
    return file


def read_run(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Reads one run's configuration, as `train.reading.run_in`. Raises UserError."""
    return run_in(read_raw(path, overrides), str(path))
