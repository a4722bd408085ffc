"""The search command as a real process: it says when it is ready, and answers pending requests before it stops."""

import json
import os
import shutil
import signal
import socket
import threading
import time
import urllib.error
import urllib.request

import psutil
import pytest


@pytest.fixture
def workdir(trained, tmp_path):
    """A copy of `trained`, into which a search may write."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def wait_for_address(process):
    """Waits until the server has started and returns its address."""
    for line in process.stdout:
        if " at http://" in line:
            return line.rpartition(" at ")[2].strip()
    raise AssertionError(process.stderr.read())


def get(url):
    with urllib.request.urlopen(url, timeout=60) as response:
        return json.load(response)


def test_mistakes_are_reported_before_anything_is_loaded(run, workdir, tmp_path):
    for arguments, words in (
        ([], "--workdir is missing"),
        ([f"--workdir={tmp_path}"], "is not a workdir"),
        ([f"--workdir={workdir}", "--config.data.splt=all"], "did you mean data.split"),
        ([f"--workdir={workdir}", f"--rerank={tmp_path}"], "is not a workdir"),
    ):
        done = run("search", *arguments)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("search", f"--workdir={workdir}", f"--port={taken.getsockname()[1]}")
    assert done.returncode == 2 and "is taken; give another --port" in done.stderr


@pytest.mark.slow
def test_a_missing_gallery_is_reported(run, workdir, tmp_path):
    done = run("search", f"--workdir={workdir}", f"--gallery={tmp_path / 'nowhere'}", "--port=0")
    assert done.returncode == 2 and f"no catalogue at {tmp_path / 'nowhere'}" in done.stderr


@pytest.mark.slow
def test_sigterm_under_load_answers_pending_requests(start, workdir):
    process = start("search", f"--workdir={workdir}", "--port=0")
    server_address = wait_for_address(process)
    assert len(get(f"{server_address}v1/search?q=shoes")["results"]) == 10
    results, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            started = time.monotonic()
            try:
                answer = get(f"{server_address}v1/search?q=blue+shoes+{len(results)}")
                results.append((started, len(answer["results"])))
            except (OSError, urllib.error.URLError) as error:
                results.append((started, error))
                return

    clients = [threading.Thread(target=ask) for _ in range(16)]
    for client in clients:
        client.start()
    while len(results) < 100:
        time.sleep(0.01)
    signalled = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    out, error = process.communicate(timeout=120)
    stop.set()
    for client in clients:
        client.join()
    assert process.returncode == 0 and "stopped" in out, error
    # Requests in flight at the signal must be answered. A request of the last 50 ms may not be connected yet.
    early = [result for started, result in results if started < signalled - 0.05]
    assert len(early) >= 50 and set(early) == {10}


@pytest.mark.slow
def test_a_server_continues_a_killed_embedding_checks_its_token_and_listens_on_the_loopback_address(
    start, run, workdir, shop
):
    arguments = [f"--workdir={workdir}", f"--gallery={shop}", "--port=0", "--config.evaluation.batch_size=1"]
    process = start("search", *arguments)
    stored = "embeddings/*.rows"
    while process.poll() is None and not any(file.stat().st_size > 20_000 for file in workdir.glob(stored)):
        time.sleep(0.005)
    process.kill()
    process.communicate(timeout=120)
    (file,) = workdir.glob(stored)
    before = file.read_bytes()
    process = start("search", *arguments, "--token=s3cret")
    server_address = wait_for_address(process)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        get(f"{server_address}v1/products?k=100")
    answer = get(
        urllib.request.Request(f"{server_address}v1/products?k=100", headers={"Authorization": "Bearer s3cret"})
    )
    listening = [c.laddr.ip for c in psutil.Process(process.pid).net_connections("inet") if c.status == "LISTEN"]
    assert listening == ["127.0.0.1"], "the server is reachable from other machines without --host"
    process.terminate()
    process.communicate(timeout=120)
    complete = file.read_bytes()
    row_bytes = len(complete) // len(answer["results"])
    assert 0 < len(before) < len(complete) and complete.startswith(before[: len(before) // row_bytes * row_bytes])
