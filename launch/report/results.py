"""docs/RESULTS.md from the studies' records, negative results and unfinished studies with the others.

depthmup report runs/paper_* --publish docs/results
python -m depthmup.launch.report.results docs/results/*.json > docs/RESULTS.md

Where the runs themselves are gone, `python -m depthmup.launch.report.recompute docs/results` makes the records anew.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from depthmup.launch.report.overview import tabulate_studies
from depthmup.launch.report.page import format_markdown_table
from depthmup.launch.report.record import read_record, restore_interval
from depthmup.launch.report.search import search_rows
from depthmup.launch.report.tables import describe_planned, format_growth
from depthmup.launch.report.verification import list_verification_rows
from depthmup.launch.wording import (
    show_cost,
    show_drift,
    show_interval,
    show_number,
    show_quantity,
    show_seeds,
    show_share,
    show_shares,
    show_size,
)

INTRODUCTION = """# Results: does the optimum stay put?

The answers in short, question by question: [findings](findings.md). Here every study stays in, whatever its verdict.

Widths and depths are written width x depth; optima and drifts are octaves (log2); losses are geometric means over
seeds of the study's metric; regrets are shares of a size's lowest loss. Intervals are 90 %, from one model of all
curves of a study ([verdict.md](verdict.md)). `at base optimum` is what the fitted curve says where this very value did
not run: below `best`, the mean of the best value that was run, it is noise, and no gain. `below (95 %)`: with a
probability of 95 % the largest regret is below this, which decides whether a value transfers.
Nothing is learned at a size whose best loss is within noise of a guess's.
Parameterizations that make the same of a size (at the base all do) share its runs, and the seeds that were added there.
To a grid, seeds are added while a verdict is open (`study.more_seeds`), which flatters one that is then settled just
so: the verdict at the planned seeds stands beside it. An adaptive design runs in rounds until its verdicts are settled
or its budget is spent; its error rates are known with its rounds.

**To make a figure anew**: CIFAR-10 as an archive of class folders, `cifar10/{train,test}/CLASS/*.jpg` (here JPEGs of
quality 90, 4:4:4), is packed once. Then the command at the head of a study's section trains it, and writes its figures
and its report to `runs/NAME/`; where figures are of `depthmup converge` or `depthmup exponents`, that command stands
above them. What a study holds fixed, its learning rate if another value is swept, stands in its file.

```sh
depthmup pack cifar10.tar.xz shards/cifar10
depthmup transfer configs/paper/conv_resnet.yaml
```

