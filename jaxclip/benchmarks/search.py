"""Searches of many clients at once: `python -m jaxclip.search` as a user starts it, beside faiss with PyTorch."""

import asyncio
import importlib.util
import json
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
    "workdir": ("", "folder of a run, whose towers are searched with"),
    "gallery": ("", "catalogue to search, raw or prepared; the whole of the workdir's own where none is given"),
    "k": (24, "products that a search returns, up to 100"),
    "seconds": (10, "of each measurement"),
    "repeats": (3, REPEATS),
}
OURS, PEER = "jaxclip", "faiss + transformers"
NEEDS = ("faiss", "torch", "transformers")
CLIENTS = (1, 8, 64)
SENTENCES, COMPARED, SEED = 2000, 200, 0
NEAR = 1e-4  # of scores: float32 sums in another order


def measure(
    searcher: Searcher, config: Config, *, workdir: str, gallery: str, k: int, seconds: int, repeats: int
) -> list[dict[str, Any]]:
    """Returns a row for each number of CLIENTS and each server: `jaxclip.search`, and PEER where it is installed.

    Clients ask one after the other over a connection that stays open, captions of the gallery in an order of their own,
    and the two servers are measured in turns. A row has the requests "per_second" (median of the repeats), the "p50"
    and "p99" of their milliseconds (over all of them), the "ratio" of requests per second to the peer's (None where
    there is none), and "exact": the share of 200 sentences that are answered as comparing with every product answers.

    Args:
      searcher: over the gallery, with the workdir's newest towers. config: of the workdir.

    Raises:
      UserError: the gallery has no captions, or the server does not start.
    """
    sentences = _sentences(searcher)
    found: dict[tuple[int, str], list[list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="jaxclip_search_") as name, ExitStack() as stack:
        servers = {OURS: stack.enter_context(_serving(workdir, gallery))}
        if all(map(importlib.util.find_spec, NEEDS)) and _write_text_tower(config, Path(workdir), Path(name)):
            _write_gallery(searcher, Path(name))
            worker = Worker(PEER, "jaxclip.benchmarks.search_peer:serve", workdir, name)
            servers[PEER] = stack.enter_context(worker).run("address")[1]
        exact = {name: _exact(searcher, address, sentences[:COMPARED], k) for name, address in servers.items()}
        for _ in rounds(repeats):
            for clients in CLIENTS:
                for name, address in servers.items():
                    found.setdefault((clients, name), []).append(load(address, sentences, k, clients, seconds))
    speed = {key: float(np.median([len(each) / seconds for each in runs])) for key, runs in found.items()}
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
        for (clients, name), runs in found.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the measurements as lines for the terminal."""
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
    """Returns the milliseconds of every request that so many clients had answered within the seconds."""

    async def client(first: int) -> list[float]:
        taken: list[float] = []
        async with _connection(address) as ask:
            await ask(sentences[first % len(sentences)], k)
            end = start = time.perf_counter()
            for number in count(first + clients, clients):
                await ask(sentences[number % len(sentences)], k)
                now = time.perf_counter()
                if now - start > seconds:
                    break
                taken.append(1000 * (now - end))
                end = now
        return taken

    async def everyone() -> list[float]:
        return sum(await asyncio.gather(*map(client, range(clients))), [])

    return asyncio.run(everyone())


@asynccontextmanager
async def _connection(address: str) -> AsyncIterator[Callable[[str, int], Awaitable[bytes]]]:
    """Yields what asks one question after the other and returns the bodies of the answers."""
    at = urlsplit(address)
    reader, writer = await asyncio.open_connection(at.hostname, at.port)

    async def ask(sentence: str, k: int) -> bytes:
        path = f"/v1/search?{urlencode({'q': sentence, 'k': k})}"
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {at.netloc}\r\n\r\n".encode())
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
    """Yields the address of a search server in a process of its own."""
    command = [sys.executable, "-m", "jaxclip.search", f"--workdir={workdir}", "--port=0"]
    command += [f"--gallery={gallery}"] if gallery else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        said = next((line for line in process.stdout if " at http://" in line), "")
        if not said:
            raise UserError(f"the server ended with status {process.wait()}")
        yield said.rpartition(" at ")[2].strip()
    finally:
        process.terminate()
        process.communicate()


def _sentences(searcher: Searcher) -> list[str]:
    captions = sorted({caption for caption in searcher.gallery.captions if caption.strip()})
    if not captions:
        raise UserError(f"no product of {searcher.gallery.name} has a caption: there is nothing to search for")
    return [captions[number] for number in np.random.default_rng(SEED).permutation(len(captions))[:SENTENCES]]


def _exact(searcher: Searcher, address: str, sentences: Sequence[str], k: int) -> float:
    """Returns the share of sentences whose answers are as near, place by place, as the nearest of all products."""

    async def ask() -> list[list[str]]:
        async with _connection(address) as ask:
            answers = [json.loads(await ask(sentence, k)) for sentence in sentences]
        return [[row["id"] for row in answer["results"]] for answer in answers]

    vectors, right = searcher.vectors, 0
    for ids, query in zip(asyncio.run(ask()), searcher.encode_text(list(sentences)), strict=True):
        scores = vectors @ query
        nearest = np.sort(scores)[::-1][:k]
        answered = scores[[searcher.gallery.number(id) for id in ids]]
        right += len(set(ids)) == len(nearest) and np.abs(answered - nearest).max() < NEAR
    return right / len(sentences)


def _write_gallery(searcher: Searcher, folder: Path) -> None:
    np.save(folder / "vectors.npy", searcher.vectors)
    (folder / "gallery.json").write_text(
        json.dumps({"ids": searcher.gallery.ids, "captions": searcher.gallery.captions})
    )


def _write_text_tower(config: Config, workdir: Path, folder: Path) -> bool:
    """Writes a workdir's newest text tower as transformers' CLIPTextModelWithProjection; False if that has no place."""
    checkpoints, towers = Checkpoints(workdir, read_only=True), load_towers(config, workdir)
    with jax.set_mesh(towers.mesh):
        params = checkpoint_params(config, towers, checkpoints, resolve_step("latest", checkpoints))
        if towers.config.lora:
            params = lora.merge(params, towers.config.lora.scale)
    image, text = towers.config.image, towers.config.text
    # Its pictures' tower has no part in this, and what it makes of the last layer's tokens is written beside it.
    plain = ImageConfig(image.size, image.patch, image.transformer)
    described = replace(towers.config, image=plain, text=replace(text, pooling="end"), lora=None)
    if text.pooling not in ("end", "mean") or not hugging_face.is_clip(described):
        return False
    rows = [row for row in hugging_face.table(described) if row.ours.startswith("text/")]
    save_file(save(rows, {"text": params["text"]}), folder / hugging_face.WEIGHTS, {"format": "pt"})
    settings = hugging_face.write_config(described)["text_config"] | {"model_type": "clip_text_model"}
    (folder / hugging_face.CONFIG).write_text(json.dumps(settings))
    (folder / "pooling").write_text(text.pooling)
    return True
