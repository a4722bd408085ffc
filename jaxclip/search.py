"""Search a catalogue: python -m jaxclip.search --workdir=W [--rerank=W2] [--gallery=PATH] [--port=8000]

Embeds the pictures that are not yet in W/embeddings, then serves a search page and an HTTP API.
After SIGTERM or Ctrl-C the server answers pending requests, for up to 30 seconds, and stops.
"""

import errno
import os
import signal
import socket
from pathlib import Path

from absl import flags

from jaxclip import cli, config
from jaxclip.errors import UserError
from jaxclip.runtime import startup

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
STEP = flags.DEFINE_string(
    "step",
    "latest",
    "the checkpoint: latest, best (highest hit@1 on validation) or the number of a step; not with --rerank",
)
RERANK = flags.DEFINE_string(
    "rerank", None, "folder of the run of a re-ranker (task = rerank) that was trained on these towers"
)
GALLERY = flags.DEFINE_string(
    "gallery",
    None,
    "catalogue to search, raw or prepared; default: the catalogue of the workdir, all splits",
)
HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen on; default: this machine only")
PORT = flags.DEFINE_integer("port", 8000, "port to listen on; 0 = any free port", 0, 65535)
TOKEN = flags.DEFINE_string("token", None, "token that requests must send; default: $JAXCLIP_TOKEN, or no token")
CONNECTIONS = 2048
"""Largest number of open connections."""
SHUTDOWN_SECONDS = 30
"""Time for pending requests to finish after SIGTERM or Ctrl-C."""


def main(overrides: dict[str, str]) -> None:
    """Serves a catalogue according to the flags, until SIGTERM or SIGINT."""
    if not WORKDIR.value:
        raise UserError("--workdir is missing: give the folder of a run")
    config.of_run(Path(WORKDIR.value), {"data.split": "all", **overrides})
    if RERANK.value:
        config.load_config(Path(RERANK.value))
    listening = _listen()  # before embedding, which may take minutes, so that a port in use is reported at once
    with startup.quiet_imports():
        import uvicorn

        import jaxclip.serving.open
        from jaxclip.web.app import make_app
        from jaxclip.web.connections import Connection

    options = {"step": STEP.value, "rerank": RERANK.value, "overrides": overrides, "say": cli.say}
    searcher = jaxclip.load(WORKDIR.value, GALLERY.value, **options)
    cli.say("compiling for batches of searches")
    searcher.warm_up()
    token = os.environ.get("JAXCLIP_TOKEN", "") if TOKEN.value is None else TOKEN.value
    app = make_app(searcher, loopback=_loopback(), token=token)
    settings = uvicorn.Config(
        app,
        http=Connection,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # uvicorn handles both, and raises the signal again after it has stopped
    host = f"[{HOST.value}]" if ":" in HOST.value else HOST.value
    print(f"{len(searcher.gallery):,} products at http://{host}:{listening.getsockname()[1]}/", flush=True)
    uvicorn.Server(settings).run([listening])
    print("stopped")


def _listen() -> socket.socket:
    family = socket.AF_INET6 if ":" in HOST.value else socket.AF_INET
    try:
        return socket.create_server((HOST.value, PORT.value), family=family, backlog=2048)
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: "is taken; give another --port",
            errno.EACCES: "is reserved for privileged users; give a --port >= 1024",
        }
        reason = reasons.get(error.errno, f"cannot be opened: {error.strerror or error}")
        raise UserError(f"port {PORT.value} of --host={HOST.value} {reason}") from None


def _loopback() -> bool:
    return HOST.value in ("localhost", "::1") or HOST.value.startswith("127.")


if __name__ == "__main__":
    cli.run(main, __doc__)
