"""Locks: one holder at a time, and clear words where the file system has none."""

import errno
import fcntl
import os

import pytest

from depthmup.data import pack as packing
from depthmup.data.errors import UserError
from depthmup.data.lock import NoLocks, flock
from depthmup.data.pack import pack
from image_sets import make_folder


# Lustre without -o flock; NFS without lockd; others. Not read from the code, which may lose one.
@pytest.fixture(params=(errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP), ids=errno.errorcode.get)
def no_locks(request, monkeypatch):
    def refuse(file, operation):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_lock_has_one_holder(tmp_path):
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        assert flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert not flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        first.close()
        assert flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_file_system_without_locks_is_named_with_the_cure(tmp_path, no_locks):
    with open(tmp_path / "lock", "w") as file, pytest.raises(NoLocks, match=r"lock: .*no file locks .*-o flock.*lockd"):
        flock(file, fcntl.LOCK_EX)


def test_another_error_is_not_taken_for_a_file_system_without_locks(tmp_path, monkeypatch):
    def fail(file, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with open(tmp_path / "lock", "w") as file, pytest.raises(OSError, match="Input/output error"):
        flock(file, fcntl.LOCK_EX)


def test_without_locks_a_pack_works_and_has_its_folder_for_itself(tmp_path, no_locks):
    source = make_folder(tmp_path / "images", 9)
    with packing.claim_folder(tmp_path / "shards"), pytest.raises(UserError, match=f"process {os.getpid()} on "):
        pack(str(source), tmp_path / "shards")
    index, _ = pack(str(source), tmp_path / "shards")
    assert index.describe() == "9 samples in 1 shard"
    assert sorted(path.name for path in (tmp_path / "shards").iterdir() if path.name.startswith(".")) == []


def test_without_locks_a_killed_pack_says_which_file_to_delete(tmp_path, no_locks):
    source, claimed = make_folder(tmp_path / "images", 9), tmp_path / "shards" / packing.CLAIM_NAME
    claimed.parent.mkdir()
    claimed.write_text("process 7 on node3")
    with pytest.raises(UserError, match=f"process 7 on node3 .*or was killed.*delete {claimed}"):
        pack(str(source), tmp_path / "shards")
    claimed.unlink()
    assert pack(str(source), tmp_path / "shards")[0].describe() == "9 samples in 1 shard"
