"""What is particular to our use of Lightning's Trainer."""

import logging
import warnings

import pytest
import torch
from lightning.pytorch.plugins.precision import FSDPPrecision

from union_igrot.models.devices import TrainerConfig
from union_igrot.training.trainer import FSDPAsItIs, make_trainer, manners
from union_igrot.types import Batch, Features


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fsdp_leaves_batches_as_they_are(precision):
    """Lightning's own conversion sets fields, which ours refuse."""
    features = Features(torch.ones(2, 3))
    batch = Batch(features, features, features, torch.arange(2))
    ours = FSDPAsItIs(precision)
    assert ours.convert_input(batch) is batch
    assert ours.precision == precision
    with pytest.raises(ValueError, match="frozen dataclass"):
        FSDPPrecision(precision).convert_input(batch)


def test_a_trainer_is_made_for_its_machine(tmp_path):
    with manners():
        trainer = make_trainer(TrainerConfig("cpu", 1, precision="bf16-mixed"), tmp_path, [], logger=False)
    assert (trainer.precision, trainer.num_devices, trainer.accelerator.name()) == ("bf16-mixed", 1, "cpu")


def test_what_is_meant_is_not_said_and_all_else_is(recwarn):
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    with manners():
        warnings.warn("Found 3 module(s) in eval mode at the start of training", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
        assert logger.level == logging.WARNING
    assert [str(one.message) for one in recwarn] == ["something else"]
    assert logger.level == before


@pytest.mark.parametrize("pressed", [True, False])
def test_only_ctrl_c_becomes_an_interruption(pressed):
    def end():
        try:
            raise KeyboardInterrupt if pressed else ValueError
        except (KeyboardInterrupt, ValueError):
            raise SystemExit(1)  # noqa: B904 - as Lightning does it

    with pytest.raises(KeyboardInterrupt if pressed else SystemExit), manners():
        end()
