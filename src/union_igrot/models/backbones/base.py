"""The interface of vision-language models: images and texts to features in one space.

Frozen by construction: evaluation mode survives `train()` and no parameter requires a gradient, unless an encoder is
tuned.
"""

import functools
import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from union_igrot.errors import ConfigError
from union_igrot.types import Features, Preprocess

Modality = Literal["image", "text"]
"""The two encoders of a backbone."""
PreprocessChoice = Literal["model", "pad"]
"""`model` is as the authors of the weights preprocess images; `pad` pads long images first (TargetPad)."""

log = logging.getLogger("union_igrot.models")
PROBE_TEXTS = (
    "",
    "A Red Shoe!",
    "is 3 shades lighter, and has longer sleeves; the collar isn't buttoned",
    "two dogs_running in the snow at night -- 'photograph' (black & white)",
    "Ünïcode naïve café STRASSE  tab\tline\n",
    "skyscraper hummingbird typewriter refrigerator chrysanthemum xylophone",
    "\u72ac \U0001f600",
    " ".join(f"word{number}" for number in range(90)),
)
"""Texts whose token ids tell tokenizers of one vocabulary apart."""
_truncation_logged: set[str] = set()
_EXAMPLE = 60
_MARKS = 4  # most tokens that stand for no byte of a text


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and bytes of a state dict, in any order.

    Args:
        state: Tensors by name, on any device.

    Returns:
        Sixteen hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()[:16]


def json_hash(value: object) -> str:
    """Return sixteen hexadecimal digits of a value in JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def without_settings(fingerprint: str) -> str:
    """Return the part of a fingerprint that earlier versions had: weights and preprocessing."""
    return fingerprint.rpartition("-")[0]


def vocabulary_hash(vocabulary: Mapping[Any, int]) -> str:
    """Return a hash of a tokenizer's words and their ids."""
    return json_hash(sorted((number, str(word)) for word, number in vocabulary.items()))


def first_pooled(
    tokens: Float[Tensor, "batch length dim"], mask: Bool[Tensor, "batch length"] | None = None
) -> Features:
    """Return features whose pooled embedding is the first token; without a mask all tokens are real."""
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return Features(tokens[:, 0], tokens, mask, torch.zeros(tokens.shape[0], dtype=torch.long, device=tokens.device))


