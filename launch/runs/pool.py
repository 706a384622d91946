"""Which code and which images a study's results come from: results of different ones are compared only when asked for.

Without torch.
"""

from collections import Counter
from collections.abc import Mapping

from depthmup.data.errors import UserError
from depthmup.data.index import show_count
from depthmup.launch.runs.study import Study
from depthmup.train.owner import fingerprint_code, fingerprint_data

WHAT = {"code": "versions of the code", "shards": "sets of shards"}


def count_origins(study: Study) -> dict[str, Counter[str]]:
    """For code and for shards: fingerprint -> number of finished runs whose markers say it. Raises UserError for a
    marker of another run."""
    done = [marker for run in study.runs if (marker := run.done())]
    return {key: Counter(marker[key] for marker in done if marker.get(key)) for key in WHAT}


def describe_mixture(key: str, counts: Mapping[str, int]) -> str:
    """'2 versions of the code: 12 runs of 0123..., 3 of 4567...'"""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{show_count(count, 'run')} of {value}" for value, count in ordered)
    return f"{len(counts)} {WHAT[key]}: {shown}"


def describe_mixtures(study: Study) -> list[str]:
    """What the finished runs have several of, in words."""
    return [describe_mixture(key, counts) for key, counts in count_origins(study).items() if len(counts) > 1]


def refuse_mixture(study: Study, starting: bool = False) -> None:
    """Raises UserError where finished runs come from different code or images and study.pool_different does not allow
    it. `starting`: also where runs that begin now would be different ones."""
    for key, counts in count_origins(study).items():
        if key in study.file.study.pool_different or not counts:
            continue
        if starting:
            now = fingerprint_code() if key == "code" else fingerprint_data(study.runs[0].config)
            counts = counts if now is None or now in counts else counts | Counter({now: len(study.pending())})
        if len(counts) > 1:
            allowed = ", ".join([*study.file.study.pool_different, key])
            raise UserError(
                f"{study.file.directory}: {describe_mixture(key, counts)}. Their results may differ for this "
                "reason alone: choose another study.name to train all runs again, delete the folders of the smaller "
                f"group, or compare them anyway with study.pool_different=[{allowed}]"
            )
