"""Nouns of WordNet and where they lie among ImageNet's thousand classes.

Reads Debian's `wordnet-base` (the database files of WordNet 3.0) and timm's list of ImageNet synsets.
"""

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path("/usr/share/wordnet")
PHYSICAL = "00001930"
"""Synset of physical entities; the others cannot be photographed."""
_MOST_CLASSES = 400
"""A synset above more classes than this says nothing of how it looks."""
_RIDGE = 0.5
_KERNELS = (("ancestors", 1.5, 1.0), ("gloss", 1.5, 0.5), ("name", 1.0, 0.2))
"""Kind of features, power of their weights, weight of the kernel; chosen by leaving out each ImageNet class in turn."""
_STOP = frozenset(
    """
    a an the of or and in on to with for by from used as is that it which at its having any some usually one who are be
    not into other also large small very several etc most can made various especially often being has have their more
    than
    """.split()  # noqa: SIM905 - words are read more easily in lines
)


@dataclass
class Synset:
    """A noun synset: its names, definition, hypernyms and all ancestors; an instance is one thing of its kind."""

    names: list[str]
    gloss: str
    above: list[str]
    is_instance: bool
    ancestors: set[str] = field(default_factory=set)


@dataclass
class Nouns:
    """Noun synsets by id, the senses of lemmas, most frequent first, irregular plurals, and shares as an adjective."""

    synsets: dict[str, Synset]
    senses: dict[str, list[str]]
    plurals: dict[str, str]
    adjectives: dict[str, float]


def read_nouns(root: Path = ROOT) -> Nouns:
    """Read the nouns of WordNet from its database files."""
    synsets = {}
    for line in (root / "data.noun").read_text().splitlines():
        if line.startswith("  "):
            continue
        head, _, gloss = line.partition(" | ")
        fields = head.split(" ")
        count = int(fields[3], 16)
        pointers = fields[5 + 2 * count :]
        above = [pointers[at + 1] for at in range(0, 4 * int(fields[4 + 2 * count]), 4) if pointers[at] in ("@", "@i")]
        names = [name.replace("_", " ") for name in fields[4 : 4 + 2 * count : 2]]
        synsets[fields[0]] = Synset(names, gloss.strip(), above, "@" not in pointers)
    for name, synset in synsets.items():
        reached = [name]
        while reached:
            synset.ancestors.update(reached)
            reached = [up for one in reached for up in synsets[one].above if up not in synset.ancestors]
    senses = {}
    for line in (root / "index.noun").read_text().splitlines():
        if not line.startswith("  "):
            fields = line.split()
            senses[fields[0].replace("_", " ")] = fields[-int(fields[2]) :]
    pairs = [line.split()[:2] for line in (root / "noun.exc").read_text().splitlines()]
    return Nouns(synsets, senses, {singular: plural for plural, singular in pairs}, _adjective_shares(root))


def _adjective_shares(root: Path) -> dict[str, float]:
    """Return in what share of a corpus each lemma is an adjective or adverb, not a noun."""
    counts = {kind: Counter[str]() for kind in "12345"}
    for line in (root / "cntlist.rev").read_text().splitlines():
        sense, _, count = line.split()
        lemma, _, kind = sense.partition("%")
        counts[kind[0]][lemma.replace("_", " ")] += int(count)
    others = counts["3"] + counts["4"] + counts["5"]
    return {lemma: count / (count + counts["1"][lemma] + 1) for lemma, count in others.items()}


def imagenet_synsets() -> list[str]:
    """Return the synset of each class of ImageNet-1k, in the order of the classifiers."""
    lines = (Path(timm.__file__).parent / "data" / "_info" / "imagenet_synsets.txt").read_text().split()
    return [line[1:] for line in lines]


def content_words(text: str) -> list[str]:
    """Return the words of a text that carry meaning, without a plural's final s."""
    found = [word for word in re.findall(r"[a-z]+", text.lower()) if word not in _STOP]
    return [word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in found]


class _Features:
    """Sparse features of synsets, weighted by how rare they are."""

    def __init__(self, nouns: Nouns) -> None:
        self.nouns, total = nouns, len(nouns.synsets)
        below = Counter(up for synset in nouns.synsets.values() for up in synset.ancestors)
        self.names = {i: set(content_words(" ".join(s.names))) for i, s in nouns.synsets.items()}
        self.glosses = {
            i: set(content_words(re.sub(r'"[^"]*"', "", s.gloss))) | self.names[i] for i, s in nouns.synsets.items()
        }
        spread = Counter(word for words in self.glosses.values() for word in words)
        self.height = {i: math.log(total / count) for i, count in below.items()}
        self.rarity = {word: math.log(total / count) for word, count in spread.items()}

    def matrix(self, synsets: list[str], kind: str, power: float, vocabulary: dict[str, int]) -> Tensor:
        """Return sparse rows of unit length before features outside of the vocabulary are left out."""
        of = {"ancestors": lambda i: self.nouns.synsets[i].ancestors, "gloss": self.glosses.get, "name": self.names.get}
        weights = self.height if kind == "ancestors" else self.rarity
        at, values = [], []
        for row, synset in enumerate(synsets):
            found = {name: weights[name] ** power for name in sorted(of[kind](synset))}
            norm = math.sqrt(sum(x * x for x in found.values())) or 1.0
            inside = [name for name in found if name in vocabulary]
            at += [(row, vocabulary[name]) for name in inside]
            values += [found[name] / norm for name in inside]
        return torch.sparse_coo_tensor(torch.tensor(at).T, torch.tensor(values), (len(synsets), len(vocabulary)))

    def vocabulary(self, synsets: list[str], kind: str) -> dict[str, int]:
        """Number the features of some synsets."""
        chosen = {
            "ancestors": lambda i: self.nouns.synsets[i].ancestors,
            "gloss": self.glosses.get,
            "name": self.names.get,
        }
        return {name: i for i, name in enumerate(sorted({name for one in synsets for name in chosen[kind](one)}))}


