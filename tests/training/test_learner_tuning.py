"""Encoders tuned along with the heads: batches of images and texts, rates of their own, passes, resuming."""

import pytest
import torch
from test_learner import CPU, KilledError, Log, StopAfter

from small_world import LinearBackbone, cir_benchmark, extractor, sbir_benchmark, trainable, triplets
from union_igrot.errors import ImageError
from union_igrot.models.backbones.base import weights_hash
from union_igrot.training.datamodule import IGROTDataModule
from union_igrot.training.learner import Learner, Recipe, fit, rate_share
from union_igrot.training.losses import InfoNCE
from union_igrot.types import TrainingSet, Triplet

pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]
BENCHMARKS = [cir_benchmark(), sbir_benchmark()]
SIDES = {"none": (), "text": ("text",), "image": ("image",), "both": ("image", "text")}


def parts(folder, sides, recipe=None, *, tuned=True, batch_size=10, benchmarks=BENCHMARKS, samples=None):
    model = trainable("transagg", "union")
    if tuned:
        model.tune(sides)
    data = IGROTDataModule(
        samples or triplets(),
        benchmarks,
        extractor(folder, model.backbone),
        query_tokens=model.fusion.needs_tokens,
        target_tokens=model.target.needs_tokens,
        batch_size=batch_size,
        tuned=sides,
    )
    return model, Learner(model, InfoNCE(scale=20.0), recipe or Recipe(epochs=1, rate=0.0), benchmarks), data


@pytest.mark.slow
@pytest.mark.parametrize("live", ["text", "image", "both"])
def test_what_is_encoded_in_each_step_gives_the_losses_of_what_was_encoded_once(tmp_path, live):
    def run(sides, name):
        _, learner, data = parts(tmp_path / f"cache{name}", sides, Recipe(epochs=2, rate=3e-3), tuned=False)
        torch.manual_seed(3)
        log = Log()
        fit(learner, data, tmp_path / name, trainer=CPU, callbacks=[log], progress=False)
        return log

    once, each = run((), "once"), run(SIDES[live], "each")
    assert each.losses == pytest.approx(once.losses, abs=1e-5)
    for one, other in zip(each.figures, once.figures, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("sides", ["text", "image"])
def test_a_tuned_encoder_learns_at_its_own_rate_and_the_other_does_not(tmp_path, sides):
    recipe = Recipe(epochs=1, rate=1e-3, backbone_rate=1e-2, weight_decay=0.1, warmup=0.0)
    model, learner, data = parts(tmp_path, SIDES[sides], recipe)
    before = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}
    fit(learner, data, tmp_path / "run", trainer=CPU, progress=False)
    changed = {name for name, p in model.backbone.named_parameters() if not p.equal(before[name])}
    own = {"image": {"pixels", "rows"}, "text": {"words"}}
    assert changed == set().union(*(own[side] for side in SIDES[sides]))
    # Adam moves a weight by about its rate: far more than the heads' rate in these few steps.
    steps = 6
    assert max((model.backbone.get_parameter(n) - before[n]).abs().max() for n in changed) > 0.2 * steps * 1e-2
    assert not any(p.requires_grad for p in model.backbone.parameters())
    saved = torch.load(tmp_path / "run" / "best.ckpt", weights_only=True)["state_dict"]
    assert {n.removeprefix("model.backbone.") for n in saved if n.startswith("model.backbone.")} == changed
    assert all(saved[f"model.backbone.{name}"].equal(model.backbone.get_parameter(name)) for name in changed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sides", "images", "texts"), [("both", 2, 2), ("image", 2, 0), ("text", 0, 2), ("none", 0, 0)]
)
def test_the_passes_of_a_step(tmp_path, sides, images, texts):
    """At most two of images and two of texts, whatever is tuned; none where everything is in the store."""
    model, learner, data = parts(tmp_path, SIDES[sides])
    data.setup("fit")
    model.null_text()
    for made in list(data.train_dataloader())[:3]:
        batch = data.transfer_batch_to_device(made, torch.device("cpu"), 0)
        model.backbone.image_batches.clear()
        model.backbone.text_batches.clear()
        queries = model.embed_queries(batch.images, batch.texts)
        gallery = model.embed_gallery(batch.targets)
        learner.loss(queries, gallery, batch.groups)
        assert model.backbone.image_batches == [len(queries)] * images
        # One of the two passes over texts is the null text alone, both are for sketches.
        asked = len(queries) if texts and any(batch.texts) else 1
        assert sorted(map(len, model.backbone.text_batches)) == [1, asked][:texts]


