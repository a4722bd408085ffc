"""Middleware of every request: access, limits, metrics and security headers."""

import hmac
import time
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode

from starlette.responses import JSONResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxclip.web.metrics import Measures

LOOPBACK = ("localhost", "[::1]")
OPEN = ("/healthz", "/readyz")
"""Paths that need no token, because they reveal nothing."""
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
      loopback: True if the server listens on a loopback address. The Host header must then name this machine: otherwise
        a web page whose host name resolves to 127.0.0.1 could read the catalogue (DNS rebinding).
      token: the token that requests must send as `Authorization: Bearer TOKEN`; "" for none. The page sends it as a
        cookie, which it receives when it is opened as /?token=TOKEN.
      most: largest number of requests in progress; further ones are refused with status 429.
      measures: metrics to update.
    """

    def __init__(self, app: ASGIApp, *, loopback: bool, token: str, most: int, measures: Measures):
        self._app, self._loopback, self._token = app, loopback, token
        self._most, self._measures, self._running = most, measures, 0

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
            self._measures.request(route, status, time.perf_counter() - started)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if self._loopback and not _names_this_machine(headers.get(b"host", "")):
            return _problem(421, "this server only answers requests to localhost: open it as http://localhost:PORT/")
        if scope["path"] in OPEN:
            return None
        if self._token and not self._known(headers):
            given, rest = _taken_out(scope["query_string"].decode("latin-1"))
            if scope["path"] != "/" or not self._right(given):
                return _problem(401, "a token is needed: Authorization: Bearer TOKEN, or open /?token=TOKEN")
            welcome = RedirectResponse(f"/?{rest}" if rest else "/", 303)
            welcome.set_cookie(COOKIE, given, httponly=True, samesite="strict")
            return welcome
        if self._running > self._most:
            return _problem(429, "too many requests at once: try again")
        return None

    def _known(self, headers: dict[bytes, str]) -> bool:
        scheme, _, given = headers.get(b"authorization", "").partition(" ")
        try:
            cookie = SimpleCookie(headers.get(b"cookie", "")).get(COOKIE)
        except CookieError:
            cookie = None
        return (scheme.lower() == "bearer" and self._right(given)) or (cookie is not None and self._right(cookie.value))

    def _right(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token.encode())


def _taken_out(query: str) -> tuple[str, str]:
    """Returns the token of a query string ("" for none) and the query string without it."""
    pairs = parse_qsl(query, keep_blank_values=True)
    token = next((value for name, value in pairs if name == PARAMETER), "")
    return token, urlencode([(name, value) for name, value in pairs if name != PARAMETER])


def _names_this_machine(host: str) -> bool:
    name, _, port = host.rpartition(":")
    name = (name if name and port.isdigit() else host).lower()
    return name in LOOPBACK or name.startswith("127.") and name.replace(".", "").isdigit()


def _problem(status: int, detail: str) -> ASGIApp:
    return JSONResponse({"detail": detail}, status, {"Retry-After": "1"} if status == 429 else None)
