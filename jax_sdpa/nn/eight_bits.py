"""Keys and values in 8 bits with a scale per token and head: how they are made, and for which dtypes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # of request.EIGHT_BITS
"""The number of each dtype of 8 bits that the largest element of a row becomes."""

_SMALLEST_NORMAL = float(jnp.finfo(jnp.float32).tiny)


def quantised(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """x in 8 bits, and the scale of each of its rows.

    ::

        scale = max(abs(x), -1) / LARGEST[dtype]            # float32; LARGEST: 127, 448
        codes = round(x / scale[..., None]).astype(dtype)   # to the nearest, ties to even; x is about codes * scale[..., None]

    Errors of codes * scale, M = max(abs(x)) of the row: int8 at most M / 254, the same for small elements as for large ones;
    float8_e4m3fn at most abs(x) / 16, or M * 2^-10 / 448 where that is more.

    A row of zeros (or of less than 127 or 448 * 2^-126, float32's smallest normal number) gives zeros with a finite scale. A row
    with a NaN or an infinity anywhere gets the scale NaN, and is NaN as a whole: 8 bits could not say which element it was.

    Args:
        x: (..., E), floating.
        dtype: int8 or float8_e4m3fn.

    Returns:
        codes (..., E) of that dtype; scale (...), float32.

    >>> codes, scale = quantised(jnp.array([[1.0, -0.5, 0.1], [0.0, 0.0, 0.0]]), jnp.int8)
    >>> codes.tolist(), scale.tolist() == [jnp.float32(1 / 127), 0]
    ([[127, -64, 13], [0, 0, 0]], True)
    """
    largest = LARGEST[jnp.dtype(dtype).name]
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), -1, initial=0) / largest
    scale = jnp.where(jnp.isfinite(scale), scale, jnp.nan)
    usable = scale >= _SMALLEST_NORMAL  # not so: zero, too small to divide by, NaN
    codes = x / jnp.where(usable, scale, 1)[..., None]
    if jnp.issubdtype(dtype, jnp.integer):
        codes = jnp.round(codes)
    codes = jnp.clip(codes, -largest, largest)  # the quotient's own rounding may pass them, and float8 has NaN behind 448
    return jnp.where(usable[..., None], codes, 0).astype(dtype), scale
