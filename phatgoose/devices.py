"""What the devices can compute, where to compute what one of them cannot, and lack of memory."""

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from phatgoose.errors import OutOfMemory, reason_of

# How PyTorch, CUDA and cuBLAS report a lack of memory when they raise a plain RuntimeError.
_NO_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)


def off_mps(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors, moved to the host if they are on Apple's `mps`.

    It has no float64, no QR and no singular values; what needs them is computed on the host.
    """
    return tuple(tensor.cpu() if tensor.device.type == "mps" else tensor for tensor in tensors)


@contextmanager
def memory_errors(work: str, fix: str) -> Iterator[None]:
    """Turn an allocator's refusal into OutOfMemory, after freeing the memory of the work.

    Args:
        work: what ran out of memory, for the message, such as `with micro-batches of 8`.
        fix: what to do about it.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        refused = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not refused and not any(said in text for said in _NO_MEMORY):
            raise
        reason = reason_of(error)
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the work
    else:
        return
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
    raise OutOfMemory(f"memory ran out {work} ({reason}): {fix}")
