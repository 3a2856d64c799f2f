"""The HTTP server of the demo.

URLs refer to the package's static files alone: images are embedded in the page. Actions run one after
another in one thread, which alone uses sessions, models and galleries; photos are decoded in other processes. A user's
mistake is answered with status 200 and a message, because browsers log any other status as an error of the page.
"""

import asyncio
import base64
import hmac
import ipaddress
import json
import logging
import mimetypes
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from union_igrot.demo.controller import MAX_TEXT, MAX_WHERE, DemoController, Screen
from union_igrot.demo.session import photo_reference, short_file_name
from union_igrot.errors import UnionError, escape_controls
from union_igrot.service import http
from union_igrot.service.http import RequestQueue, UploadQueue, error_response, json_response
from union_igrot.service.uploads import Limits

MAX_REQUEST_BYTES: Final = 2**20  # largest request body of an action in bytes; mostly strokes
LOGIN_DELAY: Final = 1.0  # seconds before a wrong password is refused
MAX_ATTEMPTS: Final = 5  # wrong passwords of one address that may wait for that; further attempts are refused unread
MAX_ATTEMPTS_IN_ALL: Final = 50  # wrong passwords of all addresses that may wait
MAX_LOGINS: Final = 1000  # browsers that are remembered as logged in
COOKIE: Final = "union-demo"

for _type, _suffix in (("text/css", ".css"), ("text/javascript", ".js"), ("image/svg+xml", ".svg")):
    mimetypes.add_type(_type, _suffix)  # a system's own table may be wrong

log: Final = logging.getLogger("union_igrot.demo")


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


@final
class Routes:
    """Request handlers."""

    def __init__(self, controller: DemoController, queue: RequestQueue, uploads: UploadQueue) -> None:
        self._controller, self._renderer = controller, PageRenderer(controller, uploads.limits)
        self._queue, self._uploads = queue, uploads
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
        body = await self._body(request, MAX_REQUEST_BYTES)
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
        body = await self._body(request, self._uploads.limits.bytes)
        token, name = request.headers.get("x-session", ""), short_file_name(request.query_params.get("name", ""))

        async def upload() -> dict[str, Any]:
            image = await self._uploads.decode(body, name)
            return await self._act(lambda: self._controller.set_photo(token, photo_reference(image, name)))

        return await self._respond(upload())

    async def _body(self, request: Request, most: int) -> bytes:
        """Only the page's own script can set `X-Session`; a page of another origin would need CORS permission."""
        if "x-session" not in request.headers:
            raise HTTPException(403, "not from this page")
        return await self._uploads.read(request, most)

    async def _act(self, action: Callable[[], Screen]) -> dict[str, Any]:
        return await self._queue.run(lambda: self._renderer.regions(action()))

    async def _respond(self, result: Awaitable[dict[str, Any]]) -> Response:
        try:
            return json_response(await result)
        except UnionError as error:
            return _problem(str(error))
        except Exception:  # the page keeps working after an internal error
            log.exception("an action of the demo failed")
            return _problem("Internal error; the terminal of the server shows the details. The page still works.")


def make_app(
    controller: DemoController,
    *,
    bound: int = 64,
    hosts: Sequence[str] | None = http.LOOPBACK,
    login: http.Gate | None = None,
    limits: Limits | None = None,
    decode: Callable[[bytes, str], Image.Image] | None = None,
) -> ASGIApp:
    """Build the ASGI application; `hosts` are the accepted Host headers, against DNS rebinding, None for any."""
    uploads = UploadQueue(limits or Limits(), min(bound, http.MAX_UPLOADS), decode)
    routes = Routes(controller, RequestQueue(bound), uploads)
    return http.make_application(routes.routes(), hosts, login)


@final
class Login:
    """Checks passwords; a browser that has logged in is remembered by a cookie and never waits.

    An address may have few wrong attempts waiting at a time, so that passwords cannot be tried out quickly and nobody
    waits for the attempts of others.
    """

    def __init__(self, user: str, password: str) -> None:
        self.user, self.password, self._cookies = user, password, dict[str, None]()
        self._attempts: Counter[str] = Counter()

    async def __call__(self, request: Request) -> tuple[str, Response | None]:
        """Admit a browser that is known, and the right password at once; a wrong one waits."""
        if request.cookies.get(COOKIE) in self._cookies:
            return "", None
        password = request.headers.get("authorization", "")
        address = "" if request.client is None else _network(request.client.host)
        if password and (self._attempts[address] >= MAX_ATTEMPTS or self._attempts.total() >= MAX_ATTEMPTS_IN_ALL):
            return "", error_response(429, "too many wrong passwords; wait some seconds", {"Retry-After": "5"})
        if hmac.compare_digest(http.basic_credentials(password), f"{self.user}:{self.password}".encode()):
            cookie = secrets.token_urlsafe(24)
            self._cookies[cookie] = None
            while len(self._cookies) > MAX_LOGINS:
                del self._cookies[next(iter(self._cookies))]
            return f"{COOKIE}={cookie}; HttpOnly; SameSite=Strict; Path=/", None
        if password:
            self._attempts[address] += 1
            try:
                await asyncio.sleep(LOGIN_DELAY)
            finally:
                self._attempts[address] -= 1
                self._attempts += Counter()  # drops zeros
        ask = {"WWW-Authenticate": 'Basic realm="union-demo", charset="UTF-8"'}
        return "", error_response(401, "user and password required", ask)


def _network(client: str) -> str:
    """Return what counts as one address: all of IPv4, the first 64 bits of IPv6, which one customer has."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    return client if address.version == 4 else str(ipaddress.ip_network((address, 64), strict=False))


def _problem(message: str) -> Response:
    return json_response({"problem": message})
