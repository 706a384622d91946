"""Modules are imported without a collection of garbage, which is on again afterwards."""

import gc
import sys
from pathlib import Path

import pytest

from depthmup.train.imports import import_uncollected
from train_processes import run_function

MODULES = {"large": "import gc\nwas_enabled, held = gc.isenabled(), [[] for _ in range(1000)]\n", "broken": "1 / 0\n"}


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in MODULES.items():
        (tmp_path / f"{name}_to_import.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)


def test_garbage_is_collected_again_after_an_import_which_later_collections_pass_over(tmp_path: Path) -> None:
    """In a process of its own: another thread, as a tracker's, may let go of what is frozen."""
    run_function("test_train_imports", "import_twice", 1, str(tmp_path))


def import_twice(folder: str) -> None:
    sys.path.insert(0, folder)
    frozen = gc.get_freeze_count()
    import_uncollected("json", "large_to_import")
    assert not sys.modules["large_to_import"].was_enabled
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + 1000
    gc.collect()
    frozen, garbage = gc.get_freeze_count(), [[] for _ in range(1000)]
    import_uncollected("json", "large_to_import")  # a process's own garbage is not frozen once they are there
    assert gc.get_freeze_count() == frozen
    del garbage


def test_an_import_that_fails_leaves_the_collection_as_it_was() -> None:
    with pytest.raises(ZeroDivisionError):
        import_uncollected("broken_to_import")
    assert gc.isenabled()
