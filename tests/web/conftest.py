"""Real servers for real searchers."""

import contextlib
import shutil
import socket
import threading
import time

import pytest


@contextlib.contextmanager
def serving(app, **settings):
    """Serves an application in a thread; yields its address, http://127.0.0.1:PORT."""
    import uvicorn

    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", **settings))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        for _ in range(600):
            if server.started:
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="session")
def serve():
    return serving


@pytest.fixture(scope="session")
def server(searcher):
    """The address of a server for `searcher`."""
    from jaxclip.web.app import make_app

    with serving(make_app(searcher)) as address:
        yield address


@pytest.fixture(scope="session")
def reranking_server(reranking_searcher):
    """The address of a server for `reranking_searcher`."""
    from jaxclip.web.app import make_app

    with serving(make_app(reranking_searcher)) as address:
        yield address


@pytest.fixture(scope="session")
def several_pictures_server(trained, inshop, tmp_path_factory):
    """The address of a server for a gallery of products with several pictures, and its searcher."""
    import jaxclip
    from jaxclip.web.app import make_app

    workdir = tmp_path_factory.mktemp("several") / "run"
    shutil.copytree(trained, workdir)
    searcher = jaxclip.load(workdir, inshop, overrides={"data.reader": "deepfashion_inshop"})
    with serving(make_app(searcher)) as address:
        yield address, searcher
