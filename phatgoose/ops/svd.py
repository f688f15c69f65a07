"""Singular values and input directions of low-rank products, without forming the products.

Shape suffixes: E experts, R LoRA rank, D input features, O output features.
"""

import torch
from torch import Tensor

from phatgoose.devices import off_mps


def thin_svd(lora_A_ERD: Tensor, lora_B_EOR: Tensor) -> tuple[Tensor, Tensor]:
    """Return the singular values of every `B A = U S V^T`, and the rows of `V^T`, largest first.

    Two QR decompositions leave a matrix of R by R to decompose: `O(E R^2 (D + O))` operations.

    Returns:
        `s_ER` and `v_ERD`, in float32; R is at most D and O. A direction's sign is arbitrary.
    """
    device = lora_A_ERD.device
    lora_A_ERD, lora_B_EOR = off_mps(lora_A_ERD, lora_B_EOR)
    q_EDR, r_ERR = torch.linalg.qr(lora_A_ERD.float().transpose(1, 2))
    core_ERR = torch.linalg.qr(lora_B_EOR.float())[1] @ r_ERR.transpose(1, 2)
    _, s_ER, v_ERR = torch.linalg.svd(core_ERR, full_matrices=False)
    return s_ER.to(device), (v_ERR @ q_EDR.transpose(1, 2)).to(device)


def output_projection(lora_A_ERD: Tensor, lora_B_EOR: Tensor) -> Tensor:
    """`m_ERD` with `norm(m_e x) = norm(B_e A_e x)`: `R_e A_e`, where `B_e = Q_e R_e`; float32."""
    device = lora_A_ERD.device
    lora_A_ERD, lora_B_EOR = off_mps(lora_A_ERD, lora_B_EOR)
    return (torch.linalg.qr(lora_B_EOR.float())[1] @ lora_A_ERD.float()).to(device)