This page: `depthmup report runs/paper_* --publish docs/results`, then
`python -m depthmup.launch.report.results docs/results/*.json > docs/RESULTS.md`; do not edit. Without the runs,
`python -m depthmup.launch.report.recompute docs/results` analyses the results in the records there once more and draws
the figures.
"""

TUNED = """`depthmup tune`: the loss of the best suggestion as the search saw it, and as the mean over new seeds with
its 90 % interval. Searches of the rate alone stand beside those of several hyperparameters."""
VERIFIED = """`depthmup verify`: runs with all hyperparameters perturbed at once, beside the transferred values. Each
bound on the share of the space that is better holds with 95 %."""


def format_interval(bounds: Sequence[float | None] | None) -> str:
    return show_interval(restore_interval(bounds)) if bounds else ""


def format_metric(found: dict[str, Any], key: str, fails: bool) -> str:
    return "fails" if fails else show_number(found[key])


def format_regret(found: dict[str, Any], fails: bool) -> str:
    """'1.3 % (0.5 to 2.1 %)'"""
    if fails or found["regret"] is None:
        return "fails" if fails else ""
    interval = found["regret_interval"]
    known = f" ({show_shares(restore_interval(interval))})" if interval else ""
    return show_share(found["regret"]) + known


def describe_question(record: dict[str, Any]) -> str:
    """'swept: optimizer.momentum, in octaves of 1 - momentum', or the one value that ran."""
    name, values = record["hyperparameter"], {point["value"] for point in record["points"]}
    if not swept(record):
        return f"at {name} {values.pop():g}"
    octaves = record["octaves_of"]
    return f"swept: {name}" + (f", in octaves of {octaves}" if octaves != name.rpartition(".")[2] else "")


def describe_settings(record: dict[str, Any]) -> list[str]:
    cost, seeds = record["cost"], show_seeds(run["seed"] for run in record["points"])
    is_swept = record["hyperparameter"] == "schedule.warmup" and swept(record)
    warmup = "warm-up as swept" if is_swept else f"{100 * record['warmup']:g} % warm-up"
    unfinished = f" **{record['num_unfinished']} runs are not finished.**" if record["num_unfinished"] else ""
    return [
        f"`depthmup transfer {record['config']}`: {record['model']}, {record['optimizer']}, {record['data']} at "
        f"{record['image_size']} pixels, {record['schedule']} schedule with {warmup}, "
        f"{record['samples']} samples in batches of {record['global_batch_size']} ({record['steps']} steps), "
        f"{100 * record['minival']:g} % of the training set held out as minival, seeds {seeds}, "
        f"{describe_question(record)}. {record['num_runs']} runs, "
        f"{record['num_diverged']} of them diverged; "
        f"{show_quantity(cost['flops'])}FLOPs, {cost['hours']:.1f} hours of training processes."
        f"{unfinished}{describe_rounds(record)}"
    ]


def describe_rounds(record: dict[str, Any]) -> str:
    """' In 5 rounds, which ended: ...', of an adaptive design."""
    if not record["rounds"]:
        return ""
    ended = f", which ended: {record['rounds_ended']}" if record["rounds_ended"] else ""
    return f" In {len(record['rounds'])} rounds{ended}."


def list_size_rows(record: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "parameterization": s["parameterization"],
            "size": show_size(s),
            "seeds": str(s["seeds"]),
            "log2 optimum": "none" if s["optimum_log2"] is None else f"{s['optimum_log2']:.1f}",
            "drift": ""
            if s["drift_octaves"] is None or show_size(s) == show_size(record["base"])
            else show_drift(s["drift_octaves"]),
            "interval": ""
            if show_size(s) == show_size(record["base"])
            else format_interval(s["drift_interval_octaves"]),
            "best": format_metric(s, "best_metric", s["best_metric"] is None),
            "at base optimum": format_metric(s, "metric_at_base_optimum", s["fails_at_base_optimum"]),
            "regret": format_regret(s, s["fails_at_base_optimum"]),
            "notes": ", ".join(
                [f"censored ({s['censored']} edge)"] * bool(s["censored"]) + ["nothing is learned"] * (not s["learns"])
            ),
        }
        for s in record["sizes"]
    ]


def describe_verdict(found: dict[str, Any]) -> str:
    line = f"- **{found['parameterization']}: {found['verdict']}**. {found['reason']}."
    if alone := found["at_planned_seeds"]:
        bold = f"**{alone['verdict']}**"
        line += f" {describe_planned(alone['seeds'], bold)}"
    return line


def count_held(records: Sequence[dict[str, Any]], parameterization: str | None = None) -> str:
    """'6 of 8': forecasts that hold what was seen, of those that can be checked. One that several parameterizations
    have in common, made of the same runs, counts once."""
    checked = {
        (record["study"], *f["target"].values(), f["predicted"], f["seen"]): f["inside"]
        for record in records
        for f in record["forecasts"]
        if f["inside"] is not None and parameterization in (None, f["parameterization"])
    }
    return f"{sum(checked.values())} of {len(checked)}"


def format_seen_and_interval(forecast: dict[str, Any]) -> tuple[str, str]:
    """With as many digits as show whether one lies in the other."""
    if forecast["diverged"] or forecast["seen"] is None or not forecast["interval"]:
        shown = "{:.3g} to {:.3g}".format(*forecast["interval"]) if forecast["interval"] else ""
        return "diverged" if forecast["diverged"] else show_number(forecast["seen"]), shown
    for digits in range(3, 9):
        seen, low, high = (f"{value:.{digits}g}" for value in (forecast["seen"], *forecast["interval"]))
        if (float(low) <= float(seen) <= float(high)) == forecast["inside"]:
            break
    return seen, f"{low} to {high}"


def forecast_rows(records: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Of all studies: what was foretold and what was seen, and why where nothing was."""
    return [
        {
            "study": record["study"],
            "parameterization": f["parameterization"],
            "target": show_size(f["target"]),
            "predicted": show_number(f["predicted"]),
            "interval": format_seen_and_interval(f)[1],
            "seen": format_seen_and_interval(f)[0],
            "inside": {True: "yes", False: "no", None: ""}[f["inside"]],
            "law, sizes": f"{f['law']}, {f['fitted_sizes']}",
            "remark": f["remark"],
        }
        for record in records
        for f in record["forecasts"]
    ]


