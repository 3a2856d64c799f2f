import asyncio
import base64
import io
import json
import threading
import time

import httpx
import pytest
from PIL import Image

from demo_backends import Squares
from union_igrot.demo import server
from union_igrot.demo.controller import DemoController
from union_igrot.demo.server import MAX_REQUEST_BYTES, Login, make_app
from union_igrot.demo.uploads import Limits

HERE = {"X-Session": "new"}


def asked(app, *requests, base="http://127.0.0.1:7860"):
    """Ask an application some things one after another, without a socket."""

    async def all_of_them():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=base) as client:
            return [
                await client.request(*request[:2], **(request[2] if len(request) > 2 else {})) for request in requests
            ]

    answers = asyncio.run(all_of_them())
    return answers[0] if len(answers) == 1 else answers


def step(action, given=None, token="new"):
    return "POST", "/act", {"json": {"action": action, "given": given or {}}, "headers": {"X-Session": token}}


@pytest.fixture
def controller() -> DemoController:
    return DemoController([Squares()], page=5, limits=Limits(megabytes=0.05))


@pytest.fixture
def app(controller):
    return make_app(controller)


def test_the_page_comes_with_its_files_and_a_policy_that_admits_no_other_host(app):
    page, style, script, icon = asked(app, *(("GET", f"/{at}") for at in ("", *("static/" + n for n in server.STATIC))))
    assert page.headers["content-type"].startswith("text/html")
    assert [part.headers["content-type"].partition(";")[0] for part in (style, script, icon)] == [
        *server.STATIC.values()
    ]
    for part in (page, style, script, icon):
        assert part.status_code == 200
        policy = part.headers["content-security-policy"]
        assert policy.startswith("default-src 'none';")
        assert "http" not in policy
        assert "unsafe" not in policy
        assert part.headers["x-content-type-options"] == "nosniff"


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
        "/gradio_api/file=/etc/passwd",
        "/templates/page.html",
        "/docs",
    ],
)
def test_no_file_of_the_server_has_an_address(app, path):
    answer = asked(app, ("GET", path))
    assert answer.status_code == 404
    assert b"root:" not in answer.content


def test_a_walk_over_http(app):
    first = asked(app, step("search", {"text": "ab", "strokes": [[[1, 2], [3, 4]]]})).json()
    token = first["token"]
    picked, found = asked(app, step("pick", {"engine": 0, "id": "s4"}, token), step("search", {"text": "red"}, token))
    assert (picked.status_code, picked.json()["results"]) == (200, None)
    shown = found.json()
    assert shown["history"].count("<li") == 3
    assert shown["token"] == token
    undone = asked(app, step("undo", {}, token)).json()
    assert (undone["text"], undone["strokes"]) == ("ab", [[[1, 2], [3, 4]]])


def test_a_photo_over_http(app):
    file = io.BytesIO()
    Image.new("RGB", (30, 30), "red").save(file, "PNG")
    send = ("POST", "/photo?name=my%20cat.png", {"content": file.getvalue(), "headers": HERE})
    held = asked(app, send).json()
    assert "my cat.png" in held["reference"]
    broken = ("POST", "/photo?name=x.png", {"content": b"broken", "headers": HERE})
    assert asked(app, broken).json()["problem"].startswith("Cannot decode x.png")


def test_mistakes_are_sentences(app, controller, caplog):
    assert asked(app, step("search")).json()["problem"].startswith("There is nothing to search with")
    for body in (
        b"",
        b"{",
        b"[]",
        b'"x"',
        b'{"action": 1, "given": {}}',
        b'{"action": "show", "given": []}',
        b"[" * 10**5,
    ):
        answer = asked(app, ("POST", "/act", {"content": body, "headers": HERE}))
        assert (answer.status_code, answer.json()["problem"][:8]) == (200, "Invalid ")
    inside = asked(app, step("search", {"text": "break"})).json()["problem"]
    assert "Internal error" in inside
    assert "defect" not in inside
    assert "a defect inside" in caplog.text  # the terminal has the whole story
    assert "results" in asked(app, step("show")).json()


