"""Float32 stays float32, and torch keeps its switches afterwards."""

import pytest
import torch

from union_igrot.models.devices import full_precision

CPU = torch.device("cpu")


def switches():
    b = torch.backends
    found = (b.cuda.matmul, b.cudnn.conv, b.mkldnn.matmul, b.mkldnn.conv)
    return [switch.fp32_precision for switch in found]


def test_neither_autocast_nor_rounded_factors_pass():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 64, 64, generator=draw)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = x @ y
        with full_precision(CPU):
            exact = x @ y
        again = x @ y
    assert rounded.dtype == again.dtype == torch.bfloat16
    assert exact.dtype == torch.float32
    torch.testing.assert_close(exact.double(), x.double() @ y.double(), atol=1e-4, rtol=0)


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has one switch for all"
)
@pytest.mark.parametrize("fails", [False, True])
def test_the_switches_are_set_inside_and_as_before_outside(fails):
    before = switches()
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    chosen = switches()
    try:
        try:
            with full_precision(CPU):
                assert switches() == ["ieee"] * 4
                if fails:
                    raise ValueError
        except ValueError:
            assert fails
        assert switches() == chosen
    finally:
        torch.backends.cudnn.conv.fp32_precision = before[1]
        torch.backends.mkldnn.matmul.fp32_precision = before[2]
    assert switches() == before
