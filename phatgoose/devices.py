"""What the devices can compute, and where to compute what one of them cannot."""

from torch import Tensor


def off_mps(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors, moved to the host if they are on Apple's `mps`.

    It has no float64, no QR and no singular values; what needs them is computed on the host.
    """
    return tuple(tensor.cpu() if tensor.device.type == "mps" else tensor for tensor in tensors)
