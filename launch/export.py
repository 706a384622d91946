"""`depthmup export`: a finished run's weights as a plain timm network's."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from depthmup.data.config import expand_per_channel
from depthmup.data.errors import UserError
from depthmup.data.files import write_atomically
from depthmup.models.build import build_meta
from depthmup.models.config import OwnConfig
from depthmup.models.export import folded_state
from depthmup.models.own import list_builder_arguments
from depthmup.models.timm_registry import find_timm_call
from depthmup.train.config import RunConfig
from depthmup.train.owner import check_owner
from depthmup.train.reading import from_plain, read_yaml, to_plain
from depthmup.train.record import save_weights
from depthmup.train.rundir import RunDirectory


def list_best_runs(study: Path) -> str:
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


@dataclass(frozen=True)
class PlainNetwork:
    """What makes the network of an export, without multipliers: timm.create_model(name, **arguments), or a function of
    the user's own of that name."""

    name: str
    arguments: dict[str, Any]
    is_own: bool

    def loading_code(self, out: Path) -> str:
        """Python that loads what was exported as `out`: as it stands, or beside the user's function."""
        if self.is_own:
            given = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
            return (
                f"from safetensors.torch import load_file\n\nnetwork = {self.name}({given})  # your function\n"
                f"network.load_state_dict(load_file({str(out)!r}))"
            )
        if is_folder(out):
            call = f"timm.create_model({f'local-dir:{out}'!r}, pretrained=True)"
        else:
            given = "".join(f", {key}={value!r}" for key, value in self.arguments.items())
            call = f"timm.create_model({self.name!r}, checkpoint_path={str(locate_weights_file(out))!r}{given})"
        return (
            "import depthmup.models.timm_registry  # first: registers names, mends timm's import beside a CPU torch\n"
            "import timm\n\n"
            f"network = {call}\n"
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))  # of a PIL image"
        )


def describe_plain_network(config: RunConfig, out: Path) -> PlainNetwork:
    """What makes the network of a run for an export to `out`. Raises UserError, or ModelError for one without any."""
    if isinstance(model := config.model, OwnConfig):
        if is_folder(out):
            raise UserError(f"{out}: a folder is for networks of timm's: give a file, as {out}.safetensors")
        size = {"width": model.width, "depth": model.depth}
        return PlainNetwork(model.builder, size | list_builder_arguments(model), is_own=True)
    name, arguments = find_timm_call(model)
    return PlainNetwork(name, arguments, is_own=False)


def is_folder(out: Path) -> bool:
    """Whether a folder in the layout of Hugging Face is asked for, not one file."""
    return out.is_dir() or not out.suffix


def locate_weights_file(out: Path) -> Path:
    return out / "model.safetensors" if is_folder(out) else out


def make_hugging_face_config(
    config: RunConfig, name: str, arguments: dict[str, Any], num_features: int
) -> dict[str, Any]:
    """config.json of a timm network in the layout of Hugging Face."""
    return {
        "architecture": name,
        "num_classes": config.model.num_classes,
        "num_features": num_features,
        "model_args": arguments,
        "pretrained_cfg": describe_preprocessing(config),
    }


def describe_preprocessing(config: RunConfig) -> dict[str, Any]:
    """How timm makes a picture the network's input as an evaluation here does (data.decode.center_crop,
    data.batch.to_float), in the words of timm's pretrained_cfg."""
    model, data = config.model, config.data
    return {
        "input_size": [model.in_channels, model.image_size, model.image_size],
        "mean": list(expand_per_channel(data.mean, model.in_channels)),
        "std": list(expand_per_channel(data.std, model.in_channels)),
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "num_classes": model.num_classes,
    }


def export_run(run: Path, out: Path) -> PlainNetwork:
    """Writes `out`, a safetensors file or a folder in the layout of Hugging Face; returns what makes the network that
    takes these weights, which is in the file's metadata too.

    Raises UserError for a directory without a run's weights, ModelError where a multiplier cannot be folded.
    """
    directory = RunDirectory(run)
    if (run / "study.yaml").exists():
        raise UserError(f"{run} is a study's folder: export one of its runs, {list_best_runs(run)}")
    if not directory.weights.exists():
        raise UserError(f"{run}: no {directory.weights.name} there; a run writes it when it is completed")
    config = from_plain(RunConfig, read_yaml(directory.config), str(directory.config))
    done = directory.done()
    if done and "identity" in done:  # a configuration that was changed since would have other multipliers
        check_owner(directory.path / "done.json", done, config, None)
    scaled = build_meta(config.model, config.parameterization)
    try:
        scaled.network.load_state_dict(load_file(directory.weights), strict=True, assign=True)
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"{directory.weights}: not the weights of this run's model: {error}") from None
    plain = describe_plain_network(config, out)
    overlay = {} if plain.is_own else {"pretrained_cfg_overlay": describe_preprocessing(config)}
    of_file = replace(plain, arguments=plain.arguments | overlay)
    metadata = {
        "format": "pt",
        "builder" if plain.is_own else "timm": json.dumps({"model_name": plain.name, "arguments": of_file.arguments}),
        "pretrained_cfg": json.dumps(describe_preprocessing(config)),
        "model": json.dumps(to_plain(config.model)),
        "parameterization": json.dumps(to_plain(config.parameterization)),
    }
    state = folded_state(scaled)
    try:
        file = locate_weights_file(out)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_weights(file, state, metadata)
        if is_folder(out):
            num_features = state[f"{scaled.roles.readout}.weight"].shape[1]
            described = make_hugging_face_config(config, plain.name, plain.arguments, num_features)
            write_atomically(out / "config.json", (json.dumps(described, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"{out}: cannot write there: {error.strerror}") from None
    return of_file
