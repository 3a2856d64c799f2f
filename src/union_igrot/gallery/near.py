"""The score below which nothing is near: what random queries of the same kind exceed in 1 % of the cases.

Random texts are nouns of WordNet for what is in ImageNet or resembles it. Random images are images of the gallery; each
is compared with the images of other clusters alone, so that it has no answer. An image with a text is one of each. Some
random texts do have answers, and some clusters divide what belongs together: such queries score high. So the normal
distribution is fitted to the middle of their best scores (an empirical null, as in Efron, Large-scale simultaneous
hypothesis testing, 2004), and its quantile is the threshold. The best of more rows is higher: the threshold is measured
again as a gallery grows.
"""

import json
import math
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.resources import as_file, files
from pathlib import Path
from statistics import NormalDist
from typing import Any, Final, Literal, get_args

import torch
from jaxtyping import Float, Int64
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import normalize

from union_igrot.errors import ConfigError, check_choice
from union_igrot.gallery.engines.base import VectorIndex
from union_igrot.gallery.metadata import KEY, widen_queries
from union_igrot.gallery.queries import GalleryQuery, Term, embed_gallery_queries
from union_igrot.gallery.results import THUMBNAIL, file_of
from union_igrot.models.backbones.photos import STOP_WORDS
from union_igrot.models.model import IGROTModel
from union_igrot.storage.files import write_atomic

QueryKind = Literal["text", "image", "image + text"]
"""What a query consists of; scores of different kinds are not comparable."""

RATE: Final = 0.01  # of random queries that exceed the threshold
TEXTS: Final = 1000  # random texts
IMAGES: Final = 256  # random images
ROWS: Final = 10_000  # rows that they are compared with at most
LEAST_ROWS: Final = 100
FITTED: Final = (0.2, 0.6)  # shares between which the quantiles of random queries without an answer lie
CLUSTERS: Final = 32
CLUSTERINGS: Final = 10
GROWTH: Final = 1.1  # a gallery that grew or shrank by this factor is measured again
_STEPS: Final = 10
_FETCHED: Final = 512
_CLEAR: Final = 0.3  # least share of a class in a random text; texts that mean little to the model have low scores
_VERSION: Final = 2


def query_kind(query: GalleryQuery) -> QueryKind:
    """Return the kind of a query; a ConfigError if its scores are comparable to those of no kind."""
    own = query.terms[0] if len(query.terms) == 1 else None
    if own is None or own.vector is not None or len(own.images) > 1 or query.liked or query.disliked:
        raise ConfigError(
            "min_score=auto is for queries of an image, a text, or both, without a vector, other terms, liked or "
            "disliked results; pass a number"
        )
    return "text" if not own.images else "image + text" if own.text else "image"


def near_score(
    index: VectorIndex, model: IGROTModel, kind: QueryKind, known: dict[str, Any], stored: Path | None
) -> float:
    """Return the threshold of a kind of query; it is measured if it is not known for this index and about its size.

    `known` is what this function knew before, empty at first, and is changed; `stored` is its file, None for none.
    """
    check_choice("kind", kind, get_args(QueryKind))
    of = {"version": _VERSION, "fingerprint": index.metadata.get("fingerprint"), KEY: index.metadata.get(KEY)}
    if not known and stored is not None:
        with suppress(OSError, ValueError):  # absent, or damaged and replaced
            read = json.loads(stored.read_text(encoding="utf-8"))
            known |= read if isinstance(read, dict) and read.get("index") == of else {}
    rows = len(index)
    before = known.get(kind)
    if before is None or not rows / GROWTH <= before["images"] <= rows * GROWTH:
        before = {"images": rows, "score": measure_near_score(index, model, kind)}
        known |= {"index": of, kind: before}
        if stored is not None:
            with suppress(OSError):  # a folder that is only read
                write_atomic(stored, json.dumps(known, indent=1))
    return float(before["score"])


