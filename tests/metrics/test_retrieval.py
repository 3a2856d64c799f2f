"""Metrics gathered over batches and over two processes equal those of one."""

import json
import os
import subprocess
import sys

import pytest
import torch

from union_igrot.errors import ConfigError, DataError
from union_igrot.metrics.functional import average, average_precision, precision_at_k, recall_at_k
from union_igrot.metrics.retrieval import RankedHits, RetrievalMetrics
from union_igrot.types import Protocol

NAMES = ("R@1", "R@5", "Rs@1", "P@5", "mAP", "mAP@5")

CHILD = """
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from union_igrot.metrics.retrieval import RankedHits, RetrievalMetrics

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group(
    "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2, timeout=timedelta(seconds=30)
)
data = torch.load(folder / "data.pt", weights_only=True)
results = {}
for shares in ("padded", "lopsided"):
    metrics = RetrievalMetrics(data["names"])
    for batch in data[shares][rank]:
        some = torch.tensor(batch)
        hits, subset = data["hits"][some], data["subset"][some]
        metrics.update(RankedHits(hits, hits.sum(1)), some, RankedHits(subset, subset.sum(1)))
    results[shares] = {
        "means": {name: float(x) for name, x in metrics.compute().items()},
        "values": {name: x.tolist() for name, x in metrics.values().items()},
    }
(folder / f"{rank}.json").write_text(json.dumps(results))
dist.destroy_process_group()
# Gone at once: the threads of a backend may outlive the interpreter and end it with an abort.
sys.stdout.flush()
os._exit(0)
"""


def world(queries=23, gallery=31, seed=0):
    """Rankings with and without relevant candidates, with and without a subset."""
    generator = torch.Generator().manual_seed(seed)
    hits = torch.rand(queries, gallery, generator=generator) < 0.15
    hits[4] = False
    subset = torch.zeros(queries, 5, dtype=torch.bool)
    subset[torch.arange(queries), torch.randint(0, 5, (queries,), generator=generator)] = True
    subset[7] = False
    return {"hits": hits, "subset": subset}


def ranked(hits):
    return RankedHits(hits, hits.sum(1))


def feed(metrics, data, batches):
    for batch in batches:
        some = torch.tensor(batch)
        metrics.update(ranked(data["hits"][some]), some, ranked(data["subset"][some]))
    return metrics


def expected_values(data):
    hits, subset = data["hits"], data["subset"]
    n_relevant = hits.sum(1)
    return {
        "R@1": recall_at_k(hits, n_relevant, 1),
        "R@5": recall_at_k(hits, n_relevant, 5),
        "Rs@1": recall_at_k(subset, subset.sum(1), 1),
        "P@5": precision_at_k(hits, n_relevant, 5),
        "mAP": average_precision(hits, n_relevant),
        "mAP@5": average_precision(hits, n_relevant, 5),
    }


def assert_same(given, expected):
    assert list(given) == list(expected)
    for name, values in expected.items():
        torch.testing.assert_close(given[name], values, rtol=0, atol=1e-12, equal_nan=True)


def test_batches_in_any_order_equal_all_at_once():
    data = world()
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1)).tolist()
    metrics = feed(RetrievalMetrics(NAMES), data, [order[:9], order[9:10], order[10:]])
    expected = expected_values(data)
    assert_same(metrics.values(), expected)
    assert_same(metrics.compute(), {n: average(x) for n, x in expected.items()})
    assert expected["Rs@1"][7].isnan()
    assert expected["mAP"][4].isnan()


def test_a_query_that_comes_twice_counts_once():
    data = world()
    once = feed(RetrievalMetrics(NAMES), data, [range(23)]).compute()
    twice = feed(RetrievalMetrics(NAMES), data, [range(23), [0, 1, 2], [0]])
    assert_same(twice.compute(), once)
    assert len(twice.values()["R@1"]) == 23


def test_conventions_reach_the_metrics():
    data = world()
    names = ("R@5", "P@5", "mAP@5")
    protocol = Protocol(ap_norm="hits", ap_rule="trapezoid", recall="fraction", precision_cut="attainable")
    metrics, hits = RetrievalMetrics(names, protocol), data["hits"]
    n_relevant = hits.sum(1)
    expected = {
        "R@5": recall_at_k(hits, n_relevant, 5, "fraction"),
        "P@5": precision_at_k(hits, n_relevant, 5, "attainable"),
        "mAP@5": average_precision(hits, n_relevant, 5, "hits", "trapezoid"),
    }
    assert_same(feed(metrics, data, [range(23)]).values(), expected)


@pytest.mark.slow
def test_states_are_few_preallocated_blocks():
    """One small tensor a batch, living on between large ones, would tear the heap to pieces."""
    data = world(queries=200)
    batches = [range(at, at + 10) for at in range(0, 200, 10)]
    expecting, growing = RetrievalMetrics(NAMES, expected=200), RetrievalMetrics(NAMES)
    feed(expecting, data, batches[:1])
    places = [states[0].data_ptr() for states in (expecting.rows, expecting.positions)]
    feed(expecting, data, batches[1:])
    assert [states[0].data_ptr() for states in (expecting.rows, expecting.positions)] == places
    assert len(expecting.rows) == 1
    feed(growing, data, batches)
    assert len(growing.rows) <= 6
    assert_same(expecting.values(), growing.values())
    assert len(expecting.values()["mAP"]) == 200


def test_metrics_of_a_batch_do_not_change_the_total():
    data = world()
    metrics, own = RetrievalMetrics(NAMES, expected=23), []
    for at in (0, 8, 16):
        some = torch.arange(at, min(at + 8, 23))
        own.append(metrics(ranked(data["hits"][some]), some, ranked(data["subset"][some])))
    assert_same(metrics.values(), expected_values(data))
    assert_same(own[1], {name: average(x[8:16]) for name, x in expected_values(data).items()})


def test_what_is_missing_is_an_error():
    with pytest.raises(ConfigError, match="there is no metric"):
        RetrievalMetrics(())
    with pytest.raises(ConfigError, match="unknown metric 'recall'"):
        RetrievalMetrics(("recall",))
    with pytest.raises(DataError, match="subset rankings"):
        RetrievalMetrics(("Rs@1",)).update(ranked(torch.tensor([[True, False]])), torch.tensor([1]))
    with pytest.raises(DataError, match="no query to average"):
        RetrievalMetrics(("R@1",)).values()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    data = world()
    shares = {
        # Position 0 fills up the second share, as a distributed sampler does.
        "padded": [[list(range(0, 12, 2)), list(range(12, 23, 2))], [list(range(1, 23, 2)), [0]]],
        "lopsided": [[list(range(23))], []],
    }
    torch.save({**data, **shares, "names": list(NAMES)}, tmp_path / "data.pt")
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    children = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for child in children:
            output, _ = child.communicate(timeout=90)
            assert child.returncode == 0, output
    finally:
        for child in children:
            child.kill()
            child.communicate()
    expected = expected_values(data)
    for rank in range(2):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        for share in shares:
            means = {name: average(x).item() for name, x in expected.items()}
            assert results[share]["means"] == pytest.approx(means, abs=1e-6)
            values = {n: torch.tensor(x, dtype=torch.float64) for n, x in results[share]["values"].items()}
            assert_same(values, expected)
