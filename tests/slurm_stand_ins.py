"""Stand-ins for Slurm's commands: shell scripts that keep their jobs in a folder of the test's."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from depthmup.launch.reading import read_study
from depthmup.launch.runs.study import Study

FAKES = {
    # one line per job that was submitted: ID NAME TASKS; `hidden` there: to others, only their own jobs are shown
    # `places`: no more array elements at once; those of the ids in `ended` and in `cancelled` are no longer there
    "sbatch": """
if [ -e whole_queue_is_full ]; then
  echo "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying" >&2; exec sleep 120
fi
[ -e refuse ] && { echo "sbatch: error: Batch job submission failed: $(cat refuse)" >&2; exit 1; }
id=$(( $(cat jobs 2>/dev/null | wc -l) + 1 )); script="${@: -1}"
name=$(sed -n 's/^#SBATCH --job-name=//p' "$script"); tasks=$(sed -n 's/^#SBATCH --array=0-//p' "$script")
if [ -e places ]; then
  taken=$(( ${tasks%%%*} + 1 )); gone=" $(cat ended cancelled 2>/dev/null | tr '\n' ' ') "
  while read -r other _ last _; do [[ "$gone" == *" $other "* ]] || taken=$(( taken + last + 1 )); done < jobs
  [ $taken -gt $(cat places) ] && { echo "sbatch: error: AssocMaxSubmitJobLimit
sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit)" >&2; exit 1; }
fi
echo "$id $(basename "$(dirname "$script")") ${tasks%%%*} ${tasks##*%} $*" >> jobs; echo $id""",
    "squeue": """
echo "$*" >> asked; wanted=; for word in "$@"; do case $word in
--jobs=*) wanted=,${word#*=},; column=1;; --name=*) wanted=,${word#*=},; column=2;; --user=*) exit 0;; esac; done
[ -e hidden ] && exit 0
[ "$column" = 1 ] && [[ "${wanted//,}" = "${wanted:1:-1}" ]] && ! grep -q "^${wanted:1:-1} " jobs &&
  { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
gone=" $(cat ended 2>/dev/null | tr '\n' ' ') "
while read -r id name last throttle rest; do
  [[ "$gone" == *" $id "* ]] && continue
  case $column in 1) key=$id;; 2) key=$name;; esac
  [[ "$wanted" == *,$key,* ]] && for index in $(seq 0 $last); do echo "$id|$index|$(cat state)|0|$name"; done
done < jobs; exit 0""",
    "scontrol": """
echo "$*" >> told; echo 'MaxArraySize = 4'; [ -e hidden ] && echo 'PrivateData = jobs,usage'; exit 0""",
    "scancel": """echo "$*" >> cancelled""",
    "srun": "exit 0",
}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of stand-ins for Slurm's commands, first on PATH; they keep their jobs there."""
    folder = tmp_path / "fake"
    folder.mkdir()
    for name, text in FAKES.items():
        (folder / name).write_text(f"#!/bin/bash\ncd {folder}\n{text}\n")
        (folder / name).chmod(0o755)
    (folder / "jobs").touch()
    (folder / "state").write_text("PENDING|Priority")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def study_of(study_file: Path) -> Callable[..., Study]:
    def make(*overrides: str) -> Study:
        return Study(study_file, read_study(study_file, ("launch.cluster=slurm", *overrides)), overrides)

    return make


def submitted(folder: Path) -> list[dict[str, Any]]:
    """What sbatch was given: id, tasks, jobs at once, and the ids that it waits for."""
    found = []
    for line in (folder / "jobs").read_text().splitlines():
        job_id, _, last, throttle, *arguments = line.split()
        after = next((word.split("afterany:")[1].split(":") for word in arguments if "afterany" in word), [])
        found.append(
            {"id": job_id, "tasks": int(last) + 1, "throttle": int(throttle), "after": after, "all": arguments}
        )
    return found


def in_queue(fake: Path) -> list[dict[str, Any]]:
    gone = {id for name in ("ended", "cancelled") if (fake / name).exists() for id in (fake / name).read_text().split()}
    return [job for job in submitted(fake) if job["id"] not in gone]
