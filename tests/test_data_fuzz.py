"""Minutes of damaged images and shards: each is read, or refused with a reason."""

import sys

import pytest
from benchmarks import fuzz_reader


@pytest.mark.long
def test_no_damage_of_five_minutes_is_a_fault_of_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fuzz_reader", "--seconds", "300"])
    with pytest.raises(SystemExit) as ended:
        fuzz_reader.main()
    assert ended.value.code == 0
    assert all(fuzz_reader.counts.values()), fuzz_reader.counts
