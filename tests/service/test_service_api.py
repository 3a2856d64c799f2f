"""`union-serve` over HTTP, without a socket."""

import asyncio
import base64
import io
import json

import httpx
import pytest
import torch
from PIL import Image

from demo_backends import Squares
from small_gallery import fill_gallery, noise_image
from small_world import trainable
from union_igrot.demo.controller import DemoController
from union_igrot.demo.server import Routes
from union_igrot.service import http
from union_igrot.service.api import BODIES, EXAMPLES, KeyGate, ServiceRoutes
from union_igrot.service.uploads import Limits, decode_upload

LIMITS = Limits(megabytes=0.02)  # of an image
KEY = "a-key-of-24-characters-!"


@pytest.fixture(scope="module")
def gallery():
    return fill_gallery(trainable().eval())


def app_of(gallery, key=None, hosts=http.LOOPBACK, bound=64, page=False):
    """The application; it decodes images in this process."""
    queue = http.RequestQueue(bound)
    uploads = http.UploadQueue(LIMITS, decode=lambda data, name: decode_upload(data, name, LIMITS))
    routes = ServiceRoutes(gallery, queue, uploads).routes()
    routes += Routes(DemoController([Squares()]), queue, uploads).routes() if page else []
    return http.make_application(routes, hosts, None if key is None else KeyGate(key))


def ask(app, *requests, at_once=False):
    """Send requests, each a method, a path and options."""

    async def send():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            sent = [client.request(method, path, **options) for method, path, options in requests]
            return await asyncio.gather(*sent) if at_once else [await one for one in sent]

    responses = asyncio.run(send())
    return responses[0] if len(responses) == 1 else responses


def post(path, body, **headers):
    return "POST", path, {"json": body, "headers": headers}


def png(number=0) -> bytes:
    file = io.BytesIO()
    noise_image(number).save(file, "PNG")
    return file.getvalue()


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def app(gallery):
    return app_of(gallery)


def hits(response):
    assert response.status_code == 200, response.text
    return [hit["id"] for hit in response.json()["hits"]]


@pytest.mark.slow
def test_hits_are_those_of_the_gallery(app, gallery):
    image, where, paged = noise_image(3), "class = 'cat' and year > 2", {"text": "blue", "k": 4, "offset": 2}
    vector = gallery.model.encode_queries(noise_image(3), "red")[0]
    searches = (
        ({"text": "red"}, {"text": "red"}),
        ({"image": text_of(png(3)), **paged}, {"image": image, **paged}),
        ({"image": [text_of(png(3)), "data:image/png;base64," + text_of(png(4))]}, {"image": [image, noise_image(4)]}),
        ({"liked": ["p1"], "disliked": ["p2"], "exclude": ["p5"]}, {"liked": "p1", "disliked": "p2", "exclude": "p5"}),
        (
            {"text": "red", "terms": [{"image": text_of(png(3)), "text": "large", "weight": 2}, {"text": "./a.jpg"}]},
            {"text": "red", "terms": [((image, "large"), 2), {"text": "./a.jpg"}]},
        ),
        (
            {"terms": ["2:red", "-blue", ["large", 0.5], "image:/etc/passwd"]},
            {"terms": [("red", 2), ("blue", -1), ("large", 0.5), "text:image:/etc/passwd"]},
        ),
        ({"vector": vector.tolist(), "k": 4}, {"vector": vector, "k": 4}),
        ({"text": "red", "where": where, "min_score": -1}, {"text": "red", "where": where}),
    )
    for body, given in searches:
        response = ask(app, post("/search", body))
        expected = gallery.search(**given)
        assert hits(response) == expected.ids
        found = response.json()["hits"]
        assert [hit["score"] for hit in found] == pytest.approx(expected.scores, abs=1e-4)
        assert found[0]["rank"] == body.get("offset", 0) + 1
        assert found[0]["columns"]["year"] == expected[0].columns["year"]
        assert "thumbnail" not in found[0]
    far = ask(app, post("/search", {"text": "red", "min_score": 2})).json()
    assert (far["hits"], far["nothing_near"]) == ([], True)
    assert far["best_score"] == pytest.approx(gallery.search(text="red").scores[0], abs=1e-4)
    (first,) = ask(app, post("/search", {"text": "red", "k": 1, "thumbnails": True})).json()["hits"]
    with Image.open(io.BytesIO(base64.b64decode(first["thumbnail"]))) as small:
        assert small.format == "JPEG"


def test_an_uploaded_file_with_fields_in_the_address(app, gallery):
    upload = {"content": png(3), "headers": {"Content-Type": "image/png"}}
    expected = gallery.search(noise_image(3), "in red", 3, "year > 1")
    assert hits(ask(app, ("POST", "/search?k=3&text=in+red&where=year+%3E+1", upload))) == expected.ids
    expected = gallery.search(noise_image(3), terms=[("red", -0.5), "blue"])
    assert hits(ask(app, ("POST", "/search?terms=-.5:red&terms=blue", upload))) == expected.ids
    expected = gallery.search(noise_image(3), exclude=["p1", "p2"], disliked="p5")
    assert hits(ask(app, ("POST", "/search?exclude=p1&exclude=p2&disliked=p5", upload))) == expected.ids
    for fields in ("k=many", "image=QQ==", "where=year+%3E", "tekst=a", "terms=", "k=1&k=0"):
        assert ask(app, ("POST", f"/search?{fields}", upload)).status_code == 400, fields


