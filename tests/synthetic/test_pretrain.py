"""Pretraining: it learns, is reproducible, uses training scenes alone, and writes complete files or none."""

import json
import math
import sys

import pretrain_tiny
import pytest
import torch
from pretrain_tiny import caption_batch, main, pretrain, pretraining_loss
from torch.nn import functional as F

from union_igrot.errors import ConfigError
from union_igrot.models.backbones.base import weights_hash
from union_igrot.models.backbones.tiny import TinyBackbone, TinyVLM, tokenize
from union_igrot.synthetic.scenes import HELD_OUT_SHAPES, SEEN_SHAPES, SHAPES

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture
def small(monkeypatch):
    """Batches of 24 photos and 24 sketches instead of hundreds."""

    def few(seed, split, pairs=0, sketches=0, shapes=SEEN_SHAPES):
        return caption_batch(seed, split, 12, 24, shapes)

    monkeypatch.setattr(pretrain_tiny, "caption_batch", few)


@pytest.fixture
def drawn(monkeypatch):
    """The scenes that are drawn, photos and sketches."""
    seen = {"photo": [], "sketch": []}
    for style, scenes in seen.items():
        render = getattr(pretrain_tiny, f"render_{style}")

        def spy(scene, seed, scenes=scenes, render=render):
            scenes.append(scene)
            return render(scene, seed)

        monkeypatch.setattr(pretrain_tiny, f"render_{style}", spy)
    return seen


def test_batches_hold_pairs_captions_and_labels(drawn, monkeypatch):
    edit, pairs = pretrain_tiny.edit_scene, []

    def spy(rng, scene, double):
        made = edit(rng, scene, double)
        pairs.append((scene, made.targets[0]))
        return made

    monkeypatch.setattr(pretrain_tiny, "edit_scene", spy)
    batch = caption_batch("one", "train", 10, 7)
    assert batch.photos.shape == (20, 3, 48, 48)
    assert batch.sketches.shape == (7, 3, 48, 48)
    assert -2 <= batch.photos.min() < batch.photos.max() <= 2
    for scene, caption, label in zip(drawn["photo"], batch.captions, batch.photo_labels.tolist(), strict=True):
        assert all(thing.shape in caption for thing in scene.things)
        assert label == (SHAPES.index(scene.things[0].shape) if len(scene.things) == 1 else -1)
    assert [SHAPES[i] for i in batch.sketch_labels] == [s.things[0].shape for s in drawn["sketch"]]
    assert list(zip(drawn["photo"][::2], drawn["photo"][1::2], strict=True)) == pairs


def test_images_are_scaled_as_the_backbone_expects(drawn):
    batch = caption_batch("scale", "train", 1, 1)
    made = TinyBackbone().preprocess
    pixels = batch.photos * torch.tensor(made.std).view(3, 1, 1) + torch.tensor(made.mean).view(3, 1, 1)
    torch.testing.assert_close(pixels * 255, (pixels * 255).round(), atol=1e-3, rtol=0)
    assert 0 <= pixels.min() < pixels.max() <= 1


@pytest.mark.slow
def test_loss_equals_a_literal_sum():
    """Both losses from the network's embeddings, one logit after the other."""
    torch.manual_seed(0)
    network = TinyVLM().eval()
    batch = caption_batch("loss", "train", 6, 5)
    match, prompt = (x.item() for x in pretraining_loss(network, batch))

    def text(words):
        return F.normalize(network.text(tokenize([words]))[0, -1], dim=0)

    def cross(rows, targets):
        return -sum(
            math.log(math.exp(row[a]) / sum(map(math.exp, row))) for row, a in zip(rows, targets, strict=True)
        ) / len(targets)

    scale = min(60.0, math.exp(network.log_scale.item()))
    photos = F.normalize(network.image(batch.photos)[:, 0], dim=-1)
    sketches = F.normalize(network.image(batch.sketches)[:, 0], dim=-1)
    captions = [text(caption) for caption in batch.captions]
    logits = [[scale * (p @ c).item() for c in captions] for p in photos]
    same = range(len(logits))
    assert match == pytest.approx((cross(logits, same) + cross(list(zip(*logits, strict=True)), same)) / 2, rel=1e-4)
    article = {shape: ("an " if shape == "arrow" else "a ") + shape for shape in SEEN_SHAPES}
    single = [i for i, label in enumerate(batch.photo_labels.tolist()) if 0 <= label < len(SEEN_SHAPES)]
    by_photo = [[scale * (photos[i] @ text(article[s])).item() for s in SEEN_SHAPES] for i in single]
    by_sketch = [[scale * (x @ text(f"a sketch of {article[s]}")).item() for s in SEEN_SHAPES] for x in sketches]
    wanted = cross(by_photo, [batch.photo_labels[i].item() for i in single])
    assert prompt == pytest.approx(wanted + cross(by_sketch, batch.sketch_labels.tolist()), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [3, 10])
def test_same_seed_same_weights(small, steps):
    """Ten steps once divided by zero: the warm-up ended at the first step."""
    if steps == 10:
        assert all(torch.isfinite(p).all() for p in pretrain(steps, 3, 1e-3, every=100).parameters())
        return
    first, again, other = (weights_hash(pretrain(steps, seed, 1e-3, every=100).state_dict()) for seed in (3, 3, 4))
    assert first == again != other


def test_too_few_steps_are_refused(monkeypatch, capsys):
    with pytest.raises(ConfigError, match="steps: 2"):
        pretrain(2, 0, 1e-3)
    monkeypatch.setattr(sys, "argv", ["pretrain_tiny", "--steps", "0"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert "steps: 0" in capsys.readouterr().err


def run_main(folder, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["pretrain_tiny", "--steps", "3", "--seed", "5", "--rate", "0.001", "--out", str(folder)]
    )
    main()


@pytest.mark.slow
def test_command_writes_weights_that_load_and_a_note_that_agrees(small, tmp_path, monkeypatch):
    folder = tmp_path / "new" / "tiny"
    run_main(folder, monkeypatch)
    assert sorted(p.name for p in folder.iterdir()) == ["backbone.json", "backbone.safetensors"]
    note = json.loads((folder / "backbone.json").read_text())
    network = TinyBackbone(folder / "backbone.safetensors").network
    assert note["weights"] == weights_hash(network.state_dict())
    assert note["command"] == "python scripts/pretrain_tiny.py --steps 3 --seed 5 --rate 0.001"
    assert note["parameters"] == sum(p.numel() for p in network.parameters())
    assert note["shapes_without_sketches"] == list(HELD_OUT_SHAPES)
    assert set(note["held_out_percent"]) == {
        "caption_retrieval_in_256", "shape_of_photo", "shape_of_sketch_seen", "shape_of_sketch_held_out",
    }  # fmt: skip
    assert (folder / "backbone.safetensors").stat().st_size < 5_000_000
