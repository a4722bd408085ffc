"""The search command as a user runs it: told when ready, drained when told to stop."""

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
def searched(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def address(process):
    """Returns where a starting server will answer."""
    for line in process.stdout:
        if " at http://" in line:
            return line.rpartition(" at ")[2].strip()
    raise AssertionError(process.stderr.read())


def get(url):
    with urllib.request.urlopen(url, timeout=60) as answer:
        return json.load(answer)


def test_mistakes_are_told_before_anything_is_loaded(run, searched, tmp_path):
    for arguments, words in (
        ([], "--workdir is missing"),
        ([f"--workdir={tmp_path}"], "is not a workdir"),
        ([f"--workdir={searched}", "--config.data.splt=all"], "did you mean data.split"),
        ([f"--workdir={searched}", f"--rerank={tmp_path}"], "is not a workdir"),
    ):
        done = run("search", *arguments)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("search", f"--workdir={searched}", f"--port={taken.getsockname()[1]}")
    assert done.returncode == 2 and "is taken; give another --port" in done.stderr


@pytest.mark.slow
def test_a_gallery_that_is_nowhere_is_told(run, searched, tmp_path):
    done = run("search", f"--workdir={searched}", f"--gallery={tmp_path / 'nowhere'}", "--port=0")
    assert done.returncode == 2 and f"no catalogue at {tmp_path / 'nowhere'}" in done.stderr


@pytest.mark.slow
def test_sigterm_during_load_answers_what_was_asked(start, searched):
    process = start("search", f"--workdir={searched}", "--port=0")
    here = address(process)
    assert len(get(f"{here}v1/search?q=shoes")["results"]) == 10
    asked, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            started = time.monotonic()
            try:
                asked.append((started, len(get(f"{here}v1/search?q=blue+shoes+{len(asked)}")["results"])))
            except (OSError, urllib.error.URLError) as error:
                asked.append((started, error))
                return

    clients = [threading.Thread(target=ask) for _ in range(16)]
    for client in clients:
        client.start()
    while len(asked) < 100:
        time.sleep(0.01)
    told = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    out, error = process.communicate(timeout=120)
    stop.set()
    for client in clients:
        client.join()
    assert process.returncode == 0 and "stopped" in out, error
    # What was in flight when the signal came; a connection may still have been on its way in the last milliseconds.
    early = [result for started, result in asked if started < told - 0.05]
    assert len(early) >= 50 and set(early) == {10}


@pytest.mark.slow
def test_a_killed_embedding_goes_on_where_it_was_behind_a_token_on_this_machine_alone(start, run, searched, shop):
    arguments = [f"--workdir={searched}", f"--gallery={shop}", "--port=0", "--config.evaluation.batch_size=1"]
    process = start("search", *arguments)
    kept = "embeddings/*.rows"
    while process.poll() is None and not any(file.stat().st_size > 20_000 for file in searched.glob(kept)):
        time.sleep(0.005)
    process.kill()
    process.communicate(timeout=120)
    (file,) = searched.glob(kept)
    begun = file.read_bytes()
    process = start("search", *arguments, "--token=s3cret")
    here = address(process)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        get(f"{here}v1/products?k=100")
    found = get(urllib.request.Request(f"{here}v1/products?k=100", headers={"Authorization": "Bearer s3cret"}))
    listening = [c.laddr.ip for c in psutil.Process(process.pid).net_connections("inet") if c.status == "LISTEN"]
    assert listening == ["127.0.0.1"], "it can be reached from elsewhere though nobody said so"
    process.terminate()
    process.communicate(timeout=120)
    whole = file.read_bytes()
    row = len(whole) // len(found["results"])
    assert 0 < len(begun) < len(whole) and whole.startswith(begun[: len(begun) // row * row])
