"""What users write outside of any shell: ~ and $VAR in paths, keys, numbers, lists, pipes, names of profiles."""

import os
import pwd
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from depthmup.data.errors import UserError
from depthmup.data.paths import expand, expand_all, find_own_home, protect
from depthmup.launch.cli import cli
from depthmup.launch.paths import ConfigPath
from depthmup.launch.reading import find_profile, read_run, read_study, read_study_or_run
from depthmup.launch.runs.cost import locate_cache
from depthmup.launch.runs.study import Study
from depthmup.train import __main__ as train_command
from depthmup.train.config import RunConfig
from depthmup.train.reading import from_plain, read_yaml, to_yaml
from depthmup.train.yaml_text import dump_yaml, load_yaml


@pytest.fixture
def home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("PLACE", "/place")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return folder


def test_a_path_is_expanded_as_a_shell_would_and_what_is_not_set_is_named(home_folder: Path) -> None:
    assert expand("~/runs") == f"{home_folder}/runs"
    assert expand("~") == str(home_folder)
    assert expand("~root/x") == f"{pwd.getpwnam('root').pw_dir}/x"
    assert expand("$PLACE/${PLACE}x/~") == "/place//placex/~"
    assert expand("a$$PLACE") == "a$PLACE"
    assert expand("plain, 100 $ and s3://bucket/~x") == "plain, 100 $ and s3://bucket/~x"
    assert expand_all("~/a:/a,$PLACE:/b:ro") == f"{home_folder}/a:/a,/place:/b:ro"
    for text, name in (("$NOWHERE/x", "NOWHERE"), ("${EMPTY}/x", "EMPTY"), ("~nobody-here/x", "nobody-here")):
        with pytest.raises(ValueError, match=name):
            expand(text)
    for literal in ("/a$b/$PLACE", "/$$"):
        assert expand(protect(literal)) == literal


def test_every_path_of_a_configuration_is_expanded_and_is_the_same_when_it_is_read_back(
    home_folder: Path, study_file: Path
) -> None:
    file = read_study(
        study_file,
        (
            "study.directory=~/r$$uns",
            "data.root=$PLACE/shards",
            "data.source=~/images",
            "launch.container_image=$PLACE/image.sqsh",
            "launch.container_mounts=~/a:/a,$PLACE:/b",
            "launch.cluster=slurm",
            "launch.sbatch={chdir: ~/x, nice: 3}",
            "launch.continuation={chdir: $PLACE}",
        ),
    )
    assert file.study.directory == f"{home_folder}/r$uns"
    assert (file.data.root, file.data.source) == ("/place/shards", f"{home_folder}/images")
    assert file.launch.container_image == "/place/image.sqsh"
    assert file.launch.container_mounts == f"{home_folder}/a:/a,/place:/b"
    assert file.launch.sbatch == {"chdir": f"{home_folder}/x", "nice": 3}
    assert file.launch.continuation == {"chdir": "/place"}
    study = Study(study_file, file)
    study.write()
    assert read_study(study.file.directory).study.directory == f"{home_folder}/r$uns"
    assert read_study(study.file.directory).launch == file.launch
    (config,) = {from_plain(RunConfig, read_yaml(run.directory.config), "run").data.root for run in study.runs}
    assert config == "/place/shards"
    for override in ("data.root=$NOWHERE/x", "study.directory=${NOWHERE}", "launch.sbatch={chdir: $NOWHERE}"):
        with pytest.raises(UserError, match="the variable NOWHERE is not set") as error:
            read_study(study_file, (override,))
        assert "\n" not in str(error.value)


def test_python_m_train_expands_its_paths(
    home_folder: Path, study_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home_folder / "study.yaml").write_text(study_file.read_text())
    asked: list[Path] = []
    monkeypatch.setattr(train_command, "train", lambda config, directory: asked.append(directory.path) or 0)
    monkeypatch.setattr(train_command, "leave", sys.exit)
    for directory, code in (("$PLACE/run", 0), ("$NOWHERE/run", 2)):
        monkeypatch.setattr(sys, "argv", ["train", "~/study.yaml", directory])
        with pytest.raises(SystemExit) as ended:
            train_command.main()
        assert ended.value.code == code
    assert asked == [Path("/place/run")]
    assert capsys.readouterr().err.startswith("error: $NOWHERE/run: the variable NOWHERE is not set")


