"""The same image under another folder's name is found; another one is not."""

from pathlib import Path

import official
import pytest

from small_world import Noise
from union_igrot.datasets.loading import load_benchmark, load_training
from union_igrot.images.identity import Crop, image_identities, image_identity


def same(one, other):
    return image_identity(Path(one)) == image_identity(Path(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("lasco/val2014/COCO_val2014_000000028714.jpg", "GeneCIS/val2017/000000028714.jpg"),
        ("a/train2014/COCO_train2014_000000000009.jpg", "b/COCO2017_unlabeled/unlabeled2017/000000000009.jpg"),
        ("Sketchy/256x256/photo/cup/n03147509_1920.jpg", "TUBerlin/ImageResized_ready/mug/n03147509_1920.JPEG"),
        ("imgnet/real/n1/ILSVRC2012_val_00015728.JPEG", "val/ILSVRC2012_val_00015728.png"),
        ("CIRR/train/34/train-10108-0-img0.png", "elsewhere/train-10108-0-img0.jpg"),
        ("FashionIQ/images/B0084Y8XIU.png", "iq/B0084Y8XIU.jpg"),
    ],
)
def test_a_collection_s_own_number_is_enough_and_no_file_is_needed(one, other):
    assert same(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("val2017/000000028714.jpg", "val2017/000000028715.jpg"),
        ("cup/n03147509_1920.jpg", "cup/n03147509_1921.jpg"),
        ("sketch/cup/n03147509_1920-10.png", "photo/cup/n03147509_1920.jpg"),  # a sketch of the photo
        ("VG_100K/28714.jpg", "val2017/000000028714.jpg"),
        ("airplane/ext_12.jpg", "axe/ext_12.jpg"),
        ("dev/dev-244-0-img0.png", "dev/dev-244-0-img1.png"),
    ],
)
def test_other_images_differ(one, other):
    assert not same(one, other)


def test_other_files_are_known_by_folder_name_and_size(tmp_path):
    places = [
        tmp_path / name for name in ("x/hot air balloon/1.jpg", "y/Hot_Air-Balloon/1.jpg", "z/hot air balloon/1.jpg")
    ]
    for place, size in zip(places, (10, 10, 11), strict=True):
        place.parent.mkdir(parents=True)
        place.write_bytes(b"x" * size)
    assert same(places[0], places[1])
    assert not same(places[0], places[2])
    assert not same(places[0], tmp_path / "missing" / "1.jpg")


def test_a_crop_has_the_identity_of_its_photo():
    photo = Path("VG_100K/7.jpg")
    assert image_identity(Crop(photo, (0, 0, 5, 5))) == image_identity(photo)
    assert image_identity(Noise(1)) == image_identity(Noise(1)) != image_identity(Noise(2))


def test_training_and_test_splits_share_no_image(tmp_path):
    official.training_sketchy(tmp_path)
    drawn = load_training("training_sketchy", tmp_path, build=9)
    known = image_identities(side for one in drawn.triplets for side in (one.image, one.target))
    assert len(known) == len({side for one in drawn.triplets for side in (one.image, one.target)})
    unseen = load_benchmark("sketchy", tmp_path)
    assert not known & image_identities(item.image for item in (*unseen.gallery, *unseen.queries))
    again = load_benchmark("training_sketchy", tmp_path, build=3)
    assert image_identities(item.image for item in (*again.gallery, *again.queries)) <= known
