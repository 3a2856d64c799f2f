"""Batches of one task, each sample at most once, the right features in each, nothing encoded twice."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from small_world import LinearBackbone, cir_benchmark, extractor, sbir_benchmark, triplets
from union_igrot.errors import ConfigError, DataError
from union_igrot.images.transforms import ImageToTensor
from union_igrot.training.datamodule import IGROTDataModule, TaskSampler
from union_igrot.types import TrainingSet


def module(folder, backbone=None, batch_size=6, tokens=True, validation=None, rank=0, world=1):
    data = IGROTDataModule(
        triplets(),
        [cir_benchmark(), sbir_benchmark()] if validation is None else validation,
        extractor(folder, backbone),
        query_tokens=tokens,
        target_tokens=False,
        batch_size=batch_size,
        seed=3,
    )
    data.trainer = SimpleNamespace(
        current_epoch=0,
        global_rank=rank,
        world_size=world,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return data


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(3, 40), min_size=1, max_size=3),
    size=st.integers(1, 9),
    world=st.integers(1, 3),
    epoch=st.integers(0, 5),
)
def test_shares_are_equal_disjoint_and_of_one_task(counts, size, world, epoch):
    tasks = [name for name, count in zip("abc", counts, strict=False) for _ in range(count)]
    shares = []
    for rank in range(world):
        batches = TaskSampler(tasks, size, 1, lambda: epoch, rank, world)
        share = list(batches)
        assert len(share) == len(batches)
        shares.append(share)
    for together in zip(*shares, strict=True):
        assert len({len(batch) for batch in together}) == 1
        assert 1 <= len(together[0]) <= size
        assert len({tasks[row] for batch in together for row in batch}) == 1
    rows = [row for share in shares for batch in share for row in batch]
    assert len(rows) == len(set(rows))
    for name, count in zip("abc", counts, strict=False):
        taken = sum(tasks[row] == name for row in rows)
        full = size * world
        assert taken == (count // full * full if count >= full else count // world * world)
        assert taken > 0


def test_the_joint_batch_does_not_depend_on_how_many_share_it():
    tasks = ["cir"] * 50 + ["sbir"] * 30
    alone = list(TaskSampler(tasks, 8, 2, int))
    halves = [list(TaskSampler(tasks, 4, 2, int, rank, 2)) for rank in (0, 1)]
    assert [first + second for first, second in zip(*halves, strict=True)] == alone


def test_the_order_follows_from_seed_and_epoch():
    def order(seed, epoch):
        return list(TaskSampler(["cir"] * 30, 5, seed, lambda: epoch))

    assert order(1, 2) == order(1, 2)
    different = {str(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}
    assert len(different) == 6


def test_too_few_samples_for_the_processes_are_an_error():
    with pytest.raises(DataError, match="2 sbir samples cannot be divided among 3 processes"):
        TaskSampler(["cir"] * 9 + ["sbir"] * 2, 4, 0, int, 0, 3)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [True, False])
def test_a_batch_holds_the_features_of_its_samples(tmp_path, tokens):
    backbone = LinearBackbone()
    data = module(tmp_path, backbone, tokens=tokens)
    data.setup("fit")
    loader, samples = data.train_dataloader(), triplets().triplets
    rows = list(loader.batch_sampler)
    to_tensor = ImageToTensor(backbone.preprocess)
    seen = 0
    for batch, chosen in zip(loader, rows, strict=True):
        some = [samples[row] for row in chosen]
        seen += len(some)
        assert len({sample.task for sample in some}) == 1
        pictures = [
            torch.stack([to_tensor(s.open()) for s in side])
            for side in zip(*[(s.image, s.target) for s in some], strict=True)
        ]
        images, targets = (backbone.encode_image(side) for side in pictures)
        texts = backbone.encode_text([sample.text or "" for sample in some])
        torch.testing.assert_close(batch.images.pooled, images.pooled, atol=1e-5, rtol=0)
        torch.testing.assert_close(batch.targets.pooled, targets.pooled, atol=1e-5, rtol=0)
        torch.testing.assert_close(batch.texts.pooled, texts.pooled, atol=1e-5, rtol=0)
        assert batch.targets.tokens is None
        if tokens:
            torch.testing.assert_close(batch.images.tokens, images.tokens, atol=1e-5, rtol=0)
            torch.testing.assert_close(batch.texts.tokens, texts.tokens, atol=1e-5, rtol=0)
            assert batch.texts.mask.equal(texts.mask)
        else:
            assert batch.images.tokens is None
        same = batch.groups[:, None] == batch.groups[None, :]
        assert same.tolist() == [[a.group == b.group for b in some] for a in some]
    assert seen == 36 + 18  # of 40 and 20, in whole batches of 6


@pytest.mark.slow
def test_after_set_up_nothing_is_encoded(tmp_path):
    backbone = LinearBackbone()
    data = module(tmp_path, backbone)
    data.prepare_data()
    passes = len(backbone.image_batches), len(backbone.text_batches)
    assert min(passes) > 0
    data.setup("fit")
    data.setup("fit")
    for _ in range(2):
        assert len(list(data.train_dataloader())) == 6 + 3
        list(data.val_dataloader())
    assert (len(backbone.image_batches), len(backbone.text_batches)) == passes


@pytest.mark.slow
def test_set_up_alone_encodes_each_thing_once(tmp_path):
    backbone = LinearBackbone()
    data = module(tmp_path, backbone)
    data.setup("fit")
    images = {side for sample in triplets().triplets for side in (sample.image, sample.target)}
    for benchmark in (cir_benchmark(), sbir_benchmark()):
        images |= {one.image for one in (*benchmark.queries, *benchmark.gallery)}
    assert len(images) <= sum(backbone.image_batches) <= len(images) + len(cir_benchmark().queries)
    texts = [text for batch in backbone.text_batches for text in batch]
    assert len(texts) == len(set(texts))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 17])
def test_validation_covers_every_item_once(tmp_path, world):
    benchmarks = [cir_benchmark(), sbir_benchmark()]
    held = {(number, side): [] for number in (0, 1) for side in ("queries", "gallery")}
    for rank in range(world):
        data = module(tmp_path, rank=rank, world=world)
        data.setup("fit")
        batches = list(data.val_dataloader())
        assert batches, "a process without a batch would skip validation, and the others wait for it"
        for batch in batches:
            assert len(batch.positions) == len(batch.images) <= 8
            held[batch.benchmark, batch.side] += batch.positions.tolist()
            assert (batch.texts is None) == (batch.side == "gallery")
    for (number, side), positions in held.items():
        assert sorted(positions) == list(range(len(getattr(benchmarks[number], side))))


@pytest.mark.slow
def test_validation_batches_hold_the_features_at_their_positions(tmp_path):
    backbone = LinearBackbone()
    benchmark = cir_benchmark()
    data = module(tmp_path, backbone, validation=[benchmark])
    data.setup("fit")
    to_tensor = ImageToTensor(backbone.preprocess)
    for batch in data.val_dataloader():
        chosen = [getattr(benchmark, batch.side)[place] for place in batch.positions.tolist()]
        images = backbone.encode_image(torch.stack([to_tensor(one.image.open()) for one in chosen]))
        torch.testing.assert_close(batch.images.pooled, images.pooled, atol=1e-5, rtol=0)
        if batch.side == "queries":
            texts = backbone.encode_text([query.text for query in chosen])
            torch.testing.assert_close(batch.texts.pooled, texts.pooled, atol=1e-5, rtol=0)


def test_more_processes_than_validation_items_are_an_error(tmp_path):
    data = module(tmp_path, validation=[sbir_benchmark(2, 4)], world=7)
    data.setup("fit")
    with pytest.raises(DataError, match="6 validation queries and images cannot be divided among 7"):
        data.val_dataloader()


def test_averaged_wordings_are_not_validated_with(tmp_path):
    benchmark = cir_benchmark()
    asked = (replace(benchmark.queries[0], text=("red", "blue")), *benchmark.queries[1:])
    with pytest.raises(ConfigError, match=r"query 'q0' has 2 wordings.*for validation"):
        module(tmp_path, validation=[replace(benchmark, queries=asked)]).setup("fit")


def test_a_small_task_still_gives_a_batch(tmp_path):
    few = triplets(cir=20, sbir=3)
    data = IGROTDataModule(
        TrainingSet("few", few.triplets), [], extractor(tmp_path), query_tokens=False, target_tokens=False, batch_size=8
    )
    data.setup("fit")
    assert sorted(len(batch.images) for batch in data.train_dataloader()) == [3, 8, 8]


@pytest.mark.slow
def test_batches_stay_where_the_encoder_put_them(tmp_path):
    data = module(tmp_path)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert data.transfer_batch_to_device(batch, torch.device("cpu"), 0) is batch
