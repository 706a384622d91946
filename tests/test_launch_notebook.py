"""The commands as functions, and the worked notebook of docs/."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

import depthmup
from depthmup.data.errors import UserError

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebook.ipynb"


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """What a notebook would show below the cell: the value of its last line, where that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None


@pytest.mark.long
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cells = [
        "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    shorter = {
        "samples: 9600": "samples: 640",
        "depth: 12}": "depth: 4}",
        "[2**-11, 2**-10, 2**-9, 2**-8, 2**-7, 2**-6, 2**-5]": "[2**-10, 2**-8, 2**-6]",
        "seeds: [0, 1]": "seeds: [0]",
        "study:\n": "launch: {cluster: debug}\nstudy:\n",  # in this process
    }
    for old, new in shorter.items():
        assert any(old in cell for cell in cells), old
        cells = [cell.replace(old, new) for cell in cells]
    names: dict[str, Any] = {}
    shown = [run_cell(cell, names) for cell in cells]
    assert names["runs"][0].keys() == {
        "run", "parameterization", "width", "depth", "value", "seed", "flops", "done"
    }  # fmt: skip
    assert not any(run["done"] for run in names["runs"])
    assert {name for name, _, _ in shown[2]} == {"sp", "depth_mup"}
    assert {"done": len(names["runs"])} in shown
    assert isinstance(shown[-1], Figure)
    assert all(run["done"] for run in depthmup.plan("tiny.yaml"))


def test_functions_find_configurations_where_the_commands_do(study_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDIES", str(study_file.parent))
    assert depthmup.plan("$STUDIES/tiny.yaml") == depthmup.plan(study_file)
    assert {run["done"] for run in depthmup.plan("digits_resnet", f"study.directory={study_file.parent}")} == {False}
    with pytest.raises(UserError, match="the variable NOWHERE is not set"):
        depthmup.plan("$NOWHERE/tiny.yaml")


def test_functions_take_overrides_and_say_mistakes_as_the_commands_do(study_file: Path) -> None:
    fewer = depthmup.plan(study_file, "study.parameterizations=[sp]")
    assert {run["parameterization"] for run in fewer} == {"sp"}
    assert len(fewer) < len(depthmup.plan(study_file))
    with pytest.raises(UserError, match="did you mean"):
        depthmup.plan(study_file, "study.seedz=[0]")
    with pytest.raises(UserError, match="No such file"):
        depthmup.status("nowhere.yaml")
    with pytest.raises(AttributeError, match="no attribute 'plane'"):
        depthmup.plane  # noqa: B018
