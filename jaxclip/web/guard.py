"""Middleware of every request: access, limits, metrics and security headers."""

import hmac
import time
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode

from starlette.responses import JSONResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxclip.web.metrics import Metrics

LOOPBACK = ("localhost", "[::1]")
PUBLIC_PATHS = ("/healthz", "/readyz")
"""Paths that need no token, because they reveal nothing about the catalogue; `max_requests` does not limit them."""
COOKIE = "jaxclip_token"
PARAMETER = "token"
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Guard:
    """Checks access and load, counts and times requests, and sets security headers.

    Args:
      app: the guarded application.
      loopback: True if the server listens on a loopback address. The Host header must then be a loopback one: otherwise
        a web page whose host name resolves to 127.0.0.1 could read the catalogue (DNS rebinding).
      token: the token that requests must send as `Authorization: Bearer TOKEN`; "" if no token is required. The page
        sends it as a cookie, which is set when the page is opened as /?token=TOKEN.
      max_requests: largest number of requests in progress; further requests are refused with status 429.
      metrics: metrics to update.
    """

    def __init__(self, app: ASGIApp, *, loopback: bool, token: str, max_requests: int, metrics: Metrics):
        self._app, self._loopback, self._token = app, loopback, token
        self._max_requests, self._metrics, self._running = max_requests, metrics, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, started = 500, time.perf_counter()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in HEADERS.items())]
            await send(message)

        self._running += 1
        try:
            await (self._refusal(scope) or self._app)(scope, receive, answer)
        finally:
            self._running -= 1
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(route, status, time.perf_counter() - started)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if self._loopback and not _is_loopback(headers.get(b"host", "")):
            return _refuse(421, "this server only answers requests to localhost: open it as http://localhost:PORT/")
        if scope["path"] in PUBLIC_PATHS:
            return None
        if self._token and not self._authenticated(headers):
            token, rest = _split_token(scope["query_string"].decode("latin-1"))
            if scope["path"] != "/" or not self._is_token(token):
                return _refuse(401, "a token is required: send Authorization: Bearer TOKEN, or open /?token=TOKEN")
            redirect = RedirectResponse(f"/?{rest}" if rest else "/", 303)
            redirect.set_cookie(COOKIE, token, httponly=True, samesite="strict")
            return redirect
        if self._running > self._max_requests:
            return _refuse(429, "too many requests are in progress: try again later")
        return None

    def _authenticated(self, headers: dict[bytes, str]) -> bool:
        scheme, _, token = headers.get(b"authorization", "").partition(" ")
        try:
            cookie = SimpleCookie(headers.get(b"cookie", "")).get(COOKIE)
        except CookieError:
            cookie = None
        return (scheme.lower() == "bearer" and self._is_token(token)) or (
            cookie is not None and self._is_token(cookie.value)
        )

    def _is_token(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self._token.encode())


def _split_token(query: str) -> tuple[str, str]:
    """Returns the token in a query string, "" if there is none, and the query string without it."""
    pairs = parse_qsl(query, keep_blank_values=True)
    token = next((value for name, value in pairs if name == PARAMETER), "")
    return token, urlencode([(name, value) for name, value in pairs if name != PARAMETER])


def _is_loopback(host: str) -> bool:
    name, _, port = host.rpartition(":")
    name = (name if name and port.isdigit() else host).lower()
    return name in LOOPBACK or name.startswith("127.") and name.replace(".", "").isdigit()


def _refuse(status: int, detail: str) -> ASGIApp:
    return JSONResponse({"detail": detail}, status, {"Retry-After": "1"} if status == 429 else None)
