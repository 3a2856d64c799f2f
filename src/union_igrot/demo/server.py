"""The HTTP server of the demo.

URLs refer to the package's static files alone: images are embedded in the page. Actions run one after
another in one thread, which alone uses sessions, models and galleries; photos are decoded in other processes. A user's
mistake is answered with status 200 and a message, because browsers log any other status as an error of the page.
"""

import asyncio
import base64
import binascii
import errno
import hmac
import ipaddress
import json
import logging
import mimetypes
import secrets
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar, final
from urllib.parse import urlsplit

import uvicorn
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from uvicorn.protocols.http.h11_impl import H11Protocol

from union_igrot.demo.controller import MAX_TEXT, MAX_WHERE, DemoController, Screen
from union_igrot.demo.session import Reference
from union_igrot.demo.uploads import Limits, PhotoDecoder
from union_igrot.errors import ConfigError, UnionError, escape_controls

MAX_REQUEST_BYTES: Final = 2**20  # largest request body of an action in bytes; mostly strokes
REQUEST_TIMEOUT: Final = 60.0  # seconds within which a request body has to arrive
HEAD_TIMEOUT: Final = 10.0  # seconds within which the head of a request has to arrive
LOGIN_DELAY: Final = 1.0  # seconds before a wrong password is refused
MAX_ATTEMPTS: Final = 5  # wrong passwords of one address that may wait for that; further attempts are refused unread
MAX_ATTEMPTS_IN_ALL: Final = 50  # wrong passwords of all addresses that may wait
MAX_LOGINS: Final = 1000  # browsers that are remembered as logged in
MAX_CONNECTIONS: Final = 200  # concurrent connections; for a further one the oldest that sends no request is closed
MAX_UPLOADS: Final = 8  # photos that may wait or be decoded, two at a time
COOKIE: Final = "union-demo"
LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")  # host names that only this machine reaches

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

for _type, _suffix in (("text/css", ".css"), ("text/javascript", ".js"), ("image/svg+xml", ".svg")):
    mimetypes.add_type(_type, _suffix)  # a system's own table may be wrong

log: Final = logging.getLogger("union_igrot.demo")

T = TypeVar("T")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def data_uri(image: bytes) -> Markup:
    """Return a PNG or JPEG as a data URI, so that no image has a URL on the server."""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return Markup(f"data:image/{kind};base64,{base64.b64encode(image).decode()}")


def show_controls(value: object) -> object:
    """Make control and bidi characters of a text visible, so that a name cannot look like another one."""
    return escape_controls(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@final
class PageRenderer:
    """Renders the page and its regions."""

    def __init__(self, controller: DemoController, limits: Limits) -> None:
        self._controller, self._limits = controller, limits
        self._environment = Environment(
            loader=PackageLoader("union_igrot.demo"),
            autoescape=True,
            undefined=StrictUndefined,
            finalize=show_controls,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters["uri"] = data_uri

    def page(self) -> str:
        """Return the initial page."""
        first = self._controller.backends[0]
        return self._render(
            "page",
            gallery=first.gallery,
            hint=first.hint,
            count=len(first),
            others=[(number, backend.name) for number, backend in enumerate(self._controller.backends)][1:],
            model=first.model,
            warning=first.warning,
            limits=self._limits,
            max_text=MAX_TEXT,
            columns=[name if name.isidentifier() else f'"{name}"' for name in first.columns],
            example=first.example,
            max_where=MAX_WHERE,
            pixelated=first.pixelated,
        )

    def regions(self, screen: Screen) -> dict[str, Any]:
        """Return the regions that change after an action; None leaves one unchanged."""
        session = screen.session
        results = None
        if screen.columns is not None:
            results = self._render(
                "results",
                session=session,
                columns=screen.columns,
                last=screen.last,
                shared=screen.shared,
                count=len(self._controller.backends[0]),
                heading=screen.heading,
            )
        return {
            "token": screen.token,
            "message": screen.message,
            "heading": screen.heading,
            "link": "" if session.present is None else session.present.link,
            "history": self._render("history", session=session) if screen.moved else None,
            "can": {"undo": session.can_undo, "redo": session.can_redo, "restart": bool(session.turns)},
            "reference": self._render("reference", reference=session.reference),
            "marked": self._render("marks", marks=session.marks),
            "pending": session.has_pending_changes,
            "marks": {mark.id: mark.liked for mark in session.marks},
            "results": results,
            "large": None if screen.large is None else self._render("large", large=screen.large),
            "compared": session.compared,
            "text": screen.text,
            "where": screen.where,
            "strokes": screen.strokes,
        }

    def _render(self, name: str, **values: Any) -> str:
        return self._environment.get_template(f"{name}.html").render(values)


@dataclass(frozen=True, slots=True)
class Login:
    """Credentials."""

    user: str
    password: str

    def __repr__(self) -> str:
        return f"Login({self.user!r})"

    def opens(self, header: str) -> bool:
        """Whether an Authorization header (RFC 7617) holds these credentials."""
        kind, _, given = header.partition(" ")
        try:
            sent = base64.b64decode(given, validate=True)
        except (binascii.Error, ValueError):
            return False
        return kind.lower() == "basic" and hmac.compare_digest(sent, f"{self.user}:{self.password}".encode())


@final
class RequestQueue:
    """Bounded queue of steps that run in threads."""

    def __init__(self, bound: int, threads: int = 1) -> None:
        self._bound, self._waiting = bound, 0
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="demo")

    async def run(self, step: Callable[[], T]) -> T:
        """Run a step when its turn comes."""
        if self._waiting >= self._bound:
            raise UnionError("The server is busy; try again in a moment.")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, step)
        finally:
            self._waiting -= 1