@pytest.mark.slow
def test_without_a_cache_a_frozen_null_text_is_encoded_once(tmp_path):
    model, learner, data = parts(tmp_path, SIDES["both"], tuned=False)
    fit(learner, data, tmp_path / "run", trainer=CPU, progress=False)
    assert model.backbone.text_batches.count([""]) == 1


@pytest.mark.slow
def test_a_resumed_tuning_ends_like_an_uninterrupted_one(tmp_path):
    def run(folder, callbacks=()):
        recipe = Recipe(epochs=3, rate=3e-3, backbone_rate=1e-3, accumulate=2)
        model, learner, data = parts(tmp_path / "cache", SIDES["both"], recipe)
        torch.manual_seed(7)
        fit(learner, data, folder, trainer=CPU, callbacks=callbacks, progress=False)
        return model

    whole = run(tmp_path / "whole")
    with pytest.raises(KilledError):
        run(tmp_path / "cut", [StopAfter(1)])
    resumed = run(tmp_path / "cut")
    assert weights_hash(resumed.state_dict()) == weights_hash(whole.state_dict())
    assert weights_hash(whole.backbone.state_dict()) != weights_hash(LinearBackbone().state_dict())


@pytest.mark.slow
def test_accumulated_batches_make_one_step(tmp_path):
    def run(accumulate):
        recipe = Recipe(epochs=1, rate=1e-3, warmup=0.0, accumulate=accumulate)
        _, learner, data = parts(tmp_path / "cache", (), recipe)
        fit(learner, data, tmp_path / f"run{accumulate}", trainer=CPU, progress=False)
        return torch.load(tmp_path / f"run{accumulate}" / "last.ckpt", weights_only=True)["global_step"]

    assert (run(1), run(3)) == (6, 2)


class Unreadable:
    """An image whose file went away after the set was read."""

    key = "gone"

    def open(self):
        raise ImageError("shirt.png is missing; put it back")


def test_a_picture_that_cannot_be_read_in_a_step_is_named(tmp_path):
    good = triplets().triplets
    broken = TrainingSet("broken", (*good[:30], Triplet(Unreadable(), "red", good[0].target, "scene", "cir")))
    _, learner, data = parts(tmp_path, SIDES["image"], samples=broken)
    with pytest.raises(ImageError, match=r"shirt\.png is missing"):
        fit(learner, data, tmp_path / "run", trainer=CPU, progress=False)


def test_restarts_follow_the_published_loop():
    """The loop steps torch's schedule with a broken number of epochs after each step, both groups to one floor."""
    recipe = Recipe(epochs=4, rate=1e-4, backbone_rate=1e-6, schedule="restarts", cycle=2, floor=0.01)
    iterations, rates = 5, (1e-4, 3e-5, 1e-6)
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in rates]
    optimizer = torch.optim.AdamW([{"params": [w], "lr": rate} for w, rate in zip(weights, rates, strict=True)])
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=2, eta_min=0.01 * 1e-4)
    step = 0
    for epoch in range(4):
        for iteration in range(iterations):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                assert rate * rate_share(recipe, rate, step, steps=20) == pytest.approx(group["lr"], rel=1e-9)
            optimizer.step()
            schedule.step(epoch + iteration / iterations)
            step += 1


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_groups_hold_every_trained_weight_once(tmp_path, decay):
    recipe = Recipe(epochs=1, rate=1e-3, backbone_rate=1e-5, weight_decay=0.05, decay=decay, eps=1e-6)
    model, learner, data = parts(tmp_path, SIDES["text"], recipe)
    held = {}

    def keep(trainer, pl_module):
        for group in trainer.optimizers[0].param_groups:
            for p in group["params"]:
                assert id(p) not in held
                held[id(p)] = (group["initial_lr"], group["weight_decay"])

    learner.on_train_start = lambda: keep(learner.trainer, learner)
    trained = [(name, id(p), p.ndim) for name, p in model.named_parameters() if p.requires_grad]
    fit(learner, data, tmp_path / "run", trainer=CPU, progress=False)
    assert held.keys() == {at for _, at, _ in trained}
    for name, at, ndim in trained:
        decayed = 0.05 if ndim > 1 or decay == "all" else 0.0
        assert held[at] == (1e-5 if name.startswith("backbone.") else 1e-3, decayed)
