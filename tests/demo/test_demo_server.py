import asyncio
import base64
import io
import socket
import threading
import time
from contextlib import suppress

import httpx
import pytest
import uvicorn
from PIL import Image

from demo_backends import Squares
from union_igrot.demo import server
from union_igrot.demo.controller import DemoController
from union_igrot.demo.server import MAX_REQUEST_BYTES, Login, make_app
from union_igrot.service import http
from union_igrot.service.http import listen, serve
from union_igrot.service.uploads import Limits, decode_upload

SESSION = {"X-Session": "new"}
LIMITS = Limits(megabytes=0.05)
LOGIN = Login("anna", "ge:heim ä")
RIGHT = {"Authorization": "Basic " + base64.b64encode("anna:ge:heim ä".encode()).decode()}
STATIC = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
WRONG = {"Authorization": "Basic " + base64.b64encode(b"anna:geheim").decode()}


def app_of(controller, **options):
    """An application that decodes photos in this process."""
    return make_app(controller, limits=LIMITS, decode=lambda data, name: decode_upload(data, name, LIMITS), **options)


def request(app, *requests, base="http://127.0.0.1:7860", at_once=False, client="127.0.0.1"):
    """Send requests to an application, without a socket."""

    async def send():
        transport = httpx.ASGITransport(app, client=(client, 123))
        async with httpx.AsyncClient(transport=transport, base_url=base) as session:
            sent = [session.request(*one[:2], **(one[2] if len(one) > 2 else {})) for one in requests]
            return await asyncio.gather(*sent) if at_once else [await one for one in sent]

    responses = asyncio.run(send())
    return responses[0] if len(responses) == 1 else responses


def action(name, given=None, token="new", headers=None):
    body = {"action": name, "given": given or {}}
    return "POST", "/act", {"json": body, "headers": {"X-Session": token} | (headers or {})}


@pytest.fixture
def controller() -> DemoController:
    return DemoController([Squares()], page=5)


@pytest.fixture
def app(controller):
    return app_of(controller)


def test_the_page_its_files_and_the_content_policy(app):
    parts = request(app, *(("GET", f"/{at}") for at in ("", *(f"static/{name}" for name in STATIC))))
    kinds = [part.headers["content-type"].partition(";")[0] for part in parts]
    assert kinds == ["text/html", *STATIC.values()]
    for part in parts:
        policy = part.headers["content-security-policy"]
        assert (part.status_code, part.headers["x-content-type-options"]) == (200, "nosniff")
        assert policy.startswith("default-src 'none';")
        assert "http" not in policy
        assert "unsafe" not in policy


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/static/../server.py",
        "/static/%2e%2e%2fserver.py",
        "/static/..%2f..%2f..%2fetc%2fpasswd",
        "/static//etc/passwd",
        "/static/page.html",
        "/file=/etc/passwd",
        "/templates/page.html",
    ],
)
def test_no_file_of_the_server_has_a_url(app, path):
    response = request(app, ("GET", path))
    assert response.status_code == 404
    assert b"root:" not in response.content


def test_actions_and_photos_over_http(app):
    first = request(app, action("search", {"text": "ab", "strokes": [[[1, 2], [3, 4]]]})).json()
    token = first["token"]
    picked = request(app, action("pick", {"backend": 0, "id": "s4"}, token))
    assert (picked.status_code, picked.json()["results"]) == (200, None)
    shown = request(app, action("search", {"text": "red"}, token)).json()
    assert (shown["history"].count("<li"), shown["token"]) == (3, token)
    undone = request(app, action("undo", {}, token)).json()
    assert (undone["text"], undone["strokes"]) == ("ab", [[[1, 2], [3, 4]]])
    file = io.BytesIO()
    Image.new("RGB", (30, 30), "red").save(file, "PNG")
    photo = ("POST", "/photo?name=my%20cat.png", {"content": file.getvalue(), "headers": SESSION})
    assert "my cat.png" in request(app, photo).json()["reference"]
    broken = ("POST", "/photo?name=x.png", {"content": b"broken", "headers": SESSION})
    assert request(app, broken).json()["problem"].startswith("Cannot decode x.png")


def test_mistakes_are_messages(app, caplog):
    assert request(app, action("search")).json()["problem"].startswith("There is nothing to search with")
    broken = (b"", b"{", b"[]", b'"x"', b'{"action": 1, "given": {}}', b'{"action": "show", "given": []}', b"[" * 10**5)
    for body in broken:
        response = request(app, ("POST", "/act", {"content": body, "headers": SESSION}))
        assert (response.status_code, response.json()["problem"][:8]) == (200, "Invalid ")
    problem = request(app, action("search", {"text": "break"})).json()["problem"]
    assert "Internal error" in problem
    assert "defect" not in problem
    assert "a defect inside" in caplog.text  # the terminal shows the traceback
    assert "results" in request(app, action("show")).json()


