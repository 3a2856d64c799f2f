"""docs/service.md and the Dockerfile: their requests are answered, their settings and extras exist."""

import asyncio
import json
import re
import shlex
import tomllib
from pathlib import Path

import httpx
import pytest
from PIL import Image

from small_gallery import fill_gallery
from small_world import trainable
from union_igrot.cli.config import compose
from union_igrot.service import http
from union_igrot.service.api import KeyGate, ServiceRoutes
from union_igrot.service.uploads import Limits, decode_upload

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "service.md").read_text()
CURL = [line for line in PAGE.splitlines() if line.startswith("curl ")]
DOCKERFILE = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]


@pytest.fixture(scope="module")
def gallery():
    return fill_gallery(trainable().eval())


@pytest.fixture
def send(gallery, tmp_path, monkeypatch):
    """Send one request to the service, which knows the key KEY or none."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (120, 90), "red").save("photo.jpg")

    def request(method, url, **options):
        uploads = http.UploadQueue(Limits(), decode=lambda data, name: decode_upload(data, name, Limits()))
        routes = ServiceRoutes(gallery, http.RequestQueue(4), uploads).routes()
        gate = KeyGate("KEY") if "Authorization" in options.get("headers", {}) else None
        app = http.make_application(routes, http.LOOPBACK, gate)

        async def sent():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
                return await client.request(method, url, **options)

        return asyncio.run(sent())

    return request


@pytest.mark.parametrize("line", CURL)
def test_requests_of_curl(send, line):
    _, *words = shlex.split(line)
    options, url = {"headers": {}}, ""
    while words:
        word = words.pop(0)
        if word == "-H":
            name, _, value = words.pop(0).partition(": ")
            options["headers"][name] = value
        elif word in ("-d", "--data-binary"):
            data = words.pop(0)
            options["content"] = Path(data[1:]).read_bytes() if data.startswith("@") else data.encode()
        else:
            url = word
    response = send("POST" if "content" in options else "GET", url, **options)
    assert response.status_code == 200, response.text
    assert response.json().keys() & {"hits", "embeddings", "status"}


def test_the_program_prints_hits(send, monkeypatch, capsys):
    monkeypatch.setattr(httpx, "post", lambda url, **options: send("POST", url, **options))
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(block.replace('"min_score": 0.2', '"min_score": -1'), "service.md", "exec"), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["1", "2", "3", "4", "5"]


def test_the_configuration_of_an_assistant():
    (block,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    (server,) = json.loads(block)["mcpServers"].values()
    assert server["command"] == "union-serve"
    assert compose("serve", server["args"]).mcp == "stdio"


def test_the_dockerfile_fits_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    steps: dict[str, list[str]] = {}
    for line in DOCKERFILE:
        name, _, rest = line.partition(" ")
        steps.setdefault(name, []).append(rest)
    for sources in (line.split()[:-1] for line in steps["COPY"]):
        assert all((ROOT / one).exists() for one in sources)
        assert all(f"!{one}" in (ROOT / ".dockerignore").read_text().splitlines() for one in sources)
    (extras,) = re.findall(r'pip install [^"]*"\.\[(.+)\]"', steps["RUN"][0])
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    assert "photos" in {*extras.split(",")} or any(
        "efficientnet" in one for one in project["optional-dependencies"]["gallery"]
    )
    assert steps["USER"] == ["10001"]
    assert "HF_HUB_OFFLINE=1" in steps["ENV"][0].split()
    arguments = re.findall(r"--build-arg (\w+)=", PAGE)
    assert arguments
    assert {*arguments} <= {*steps["ARG"]}  # others are not passed to RUN
    command, *settings = json.loads(steps["ENTRYPOINT"][0])
    assert command in project["scripts"]
    config = compose(command.removeprefix("union-"), [*settings, *json.loads(steps["CMD"][0])])
    assert (config.host, config.index) == ("0.0.0.0", "/data/photos.lance")
    assert steps["EXPOSE"] == [str(config.port)]
    assert f"http://127.0.0.1:{config.port}/health" in steps["HEALTHCHECK"][0]
    compile(json.loads(steps["HEALTHCHECK"][0].partition("CMD ")[2])[2], "health", "exec")
