"""The vision projector: a small trained residual network on the frozen image features."""

from typing import Any, final

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from union_igrot.models.heads.query import check_sizes
from union_igrot.types import Features


@final
class VisionProjector(nn.Module):
    """A residual network of two layers on each image vector, pooled and tokens alike.

    `x + W2 gelu(W1 norm(x))`; `W2` and its bias start at zero, so that training begins at the plain features. One
    projector serves queries and targets (the row `+ VisionProjector` of UNION's results, whose layout was not
    published).

    Args:
        width: Width of the joint space.
        hidden: Inner width; None for twice `width`.

    Attributes:
        kind: Name of the projector in configurations and saved models.
        options: The keyword arguments that build the same projector again.
    """

    kind = "mlp"

    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = 2 * width if hidden is None else hidden
        check_sizes(hidden=hidden)
        self.options: dict[str, Any] = {"hidden": hidden}
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, images: Features) -> Features:
        """Project pooled and token features; mask and pooled position stay."""
        tokens = None if images.tokens is None else self._project(images.tokens)
        return Features(self._project(images.pooled), tokens, images.mask, images.pooled_at)

    def _project(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        result: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return result