def test_embeddings_of_queries_and_of_gallery_images(app, gallery):
    model = gallery.model
    for body, expected in (
        ({"text": "red"}, model.encode_queries(None, "red")),
        ({"text": ["red", "blue"]}, model.encode_queries(None, ["red", "blue"])),
        ({"image": text_of(png(1)), "text": "red"}, model.encode_queries(noise_image(1), "red")),
        ({"image": [text_of(png(1))], "kind": "gallery"}, model.encode_gallery(noise_image(1))),
    ):
        found = ask(app, post("/embed", body)).json()
        assert found["dim"] == model.backbone.dim
        assert torch.allclose(torch.tensor(found["embeddings"]), expected, atol=1e-5)
    for empty in ({}, {"text": None}, {"text": ""}, {"text": []}, {"image": []}, {"image": [], "text": []}):
        response = ask(app, post("/embed", empty))
        assert (response.status_code, "nothing to embed" in response.json()["error"]) == (400, True), empty


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[]", "object"),
        (b'"x"', "object"),
        (b"[" * 20_000, "JSON"),
        (b'{"text": ' * 5000, "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"{}", "the query is empty"),
        (b'{"text": "\\ud800"}', "JSON"),
        (b'{"text": 5}', "text: 5"),
        (b'{"text": {"a": 1}}', "text: {"),
        (b'{"tekst": "a"}', "tekst"),
        (b'{"text": "a", "k": 0}', "k: 0"),
        (b'{"text": "a", "k": true}', "k: True"),
        (b'{"text": "a", "k": 1.5}', "k: 1.5"),
        (b'{"text": "a", "k": 1e400}', "k: inf"),
        (b'{"text": "a", "k": ' + b"9" * 5000 + b"}", "JSON"),
        (b'{"text": "a", "offset": -1}', "offset: -1"),
        (b'{"text": "a", "min_score": NaN}', "min_score: nan"),
        (b'{"text": "a", "min_score": 1e999}', "min_score: inf"),
        (b'{"text": "a", "min_score": "auto"}', "min_score=auto"),
        (b'{"text": "a", "min_score": "high"}', "min_score: 'high'"),
        (json.dumps({"text": "a" * 1001}).encode(), "text: "),
        (b'{"image": "/etc/passwd"}', "image: '/etc/passwd'"),
        (b'{"image": "/etc/hostname+"}', "image"),
        (b'{"image": ["../photos.lance/a.jpg"]}', "image"),
        (b'{"image": "file:///etc/passwd"}', "image"),
        (b'{"image": {"path": "/etc/passwd"}}', "image"),
        (b'{"image": ""}', "Cannot decode image"),
        (json.dumps({"image": ["QQ=="] * 17}).encode(), "image"),
        (b'{"terms": [5]}', "terms: 5"),
        (b'{"terms": [["a", "b"]]}', "terms: ['a', 'b']"),
        (b'{"terms": [["a", 1e9]]}', "terms: "),
        (b'{"terms": [""]}', "is empty"),
        (b'{"terms": [{"image": "/etc/passwd"}]}', "terms: '/etc/passwd'"),
        (b'{"terms": [{"text": "a", "weight": 1e9}]}', "terms: 1000000000.0"),
        (b'{"terms": [{"text": "a", "weight": -1}]}', "only negative terms"),
        (b'{"terms": [{}]}', "is empty"),
        (b'{"vector": "/etc/passwd"}', "vector: '/etc/passwd'"),
        (b'{"vector": ["/etc/passwd"]}', "vector: '/etc/passwd'"),
        (b'{"vector": []}', "zero"),
        (b'{"vector": [0, 0]}', "zero"),
        (b'{"vector": [1e300, 1]}', "not finite"),
        (b'{"vector": [NaN]}', "vector: nan"),
        (b'{"vector": [1, 2]}', "width 2"),
        (json.dumps({"vector": [1] * 9000}).encode(), "vector: ["),
        (b'{"liked": ["p99"]}', "'p99' is not in memory:"),
        (b'{"liked": ["/etc/passwd"]}', "'/etc/passwd' is not in memory:"),
        (b'{"liked": "p1"}', "liked: 'p1'"),
        (json.dumps({"liked": ["p1"] * 101}).encode(), "liked"),
        (b'{"liked": [' + b"0," * 60_000 + b"0]}", "more than 50,000 values"),
        (b'{"text": "a", "where": "year >"}', "year >"),
        (b'{"text": "a", "where": "1 = 1; drop table x"}', ""),
        (b'{"text": "a", "where": "year in (select 1)"}', ""),
        (b'{"text": "a", "where": "load_extension(\'x\') = 1"}', ""),
        (b'{"text": "a", "where": "class = \'\\u0000"}', ""),
        (json.dumps({"text": "a", "where": "(" * 1000}).encode(), ""),
    ],
)
def test_mistakes_are_one_line(app, body, said):
    response = ask(app, ("POST", "/search", {"content": body, "headers": {"Content-Type": "application/json"}}))
    message = response.json()["error"]
    assert response.status_code == 400, message
    assert said in message
    assert "\n" not in message
    assert len(message) <= 500
    assert "root:" not in message


