"""The HTTP server of the demo and of the service: limits, checks of requests, security headers, start and end."""

import asyncio
import base64
import errno
import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar, final
from urllib.parse import urlsplit

import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from union_igrot.errors import ConfigError, UnionError
from union_igrot.service.uploads import Limits, UploadDecoder

REQUEST_TIMEOUT: Final = 60.0  # seconds within which a request body has to arrive
HEAD_TIMEOUT: Final = 10.0  # seconds within which the head of a request has to arrive
MAX_CONNECTIONS: Final = 200  # concurrent connections; for a further one the oldest that sends no request is closed
MAX_BODIES: Final = 2**28  # bytes of all request bodies that are being received
MAX_UPLOADS: Final = 32  # images that may wait or be decoded, two at a time
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

T = TypeVar("T")
Gate = Callable[[Request], Awaitable[tuple[str, Response | None]]]
"""Returns a Set-Cookie header, if any, and the response that refuses a request, or None to admit it."""


class BusyError(UnionError):
    """Too much is waiting already."""


@final
class RequestQueue:
    """Bounded queue of steps that run in threads."""

    def __init__(self, bound: int, threads: int = 1) -> None:
        self._bound, self._waiting = bound, 0
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="server")

    async def run(self, step: Callable[[], T]) -> T:
        """Run a step when its turn comes; a BusyError if too many wait."""
        if self._waiting >= self._bound:
            raise BusyError("The server is busy; try again in a moment.")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, step)
        finally:
            self._waiting -= 1


@final
class UploadQueue:
    """Reads request bodies, and decodes uploaded images, two at a time, within limits."""

    def __init__(
        self, limits: Limits, bound: int = MAX_UPLOADS, decode: Callable[[bytes, str], Image.Image] | None = None
    ) -> None:
        self.limits, self._queue = limits, RequestQueue(bound, threads=2)
        self._decode, self._held = decode or UploadDecoder(limits), 0

    async def decode(self, data: bytes, name: str) -> Image.Image:
        """Decode a file, called `name` in errors; a BusyError if too many wait."""
        return await self._queue.run(lambda: self._decode(data, name))

    async def read(self, request: Request, most: int) -> bytes:
        """Read a body of at most `most` bytes; an HTTPException if it is larger, too slow or incomplete."""
        length = request.headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 15 or int(length) > most):
            raise HTTPException(413, f"the request is larger than {most:,} bytes")
        parts, size = [], 0
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                async for part in request.stream():
                    size += len(part)
                    self._held += len(part)
                    if size > most:
                        raise HTTPException(413, f"the request is larger than {most:,} bytes")
                    if self._held > MAX_BODIES:
                        raise HTTPException(503, "the server is busy; try again later", {"Retry-After": "5"})
                    parts.append(part)
        except (TimeoutError, ClientDisconnect):
            raise HTTPException(408, "incomplete request") from None
        finally:
            self._held -= size
        return b"".join(parts)


def json_response(value: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Encode as ASCII JSON: a file name may contain what UTF-8 cannot encode."""
    return Response(json.dumps(value, allow_nan=False), status, headers, "application/json")


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return an error as JSON."""
    return json_response({"error": message}, status, headers)


async def _show_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(error.status_code, error.detail, error.headers)


def make_application(routes: Sequence[BaseRoute], hosts: Sequence[str] | None, gate: Gate | None) -> ASGIApp:
    """Build the ASGI application; `hosts` are the accepted Host headers, against DNS rebinding, None for any."""
    return _Guard(Starlette(routes=routes, exception_handlers={HTTPException: _show_error}), hosts, gate)


@final
class _Guard:
    """Limits requests, checks the Host header and the login, and adds the security headers to every response."""

    def __init__(self, inner: ASGIApp, hosts: Sequence[str] | None, gate: Gate | None) -> None:
        self._inner, self._gate, self._active = inner, gate, 0
        self._hosts = None if hosts is None else [host.lower() for host in hosts]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        cookie = ""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                if cookie:
                    more.append((b"set-cookie", cookie.encode()))
                message["headers"] = [*message.get("headers", []), *more]
            await send(message)

        request = Request(scope)
        refused: Response | None = None
        self._active += 1
        try:
            if self._active > MAX_CONNECTIONS:
                refused = error_response(503, "too many requests at once; try again later", {"Retry-After": "1"})
            elif self._hosts is not None and _host(request.headers.get("host", "")) not in self._hosts:
                known = " or ".join(self._hosts)
                refused = error_response(400, f"Unknown host name; this server is {known}.")
            elif self._gate is not None:
                cookie, refused = await self._gate(request)
            await (refused or self._inner)(scope, receive, with_headers)
        finally:
            self._active -= 1


def _host(header: str) -> str:
    """Return the lower-case name of a Host header without its port; empty if it is invalid."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def basic_credentials(header: str) -> bytes:
    """Return the user:password of an Authorization header (RFC 7617); empty if it holds none."""
    kind, _, given = header.partition(" ")
    try:
        return base64.b64decode(given, validate=True) if kind.lower() == "basic" else b""
    except ValueError:
        return b""


def is_loopback(host: str) -> bool:
    """Return whether an address is reachable from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def accepted_hosts(host: str, name: str | None) -> list[str] | None:
    """Return the Host headers that a server accepts; None for any, as any name may belong to a public address."""
    names = [*LOOPBACK, host, *([name] if name else [])]
    return list(dict.fromkeys(names)) if is_loopback(host) else None


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
    try:
        return socket.create_server((host, port), family=family, backlog=128, dualstack_ipv6=host == "::")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} is in use; use another one, such as port={port + 1}, or port=0 for any free one"
            ) from None
        reason = str(error.strerror).partition(" (while")[0]  # the address is named before
        raise ConfigError(f"cannot bind {host}:{port} ({reason}); use another host or port") from None


def serve(app: ASGIApp, held: socket.socket, ready: Callable[[str], Any]) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    host, port = held.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # all interfaces: others use the host name
        host = socket.gethostname()
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        loop="asyncio",  # whose signal handling SIGTERM's time limit relies on
        ws="none",
        http=_Connection,
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
