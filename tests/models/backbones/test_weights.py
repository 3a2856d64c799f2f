import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from union_igrot.errors import CheckpointError
from union_igrot.models.backbones.weights import read_state_dict


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("boom"),))


def test_a_torchscript_archive_that_asks_for_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("bad.pt", "w") as archive:
        archive.writestr("bad/constants.pkl", pickle.dumps(()))
        archive.writestr("bad/data.pkl", pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(CheckpointError, match=r"asks for .*, which weights do not need"):
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
