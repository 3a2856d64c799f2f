"""Float32 stays float32, and torch keeps its switches afterwards."""

import threading

import pytest
import torch

from union_igrot.models.devices import full_precision, map_in_threads

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


def test_parts_are_computed_in_threads_of_their_own_only_if_nothing_of_this_thread_counts():
    layer, parts = torch.nn.Conv2d(3, 4, 3), list(torch.arange(5 * 75.0).view(5, 1, 3, 5, 5) / 375)
    seen, before = [], torch.get_num_threads()

    def compute(part):
        seen.append((threading.current_thread(), torch.get_num_threads()))
        return layer(part)

    here, expected = threading.current_thread(), [layer(part) for part in parts]
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            found = map_in_threads(compute, parts)
        assert here not in {thread for thread, _ in seen}
        assert {threads for _, threads in seen} == {1}
        torch.testing.assert_close(found, expected)
        assert torch.get_num_threads() == 2
        seen.clear()
        assert all(one.requires_grad for one in map_in_threads(compute, parts))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert {one.dtype for one in map_in_threads(compute, parts)} == {torch.bfloat16}
            map_in_threads(compute, parts[:1])
        assert {thread for thread, _ in seen} == {here}
    finally:
        torch.set_num_threads(before)
