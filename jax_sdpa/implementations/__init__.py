"""The backends, one file each, and which of the two XLA ones is faster on a CPU."""

from __future__ import annotations

from jax_sdpa import compat
from jax_sdpa.context import SDPBackend
from jax_sdpa.implementations.base import Implementation
from jax_sdpa.implementations.cudnn import Cudnn
from jax_sdpa.implementations.efficient import Efficient
from jax_sdpa.implementations.flash import Flash
from jax_sdpa.implementations.math import Math
from jax_sdpa.request import SdpaRequest

IMPLEMENTATIONS: dict[SDPBackend, Implementation] = {
    implementation.backend: implementation for implementation in (Flash(), Cudnn(), Efficient(), Math())
}

MATH_SCORES = 2**14
"""The default takes MATH only where the call has at most this many scores: there the two take the same time and MATH half the
compilation (2 cores of a Zen 4); from 2**16 on EFFICIENT is faster. So the default's memory never grows with L * S beyond arrays
of 64 KB."""


def faster_on_cpu(request: SdpaRequest) -> SDPBackend:
    """MATH for short calls, EFFICIENT for the others; a symbolic length counts as long."""
    sizes = (request.batch, request.q_heads, request.query_len, request.key_len)
    if any(compat.is_symbolic(size) for size in sizes):
        return SDPBackend.EFFICIENT_ATTENTION
    batch, heads, L, S = sizes
    return SDPBackend.MATH if batch * heads * L * S <= MATH_SCORES else SDPBackend.EFFICIENT_ATTENTION


DEFINITION: Implementation = Math()
"""What the derivatives of derivatives are taken of, whatever backend runs."""