def measure_near_score(index: VectorIndex, model: IGROTModel, kind: QueryKind) -> float:
    """Measure the threshold of a kind of query; see the module."""
    draw = random.Random(0)
    ids = [str(name) for batch in index.scan(["id"]) for name in batch["id"]]
    if len(ids) < LEAST_ROWS:
        raise ConfigError(f"min_score=auto needs at least {LEAST_ROWS} images (got {len(ids)}); pass a number")
    drawn = draw.sample(ids, min(len(ids), ROWS))
    pieces = [index.fetch(drawn[at : at + _FETCHED]) for at in range(0, len(drawn), _FETCHED)]
    vectors = torch.cat([piece.vectors for piece in pieces])
    texts: list[str | None] = [*draw.sample(_nouns(), TEXTS if kind == "text" else IMAGES)]
    if kind == "text":
        best = _best(_embed(model, [Term((), text) for text in texts], index.metadata), vectors)
    else:
        thumbnails = [one for piece in pieces for one in piece.columns.get(THUMBNAIL, [None] * len(piece.ids))]
        sources = [thumbnails[i] or file_of(drawn[i]) for i in range(min(IMAGES, len(drawn)))]
        rows = [i for i, source in enumerate(sources) if source is not None]
        if len(rows) < LEAST_ROWS // 2:
            raise ConfigError("min_score=auto needs the images of the gallery, or their thumbnails; pass a number")
        terms = [Term((sources[i],), texts[i] if kind == "image + text" else None) for i in rows]
        queries, unit = _embed(model, terms, index.metadata), normalize(vectors[:, : model.backbone.dim], dim=-1)
        several = [_clusters(unit, seed) for seed in range(CLUSTERINGS)]  # as one of them alone varies much
        best = torch.cat([_best(queries, vectors, clusters[rows][:, None] == clusters) for clusters in several])
    if not len(best):
        raise ConfigError("min_score=auto needs different images, these are all alike; pass a number")
    if (score := fit_threshold(best)) >= 1:
        raise ConfigError(f"min_score=auto cannot tell which scores are near for {kind} here; pass a number")
    return score


def fit_threshold(best: Float[Tensor, " queries"]) -> float:
    """Return the score that a share `RATE` exceeds, by the normal distribution that fits the quantiles of `FITTED`."""
    normal = NormalDist()
    shares = torch.linspace(*FITTED, 21)
    expected = torch.tensor([normal.inv_cdf(share) for share in shares.tolist()])
    found = best.quantile(shares)
    slope = torch.dot(expected - expected.mean(), found) / (expected - expected.mean()).square().sum()
    return float(found.mean() + slope * (normal.inv_cdf(1 - RATE) - expected.mean()))


def _best(
    queries: Float[Tensor, "queries dim"], rows: Float[Tensor, "rows dim"], excluded: Tensor | None = None
) -> Float[Tensor, " answered"]:
    """Return the best scores of queries, without those of queries of which all rows are excluded."""
    scores = queries @ rows.T
    best = (scores if excluded is None else scores.masked_fill(excluded, -math.inf)).amax(1)
    return best[best.isfinite()]


def _embed(model: IGROTModel, terms: Sequence[Term], metadata: Mapping[str, Any]) -> Float[Tensor, "terms wide"]:
    queries = [GalleryQuery((term,)) for term in terms]
    return widen_queries(*embed_gallery_queries(model, queries, {}, [""] * len(terms)), metadata)


def _clusters(rows: Float[Tensor, "rows dim"], seed: int) -> Int64[Tensor, " rows"]:
    """Return the cluster of each row by spherical k-means."""
    centers = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:CLUSTERS]]
    for _ in range(_STEPS):
        sums = torch.zeros_like(centers).index_add_(0, (rows @ centers.T).argmax(1), rows)
        centers = torch.where(sums.norm(dim=1, keepdim=True) > 0, normalize(sums, dim=-1), centers)
    return (rows @ centers.T).argmax(1)


def _nouns() -> list[str]:
    """Return a name of each noun that is, by the tower of `photos`, to at least `_CLEAR` one class of ImageNet."""
    with (
        as_file(files("union_igrot") / "weights" / "photos" / "backbone.safetensors") as path,
        safe_open(path, framework="pt") as weights,
    ):
        vocabulary, lengths, shares = (weights.get_tensor(f"text.{x}") for x in ("vocabulary", "lengths", "shares"))
    things = bytes(vocabulary.tolist()).decode().split("\n")
    mixtures = shares.float().split(lengths.tolist())
    clear = [names.partition(",")[0] for names, own in zip(things, mixtures, strict=True) if own.max() >= _CLEAR]
    return [name for name in clear if name not in STOP_WORDS]  # "can", which no text of `photos` may be