def test_a_filter_cannot_take_long(app):
    where = "class like '" + "%_" * 100 + "!'"
    assert hits(ask(app, post("/search", {"text": "a", "where": where}))) == []


def test_status_codes_other_than_400(app, gallery, monkeypatch):
    large = {"content": b"x" * 20_001, "headers": {"Content-Type": "image/png"}}
    form = {"content": b'{"text": "a"}', "headers": {"Content-Type": "text/plain"}}  # what other sites may send
    preflight = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST"}
    codes = {
        ("POST", "/search", 413): large,
        ("POST", "/embed", 415): form,
        ("GET", "/search", 405): {},
        ("OPTIONS", "/search", 405): {"headers": preflight},
        ("GET", "/static/../api.py", 404): {},
        ("GET", "/etc/passwd", 404): {},
    }
    for (method, path, code), options in codes.items():
        response = ask(app, (method, path, options))
        assert (response.status_code, list(response.json())) == (code, ["error"])
        assert not [name for name in response.headers if name.startswith("access-control")]
    many = ask(app_of(gallery, bound=1), *[post("/search", {"text": "a"})] * 9, at_once=True)
    assert {one.status_code for one in many} == {200, 503}
    assert all(one.headers["retry-after"] == "1" for one in many if one.status_code == 503)


def test_bodies_and_requests_are_limited_together(app, monkeypatch):
    monkeypatch.setattr(http, "MAX_BODIES", 10)
    response = ask(app, post("/search", {"text": "a long text"}))
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    monkeypatch.setattr(http, "MAX_CONNECTIONS", 2)
    assert sorted(one.status_code for one in ask(app, *[("GET", "/openapi.json", {})] * 4, at_once=True))[-1] == 503


def test_a_defect_is_logged_and_says_nothing_inside(gallery, caplog, monkeypatch):
    monkeypatch.setattr(type(gallery), "search", lambda *_, **__: {}["secret"])
    response = ask(app_of(gallery), post("/search", {"text": "a"}))
    assert (response.status_code, "secret" in response.text) == (500, False)
    assert "secret" in caplog.text


def test_the_key_is_asked_for_everywhere_but_for_health(gallery, capsys, caplog):
    app = app_of(gallery, key=KEY, page=True)
    for path in ("/", "/search", "/embed", "/openapi.json", "/static/page.js", "/act", "/nothing"):
        response = ask(app, ("GET", path, {}))
        assert (response.status_code, response.headers["www-authenticate"][:5]) == (401, "Basic")
    basic = base64.b64encode(f"any:{KEY}".encode()).decode()
    for given in (f"Bearer {KEY}", f"bearer {KEY}", f"Basic {basic}"):
        assert hits(ask(app, post("/search", {"text": "red"}, Authorization=given)))
    wrong = (
        "",
        "Bearer",
        "Bearer ",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        KEY,
        "Basic !",
        "Basic Og==",
        b"Bearer \xff",
    )
    for given in wrong:
        assert ask(app, post("/search", {"text": "red"}, Authorization=given)).status_code == 401
    assert ask(app, ("GET", "/health", {})).json() == {"status": "ok"}
    assert (
        ask(app, ("GET", "/", {"headers": {"Authorization": f"Basic {basic}"}})).headers["content-type"][:9]
        == "text/html"
    )
    assert KEY not in caplog.text + "".join(capsys.readouterr())


def test_the_description_names_every_field_and_its_examples_work(app, gallery):
    described = ask(app, ("GET", "/openapi.json", {})).json()
    schemas = described["components"]["schemas"]
    assert described["paths"].keys() == {"/search", "/embed", "/health"}
    for path, body in BODIES.items():
        content = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        schema = schemas[content["schema"]["$ref"].rpartition("/")[2]]
        assert schema["properties"].keys() == body.model_fields.keys()
        assert all(field["description"] for field in schema["properties"].values())
        assert content["example"] == EXAMPLES[path]
        assert ask(app, post(path, EXAMPLES[path])).status_code == 200
    assert "class (str), " in schemas["SearchRequestBody"]["properties"]["where"]["description"]
    assert "$defs" not in json.dumps(described)


def test_foreign_hosts_are_refused(app, gallery):
    for host in ("evil.example", "localhost.evil.example", ""):
        response = ask(app, post("/search", {"text": "red"}, Host=host))
        assert (response.status_code, "Unknown host" in response.json()["error"]) == (400, True)
    public = app_of(gallery, key=KEY, hosts=None)
    assert hits(ask(public, post("/search", {"text": "red"}, Host="any.example", Authorization=f"Bearer {KEY}")))
