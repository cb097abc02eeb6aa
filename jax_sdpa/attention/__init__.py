"""The mirror of `torch.nn.attention`: `SDPBackend`, `sdpa_kernel`, `WARN_FOR_UNFUSED_KERNELS`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from jax_sdpa.context import BACKENDS, KERNEL, Allowed, SDPBackend

__all__ = ["WARN_FOR_UNFUSED_KERNELS", "SDPBackend", "sdpa_kernel"]

WARN_FOR_UNFUSED_KERNELS = False
"""As in torch: set it to True to be warned when a structured mask is materialised because MATH runs the call (on the device that an
eager call would use). Read while tracing; not part of `jit`'s key, as it changes no result."""


@contextlib.contextmanager
def sdpa_kernel(backends: list[SDPBackend] | SDPBackend, set_priority: bool = False) -> Iterator[None]:
    """Restrict attention calls inside the block (or the decorated function) to these backends.

    Nests as torch's does: the inner context replaces the outer one. It holds for the calling thread and is part of `jit`'s
    cache key, so one jitted function called inside and outside of it runs the right backend each time. What was allowed when a
    call was traced holds for its backward pass too, wherever that is traced.

    Args:
        backends: one `SDPBackend` or a list of them.
        set_priority: take the first of the list that can run the call; without it the list only restricts, and the platform's
            own order of preference holds. (torch ignores priorities on the CPU; here they hold everywhere.)

    Raises:
        TypeError: `backends` is no backend and no list of them (torch: AssertionError).

    Source: torch.nn.attention.sdpa_kernel, torch 2.13.

    >>> import jax.numpy as jnp, jax_sdpa
    >>> q = jnp.ones((1, 2, 3, 8))
    >>> with sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION], set_priority=True):
    ...     print(jax_sdpa.explain(q, q, q).backend.name)
    MATH
    """
    listed = [backends] if isinstance(backends, SDPBackend) else backends
    if not isinstance(listed, list) or not all(isinstance(backend, SDPBackend) for backend in listed):
        raise TypeError(
            f"backends must be an instance of SDPBackend or a list of SDPBackend instances, got {type(backends).__name__}."
        )
    known = tuple(dict.fromkeys(backend for backend in listed if backend in BACKENDS))
    with KERNEL(Allowed(known, ordered=set_priority)):
        yield
