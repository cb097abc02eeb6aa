"""What a backend is: limits that answer with sentences, a forward, and the two linear maps that its derivatives are made of."""

from __future__ import annotations

from typing import Any

import jax

from jax_sdpa import compat
from jax_sdpa.context import SDPBackend
from jax_sdpa.device import Device
from jax_sdpa.request import SdpaRequest

Tangents = dict[str, Any]  # by the names in request.DIFFERENTIABLE


class Implementation:
    """One backend. Every one keeps the same residuals: the request itself, its output and its lse."""

    backend: SDPBackend
    heading: str  # torch's words above the reasons
    needs_partitioning: bool = True  # its program loops over heads or is a kernel: XLA cannot cut it over a mesh by itself

    def reasons_against(self, request: SdpaRequest, device: Device) -> list[str]:
        """Every reason, in plain sentences, why this backend can't run the request on the device; reads shapes and dtypes only."""
        raise NotImplementedError

    def against_batch_invariance(self, request: SdpaRequest) -> list[str]:
        """Every reason why a sequence of the request may not get the same bits alone and in any batch."""
        return ["num_splits=1, the same bits for a sequence in any batch, is not supported yet."]

    def takes_pages(self, request: SdpaRequest) -> bool:
        """Whether `run` reads the pages of a request that has some where they lie; else it is given the request `gathered`."""
        return False

    def takes_eight_bits(self, request: SdpaRequest) -> bool:
        """Whether `run` takes keys and values of 8 bits, of a request that has some; else it is given the request `dequantised`, as
        the derivatives always are."""
        return False

    def for_device(self, device: Device) -> Implementation:
        """This backend as it runs on the device."""
        return self

    def notes(self, request: SdpaRequest, device: Device) -> tuple[str, ...]:
        """What `explain` adds about this backend when it is chosen."""
        return ()

    def run(self, request: SdpaRequest) -> tuple[jax.Array, jax.Array]:
        """(out, in the query's layout and dtype; lse (B, Hq, L), float32, or float64 for float64 calls)."""
        raise NotImplementedError

    def tangent(self, request: SdpaRequest, out: jax.Array, lse: jax.Array, tangents: Tangents) -> tuple[jax.Array, jax.Array]:
        """The tangents of (out, lse), linear in `tangents`."""
        raise NotImplementedError

    def backward(
        self, request: SdpaRequest, out: jax.Array, lse: jax.Array, dout: Any, dlse: Any, wrt: tuple[str, ...]
    ) -> Tangents:
        """The cotangents of the operands named in `wrt`; `dout` or `dlse` is None where that output has no cotangent."""
        raise NotImplementedError


def symbolic_sizes(request: SdpaRequest) -> list[str]:
    """The names of the sizes that are not numbers yet."""
    sizes = {
        "batch": request.batch, "heads": request.q_heads, "L": request.query_len, "S": request.key_len,
        "E": request.head_dim, "Ev": request.value_head_dim,
    }  # fmt: skip
    return [name for name, size in sizes.items() if compat.is_symbolic(size)]
