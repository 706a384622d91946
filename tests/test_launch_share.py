"""The share of a study that is shown as done is the share of its time, small runs and starts of processes included."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from depthmup.launch.config import Size
from depthmup.launch.jobs.attempts import measure_process_age
from depthmup.launch.jobs.share import Share, Start, measure_overhead
from depthmup.launch.jobs.states import RunState, Snapshot
from depthmup.launch.reading import read_study
from depthmup.launch.runs.cost import count_flops
from depthmup.launch.runs.planned import PlannedRun
from depthmup.launch.runs.seconds import estimate_seconds
from depthmup.launch.runs.study import Study

START, BETWEEN = 3.0, 0.4  # seconds of a process's start, and between two runs of one


def training_seconds(run: PlannedRun, flops: float) -> float:
    """Half a second for the steps themselves, and large networks use their FLOPs better than small ones."""
    return 0.5 + (flops / 4e7) ** 0.9 * (1 + 0.1 * run.seed)


def replay(study: Study, processes: int, together: int) -> list[tuple[float, float, float]]:
    """Runs of the study as `processes` would train them, `together` at once, the costliest first; at each moment (the
    share of the time that is over, the share that is shown, the share of FLOPs)."""
    flops = {size: float(each) for size, (_, each) in count_flops(study.runs).items()}
    runs = sorted(study.runs, key=lambda run: -flops[run.size])
    free, trained = [START] * processes, []  # when each is free; (run, process, start, seconds, end)
    while runs:
        process = free.index(min(free))
        pack, runs = runs[:together], runs[together:]
        seconds = [training_seconds(run, flops[run.size]) / len(pack) for run in pack]
        end = free[process] + sum(seconds)
        trained += [(run, process, free[process], each, end) for run, each in zip(pack, seconds, strict=True)]
        free[process] = end + BETWEEN
    total = max(end for *_, end in trained)
    shares, shown, written = Share(flops, study.file.train.num_steps), [], set()
    for moment in sorted({end for *_, end in trained} | {START + total * i / 40 for i in range(40)}):
        states = []
        for run, process, start, seconds, end in trained:
            run.directory.path.mkdir(parents=True, exist_ok=True)
            if start > moment:
                states.append(RunState(run, "waiting"))
                continue
            if run not in written:
                written.add(run)
                line = {"event": "started", "step": 0, "time": start, "age": start, "host": "here", "pid": process}
                (run.directory.path / "attempts.jsonl").write_text(json.dumps(line) + "\n")
            if end <= moment:
                run.directory.write_done({"outcome": "completed", "step": 12, "seconds": seconds})
                states.append(RunState(run, "done"))
                continue
            step = int(run.config.train.num_steps * (moment - start) / (end - start))
            rate = run.config.train.samples / (end - start)  # a pack says how fast each of its runs goes on
            if step:
                run.directory.metrics.write_text(json.dumps({"step": step, "images_per_second": rate}) + "\n")
            states.append(RunState(run, "running"))
        share, _ = shares.measure(Snapshot(states, [], [], []), {})
        done = sum(flops[found.run.size] for found in states if found.state == "done")
        shown.append((moment / total, share, done / sum(flops[run.size] for run, *_ in trained)))
    return shown


@pytest.fixture
def study(study_file: Path) -> Study:
    sizes = "[{width: 8, depth: 3}, {width: 16, depth: 6}, {width: 32, depth: 12}, {width: 64, depth: 12}]"
    settings = ("study.parameterizations=[depth_mup]", f"study.sizes={sizes}", "study.seeds=3")
    return Study(study_file, read_study(study_file, settings))


@pytest.mark.parametrize("together", [1, 4])
def test_the_share_shown_is_the_share_of_the_time(study: Study, together: int) -> None:
    shown = replay(study, processes=2, together=together)
    first = next(i for i, (_, share, _) in enumerate(shown) if share > 0)
    assert shown[first][0] < 0.2
    errors = [abs(true - share) for true, share, _ in shown[first:]]
    assert max(errors) < 0.1
    assert min(after - before for (_, before, _), (_, after, _) in pairwise(shown)) > -0.02
    assert shown[-1][1] == pytest.approx(1)
    of_flops = [abs(true - flops) for true, _, flops in shown[first:]]
    assert max(of_flops) > 2 * max(errors)  # what the costs in FLOPs would say


def test_a_size_that_ran_takes_what_it_took_and_others_what_their_flops_say() -> None:
    small, middle, large = (Size(width=8, depth=depth) for depth in (3, 6, 12))
    flops = {small: 1e9, middle: 2e9, large: 4e9}
    assert estimate_seconds(flops, {}, 100) == {}
    found = estimate_seconds(flops, {small: [2.0, 4.0], large: [9.0]}, 100)
    assert found[small] == 3.0
    assert found[large] == 9.0
    assert found[middle] == pytest.approx(5.0, rel=0.15)  # 1 + 2 a GFLOP
    alone = estimate_seconds(flops, {large: [9.0]}, 100)
    assert 9.0 / 4 < alone[small] < alone[middle] < 9.0  # a run's steps cost something whatever the network is


def test_runs_that_are_to_come_are_part_of_the_time(study: Study) -> None:
    flops = {size: float(each) for size, (_, each) in count_flops(study.runs).items()}
    states = []
    for run in study.runs:
        run.directory.path.mkdir(parents=True)
        run.directory.write_done({"outcome": "completed", "step": 12, "seconds": 2.0})
        states.append(RunState(run, "done"))
    ended = Snapshot(states, [], [], [])
    assert Share(flops, 12).measure(ended, {})[0] == 1.0
    assert Share(flops, 12, to_come=len(states)).measure(ended, {})[0] == pytest.approx(0.5)


def test_overhead_is_the_starts_of_processes_and_the_time_between_runs() -> None:
    alone = [Start(("a", 1), 10.0 + 5 * i, 3.0 + 5 * i, 4.0) for i in range(3)]
    assert measure_overhead(alone) == pytest.approx(3.0 / 3 + 1.0)
    pack = [Start(("a", 1), at, at, 2.0) for at in (3.0, 3.01, 14.0, 14.01)]  # two runs at once, twice
    assert measure_overhead(pack) == pytest.approx(3.0 / 4 + (11.0 - 4.0) / 2)
    assert measure_overhead([*alone, *(replace(start, process=("b", 1)) for start in alone)]) == measure_overhead(alone)
    assert measure_overhead([]) == 0.0


def test_a_process_knows_its_age() -> None:
    first = measure_process_age()
    assert 0 < first <= measure_process_age() < 1e6
