"""What happens to a tile of scores on its way to the softmax: softcap, bias, masks; and to the probabilities: dropout.

MATH asks for the one tile that is everything, the blockwise backend for each of its tiles. Tiles are (B, Hq, bq, bk), `q0` and
`k0` (Python ints or traced) say where one starts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_sdpa import dropout
from jax_sdpa.request import SdpaRequest
from pallas_kernels import flash_backward


def compute_dtype(request: SdpaRequest) -> Any:
    """float32 for half inputs and float32, float64 for float64."""
    return jnp.promote_types(request.query.dtype, jnp.float32)


def dense_tile(array: Any, q0: Any, bq: Any, k0: Any, bk: Any) -> Any:
    """The tile of a (B|1, Hq|1, L|1, S|1) array, or None of None; broadcast dims stay 1."""
    if array is None:
        return None
    for axis, start, size in ((2, q0, bq), (3, k0, bk)):
        if array.shape[axis] != 1 and array.shape[axis] != size:
            array = lax.dynamic_slice_in_dim(array, jnp.asarray(start, jnp.int32), size, axis)
    return array


def cap(request: SdpaRequest, s: jax.Array) -> tuple[jax.Array, Any]:
    """(softcap * tanh(s / softcap), the derivative), (s, None) without a cap."""
    softcap = request.spec.softcap
    if softcap is None:
        return s, None
    t = jnp.tanh(s / softcap)
    return softcap * t, 1 - t * t


def addend(request: SdpaRequest, q0: Any, bq: Any, k0: Any, bk: Any, dtype: Any) -> Any:
    """(B|1, Hq|1, bq|1, bk|1): bias, and -inf where a dense mask hides a key; None without either.

    Dense masks add: a NaN score stays NaN, as in torch.
    """
    total = None
    if request.bias is not None:
        total = dense_tile(request.bias, q0, bq, k0, bk).astype(dtype)
    if request.keep_mask is not None:
        kept = jnp.where(dense_tile(request.keep_mask, q0, bq, k0, bk), jnp.zeros((), dtype), -jnp.inf)
        total = kept if total is None else total + kept
    return total


def kept(request: SdpaRequest, q0: Any, bq: Any, k0: Any, bk: Any) -> Any:
    """(B|1, 1, bq, bk) bool: what the structured masks keep; None without any.

    Structured masks select: the score of what they hide is never looked at.
    """
    if not request.masks:
        return None
    q_idx = q0 + lax.broadcasted_iota(jnp.int32, (bq, 1), 0)
    k_idx = k0 + lax.broadcasted_iota(jnp.int32, (1, bk), 1)
    keep = request.mask.keep(q_idx, k_idx)
    return keep if keep.ndim == 4 else keep[None, None]


def survivors(request: SdpaRequest, q0: Any, bq: Any, k0: Any, bk: Any, dtype: Any) -> Any:
    """(B|1, Hq|1, bq, bk): what dropout multiplies the probabilities by, 0 or 1 / (1 - p); None without dropout."""
    if request.dropout_seeds is None:
        return None
    p = dropout.rounded(request.spec.dropout_p)
    if p == 1.0:
        return jnp.zeros((1, 1, 1, 1), dtype)
    keep = dropout.keep_block(request.dropout_seeds, q0, bq, k0, bk, p)
    return jnp.where(keep, jnp.asarray(1 / (1 - p), dtype), jnp.zeros((), dtype))


def seen(request: SdpaRequest) -> Any:
    """(B|1, S) bool: the keys that the structured masks let some query see; None where that is all of them."""
    valid = request.mask.key_valid(request.query_len, request.key_len) if request.masks else None
    return valid if valid is None or valid.ndim == 2 else valid[None]


def seen_only(request: SdpaRequest, x: jax.Array) -> jax.Array:
    """Keys or values with zeros in place of those that a structured mask hides from every query: they may hold NaN."""
    valid = seen(request)
    if valid is None:
        return x
    shape = (valid.shape[0], 1, 1, 1)
    shape = tuple(request.key_len if axis == request.length_axis else size for axis, size in enumerate(shape))
    return jnp.where(jnp.reshape(valid, shape), x, jnp.zeros((), x.dtype))


def beside_out(x: jax.Array, heads_axis: int) -> jax.Array:
    """A number per row, (B, Hq, L), to stand beside out, or queries."""
    return (x if heads_axis == 1 else jnp.swapaxes(x, 1, 2))[..., None]


def empty_rows(request: SdpaRequest, lse: jax.Array) -> jax.Array:
    """(B, Hq, L) bool: the rows that attend to nothing.

    lse tells which, but where a row has one without any key: that of its sink, or of the keys of other parts. There the masks do.
    """
    empty = jnp.isneginf(lse)  # (B, Hq, L)
    if request.masks and (request.sinks is not None or request.spec.part):
        sees = request.mask.transposed().key_valid(request.key_len, request.query_len)
        if sees is not None:
            empty = empty | ~(sees if sees.ndim == 2 else sees[None])[:, None]
    return empty


def existing_only(request: SdpaRequest, lse: jax.Array, x: jax.Array) -> jax.Array:
    """Queries (or output cotangents) with zeros in the rows that attend to nothing: those rows may hold NaN."""
    return jnp.where(beside_out(empty_rows(request, lse), request.heads_axis), jnp.zeros((), x.dtype), x)


def row_deltas(
    request: SdpaRequest, out: jax.Array, lse: jax.Array, dout: jax.Array, dlse: Any, empty: jax.Array | None = None
) -> jax.Array:
    """sum(out * dout) - dlse of every row, (B, Hq, L); the lse of a row that attends to nothing has no derivative.

    empty: (B, Hq, L), rows without an out, whose dout may be NaN; None: all are numbers.
    """
    dlse = None if dlse is None else jnp.where(jnp.isneginf(lse), 0, dlse)
    if empty is None:
        return flash_backward.row_deltas(out, dout, dlse, request.heads_axis)
    delta = jnp.where(empty, 0, flash_backward.row_deltas(out, dout, None, request.heads_axis))
    return delta if dlse is None else delta - dlse


def split_scale(request: SdpaRequest, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(q * sign(scale) * sqrt(|scale|), k * sqrt(|scale|)), torch's MATH: large inputs with a small scale do not overflow."""
    if request.scale is None:
        root = abs(request.spec.scale) ** 0.5  # type: ignore[arg-type]
        return q * (root if request.spec.scale >= 0 else -root), k * root  # type: ignore[operator]
    scale = request.scale.astype(q.dtype)[:, None, None, None]
    positive = scale != 0  # the derivative of sqrt at 0 is infinite: all of a zero scale goes to q
    root = jnp.sqrt(jnp.abs(jnp.where(positive, scale, 1)))
    return q * jnp.where(positive, jnp.sign(scale) * root, scale), k * root
