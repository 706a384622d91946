"""Shards behind a real HTTP server and a real S3 server that fail, stall and cut connections."""

import os
import re
import resource
import shutil
import stat
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from types import ModuleType

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry as fsspec_classes

from depthmup.data import storage
from depthmup.data.ahead import THREADS
from depthmup.data.environment import Environment
from depthmup.data.errors import UserError
from depthmup.data.files import write_atomically
from depthmup.data.find import strip_host
from depthmup.data.index import Index, load_members
from depthmup.data.loader import TrainingLoader, TrainingStream
from depthmup.data.order import State
from depthmup.data.scan import index_shards
from image_sets import config, make_shards


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.environment, "cache", tmp_path / "cache")
    monkeypatch.setattr(storage, "BLOCK", 4096)
    monkeypatch.setattr(storage.environment, "timeout", 1.0)
    monkeypatch.setattr(storage, "cache_use", storage.CacheUse())
    return make_shards(tmp_path, samples=60)


class Server(ThreadingHTTPServer):
    """Serves a folder with ranges. `faults` are taken one a request: an HTTP status, one with the seconds to wait,
    'stall', 'cut' or 'whole' (the range is ignored)."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.requests, self.sent = folder, [], [], 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, path, headers):
        """Status, headers and content."""
        file = self.folder / path.lstrip("/")
        if not file.is_file():
            return 404, {}, b""
        content = file.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("Range", ""))
        if not wanted:
            return 200, {"Accept-Ranges": "bytes", "Content-Length": str(len(content))}, content
        first, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
        ranged = {"Content-Range": f"bytes {first}-{last}/{len(content)}", "Content-Length": str(last + 1 - first)}
        return 206, {"Accept-Ranges": "bytes", **ranged}, content[first : last + 1]


class Proxy(Server):
    """Stands before another server at `target` (host:port), with the faults of Server."""

    def __init__(self, target: str) -> None:
        super().__init__(Path())
        self.target = target

    def answer(self, path, headers):
        connection = HTTPConnection(self.target)
        connection.request("GET", path, headers=dict(headers))
        answer = connection.getresponse()
        kept = {name: value for name, value in answer.getheaders() if name not in ("Server", "Date", "Connection")}
        return answer.status, kept, answer.read()


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server = self.server
        server.requests.append(self.path)
        fault = server.faults.pop(0) if server.faults else None
        if isinstance(fault, int):
            return self.send_error(fault)
        if isinstance(fault, tuple):
            self.send_response(fault[0])
            self.send_header("Retry-After", fault[1])
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if fault == "stall":
            time.sleep(2.5)
        status, headers, content = server.answer(self.path, {} if fault == "whole" else self.headers)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            server.sent += len(content)
            self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(shards):
    server = Server(Path(shards.root))
    yield server
    server.shutdown()
    server.server_close()


def epoch(index, num_workers=0):
    options = config(index, minival=0, num_streams=4, window=8, num_workers=num_workers)
    return list(islice(TrainingLoader(TrainingStream(options, index, State(0), 8, 8, 3)), 7))


def test_an_http_server_that_fails_stalls_and_cuts_gives_the_local_batches(shards, server):
    expected = epoch(shards)
    server.faults = [503, "cut", None, "stall", 500, "cut"]
    got = epoch(Index.load(server.url))
    assert all(torch.equal(a.images, b.images) for a, b in zip(expected, got, strict=True))
    asked = len(server.requests)
    shutil.rmtree(storage.environment.cache)
    load_members.cache_clear()
    epoch(Index.load(server.url))
    assert asked - (len(server.requests) - asked) >= 5  # each fault was asked for again, the stalled one too
    asked = len(server.requests)
    for num_workers in (0, 2):  # workers read ahead into the next epoch
        again = epoch(Index.load(server.url), num_workers)
        assert all(torch.equal(a.images, b.images) for a, b in zip(expected, again, strict=True))
        if num_workers == 0:
            requests = server.requests[asked:]
    assert [path for path in requests if path.endswith(".tar")] == []  # all from the cache


def test_one_reader_has_several_requests_in_flight_and_fetches_nothing_twice(shards, monkeypatch):
    expected = epoch(shards)
    in_flight, most = [], []

    class Slow(Server):
        def answer(self, path, headers):
            if path.endswith(".tar"):
                in_flight.append(path)
                most.append(len(in_flight))
                time.sleep(0.05)
                in_flight.remove(path)
            return super().answer(path, headers)

    slow = Slow(Path(shards.root))
    answered = []
    request = storage.send_request

    def note(*what, **of):
        content = request(*what, **of)  # one that failed is asked for again
        answered.append((*what, *of.values()))
        return content

    monkeypatch.setattr(storage, "send_request", note)
    got = epoch(Index.load(slow.url))
    slow.shutdown()
    slow.server_close()
    assert all(torch.equal(a.images, b.images) for a, b in zip(expected, got, strict=True))
    assert 4 <= max(most) <= THREADS
    assert [what for what in answered if answered.count(what) > 1] == []


def test_a_block_that_cannot_be_read_ahead_ends_the_run_with_the_reason_and_may_be_asked_for_again(shards, server):
    index = Index.load(server.url)
    shard = index.shards[0]
    where = index.location(shard), shard.sha256, shard.size, 0, 10
    server.faults = [500] * storage.TRIES
    storage.prefetch(*where)
    with pytest.raises(UserError, match="5 tries failed"):
        storage.read_range(*where)
    assert storage.read_range(*where) == (Path(shards.root) / shard.name).read_bytes()[:10]


def test_a_process_that_is_forked_reads_ahead_with_threads_of_its_own(shards, server):
    index = Index.load(server.url)
    shard = index.shards[0]
    storage.prefetch(index.location(shard), shard.sha256, shard.size, 0, 10)
    shutil.rmtree(storage.environment.cache, ignore_errors=True)
    assert all(torch.equal(a.images, b.images) for a, b in zip(epoch(shards), epoch(index, 2), strict=True))


def test_a_sample_in_the_cache_costs_its_own_bytes_and_no_whole_block(shards, server, monkeypatch):
    monkeypatch.setattr(storage, "BLOCK", 4 << 20)
    index = Index.load(server.url)
    shard = index.shards[0]

    def read():
        return storage.read_range(index.location(shard), shard.sha256, shard.size, 1000, 500)

    def bytes_read():
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    expected = read()
    before = bytes_read()
    assert read() == expected
    assert 500 <= bytes_read() - before < 1000  # with what /proc itself takes
    assert shard.size > 5000


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_cache_stays_under_its_cap_and_touches_no_other_files(shards, server, monkeypatch, num_workers):
    monkeypatch.setattr(storage.environment, "cache_bytes", 20_000)
    storage.environment.cache.mkdir()
    others = [storage.environment.cache / name for name in ("notes.txt", ".config", "f" * 39)]
    being_written, left_by_a_killed_process = (storage.environment.cache / f".{'f' * 40}.{part}.tmp" for part in "01")
    for path in (*others, being_written, left_by_a_killed_process):
        path.write_bytes(b"x")
    for path in (*others, left_by_a_killed_process):
        os.utime(path, (0, 0))
    got = epoch(Index.load(server.url), num_workers)
    assert all(torch.equal(a.images, b.images) for a, b in zip(epoch(shards), got, strict=True))
    kept = set(storage.environment.cache.iterdir())
    assert {*others, being_written} < kept
    assert left_by_a_killed_process not in kept
    if num_workers == 0:  # workers may have been stopped before they removed anything
        assert 0 < sum(path.stat().st_size for path in kept - {*others, being_written}) <= 20_000


def test_the_cache_is_listed_once_for_a_thousandth_of_its_cap_and_emptied_to_nine_tenths(shards, server, monkeypatch):
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(storage.os, "scandir", lambda folder: listed.append(folder) or scandir(folder))
    index = Index.load(server.url)
    shard = index.shards[0]

    def fetch_block(number):
        storage.read_range(index.location(shard), str(number), shard.size, 0, 1)

    monkeypatch.setattr(storage.environment, "cache_bytes", 3 * 4096 * 1000)
    for number in range(7):
        fetch_block(number)
    assert len(listed) == 3  # at the first block, since processes may be short, then at each third
    os.utime(next(storage.environment.cache.iterdir()), (0, 0))
    monkeypatch.setattr(storage.environment, "cache_bytes", 7 * 4096)
    fetch_block(7)
    assert len(list(storage.environment.cache.iterdir())) == 6


def test_a_cached_block_that_is_gone_or_of_another_size_is_fetched_again(shards, server):
    expected = epoch(shards)
    index = Index.load(server.url)
    epoch(index)
    blocks = sorted(storage.environment.cache.iterdir())
    contents = [block.read_bytes() for block in blocks]
    blocks[0].unlink()
    blocks[1].write_bytes(contents[1][:-1])
    blocks[2].write_bytes(b"")
    blocks[3].write_bytes(contents[3] + b"x")
    asked = len(server.requests)
    assert all(torch.equal(a.images, b.images) for a, b in zip(expected, epoch(index), strict=True))
    assert len(server.requests) - asked == 4
    assert [block.read_bytes() for block in blocks] == contents


def give_to_another_user(path: Path, monkeypatch) -> None:
    user = os.getuid()
    if user == 0:
        os.chown(path, 1234, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: user + 1)


def test_a_cache_folder_of_another_user_is_not_used_and_said(shards, server, monkeypatch):
    expected = epoch(shards)
    epoch(Index.load(server.url))
    for block in storage.environment.cache.iterdir():
        block.write_bytes(bytes(block.stat().st_size))  # what another user would have us train on
    give_to_another_user(storage.environment.cache, monkeypatch)
    storage.cache_is_safe.cache_clear()
    with pytest.warns(UserWarning, match=r"cache: belongs to user \d+, .*not cached.* DEPTHMUP_CACHE") as warned:
        got = epoch(Index.load(server.url))
    assert len(warned) == 1
    assert all(torch.equal(a.images, b.images) for a, b in zip(expected, got, strict=True))


def test_a_cache_folder_that_everybody_can_change_is_not_used_but_one_with_the_sticky_bit_is(shards, monkeypatch):
    storage.environment.cache.mkdir()
    for mode, safe in ((0o777, False), (0o1777, True), (0o775, True), (0o700, True)):
        storage.environment.cache.chmod(mode)
        storage.cache_is_safe.cache_clear()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            assert storage.cache_is_safe(storage.environment.cache) == safe
        assert len(warned) == (not safe)


def test_a_block_of_another_user_in_a_folder_of_ours_is_not_served(shards, server, monkeypatch):
    expected = epoch(shards)
    epoch(Index.load(server.url))
    blocks = sorted(storage.environment.cache.iterdir())
    blocks[0].write_bytes(bytes(blocks[0].stat().st_size))
    give_to_another_user(blocks[0], monkeypatch)
    got = epoch(Index.load(server.url))
    assert all(torch.equal(a.images, b.images) for a, b in zip(expected, got, strict=True))


def test_a_new_cache_folder_is_for_its_user_alone(shards, server):
    epoch(Index.load(server.url))
    assert stat.S_IMODE(storage.environment.cache.stat().st_mode) == 0o700


@pytest.mark.parametrize("pause", [0, 60])
def test_a_disk_too_full_for_the_cache_costs_one_warning_and_the_cache_comes_back(shards, server, monkeypatch, pause):
    expected = epoch(shards)
    warned = []
    monkeypatch.setattr(storage, "PAUSE", pause)
    monkeypatch.setattr(storage.warnings, "warn", lambda text, stacklevel: warned.append(text))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # no file can grow beyond that
    try:
        got = epoch(Index.load(server.url))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(torch.equal(a.images, b.images) for a, b in zip(expected, got, strict=True))
    [warning] = warned
    assert "cannot cache remote data (File too large)" in warning
    whole_blocks = len(expected) * 8 * 4096
    # In the pause no more is fetched than is wanted, beside the 8 blocks on their way when it began.
    assert (server.sent < whole_blocks / 2) == (pause > 0)
    assert list(storage.environment.cache.iterdir()) == []  # nothing half written either
    storage.cache_use.paused_until = 1.0
    assert all(torch.equal(a.images, b.images) for a, b in zip(expected, epoch(Index.load(server.url)), strict=True))
    assert len(list(storage.environment.cache.iterdir())) > 10


def test_threads_that_write_one_file_leave_one_of_their_contents_whole(tmp_path):
    contents = [bytes([number]) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda content: write_atomically(tmp_path / "file", content), contents * 5))
    assert (tmp_path / "file").read_bytes() in contents
    assert len(list(tmp_path.iterdir())) == 1


def test_a_server_that_stays_down_or_lacks_a_file_ends_with_one_clear_error(shards, server, monkeypatch):
    index = Index.load(server.url)
    server.faults = [503] * 100
    with pytest.raises(UserError, match=r"127\.0\.0\.1.*5 tries failed.*503"):
        epoch(index)
    server.faults = ["whole"] * 100
    with pytest.raises(UserError, match="does the server know ranges"):
        storage.read_range(index.location(index.shards[0]), "", index.shards[0].size, 0, 10)
    server.faults = []
    with pytest.raises(UserError, match="no such file"):
        Index.load(server.url + "/nothing")


@pytest.mark.parametrize("status", [401, 403])
def test_what_a_server_refuses_is_asked_for_once(shards, server, status):
    server.faults = [status] * 9
    with pytest.raises(UserError, match=rf"no permission \(the server answered {status}\)"):
        storage.fetch(f"{server.url}/{shards.shards[0].name}", 0, 10)
    assert len(server.requests) == 1
    server.faults = [status] * 9
    with pytest.raises(UserError, match=rf"no permission \(the server answered {status}\)"):
        storage.ask_size(f"{server.url}/{shards.shards[0].name}")


def test_a_server_that_asks_for_patience_gets_it(shards, server, monkeypatch):
    waits = []
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    server.faults = [(429, "7"), (503, "9999"), (503, "Fri, 31 Dec 1999 23:59:59 GMT"), 503]
    assert len(storage.fetch(f"{server.url}/{shards.shards[0].name}", 0, 10)) == 10
    assert waits[:2] == [7, storage.LONGEST_WAIT]
    assert max(waits[2:]) < 7


def test_a_proxy_of_the_environment_is_used(shards, monkeypatch):
    class ForwardingServer(Server):
        def answer(self, path, headers):
            return super().answer(path.removeprefix("http://data.invalid"), headers)

    server = ForwardingServer(Path(shards.root))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", server.url)
    assert Index.load("http://data.invalid").shards == shards.shards
    server.shutdown()
    server.server_close()


def test_the_query_of_an_address_says_no_split():
    assert strip_host("https://host/set/train-0.tar?type=a/test&sign=val") == "set/train-0.tar"


@pytest.mark.parametrize("value", ["x", "nan", "-1", "0"])
def test_a_number_in_the_environment_that_is_none_is_named_when_it_is_needed(monkeypatch, value):
    for variable, name in (("DEPTHMUP_TIMEOUT", "timeout"), ("DEPTHMUP_CACHE_GB", "cache_bytes")):
        monkeypatch.setenv(variable, value)
        with pytest.raises(
            UserError, match=rf"^{variable}={value}: expected a number above 0, as in {variable}=[56]0$"
        ):
            getattr(Environment(), name)
        monkeypatch.setenv(variable, "")  # as not set
        assert getattr(Environment(), name) in (60, 50e9)


def pattern(server, shards):
    return f"{server.url}/{{{','.join(shard.name for shard in shards.shards)}}}"


def test_shards_of_a_server_that_fails_stalls_and_cuts_are_indexed_by_pattern(shards, server, tmp_path):
    """Each shard once: of a connection that broke, only the range is asked for again."""
    server.faults = [503, 503, None, "cut", None, "stall", None, 500, "cut"]
    made = index_shards(pattern(server, shards), tmp_path / "index", processes=1)
    assert not server.faults
    assert [(s.samples, s.size, s.sha256) for s in made.shards] == [
        (s.samples, s.size, s.sha256) for s in shards.shards
    ]
    assert server.sent < 1.5 * sum(shard.size for shard in shards.shards)
    assert torch.equal(epoch(Index.load(made.root))[3].labels, epoch(made)[3].labels)


@pytest.mark.parametrize("served", [0, 1, 3])
def test_indexing_a_server_that_goes_down_or_stalls_for_good_ends_in_one_line(shards, server, tmp_path, served):
    server.faults = [None] * served + ["stall" if served == 3 else 503] * 100
    with pytest.raises(UserError, match=r"^http://127\.0\.0\.1\S+train-000000\.tar: 5 tries failed[^\n]+$"):
        index_shards(pattern(server, shards), tmp_path / "index", processes=1)
    assert not (tmp_path / "index" / "index.json").exists()


def test_indexing_a_remote_tar_that_is_missing_or_broken_asks_for_it_once(shards, server, tmp_path):
    with pytest.raises(UserError, match=r"^\S+nothing\.tar: no such file$"):
        index_shards(f"{server.url}/nothing.tar", tmp_path / "index", processes=1)
    path = Path(shards.root) / shards.shards[0].name
    path.write_bytes(path.read_bytes()[:9000])
    server.requests.clear()
    with pytest.raises(UserError, match=r"train-000000\.tar: not a whole tar of samples"):
        index_shards(pattern(server, shards), tmp_path / "index", processes=1)
    assert len(server.requests) <= 4  # its size, and three ranges of 4096 bytes


@pytest.fixture
def s3(shards, monkeypatch):
    """A faulty proxy before a real S3 server that holds the shards as s3://bucket/set."""
    import boto3
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    proxy = Proxy("{}:{}".format(*moto.get_host_and_port()))
    for key, value in (
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_MAX_ATTEMPTS", "1"),  # botocore tries again by itself; here our own tries are tested
    ):
        monkeypatch.setenv(key, value)
    client = boto3.client("s3", endpoint_url=f"http://{proxy.target}")
    client.create_bucket(Bucket="bucket")
    for path in Path(shards.root).iterdir():
        client.upload_file(str(path), "bucket", f"set/{path.name}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setattr(storage.environment, "timeout", 30.0)
    yield proxy
    proxy.shutdown()
    proxy.server_close()
    moto.stop()


def test_an_s3_server_that_fails_stalls_and_cuts_gives_the_local_batches(shards, s3, monkeypatch):
    index = Index.load("s3://bucket/set")  # the first request waits for imports: the time-out is short from here on
    monkeypatch.setattr(storage.environment, "timeout", 2.0)
    s3.faults = [503, "cut", None, "stall", 500, "cut"]
    got = epoch(index)
    assert not s3.faults
    assert all(torch.equal(a.images, b.images) for a, b in zip(epoch(shards), got, strict=True))
    with pytest.raises(UserError, match="no such file"):
        Index.load("s3://bucket/nothing")
    shutil.rmtree(storage.environment.cache)
    s3.faults = [503] * 100
    with pytest.raises(UserError, match=r"s3://bucket/set/.*5 tries failed"):
        epoch(index)


def test_s3_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.delitem(fsspec_classes, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"pip install 'depthmup\[remote\]'$"):
        Index.load("s3://bucket/set")


@pytest.mark.parametrize(
    ("url", "implementation", "install"),
    [
        ("gs://bucket/set", "gcsfs.GCSFileSystem", "gcsfs"),
        ("az://bucket/set", "adlfs.AzureBlobFileSystem", "adlfs"),
        ("abfs://bucket/set", "adlfs.AzureBlobFileSystem", "adlfs"),
        ("hf://datasets/owner/name", "huggingface_hub.HfFileSystem", "huggingface_hub"),
    ],
)
def test_a_url_reaches_its_stores_class_or_says_what_to_install(shards, url, implementation, install, monkeypatch):
    """The stores themselves are out of reach here: a file system in memory stands in for their classes."""
    (scheme, _, _), (module, _, name) = url.partition(":"), implementation.partition(".")
    monkeypatch.delitem(fsspec_classes, scheme, raising=False)  # forget what was imported before
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {install}$"):
        Index.load(url)
    stand_in = type(
        name, (MemoryFileSystem,), {"protocol": scheme, "cachable": False, "store": {}, "pseudo_dirs": [""]}
    )
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    monkeypatch.setattr(sys.modules[module], name, stand_in, raising=False)
    for path in Path(shards.root).iterdir():
        fsspec.filesystem(scheme).pipe_file(f"{url}/{path.name}", path.read_bytes())
    got = epoch(Index.load(url))
    assert all(torch.equal(a.images, b.images) for a, b in zip(epoch(shards), got, strict=True))
