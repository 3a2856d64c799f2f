import argparse
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from union_igrot.errors import CheckpointError
from union_igrot.models.backbones.weights import read_state_dict, remove_prefixes


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("boom"),))


def test_a_torchscript_archive_that_asks_for_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("bad.pt", "w") as archive:
        archive.writestr("bad/constants.pkl", pickle.dumps(()))
        archive.writestr("bad/data.pkl", pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(CheckpointError, match=r"holds a Python object \(.*save model.state_dict"):
        read_state_dict("bad.pt")
    assert not Path("boom").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_torchscript_archive_is_read_without_running_it(tmp_path):
    """OpenAI's files are such archives; attributes that are no tensors are left out."""

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 2)
            self.register_buffer("shared", self.linear.weight.detach().T[1:])
            self.size = 7

        def forward(self, x):
            return self.linear(x) @ self.shared[:, :1].T

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner().half()
            self.scale = torch.nn.Parameter(torch.tensor(4.6))

        def forward(self, x):
            return self.inner(x) * self.scale

    module = Outer()
    torch.jit.save(torch.jit.script(module), tmp_path / "archive.pt")
    found = read_state_dict(tmp_path / "archive.pt")
    assert set(found) == set(module.state_dict())
    for name, x in module.state_dict().items():
        assert torch.equal(found[name], x)
        assert found[name].dtype == x.dtype


LINEAR = torch.nn.Linear(3, 2).state_dict()


@pytest.mark.parametrize(
    "content",
    [
        LINEAR,
        {"state_dict": LINEAR, "epoch": 3, "loss": np.float64(0.5), "best": np.float32(1), "step": np.int64(7)},
        {"model_state_dict": LINEAR, "args": argparse.Namespace(lr=1e-4, name="x", best=np.float64(0.1))},
        {"module": LINEAR, "ds_config": {}, "ds_version": "0.1", "dp_world_size": 1},
        {"net": LINEAR, "epoch": 1},
        {"weights_of_mine": LINEAR, "optimizer": {"lr": 1.0}},
        {"state_dict": {f"module.{name}": x for name, x in LINEAR.items()}},
    ],
    ids=["plain", "numpy scalars", "namespace", "deepspeed", "net", "any name", "data parallel"],
)
def test_wrappers_of_training_programs_are_removed(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    found = read_state_dict(tmp_path / "weights.pt")
    assert found.keys() == LINEAR.keys()
    assert all(x.equal(LINEAR[name]) for name, x in found.items())


def test_safetensors_are_read_under_any_suffix(tmp_path):
    save_file(LINEAR, tmp_path / "weights.bin")
    assert read_state_dict(tmp_path / "weights.bin").keys() == LINEAR.keys()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "model.", "clip.", "model.clip.module."])
def test_prefixes_and_what_is_beside_them_are_removed(prefix):
    state = {f"{prefix}{name}": x for name, x in LINEAR.items()} | {"head.weight": torch.zeros(1)}
    assert remove_prefixes(state, set(LINEAR)).keys() == LINEAR.keys()
    assert remove_prefixes(state, {"other"}).keys() == state.keys()
    assert remove_prefixes(LINEAR, set(LINEAR)).keys() == LINEAR.keys()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (torch.nn.Linear(3, 2), "torch.nn.modules.linear.Linear"),
        ({"state_dict": LINEAR, "at": Path("x")}, "PosixPath"),
        ({"at": Bomb()}, r"pathlib|_local|getattr"),
    ],
)
def test_files_that_hold_objects_are_refused_by_their_name(tmp_path, content, name):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=rf"holds a Python object \(.*({name}).* save model.state_dict") as error:
        read_state_dict(tmp_path / "weights.pt")
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)
