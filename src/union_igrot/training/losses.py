"""The contrastive loss: each query finds its target among the targets of its batch."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from union_igrot.training.settings import LossSettings


def info_nce(
    queries: Float[Tensor, "queries dim"],
    targets: Float[Tensor, "targets dim"],
    positives: Int[Tensor, " queries"],
    query_groups: Int[Tensor, " queries"] | None = None,
    target_groups: Int[Tensor, " targets"] | None = None,
    scale: float = 100.0,
) -> Float[Tensor, ""]:
    """Return the cross-entropy of finding each query's target among all targets (InfoNCE).

    Source: van den Oord et al., arXiv 1807.03748, equation 4; the scale of 100 is CLIP's and the reference's.

    Args:
        queries: Query embeddings of unit length.
        targets: Target embeddings; of unit length except for the reference's training sum.
        positives: Position of each query's own target among `targets`.
        query_groups: Group of each query's target; other targets of the same group are left out of the query's
            negatives. None leaves nothing out.
        target_groups: Group of each target; given together with `query_groups` or not at all.
        scale: Factor of the cosine similarities (1 / temperature).

    Returns:
        The mean over queries, in nats, at least 0.

    Raises:
        ValueError: If only one of the groups is given.
    """
    if (query_groups is None) != (target_groups is None):
        raise ValueError("query_groups and target_groups must be given together (got one of them)")
    logits = scale * queries @ targets.T
    if query_groups is not None and target_groups is not None:
        same = query_groups[:, None] == target_groups[None, :]
        same[torch.arange(len(positives), device=positives.device), positives] = False
        logits = logits.masked_fill(same, float("-inf"))
    return F.cross_entropy(logits, positives)


class InfoNCE(nn.Module):
    """InfoNCE over the batch, with the negatives of all ranks if training is distributed.

    Args:
        scale: Factor of the cosine similarities (100 in the reference).
        symmetric: Whether targets also retrieve their queries; the loss is the mean of both.
        skip_duplicates: Whether targets of one group are not negatives of each other. In the reference they are.
    """

    def __init__(
        self,
        scale: float = LossSettings.scale,
        *,
        symmetric: bool = LossSettings.symmetric,
        skip_duplicates: bool = LossSettings.skip_duplicates,
    ) -> None:
        super().__init__()
        self.scale, self.symmetric, self.skip_duplicates = scale, symmetric, skip_duplicates

    def extra_repr(self) -> str:
        """Return the options for `repr`."""
        return f"scale={self.scale}, symmetric={self.symmetric}, skip_duplicates={self.skip_duplicates}"

    def forward(
        self,
        queries: Float[Tensor, "batch dim"],
        targets: Float[Tensor, "batch dim"],
        groups: Int[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        """Return the loss of this rank's queries; row i of `targets` is the target of query i."""
        all_targets, start = _gather(targets)
        all_groups, _ = _gather(groups)
        positives = torch.arange(start, start + len(queries), device=queries.device)
        own, every = (groups, all_groups) if self.skip_duplicates else (None, None)
        loss = info_nce(queries, all_targets, positives, own, every, self.scale)
        if self.symmetric:
            all_queries, _ = _gather(queries)
            loss = (loss + info_nce(targets, all_queries, positives, own, every, self.scale)) / 2
        return loss


class _AllGather(torch.autograd.Function):
    """The rows of all ranks, concatenated; the gradient of a row is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """Gather; all ranks have the same number of rows."""
        gathered = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(gathered, rows.contiguous())
        ctx.count = len(rows)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Sum over ranks and select this rank's rows."""
        total = gradients[0].contiguous()
        torch.distributed.all_reduce(total)
        begin = torch.distributed.get_rank() * ctx.count
        return total[begin : begin + ctx.count]


def _gather(rows: Tensor) -> tuple[Tensor, int]:
    """Return the rows of all ranks, with gradient, and the position of this rank's first."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows, 0
    gathered: Tensor = _AllGather.apply(rows)
    return gathered, torch.distributed.get_rank() * len(rows)
