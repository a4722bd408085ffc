"""Throughput of `python -m jaxclip.search` under concurrent clients, compared with a server of faiss and PyTorch."""

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import jax
import numpy as np
from safetensors.numpy import save_file

import jaxclip
from jaxclip import cli, config
from jaxclip.benchmarks.timing import REPEATS, rounds
from jaxclip.benchmarks.workers import Worker
from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.models import lora
from jaxclip.models.clip import ImageConfig
from jaxclip.models.weights import hugging_face
from jaxclip.models.weights.table import save
from jaxclip.serving.searcher import Searcher
from jaxclip.towers.adapter_base import checkpoint_params
from jaxclip.towers.checkpoints import Checkpoints, resolve_step
from jaxclip.towers.towers import load_towers

FLAGS = {
    "workdir": ("", "folder of the run whose towers encode the queries"),
    "gallery": ("", "catalogue to search, raw or prepared; by default the complete catalogue of the workdir"),
    "k": (24, "products per search, up to 100"),
    "seconds": (10, "duration of each measurement, seconds"),
    "repeats": (3, REPEATS),
}
OURS, PEER = "jaxclip", "faiss + transformers"
PEER_PACKAGES = ("faiss", "torch", "transformers")
CLIENTS = (1, 8, 64)
SENTENCES, COMPARED, SEED = 2000, 200, 0
SCORE_TOLERANCE = 1e-4  # the servers sum float32 products in different orders


