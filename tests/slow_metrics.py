"""Metrics of one ranking, as their formulas are written: one candidate after the other."""

from union_igrot.metrics.functional import REFERENCE_EPSILON

NAN = float("nan")


def slow_ap(row, relevant, k, norm, rule):
    if relevant == 0:
        return NAN
    top = row[: len(row) if k is None else k]
    hits = sum(top)
    if hits == 0:
        return 0.0
    total, seen = 0.0, 0
    for place, hit in enumerate(top):
        if not hit:
            continue
        before = 1.0 if place == 0 else seen / place
        seen += 1
        at = seen / (place + 1)
        if rule == "step":
            total += at
        elif rule == "trapezoid":
            total += (before + at) / 2
        else:
            total += max(sum(top[: later + 1]) / (later + 1) for later in range(place, len(top)))
    if norm == "hits":
        return total / (hits + (REFERENCE_EPSILON if rule == "trapezoid" else 0))
    return total / (relevant if norm == "all" or k is None else min(k, relevant))


def slow_precision(row, relevant, k, cut):
    if relevant == 0:
        return NAN
    if cut == "k":
        return sum(row[:k]) / k
    if cut == "relevant":
        shorter = row[: min(k, relevant)]
        return sum(shorter) / min(k, relevant)
    return sum(row[:k]) / min(k, relevant)


def slow_recall(row, relevant, k, mode):
    if relevant == 0:
        return NAN
    return float(any(row[:k])) if mode == "any" else sum(row[:k]) / relevant
