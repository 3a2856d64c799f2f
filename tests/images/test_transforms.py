"""From images to a backbone's input."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torchvision import transforms as tv

from union_igrot.errors import ConfigError
from union_igrot.images.transforms import ImageToTensor, image_batch, picture_batch
from union_igrot.types import Preprocess

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


class TargetPad:
    """The padding of CLIP4Cir, spelled out with nothing but paste."""

    def __init__(self, ratio):
        self.ratio = ratio

    def __call__(self, image):
        width, height = image.size
        if max(width, height) / min(width, height) < self.ratio:
            return image
        short = max(width, height) / self.ratio
        left, top = max(int((short - width) / 2), 0), max(int((short - height) / 2), 0)
        canvas = Image.new("RGB", (width + 2 * left, height + 2 * top))
        canvas.paste(image, (left, top))
        return canvas


def reference(preprocess):
    filters = {"bicubic": tv.InterpolationMode.BICUBIC, "bilinear": tv.InterpolationMode.BILINEAR}
    how, size = filters[preprocess.interpolation], preprocess.size
    steps = {
        "squash": [tv.Resize((size, size), how, antialias=True)],
        "crop": [tv.Resize(size, how, antialias=True), tv.CenterCrop(size)],
        "pad": [TargetPad(preprocess.pad_ratio), tv.Resize(size, how, antialias=True), tv.CenterCrop(size)],
    }[preprocess.fit]
    return tv.Compose([*steps, tv.ToTensor(), tv.Normalize(preprocess.mean, preprocess.std)])


@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 40),
    st.sampled_from(["squash", "crop", "pad"]),
    st.sampled_from(["bicubic", "bilinear"]),
    st.sampled_from([1.0, 1.25, 2.0]),
)
@settings(max_examples=80, deadline=None)
def test_equal_to_torchvision(width, height, size, fit, interpolation, ratio):
    short = min(width, height)
    width, height = min(width, 16 * short), min(height, 16 * short)
    preprocess = Preprocess(size, MEAN, STD, fit, interpolation, ratio)
    image = noise(width, height)
    assert torch.equal(ImageToTensor(preprocess)(image), reference(preprocess)(image))


def test_a_long_strip_keeps_its_middle_and_its_memory():
    strip = Image.new("RGB", (200_000, 1), "red")
    strip.paste("blue", (99_990, 0, 100_010, 1))
    black = (0.0, 0.0, 0.0)
    for image in (strip, strip.transpose(Image.Transpose.ROTATE_90)):
        got = ImageToTensor(Preprocess(224, black, (1.0, 1.0, 1.0)))(image)
        assert got.shape == (3, 224, 224)
        assert got[2].min() == 1
        assert got[0].max() == 0


def test_it_can_be_pickled():
    preprocess = Preprocess(8, MEAN, STD, "pad", "bilinear", 1.5)
    again = pickle.loads(pickle.dumps(ImageToTensor(preprocess)))
    assert again.preprocess == preprocess
    assert torch.equal(again(noise(9, 20)), reference(preprocess)(noise(9, 20)))


@pytest.mark.parametrize("wrong", [{"size": 0}, {"pad_ratio": 0.9}, {"std": (0.2, 0.0, 0.2)}])
def test_settings_that_cannot_be_applied(wrong):
    with pytest.raises(ConfigError, match="expected size"):
        ImageToTensor(Preprocess(**{"size": 8, "mean": MEAN, "std": STD, **wrong}))


def test_a_batch_takes_images_of_every_type(tmp_path):
    image = noise(5, 3)
    image.save(tmp_path / "a b.png")
    array = np.asarray(image)
    given = [image, tmp_path / "a b.png", str(tmp_path / "a b.png"), array, torch.tensor(array).permute(2, 0, 1)]
    preprocess = Preprocess(4, (0.5,) * 3, (0.5,) * 3, "squash")
    batch = image_batch(given, preprocess)
    assert batch.shape == (len(given), 3, 4, 4)
    assert all(torch.equal(row, batch[0]) for row in batch)
    with pytest.warns(DeprecationWarning, match="image_batch"):
        assert torch.equal(picture_batch(given, preprocess), batch)