def test_what_is_too_large_is_refused_unread(app):
    read = 0

    async def endless():
        nonlocal read
        while True:
            read += 1000
            yield b"x" * 1000

    for address, most in (("/act", MAX_REQUEST_BYTES), ("/photo", 50_000)):
        told = asked(app, ("POST", address, {"content": b"x" * (most + 1), "headers": HERE}))
        assert told.status_code == 413
        read = 0
        assert asked(app, ("POST", address, {"content": endless(), "headers": HERE})).status_code == 413
        assert read <= most + 2000


def test_a_request_that_does_not_arrive_is_given_up(app, monkeypatch):
    monkeypatch.setattr(server, "REQUEST_TIMEOUT", 0.05)

    async def stalled():
        yield b"x"
        await asyncio.sleep(5)

    assert asked(app, ("POST", "/act", {"content": stalled(), "headers": HERE})).status_code == 408


def test_only_the_page_itself_may_take_steps(app):
    body = {"json": {"action": "show", "given": {}}}
    assert asked(app, ("POST", "/act", body)).status_code == 403  # a form of another site cannot set the header
    preflight = {"headers": {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}}
    answer = asked(app, ("OPTIONS", "/act", preflight))
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_foreign_name_for_this_machine_is_refused(controller):
    app = make_app(controller)
    assert asked(app, ("GET", "/"), base="http://evil.example").status_code == 400
    for host in ("", "[::1", "evil.example:7860", "127.0.0.1.evil.example", "[::2]:80"):
        assert asked(app, ("GET", "/", {"headers": {"Host": host}})).status_code == 400
    for name in ("127.0.0.1:1", "localhost:7860", "[::1]:7860", "LOCALHOST"):
        assert asked(app, ("GET", "/"), base=f"http://{name}").status_code == 200
    assert asked(make_app(controller, hosts=None), ("GET", "/"), base="http://pc.example").status_code == 200


def test_a_password_guards_every_address(controller, monkeypatch):
    monkeypatch.setattr(server, "LOGIN_DELAY", 0.01)
    app = make_app(controller, login=Login("anna", "ge:heim ä"))
    right = {"Authorization": "Basic " + base64.b64encode("anna:ge:heim ä".encode()).decode()}
    for address in ("/", "/static/page.js", "/act", "/photo", "/nothing"):
        refused = asked(app, ("GET", address))
        assert (refused.status_code, refused.headers["www-authenticate"][:5]) == (401, "Basic")
        assert "content-security-policy" in refused.headers
    for wrong in ("", "Basic", "Basic !", "Bearer x", "Basic " + base64.b64encode(b"anna:geheim").decode()):
        assert asked(app, ("GET", "/", {"headers": {"Authorization": wrong}})).status_code == 401
    assert asked(app, ("GET", "/", {"headers": right})).status_code == 200
    action, address, more = step("show")
    assert asked(app, (action, address, {**more, "headers": more["headers"] | right})).json()["token"]
    assert "heim" not in repr(Login("anna", "geheim"))


def test_the_line_is_bounded_and_steps_never_overlap(controller, monkeypatch):
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
    app = make_app(controller, bound=5)

    async def all_at_once():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            heads_name, address, more = step("show")
            return await asyncio.gather(*(client.request(heads_name, address, **more) for _ in range(12)))

    answers = [answer.json() for answer in asyncio.run(all_at_once())]
    assert most == 1
    refused = [answer for answer in answers if "problem" in answer]
    assert steps == len(answers) - len(refused) == 5
    assert all(answer["problem"].startswith("The server is busy") for answer in refused)
    assert "token" in asked(app, step("show")).json()  # and then it goes on


def test_many_users_at_once_keep_their_own_histories(app):
    async def one(client, number):
        text, token, seen = "x" * (number + 1), "new", []
        for _ in range(4):
            heads_name, address, more = step("search", {"text": text}, token)
            shown = (await client.request(heads_name, address, **more)).json()
            token = shown["token"]
            seen.append(shown["history"])
        return token, text, seen

    async def everyone():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await asyncio.gather(*(one(client, number) for number in range(12)))

    walks = asyncio.run(everyone())
    assert len({token for token, _, _ in walks}) == 12
    for _, text, seen in walks:
        for turns, history in enumerate(seen, 1):
            assert history.count(f"“{text}”") == turns
            assert history.count("“") == turns


def test_other_kinds_of_connection_are_not_served(app):
    answer = asked(app, ("PUT", "/act", {"content": json.dumps({}), "headers": HERE}))
    assert answer.status_code == 405