def concept_vectors(nouns: Nouns, classes: Tensor) -> tuple[dict[str, int], Tensor, Tensor]:
    """Return where each physical synset lies, as a mixture of ImageNet's classes.

    A synset that is a class, or has classes below it, is their mean. Any other is predicted from the classes by kernel
    ridge regression on its ancestors, its definition and its names.

    Args:
        nouns: WordNet's nouns.
        classes: Unit vectors of the 1,000 classes.

    Returns:
        Row of each synset, unit vectors, and a confidence, 1 for the first kind and below for the second.
    """
    rows = imagenet_synsets()
    synsets = [i for i, one in nouns.synsets.items() if PHYSICAL in one.ancestors and not one.is_instance]
    features = _Features(nouns)
    own, across = torch.zeros(len(rows), len(rows)), torch.zeros(len(synsets), len(rows))
    for kind, power, weight in _KERNELS:
        vocabulary = features.vocabulary(rows, kind)
        seen = features.matrix(rows, kind, power, vocabulary).to_dense()
        own += weight * (seen @ seen.T)
        across += weight * torch.sparse.mm(features.matrix(synsets, kind, power, vocabulary), seen.T.contiguous())
    fitted = torch.linalg.solve(own.double() + _RIDGE * torch.eye(len(rows)).double(), classes.double()).float()
    predicted = across @ fitted
    confidence = predicted.norm(dim=1).clamp(max=1)
    vectors = F.normalize(predicted, dim=1)
    below = defaultdict(list)
    for number, synset in enumerate(rows):
        for up in nouns.synsets[synset].ancestors:
            below[up].append(number)
    position = {synset: i for i, synset in enumerate(synsets)}
    for synset, members in below.items():
        if synset in position and len(members) < _MOST_CLASSES:
            vectors[position[synset]] = F.normalize(classes[members].mean(0), dim=0)
            confidence[position[synset]] = 1
    return position, vectors, confidence


def name_vectors(
    nouns: Nouns, position: dict[str, int], vectors: Tensor, confidence: Tensor
) -> tuple[list[list[str]], Tensor]:
    """Return the names that have a physical sense, those of equal senses together, and vectors of at most unit length.

    A name is the mean of its senses, weighted by confidence and by 1 / sqrt(rank); an adjective is shorter.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    found = []
    for name, senses in nouns.senses.items():
        physical = [(rank, position[one]) for rank, one in enumerate(senses, 1) if one in position]
        share = nouns.adjectives.get(name, 0.0)
        if physical and (key := (share, *physical)) not in groups:
            weights = torch.tensor([rank**-0.5 for rank, _ in physical]) * confidence[[i for _, i in physical]]
            mean = (weights[:, None] * vectors[[i for _, i in physical]]).sum(0)
            found.append(F.normalize(mean, dim=0) * weights.max().clamp(max=1) * (1 - share))
        if physical:
            groups.setdefault(key, []).append(name)
    return list(groups.values()), torch.stack(found)


def sparse_mixtures(vectors: Tensor, atoms: Tensor, most: int, enough: float) -> list[tuple[Tensor, Tensor]]:
    """Approximate each vector by few atoms: orthogonal matching pursuit.

    Args:
        vectors: What is approximated; none is zero.
        atoms: Vectors of about unit length.
        most: Most atoms of a vector.
        enough: Share of a vector's squared length that may be left.

    Returns:
        For each vector the numbers of its atoms, and their shares.
    """
    gram, aims, squares = atoms @ atoms.T, vectors @ atoms.T, vectors.square().sum(1)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    rows, fit, chosen = torch.arange(len(vectors)), aims, torch.zeros(len(vectors), 0, dtype=torch.long)
    for count in range(1, most + 1):
        chosen = torch.cat([chosen, fit.abs().scatter(1, chosen, -1.0).argmax(1, keepdim=True)], dim=1)
        wanted = aims[rows].gather(1, chosen)
        among = gram[chosen[:, :, None], chosen[:, None]] + 1e-4 * torch.eye(count)
        shares = torch.linalg.solve(among, wanted)
        left = 1 - (shares * wanted).sum(1) / squares[rows]
        done = left < enough if count < most else torch.ones_like(left, dtype=torch.bool)
        found |= {int(rows[i]): (chosen[i], shares[i]) for i in done.nonzero()[:, 0].tolist()}
        rows, chosen, shares = rows[~done], chosen[~done], shares[~done]
        fit = aims[rows]
        for at in range(count):
            fit = fit - shares[:, at, None] * gram[chosen[:, at]]
    return [found[row] for row in range(len(vectors))]
