"""The service: searches and embeddings over HTTP, described by OpenAPI, with an API key.

Images come as bytes alone, so that a request names no file; ids are looked up in the index.
"""

import asyncio
import base64
import hmac
import logging
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, TypeVar, final

from PIL import Image
from pydantic import BaseModel, BeforeValidator, Field, FiniteFloat, ValidationError, WithJsonSchema
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from union_igrot import __version__
from union_igrot.errors import ConfigError, UnionError, one_line
from union_igrot.gallery.gallery import Gallery
from union_igrot.gallery.queries import Term, parse_term
from union_igrot.gallery.results import Hit
from union_igrot.service import http
from union_igrot.service.http import BusyError, RequestQueue, UploadQueue, error_response, json_response

_LISTS: Final = ("terms", "liked", "disliked", "exclude")
MAX_VALUES: Final = 50_000  # values of a JSON body
DECODE_TIMEOUT: Final = 25.0  # seconds within which all images of a request have to be decoded

log: Final = logging.getLogger("union_igrot.service")
ModelT = TypeVar("ModelT", bound=BaseModel)


def _from_base64(given: object) -> bytes:
    if not isinstance(given, str):
        raise ValueError("text in base64 is expected; paths are not read")
    text = given.partition(",")[2] if given.startswith("data:") else given
    return base64.b64decode("".join(text.split()), validate=True)


Text = Annotated[str, Field(max_length=1000)]
File = Annotated[bytes, BeforeValidator(_from_base64), WithJsonSchema({"type": "string", "contentEncoding": "base64"})]
Ids = Annotated[list[Annotated[str, Field(max_length=4096)]], Field(max_length=100)]
Files = File | Annotated[list[File], Field(max_length=16)]
TermWeight = Annotated[float, Field(ge=-1000, le=1000, allow_inf_nan=False)]
_FILES: Final = "content of an image file in base64 or as a data URI, or a list of several; paths are not read"


@final
class TermBody(BaseModel, extra="forbid"):
    """A further part of a query: a text, an image, or both."""

    text: Text | None = Field(None, description="modification text of the image, or a text alone")
    image: File | None = Field(None, description="content of an image file in base64 or as a data URI")
    weight: TermWeight = Field(1.0, description="negative to move away from it")


@final
class SearchRequestBody(BaseModel, extra="forbid"):
    """Fields of `/search`, those of `Gallery.search`."""

    text: Text | None = Field(None, description="modification text of an image, or a text query alone")
    image: Files | None = Field(None, description=_FILES)
    vector: Annotated[list[FiniteFloat], Field(max_length=8192)] | None = Field(
        None, description="embedding of the query, such as one from /embed"
    )
    terms: list[TermBody | Text | tuple[Text, TermWeight]] = Field(
        [], max_length=16, description="further weighted texts and images; a text such as 2:a dog, or [a dog, 2], too"
    )
    liked: Ids = Field([], description="ids of images to move towards; they are a query of their own too")
    disliked: Ids = Field([], description="ids of images to move away from; they are not among the hits")
    exclude: Ids = Field([], description="ids that are not among the hits")
    where: str | None = Field(None, max_length=2000, description="filter on columns")
    k: int = Field(10, ge=1, le=1000, description="number of hits")
    offset: int = Field(0, ge=0, le=10_000, description="number of best hits to leave out, for the next page")
    min_score: FiniteFloat | Literal["auto"] | None = Field(
        None, description="lowest score of a hit, or auto: what random queries of the kind exceed in 1 % of the cases"
    )
    thumbnails: bool = Field(False, description="whether hits have a thumbnail, a JPEG in base64")


@final
class EmbedRequestBody(BaseModel, extra="forbid"):
    """Fields of `/embed`."""

    text: Text | Annotated[list[Text], Field(max_length=64)] | None = Field(
        None, description="a text or a list; with images, one per image"
    )
    image: Files | None = Field(None, description=_FILES)
    kind: Literal["query", "gallery"] = Field("query", description="query, or gallery: images as the index holds them")


