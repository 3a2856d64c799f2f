"""A server of the Model Context Protocol (MCP), by which an assistant searches a gallery and changes nothing."""

from itertools import islice
from typing import Any, Final, Literal

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations

from union_igrot import __version__
from union_igrot.demo.backends import DisplayedImage, GalleryBackend
from union_igrot.errors import UnionError, one_line
from union_igrot.gallery.gallery import Gallery
from union_igrot.service.http import RequestQueue

MAX_HITS: Final = 50  # images of one call
MinScore = float | Literal["auto"] | None


def make_assistant_server(gallery: Gallery) -> "MCPServer[Any]":
    """Return a server with one tool, `search_images`, whose description names the columns of the gallery."""
    backend, queue = GalleryBackend(gallery, "gallery"), RequestQueue(64)  # its thread alone uses the gallery

    def find(
        text: str, similar_to: str, where: str, k: int, offset: int, min_score: MinScore
    ) -> list[DisplayedImage] | str:
        if text.strip() or similar_to:
            image = backend.image(similar_to) if similar_to else None
            options: dict[str, Any] = {"exclude": [similar_to] if similar_to else [], "offset": offset}
            found = gallery.search(image, text or None, k, where or None, min_score=min_score, **options)
            if found.nothing_near:
                return f"nothing near: the best score is {found.best_score:.4f}, below {found.min_score:.4f}"
            return [backend.show(hit) for hit in found]
        batches = gallery.index.scan(["id"], where or None)
        ids = islice((str(name) for batch in batches for name in batch["id"]), offset, offset + k)
        return [backend.item(name) for name in ids]

    async def search_images(
        text: str = "",
        similar_to: str = "",
        where: str = "",
        k: int = 8,
        offset: int = 0,
        min_score: MinScore = None,
    ) -> Any:
        size, first = min(max(k, 1), MAX_HITS), max(offset, 0)
        try:
            found = await queue.run(lambda: find(text, similar_to, where, size, first, min_score))
        except UnionError as error:
            raise ToolError(one_line(str(error))) from None
        if isinstance(found, str):
            return [found]
        pairs = [
            ({"rank": rank, "id": one.id, "score": one.score, **one.details}, one.thumbnail)
            for rank, one in enumerate(found, first + 1)
        ]
        shown = [part for row, data in pairs for part in (row, Image(data=data, format=_format(data)))]
        return shown or ["no image found"]

    server: MCPServer[Any] = MCPServer("union-igrot", version=__version__, log_level="WARNING")
    description = (
        f"Search {len(gallery):,} images of the user. text: what to look for, or what should differ from similar_to, "
        "the id of an image found before. where: an SQL condition on columns; alone it lists the images that meet it. "
        f"Columns: {', '.join(backend.columns)}. k: number of images, at most {MAX_HITS}. offset: images to leave out, "
        "for the next page. min_score: lowest score of an image; auto for what is near, if the user may not have any. "
        "Returns for each image its rank, id (the path of its file), score, columns and thumbnail, "
        "best first. Scores of different queries cannot be compared."
    )
    read_only = ToolAnnotations(read_only_hint=True, open_world_hint=False)
    server.add_tool(search_images, description=description, annotations=read_only, structured_output=False)
    return server


def _format(data: bytes) -> str:
    return "png" if data.startswith(b"\x89PNG") else "jpeg"
