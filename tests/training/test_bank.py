"""The loss with a bank against plain loops over images, with cached features and with a queue of past batches."""

import math

import pytest
import torch
from test_learner import CPU, Log
from torch.nn import functional as F

from small_world import LinearBackbone, Noise, cir_benchmark, extractor, sbir_benchmark, trainable, triplets
from union_igrot.images.transforms import ImageToTensor
from union_igrot.training.datamodule import IGROTDataModule
from union_igrot.training.learner import Learner, Recipe, fit
from union_igrot.training.losses import (
    UNKNOWN,
    BankLoss,
    CachedBank,
    FeatureQueue,
    InfoNCE,
    build_loss,
    reference_groups,
)
from union_igrot.types import Features, TrainingSet, Triplet

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*")
BENCHMARKS = [cir_benchmark(4, 12), sbir_benchmark(4, 8)]
SCALE, AUXILIARY = 7.0, 0.6


def samples() -> TrainingSet:
    """Both tasks; references of known and unknown content, some that are targets, and targets that recur."""
    cir, sbir = triplets(20, 10).triplets[:20], triplets(20, 10).triplets[20:]
    known = [Triplet(one.image, one.text, one.target, one.group, "cir", f"scene{i % 13}") for i, one in enumerate(cir)]
    chained = [Triplet(one.target, "red", Noise(900 + i, 3), f"new{i}", "cir") for i, one in enumerate(cir[:4])]
    again = [Triplet(Noise(950 + i, 2), "blue", one.target, one.group, "cir") for i, one in enumerate(cir[4:6])]
    return TrainingSet("noise", (*known[:10], *cir[10:], *chained, *again, *sbir))


def learner_of(folder, loss, target="residual", tuned=(), seed=2):
    model = trainable("transagg", target, LinearBackbone())
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.head_parameters():
            p.add_(torch.randn(p.shape, generator=noise), alpha=0.2)
    if tuned:
        model.tune(tuned)
    data = IGROTDataModule(
        samples(),
        BENCHMARKS,
        extractor(folder, model.backbone),
        query_tokens=True,
        target_tokens=model.target.needs_tokens,
        batch_size=8,
        tuned=tuned,
        bank_size=loss.bank_size,
        fused_targets=loss.auxiliary > 0,
    )
    return Learner(model, loss, Recipe(epochs=1, rate=0.0, backbone_rate=0.0), BENCHMARKS), data


def cross_entropy(query, own, others):
    """Minus the log of the own target's share, one exponential after the other."""
    logits = [SCALE * sum(a * b for a, b in zip(query, one, strict=True)) for one in [own, *others]]
    top = max(logits)
    return top + math.log(sum(math.exp(x - top) for x in logits)) - logits[0]


class Oracle:
    """Embeddings of single images, and the losses of batches from them."""

    def __init__(self, model):
        self.model, self.transform = model, ImageToTensor(model.backbone.preprocess)
        self.embeddings = {}
        self.triplets = samples().triplets
        self.of_target = {}
        for one in self.triplets:
            if one.task == "cir":
                self.of_target[one.target.key] = one.group

    def pixels(self, image):
        return self.transform(image.open())[None]

    def once(self, key, embed):
        if key not in self.embeddings:
            with torch.no_grad():
                self.embeddings[key] = embed()[0].double().tolist()
        return self.embeddings[key]

    def query(self, image, text=None):
        return self.once((image.key, text), lambda: self.model.embed_queries(self.pixels(image), [text]))

    def target(self, image):
        return self.once(image.key, lambda: self.model.embed_gallery(self.pixels(image)))

    def shown(self, one):
        """The content of a reference, as a group of targets."""
        return one.image_group or self.of_target.get(one.image.key)

    def images(self, rows):
        for row in rows:
            yield self.triplets[row].target, self.triplets[row].group
            yield self.triplets[row].image, self.shown(self.triplets[row])

    def bank(self, rows, candidates):
        total = 0.0
        for one in (self.triplets[row] for row in rows):
            others = [self.target(image) for image, group in candidates if group != one.group]
            total += cross_entropy(self.query(one.image, one.text), self.target(one.target), others)
        return total / len(rows)

    def sketches(self, rows):
        total, batch = 0.0, [self.triplets[row] for row in rows]
        for one in batch:
            others = [other.target for other in batch if other.group != one.group]
            sides = ((1.0, self.target), (AUXILIARY, self.query))
            for weight, embed in sides:
                wanted = cross_entropy(self.query(one.image), embed(one.target), [embed(image) for image in others])
                total += weight * wanted
        return total / len(rows)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["residual", "shared"])