@final
class Routes:
    """Request handlers."""

    def __init__(
        self, controller: DemoController, bound: int, limits: Limits, decode: Callable[[bytes, str], Reference]
    ) -> None:
        self._controller, self._renderer = controller, PageRenderer(controller, limits)
        self._limits, self._decode = limits, decode
        self._queue, self._uploads = RequestQueue(bound), RequestQueue(min(bound, MAX_UPLOADS), threads=2)
        self._page = self._renderer.page()

    def routes(self) -> list[BaseRoute]:
        """Return all routes."""
        return [
            Route("/", self.page),
            Mount("/static", StaticFiles(packages=[("union_igrot.demo", "static")])),
            Route("/act", self.act, methods=["POST"]),
            Route("/photo", self.photo, methods=["POST"]),
        ]

    async def page(self, _: Request) -> Response:
        """Return the page."""
        return HTMLResponse(self._page)

    async def act(self, request: Request) -> Response:
        """Perform an action."""
        body = await _body(request, MAX_REQUEST_BYTES)
        if isinstance(body, Response):
            return body
        try:
            sent = json.loads(body)
            action, given = sent["action"], sent["given"]
        except (ValueError, RecursionError, TypeError, KeyError):
            return _problem("Invalid request; reload the page.")
        if not isinstance(action, str) or not isinstance(given, Mapping):
            return _problem("Invalid request; reload the page.")
        token = request.headers.get("x-session", "")
        return await self._respond(self._act(lambda: self._controller.act(token, action, given)))

    async def photo(self, request: Request) -> Response:
        """Receive a photo."""
        body = await _body(request, self._limits.bytes)
        if isinstance(body, Response):
            return body
        token, name = request.headers.get("x-session", ""), request.query_params.get("name", "")

        async def upload() -> dict[str, Any]:
            photo = await self._uploads.run(lambda: self._decode(body, name))
            return await self._act(lambda: self._controller.set_photo(token, photo))

        return await self._respond(upload())

    async def _act(self, action: Callable[[], Screen]) -> dict[str, Any]:
        return await self._queue.run(lambda: self._renderer.regions(action()))

    async def _respond(self, result: Awaitable[dict[str, Any]]) -> Response:
        try:
            return _json(await result)
        except UnionError as error:
            return _problem(str(error))
        except Exception:  # the page keeps working after an internal error
            log.exception("an action of the demo failed")
            return _problem("Internal error; the terminal of the server shows the details. The page still works.")


def make_app(
    controller: DemoController,
    *,
    bound: int = 64,
    hosts: Sequence[str] | None = LOOPBACK,
    login: Login | None = None,
    limits: Limits | None = None,
    decode: Callable[[bytes, str], Reference] | None = None,
) -> App:
    """Build the ASGI application; `hosts` are the accepted Host headers, against DNS rebinding, None for any."""
    limits = limits or Limits()
    routes = Routes(controller, bound, limits, decode or PhotoDecoder(limits))
    return _Guard(Starlette(routes=routes.routes()), hosts, None if login is None else _Gate(login))


