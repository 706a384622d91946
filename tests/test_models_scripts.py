"""The page on scripts of one's own: its examples run as they stand, and train what the tables say."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from depthmup.launch.cli import cli
from depthmup.models import Role, ScaledModel, Size, build_scaled
from depthmup.models.coordinate_check import Settings, check_sizes
from depthmup.models.optimizer_config import OptimizerConfig
from depthmup.models.parameterization_config import ParameterizationConfig
from stranger_network import make_network
from train_processes import start

README = Path(__file__).parents[1] / "README.md"
PAGE = README.parent / "docs" / "your-model.md"
NEEDED = "is not installed; the extra `trainers`, which `make test` installs, brings it"


def example(kind: str) -> str:
    (block,) = re.findall(rf"```python {kind}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return str(block)


def plain_examples() -> str:
    """Up to the section on roles by hand."""
    text = PAGE.read_text().partition("## Roles by hand")[0]
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


@pytest.fixture
def names() -> dict[str, Any]:
    found: dict[str, Any] = {"__name__": "example"}
    exec(compile(plain_examples(), str(PAGE), "exec"), found)
    return found


def weights(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def test_the_plain_loop_trains_and_its_schedule_keeps_the_ratios(names: dict[str, Any]) -> None:
    loss = torch.nn.functional.cross_entropy(names["scaled"].network(names["x"]), names["y"])
    assert loss < 2.2
    groups = names["optimizer"].param_groups
    assert len({group["lr_mult"] for group in groups}) > 1
    for group in groups:
        assert group["lr"] == pytest.approx(names["tuned"].lr * group["lr_mult"])


def test_timms_factory_keeps_what_the_table_says_of_each_group(names: dict[str, Any]) -> None:
    groups = names["timms_optimizer"].param_groups
    for found, stated in zip(groups, names["groups"], strict=True):
        assert found["initial_lr"] == pytest.approx(stated["lr_mult"] * names["tuned"].lr)
        assert (found["eps"], found["weight_decay"]) == (stated["eps"], stated["weight_decay"])
    names["timms_schedule"].step(50)
    factors = {round(group["lr"] / group["initial_lr"], 6) for group in groups}
    assert len(factors) == 1


def test_a_compiled_network_is_scaled_as_the_plain_one(names: dict[str, Any]) -> None:
    compiled = torch.compile(names["scaled"].network, backend="eager")
    torch.testing.assert_close(compiled(names["x"]), names["scaled"].network(names["x"]))
    assert names["scaled"].multipliers


def test_ddp_and_fsdp_train_alike_in_two_processes(tmp_path: Path) -> None:
    script = "\n".join((plain_examples().partition("x, y = ")[0], example("torchrun"), "print('losses', losses)"))
    processes = start(["-c", script], 2)
    for process in processes:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
        ddp, fsdp = map(float, re.findall(r"'(?:ddp|fsdp)': ([\d.]+)", output))
        assert ddp == pytest.approx(fsdp, rel=1e-4)
        assert ddp < 2.2


def test_the_network_of_the_page_is_a_studys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block = plain_examples().partition("class Net(")[0]
    Path("net.py").write_text(block + example("net.py"))
    generator = np.random.default_rng(0)
    for number in range(20):
        place = tmp_path / "flowers" / f"class-{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(place / f"{number}.png")
    for words in (
        ("new", "mine", "--network", "net.py:Net", "--source", "flowers"),
        ("train", "mine.yaml", "train.samples=32", "train.device=cpu"),
    ):
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 0, (done.output, done.exception)


@pytest.mark.filterwarnings("ignore")  # xdist's main process imports the library that has a warning's class
@pytest.mark.parametrize("library", ["transformers", "lightning"])
def test_a_trainer_of_another_library_takes_the_optimizer(
    library: str, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(library, reason=f"{library} {NEEDED}")
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # DeepSpeed leaves some behind
        monkeypatch.delenv(name, raising=False)
    before = weights(names["scaled"].network)
    exec(compile(example(library), str(PAGE), "exec"), names)
    after = weights(names["scaled"].network)
    assert all(not torch.equal(before[name], after[name]) for name in before)


# ---------------------------------------------------------------- a stranger's network of 200 lines


def readme_lines() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    return str(block)


def test_a_strangers_network_of_200_lines_is_scaled_by_the_readmes_lines_alone() -> None:
    names: dict[str, Any] = {"make_network": make_network, "images": torch.zeros(1, 3, 8, 8)}
    exec(readme_lines(), names)
    scaled, optimizer = names["scaled"], names["optimizer"]
    block = "encoder.late.layers.5.mix"
    expected = {
        "patches.embed.weight": Role.INPUT, "patches.registers": Role.INPUT, "between.weight": Role.HIDDEN,
        f"{block}.tokens.inner.to_queries.weight": Role.BRANCH_HIDDEN, f"{block}.tokens.gain": Role.BRANCH_VECTOR,
        f"{block}.tokens.inner.project.bias": Role.BRANCH_VECTOR, f"{block}.features.norm.gain": Role.BRANCH_VECTOR,
        f"{block}.features.inner.gate.weight": Role.BRANCH_HIDDEN, "norm.gain": Role.VECTOR,
        f"{block}.features.inner.down.weight": Role.BRANCH_HIDDEN, "classifier.weight": Role.READOUT,
    }  # fmt: skip
    assert {name: scaled.rules[name].role for name in expected} == expected
    values = [multiplier.value for multiplier in scaled.multipliers.values()]
    assert sorted(values) == [pytest.approx(0.25)] + [pytest.approx((3 / 24) ** 0.5)] * 48
    images, labels = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10
    trained = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(scaled.network(images), labels)
        loss.backward()
        optimizer.step()
        trained.append(loss.item())
    assert trained[-1] < trained[0]


def test_the_check_passes_on_the_strangers_network_of_200_lines() -> None:
    base = Size(width=32, depth=4)
    completep = ParameterizationConfig(name="completep", beta=1 / 4)

    def build_at(size: Size, seed: int) -> ScaledModel:
        inputs = torch.zeros(1, 3, 8, 8)
        return build_scaled(make_network, size=size, base=base, inputs=inputs, parameterization=completep, seed=seed)

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((16, 3, 8, 8), generator=generator), torch.randint(10, (16,), generator=generator)

    lines = check_sizes(build_at, batch, base, OptimizerConfig(name="adamw", lr=2**-9), Settings((1, 4), steps=2))
    assert {line.axis for line in lines} == {"width", "depth"}
    assert [line for line in lines if line.verdict != "ok"] == []
