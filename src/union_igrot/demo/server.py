"""The HTTP server of the demo.

No URL refers to a file: static files are read at startup and images are embedded in the page. Actions run one after
another in one thread, which alone uses sessions, models and galleries. A user's mistake is answered with status 200 and
a message, because browsers log any other status as an error of the page.
"""

import asyncio
import base64
import binascii
import hmac
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar, final
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from union_igrot.demo.controller import DemoController, Screen
from union_igrot.demo.rendering import STATIC, PageRenderer, static_file
from union_igrot.errors import UnionError

MAX_REQUEST_BYTES: Final = 2**20
"""Largest request body of an action in bytes; mostly strokes."""
REQUEST_TIMEOUT: Final = 60.0
"""Seconds within which a request body has to arrive."""
LOGIN_DELAY: Final = 1.0
"""Seconds before a wrong password is refused, one attempt at a time."""
LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
"""Host names that only this machine reaches."""

HEADERS: Final = {
    # The browser refuses content of other hosts and inline scripts.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

log: Final = logging.getLogger("union_igrot.demo")

T = TypeVar("T")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Login:
    """Credentials.

    Attributes:
        user: The user name.
        password: The password.
    """

    user: str
    password: str

    def __repr__(self) -> str:
        return f"Login({self.user!r})"

    def opens(self, header: str) -> bool:
        """Whether an Authorization header (RFC 7617) holds these credentials."""
        kind, _, given = header.partition(" ")
        try:
            told = base64.b64decode(given, validate=True)
        except (binascii.Error, ValueError):
            return False
        return kind.lower() == "basic" and hmac.compare_digest(told, f"{self.user}:{self.password}".encode())


@final
class RequestQueue:
    """Bounded queue of actions that run one after another in one thread.

    Args:
        bound: Actions that may wait or run.
    """

    def __init__(self, bound: int) -> None:
        self._bound, self._waiting = bound, 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="demo")

    async def do(self, step: Callable[[], T]) -> T:
        """Run an action when its turn comes.

        Raises:
            UnionError: If the queue is full; with a message for the page.
        """
        if self._waiting >= self._bound:
            raise UnionError("The server is busy; try again in a moment.")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, step)
        finally:
            self._waiting -= 1


@final
class Routes:
    """Request handlers.

    Args:
        controller: Performs the actions.
        bound: Actions that may wait or run.
    """

    def __init__(self, controller: DemoController, bound: int) -> None:
        self._desk, self._view, self._queue = controller, PageRenderer(controller), RequestQueue(bound)
        self._page = self._view.page()
        self._files = {name: static_file(name) for name in STATIC}

    def routes(self) -> list[Route]:
        """Return all routes."""
        return [
            Route("/", self.page),
            Route("/static/{name}", self.file),
            Route("/act", self.act, methods=["POST"]),
            Route("/photo", self.photo, methods=["POST"]),
        ]

    async def page(self, request: Request) -> Response:
        """Return the page."""
        del request
        return HTMLResponse(self._page)

    async def file(self, request: Request) -> Response:
        """Return a static file."""
        name = request.path_params["name"]
        if name not in self._files:
            return Response("not found", 404)
        return Response(self._files[name], media_type=STATIC[name])

    async def act(self, request: Request) -> Response:
        """Perform an action."""
        body = await _body(request, MAX_REQUEST_BYTES)
        if isinstance(body, Response):
            return body
        try:
            told = json.loads(body)
            action, given = told["action"], told["given"]
        except (ValueError, RecursionError, TypeError, KeyError):
            return _problem("Invalid request; reload the page.")
        if not isinstance(action, str) or not isinstance(given, Mapping):
            return _problem("Invalid request; reload the page.")
        token = request.headers.get("x-session", "")
        return await self._step(lambda: self._desk.act(token, action, given))

    async def photo(self, request: Request) -> Response:
        """Receive a photo."""
        limits = self._desk.limits
        body = await _body(request, limits.bytes)
        if isinstance(body, Response):
            return body
        token, name = request.headers.get("x-session", ""), request.query_params.get("name", "")
        return await self._step(lambda: self._desk.upload_photo(token, name, body))

    async def _step(self, step: Callable[[], Screen]) -> Response:
        try:
            return _json(await self._queue.do(lambda: self._view.regions(step())))
        except UnionError as error:
            return _problem(str(error))
        except Exception:  # the page keeps working after an internal error
            log.exception("an action of the demo failed")
            return _problem("Internal error; the terminal of the server shows the details. The page still works.")


def make_app(
    controller: DemoController, *, bound: int = 64, hosts: Sequence[str] | None = LOOPBACK, login: Login | None = None
) -> App:
    """Build the ASGI application.

    Args:
        controller: Performs the actions.
        bound: Actions that may wait or run; further ones are refused with a message.
        hosts: Accepted Host headers, against DNS rebinding; None accepts any.
        login: Credentials; None requires no login.
    """
    return _Guard(Starlette(routes=Routes(controller, bound).routes()), hosts, login)


@final
class _Guard:
    """Checks the Host header and the password, and adds the security headers to every response."""

    def __init__(self, inner: App, hosts: Sequence[str] | None, login: Login | None) -> None:
        self._inner, self._hosts, self._login = inner, hosts, login
        self._guesses = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                more = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *more]
            await send(message)

        told = dict(scope["headers"])
        if self._hosts is not None and _host(told.get(b"host", b"").decode("latin-1")) not in self._hosts:
            known = " or ".join(self._hosts)
            sentence = f"Unknown host name; this page is served as {known}."
            await PlainTextResponse(sentence, 400)(scope, receive, with_headers)
            return
        if self._login is not None:
            given = told.get(b"authorization", b"").decode("latin-1")
            if not self._login.opens(given):
                if given:
                    async with self._guesses:  # one wrong attempt at a time, also for parallel requests
                        await asyncio.sleep(LOGIN_DELAY)
                ask = {"WWW-Authenticate": 'Basic realm="union-demo", charset="UTF-8"'}
                await Response("user and password required", 401, ask)(scope, receive, with_headers)
                return
        await self._inner(scope, receive, with_headers)


def _host(told: str) -> str:
    """Return the name of a Host header without its port; empty if it is invalid."""
    try:
        return urlsplit(f"//{told}").hostname or ""
    except ValueError:
        return ""


async def _body(request: Request, most: int) -> bytes | Response:
    """Read a request body up to a size; return an error response if it is larger, too slow or incomplete.

    Only the page's own script can set `X-Session`; a page of another origin would need CORS permission.
    """
    if "x-session" not in request.headers:
        return Response("not from this page", 403)
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told) > most:
        return Response("too large", 413)
    parts, size = [], 0
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    return Response("too large", 413)
                parts.append(part)
    except (TimeoutError, ClientDisconnect):
        return Response("incomplete request", 408)
    return b"".join(parts)


def _problem(sentence: str) -> Response:
    return _json({"problem": sentence})


def _json(value: Mapping[str, Any]) -> Response:
    """Encode as ASCII JSON: a file name may contain what UTF-8 cannot encode."""
    return Response(json.dumps(value), media_type="application/json")
