"""An overloaded server refuses requests, abandons slow ones, and stays up with bounded memory."""

import asyncio
import contextlib
import copy
import socket
import threading
import time

import jax
import pytest

httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.slow


def resident():
    """Returns the resident memory of this process, which includes its servers, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_excess_requests_get_a_retry_header_and_the_others_are_answered(searcher, serve):
    from jaxclip.web.app import Limits, make_app

    async def request_all(address):
        async with httpx.AsyncClient(base_url=address, timeout=60, limits=httpx.Limits(max_connections=64)) as client:
            return await asyncio.gather(*(client.get(f"/v1/search?q=shoes+{n}") for n in range(200)))

    with serve(make_app(searcher, limits=Limits(requests=4))) as address:
        answers = asyncio.run(request_all(address))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429} and statuses.count(200) >= 4
        assert all(answer.headers["retry-after"] == "1" for answer in answers if answer.status_code == 429)
        assert httpx.get(f"{address}/readyz").status_code == 200


def test_an_incomplete_upload_occupies_its_slot_until_it_times_out(searcher, serve):
    from jaxclip.web.app import Limits, make_app

    picture = {"content": searcher.gallery.pictures(0)[0], "headers": {"content-type": "image/jpeg"}}
    with serve(make_app(searcher, limits=Limits(seconds=2, uploads=1))) as address:
        host, _, port = address.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=20) as slow:
            head = f"POST /v1/search HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\nContent-Length: 99"
            slow.sendall(f"{head}\r\n\r\nab".encode())
            time.sleep(0.2)
            refused = httpx.post(f"{address}/v1/search", **picture)
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1", refused.text
            assert httpx.get(f"{address}/v1/search?q=a").status_code == 200
            assert b" 408 " in slow.recv(200)
        assert httpx.post(f"{address}/v1/search", **picture).status_code == 200


@pytest.mark.parametrize("before", ["", "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_a_connection_without_a_complete_request_is_closed(searcher, serve, before):
    from jaxclip.web.app import make_app
    from jaxclip.web.connections import Connection

    class Impatient(Connection):
        seconds = 0.5

    with (
        serve(make_app(searcher), http=Impatient, timeout_keep_alive=60) as address,
        httpx.Client(base_url=address) as steady,
    ):
        host, _, port = address.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=20) as slow:
            slow.sendall(f"{before}GET /healthz HTTP/1.1\r\nHos".encode())
            slow.settimeout(0.05)
            started, closed = time.monotonic(), False
            while not closed:
                assert time.monotonic() - started < 10 and steady.get("/healthz").status_code == 200
                with contextlib.suppress(TimeoutError):
                    closed = not slow.recv(4000)
        assert httpx.get(f"{address}/v1/search?q=a").status_code == 200


def test_a_slow_search_times_out_and_the_server_goes_on(searcher, serve):
    from jaxclip.web.app import Limits, make_app

    slow, released = copy.copy(searcher), threading.Event()
    slow.find = lambda queries: (released.wait(20), searcher.find(queries))[1]
    with serve(make_app(slow, limits=Limits(seconds=0.3))) as address:
        for path in ("/v1/search?q=a", "/readyz"):
            late = httpx.get(address + path)
            assert late.status_code == 503 and "too long" in late.json()["detail"] and late.headers["retry-after"]
        assert httpx.get(f"{address}/healthz").status_code == httpx.get(f"{address}/v1/products").status_code == 200
        released.set()
        assert httpx.get(f"{address}/readyz").status_code == 200


def test_no_request_triggers_compilation_once_the_server_is_up(reranking_server, reranking_searcher):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **more: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    jax.jit(lambda x: x + 1)(1)
    assert compiled, "this version of JAX gives the event another name"
    jpeg = {"content": reranking_searcher.gallery.pictures(0)[0], "headers": {"content-type": "image/jpeg"}}

    async def ask(count):
        limits = httpx.Limits(max_connections=count)
        async with httpx.AsyncClient(base_url=reranking_server, timeout=60, limits=limits) as client:
            paths = [f"/v1/search?q=shoe+{n}&k={1 + n}" + "&filter=gender:Men" * (n % 3 == 1) for n in range(count)]
            answers = [client.get(path) for path in paths] + [client.post(path, **jpeg) for path in paths[::9]]
            assert {answer.status_code for answer in await asyncio.gather(*answers)} == {200}

    compiled.clear()
    for count in (1, 5, 50):
        asyncio.run(ask(count))
    assert not compiled


def test_memory_stays_bounded_over_ten_thousand_rapid_requests(server):
    count, clients = 10_000, 32
    host, _, port = server.removeprefix("http://").partition(":")

    async def send(numbers):
        statuses = []
        reader, writer = await asyncio.open_connection(host, int(port))
        for n in numbers:
            paths = f"/v1/search?q=shoe+{n}&k={1 + n % 20}", "/v1/products?k=20", f"/v1/products/{n}", "/healthz"
            writer.write(f"GET {paths[n % 4]} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0]))
            statuses.append(int(head.split()[1]))
        writer.close()
        return statuses

    async def send_all(first, last):
        return sum(await asyncio.gather(*(send(range(first + n, last, clients)) for n in range(clients))), [])

    asyncio.run(send_all(0, 1000))
    before = resident()
    statuses = asyncio.run(send_all(1000, 1000 + count))
    assert len(statuses) == count and set(statuses) <= {200, 404}
    assert resident() - before < 100e6
    assert httpx.get(f"{server}/readyz").status_code == 200
