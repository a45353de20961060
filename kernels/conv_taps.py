"""Weights of `conv_norm_act` as the C++ library takes them, which convolves images of one size.

A doubled image has one convolution of the small image for each parity of its rows and columns, and
the gradient of a halved one likewise. Legend: C channels before, O after, k own taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Taps along one axis as the library takes them, (parities, taps, own taps): each is a sum of the
# weight's own. Of the convolution, by parity of the output where it doubles, and of the convolution
# that gives the input's gradient.
_PARITIES = [[[0, 0, 0, 1], [0, 1, 0, 0]], [[0, 0, 1, 0], [1, 0, 0, 0]]]
FORWARD = {
    "pool": torch.eye(5)[None],
    "stride": torch.eye(4)[None],
    "upsample": torch.tensor(
        [
            [[1.0, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]],
            [[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]],
        ]
    ),
    "transpose": torch.tensor(_PARITIES).float(),
}
BACKWARD = {
    "pool": torch.eye(5).flip(0)[None],
    "stride": FORWARD["transpose"],
    "upsample": FORWARD["upsample"].flip(1).transpose(0, 1).reshape(1, 6, 5),
    "transpose": torch.eye(4)[None],
}
GRADIENT = {**FORWARD, "upsample": BACKWARD["upsample"], "transpose": BACKWARD["transpose"]}


def _by_taps(weight: Tensor, taps: Tensor) -> Tensor:
    """(A, B, k, l) -> (parities, parities, taps, taps, A, B)."""
    with torch.autocast("cpu", enabled=False):  # mixed precision would round
        return torch.einsum("ptk,qsl,abkl->pqtsab", taps, taps, weight).contiguous()


def forward_weight(weight: Tensor, kind: str) -> Tensor:
    """(parities, parities, taps, taps, C, O)."""
    return _by_taps(weight if kind == "transpose" else weight.transpose(0, 1), FORWARD[kind])


def backward_weight(weight: Tensor, kind: str) -> Tensor:
    """(parities, parities, taps, taps, O, C)."""
    return _by_taps(weight.transpose(0, 1) if kind == "transpose" else weight, BACKWARD[kind])


def weight_gradient(dweight: Tensor, kind: str) -> Tensor:
    """(taps, taps, C, O), or (taps, taps, O, C) where it doubles -> as the weight."""
    taps = GRADIENT[kind][0]
    with torch.autocast("cpu", enabled=False):
        dweight = torch.einsum("tk,sl,tsab->abkl", taps, taps, dweight)
    return dweight if kind == "upsample" else dweight.transpose(0, 1).contiguous()
