"""Reports made anew from the records in docs/results, after a change of the analysis or of the figures: no training.

python -m depthmup.launch.report.recompute docs/results
python -m depthmup.launch.report.results docs/results/*.json > docs/RESULTS.md
"""

import math
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from depthmup.data.files import write_atomically
from depthmup.launch.config import Size
from depthmup.launch.findings.analysis import Result
from depthmup.launch.reading import read_raw, read_study
from depthmup.launch.report.collect import collect
from depthmup.launch.report.page import publish, write_report
from depthmup.launch.report.record import dump, make_page_record, read_record
from depthmup.launch.runs.rounds import (
    AddedRound,
    AddedRun,
    AddedSeed,
    AddedValues,
    write_added_rounds,
    write_rounds,
)
from depthmup.launch.runs.study import Study
from depthmup.train.rundir import PRUNED

CONFIGS = Path("configs")


def find_points_beyond(study: Study, points: list[dict[str, Any]]) -> tuple[list[AddedValues], list[AddedSeed]]:
    """(values, seeds) beyond the file's grid, all as of one round of growth: a record does not tell them apart."""
    grid, planned = study.file.study.grid, study.file.study.seeds
    values: dict[tuple[Any, ...], set[float]] = defaultdict(set)
    seeds: dict[tuple[Any, ...], set[float]] = defaultdict(set)
    for point in points:
        curve = point["parameterization"], Size.of(point)
        if point["seed"] not in planned:
            seeds[(*curve, point["seed"])].add(point["value"])
        elif point["value"] not in grid:
            values[curve].add(point["value"])
    return (
        [
            AddedValues(parameterization=name, **size.axes, values=sorted(found))
            for (name, size), found in values.items()
        ],
        [
            AddedSeed(parameterization=name, **size.axes, seed=seed, values=sorted(found))
            for (name, size, seed), found in seeds.items()
        ],
    )


def rebuild_rounds(study: Study, record: dict[str, Any]) -> list[AddedRound]:
    """Of an adaptive design, from the round that each point names."""
    found = [AddedRound(reason=each["reason"], runs=[]) for each in record["rounds"]]
    for point in record["points"]:
        keys = ("parameterization", *Size.of(point).axes, "value", "seed")
        run = AddedRun(**{key: point[key] for key in keys})
        if study.owners[run.parameterization, study.file.complete(run.size)] == run.parameterization:
            found[point["round"] - 1].runs.append(run)
    return found


def restore(record: dict[str, Any], config: Path, folder: Path) -> Study:
    """A study in `folder` whose runs are marked done with the record's metrics."""
    study = Study(config, read_study(config, (f"study.directory={folder}",)))
    study.file.directory.mkdir(parents=True)
    if study.file.study.adaptive:
        write_added_rounds(study.rounds_file, rebuild_rounds(study, record))
    else:
        values, seeds = find_points_beyond(study, record["points"])
        write_rounds(study.added_values_file, [values])
        write_rounds(study.added_seeds_file, [seeds])
    points = {(p["parameterization"], Size.of(p), p["value"], p["seed"]): p for p in record["points"]}
    seconds = record["cost"]["hours"] * 3600 / record["num_runs"]  # a record has their sum only
    for run in study.points:
        if point := points.get((run.parameterization, run.size, run.value, run.seed)):
            outcome: dict[str, Any] = {"outcome": "completed", record["metric"]: point["metric"]}
            if point.get("ended_early"):
                outcome = {"outcome": PRUNED, "limit": point["metric"]}
            elif point["metric"] is None:
                outcome = {"outcome": "diverged"}
            run.directory.path.mkdir(parents=True, exist_ok=True)
            run.directory.write_done(outcome | {"seconds": seconds})
    return study


def rebuild_results(record: dict[str, Any]) -> list[Result]:
    """The runs of a record; infinite where one diverged."""
    return [
        Result(
            p["parameterization"], Size.of(p), p["value"], p["seed"], math.inf if p["metric"] is None else p["metric"]
        )
        for p in record["points"]
    ]


def find_configs() -> dict[str, Path]:
    """The files of studies by the study's name; others are runs."""
    paths = [path for path in sorted(CONFIGS.rglob("*.yaml")) if "study" in read_raw(path, ())]
    return {read_study(path).study.name: path for path in paths}


def recompute_record(path: Path, config: Path) -> None:
    """Analyses the record at `path` anew, in its place. What code and images its runs had stays: they alone know."""
    record = read_record(path)
    with tempfile.TemporaryDirectory() as scratch:
        report = collect(restore(record, config, Path(scratch)))
        assert (len(report.finished), report.num_diverged) == (record["num_runs"], record["num_diverged"])
        assert len(report.unfinished) == record["num_unfinished"]
        root = report.study.file.directory
        write_report(report, make_page_record(report), root)
        publish(report, root, path.parent)
    write_atomically(path, dump(read_record(path) | {"origins": record["origins"]}).encode())


def main() -> None:
    configs = find_configs()
    for path in sorted(Path(sys.argv[1]).glob("*.json")):
        record = read_record(path)
        if "points" in record:
            recompute_record(path, configs[record["study"]])
            print(record["study"])


if __name__ == "__main__":
    main()
