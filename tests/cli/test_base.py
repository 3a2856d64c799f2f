"""A CLIP from the command line on a folder of images: the commands of the paper's smaller model at a small size."""

import json
from copy import deepcopy

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from small_backbones import CLIP_CONFIG
from union_igrot.cli.compare import main as compare
from union_igrot.cli.eval import main as evaluate
from union_igrot.cli.train import main as train

COLORS = ("red", "green", "blue", "yellow")


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Weights in half precision, as OpenAI's file holds them, of a smaller network of the same name."""
    torch.manual_seed(0)
    network = open_clip.CLIP(**CLIP_CONFIG)
    path = tmp_path / "ViT-B-32.safetensors"
    save_file({name: x.half().contiguous() for name, x in network.state_dict().items()}, path)
    monkeypatch.setattr(open_clip, "get_model_config", lambda _: deepcopy(CLIP_CONFIG))
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rows = []
    for number in range(24):
        color = COLORS[number % 4]
        Image.new("RGB", (60, 40 + number), color).save(root / f"{number}.png")
        split = ("train", "train", "val", "test")[number // 4 % 4]
        target = number - 1 if number % 4 else number + 1
        row = {"reference": f"{number}.png", "text": f"in {color}", "targets": [f"{target}.png"], "split": split}
        rows.append(json.dumps(row))
    (root / "triplets.jsonl").write_text("\n".join(rows) + "\n")
    return root


@pytest.mark.slow
def test_base_is_trained_evaluated_and_loaded_again(tmp_path, weights, images):
    settings = [
        "model=base",
        f"model.weights={weights}",
        "model.finetune=both",
        "data=folder",
        f"data.root={images}",
        "recipe=reference",
        "recipe.epochs=1",
        "recipe.batch_size=4",
        "recipe.checkpointing=true",
        "features.batch_size=8",
        "strategy=cpu",
        "progress=false",
        f"cache_dir={tmp_path / 'cache'}",
    ]
    train([*settings, f"output_dir={tmp_path / 'run'}"])
    saved = json.loads((tmp_path / "run" / "model" / "model.json").read_text())
    assert saved["backbone"] == "base"
    rows = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {row["method"] for row in rows} == {"chance", "image", "text", "sum", "product", "trained"}
    assert (tmp_path / "run" / "model" / "backbone.safetensors").exists()
    again = [f"checkpoint={tmp_path / 'run'}", "data=folder", f"data.root={images}", f"weights={weights}"]
    evaluate([*again, "progress=false", f"cache_dir={tmp_path / 'cache'}", f"output_dir={tmp_path / 'again'}"])
    second = json.loads((tmp_path / "again" / "results.json").read_text())
    assert [row["metrics"] for row in second] == [row["metrics"] for row in rows]
    compare([f"first={tmp_path / 'run'}", f"second={tmp_path / 'again'}", "rounds=20"])
