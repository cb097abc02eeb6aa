"""EFFICIENT: placeholder while it is being written."""

from __future__ import annotations

from jax_sdpa.context import SDPBackend
from jax_sdpa.implementations.math import Math


class Efficient(Math):
    backend = SDPBackend.EFFICIENT_ATTENTION
    heading = "Memory efficient kernel not used because:"
    needs_partitioning = True
