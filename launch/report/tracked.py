"""A study on Weights & Biases and TensorBoard: one run beside the study's runs, with its verdicts, table and page."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from depthmup.launch.report.page import format_markdown
from depthmup.launch.report.tables import tabulate_sizes
from depthmup.train.config import TrackConfig
from depthmup.train.metrics import Recorder, Tracker, open_board, start_wandb

Record = Mapping[str, Any]


def make_summary(record: Record) -> dict[str, Any]:
    """The numbers and verdicts that runs of several studies are compared by."""
    found: dict[str, Any] = {
        "runs": record["num_runs"],
        "diverged_runs": record["num_diverged"],
        "unfinished_runs": record["num_unfinished"],
        "flops": record["cost"]["flops"],
        "gpu_hours": record["cost"]["gpu_hours"],
    }
    for verdict in record["verdicts"]:
        name = verdict["parameterization"]
        regrets = [s["regret"] for s in record["sizes"] if s["parameterization"] == name and s["regret"] is not None]
        found |= {f"verdict/{name}": verdict["verdict"], f"reason/{name}": verdict["reason"]}
        found |= {f"largest_regret/{name}": max(regrets)} if regrets else {}
    return found


class WandbStudy:
    """A wandb run in the group of the study's runs. Its id is the study's name: a later report goes on with it."""

    def __init__(self, track: TrackConfig, record: Record, root: Path, warn: Callable[[str], None]) -> None:
        name = record["study"]
        settings = {"group": track.group or name, "id": f"study-{name}"[-64:], "name": name, "job_type": "report"}
        told = ("config", "model", "optimizer", "schedule", "data", "hyperparameter", "metric", "steps", "base", "rule")
        self.run = start_wandb(track, root, warn, config={key: record[key] for key in told}, **settings)
        self.root = root

    def log(self, record: dict[str, Any]) -> None:
        import wandb

        table = tabulate_sizes(record)
        cells = wandb.Table(columns=list(table[0]), data=[list(row.values()) for row in table]) if table else None
        page = wandb.Html((self.root / "report.html").read_text(), inject=False)
        self.run.log({"page": page} | ({"sizes": cells} if cells else {}))
        self.run.summary.update(make_summary(record))

    def finish(self) -> None:
        self.run.finish()


class TensorBoardStudy:
    """Event files in the study's folder: the report as text, and each size's regret, in the order of the study."""

    def __init__(self, root: Path) -> None:
        self.writer = open_board(root / "tensorboard", purge_step=0)

    def log(self, record: dict[str, Any]) -> None:
        self.writer.add_text("report", format_markdown(record), 0)
        for name in (verdict["parameterization"] for verdict in record["verdicts"]):
            own = (size for size in record["sizes"] if size["parameterization"] == name)
            for place, size in enumerate(own):
                if size["regret"] is not None:
                    self.writer.add_scalar(f"regret/{name}", size["regret"], place)

    def finish(self) -> None:
        self.writer.close()


def log_study(track: TrackConfig, record: Record, root: Path, warn: Callable[[str], None]) -> None:
    """Writes the study to what `track` asks for, once report.html is in `root`. What fails there is a warning. Raises
    UserError when it is not installed."""
    starts: dict[str, Callable[[], Tracker]] = {}
    if track.wandb != "off":
        starts["wandb"] = partial(WandbStudy, track, record, root, warn)
    if track.tensorboard:
        starts["tensorboard"] = partial(TensorBoardStudy, root)
    for name, start in starts.items():
        recorder = Recorder(name, start, warn, "the report")
        recorder.log(dict(record))
        recorder.finish()