def test_losses_equal_plain_loops_over_all_training_images(tmp_path, target):
    learner, data = learner_of(tmp_path / "cache", BankLoss(SCALE, auxiliary=AUXILIARY), target)
    log = Log()
    fit(learner, data, tmp_path / "run", trainer=CPU, callbacks=[log], progress=False)
    oracle = Oracle(learner.model)
    composed = [row for row, one in enumerate(oracle.triplets) if one.task == "cir"]
    everything = {(image.key, group): image for image, group in oracle.images(composed)}
    assert len(everything) < 2 * len(composed)  # images that recur count once
    candidates = [(image, group) for (_, group), image in everything.items()]
    data.trainer = None  # the order of the first epoch
    batches = list(data.train_dataloader().batch_sampler)
    kinds = [oracle.triplets[rows[0]].task for rows in batches]
    assert sorted(kinds) == ["cir"] * 3 + ["sbir"]
    wanted = [
        oracle.bank(rows, candidates) if kind == "cir" else oracle.sketches(rows)
        for rows, kind in zip(batches, kinds, strict=True)
    ]
    assert log.losses == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_a_tuned_encoder_has_a_queue_of_past_batches(tmp_path):
    learner, data = learner_of(tmp_path / "cache", BankLoss(SCALE, auxiliary=AUXILIARY, bank_size=33), tuned=("image",))
    log = Log()
    fit(learner, data, tmp_path / "run", trainer=CPU, callbacks=[log], progress=False)
    assert data.bank is None
    data.trainer = None  # the order of the first epoch
    oracle, past, wanted = Oracle(learner.model), [], []
    for rows in data.train_dataloader().batch_sampler:
        if oracle.triplets[rows[0]].task == "sbir":
            wanted.append(oracle.sketches(rows))
            continue
        # 33 images are two batches of sixteen.
        candidates = [pair for batch in [*past[-2:], rows] for pair in oracle.images(batch)]
        own = {row: oracle.triplets[row] for row in rows}
        # A target that recurs in the queue is of the same group, and left out.
        assert all(one.target.key in {image.key for image, _ in candidates} for one in own.values())
        wanted.append(oracle.bank(rows, candidates))
        past.append(rows)
    assert log.losses == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_every_head_gets_a_gradient_from_both_kinds_of_batches(tmp_path):
    learner, data = learner_of(tmp_path, BankLoss(SCALE))
    data.setup("fit")
    seen = {}
    learner.log = lambda *_, **__: None
    learner._seed, learner._trainer = 0, type("Trainer", (), {"datamodule": data, "current_epoch": 0})
    for batch in data.train_dataloader():
        learner.zero_grad()
        learner.training_step(batch, 0).backward()
        seen[batch.task] = {name for name, p in learner.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert set(seen) == {"cir", "sbir"}
    for names in seen.values():
        assert {"target.mlp.up.weight", "target.mlp.down.weight", "fusion.output_layer.weight"} <= names


def test_a_bank_holds_each_image_once_and_samples_the_same_on_every_process():
    groups, shown = torch.tensor([5, 6, 5, 7]), torch.tensor([UNKNOWN, 5, UNKNOWN, 7])
    keys = {name: number for number, name in enumerate("abcdefg")}

    def lookup(names):
        return Features(torch.tensor([[float(keys[name])] for name in names]))

    def contents(chosen):
        return sorted(zip(chosen.images.pooled.flatten().int().tolist(), chosen.groups.tolist(), strict=True))

    whole = CachedBank("abac", "deef", groups, shown, lookup, 7)
    own = whole.targets[[3, 0]]
    chosen = whole.select(own, own, "seed", torch.device("cpu"))
    everything = [(0, 5), (1, 6), (2, 7), (3, UNKNOWN), (4, UNKNOWN), (4, 5), (5, 7)]
    assert contents(chosen) == everything
    assert chosen.images.pooled[chosen.positives].flatten().tolist() == [2, 0]
    assert whole.select(own, own, "other", torch.device("cpu")).images is chosen.images

    small = CachedBank("abac", "deef", groups, shown, lookup, 3)
    joint = small.targets[[3, 0, 1]]
    sizes, seen = set(), set()
    for number in range(20):
        halves = [small.select(part, joint, f"{number}", torch.device("cpu")) for part in (joint[:2], joint[2:])]
        assert contents(halves[0]) == contents(halves[1])
        found = contents(halves[0])
        assert {(0, 5), (1, 6), (2, 7)} <= set(found) <= set(everything)
        assert len(found) == len(set(found))
        found_own = [half.images.pooled[half.positives].flatten().tolist() for half in halves]
        assert found_own == [[2, 0], [1]]
        sizes.add(len(found))
        seen |= set(found)
    assert sizes <= {3, 4, 5, 6}
    assert seen == set(everything)


def test_references_that_are_targets_have_their_group():
    cir = samples().triplets[:26]
    numbers = {one.group: number for number, one in enumerate(cir)}
    found = reference_groups(cir, torch.tensor([numbers[one.group] for one in cir]))
    names = {number: name for name, number in numbers.items()}
    named = [names.get(number) for number in found.tolist()]
    assert named[:10] == [f"scene{i % 13}" if i % 13 < 10 else None for i in range(10)]
    assert named[10:20] == [None] * 10
    assert named[20:24] == [f"scene{i}" for i in range(4)]
    assert named[24:] == [None, None]


def test_the_oldest_batches_leave_a_queue_first():
    queue = FeatureQueue(10)
    assert queue.read() is None
    for number in range(3):
        images = torch.full((4, 2), float(number), requires_grad=True)
        queue.add(Features(images), torch.full((4,), number))
    images, groups = queue.read()
    assert groups.tolist() == [1] * 4 + [2] * 4
    assert images.pooled[:, 0].tolist() == groups.tolist()
    assert not images.pooled.requires_grad
    queue.clear()
    assert queue.read() is None


def test_a_loss_is_built_from_its_settings():
    found = build_loss("bank", scale=5.0, auxiliary=0.5, bank_size=9)
    assert (type(found), found.scale, found.auxiliary, found.bank_size) == (BankLoss, 5.0, 0.5, 9)
    assert (type(build_loss(scale=5.0)), build_loss(scale=5.0).scale) == (InfoNCE, 5.0)
    rows = F.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    groups = torch.arange(3)
    assert BankLoss(5.0)(rows, rows, groups).equal(InfoNCE(5.0)(rows, rows, groups))
