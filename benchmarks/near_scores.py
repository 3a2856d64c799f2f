"""Measure what `min_score=auto` calls near although it is not in the gallery, and what it keeps, with `photos`.

    PYTHONPATH=scripts python benchmarks/near_scores.py PHOTOS SKETCHES

Both hold a folder per class, of the same names. Each class is removed in turn, and the limits are measured without it.
The nouns are random texts that were not drawn for the limit and of which no sense in WordNet (Debian's `wordnet-base`)
is a class, a kind of one, what it is a kind of, or what may stand beside it; their 95 % intervals resample the classes
of ImageNet they resemble most, then them. A kept photo with a name has that of its own class.
"""

import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
import wordnet
from torch.nn.functional import normalize

from union_igrot.gallery import near
from union_igrot.gallery.engines.base import Rows
from union_igrot.gallery.engines.factory import MemoryIndex
from union_igrot.gallery.queries import Term
from union_igrot.metrics.statistics import bootstrap_interval
from union_igrot.models.model import load

Files, Case = dict[str, list[Path]], tuple[str, near.QueryKind, list[Path], list[Term], list[Term]]
SIZES, KEPT, PHYSICAL, NOUN = (2838, 700, 300), 60, wordnet.PHYSICAL, "noun in no image"
NAMES = {"airplanes": "airplane", "binocular": "binoculars", "car side": "car", "ceiling fan": "fan"}  # in WordNet
NAMES |= {"inline skate": "roller skate", "Motorbikes": "motorcycle", "stop sign": "street sign"}
BESIDE = """person,body part,clothing,footwear,plant,furniture,building,room,structure,road,geological formation,land,
body of water,fabric,material,substance,food,furnishing,covering,container,window,lamp,surface,fluid,display,jewelry,
electronic device,computer,cord,fence,hand tool,fastener,light,sign,picture,book,publication,flower,fruit,vegetable,
natural object,decoration,strip,stick,handle,tableware,wheeled vehicle,system,toiletry,lens,brake,keyboard,peripheral,
mirror,cushion,control,filter,switch,structural member,attachment"""


def absent_nouns(names: list[str], classes: list[str]) -> list[str]:
    """Return the names that are in no image of some classes; see the module."""
    known = wordnet.read_nouns()
    above = {one: synset.ancestors for one, synset in known.synsets.items()}
    senses = {name: [one for one in found if PHYSICAL in above[one]] for name, found in known.senses.items()}
    words = [NAMES.get(name, name) for name in classes]
    shown = {one for word in words for one in senses[word]} | {senses[one.strip()][0] for one in BESIDE.split(",")}
    absent = {one for one in above if not above[one] & shown}.difference(*(above[one] for one in shown))
    parts = {part for word in [*words, *classes] for part in word.lower().split()}
    return [x for x in names if senses.get(x) and absent.issuperset(senses[x]) and not parts & {*x.split()}]


class Judge:
    """Tells which queries have a result in a gallery, by embeddings that are computed once."""

    def __init__(self, paths: list[Path], texts: list[str]) -> None:
        terms, self.model = [*(Term((path,)) for path in paths), *(Term((), text) for text in texts)], load("photos")
        pieces = [near._embed(self.model, terms[at : at + 256], {}) for at in range(0, len(terms), 256)]
        self.vectors = dict(zip([*paths, *texts], normalize(torch.cat(pieces), dim=-1), strict=True))

    def embed(self, _: object, terms: list[Term], __: object) -> torch.Tensor:
        """Return embeddings as `near._embed` does: an image with a text is their sum."""
        self.drawn = {term.text for term in terms}
        parts = ([self.vectors[part] for part in (*term.images, term.text) if part] for term in terms)
        return normalize(torch.stack([sum(one) for one in parts]), dim=-1)

    def limit(self, kind: near.QueryKind, gallery: list[Path]) -> float:
        """Return the limit of a gallery."""
        index = MemoryIndex(self.model.backbone.dim)
        index.upsert(Rows([*map(str, gallery)], torch.stack([self.vectors[path] for path in gallery]), {}))
        with patch.object(near, "_embed", self.embed):
            return near.measure_near_score(index, self.model, kind)

    def near(self, gallery: list[Path], limit: float, queries: list[Term]) -> list[bool]:
        """Return which queries have a result other than their own image."""
        scores = self.embed(None, queries, None) @ torch.stack([self.vectors[path] for path in gallery]).T
        own = torch.tensor([[path in query.images for path in gallery] for query in queries])
        return (scores.masked_fill(own, -1).amax(1) >= limit).tolist()


