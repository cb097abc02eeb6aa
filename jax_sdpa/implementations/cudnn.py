"""CUDNN: placeholder while it is being written."""

from __future__ import annotations

from jax_sdpa.context import SDPBackend
from jax_sdpa.implementations.base import Implementation


class Cudnn(Implementation):
    backend = SDPBackend.CUDNN_ATTENTION
    heading = "cuDNN attention kernel not used because:"

    def reasons_against(self, request, device):
        return ["cuDNN attention is not supported yet."]
