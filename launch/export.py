"""`depthmup export`: a finished run's weights as a plain timm network's."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from depthmup.data.config import per_channel
from depthmup.data.errors import UserError
from depthmup.models.build import build_meta
from depthmup.models.export import folded_state
from depthmup.models.timm_registry import timm_call
from depthmup.train.config import RunConfig
from depthmup.train.reading import from_plain, read_yaml, to_plain
from depthmup.train.rundir import RunDirectory


def best_runs(study: Path) -> str:
    """The completed runs with the lowest metric of a study's folder, as text."""
    metric = read_yaml(study / "study.yaml")["study"]["metric"]
    finished = ((RunDirectory(path), RunDirectory(path).done()) for path in sorted((study / "runs").glob("*")))
    losses = [
        (done[metric], directory.path)
        for directory, done in finished
        if done and directory.weights.exists() and metric in done
    ]
    shown = "; ".join(f"{path} ({metric} {loss:.4g})" for loss, path in sorted(losses)[:3])
    return f"best first: {shown}" if shown else "once one is completed"


def loading_code(out: Path, name: str, arguments: dict[str, Any]) -> str:
    """Python that loads the exported file, as it stands."""
    given = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return (
        "import depthmup.models.timm_registry  # first: registers its names, mends timm's import beside a CPU torch\n"
        "import timm\n\n"
        f"network = timm.create_model({name!r}, checkpoint_path={str(out)!r}{given})\n"
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))  # of a PIL image"
    )


def preprocessing(config: RunConfig) -> dict[str, Any]:
    """How timm makes a picture the network's input as an evaluation here does (data.decode.center_crop,
    data.batch.to_float), in the words of timm's pretrained_cfg."""
    model, data = config.model, config.data
    return {
        "input_size": [model.in_channels, model.image_size, model.image_size],
        "mean": list(per_channel(data.mean, model.in_channels)),
        "std": list(per_channel(data.std, model.in_channels)),
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "num_classes": model.num_classes,
    }


def export_run(run: Path, out: Path) -> tuple[str, dict[str, Any]]:
    """Writes `out`; returns the name and arguments for timm.create_model, which are in the file's metadata too.

    Raises UserError for a directory without a run's weights, ModelError where a multiplier cannot be folded.
    """
    directory = RunDirectory(run)
    if (run / "study.yaml").exists():
        raise UserError(f"{run} is a study's folder: export one of its runs, {best_runs(run)}")
    if not directory.weights.exists():
        raise UserError(f"{run}: no {directory.weights.name} there; a run writes it when it is completed")
    config = from_plain(RunConfig, read_yaml(directory.config), str(directory.config))
    scaled = build_meta(config.model, config.parameterization)
    try:
        scaled.network.load_state_dict(load_file(directory.weights), strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(f"{directory.weights}: not the weights of this run's model: {error}") from None
    name, arguments = timm_call(config.model)
    arguments |= {"pretrained_cfg_overlay": preprocessing(config)}
    metadata = {
        "format": "pt",
        "timm": json.dumps({"model_name": name, "arguments": arguments}),
        "pretrained_cfg": json.dumps(preprocessing(config)),
        "model": json.dumps(to_plain(config.model)),
        "parameterization": json.dumps(to_plain(config.parameterization)),
    }
    state = {key: tensor.contiguous() for key, tensor in folded_state(scaled).items()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, out, metadata)
    except OSError as error:
        raise UserError(f"{out}: cannot write there: {error.strerror}") from None
    return name, arguments