def attention_of_one(attention: Any, tokens: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch dim"]:
    """Return a `MultiheadAttention`'s output for each token alone: that token's value, whatever the query is."""
    width = attention.embed_dim
    weight = attention.in_proj_weight[2 * width :] if attention.v_proj_weight is None else attention.v_proj_weight
    output: Tensor = attention.out_proj(F.linear(tokens, weight, attention.in_proj_bias[2 * width :]))
    return output


class Backbone(nn.Module, ABC):
    """A frozen vision-language model.

    Attributes:
        name: Name of the backbone in configurations and saved models.
        dim: Width of the joint space.
        preprocess: How an image becomes this model's input.
        model_preprocess: The preprocessing of the authors of the weights, if `preprocess` is another one.
        context: Most tokens of a text, marks included; None if there is no limit.
        tuned_encoders: The encoders whose weights are being trained; empty before `tune`.
        is_described_by_name: Whether the name or the folder of a saved model determines `settings`, which fingerprints
            of earlier versions did not cover.
    """

    name: str
    dim: int
    preprocess: Preprocess
    model_preprocess: Preprocess | None = None
    context: int | None = None
    tuned_encoders: frozenset[Modality] = frozenset()
    is_described_by_name: bool = False

    def __repr__(self) -> str:
        size = self.preprocess.size
        return f"{type(self).__name__}({self.name}, dim={self.dim}, image_size={size}, device={self.device})"

    @property
    def preprocess_choice(self) -> PreprocessChoice:
        """Whether long images are padded first."""
        return "pad" if self.preprocess.fit == "pad" else "model"

    @abstractmethod
    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> Features:
        """Encode preprocessed images.

        Returns:
            Pooled and token features in the joint space, not normalized; the mask is all True.
        """

    def encode_text(self, texts: Sequence[str]) -> Features:
        """Encode texts, cut to `context`; an empty string is the null text.

        A subclass defines this, or `text_inputs` and `text_features`.

        Returns:
            Pooled and token features in the joint space, not normalized; the mask is False after the end of each text,
            by position.
        """
        self.warn_truncated(texts)
        return self.text_features(*self.text_inputs(texts))

    def text_inputs(self, texts: Sequence[str]) -> tuple[Tensor, ...]:  # noqa: ARG002 - optional
        """Return what `text_features` takes: token ids of texts, and whatever else its network needs.

        Raises:
            ConfigError: If the backbone only has `encode_text`.
        """
        raise ConfigError(f"backbone {self.name!r} has no text_inputs; add it and text_features, see models.backbones")

    def text_features(self, *inputs: Tensor) -> Features:
        """Return the features of texts given as tensors: `encode_text` without the tokenizer."""
        raise NotImplementedError

    def token_count(self, text: str) -> int:  # noqa: ARG002 - 0 if there is no limit
        """Return the number of tokens of a text before it is cut."""
        return 0

    def count_truncated(self, texts: Iterable[str]) -> int:
        """Return how many texts are cut at `context`."""
        limit, each = self.context, Counter(texts)
        return 0 if limit is None else sum(n for text, n in each.items() if self.token_count(text) > limit)

    def warn_truncated(self, texts: Iterable[str]) -> None:
        """Log, once per process, that texts are cut."""
        if _truncation_logged or self.context is None:
            return
        for text in texts:
            may_be_cut = len(text.encode(errors="surrogatepass")) + _MARKS > self.context  # a token is a byte or more
            if may_be_cut and (length := self.token_count(text)) > self.context:
                _truncation_logged.add(self.name)
                example = text if len(text) <= _EXAMPLE else f"{text[:_EXAMPLE]}..."
                log.warning(
                    "texts of more than %d tokens are cut by backbone %s, such as %r (%d tokens); reported once",
                    self.context,
                    self.name,
                    example,
                    length,
                )
                return

    def architecture(self) -> dict[str, Any]:
        """Return how the model is built, in JSON values, without weights and tokenizer; empty if the name says it."""
        return {}

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files into a folder; nothing if it is part of the code."""

    def freeze(self) -> "Backbone":
        """Freeze every weight and switch to evaluation mode. Call at the end of a constructor."""
        self.requires_grad_(requires_grad=False)
        self.tuned_encoders = frozenset()
        return self.train(mode=False)

    def tune(self, encoders: Collection[Modality]) -> "Backbone":
        """Train the weights of encoders, until `freeze`.

        The weights of an encoder are those that its features depend on; what only the pretraining needed (a logit
        scale, layers of cross-attention) stays frozen.

        Args:
            encoders: `image`, `text`, or both.
        """
        self.freeze()
        weights = list(self.parameters())
        chosen: set[int] = set()
        self.requires_grad_(requires_grad=True)
        with torch.inference_mode(mode=False), torch.enable_grad():
            for encoder in encoders:
                blank = torch.zeros(1, 3, self.preprocess.size, self.preprocess.size, device=self.device)
                features = self.encode_image(blank) if encoder == "image" else self.encode_text(["a"])
                outputs = [x.sum() for x in (features.pooled, features.tokens) if x is not None]
                gradients: Sequence[Tensor | None] = torch.autograd.grad(outputs, weights, allow_unused=True)
                chosen |= {id(x) for x, gradient in zip(weights, gradients, strict=True) if gradient is not None}
        self.freeze()
        for weight in weights:
            weight.requires_grad_(id(weight) in chosen)
        self.tuned_encoders = frozenset(encoders)
        return self

    def checkpoint_activations(self) -> "Backbone":
        """Recompute each layer in the backward pass instead of keeping its activations: less memory, more time."""
        for layer in list(_layers(self)):
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        return self

    def train(self, mode: bool = True) -> "Backbone":  # noqa: ARG002 - ignored on purpose
        """Stay in evaluation mode, also while tuned: dropout and running statistics stay off."""
        return super().train(mode=False)

    def settings(self) -> dict[str, Any]:
        """Return what changes features beside weights and preprocessing, in JSON values.

        That is activation, heads, norms, context and tokenizer, in words that no version of a library changes.
        """
        return {}

    @functools.cached_property
    def _settings_hash(self) -> str:
        return json_hash(self.settings())

    def fingerprint(self, state: Mapping[str, Tensor] | None = None) -> str:
        """Return a hash of everything that changes features: weights, preprocessing and `settings`.

        Args:
            state: Weights in place of the backbone's own.
        """
        weights = weights_hash(self.state_dict() if state is None else state)
        return f"{weights}-{self.preprocess.fingerprint()}-{self._settings_hash}"

    def matches(self, fingerprint: str) -> bool:
        """Return whether a fingerprint is this backbone's, or the one that earlier versions provably gave it."""
        own = self.fingerprint()
        return fingerprint in (own, self.earlier_fingerprint(own))

    def earlier_fingerprint(self, own: str) -> str | None:
        """Return what earlier versions gave as the fingerprint of this backbone, if they can only have meant this one.

        Args:
            own: The result of `fingerprint`.
        """
        return without_settings(own) if self.is_described_by_name else None

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Return the layers of each stack; of a stack of stages that are mostly stacks themselves, the inner ones."""
    for child in module.children():
        if _is_stack(child) and not any(map(_is_stage, child.children())):
            yield from child.children()
        else:
            yield from _layers(child)


def _is_stack(module: nn.Module) -> bool:
    """Return whether a module is a list of layers of one kind."""
    is_list = isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
    return is_list and len({type(layer) for layer in module.children()}) == 1


def _is_stage(layer: nn.Module) -> bool:
    inner = max((_parameter_count(module) for module in layer.modules() if _is_stack(module)), default=0)
    return 2 * inner > _parameter_count(layer)


def _parameter_count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