def cases(size: int, photos: Files, sketches: Files, nouns: list[Term]) -> Iterator[Case]:
    """Return rows of the table, kinds of limits, galleries, and queries without and with an answer."""
    draw, every = random.Random(0), [(name, path) for name, own in photos.items() for path in own]
    sample = draw.sample(every, min(size, len(every)))
    yield NOUN, "text", [path for _, path in sample], nouns, []
    for name, own in photos.items():
        there, alone = sorted({other for other, _ in sample} - {name}), [Term((path,)) for path in own]
        second, kept = draw.choice(there), draw.sample([one for one in every if one[0] in there], KEPT)
        drawn = draw.sample([Term((path,)) for other in there for path in sketches[other]], KEPT)
        gallery = [path for other, path in sample if other != name]
        yield "photo", "image", gallery, alone, [Term((path,)) for _, path in kept]
        yield "sketch", "image", gallery, [Term((path,)) for path in sketches[name]], drawn
        yield "name of the class", "text", gallery, [Term((), name)], [Term((), other) for other in there]
        yield "photo with a noun", "image + text", gallery, [Term((x,), draw.choice(nouns).text) for x in own], []
        gallery = [path for other, path in sample if other not in (name, second)]
        named = [Term((path,), other) for other, path in kept if other != second]
        yield "photo with a removed name", "image + text", gallery, [Term((path,), second) for path in own], named


def main() -> None:
    """Embed everything, measure each gallery, and print the table."""
    folders = [sorted(Path(folder).resolve().iterdir()) for folder in sys.argv[1:]]
    photos, sketches = ({own.name.replace("_", " "): sorted(own.iterdir()) for own in some} for some in folders)
    texts, paths = near._nouns(), [path for some in (photos, sketches) for own in some.values() for path in own]
    nouns, judge = absent_nouns(texts, [*photos]), Judge(paths, [*texts, *photos])
    alike = dict(zip(nouns, judge.model.backbone.network.text.mixtures(nouns).sum(1).argmax(1).tolist(), strict=True))
    cells = defaultdict(list, {"query": [f"{what}, {size:,}" for size in SIZES for what in ("false near", "kept")]})
    for size in SIZES:
        found, tested = defaultdict(lambda: ([], [])), []
        for row, kind, gallery, absent, present in cases(size, photos, sketches, [Term((), noun) for noun in nouns]):
            limit = judge.limit(kind, gallery)
            asked = [query for query in absent if query.text not in judge.drawn or query.text not in alike]
            tested += [alike[query.text] for query in asked if row == NOUN]
            for results, queries in zip(found[row], (asked, present), strict=True):
                results.extend(judge.near(gallery, limit, queries) if queries else [])
        for row, results in found.items():
            cells[row] += [f"{sum(x) / len(x):.1%} ({sum(x):,} of {len(x):,})" if x else "" for x in results]
        interval = bootstrap_interval(torch.tensor(found[NOUN][0]).double(), classes=torch.tensor(tested))
        cells[NOUN][-2] += ", {:.1%} to {:.1%}".format(*interval)
    for row, values in cells.items():
        print("|", " | ".join([row, *values[::2], *values[1::2]]), "|")
    print(f"\n{len(nouns):,} nouns; {judge.model.fingerprint()}")


if __name__ == "__main__":
    main()