@final
class _Gate:
    """Checks passwords; a browser that has logged in is remembered by a cookie and never waits.

    An address may have few wrong attempts waiting at a time, so that passwords cannot be tried out quickly and nobody
    waits for the attempts of others.
    """

    def __init__(self, login: Login) -> None:
        self._login, self._cookies = login, dict[str, None]()
        self._attempts: Counter[str] = Counter()

    async def admit(self, request: Request) -> tuple[str, Response | None]:
        """Return a new cookie, if any, and the response that refuses the request, or None to admit it."""
        if request.cookies.get(COOKIE) in self._cookies:
            return "", None
        password = request.headers.get("authorization", "")
        address = "" if request.client is None else _network(request.client.host)
        if password and (self._attempts[address] >= MAX_ATTEMPTS or self._attempts.total() >= MAX_ATTEMPTS_IN_ALL):
            return "", PlainTextResponse("too many wrong passwords; wait some seconds", 429, {"Retry-After": "5"})
        if self._login.opens(password):
            cookie = secrets.token_urlsafe(24)
            self._cookies[cookie] = None
            while len(self._cookies) > MAX_LOGINS:
                del self._cookies[next(iter(self._cookies))]
            return cookie, None
        if password:
            self._attempts[address] += 1
            try:
                await asyncio.sleep(LOGIN_DELAY)
            finally:
                self._attempts[address] -= 1
                self._attempts += Counter()  # drops zeros
        ask = {"WWW-Authenticate": 'Basic realm="union-demo", charset="UTF-8"'}
        return "", Response("user and password required", 401, ask)


@final
class _Guard:
    """Checks the Host header and the password, and adds the security headers to every response."""

    def __init__(self, inner: App, hosts: Sequence[str] | None, gate: _Gate | None) -> None:
        self._inner, self._gate = inner, gate
        self._hosts = None if hosts is None else [host.lower() for host in hosts]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        cookie = ""

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                more = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                if cookie:
                    more.append((b"set-cookie", f"{COOKIE}={cookie}; HttpOnly; SameSite=Strict; Path=/".encode()))
                message["headers"] = [*message.get("headers", []), *more]
            await send(message)

        request = Request(scope)
        refused: Response | None = None
        if self._hosts is not None and _host(request.headers.get("host", "")) not in self._hosts:
            known = " or ".join(self._hosts)
            refused = PlainTextResponse(f"Unknown host name; this page is served as {known}.", 400)
        elif self._gate is not None:
            cookie, refused = await self._gate.admit(request)
        await (refused or self._inner)(scope, receive, with_headers)


def _network(client: str) -> str:
    """Return what counts as one address: all of IPv4, the first 64 bits of IPv6, which one customer has."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    return client if address.version == 4 else str(ipaddress.ip_network((address, 64), strict=False))


def _host(header: str) -> str:
    """Return the lower-case name of a Host header without its port; empty if it is invalid."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


async def _body(request: Request, most: int) -> bytes | Response:
    """Read a request body up to a size; return an error response if it is larger, too slow or incomplete.

    Only the page's own script can set `X-Session`; a page of another origin would need CORS permission.
    """
    if "x-session" not in request.headers:
        return Response("not from this page", 403)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
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


def _problem(message: str) -> Response:
    return _json({"problem": message})


def _json(value: Mapping[str, Any]) -> Response:
    """Encode as ASCII JSON: a file name may contain what UTF-8 cannot encode."""
    return Response(json.dumps(value), media_type="application/json")


@final
class _Connection(H11Protocol):
    """Closes a connection whose request head does not arrive in time, and idle ones if there are too many."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Make room and wait for a request."""
        if len(self.connections) >= MAX_CONNECTIONS:
            idle = [one for one in self.connections if isinstance(one, _Connection) and one.idle]
            if idle:
                oldest = min(idle, key=lambda one: one.opened)
                self.connections.discard(oldest)
                oldest.transport.abort()
        super().connection_made(transport)
        self.opened = self.loop.time()
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Handle data; wait for the rest of a head."""
        super().data_received(data)
        if self.idle:
            self._wait()

    def handle_events(self) -> None:
        """Stop waiting once a request has begun."""
        super().handle_events()
        if not self.idle and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    @property
    def idle(self) -> bool:
        """Whether no request is being handled."""
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_TIMEOUT, self._close_if_idle)

    def _close_if_idle(self) -> None:
        self._timer = None
        if self.idle:
            self.transport.abort()


def listen(host: str, port: int) -> socket.socket:
    """Bind and listen on a port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    held = socket.socket(family)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((host, port))
        held.listen(128)
    except OSError as error:
        held.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} is in use; use another one, such as port={port + 1}, or port=0 for any free one"
            ) from None
        raise ConfigError(f"cannot bind {host}:{port} ({error.strerror}); use another host or port") from None
    return held


def serve(app: App, held: socket.socket, ready: Callable[[str], Any]) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    host, port = held.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # all interfaces: others use the host name
        host = socket.gethostname()
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        http=_Connection,
        limit_concurrency=MAX_CONNECTIONS + 1,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=5,
        server_header=False,
        proxy_headers=False,
    )
    ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    try:
        uvicorn.Server(config).run(sockets=[held])
    except KeyboardInterrupt:  # uvicorn has shut down and re-raises the signal
        pass
    finally:
        held.close()
