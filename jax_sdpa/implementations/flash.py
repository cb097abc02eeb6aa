"""FLASH_ATTENTION: our Pallas kernels for Hopper. No kernel has landed yet; the limits that will stay are stated already."""

from __future__ import annotations

from typing import Any

import jax

from jax_sdpa import compat
from jax_sdpa.context import SDPBackend
from jax_sdpa.device import Device
from jax_sdpa.implementations.base import Implementation, Tangents, symbolic_sizes
from jax_sdpa.request import SdpaRequest

DTYPES = ("float16", "bfloat16")
ARCHITECTURE = (9, 0)  # Hopper: wgmma and TMA
JAX_VERSION = (0, 11, 2)  # the first whose Mosaic GPU runs the kernels (interpret mode included)
HEAD_DIM = 256


class Flash(Implementation):
    backend = SDPBackend.FLASH_ATTENTION
    heading = "Flash attention kernel not used because:"

    def reasons_against(self, request: SdpaRequest, device: Device) -> list[str]:
        reasons = ["Flash attention is not supported yet: its kernel has not run on a GPU yet."]
        if device.platform != "cuda":
            reasons.append(f"Flash attention runs on NVIDIA GPUs, the program is for {device}.")
        elif device.architecture is None:
            reasons.append("The GPU's architecture is not known here: trace inside jax_sdpa.device.assume_device('cuda:sm90').")
        elif device.architecture != ARCHITECTURE:
            reasons.append(f"Flash attention runs on Hopper GPUs (sm90), the program is for {device}.")
        if compat.JAX_VERSION < JAX_VERSION:
            reasons.append(f"Flash attention needs jax {'.'.join(map(str, JAX_VERSION))} or newer, this is jax {jax.__version__}.")
        if request.query.dtype.name not in DTYPES:
            reasons.append(f"Expected query, key and value to all be of dtype: {{Half, BFloat16}}. Got {request.query.dtype}.")
        if sizes := symbolic_sizes(request):
            reasons.append(f"Flash attention needs sizes that are numbers, {', '.join(sizes)} here are symbolic.")
        elif max(request.head_dim, request.value_head_dim) > HEAD_DIM:
            reasons.append(
                f"Flash attention requires head dims of at most {HEAD_DIM}. Got {request.head_dim} and {request.value_head_dim}."
            )
        return reasons

    def run(self, request: SdpaRequest) -> tuple[jax.Array, jax.Array]:
        raise AssertionError("never chosen: it refuses every request")

    def tangent(self, request: SdpaRequest, out: Any, lse: Any, tangents: Tangents) -> tuple[jax.Array, jax.Array]:
        raise AssertionError("never chosen: it refuses every request")

    def backward(self, request: SdpaRequest, out: Any, lse: Any, dout: Any, dlse: Any, wrt: tuple[str, ...]) -> Tangents:
        raise AssertionError("never chosen: it refuses every request")
