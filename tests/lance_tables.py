"""Small Lance tables and what is in them, for tests of the engine."""

import torch
from torch.nn.functional import normalize

from union_igrot.gallery.engines.base import Rows
from union_igrot.gallery.engines.factory import open_index


def made(uri, dim=4, **options):
    return open_index(uri, dim=dim, create=True, **options)


def some(names, dim=4, seed=0, **columns):
    draw = torch.Generator().manual_seed(seed)
    return Rows(list(names), normalize(torch.randn(len(names), dim, generator=draw), dim=-1), columns)


def ids(index, where=None):
    return [one for batch in index.scan(["id"], where) for one in batch["id"]]