def measure(*, workdir: str, gallery: str, k: int, seconds: int, repeats: int) -> list[dict[str, Any]]:
    """Returns a row for each number of CLIENTS and each server: `jaxclip.search`, and PEER if it can run.

    PEER can run if its packages are installed and transformers' CLIP can represent the workdir's text tower.

    Each client keeps one connection open and sends its next request when the previous one is answered. The sentences
    are captions of the gallery. The two servers are measured in turns.

    A row holds "per_second", the median over the repeats of the requests per second; "p50" and "p99", percentiles of
    the latency in milliseconds over all repeats; "ratio", requests per second divided by the peer's (None without a
    peer); and "exact", the share of up to 200 sentences whose results have the same scores, within 1e-4, as those of a
    brute-force search.

    Raises:
      UserError: `workdir` is empty or not a workdir, the gallery has no captions, or the server does not start.
    """
    if not workdir:
        raise UserError("--workdir is missing: give the folder of a run")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the server process shares the GPU's memory
    run_config = config.load_config(Path(workdir))
    searcher = jaxclip.load(workdir, gallery or None, say=cli.say)
    sentences = _sentences(searcher)
    latencies: dict[tuple[int, str], list[list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="jaxclip_search_") as name, ExitStack() as stack:
        servers = {OURS: stack.enter_context(_serving(workdir, gallery))}
        installed = all(map(importlib.util.find_spec, PEER_PACKAGES))
        if installed and _write_text_tower(run_config, Path(workdir), Path(name)):
            _write_gallery(searcher, Path(name))
            worker = Worker(PEER, "jaxclip.benchmarks.search_peer:serve", workdir, name)
            servers[PEER] = stack.enter_context(worker).run("address")[1]
        exact = {name: _exact(searcher, address, sentences[:COMPARED], k) for name, address in servers.items()}
        for _ in rounds(repeats):
            for clients in CLIENTS:
                for name, address in servers.items():
                    latencies.setdefault((clients, name), []).append(load(address, sentences, k, clients, seconds))
    speed = {key: float(np.median([len(run) / seconds for run in runs])) for key, runs in latencies.items()}
    return [
        {
            "clients": clients,
            "implementation": name,
            "products": len(searcher.gallery),
            "k": k,
            "per_second": speed[clients, name],
            "p50": float(np.percentile(np.concatenate(runs), 50)),
            "p99": float(np.percentile(np.concatenate(runs), 99)),
            "ratio": speed[clients, name] / speed[clients, PEER] if PEER in servers else None,
            "exact": exact[name],
        }
        for (clients, name), runs in latencies.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows of `measure` as a table for the terminal."""
    lines = [
        f"{rows[0]['products']:,} products, the nearest {rows[0]['k']}",
        f"{'clients':>7}  {'':22}{'requests/s':>10}{'p50 ms':>9}{'p99 ms':>9}{'ratio':>7}{'exact':>7}",
    ]
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(
            f"{row['clients']:7}  {row['implementation']:22}{row['per_second']:10.0f}{row['p50']:9.1f}{row['p99']:9.1f}"
            f"{ratio:>7}{row['exact']:7.0%}"
        )
    return "\n".join(lines)


def load(address: str, sentences: Sequence[str], k: int, clients: int, seconds: float) -> list[float]:
    """Returns the latencies, in milliseconds, of the requests that `clients` concurrent clients complete in `seconds`.

    The first request of each client is not counted.
    """

    async def client(first: int) -> list[float]:
        milliseconds: list[float] = []
        async with _connection(address) as ask:
            await ask(sentences[first % len(sentences)], k)
            previous = start = time.perf_counter()
            for number in count(first + clients, clients):
                await ask(sentences[number % len(sentences)], k)
                now = time.perf_counter()
                if now - start > seconds:
                    break
                milliseconds.append(1000 * (now - previous))
                previous = now
        return milliseconds

    async def run_clients() -> list[float]:
        return sum(await asyncio.gather(*map(client, range(clients))), [])

    return asyncio.run(run_clients())


@asynccontextmanager
async def _connection(address: str) -> AsyncIterator[Callable[[str, int], Awaitable[bytes]]]:
    """Yields a function that sends one search over a persistent connection and returns the body of the response."""
    url = urlsplit(address)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)

    async def ask(sentence: str, k: int) -> bytes:
        path = f"/v1/search?{urlencode({'q': sentence, 'k': k})}"
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {url.netloc}\r\n\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        body = await reader.readexactly(int(head.partition(b"content-length:")[2].split()[0]))
        if b" 200 " not in head[:16]:
            raise UserError(f"{address} refused a search: {body[:300].decode(errors='replace')}")
        return body

    try:
        yield ask
    finally:
        writer.close()


@contextmanager
def _serving(workdir: str, gallery: str) -> Iterator[str]:
    """Yields the address of a search server in a separate process, which ends with the context."""
    command = [sys.executable, "-m", "jaxclip.search", f"--workdir={workdir}", "--port=0"]
    command += [f"--gallery={gallery}"] if gallery else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        announcement = next((line for line in process.stdout if " at http://" in line), "")
        if not announcement:
            raise UserError(
                f"the search server of {workdir} exited with status {process.wait()} before it answered; "
                "the server's own message is printed above"
            )
        yield announcement.rpartition(" at ")[2].strip()
    finally:
        process.terminate()
        process.communicate()


def _sentences(searcher: Searcher) -> list[str]:
    """Returns at most 2,000 random different captions of the gallery."""
    captions = sorted({caption for caption in searcher.gallery.captions if caption.strip()})
    if not captions:
        raise UserError(f"no product of {searcher.gallery.name} has a caption to search for: give another --workdir")
    return [captions[number] for number in np.random.default_rng(SEED).permutation(len(captions))[:SENTENCES]]


def _exact(searcher: Searcher, address: str, sentences: Sequence[str], k: int) -> float:
    """Returns the share of sentences whose k results have the k highest scores of the gallery, in descending order."""

    async def search_all() -> list[list[str]]:
        async with _connection(address) as ask:
            answers = [json.loads(await ask(sentence, k)) for sentence in sentences]
        return [[row["id"] for row in answer["results"]] for answer in answers]

    vectors, correct = searcher.vectors, 0
    for ids, query in zip(asyncio.run(search_all()), searcher.encode_text(list(sentences)), strict=True):
        scores = vectors @ query
        highest = np.sort(scores)[::-1][:k]
        returned = scores[[searcher.gallery.number(id) for id in ids]]
        correct += len(set(ids)) == len(highest) and np.abs(returned - highest).max() < SCORE_TOLERANCE
    return correct / len(sentences)


def _write_gallery(searcher: Searcher, folder: Path) -> None:
    """Writes the gallery's vectors, ids and captions for the peer."""
    np.save(folder / "vectors.npy", searcher.vectors)
    (folder / "gallery.json").write_text(
        json.dumps({"ids": searcher.gallery.ids, "captions": searcher.gallery.captions})
    )


def _write_text_tower(config: Config, workdir: Path, folder: Path) -> bool:
    """Writes the newest text tower of a workdir for transformers' CLIPTextModelWithProjection.

    Returns whether it did; it writes nothing if that class cannot represent the tower.
    """
    checkpoints, towers = Checkpoints(workdir, read_only=True), load_towers(config, workdir)
    with jax.set_mesh(towers.mesh):
        params = checkpoint_params(config, towers, checkpoints, resolve_step("latest", checkpoints))
        if towers.config.lora:
            params = lora.merge(params, towers.config.lora.scale)
    image, text = towers.config.image, towers.config.text
    # Only the text tower is exported, so any image tower of the format will do. The peer applies the pooling itself.
    plain_image = ImageConfig(image.size, image.patch, image.transformer)
    exported = replace(towers.config, image=plain_image, text=replace(text, pooling="end"), lora=None)
    if text.pooling not in ("end", "mean") or not hugging_face.is_clip(exported):
        return False
    rows = [row for row in hugging_face.table(exported) if row.ours.startswith("text/")]
    save_file(save(rows, {"text": params["text"]}), folder / hugging_face.WEIGHTS, {"format": "pt"})
    settings = hugging_face.write_config(exported)["text_config"] | {"model_type": "clip_text_model"}
    (folder / hugging_face.CONFIG).write_text(json.dumps(settings))
    (folder / "pooling").write_text(text.pooling)
    return True