def list_direct_rows(records: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "study": record["study"],
            "parameterization": d["parameterization"],
            "base": show_size(record["base"]),
            "target": show_size(d["target"]),
            "base's sweep / one run of the target": show_cost(d["cost_share"]),
            "/ the target's sweep": show_cost(d["cost_share_of_targets_sweep"]),
            "transferred": format_metric(d, "transferred", d["transferred"] is None),
            "at the target's own optimum": show_number(d["tuned"]),
            "regret": format_regret(d, d["transferred"] is None),
        }
        for record in records
        for d in record["direct"]
    ]


def list_rate_rows(record: dict[str, Any]) -> list[dict[str, str]]:
    """Of `depthmup converge`."""
    return [
        {
            "parameterization": r["parameterization"],
            "quantity": r["quantity"],
            "of": r["measure"],
            "along": r["axis"],
            "distance to the largest": ", ".join(
                f"{'noise' if distance is None else f'{distance:.2g}'} ({size:g})"
                for size, distance in zip(r["sizes"], r["distance"], strict=True)
            )
            + f" to {r['largest']}",
            "exponent": "" if r["exponent"] is None else f"{r['exponent']:.2f}",
            "interval": "" if r["interval"] is None else "{:.2f} to {:.2f}".format(*r["interval"]),
            "theory": f"{r['theory']:g}",
            "remark": "; ".join(filter(None, [r["remark"], r["left_out"] and f"left out: {r['left_out']}"])),
        }
        for r in record["rates"]
    ]


def read_finding(name: str, command: str, folder: Path) -> dict[str, Any] | None:
    """What another command than `transfer` found of the study `name`; None where it was not asked."""
    path = folder / f"{name}-{command}.json"
    return read_record(path) if path.exists() else None


def describe_convergence(study: dict[str, Any], folder: Path) -> list[str]:
    """What `depthmup converge` found of the study, where it was asked."""
    if not (record := read_finding(study["study"], "convergence", folder)):
        return []
    return [
        f"`depthmup converge {study['config']}`: distances to the largest size at {study['hyperparameter']} "
        f"{record['rates'][0]['value']:g}, relative, of training "
        f"loss curves and of last-layer feature kernels between {record['images']} images; "
        f"means over {len(record['rates'][0]['seeds'])} seeds, and the scatter of single runs.",
        "",
        *link_figure(folder, f"{study['study']}-convergence"),
        *link_figure(folder, f"{study['study']}-convergence-loss"),
        *format_markdown_table(list_rate_rows(record)),
        "",
    ]


