"""An engine as another package would add it: rows in a dictionary, registered for the scheme `toy`."""

from typing import ClassVar

import numpy as np
import torch

from union_igrot.errors import ConfigError
from union_igrot.gallery.engines import IndexHits, Rows, VectorIndex, matching, register_engine, topk_of_rows


class ToyIndex(VectorIndex):
    """All indexes of this process, by URI."""

    STORES: ClassVar[dict] = {}

    def __init__(self, uri, *, dim, metadata, create):
        if uri not in self.STORES:
            if not create:
                raise ConfigError(f"there is no index {uri}")
            self.STORES[uri] = {"dim": dim, "metadata": dict(metadata or {}), "kinds": {}, "rows": {}}
        self.uri, self._store = uri, self.STORES[uri]
        self.dim, self.metadata = self._store["dim"], self._store["metadata"]

    def __len__(self):
        return len(self._store["rows"])

    @property
    def columns(self):
        return dict(self._store["kinds"])

    def _upsert(self, rows, new):
        self._store["kinds"] |= new
        for i, name in enumerate(rows.ids):
            values = {column: given[i] for column, given in rows.columns.items()}
            self._store["rows"][name] = (rows.vectors[i].clone(), values)

    def _delete(self, ids):
        return sum(self._store["rows"].pop(name, None) is not None for name in ids)

    def _fetch(self, ids):
        return self._select([name for name in ids if name in self._store["rows"]], self.columns)

    def _select(self, ids, columns):
        rows = self._store["rows"]
        vectors = torch.stack([rows[name][0] for name in ids]) if ids else torch.empty(0, self.dim)
        values = {key: [name if key == "id" else rows[name][1].get(key) for name in ids] for key in columns}
        return Rows(ids, vectors, values)

    def _passing(self, condition):
        ids = list(self._store["rows"])
        if condition is None:
            return ids
        passes = matching(condition, lambda key: self._select(ids, [key]).columns[key])
        return [ids[i] for i in np.flatnonzero(passes)]

    def _scan(self, columns, condition):
        found = self._select(self._passing(condition), columns).columns
        return iter([found] if len(next(iter(found.values()), [])) else [])

    def _exact(self, queries, k, condition, columns):
        rows = self._select(self._passing(condition), [])
        if not rows.ids:
            return [IndexHits.empty(columns) for _ in queries]
        best = topk_of_rows(queries, rows.vectors, None, min(k, len(rows.ids)))
        chosen = [[rows.ids[i] for i in row] for row in best.positions.tolist()]
        return [
            IndexHits(ids, scores, self._select(ids, columns).columns)
            for ids, scores in zip(chosen, best.scores, strict=True)
        ]

    def optimize(self):
        pass


register_engine("toy", ToyIndex)
