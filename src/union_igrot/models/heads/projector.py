"""The vision projector: a small trained change of the frozen image embedding.

Starts as the identity, so that training begins at the plain model. Does not know which
backbone the features come from, nor whether they are a query's or a target's.
"""

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from union_igrot.errors import ConfigError
from union_igrot.types import Features


@final
class VisionProjector(nn.Module):
    """A residual network of two layers over each image vector, pooled and tokens alike.

    `x + W2 gelu(W1 norm(x))`; `W2` and its bias start at zero, so that the output is the
    input, to the last digit, until a first step is taken. One projector serves the query
    and the target side (the row `+ VisionProjector` of UNION's results; the layout here
    is ours, since none was published).

    Args:
        width: Width of the joint space.
        hidden: Inner width; twice `width` where None.

    Attributes:
        kind: Name of the projector in configurations and saved models.
        options: The keyword arguments that build the same projector again.
    """

    kind = "mlp"

    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = 2 * width if hidden is None else hidden
        self.options: dict[str, Any] = {"hidden": hidden}
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, images: Features) -> Features:
        """Project pooled and token features; mask and position of the pooled token stay."""
        tokens = None if images.tokens is None else self._project(images.tokens)
        return Features(self._project(images.pooled), tokens, images.mask, images.pooled_at)

    def _project(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        result: torch.Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return result


def build_projector(kind: str, width: int, **options: Any) -> VisionProjector | None:
    """Build a projector by name.

    Args:
        kind: `none` or `mlp`.
        width: Width of the joint space.
        options: `hidden` for `mlp`.

    Returns:
        The projector, or None for `none`.

    Raises:
        ConfigError: Where the name or an option is not known, or a value is not allowed.
    """
    if kind not in ("none", "mlp"):
        raise ConfigError(f"projector {kind!r} does not exist; choose none or mlp")
    allowed = {"hidden"} if kind == "mlp" else set()
    if unknown := sorted(set(options) - allowed):
        raise ConfigError(
            f"projector {kind!r} does not take {', '.join(unknown)}; it takes {', '.join(allowed) or 'no option'}"
        )
    if kind == "none":
        return None
    hidden = options.get("hidden")
    if hidden is not None and (not isinstance(hidden, int) or hidden < 1):
        raise ConfigError(f"projector's hidden width is {hidden!r}; give a whole number above 0")
    return VisionProjector(width, hidden)