def test_paths_on_the_command_line_are_expanded(home_folder: Path, study_file: Path) -> None:
    moved = home_folder / "study.yaml"
    moved.write_text(study_file.read_text())
    assert CliRunner().invoke(cli, ["plan", "~/study.yaml"]).exit_code == 0
    for arguments in (
        ["plan", "$NOWHERE/study.yaml"],
        ["scale", "~/study.yaml", "--out", "$NOWHERE/x"],
        ["transfer", "~/study.yaml", "--target", "$NOWHERE/x"],
        ["report", "~/study.yaml", "$NOWHERE/x"],
        ["report", "~/study.yaml", "--publish", "$NOWHERE"],
        ["train", "~/study.yaml", "--directory", "$NOWHERE"],
        ["check", "~/study.yaml", "--plot", "$NOWHERE/x.png"],
        ["export", "$NOWHERE", "x"],
        ["pack", "$NOWHERE", "x"],
        ["index", "$NOWHERE/{0..1}.tar"],
        ["inspect", "$NOWHERE"],
        ["launch", "~/study.yaml", "--cluster", "$NOWHERE/mine.yaml"],
    ):
        said = CliRunner().invoke(cli, arguments)
        assert isinstance(said.exception, UserError), (arguments, said.output)
        assert "the variable NOWHERE is not set" in str(said.exception)


def test_without_a_home_nothing_ends_in_a_traceback(
    home_folder: Path, study_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.delenv("HOME")
    assert find_own_home() is None
    assert locate_cache() is None
    assert CliRunner().invoke(cli, ["plan", str(study_file)]).exit_code == 0
    with pytest.raises(UserError, match="HOME is not set"):
        read_study(study_file, ("study.directory=~/runs",))
    with pytest.raises(UserError, match=r"no other\.yaml in"):
        find_profile("other", study_file)


# ---------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "line", "first"),
    [("a: 1\nb: 2\na: 3", 3, 1), ("a:\n  b: 1\n  c: {d: 1, d: 2}", 3, 3), ("- {x: 1}\n- x: 1\n  x: 2", 3, 2)],
)
def test_a_key_that_is_there_twice_is_refused_with_both_lines(text: str, line: int, first: int) -> None:
    with pytest.raises(UserError, match=rf"my.yaml:{line}: the key '\w' is given twice, first in line {first}"):
        load_yaml(text, "my.yaml")


def test_anchors_may_be_held_by_keys_that_begin_with_x_and_a_merged_key_may_be_overridden(study_file: Path) -> None:
    text = study_file.read_text()
    study_file.write_text(f"x-sizes: &held {{width: 8, depth: 12}}\nx-more: 3\n{text}")
    raw = read_study(study_file)
    study_file.write_text(f"x-base: &held {{width: 16, depth: 3}}\nx-next: &next {{<<: *held, depth: 6}}\n{text}")
    assert read_study(study_file) == raw
    assert load_yaml("a: &a {x: 1}\nb: {<<: *a, x: 2}\nc: {<<: *a}", "-") == {
        "a": {"x": 1},
        "b": {"x": 2},
        "c": {"x": 1},
    }
    with pytest.raises(UserError, match="unknown key"):
        read_study(study_file, ("data.x-note=1",))


def test_numbers_are_read_as_they_are_written_and_names_that_look_like_them_stay_names() -> None:
    numbers = {"1e6": 1e6, "1E+3": 1e3, "2**20": 1048576, "2**-2": 0.25, "2^3": 8, "2**-10.5": 2**-10.5, "1_000": 1000}
    for text, number in numbers.items():
        assert load_yaml(text, "-") == number
    assert isinstance(load_yaml("2**20", "-"), int)
    assert load_yaml("10**999", "-") == "10**999"
    for name in ("1e6", "2**20", "12345e6"):
        assert load_yaml(dump_yaml({"name": name}), "-") == {"name": name}


@pytest.mark.parametrize("text", ["a: 2026-13-45", "a: [", "a: {[1]: 2}\n? {b: 1}\n: 2", "\tx: 1", "a: *missing"])
def test_a_text_that_is_no_yaml_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"^my.yaml: not YAML") as error:
        load_yaml(text, "my.yaml")
    assert "\n" not in str(error.value)


def test_a_count_may_be_written_as_any_whole_number_and_a_list_with_commas_alone(study_file: Path) -> None:
    given = ("train.samples=1e4", "train.global_batch_size=2**6", "train.log_every=5e0", "study.values=2**-6,2**-4,1")
    file = read_study(study_file, (*given, "study.seeds=3,5", "study.parameterizations=sp,mup"))
    assert (file.train.samples, file.train.global_batch_size, file.train.log_every) == (10_000, 64, 5)
    assert file.study.grid == (2**-6, 2**-4, 1)
    assert file.study.seeds == (3, 5)
    assert [one.name for one in file.study.parameterizations] == ["sp", "mup"]
    assert read_study(study_file, ("study.values=2**-4",)).study.grid == (2**-4,)


