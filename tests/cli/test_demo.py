"""`union-demo` up to the moment it serves: its settings, its password, its port."""

import getpass
import importlib.util
import io
import socket
import sys
from types import SimpleNamespace

import pytest
import uvicorn

from demo_backends import Squares
from union_igrot.cli import demo as command
from union_igrot.cli.demo import PASSWORD, main as demo
from union_igrot.demo import backends
from union_igrot.demo.controller import DemoController
from union_igrot.demo.server import make_app
from union_igrot.errors import ConfigError
from union_igrot.service import http as serving
from union_igrot.service.http import listen, serve


@pytest.fixture
def told(monkeypatch):
    """What is served, without a socket, a model or a gallery."""
    found = SimpleNamespace(app=None, port=None, opened=[])

    def serve(app, held, ready):
        found.app = app
        ready("http://127.0.0.1:1")

    def world(config):
        found.opened.append("world")
        return [Squares()]

    def gallery(uri, checkpoint, device):
        found.opened.append(uri)
        return Squares()

    monkeypatch.setattr(serving, "serve", serve)
    monkeypatch.setattr(serving, "listen", lambda host, port: setattr(found, "port", (host, port)))
    monkeypatch.setattr(command, "_synthetic_backends", world)
    monkeypatch.setattr(backends, "open_backend", gallery)
    return found


def test_without_arguments_it_opens_the_world_on_this_machine_alone(told, capsys):
    demo([])
    assert (told.port, told.opened) == (("127.0.0.1", 7860), ["world"])
    assert told.app._gate is None
    assert "open http://127.0.0.1:1 in a browser; Ctrl-C ends" in capsys.readouterr().err


def test_names_under_which_the_page_is_offered(told):
    demo(["host=::1", "name=search.example"])
    assert told.port == ("::1", 7860)
    assert told.app._hosts == ["127.0.0.1", "localhost", "::1", "search.example"]
    demo(["host=127.0.0.9"])
    assert told.app._hosts == ["127.0.0.1", "localhost", "::1", "127.0.0.9"]


def test_an_index_is_taken_as_typed(told):
    demo(["index=it's, (mine) ${x}.lance", "second_index=b.lance", "port=0"])
    assert told.opened == ["it's, (mine) ${x}.lance", "b.lance"]
    assert told.port == ("127.0.0.1", 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["host=0.0.0.0"], "set user=NAME"),
        (["host=192.168.0.7"], "set user=NAME"),
        (["second_index=b"], "needs index=PATH"),
        (["index=a", "second_checkpoint=b"], "needs second_index=PATH"),
        (["user=a:b"], "a name without a colon"),
        (["port=70000"], "port: 70000"),
        (["page=0"], "page: 0"),
        (["megapixels=0"], "megapixels: 0"),
        (["wating=3"], "wating"),
    ],
)
def test_a_mistake_is_one_line(told, arguments, said, refused):
    assert said in refused(demo, *arguments)
    assert told.app is None


def test_the_password_comes_from_the_environment_or_a_prompt(told, refused, monkeypatch):
    monkeypatch.delenv(PASSWORD, raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert f"set {PASSWORD}" in refused(demo, "user=anna")
    monkeypatch.setenv(PASSWORD, "geheim")
    demo(["user=anna", "host=0.0.0.0"])
    assert (told.app._gate.user, told.app._gate.password, told.app._hosts) == ("anna", "geheim", None)
    monkeypatch.delenv(PASSWORD)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(getpass, "getpass", lambda prompt: f"typed for {prompt}")
    demo(["user=bo"])
    assert told.app._gate.password == "typed for password for bo: "


def test_what_is_not_installed_is_named_with_the_command_that_installs_it(told, refused, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else real(name))
    assert 'the demo needs uvicorn; pip install "union-igrot[demo]"' in refused(demo)


@pytest.mark.enable_socket
def test_a_port_in_use_is_told_at_once():
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} is in use; use another one, such as port={port + 1}"):
            listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match="cannot bind"):
        listen("192.0.2.1", 0)  # an address of documentation, never this machine's


@pytest.mark.enable_socket
def test_the_port_is_free_again_after_serving(monkeypatch):
    ran = []

    def run(self, sockets):
        ran.append(sockets)
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", run)
    held = listen("127.0.0.1", 0)
    port, addresses = held.getsockname()[1], []
    serve(make_app(DemoController([Squares()])), held, addresses.append)
    assert (ran, addresses) == ([[held]], [f"http://127.0.0.1:{port}"])
    with socket.socket() as again:
        again.bind(("127.0.0.1", port))
