"""Float32 arithmetic that is float32, on every device.

Knows torch's switches. Does not know what is computed.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute products and convolutions of float32 in float32: neither autocast nor TF32 or bfloat16 passes.

    By default torch lets a GPU's convolutions round what they multiply to TF32's ten bits.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        backends: Any = torch.backends  # whose stubs lag behind
        if hasattr(backends.cuda.matmul, "fp32_precision"):
            cpu = backends.mkldnn
            for switch in (backends.cuda.matmul, backends.cudnn.conv, cpu.matmul, cpu.conv):
                stack.callback(setattr, switch, "fp32_precision", switch.fp32_precision)
                switch.fp32_precision = "ieee"
        else:  # older torch
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
            stack.callback(setattr, backends.cudnn, "allow_tf32", backends.cudnn.allow_tf32)
            backends.cudnn.allow_tf32 = False
        yield
