"""Index and sidecars are read as data of unknown origin: what cannot be true is refused with one clear line."""

import gc
import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from depthmup.data.errors import UserError
from depthmup.data.index import Index, load_members
from depthmup.data.loader import TrainingLoader, TrainingStream
from depthmup.data.order import State
from depthmup.data.scan import index_shards
from depthmup.data.tar_samples import scan
from image_sets import config, make_shards, write_tar


def png() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "png")
    return content.getvalue()


@pytest.fixture
def labelled(tmp_path) -> Index:
    return make_shards(tmp_path, samples=10)


def test_a_damaged_sidecar_is_refused_whatever_its_reader_raises(labelled):
    path = Path(labelled.root) / "train-000000.index.npz"
    content = path.read_bytes()
    end = content.index(b"PK\x01\x02")
    for damaged in (content[:100], b"", content[: end + 6] + b"\x40" + content[end + 7 :], content[:70] + content[71:]):
        path.write_bytes(damaged)
        load_members.cache_clear()
        with pytest.raises(UserError, match=r"train-000000\.index\.npz: not the index of train-000000\.tar"):
            load_members(labelled.root, labelled.shards[0])
    path.unlink()
    with pytest.raises(UserError, match=r"No such file.*Restore it, or delete index\.json and pack or index again"):
        load_members(labelled.root, labelled.shards[0])


def test_threads_that_read_sidecars_do_not_disturb_each_other(labelled):
    """Before Python 3.11.8 a thread that is interrupted in `ast.parse` fails after another one's."""

    class Garbage:
        def __init__(self):
            self.itself = self

        def __del__(self):  # runs in the middle of a parse, and lets another thread go on there
            sum(range(200))

    def read(_):
        Garbage()
        load_members.cache_clear()
        return len(load_members(labelled.root, labelled.shards[0]).labels)

    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(20)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(read, range(400))) == {labelled.shards[0].samples}
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda shard: shard.update(samples=-1), "splits.train.0.samples: Input should be greater"),
        (lambda shard: shard.update(samples=True), "splits.train.0.samples: Input should be a valid integer"),
        (lambda shard: shard.update(samples=48.0), "splits.train.0.samples: Input should be a valid integer"),
        (lambda shard: shard.update(size="51200"), "splits.train.0.size: Input should be a valid integer"),
        (lambda shard: shard.update(size=2**63), "splits.train.0.size: Input should be less"),
        (lambda shard: shard.update(sha256=7), "splits.train.0.sha256: Input should be a valid string"),
        (lambda shard: shard.update(name=7), "splits.train.0.name"),
        (lambda shard: shard.update(name=""), "splits.train.0.name"),
        (lambda shard: shard.update(name="a\0.tar"), "splits.train.0.name"),
        (lambda shard: shard.pop("size"), "splits.train.0.size: Field required"),
    ],
)
def test_an_index_with_impossible_numbers_or_names_is_refused_in_one_line(labelled, change, reason):
    path = Path(labelled.root) / "index.json"
    raw = json.loads(path.read_text())
    change(raw["splits"]["train"][0])
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError) as refused:
        Index.load(labelled.root)
    assert str(refused.value).startswith(f"{path}: not an index of shards ({reason}")
    assert str(refused.value).endswith("; delete index.json and pack or index again")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("{", "not an index"),
        ("[" * 100_000, "not an index"),
        ("[]", "not an index"),
        ('{"classes": "ab", "splits": {}}', "classes: "),
        ('{"classes": [], "splits": {}}', "classes: "),
        ('{"classes": ["a", 3], "splits": {}}', r"classes\.1: "),
        ('{"classes": ["a"], "splits": {"train": {"name": "a.tar"}}}', r"splits\.train: "),
        ('{"classes": ["a"], "splits": {"train": [SHARD, SHARD]}}', "lists a shard twice"),
    ],
)
def test_an_index_of_another_shape_or_with_a_shard_twice_is_refused(tmp_path, raw, reason):
    shard = '{"name": "a.tar", "samples": 1, "size": 1536, "sha256": ""}'
    (tmp_path / "index.json").write_text(raw.replace("SHARD", shard))
    with pytest.raises(UserError, match=rf"index\.json: .*{reason}.*; delete index\.json and pack or index again"):
        Index.load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("offsets", 0, "an offset at which no member"),
        ("offsets", -512, "an offset at which no member"),
        ("offsets", 1000, "an offset at which no member"),
        ("offsets", 2**62, "an offset at which no member"),
        ("sizes", -1, "a sample that ends outside"),
        ("sizes", 2**63 - 1, "a sample that ends outside"),
        ("labels", -2, "a negative label"),
    ],
)
def test_a_sidecar_with_numbers_that_do_not_fit_its_shard_is_refused(labelled, field, value, reason):
    members = load_members(labelled.root, labelled.shards[0])
    changed = getattr(members, field).copy()
    changed[5] = value
    replace(members, **{field: changed}).save(Path(labelled.root) / "train-000000.index.npz")
    load_members.cache_clear()
    with pytest.raises(UserError, match=rf"not the index of train-000000\.tar \({reason}.*; delete index\.json and"):
        load_members(labelled.root, labelled.shards[0])


