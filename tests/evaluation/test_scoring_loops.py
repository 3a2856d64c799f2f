"""Every convention of a protocol against literal loops over all orders of tied candidates."""

import itertools
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from union_igrot.evaluation.scoring import score
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query

IMAGE = Path("x")
METRICS = ("R@1", "R@3", "R@9", "Rs@1", "Rs@2", "P@2", "P@9", "mAP", "mAP@2", "mAP@9", "hit@1", "MeanRank")


def recall(hits, total, k, protocol):
    found = sum(hits[:k])
    return Fraction(found, total) if protocol.recall == "fraction" else Fraction(found > 0)


def precision(hits, total, k, protocol):
    attainable = min(k, total)
    depth = attainable if protocol.precision_cut == "relevant" else k
    return Fraction(sum(hits[:depth]), k if protocol.precision_cut == "k" else attainable)


def average_precision(hits, total, k, protocol):
    area, found, k = Fraction(0), 0, k or len(hits)
    for place, hit in enumerate(hits[:k], 1):
        before = Fraction(found, place - 1) if place > 1 else Fraction(1)
        found += hit
        here = Fraction(found, place)
        area += hit * ((before + here) / 2 if protocol.ap_rule == "trapezoid" else here)
    return area / (total if protocol.ap_norm == "all" else min(k, total))


def first_rank(hits, _total, _k, _protocol):
    return Fraction(hits.index(True) + 1)


FUNCTIONS = {"R": recall, "Rs": recall, "hit": lambda h, t, k, _: recall(h, t, k, Protocol()), "P": precision}
FUNCTIONS |= {"mAP": average_precision, "MeanRank": first_rank}


def value(name, relevant, candidates, row, protocol):
    """The metric of one query: `row` are the scores by position."""
    kind, _, k = name.partition("@")
    total = len(relevant & set(candidates))
    if not total:
        return math.nan if protocol.unanswered == "omit" or kind == "Rs" else 0.0
    if protocol.ties == "expected":
        orders = [
            [at for group in groups for at in group]
            for groups in itertools.product(
                *(
                    list(itertools.permutations(list(tied)))
                    for _, tied in itertools.groupby(sorted(candidates, key=lambda at: -row[at]), lambda at: row[at])
                )
            )
        ]
    else:
        late = protocol.ties == "pessimistic"
        orders = [sorted(candidates, key=lambda at: (-row[at], (at in relevant) if late else at))]
    hits = [[at in relevant for at in order] for order in orders]
    return float(sum(FUNCTIONS[kind](one, total, int(k or 0) or None, protocol) for one in hits) / len(hits))


@st.composite
def worlds(draw):
    size, asked = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    names = st.lists(st.sampled_from([f"g{at}" for at in range(size)]), max_size=size)
    exclude_reference, own = draw(st.booleans()), draw(st.booleans())
    queries = []
    for at in range(asked):
        targets, subset = tuple(draw(names)), tuple(draw(names)) if own or draw(st.booleans()) else None
        exclude = tuple(draw(names))[: size - 1]
        queries.append((f"q{at}", IMAGE, None, targets, exclude, subset))
    queries.append(("subset", IMAGE, None, ("g0",), (), ("g0",)))  # without any, the protocol cannot be used
    choices = {
        "ties": ["expected", "gallery order", "pessimistic"],
        "recall": ["any", "fraction"],
        "recall_targets": ["all", "first"],
        "precision_cut": ["k", "relevant", "attainable"],
        "ap_norm": ["min", "all"],
        "ap_rule": ["step", "trapezoid"],
        "unanswered": ["omit", "zero"],
    }
    conventions = {name: draw(st.sampled_from(values)) for name, values in choices.items()}
    conventions |= {"exclude_reference": exclude_reference, "candidates": "subset" if own else "gallery"}
    numbers = st.lists(st.integers(-1, 1), min_size=2, max_size=2)
    vectors = [draw(st.lists(numbers, min_size=n, max_size=n)) for n in (asked + 1, size)]
    return size, queries, conventions, vectors


@settings(max_examples=60, deadline=None)
@given(worlds())
def test_every_metric_equals_a_loop_over_all_orders(world):
    size, asked, conventions, vectors = world
    protocol = Protocol(metrics=METRICS, primary="R@1", **conventions)
    items = [GalleryItem(f"g{at}", IMAGE) for at in range(size)]
    benchmark = Benchmark("b", "val", "cir", [Query(*one) for one in asked], items, protocol)
    queries, gallery = (torch.tensor(side).float() for side in vectors)
    at = {item.id: place for place, item in enumerate(benchmark.gallery)}
    scores = score(benchmark, queries, gallery)
    for number, (query, row) in enumerate(zip(benchmark.queries, (queries @ gallery.T).tolist(), strict=True)):
        out = {at[name] for name in query.exclude} if protocol.exclude_reference else set()
        whole = [place for place in at.values() if place not in out]
        subset = sorted({at[name] for name in query.subset or ()} - out)
        candidates = subset if protocol.candidates == "subset" else whole
        targets = [at[name] for name in query.targets]
        for name in METRICS:
            inside = subset if name.startswith("Rs") else candidates
            first = name.startswith("R@") and protocol.recall_targets == "first"
            expected = value(name, set(targets[:1] if first else targets), inside, row, protocol)
            assert scores.values[name][number].item() == pytest.approx(expected, nan_ok=True), (name, query)
        order = [place for place in scores.ranking.positions[number].tolist() if place >= 0]
        assert len(order) == len(set(order))
        assert [row[place] for place in order] == sorted((row[place] for place in order), reverse=True)
