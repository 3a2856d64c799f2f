"""Whether anything can be told apart, checked before a training."""

import pytest
from test_folder import paint, triplets, write_manifest

from union_igrot.datasets.folder import SPLITS, folder_benchmark
from union_igrot.datasets.loading import benchmark_warning
from union_igrot.errors import DataError
from union_igrot.training.data import data_settings, read_training


def settings_of(root):
    return data_settings(str(root), pairs=20)


def test_a_single_class_is_refused_before_training(tmp_path):
    for split in SPLITS:
        for domain in ("photo", "sketch"):
            paint(tmp_path, f"{domain}/{split}.png")
    lines = [f"{domain},{domain}/{split}.png,shoe,{split}" for split in SPLITS for domain in ("photo", "sketch")]
    write_manifest(tmp_path, *lines)
    with pytest.raises(DataError, match=r"folder train: all triplets have one class, 'shoe'.*every instance a class"):
        read_training(settings_of(tmp_path))
    warning = benchmark_warning(folder_benchmark(tmp_path, "test"))
    assert warning.startswith("folder test: there is a single class, 'shoe'; every candidate is relevant")


def test_a_split_with_one_class_is_refused_before_training(tmp_path):
    split = "val"
    lines = []
    for other in SPLITS:
        for label in ("cat", "dog") if other != split else ("cow",):
            for domain in ("photo", "sketch"):
                paint(tmp_path, f"{domain}/{label}{other}.png")
                lines.append(f"{domain},{domain}/{label}{other}.png,{label},{other}")
    write_manifest(tmp_path, *lines)
    with pytest.raises(DataError, match=f"folder {split}: there is a single class, 'cow'.*two classes"):
        read_training(settings_of(tmp_path))
    paint(tmp_path, "photo/distractor.png")
    write_manifest(tmp_path, *lines, f"photo,photo/distractor.png,pig,{split}")
    paint(tmp_path, "sketch/more.png")
    write_manifest(tmp_path, *lines, f"photo,photo/distractor.png,pig,{split}", f"sketch,sketch/more.png,cow,{split}")
    with pytest.raises(DataError, match=f"folder {split}: there is a single class, 'cow'; all 2 queries have the same"):
        read_training(settings_of(tmp_path))


def test_triplets_with_one_target_are_refused_and_sound_data_are_not(tmp_path):
    for n in range(12):
        paint(tmp_path, f"{n}.png", f"t{n}.png")
    triplets(tmp_path, *({"reference": f"{n}.png", "text": "x", "targets": ["t0.png"]} for n in range(12)))
    with pytest.raises(DataError, match=r"folder train: all triplets have one target, 't0\.png'.*gallery\.txt"):
        read_training(settings_of(tmp_path))
    triplets(tmp_path, *({"reference": f"{n}.png", "text": "x", "targets": [f"t{n}.png"]} for n in range(12)))
    training, (val,) = read_training(settings_of(tmp_path))
    assert (len(training.triplets), len(val.queries)) == (8, 2)