def test_only_plain_decimal_numbers_are_labels(tmp_path):
    numbers = {b"7": 7, b" 7\n": 7, b"007": 7, b"999999999": 999_999_999}
    others = [
        b"",
        b"-1",
        b"+7",
        b"1_0",
        b"7.0",
        b"0x7",
        b"\xd9\xa7",
        b"\xef\xbc\x97",
        b"7 8",
        b"9" * 19,
        b"9" * 5000,
        b"\0",
    ]
    labels = [*numbers, *others]
    write_tar(tmp_path / "a.tar", [(f"{n:02d}.jpg", b"image", label) for n, label in enumerate(labels)])
    assert scan(str(tmp_path / "a.tar")).members.labels.tolist() == [*numbers.values(), *[-1] * len(others)]


@pytest.mark.parametrize(
    ("label", "reason"), [(None, "no image has a label"), (b"999999999", "the label 999999999, too")]
)
def test_labels_that_give_no_classes_are_refused(tmp_path, label, reason):
    write_tar(tmp_path / "train-000000.tar", [("0.jpg", b"image", label)])
    with pytest.raises(UserError, match=reason):
        index_shards(str(tmp_path), processes=1)
    assert not (tmp_path / "index.json").exists()


def test_shards_outside_of_the_folder_of_their_index_are_refused_and_each_way_out_that_is_named_trains(tmp_path):
    shards = tmp_path / "shards"
    write_tar(shards / "train-0.tar", [(f"{n}.png", png(), b"0") for n in range(8)])
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(UserError, match=r"train-0\.tar: not in \S+elsewhere.*ln -s.*depthmup index \S+elsewhere$"):
        index_shards(str(shards), elsewhere, processes=1)
    assert not elsewhere.exists()
    elsewhere.mkdir()
    (elsewhere / "train-0.tar").symlink_to(shards / "train-0.tar")
    (tmp_path / "link").symlink_to(shards)
    for source, out, files in (
        (elsewhere, None, elsewhere),  # links to the shards, which may lie in a folder that cannot be written
        (shards, tmp_path, shards),
        (tmp_path / "link", None, shards),
        (tmp_path / "link", shards, shards),
        (shards, tmp_path / "link", shards),
    ):
        made = index_shards(str(source), out, processes=1)
        loaded = Index.load(out or source)
        assert loaded == made
        batch = next(iter(TrainingLoader(TrainingStream(config(loaded, num_streams=4), loaded, State(0), 4, 8, 3))))
        assert len(batch.labels) == 4
        assert (files / "train-0.index.npz").exists()
        (Path(made.root) / "index.json").unlink()
        (files / "train-0.index.npz").unlink()
        load_members.cache_clear()