def test_large_slow_and_foreign_requests_are_refused(app, monkeypatch):
    read = 0

    async def endless():
        nonlocal read
        while True:
            read += 1000
            yield b"x" * 1000

    async def stalled():
        yield b"x"
        await asyncio.sleep(5)

    for address, most in (("/act", MAX_REQUEST_BYTES), ("/photo", LIMITS.bytes)):
        named = request(app, ("POST", address, {"content": b"x" * (most + 1), "headers": SESSION}))
        read = 0
        unnamed = request(app, ("POST", address, {"content": endless(), "headers": SESSION}))
        assert (named.status_code, unnamed.status_code, read <= most + 2000) == (413, 413, True)
    monkeypatch.setattr(http, "REQUEST_TIMEOUT", 0.05)
    assert request(app, ("POST", "/act", {"content": stalled(), "headers": SESSION})).status_code == 408
    # A form of another site cannot set the header.
    assert request(app, ("POST", "/act", {"json": {"action": "show", "given": {}}})).status_code == 403
    preflight = {"headers": {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}}
    response = request(app, ("OPTIONS", "/act", preflight))
    assert response.status_code == request(app, ("PUT", "/act", {"headers": SESSION})).status_code == 405
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_foreign_host_names_are_refused(controller, app):
    assert request(app, ("GET", "/"), base="http://evil.example").status_code == 400
    for host in ("", "[::1", "evil.example:7860", "127.0.0.1.evil.example", "[::2]:80"):
        assert request(app, ("GET", "/", {"headers": {"Host": host}})).status_code == 400
    for name in ("127.0.0.1:1", "localhost:7860", "[::1]:7860", "LOCALHOST"):
        assert request(app, ("GET", "/"), base=f"http://{name}").status_code == 200
    named = app_of(controller, hosts=["Search.Example.Org"])
    for name in ("search.example.org", "SEARCH.example.org"):
        assert request(named, ("GET", "/"), base=f"http://{name}").status_code == 200
    assert request(app_of(controller, hosts=None), ("GET", "/"), base="http://pc.example").status_code == 200


def test_every_url_needs_the_password(controller, monkeypatch):
    monkeypatch.setattr(server, "LOGIN_DELAY", 0.01)
    app = app_of(controller, login=LOGIN)
    for address in ("/", "/static/page.js", "/act", "/photo", "/nothing"):
        refused = request(app, ("GET", address))
        assert (refused.status_code, refused.headers["www-authenticate"][:5]) == (401, "Basic")
        assert "content-security-policy" in refused.headers
    for wrong in ("", "Basic", "Basic !", "Bearer x", WRONG["Authorization"]):
        assert request(app, ("GET", "/", {"headers": {"Authorization": wrong}})).status_code == 401
    assert request(app, ("GET", "/", {"headers": RIGHT})).status_code == 200
    assert request(app, action("show", headers=RIGHT)).json()["token"]
    assert "heim" not in repr(LOGIN)


def test_wrong_passwords_are_few_at_a_time_and_keep_nobody_waiting(controller, monkeypatch):
    monkeypatch.setattr(server, "LOGIN_DELAY", 0.3)
    app = app_of(controller, login=LOGIN)
    cookie = request(app, ("GET", "/", {"headers": RIGHT})).headers["set-cookie"].partition(";")[0]
    wrong = [("GET", "/", {"headers": WRONG})] * 20
    later = [
        ("GET", "/", {"headers": headers}) for headers in (RIGHT, {"Cookie": cookie}, {"Cookie": f"x=1; {cookie}"})
    ]
    codes = [response.status_code for response in request(app, *wrong, *later, at_once=True)]
    assert codes == [401] * server.MAX_ATTEMPTS + [429] * (20 - server.MAX_ATTEMPTS) + [429, 200, 200]
    assert request(app, ("GET", "/", {"headers": RIGHT})).status_code == 200  # afterwards

    async def from_two_addresses():
        answers = []
        for client in ("2001:db8::1", "2001:db8::2", "10.0.0.9"):
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app, client=(client, 1))) as session:
                sent = [session.get("http://localhost/", headers=WRONG) for _ in range(5)]
                answers.append(asyncio.gather(*sent))
                await asyncio.sleep(0.05)
        return [[one.status_code for one in await answer] for answer in answers]

    assert asyncio.run(from_two_addresses()) == [[401] * 5, [429] * 5, [401] * 5]  # one IPv6 network is one address


def test_actions_are_bounded_and_never_overlap(controller, monkeypatch):
    inside, most, steps = 0, 0, 0
    guard = threading.Lock()
    plain = controller.act

    def slow(*given):
        nonlocal inside, most, steps
        with guard:
            inside, steps = inside + 1, steps + 1
            most = max(most, inside)
        time.sleep(0.01)
        with guard:
            inside -= 1
        return plain(*given)

    monkeypatch.setattr(controller, "act", slow)
    app = app_of(controller, bound=5)
    shown = [response.json() for response in request(app, *[action("show")] * 12, at_once=True)]
    refused = [one for one in shown if "problem" in one]
    assert (most, steps, len(refused)) == (1, 5, 7)
    assert all(one["problem"].startswith("The server is busy") for one in refused)
    assert "token" in request(app, action("show")).json()


@pytest.mark.enable_socket
def test_silent_connections_are_closed_and_shut_nobody_out(app, monkeypatch):
    monkeypatch.setattr(http, "HEAD_TIMEOUT", 1.5)
    monkeypatch.setattr(http, "MAX_CONNECTIONS", 8)
    running: list[uvicorn.Server] = []
    monkeypatch.setattr(uvicorn.Server, "install_signal_handlers", lambda _: None, raising=False)
    plain = uvicorn.Server.__init__
    monkeypatch.setattr(uvicorn.Server, "__init__", lambda self, config: plain(self, config) or running.append(self))
    bound = listen("127.0.0.1", 0)
    address = bound.getsockname()
    thread = threading.Thread(target=serve, args=(app, bound, lambda _: None))
    thread.start()
    silent = []
    try:
        for number in range(20):
            silent.append(socket.create_connection(address, timeout=10))
            if number % 2:
                silent[-1].sendall(b"GET / HT")
        with httpx.Client(base_url=f"http://{address[0]}:{address[1]}") as user:
            assert user.get("/").status_code == 200
            for one in silent:  # closed, some at once and some after the time limit
                with suppress(ConnectionResetError):
                    assert one.recv(1) == b""
            assert user.get("/").status_code == 200
    finally:
        for one in silent:
            one.close()
        running[0].should_exit = True
        thread.join(20)
    assert not thread.is_alive()
