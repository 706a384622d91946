"""Every engine trains the same run: same groups, same learning rates, same losses, on one process and on two.

ZeRO without parts of parameters is one code: stage 2 stands for stages 0 and 1, which are in `make test-long`.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from depthmup.train.config import ParallelConfig, RunConfig
from train_configs import CONV_RESNET, VIT, losses, metric, pack_digits, run_config
from train_processes import run_function

ENGINES = {
    "ddp": ("parallel.engine=ddp",),
    "fsdp": ("parallel.engine=fsdp",),
    **{f"zero{n}": ("parallel.engine=deepspeed", f"parallel.zero_stage={n}") for n in range(4)},
}
SHALLOW = {**VIT, "depth": 2, "base_depth": 1}
CASES = {
    f"{model['family']}-{parameterization}-{optimizer}": (model, parameterization, optimizer)
    for model, parameterization, optimizer in itertools.product(
        (SHALLOW, CONV_RESNET), ("sp", "depth_mup"), ("sgd", "adamw")
    )
}
MIXTURE = {"num_experts": 4, "base_num_experts": 2, "active_share": 0.5, "mlp_ratio": 2, "base_mlp_ratio": 2}
PROBABILISTIC = {"width": 16, "depth": 2, "base_width": 8, "base_depth": 2, "channels": 4, "patch_size": 2}
CASES |= {
    "moe_vit-completep-adamw": ({**SHALLOW, "family": "moe_vit", **MIXTURE}, "completep", "adamw"),
    "probabilistic-mup-adamw": ({"family": "probabilistic", **PROBABILISTIC}, "mup", "adamw"),
}
# Each value of a choice beside each value of another; two of them for stage 3. `make test-long` has all cases on every
# engine.
PAIRS = ["vit-sp-sgd", "vit-depth_mup-adamw", "conv_resnet-sp-adamw", "conv_resnet-depth_mup-sgd"]
STEPS = 6
DEEPER = ("model.depth=4", "model.base_depth=2")
LEARNING_RATE = {"sgd": 0.05, "adamw": 0.002}
RECIPE = (
    "data.mixup=0.3", "data.cutmix=0.5", "train.label_smoothing=0.1", "train.drop_path=0.2",
    "schedule.name=constant",  # so that the average lags behind
    "train.evaluate=[val]", "train.evaluate_every=5",  # a run goes on after an evaluation
    "train.samples=320",
)  # fmt: skip
BATCH_NORM = {**CONV_RESNET, "norm": "batch"}  # at 8x8 pixels: over few values it makes much of a rounding error
STATISTICS = ("train.batch_norm_images=8", "train.samples=320")
MUON = ("optimizer.name=muon", "optimizer.momentum=0.95", "optimizer.lr=0.002")
SIX_STEPS = ("data.in_memory=true", f"train.samples={STEPS * 32}", "train.evaluate=[]")


def config_of(shards: str, case: str, *overrides: str) -> RunConfig:
    """Six steps. Reads the digits from memory and evaluates when `overrides` say so: what is compared are the steps."""
    model, parameterization, optimizer = CASES[case]
    return run_config(
        shards,
        f"parameterization.name={parameterization}",
        f"optimizer.name={optimizer}",
        f"optimizer.lr={LEARNING_RATE[optimizer]}",
        "optimizer.weight_decay=0.0001",
        "train.clip_norm=0.5",
        "data.in_memory=true",
        f"train.samples={STEPS * 32}",
        "train.evaluate=[]",
        *overrides,
        model=model,
    )


def chosen_engines(*left_out: str) -> list[Any]:
    return [pytest.param(e, marks=pytest.mark.long if e in LONG else ()) for e in ENGINES if e not in left_out]


def is_long(case: str, engine: str) -> bool:
    other = engine in ONCE and case.startswith(("moe_vit", "probabilistic"))
    return engine in LONG or (not other and case not in (PAIRS[1:3] if engine == "zero3" else PAIRS))


LONG = ("zero0", "zero1")
ONCE = ("fsdp", "zero2")  # the engines of the other families
CHOSEN = [
    pytest.param(case, engine, id=f"{case}-{engine}", marks=pytest.mark.long if is_long(case, engine) else ())
    for engine in ENGINES
    for case in CASES
]


def wrapped_groups(run: Path) -> list[dict[str, object]]:
    """What the optimizer says of its groups after the last step, without their tensors."""
    return json.loads((run / "groups.json").read_text())


def record_groups() -> None:
    """Lets every run leave groups.json in its directory, and held.json: how many numbers of its network's parameters a
    process holds when the optimizer is made."""
    from depthmup.train import loop, one_network

    finish, parameter_groups = loop.Loop.finish, one_network.parameter_groups
    held = list[int]()

    def counting(network: Any, *arguments: Any) -> Any:
        held.append(sum(parameter.numel() for parameter in network.parameters()))
        return parameter_groups(network, *arguments)

    def recording(self: loop.Loop) -> None:
        keys = ("name", "lr", "lr_mult", "weight_decay", "eps")
        found = [{k: g[k] for k in keys if k in g} for g in self.networks.engine.optimizer.param_groups]
        folder = self.records[0].directory.path
        (folder / "groups.json").write_text(json.dumps(found))
        (folder / "held.json").write_text(json.dumps(held[-1]))
        finish(self)

    loop.Loop.finish = recording  # type: ignore[method-assign]
    one_network.parameter_groups = counting  # type: ignore[assignment]


def train_all(shards: str, out: str, engines: str, chosen: str) -> None:
    """In each of two processes: what each of `engines` trains, and the `chosen` cases, in two micro-batches. A comma is
    between two of them."""
    import torch

    from depthmup.train.distributed import process_group, read_world_from_environment
    from depthmup.train.loop import run

    world = read_world_from_environment()
    record_groups()
    with process_group(world, torch.device("cpu"), ParallelConfig(), "ddp"):
        for name in (each for each in ENGINES if each in engines.split(",")):  # ZeRO 3, which changes torch, is last
            overrides = ENGINES[name]
            for place in chosen.split(","):
                engine, _, case = place.partition("/")
                if engine == name:
                    config = config_of(shards, case, "parallel.micro_batch_size=8", *overrides)
                    run(config, Path(out) / place, world)
            of_batch_norm = (*STATISTICS, "parallel.micro_batch_size=8", *overrides)
            run(run_config(shards, *of_batch_norm, model=BATCH_NORM), Path(out) / name / "batch_norm", world)
            in_bf16 = ("train.precision=bf16", "train.samples=320", *DEEPER, *overrides)
            run(config_of(shards, "vit-depth_mup-adamw", *in_bf16), Path(out) / name / "bf16", world)
            if name == "fsdp":
                gathered = (*in_bf16, "parallel.gather=bf16")
                run(config_of(shards, "vit-depth_mup-adamw", *gathered), Path(out) / name / "gathered", world)
            if name in ("ddp", "fsdp"):
                config = run_config(
                    shards, *MUON, *SIX_STEPS, "parallel.micro_batch_size=8", *overrides, model=CONV_RESNET
                )
                run(config, Path(out) / name / "muon_convolutions", world)
            recipe = (*RECIPE, *(() if name == "zero3" else ("train.ema=0.9",)))
            for case, more in {"recipe": recipe, **({"muon": MUON} if name in ("ddp", "fsdp") else {})}.items():
                config = config_of(shards, "vit-depth_mup-adamw", "parallel.micro_batch_size=8", *overrides, *more)
                run(config, Path(out) / name / case, world)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """All runs that the chosen tests are about: one group of processes trains them."""
    from depthmup.train import one_network
    from depthmup.train.loop import Loop, run

    here = [item for item in request.session.items if item.fspath == request.fspath and hasattr(item, "callspec")]
    stated = [item.callspec.params for item in here]
    chosen = {f"{params['engine']}/{params['case']}": params["case"] for params in stated if "case" in params}
    engines = {params["engine"] for params in stated} | {"ddp", "fsdp"}
    out = tmp_path_factory.mktemp("engines")
    shards = pack_digits(out / "shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "finish", Loop.finish)  # puts it back afterwards: other tests run in this process
        patch.setattr(one_network, "parameter_groups", one_network.parameter_groups)
        record_groups()
        for case in dict.fromkeys(chosen.values()):
            run(config_of(str(shards), case), out / "none" / case)
        run(config_of(str(shards), "vit-depth_mup-adamw", *MUON), out / "none" / "muon")
        run(run_config(str(shards), *MUON, *SIX_STEPS, model=CONV_RESNET), out / "none" / "muon_convolutions")
        run(config_of(str(shards), "vit-depth_mup-adamw", *RECIPE, "train.ema=0.9"), out / "none" / "recipe")
        run(run_config(str(shards), *STATISTICS, model=BATCH_NORM), out / "none" / "batch_norm")
    run_function("test_train_engines", "train_all", 2, str(shards), str(out), ",".join(engines), ",".join(chosen))
    return out


@pytest.mark.parametrize(("case", "engine"), CHOSEN)
def test_losses_of_every_engine_on_two_processes_equal_those_of_one_process(runs: Path, case: str, engine: str) -> None:
    expected = losses(runs / "none" / case)
    assert len(expected) == STEPS
    assert len(set(expected)) == STEPS
    assert losses(runs / engine / case) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("case", "engine"), CHOSEN)
def test_no_parameter_group_is_lost_or_merged_by_wrapping(runs: Path, case: str, engine: str) -> None:
    expected = wrapped_groups(runs / "none" / case)
    assert len({(group["lr_mult"], group["weight_decay"]) for group in expected}) > 1
    assert wrapped_groups(runs / engine / case) == expected


@pytest.mark.parametrize("engine", ["zero3"])
def test_a_process_of_zero_3_holds_no_whole_parameter_once_its_network_is_drawn(runs: Path, engine: str) -> None:
    """What runs on one process is whole, and the losses tell that the weights are the same."""
    whole, held = (json.loads((runs / each / "batch_norm" / "held.json").read_text()) for each in ("none", engine))
    assert whole > 0
    assert held == 0


@pytest.mark.parametrize("engine", chosen_engines())
def test_mixing_smoothing_stochastic_depth_and_the_average_are_the_same_under_every_engine(
    runs: Path, engine: str
) -> None:
    assert losses(runs / engine / "recipe") == pytest.approx(losses(runs / "none" / "recipe"), rel=1e-5)
    if engine != "zero3":
        found, expected = (json.loads((runs / e / "recipe" / "done.json").read_text()) for e in (engine, "none"))
        assert expected["val_ema_loss"] != pytest.approx(expected["val_loss"], rel=1e-4)
        assert found["val_ema_loss"] == pytest.approx(expected["val_ema_loss"], rel=1e-5)


@pytest.mark.parametrize("engine", chosen_engines())
def test_batch_norm_learns_and_is_evaluated_the_same_under_every_engine(runs: Path, engine: str) -> None:
    assert losses(runs / engine / "batch_norm") == pytest.approx(losses(runs / "none" / "batch_norm"), rel=1e-5)
    found, expected = (json.loads((runs / e / "batch_norm" / "done.json").read_text()) for e in (engine, "none"))
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)


@pytest.mark.parametrize("engine", chosen_engines("ddp"))
def test_gradients_of_bf16_are_averaged_in_fp32_under_every_engine(runs: Path, engine: str) -> None:
    """bf16 itself rounds to 4e-3; but what each process computes before they average is the same. The first step's norm
    shows it: later AdamW makes whole steps of what is zero but for rounding. Averaged in bf16, it differs by 1e-5."""
    first, expected = (metric(runs / e / "bf16", "grad_norm")[0] for e in (engine, "ddp"))
    assert first == pytest.approx(expected, rel=1e-6)
    assert losses(runs / engine / "bf16") == pytest.approx(losses(runs / "ddp" / "bf16"), rel=1e-4)


def test_weights_that_are_gathered_in_bf16_give_the_losses_of_those_that_autocast_rounds(runs: Path) -> None:
    assert losses(runs / "fsdp" / "gathered") == losses(runs / "fsdp" / "bf16")


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_muon_sees_whole_matrices_under_ddp_and_fsdp(runs: Path, engine: str) -> None:
    assert losses(runs / engine / "muon") == pytest.approx(losses(runs / "none" / "muon"), rel=1e-5)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_muon_sees_whole_convolutions_under_ddp_and_fsdp(runs: Path, engine: str) -> None:
    """FSDP2 sums the products of shards in another order, and Muon orthogonalises in bf16: 2e-5 was seen."""
    case = "muon_convolutions"
    assert losses(runs / engine / case) == pytest.approx(losses(runs / "none" / case), rel=1e-4)