BODIES: Final[dict[str, type[BaseModel]]] = {"/search": SearchRequestBody, "/embed": EmbedRequestBody}
EXAMPLES: Final = {
    "/search": {"text": "a car", "terms": [{"text": "red", "weight": -0.5}], "k": 3, "where": "width >= 1"},
    "/embed": {"text": ["a red car"]},
}


@final
class KeyGate:
    """Asks for the API key as a Bearer token, or as the password of a browser; `/health` needs none."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    async def __call__(self, request: Request) -> tuple[str, Response | None]:
        """Compare in constant time; a key is too long to be guessed, so that wrong ones need no delay."""
        header = request.headers.get("authorization", "")
        sent = header[7:].strip().encode("latin-1") if header[:7].lower() == "bearer " else b""
        sent = sent or http.basic_credentials(header).partition(b":")[2]
        if request.scope["path"] == "/health" or hmac.compare_digest(sent, self._key):
            return "", None
        ask = {"WWW-Authenticate": 'Basic realm="union-serve", charset="UTF-8"'}  # Chromium reads one scheme alone
        return "", error_response(401, "wrong or missing API key (expected Authorization: Bearer KEY)", ask)


@final
class ServiceRoutes:
    """Request handlers over a gallery, which only the thread of the queue uses."""

    def __init__(self, gallery: Gallery, queue: RequestQueue, uploads: UploadQueue) -> None:
        self._gallery, self._queue, self._uploads = gallery, queue, uploads

    def routes(self) -> list[BaseRoute]:
        """Return all routes."""
        return [
            Route("/search", _answering(self._search), methods=["POST"]),
            Route("/embed", _answering(self._embed), methods=["POST"]),
            Route("/openapi.json", _answering(self._describe)),
            Route("/health", lambda _: json_response({"status": "ok"})),
        ]

    async def _describe(self, _: Request) -> dict[str, Any]:
        columns = await self._queue.run(lambda: dict(self._gallery.index.columns))
        return openapi({name: kind for name, kind in columns.items() if kind != "bytes"})

    async def _search(self, request: Request) -> dict[str, Any]:
        given, files = await self._read(request, SearchRequestBody)
        bodies = [one for one in given.terms if isinstance(one, TermBody)]
        images = await self._decode([*files, *(one.image for one in bodies if one.image is not None)])
        of_terms = iter(images[len(files) :])
        terms = [_read_term(one, of_terms) for one in given.terms]
        options = {**given.model_dump(exclude={"image", "terms"}), "terms": terms}
        found = await self._queue.run(lambda: self._gallery.search(images[: len(files)] or None, **options))
        hits = [{"rank": rank, **_show(hit)} for rank, hit in enumerate(found, given.offset + 1)]
        return {"hits": hits, "nothing_near": found.nothing_near, "best_score": found.best_score}

    async def _embed(self, request: Request) -> dict[str, Any]:
        given, files = await self._read(request, EmbedRequestBody)
        images = await self._decode(files)
        model = self._gallery.model
        if not images and not given.text:
            raise ConfigError("nothing to embed (expected text, image or both)")
        if given.kind == "gallery" and (given.text is not None or not images):
            raise ConfigError("kind=gallery needs images without text")
        if given.kind == "gallery":
            rows = await self._queue.run(lambda: model.encode_gallery(images, workers=0))
        else:
            rows = await self._queue.run(lambda: model.encode_queries(images or None, given.text, workers=0))
            if not rows.any(1).all():
                raise ConfigError(f"{model.backbone.name} knows no word of a text; use other words")
        return {"embeddings": rows.tolist(), "dim": rows.shape[1]}

    async def _read(self, request: Request, kind: type[ModelT]) -> tuple[ModelT, list[bytes]]:
        """Read a request; other sites cannot send these types without a permission, which none gets."""
        sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        try:
            if sent == "application/json":
                body = await self._uploads.read(request, 2**20 + self._uploads.limits.bytes * 4 // 3)
                if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_VALUES:  # else seconds and gigabytes
                    raise ConfigError(f"the request has more than {MAX_VALUES:,} values; send fewer")
                given = kind.model_validate_json(body, strict=True)
                held = getattr(given, "image", None)
                files: list[bytes] = [held] if isinstance(held, bytes) else held or []
            elif sent.startswith("image/"):
                files = [await self._uploads.read(request, self._uploads.limits.bytes)]
                address = request.query_params
                if "image" in address:
                    raise ConfigError("image is given in the body and in the address; leave out one of them")
                lists = [name for name in _LISTS if name in address]
                given = kind.model_validate({**address, **{name: address.getlist(name) for name in lists}})
            else:
                raise HTTPException(
                    415, "expected Content-Type application/json, or image/jpeg and fields in the address"
                )
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = next(iter(first["loc"]), "the request")
            raise ConfigError(f"invalid value for {name}: {repr(first['input'])[:80]} ({first['msg']})") from None
        return given, files

    async def _decode(self, files: Sequence[bytes]) -> list[Image.Image]:
        try:
            async with asyncio.timeout(DECODE_TIMEOUT):
                return [await self._uploads.decode(one, "image") for one in files]
        except TimeoutError:
            raise BusyError(f"decoding the images took longer than {DECODE_TIMEOUT:g} s; send fewer") from None


def _answering(handler: Callable[[Request], Awaitable[dict[str, Any]]]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            return json_response(await handler(request))
        except BusyError as error:
            return error_response(503, str(error), {"Retry-After": "1"})
        except UnionError as error:
            return error_response(400, one_line(str(error)))
        except HTTPException:
            raise
        except Exception:
            log.exception("a request failed")
            return error_response(500, "internal error; the log of the server shows the details")

    return answer


def _read_term(given: TermBody | str | tuple[str, float], images: Iterator[Image.Image]) -> Term:
    """Return a term, with the next image if it has one; no text names a file."""
    if isinstance(given, str):
        return parse_term(given, images=False)
    if isinstance(given, tuple):
        return parse_term({"text": given[0], "weight": given[1]})
    return parse_term({**given.model_dump(), "image": None if given.image is None else next(images)})


def _show(hit: Hit) -> dict[str, Any]:
    columns = {name: value for name, value in hit.columns.items() if not isinstance(value, bytes)}
    columns |= {name: None for name, value in columns.items() if isinstance(value, float) and not math.isfinite(value)}
    small = {} if hit.jpeg is None else {"thumbnail": base64.b64encode(hit.jpeg).decode()}
    return {"id": hit.id, "score": round(hit.score, 6), "columns": columns, **small}


def openapi(columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the description of the interface, as OpenAPI 3.1, for a gallery with columns of some kinds."""
    reference = "#/components/schemas/{model}"
    _, schemas = models_json_schema([(one, "validation") for one in BODIES.values()], ref_template=reference)
    listed = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
    schemas["$defs"]["SearchRequestBody"]["properties"]["where"]["description"] += f": {listed}"
    failures = {"400": "invalid request", "401": "wrong API key", "413": "too large", "503": "busy; see Retry-After"}
    paths: dict[str, Any] = {"/health": {"get": {"security": [], "responses": {"200": {"description": "running"}}}}}
    for path, body in BODIES.items():
        name = reference.format(model=body.__name__)
        content = {"application/json": {"schema": {"$ref": name}, "example": EXAMPLES[path]}, "image/*": {}}
        responses = {code: {"description": text} for code, text in failures.items()}
        responses["200"] = {
            "description": "hits: a list, best first" if path == "/search" else "embeddings: a list per query"
        }
        paths[path] = {"post": {"requestBody": {"content": content}, "responses": responses}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "union-serve", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas["$defs"], "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}, {}],
    }
