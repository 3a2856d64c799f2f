"""The bundled default: a CLIP-like model of about a million weights.

Pretrained on captions of the generated world by `synthetic.pretrain`; it knows colored shapes, not photographs.
"""

import math
import re
import zlib
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from union_igrot.models.backbones.base import PROBE_TEXTS, Backbone, first_pooled, json_hash
from union_igrot.models.backbones.weights import load_strict, read_state_dict
from union_igrot.models.devices import map_in_threads
from union_igrot.types import Features, Preprocess

CONTEXT = 32
"""Most words of a text, including the end mark; longer texts are cut."""
_BUCKETS = 64
_WORDS = """
a an the of with and on in to it is at over front behind into should be put photo picture sketch drawing image scene
circle square triangle star heart cross arrow crescent diamond drop flower house fish tree
bolt hourglass gear boat mushroom bottle
red orange yellow green cyan blue purple pink white black
small medium large bigger smaller plain striped dotted checked
grass sand sea sky bricks wood snow night left right top bottom middle
make change turn replace instead add remove without take away move swap background
""".split()  # noqa: SIM905 - words are read more easily in lines
_VOCABULARY = {word: 2 + i for i, word in enumerate(_WORDS)}
_PAD, _END = 0, 1
_PREPROCESS = Preprocess(size=48, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), fit="squash", interpolation="bicubic")


def tokenize(texts: Sequence[str]) -> Int[Tensor, "batch length"]:
    """Return the word ids of texts, cut to `CONTEXT`, with an end mark, padded to the longest.

    Words are compared in lower case. A word outside of the vocabulary gets the id of one of 64 hash buckets.
    """
    rows = []
    unknown = 2 + len(_WORDS)
    for text in texts:
        words = _split_words(text)[: CONTEXT - 1]
        rows.append([*(_VOCABULARY.get(w, unknown + zlib.crc32(w.encode()) % _BUCKETS) for w in words), _END])
    longest = max((len(row) for row in rows), default=1)
    return torch.tensor([row + [_PAD] * (longest - len(row)) for row in rows], dtype=torch.long).reshape(-1, longest)


def _split_words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class _TransformerLayer(nn.Module):
    """A pre-norm transformer layer without dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(
        self, x: Float[Tensor, "batch length width"], mask: Bool[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch length width"]:
        batch, length, width = x.shape
        # The width is explicit: it cannot be inferred from an empty batch.
        split = (batch, length, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(self.norm1(x)).view(split).permute(2, 0, 3, 1, 4)
        keys = None if mask is None else mask[:, None, None, :]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(mixed)
        result: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return result


def _conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class TinyVLM(nn.Module):
    """The trainable network of `TinyBackbone`.

    A convolutional stem turns 48 x 48 pixels into 6 x 6 tokens; three transformer layers mix them with a class token.
    Two layers encode the words. Both sides end in a norm and a projection into the joint space.

    Args:
        dim: Width of the joint space.
        width: Width of the transformer layers.
    """

    def __init__(self, dim: int = 128, width: int = 96) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            _conv(3, 32, 2), _conv(32, 64, 2), _conv(64, 64, 1), _conv(64, 64, 1), nn.Conv2d(64, width, 3, 2, 1)
        )
        self.image_class = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.image_places = nn.Parameter(torch.randn(1, 37, width) * 0.02)
        self.image_blocks = nn.ModuleList(_TransformerLayer(width, 4) for _ in range(3))
        self.image_norm, self.image_projection = nn.LayerNorm(width), nn.Linear(width, dim, bias=False)
        self.words = nn.Embedding(2 + len(_WORDS) + _BUCKETS, width)
        self.word_places = nn.Parameter(torch.randn(1, CONTEXT, width) * 0.02)
        self.text_blocks = nn.ModuleList(_TransformerLayer(width, 4) for _ in range(2))
        self.text_norm, self.text_projection = nn.LayerNorm(width), nn.Linear(width, dim, bias=False)
        nn.init.normal_(self.words.weight, std=0.05)
        self.log_scale = nn.Parameter(torch.tensor(2.6))

    def image(self, images: Float[Tensor, "batch 3 48 48"]) -> Float[Tensor, "batch 10 dim"]:
        """Return the class token and 3 x 3 averaged patch tokens, projected."""
        patches = self.stem(images.contiguous(memory_format=torch.channels_last)).flatten(2).transpose(1, 2)
        x = torch.cat([self.image_class.expand(images.shape[0], -1, -1), patches], 1) + self.image_places
        for block in self.image_blocks:
            x = block(x)
        grid = x[:, 1:].reshape(images.shape[0], 3, 2, 3, 2, x.shape[-1]).mean((2, 4)).flatten(1, 2)
        projected: Tensor = self.image_projection(self.image_norm(torch.cat([x[:, :1], grid], 1)))
        return projected

    def text(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length dim"]:
        """Return all word tokens, projected; the end mark's token is the embedding of the text."""
        x = self.words(ids) + self.word_places[:, : ids.shape[1]]
        for block in self.text_blocks:
            x = block(x, ids != _PAD)
        projected: Tensor = self.text_projection(self.text_norm(x))
        return projected


@final
class TinyBackbone(Backbone):
    """The bundled vision-language model, frozen.

    Args:
        weights: A safetensors file of `TinyVLM`; None for the one of the package.

    Raises:
        CheckpointError: If the file is missing or does not fit.
    """

    is_described_by_name = True

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        self.name, self.dim, self.preprocess, self.context = "tiny", 128, _PREPROCESS, CONTEXT
        self.network = TinyVLM(self.dim)
        with as_file(weights or files("union_igrot") / "weights" / "tiny" / "backbone.safetensors") as path:
            state = read_state_dict(path)
        hint = "give a file written by scripts/pretrain_tiny.py of the repository"
        load_strict(self.network, state, f"the tiny backbone's weights {weights or '(shipped)'}", hint)
        self.network.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        self.freeze()

    def settings(self) -> dict[str, Any]:
        """Return the ids of a few texts; the rest is code."""
        return {"kind": "tiny", "tokens": json_hash(tokenize(PROBE_TEXTS).tolist())}

    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> Features:
        """Encode images of 48 x 48: ten tokens, the class token first."""
        parts: Sequence[Tensor] = [images]
        if images.is_cpu and not torch.compiler.is_compiling():  # an exported network takes batches of any size
            parts = images.split(max(32, math.ceil(len(images) / torch.get_num_threads())))
        return first_pooled(torch.cat(map_in_threads(self.network.image, parts)))

    def token_count(self, text: str) -> int:
        """Return the number of words, and one for the end."""
        return len(_split_words(text)) + 1

    def text_inputs(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        """Return token ids."""
        return (tokenize(texts).to(self.device),)

    def text_features(self, *inputs: Tensor) -> Features:
        """Return one token per word and one for the end, from which `pooled` is read."""
        (ids,) = inputs
        tokens, mask = self.network.text(ids), ids != _PAD
        end = mask.sum(1) - 1
        return Features(tokens[torch.arange(ids.shape[0], device=tokens.device), end], tokens, mask, end)


def load_tiny(name: str, weights: Path | None = None) -> TinyBackbone:
    """Build the bundled backbone under a name of the registry."""
    backbone = TinyBackbone(weights)
    backbone.name = name
    return backbone
