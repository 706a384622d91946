"""MB/s of one reader of shards behind a server that answers late, by how many requests it has in flight.

    OMP_NUM_THREADS=1 python -m benchmarks.remote_reader [--milliseconds 80] [--requests 1 8]

The server is a process of its own on this machine, and waits before each answer. The reader is the training loader
itself, without workers, over all samples in their training order; decoding takes next to no time, since each file is a
tiny JPEG with random bytes behind its end. Nothing is cached before.
"""

import argparse
import io
import multiprocessing
import re
import tempfile
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from depthmup.data import ahead, storage
from depthmup.data.config import DataConfig
from depthmup.data.index import Index
from depthmup.data.loader import TrainingLoader, TrainingStream
from depthmup.data.order import State
from depthmup.data.pack import pack

FILE_BYTES, BATCH = 110_000, 32  # a photograph of ImageNet


def make_shards(folder: Path, images: int) -> Path:
    content = io.BytesIO()
    Image.new("RGB", (16, 16)).save(content, "jpeg")
    random = np.random.default_rng(0)
    for number in range(images):
        path = folder / "images" / f"{number % 10}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.getvalue() + random.bytes(FILE_BYTES))
    pack(str(folder / "images"), folder / "shards")
    return folder / "shards"


def serve(folder: Path, delay: float, ports: "multiprocessing.Queue[int]") -> None:
    """Puts its port into `ports`, and answers for ever, each time after `delay` seconds."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open, as those of a store

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            time.sleep(delay)
            file = folder / self.path.lstrip("/")
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            first, last = map(int, wanted.groups()) if wanted else (0, file.stat().st_size - 1)
            with file.open("rb") as opened:
                opened.seek(first)
                content = opened.read(last + 1 - first)
            status = 206 if wanted else 200
            self.send_response(status)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    ports.put(server.server_port)
    server.serve_forever()


def read_all(url: str, images: int, cache: Path) -> float:
    """Reads one epoch; MB/s."""
    storage.environment.cache = cache
    ahead.open_ahead_of.cache_clear()
    index = Index.load(url)
    config = DataConfig(name="remote", root=url, num_streams=4, minival=0)
    loader = TrainingLoader(TrainingStream(config, index, State(0), BATCH, 16, 3))
    started = time.perf_counter()
    for _ in islice(loader, images // BATCH):
        pass
    return images * FILE_BYTES / (time.perf_counter() - started) / 1e6


def measure(folder: Path, images: int, delay: float, requests: Sequence[int]) -> dict[int, float]:
    ports: multiprocessing.Queue[int] = multiprocessing.Queue()
    server = multiprocessing.Process(target=serve, args=(make_shards(folder, images), delay, ports), daemon=True)
    server.start()
    url, found = f"http://127.0.0.1:{ports.get()}", {}
    for count in requests:
        ahead.THREADS = count
        found[count] = read_all(url, images, folder / f"cache-{count}")
    server.terminate()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--milliseconds", type=float, default=80)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--images", type=int, default=2048)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), arguments.images, arguments.milliseconds / 1000, arguments.requests)
    for count, speed in found.items():
        print(f"{count} in flight, {arguments.milliseconds:g} ms: {speed:.0f} MB/s")


if __name__ == "__main__":
    main()
