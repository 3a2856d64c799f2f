"""`union-serve` up to the moment it serves: its settings, its key, its port; and its end by SIGTERM."""

import importlib.util
from types import SimpleNamespace

import pytest

from small_gallery import fill_gallery
from small_world import trainable
from union_igrot.cli.serve import KEY, main as union_serve
from union_igrot.demo import backends
from union_igrot.service import http

SECRET = "0123456789abcdef"


@pytest.fixture(scope="module")
def gallery():
    return fill_gallery(trainable().eval())


@pytest.fixture
def told(monkeypatch, gallery):
    """What is served, without a socket."""
    found = SimpleNamespace(app=None, port=None, opened=None)

    def serve(app, held, ready):
        found.app = app
        ready("http://127.0.0.1:1")

    monkeypatch.setattr(http, "serve", serve)
    monkeypatch.setattr(http, "listen", lambda host, port: setattr(found, "port", (host, port)))
    monkeypatch.setattr(backends, "open_gallery", lambda *given: setattr(found, "opened", given) or gallery)
    monkeypatch.delenv(KEY, raising=False)
    return found


def test_it_serves_this_machine_alone_without_a_key(told, capsys):
    union_serve(["index=a.lance"])
    assert (told.port, told.opened) == (("127.0.0.1", 7860), ("a.lance", None, "auto"))
    assert (told.app._gate, told.app._hosts) == (None, list(http.LOOPBACK))
    assert capsys.readouterr().err == "serving http://127.0.0.1:1; Ctrl-C ends\n"


def test_the_key_comes_from_a_file_or_the_environment_and_is_not_shown(told, capsys, monkeypatch, tmp_path):
    file = tmp_path / "key"
    file.write_text(SECRET + "\n")
    union_serve(["index=a", "host=0.0.0.0", f"key_file={file}"])
    assert (told.app._gate._key, told.app._hosts) == (SECRET.encode(), None)
    monkeypatch.setenv(KEY, SECRET[::-1])
    union_serve(["index=a", "page=false", "name=search.example"])
    assert (told.app._gate._key, told.app._hosts[-1]) == (SECRET[::-1].encode(), "search.example")
    assert SECRET not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("arguments", "key", "said"),
    [
        (["index=a", "host=0.0.0.0"], None, f"set {KEY} or key_file=FILE"),
        (["index=a", "host=192.168.0.7", "name=search.example"], None, "reachable from other machines"),
        (["index=a"], "", f"{KEY} holds no usable key (expected at least 16"),
        (["index=a"], "too short", f"{KEY} holds no usable key"),
        (["index=a"], "with a space in between", f"{KEY} holds no usable key"),
        (["index=a", "key_file=none"], None, "key_file: none"),
        (["index=a", "key_file=."], None, "cannot read key_file=. (IsADirectoryError)"),
        (["host=::1"], None, "index"),
        (["index=a", "mcp=http"], None, "mcp: http"),
    ],
)
def test_a_mistake_is_one_line(told, arguments, key, said, refused, monkeypatch):
    if key is not None:
        monkeypatch.setenv(KEY, key)
    shown = refused(union_serve, *arguments)
    assert said in shown
    assert told.app is None
    assert not key or key not in shown


@pytest.mark.parametrize(("more", "package", "extra"), [("port=0", "pydantic", "serve"), ("mcp=stdio", "mcp", "mcp")])
def test_what_is_not_installed_is_named_with_the_command_that_installs_it(
    told, refused, monkeypatch, more, package, extra
):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    said = refused(union_serve, "index=a", more)
    assert f'union-serve needs {package}; pip install "union-igrot[{extra}]"' in said