def describe_exponents(study: dict[str, Any], folder: Path) -> list[str]:
    """What `depthmup exponents` found of the study, where it was asked."""
    if not (record := read_finding(study["study"], "exponents", folder)):
        return []
    flag, value = (" --own", "each size's") if record["own_values"] else ("", "the base's")
    depths = {each["parameterization"]: each["values"]["max norm"] for each in record["growths"]}
    left_out = {each["parameterization"]: each["left_out"] for each in record["growths"] if each["left_out"]}
    return [
        f"`depthmup exponents {study['config']}{flag}`: how weights in residual branches, with the "
        f"branch multiplier in them, go with depth, at {value} best value that ran ([what is measured]"
        "(theory.md#exponents-of-trained-weights)). "
        + " ".join(f"`{rules}`: depths {', '.join(of)}." for rules, of in depths.items()),
        "",
        *link_figure(folder, f"{study['study']}-exponents"),
        *format_markdown_table([format_growth(each) for each in record["growths"]]),
        "",
        *(line for rules, said in left_out.items() for line in (f"Left out of `{rules}`: {said}.", "")),
    ]


def link_figure(folder: Path, name: str) -> list[str]:
    return [f"![{name}](results/{name}.png)", ""] if (folder / f"{name}.png").exists() else []


def swept(record: dict[str, Any]) -> bool:
    """False where one value ran, for `depthmup converge`: there is no optimum to judge."""
    return len({point["value"] for point in record["points"]}) > 1


def write_study_section(record: dict[str, Any], folder: Path) -> list[str]:
    name = record["study"]
    of_theory = [*describe_convergence(record, folder), *describe_exponents(record, folder)]
    lines = [f"## {name}", "", *describe_settings(record), ""]
    if not swept(record):
        foretold = format_markdown_table([dict(list(row.items())[1:]) for row in forecast_rows([record])])
        return [*lines, *foretold, "", *of_theory]
    lines += [describe_verdict(found) for found in record["verdicts"]]
    lines += [f"- {found['said']}." for found in record.get("exponents", ())]
    lines += [
        "",
        *link_figure(folder, f"{name}-curves"),
        *link_figure(folder, f"{name}-drift"),
        *format_markdown_table(list_size_rows(record)),
    ]
    return [*lines, "", *of_theory]


def write_joint_sections(searches: Sequence[dict[str, Any]], verifications: Sequence[dict[str, Any]]) -> list[str]:
    """Of searches and verifications, a table each."""
    lines = []
    if searches:
        lines += [
            "## Several hyperparameters at once",
            "",
            TUNED,
            "",
            *format_markdown_table(search_rows(searches)),
            "",
        ]
    if verifications:
        lines += ["## Verified", "", VERIFIED, "", *format_markdown_table(list_verification_rows(verifications)), ""]
    return lines


def format_document(records: Sequence[dict[str, Any]], folder: Path) -> str:
    """The whole document. `folder` has the figures and records."""
    searches = [record for record in records if "winners" in record]
    verifications = [record for record in records if "perturbed" in record]
    records = [record for record in records if "verdicts" in record]
    judged = [record for record in records if swept(record)]
    forecasts, direct = forecast_rows(records), list_direct_rows(judged)
    lines = [INTRODUCTION, *format_markdown_table(tabulate_studies(judged)), ""]
    lines += [f"Rule of the verdicts: {rule}" for rule in dict.fromkeys(record["rule"] for record in judged)]
    lines += ["", "## Transfer beside tuning directly", "", *format_markdown_table(direct), ""]
    lines += [
        "## Forecasts",
        "",
        f"{count_held(records)} hold what was seen; of `depth_mup`'s {count_held(records, 'depth_mup')}. A forecast of "
        "several parameterizations that is made of the same runs counts once; a variant of `depth_mup` counts among "
        "all alone.",
        "",
    ]
    lines += [*format_markdown_table(forecasts), ""]
    lines += write_joint_sections(searches, verifications)
    for record in records:
        lines += write_study_section(record, folder)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    paths = [Path(argument) for argument in sys.argv[1:]]
    if not paths:
        sys.exit(f"give the records: python -m {__spec__.name} docs/results/*.json")
    print(format_document([*map(read_record, paths)], paths[0].parent), end="")


if __name__ == "__main__":
    main()