@pytest.mark.parametrize(
    "override",
    [
        "train.samples=1.5",
        "train.samples=1e400",
        "optimizer.lr=10**999",
        "study.values=a,b,c",
        "study.values={first: 1, lst: 2}",
        "study.values=[[1], 2, 3]",
        "study.values={first: x, last: 3}",
        "study.seeds=a",
        "study.parameterizations=[3]",
        "study=3",
        "launch.sbatch={a: [1]}",
        "launch.sbatch=3",
        "launch.setup=3",
        "train.ema=x",
    ],
)
def test_a_wrong_value_is_refused_by_its_key_without_the_validators_inside(study_file: Path, override: str) -> None:
    with pytest.raises(UserError, match=override.split("=")[0]) as error:
        read_study_or_run(study_file, (override,))
    for inside in ("function-", "tuple[", "constrained", "<", "\n", "Octaves", "nullable"):
        assert inside not in str(error.value)


def through_a_pipe(text: str, read: Any) -> Any:
    """`read(path)` of a pipe that gives `text` once."""
    out, into = os.pipe()

    def write() -> None:
        with os.fdopen(into, "w") as file:
            file.write(text)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        return read(Path(f"/dev/fd/{out}"))
    finally:
        writer.join()
        os.close(out)


def test_a_configuration_may_come_from_a_pipe(study_file: Path, tmp_path: Path) -> None:
    text = study_file.read_text()
    assert through_a_pipe(text, read_study_or_run) == read_study(study_file)
    run = {key: value for key, value in yaml.safe_load(text).items() if key != "study"}
    assert through_a_pipe(yaml.safe_dump(run), read_study_or_run).model == read_run(study_file).model
    plot = ["--plot", str(tmp_path / "x.png"), "--steps", "1", "--factors", "1,2", "--seeds", "2", "--axis", "width"]
    checked = through_a_pipe(text, lambda path: CliRunner().invoke(cli, ["check", str(path), *plot]))
    assert "plot: " in checked.output
    target = tmp_path / "target.yaml"
    target.write_text("model: {width: 64}")
    planned = through_a_pipe(text, lambda path: CliRunner().invoke(cli, ["plan", str(path), "--target", str(target)]))
    assert f"{target}: Tuning costs at most" in " ".join(planned.output.split())


# ---------------------------------------------------------------- profiles


def test_a_profile_is_found_from_every_place_and_the_same_for_a_studys_folder(
    home_folder: Path, study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    working = tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)
    study = Study(study_file, read_study(study_file))
    study.write()
    places = {
        "work": working / "configs" / "cluster",
        "near": working / "cluster",
        "beside": study_file.parent / "cluster",
        "own": home_folder / ".config" / "depthmup" / "cluster",
    }
    for name, folder in places.items():
        folder.mkdir(parents=True)
        (folder / f"{name}.yaml").write_text(f"partition: {name}\n")
    for path in (study_file, study.file.directory, study.file.directory / "tiny_target.yaml"):
        for name in places:
            assert find_profile(name, path).samefile(places[name] / f"{name}.yaml")
        assert find_profile("example_gpu", path).exists()
        assert read_yaml(find_profile("~/.config/depthmup/cluster/own.yaml", path)) == {"partition": "own"}
        assert read_yaml(find_profile("cluster/near.yaml", path)) == {"partition": "near"}
        with pytest.raises(UserError, match=r"elsewhere.yaml: no such file"):
            find_profile("./elsewhere.yaml", path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    (tmp_path / "xdg" / "depthmup").mkdir(parents=True)
    places["own"].rename(tmp_path / "xdg" / "depthmup" / "cluster")
    assert read_study(study_file, ("launch.cluster=own",)).launch.partition == "own"


def test_a_saved_run_reads_back_from_a_folder_with_a_dollar_sign(run_settings: dict[str, Any], tmp_path: Path) -> None:
    run_settings["data"]["root"] = protect(f"{tmp_path}/a$b")
    config = from_plain(RunConfig, run_settings, "test")
    assert config.data.root == f"{tmp_path}/a$b"
    assert from_plain(RunConfig, load_yaml(to_yaml(config), "-"), "test") == config


@pytest.mark.parametrize("given", [".", "", "configs", "/", ".."])
def test_what_names_no_file_is_refused_as_a_configuration(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no study.yaml in this folder|No such file|an argument is empty"):
        read_study(ConfigPath().convert(given, None, None))
