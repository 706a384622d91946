"""Which constants decide verdicts? The published records analysed anew with each constant halved, and doubled.

python -m benchmarks.sensitivity docs/results/*.json      # the table of docs/verdict.md: a minute of one core

Nothing is trained, and no run is asked for: the same runs are judged by another rule. "Contradict": one settled verdict
in place of another; where the others change, one of the two is inconclusive. A share of certainty is halved and doubled
in what is missing to 1.
"""

import argparse
import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from depthmup.launch import findings
from depthmup.launch.findings.analysis import Result
from depthmup.launch.reading import read_study
from depthmup.launch.report.collect import analyse_results
from depthmup.launch.report.page import format_markdown_table
from depthmup.launch.report.recompute import find_configs, rebuild_results
from depthmup.launch.report.record import read_record
from depthmup.launch.runs.study import Study

SETTINGS = {"regret_limit": "study.regret_limit", "cost_limit": "study.cost_limit"}  # stated by the user
MODEL = {
    "DRAWS": "draws of each curve",
    "MEAN_SKEW_DEVIATION": "deviation of the common skew m",
    "SKEW_DEVIATION": "deviations v of a curve's skew from it",
    "QUARTIC_DEVIATION": "deviation of the quartic term",
    "ROUGHNESS": "roughness r",
    "LEAST_MODEL_NOISE": "least noise of the model",
    "LEAST_DRAWS": "draws that bend upwards beside a failing value, at least",
    "STEPS_PER_OCTAVE": "points of a drawn curve an octave",
    "REACH_OCTAVES": "reach of the fit, octaves",
    "REACH_LOSS": "reach of the fit, log loss",
    "MIN_REACH": "values to each side, at least",
    "LEAST_REACH_OCTAVES": "octaves to each side, at least",
    "AS_GOOD": "a plateau, log loss",
}
FAILURES = {
    "LOST": "progress below which a run is lost",
    "ERRORS": "standard errors that beat a guess",
    "LEAST_SEED_NOISE": "least noise between seeds",
    "ASSUMED_NOISE": "noise where no value has two seeds",
    "MOST_GUESS_NOISE": "noise at the loss of a guess, at most",
    "TOLERATED": "share of runs that may fail",
    "TOO_MANY": "share of failures to be ruled out",
}
RULE = {
    "CONFIDENCE": "confidence of intervals, and of what decides",
    "SURE": "probability that a plateau is one",
    "SAME": "octaves a carried value is kept within",
}
CONSTANTS = MODEL | FAILURES | RULE
OF_CERTAINTY = ("CONFIDENCE", "SURE")


def scale(name: str, value: Any, factor: float) -> Any:
    if name in OF_CERTAINTY:
        return 1 - factor * (1 - value)
    return max(round(factor * value), 1) if isinstance(value, int) else factor * value


@contextmanager
def scaled(name: str, factor: float) -> Iterator[None]:
    """The constant times `factor`, wherever it is used."""
    modules = [
        importlib.import_module(f"{findings.__name__}.{each.name}") for each in pkgutil.iter_modules(findings.__path__)
    ]
    before = {module: vars(module)[name] for module in modules if name in vars(module)}
    for module, value in before.items():
        setattr(module, name, scale(name, value, factor))
    try:
        yield
    finally:
        for module, value in before.items():
            setattr(module, name, value)


class Published:
    """The studies of the records, and the verdicts on them."""

    def __init__(self, paths: list[Path]) -> None:
        configs = find_configs()
        records = [record for path in paths if "points" in (record := read_record(path))]
        self.studies = [Study(configs[each["study"]], read_study(configs[each["study"]], ())) for each in records]
        self.results: list[list[Result]] = [rebuild_results(each) for each in records]

    def judge(self, **settings: float) -> dict[tuple[str, str], str]:
        """(study, parameterization) -> verdict, where more than one size has runs."""
        found = {}
        for study, results in zip(self.studies, self.results, strict=True):
            if len({result.size for result in results}) == 1 or len({result.value for result in results}) == 1:
                continue
            settled = replace(
                study.file.study, **{key: factor * getattr(study.file.study, key) for key, factor in settings.items()}
            )
            changed = Study(study.path, replace(study.file, study=settled))
            for each in analyse_results(changed, results).judgements:
                found[study.file.study.name, each.parameterization] = each.verdict
        return found


def row(name: str, published: Published, reference: dict[tuple[str, str], str]) -> dict[str, str]:
    cells = {"constant": SETTINGS.get(name, "") or CONSTANTS[name]}
    for how, factor in (("halved", 0.5), ("doubled", 2.0)):
        if name in SETTINGS:
            found = published.judge(**{name: factor})
        else:
            with scaled(name, factor):
                found = published.judge()
        pairs = {key: (verdict, found[key]) for key, verdict in reference.items() if found[key] != verdict}
        against = sum("inconclusive" not in pair for pair in pairs.values())
        cells |= {f"{how}: change": str(len(pairs)), f"{how}: contradict": str(against)}
        print(name, factor, pairs, flush=True)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--constants", nargs="*", default=(*SETTINGS, *CONSTANTS), choices=(*SETTINGS, *CONSTANTS))
    asked = parser.parse_args()
    published = Published(asked.records)
    reference = published.judge()
    print(f"{len(reference)} verdicts of {len({study for study, _ in reference})} studies", flush=True)
    print("\n".join(format_markdown_table([row(name, published, reference) for name in asked.constants])))


if __name__ == "__main__":
    main()
