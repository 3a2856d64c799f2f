"""The server for assistants, asked by the client of the same package."""

import asyncio
import base64
import io
import json

import pytest
from PIL import Image

from small_gallery import fill_gallery, noise_image
from small_world import trainable

mcp = pytest.importorskip("mcp", reason='the extra "mcp" is not installed')
assistant = pytest.importorskip("union_igrot.service.assistant", reason="as above")


@pytest.fixture(scope="module")
def gallery():
    return fill_gallery(trainable().eval())


def ask(gallery, *calls):
    """Call the tool; return the tools, and the result of each call."""

    async def session():
        async with mcp.Client(assistant.make_assistant_server(gallery)) as client:
            return (await client.list_tools()).tools, [await client.call_tool("search_images", one) for one in calls]

    return asyncio.run(session())


def rows(result):
    assert not result.is_error, result.content
    return [json.loads(part.text) for part in result.content if part.type == "text"]


def test_an_assistant_searches_by_text_image_and_filter(gallery):
    (tool,), results = ask(
        gallery,
        {"text": "red", "k": 3},
        {"similar_to": "p4", "text": "blue", "k": 2, "offset": 1},
        {"similar_to": "p4", "where": "class = 'dog'"},
        {"where": "year > 8", "k": 2, "offset": 1},
        {"where": "year > 99"},
        {"k": 10**9},
        {"text": "red", "min_score": 2},
        {"text": "red", "min_score": -1, "k": 1},
    )
    assert tool.annotations.read_only_hint
    assert "class" in tool.description
    assert set(tool.input_schema["properties"]) == {"text", "similar_to", "where", "k", "offset", "min_score"}
    found = [[row["id"] for row in rows(one)] for one in results[:4]]
    similar = gallery.search(noise_image(4), exclude=["p4"], where="class = 'dog'").ids
    assert found[0] == gallery.search(text="red", k=3).ids
    assert len(found[1]) == 2
    assert "p4" not in found[1]
    assert sorted(found[2]) == sorted(similar)
    assert found[3] == ["p10", "p11"]
    assert [part.text for part in results[4].content] == ["no image found"]
    assert [row["id"] for row in rows(results[5])] == gallery.ids()
    assert results[6].content[0].text.startswith("nothing near: the best score is ")
    assert [row["id"] for row in rows(results[7])] == found[0][:1]
    first, image = results[0].content[:2]
    assert json.loads(first.text)["rank"] == 1
    assert rows(results[1])[0]["rank"] == 2
    with Image.open(io.BytesIO(base64.b64decode(image.data))) as small:
        assert (image.mime_type, small.format) == ("image/jpeg", "JPEG")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"similar_to": "/etc/passwd"}, "/etc/passwd"),
        ({"text": "a", "where": "year >"}, "year >"),
        ({"text": "a", "k": "many"}, "k"),
        ({"text": "a", "min_score": "auto"}, "at least 100 images"),
    ],
)
def test_a_mistake_is_told_to_the_assistant(gallery, call, said):
    _, (result,) = ask(gallery, call)
    assert result.is_error
    assert said in result.content[0].text
    assert "root:" not in result.content[0].text
