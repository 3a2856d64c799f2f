import json
import re
import shlex
from collections import Counter
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from html_page import Page, check_page
from small_runs import Run
from small_world import Noise, cir_benchmark, extractor, sbir_benchmark, trainable
from union_igrot.evaluation.evaluate import average_parts, evaluate_benchmark
from union_igrot.evaluation.results import EvaluationResult, ScoredBenchmark, TagMetric
from union_igrot.evaluation.tables import method_name
from union_igrot.images.transforms import image_batch
from union_igrot.reporting.page import (
    MAX_BYTES,
    MAX_GROUPS,
    RESULTS,
    SHOWN,
    Provenance,
    class_groups,
    example_groups,
    render_page,
)
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query, Ranking, Scores

NASTY = """</li><script>alert("1")</script> it's & "quoted" <img src=x onerror=alert(1)>"""


MADE = Provenance("union-eval: noise", "now", "union-eval", "there", "seed: 0\n", {}, {"union-igrot": "0"}, 0)


def drawn(*found, limit=MAX_BYTES, made=MADE, curves=None, open_image=lambda source: source.open()):
    return render_page(sum(found, EvaluationResult()), curves or {}, made, open_image, limit)


def alone(benchmark, **scores):
    """A benchmark that was scored without any metric."""
    return EvaluationResult(scored=(ScoredBenchmark(benchmark, scores),))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Composed queries, sketches, and composed queries once more."""
    model, filled = trainable(), extractor(tmp_path_factory.mktemp("store"))
    asked = cir_benchmark(), sbir_benchmark(), cir_benchmark(seed=1, name="more_noise")
    return [evaluate_benchmark(model, benchmark, filled) for benchmark in asked]


@pytest.fixture(scope="module")
def noise(parts):
    return parts[:2]


@pytest.mark.slow
def test_the_page_of_a_training(small_run: Run):
    path = small_run.folder / "report.html"
    assert path.stat().st_size <= MAX_BYTES
    page = check_page(path.read_text(encoding="utf-8"))
    titles = [one["text"] for one in page.all("h2")]
    assert titles == [
        "At a glance",
        "shapes_cir · test",
        "shapes_sbir · test",
        "Training",
        "How to reproduce it",
    ]
    assert [one["text"] for one in page.all("a")] == titles
    (command,) = page.all("pre", **{"class": "command"})
    assert shlex.split(command["text"]) == ["union-train", *small_run.settings]
    written = (small_run.folder / "config.yaml").read_text()
    assert OmegaConf.create(page.all("pre", tabindex="0")[0]["text"]) == OmegaConf.create(written)
    facts = dict(map(tuple, page.lines_of("Training of the heads")[0]))
    assert facts["samples"] == "128"
    assert re.fullmatch(r"\d:\d\d:\d\d h, on .+", facts["time"])
    assert facts["best epoch"].startswith("1 of 1 (val/score ")
    hashes = dict(map(tuple, page.lines_of("Hashes")[0]))
    assert hashes["heads"] == json.loads((small_run.folder / "model" / "model.json").read_text())["heads"]
    assert {"queries of shapes_cir · test", "queries of shapes_sbir · test", "backbone", "seed"} <= hashes.keys()
    assert {"torch", "python", "union-igrot"} <= dict(map(tuple, page.lines_of("Versions")[0])).keys()
    shown = [one["text"] for one in page.all("figcaption") if " by step: " in one["text"]]
    curves = [text.partition(" by step: from ")[0] for text in shown]
    assert {"train/loss_cir", "train/loss_sbir", "val/score"} <= set(curves)
    assert len(page.all("li", **{"class": "example"})) == 2 * 3 * SHOWN
    folded = page.all("details")[:-1]
    assert [one.get("open", "no") for one in folded] == 2 * [None, "no", "no"]
    assert [one["text"] for one in page.all("summary")[:3]] == ["Some queries", "The worst failures", "The best"]
    assert sum("R@k by k: percent of the queries" in one["text"] for one in page.all("figcaption")) == 2


@pytest.mark.slow
def test_bars_at_a_glance_show_values_and_intervals(noise):
    text = drawn(*noise)
    rects = re.findall(
        r'<rect class="(?:win|range)"( x="[^"]*")?[^>]* width="([^"]*)"', text.partition('id="benchmark-1"')[0]
    )
    bars = [(width, left.split('"')[1] if left else None) for left, width in rects]
    expected = []
    for one in noise:
        for method in reversed(one.methods):
            (low, high), value = method.intervals[method.primary], method.metrics[method.primary]
            expected += [(round(value, 1), None), (round(high, 1) - round(low, 1), round(low, 1))]
    assert len(bars) == len(expected)
    for (width, left), (value, start) in zip(bars, expected, strict=True):
        assert float(width) == pytest.approx(value, abs=0.051)
        assert (left is None) == (start is None)
        assert start is None or float(left) == start


@pytest.mark.slow
def test_weights_of_union_are_drawn_and_those_of_other_heads_not(noise, tmp_path):
    (scored,), gallery = noise[0].scored, noise[0].scored[0].benchmark.gallery
    assert len(scored.target_weights) == len(gallery)
    model = trainable()
    vectors = model.backbone.encode_image(image_batch([item.image for item in gallery], model.backbone.preprocess))
    null = model.backbone.encode_text([""]).expand(len(gallery))
    weights = model.eval().target.weight(vectors.pooled, null.pooled).flatten()
    assert scored.target_weights == pytest.approx(weights.tolist(), abs=1e-4)
    assert "weight of the image in UNION" in drawn(noise[0])
    other = evaluate_benchmark(trainable("sum", "frozen"), scored.benchmark, extractor(tmp_path))
    assert "weight of the image in UNION" not in drawn(other)


def test_the_metrics_are_those_of_the_results(small_run: Run):
    page = Page((small_run.folder / "report.html").read_text(encoding="utf-8"))
    tables = page.lines_of("95 % bootstrap interval over queries")
    rows = small_run.rows
    assert len(tables) == 2
    for table in tables:
        head, *lines = table
        names = [name.removesuffix("primary").rstrip("†") for name in head[1:]]
        for line in lines:
            row = rows.pop(0)
            assert line[0].removesuffix(" *") == method_name(row["method"])
            for name, cell in zip(names, line[1:], strict=True):
                metric, low, high = (float(x) for x in re.findall(r"[\d.]+", cell.replace("100[", "100.0[")))
                low_high = [row["metrics"][name], *row["ci95"][name]]
                assert [metric, low, high] == pytest.approx(low_high, abs=0.0501)
    assert rows == []


def test_wins_ties_and_losses_are_counted_query_by_query(small_run: Run):
    page = Page((small_run.folder / "report.html").read_text(encoding="utf-8"))
    for name, (_, *lines) in zip(("shapes_cir", "shapes_sbir"), page.lines_of("bars from left"), strict=True):
        values = load_file(small_run.folder / f"queries-{name}-test.safetensors")
        last = next(row for row in small_run.rows if (row["benchmark"], row["method"]) == (name, "trained"))
        primary = last["protocol"]["primary"]
        assert len(lines) == 5
        for line, other in zip(lines, ("chance", "image", "text", "sum", "product"), strict=True):
            pairs = list(zip(values[f"trained/{primary}"].tolist(), values[f"{other}/{primary}"].tolist(), strict=True))
            counts = [sum(a > b for a, b in pairs), sum(a == b for a, b in pairs), sum(a < b for a, b in pairs)]
            assert line[0] == method_name(other)
            said = [f"{count}{100 * count / len(pairs):.1f} %" for count in counts]
            assert line[1:4] == said
            assert line[4] == f"{100 * (counts[0] + counts[2]) / len(pairs):.1f} %"
            mean, low, high = last["gain95"][other][primary]
            assert line[5] == f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
            assert line[6] == ("better" if low > 0 else "worse" if high < 0 else "no clear difference")


def test_the_page_of_a_backbone_alone(noise):
    (scored,) = noise[0].scored
    scores = {name: part for name, part in scored.scores.items() if name != "trained"}
    page = check_page(drawn(EvaluationResult(noise[0].methods[:-1], (replace(scored, scores=scores),))))
    assert not [one for one in page.all("h3") if "differ" in one["text"]]
    assert not page.lines_of("Training of the heads")
    assert "“image + text”" in "".join(one["text"] for one in page.all("p"))
    (table,) = page.lines_of("The primary metric")
    assert table[0] == ["benchmark", "image x text", "image + text", "text alone", "image alone", "chance"]


def test_tiles_mark_relevant_results_by_words_and_frame(noise):
    (composed, _) = noise
    page = check_page(drawn(composed))
    (scored,) = composed.scored
    benchmark, scores = scored.benchmark, scored.scores["trained"]
    drawer = [place for group in example_groups(scored, "trained") for place in group.rows]
    tiles = page.all("li")
    starts = [n for n, one in enumerate(tiles) if one.get("class") == "example"]
    assert len(starts) == len(drawer)
    for place, start, end in zip(drawer, starts, [*starts[1:], len(tiles)], strict=True):
        query, *answers = [one for one in tiles[start + 1 : end] if one.get("class", "").startswith("tile")]
        assert query["class"] == "tile query"
        targets = set(benchmark.queries[place].targets)
        ranked = [benchmark.gallery[at].id for at in scores.ranking.positions[place].tolist()]
        for rank, (name, tile) in enumerate(zip(ranked[:RESULTS], answers, strict=False), 1):
            kind, word = ("right", "✓ right") if name in targets else ("wrong", "✗ wrong")
            if not targets:
                kind, word = "", ""
            assert tile["class"].split() == ["tile", *kind.split()]
            assert tile["text"] == f"{rank} {word}".strip() + name
        missed = answers[RESULTS:]
        assert bool(missed) == bool(targets and not targets & set(ranked[:RESULTS]))
        for tile in missed:
            first = benchmark.queries[place].targets[0]
            assert tile["text"] == f"missed (rank {ranked.index(first) + 1}){first}"


def test_the_worst_and_the_best_are_what_a_slow_search_finds():
    queries, gallery = 40, 12
    items = [GalleryItem(f"g{n}", Noise(n)) for n in range(gallery)]
    asked = [Query(f"q{n}", Noise(n), targets=("g0",), label=f"c{n % 7}") for n in range(queries)]
    benchmark = Benchmark("b", "test", "sbir", asked, items, Protocol())
    steps = torch.randint(0, 5, (3, queries), generator=torch.Generator().manual_seed(0)) / 4
    steps[0, 5] = torch.nan
    ranking = Ranking(torch.zeros(queries, 4, dtype=torch.long), torch.zeros(queries, 4))
    names = ("chance", "sum", "trained")
    scores = {name: Scores({"mAP": values}, ranking) for name, values in zip(names, steps.flip(0), strict=True)}
    own, other = scores["trained"].values["mAP"].tolist(), scores["sum"].values["mAP"].tolist()
    known = [n for n in range(queries) if n != 5]

    def few(order):
        taken = []
        for n in order:
            if sum(asked[n].label == asked[m].label for m in taken) < 2 and len(taken) < SHOWN:
                taken.append(n)
        return taken

    some, worst, best = example_groups(ScoredBenchmark(benchmark, scores), "trained")
    assert len(some.rows) == SHOWN
    assert max(Counter(asked[n].label for n in some.rows).values()) <= 2
    assert worst.rows == few(sorted((n for n in known if own[n] < 1), key=lambda n: (own[n], -other[n], n)))
    assert best.rows == few(sorted((n for n in known if own[n] > 0), key=lambda n: (-own[n], other[n], n)))
    assert "At most 2 per class" in worst.description
    perfect = {"trained": Scores({"mAP": torch.ones(queries)}, ranking)}
    _, worst, best = example_groups(ScoredBenchmark(benchmark, perfect), "trained")
    assert (worst.rows, len(best.rows)) == ([], SHOWN)
    assert worst.description.startswith("None")


def test_without_published_targets_no_result_is_marked():
    found = Benchmark(
        "b",
        "test",
        "cir",
        [Query(f"q{n}", Noise(n), text="red") for n in range(9)],
        [GalleryItem(f"g{n}", Noise(n)) for n in range(9)],
        Protocol(),
    )
    ranking = Ranking(torch.arange(9).expand(9, 9).clone(), torch.zeros(9, 9))
    page = check_page(drawn(alone(found, submitted=Scores({"mAP": torch.full((9,), torch.nan)}, ranking))))
    assert {one["class"].strip() for one in page.all("li") if "class" in one} == {"example", "tile query", "tile"}
    assert [one["text"] for one in page.all("h3")] == ["Some queries"]
    assert "not published" in "".join(one["text"] for one in page.all("li"))


def test_padding_of_a_subset_is_not_shown():
    items = [GalleryItem(f"g{n}", Noise(n)) for n in range(5)]
    found = Benchmark("b", "val", "cir", [Query("q", Noise(9), targets=("g1",))], items, Protocol())
    ranking = Ranking(torch.tensor([[2, 1, -1, -1]]), torch.zeros(1, 4))
    page = Page(drawn(alone(found, trained=Scores({"mAP": torch.tensor([0.5])}, ranking))))
    tiles = [one["text"] for one in page.all("li") if one.get("class", "").startswith("tile")]
    assert tiles == 3 * ["query", "1 ✗ wrongg2", "2 ✓ rightg1"]


def test_texts_are_escaped(noise):
    (scored,) = noise[1].scored
    items = [replace(item, caption=f"{item.id} {NASTY}") for item in scored.benchmark.gallery]
    queries = [replace(query, text=NASTY, label=NASTY) for query in scored.benchmark.queries]
    benchmark = replace(scored.benchmark, name=f"n{NASTY}", split=NASTY, queries=queries, gallery=items)
    named = {
        "benchmark": benchmark.name,
        "split": NASTY,
        "seen_classes": (NASTY,),
        "by_tag": {NASTY: TagMetric(3, 1.0)},
    }
    found = EvaluationResult(
        tuple(replace(one, **named) for one in noise[1].methods), (replace(scored, benchmark=benchmark),)
    )
    card = {"data": NASTY, "samples": 3, "classes": [NASTY], "config": {}}
    made = Provenance(NASTY, NASTY, f"union-eval '{NASTY}'", NASTY, NASTY, card, {"union-igrot": NASTY}, 0)
    curves = {NASTY: [(0.0, 1.0), (1.0, 2.0)]}
    page = check_page(drawn(found, made=made, curves=curves))
    assert page.all("title")[0]["text"] == NASTY
    assert page.all("h2")[1]["text"] == f"n{NASTY} · {NASTY}"
    assert {one["text"] for one in page.all("p", **{"class": "text"})} == {NASTY}
    assert [line[0] for table in page.lines_of("mAP in percent by") for line in table[1:]] == [NASTY, f"{NASTY} *"]
    starred = [cell for line in page.lines_of("primary metric")[0][1:] for cell in line if " *" in cell]
    assert starred
    assert sum("*: the heads were trained on some of" in one["text"] for one in page.all("figcaption")) == 1
    images = page.all("img")
    assert len(images) >= 6 * (1 + RESULTS)
    assert all(NASTY[:40] in one["alt"] for one in images)


class Static:
    """A large image of noise, which no format makes small."""

    def __init__(self, number):
        self.key = f"static/{number}"
        self._number = number

    def open(self):
        noise = np.random.default_rng(self._number).integers(0, 256, (300, 200, 3)).astype(np.uint8)
        return Image.fromarray(noise)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [48_000, 200_000, 600_000])
def test_a_page_stays_within_its_bound(noise, limit):
    photos = {}

    def static(source):
        return photos.setdefault(source.key, Static(len(photos))).open()

    text = drawn(*noise, limit=limit, open_image=static)
    page = check_page(text)
    assert len(text.encode()) <= limit
    examples = len(page.all("li", **{"class": "example"}))
    left = [int(n) for n in re.findall(r"(\d+) more do not fit", text)]
    asked = sum(len(group.rows) for one in noise for group in example_groups(one.scored[0], "trained"))
    assert examples + sum(left) == asked
    assert f"a page of {limit:,} bytes" in text
    # Nothing is given away: one more example would not have fitted.
    assert examples == 0 if limit == 48_000 else limit - len(text.encode()) < 70_000


@pytest.mark.slow
def test_the_mean_of_parts_has_its_table_and_its_differences_and_no_images(parts):
    both = [parts[0], parts[2]]
    text = drawn(*both, average_parts(both, "both_mean"))
    page = check_page(text)
    whole = text[text.index('<h2 id="benchmark-3">both_mean') : text.index("Training</h2>")]
    assert "<img" not in whole
    assert "unweighted mean over noise_cir, more_noise" in whole
    _, _, (_, *lines) = page.lines_of("bars from left")
    primary, scores = both[0].methods[0].primary, [one.scored[0].scores for one in both]
    for line, other in zip(lines, ("chance", "image", "text", "sum", "product"), strict=True):
        gaps = torch.cat([one["trained"].values[primary] - one[other].values[primary] for one in scores])
        gaps = gaps[~gaps.isnan()]
        counts = [int((gaps > 0).sum()), int((gaps == 0).sum()), int((gaps < 0).sum())]
        assert line[:4] == [method_name(other), *(f"{n}{100 * n / len(gaps):.1f} %" for n in counts)]


def test_of_many_classes_the_lowest_and_the_highest_are_shown_and_trained_ones_are_marked():
    labels = [f"class {n:02}" for n in range(MAX_GROUPS + 11)]
    items = [GalleryItem(f"g{n}", Noise(n)) for n in range(3)]
    asked = [Query(f"q{n}", Noise(n), targets=("g0",), label=label) for n, label in enumerate(labels)]
    benchmark = Benchmark("b", "test", "sbir", asked, items, Protocol())
    values = torch.linspace(0, 1, len(labels))
    ranking = Ranking(torch.zeros(len(labels), 1, dtype=torch.long), torch.zeros(len(labels), 1))
    scored = ScoredBenchmark(benchmark, {"trained": Scores({"mAP": values}, ranking)})
    title, table = class_groups(scored, ["class 00", "class 40"])
    half = MAX_GROUPS // 2
    names = [line.name for line in table.rows]
    assert names == ["class 00 *", *labels[1:half], *labels[-half:-1], "class 40 *"]
    assert title == "By class"
    assert str(len(labels)) in table.caption
    assert "not zero-shot" in table.caption
    assert "zero-shot" not in class_groups(scored, [])[1].caption


def test_each_gallery_image_is_decoded_once(noise):
    (scored,), opened = noise[0].scored, []

    def counted(source):
        opened.append(source.key)
        return source.open()

    drawn(noise[0], open_image=counted)
    queries = sum(len(group.rows) for group in example_groups(scored, "trained"))
    assert len(opened) - queries <= len(scored.benchmark.gallery)


def colours(block):
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))


def luminance(colour):
    """Relative luminance (WCAG 2.2)."""
    shares = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_text_is_easily_read_in_light_and_dark():
    style = (files("union_igrot.reporting") / "templates" / "page.css").read_text()
    light, dark = (colours(style[start:]) for start in (0, style.index("prefers-color-scheme: dark")))
    light = {**dark, **colours(style[: style.index("@media")])}
    assert light.keys() == dark.keys()
    assert light["paper"] != dark["paper"]
    for scheme in (light, dark):
        for ink in ("ink", "soft", "accent", "right", "wrong"):
            for paper in ("paper", "card"):
                one, other = sorted((luminance(scheme[ink]), luminance(scheme[paper])), reverse=True)
                assert (one + 0.05) / (other + 0.05) >= 4.5, (ink, paper)
