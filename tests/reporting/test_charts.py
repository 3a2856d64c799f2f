"""Charts of a report: layout, ticks, curves of a training, recall and weights."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, strategies as st

from small_world import Noise
from union_igrot.evaluation.results import ScoredBenchmark
from union_igrot.reporting.charts import (
    MAX_POINTS,
    layout_chart,
    nice_ticks,
    read_curves,
    recall_chart,
    thin,
    weights_chart,
)
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query, Ranking, Scores

VALUES = st.floats(-1e9, 1e9) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0])
CURVES = st.lists(VALUES, min_size=1, max_size=700).map(lambda values: [(float(n), y) for n, y in enumerate(values)])


def points(chart):
    return [tuple(map(float, pair.split(","))) for pair in chart.line.split()]


@given(CURVES)
def test_every_finite_point_is_inside_the_drawing_and_the_others_are_counted(curve):
    chart = layout_chart("train/loss", curve)
    finite = [y for _, y in curve if math.isfinite(y)]
    drawn = points(chart)
    assert len(drawn) == min(len(finite), MAX_POINTS)
    assert all(chart.left <= x <= chart.right and 0 <= y <= chart.height for x, y in drawn)
    assert all(0 <= tick.at <= chart.height for tick in chart.rows)
    assert all(chart.left <= tick.at <= chart.right for tick in chart.columns)
    lost = len(curve) - len(finite)
    assert (f"{lost:,} of {len(curve):,} values are not finite" in chart.description) == (lost > 0)


def test_a_curve_is_described_and_drawn_upwards():
    chart = layout_chart("val/score", [(9.0, 50.25), (19.0, 40.0), (29.0, 60.0)])
    assert chart.description == "from 50.25 at step 9 to 60 at step 29; lowest 40 (step 19), highest 60 (step 29)"
    (a, b, c) = points(chart)
    assert a[0] < b[0] < c[0]
    assert c[1] < a[1] < b[1], "y grows downwards"
    assert chart.dots == (a, b, c)
    labels = {tick.label: tick.at for tick in chart.rows}
    assert labels["40"] == b[1]
    assert labels["60"] == c[1]


@pytest.mark.parametrize("number", [1, 2, MAX_POINTS, MAX_POINTS + 1, 5 * MAX_POINTS])
def test_a_thinned_curve_keeps_its_mean_and_its_order(number):
    curve = [(float(n), math.sin(n / 30)) for n in range(number)]
    kept = thin(curve)
    assert len(kept) == min(number, MAX_POINTS)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    if number % MAX_POINTS == 0:
        assert sum(y for _, y in kept) / len(kept) == pytest.approx(sum(y for _, y in curve) / number)
    assert ("each point drawn is the mean" in layout_chart("x", curve).description) == (number > MAX_POINTS)


@given(st.floats(-1e12, 1e12), st.floats(0, 1e12), st.booleans())
def test_ticks_are_few_even_and_cover_the_range(low, span, whole):
    ticks = nice_ticks(low, low + span, whole=whole)
    slack = 1e-6 * max(abs(low), span, 1.0)
    assert 2 <= len(ticks) <= 7
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + span - slack
    gaps = [after - before for before, after in pairwise(ticks)]
    assert max(gaps) - min(gaps) <= 1e-6 * max(map(abs, ticks))
    assert not whole or all(tick == round(tick) for tick in ticks)


def test_curves_of_an_interrupted_training_are_joined_by_step(tmp_path):
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    first.write_text("epoch,step,train/loss,val/score\n0,4,2.0,\n0,9,1.5,\n0,9,,40.0\n1,14,9.0,\n")
    second.write_text("epoch,step,train/loss,val/score\n1,14,1.0,\n1,19,0.5,50.0\n")
    assert read_curves([first, second]) == {
        "train/loss": [(4, 2.0), (9, 1.5), (14, 1.0), (19, 0.5)],
        "val/score": [(9, 40.0), (19, 50.0)],
    }
    assert read_curves([]) == {}


def ranked(**firsts):
    """Methods on queries whose first target has these ranks; 0 for none."""
    count = len(next(iter(firsts.values())))
    items = [GalleryItem(f"g{n}", Noise(n)) for n in range(12)]
    queries = [Query(f"q{n}", Noise(n), "x", (f"g{n}", "g10")) for n in range(count)] + [Query("hidden", Noise(0), "x")]
    scores = {}
    for method, ranks in firsts.items():
        positions = torch.full((count + 1, 10), 11)
        for row, rank in enumerate(ranks):
            if rank:
                positions[row, rank - 1] = row
                positions[row, rank:] = 10  # more targets change nothing
        scores[method] = Scores({}, Ranking(positions, torch.zeros(positions.shape)))
    return ScoredBenchmark(Benchmark("b", "val", "cir", queries, items, Protocol()), scores)


def test_recall_is_drawn_over_k_for_every_method():
    chart = recall_chart(ranked(chance=(0, 0, 0, 10), trained=(1, 3, 3, 0)))
    assert chart.description.endswith("first k; trained 25.0 to 75.0, chance 0.0 to 25.0; full line: trained")
    level = {float(tick.label): tick.at for tick in chart.rows}
    assert level[0] - level[100] == pytest.approx(190)
    heights = [(level[0] - y) / 1.9 for _, y in points(chart)]
    assert heights == pytest.approx([25, 25] + 8 * [75], abs=0.1)
    (other,) = chart.others
    assert other[0] == "chance"
    assert [float(pair.partition(",")[2]) for pair in other[1].split()] == pytest.approx(
        9 * [level[0]] + [(3 * level[0] + level[100]) / 4], abs=0.1
    )
    assert [tick.label for tick in chart.columns] == ["1", "10"]
    assert recall_chart(ranked(trained=(1, 1, 0))) is None


@pytest.mark.parametrize("weights", [(1.0,), (0.5, 0.5, -1.0, 2.0), tuple(n / 97 for n in range(500))])
def test_a_histogram_has_a_bar_of_each_weight(weights):
    chart = weights_chart(weights)
    unit = (chart.rows[0].at - chart.rows[-1].at) / float(chart.rows[-1].label)
    assert sum(height for *_, height in chart.bars) == pytest.approx(len(weights) * unit, abs=0.05 * len(chart.bars))
    assert all(chart.left <= x and x + width <= chart.right for x, _, width, _ in chart.bars)
    assert chart.description.startswith(f"{len(weights):,} images, from {min(weights):.3g} to ")
