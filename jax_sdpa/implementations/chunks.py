"""The pieces in which the blockwise backend handles its operands: a few heads at a time, a block of rows, a block of keys.

A chunk is `nb` batch entries times `nh` key/value heads. Its rows are the query heads of a group one after the other, so K and V
are never repeated: rows (n, R * bq, E) against keys (n, bk, E), n = nb * nh, R = query heads per key/value head.

On a CPU, XLA hands a product to its fast library (YNNPACK) only if the left operand contracts its last axis. Both `rows_by_keys`
products and `times` have that form; a transposed left operand runs at a quarter of the speed (51 against 194 GFLOP/s at
1024x1024x64, 2 cores of a Zen 4, jax 0.10.2).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_sdpa.implementations import scores
from jax_sdpa.request import SdpaRequest

FEW_ROWS = 16
"""Up to so many rows a product is a matrix-vector one: its long operand, the keys, goes to the left."""


BITS = {jnp.dtype(jnp.bfloat16): jnp.uint16, jnp.dtype(jnp.float16): jnp.uint16, jnp.dtype(jnp.float8_e4m3fn): jnp.uint8}


def loop(start: Any, end: Any, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`lax.fori_loop` that counts in int32 with jax_enable_x64 on and off, as the masks' arrays do."""
    return lax.fori_loop(jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32), body, carry)


def as_bits(x: jax.Array) -> jax.Array:
    """16-bit floats as uint16, 8-bit ones as uint8, others as they are.

    XLA's CPU backend has no slices of such floats: it widens the whole array to float32 and keeps that through the loop (6
    times the bytes of q in temporaries for bfloat16, L = 16384). It does have them of integers.
    """
    return lax.bitcast_convert_type(x, BITS[x.dtype]) if x.dtype in BITS else x


def from_bits(x: jax.Array, dtype: Any) -> jax.Array:
    """What `as_bits` was given: `dtype` tells which float it was."""
    return lax.bitcast_convert_type(x, dtype) if x.dtype in (jnp.uint16, jnp.uint8) else x


def slice_at(x: jax.Array, starts: Sequence[Any], sizes: Sequence[Any]) -> jax.Array:
    return lax.dynamic_slice(x, [jnp.asarray(start, jnp.int32) for start in starts], sizes)


def slice_bits_at(x: jax.Array, starts: Sequence[Any], sizes: Sequence[Any]) -> jax.Array:
    """`slice_at` of `as_bits(x)`.

    The barrier ties x to the place in the loop: XLA would otherwise take the conversion, which does not depend on it, out of
    the loop, and convert and keep the whole of x there (decode of 8 x 8 heads, 4096 keys: 130 MB of temporaries and 61 ms, 2 MB
    and 23 ms so).
    """
    if x.dtype not in BITS:
        return slice_at(x, starts, sizes)
    x, *starts = lax.optimization_barrier((x, *(jnp.asarray(start, jnp.int32) for start in starts)))
    return slice_at(as_bits(x), starts, sizes)


def write_at(x: jax.Array, block: jax.Array, starts: Sequence[Any]) -> jax.Array:
    return lax.dynamic_update_slice(x, block.astype(x.dtype), [jnp.asarray(start, jnp.int32) for start in starts])


@dataclasses.dataclass(frozen=True)
class Products:
    """Batched matrix products with float32 (float64) accumulation, float32 operands at the request's precision.

    Where one operand is bfloat16 the other is rounded to it: a probability then has 8 bits of its own and its row is summed in
    float32, as in every fused kernel. Two bfloat16 numbers multiply exactly in float32.
    """

    precision: str
    dtype: Any

    def _dot(self, a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
        if jnp.bfloat16 in (a.dtype, b.dtype):
            a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
            return self._plain(a, b, contract, "DEFAULT")
        return self._plain(a, b, contract, self.precision)

    def _plain(self, a: jax.Array, b: jax.Array, contract: tuple[int, int], precision: str) -> jax.Array:
        if a.shape[0] == 1:  # one head: a plain matrix product, which runs on all cores
            dims = (((contract[0] - 1,), (contract[1] - 1,)), ((), ()))
            return lax.dot_general(a[0], b[0], dims, precision, self.dtype)[None]
        dims = (((contract[0],), (contract[1],)), ((0,), (0,)))
        return lax.dot_general(a, b, dims, precision, self.dtype)

    def by_transpose(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a @ b.T: (n, i, e), (n, j, e) -> (n, i, j)."""
        return wake(self._dot(a, b, (2, 2)))

    def times(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a @ b: (n, i, j), (n, j, e) -> (n, i, e)."""
        return wake(self._dot(a, b, (2, 1)))

    def rows_by_keys(self, rows: jax.Array, keys: jax.Array) -> jax.Array:
        """rows @ keys.T: (n, i, e), (n, j, e) -> (n, i, j), the keys on the left where the rows are few.

        The barrier keeps XLA from folding the transpose into the product, which puts the rows on the left again: 39 ms for the
        keys of 64 heads (4096 x 128, float32) and 4 rows each, 14 ms so (one core of a Zen 4, jax 0.10.2).
        """
        if rows.shape[1] <= FEW_ROWS:
            return jnp.swapaxes(lax.optimization_barrier(self._dot(keys, rows, (2, 2))), 1, 2)
        return self.by_transpose(rows, keys)


def wake(x: jax.Array) -> jax.Array:
    """x + 0, through a row reduction, where a product of many small heads would else run on one core.

    YNNPACK splits the batch of a product over the cores only if a reduction hangs off it, or if each head's result is large
    (seen: 32 heads of 128x64x128 at 660 us alone, 370 us so; 2 cores of a Zen 4, jax 0.10.2).
    """
    n, i, j = x.shape
    return x + jnp.minimum(jnp.abs(x).max(-1, keepdims=True), 0) if n >= 32 and i * j <= 128 * 128 else x


@dataclasses.dataclass(frozen=True)
class Chunks:
    """A request cut into chunks of nb batch entries and nh key/value heads; `c` counts them, static or traced.

    seen: `scores.seen` of the request where values of keys that nobody sees are to be cleared as they are taken; None: they are
    clean already, or all are seen.
    """

    request: SdpaRequest
    nb: Any
    nh: Any
    seen: Any = None

    @property
    def n(self) -> Any:
        return self.nb * self.nh

    @property
    def dtype(self) -> Any:
        """What sums, scores and probabilities are computed in."""
        return scores.compute_dtype(self.request)

    @property
    def factors(self) -> Factors:
        """How the scale is spread; (1, 1, 1) where it is traced, and multiplied to the rows apart."""
        scale = self.request.spec.scale
        if self.request.scale is not None or scale is None:
            return Factors(1.0, 1.0, 1.0)
        return spread_scale(scale, self.request.query.dtype == jnp.bfloat16)

    @property
    def operand_dtype(self) -> Any:
        """What q, k, v and dout enter the products in: bfloat16 as it is, unless the scale asks for more bits; halves as float32.

        Half again as fast on a CPU with bfloat16 products (250 against 170 GFLOP/s, 2 cores of a Zen 4), ten times on a GPU.
        """
        native = self.request.query.dtype == jnp.bfloat16 and self.request.scale is None and self.factors.keys == 1.0
        return jnp.bfloat16 if native else self.dtype

    def each(self, body: Callable[[Any, Any], Any], carry: Any) -> Any:
        """carry after `carry = body(c, carry)` for every chunk."""
        count = (self.request.batch // self.nb) * (self.request.kv_heads // self.nh)
        return body(0, carry) if isinstance(count, int) and count == 1 else loop(0, count, body, carry)

    def start(self, c: Any) -> tuple[Any, Any]:
        """The first batch entry and the first key/value head of chunk c."""
        per_entry = self.request.kv_heads // self.nh
        if isinstance(per_entry, int) and per_entry == 1:
            return c * self.nb, 0
        return (c // per_entry) * self.nb, (c % per_entry) * self.nh

    def _box(self, c: Any, heads: Any, start: Any, length: Any, dim: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """(starts, sizes) of a block of an operand: `heads` heads per key/value head, `length` positions from `start`."""
        b0, h0 = self.start(c)
        starts, sizes = [b0, h0 * heads, start, 0], [self.nb, self.nh * heads, length, dim]
        if self.request.spec.layout == "BLHE":
            starts[1:3], sizes[1:3] = starts[2:0:-1], sizes[2:0:-1]
        return tuple(starts), tuple(sizes)

    def take(self, x: jax.Array, c: Any, start: Any, length: Any, heads: Any = 1, dtype: Any = None) -> jax.Array:
        """A block of q, k, v or out as (n, heads * length, dim), in the dtype of the products or another."""
        starts, sizes = self._box(c, heads, start, length, x.shape[3])
        block = from_bits(slice_bits_at(x, starts, sizes), self.request.query.dtype if x.dtype == jnp.uint16 else x.dtype)
        if self.request.spec.layout == "BLHE":
            block = jnp.swapaxes(block, 1, 2)
        return block.reshape(self.n, heads * length, x.shape[3]).astype(self.operand_dtype if dtype is None else dtype)

    def put(self, x: jax.Array, block: jax.Array, c: Any, start: Any, heads: Any = 1) -> jax.Array:
        """x, which may hold bits, with (n, heads * length, dim) written where `take` reads it."""
        length = block.shape[1] // heads
        starts, sizes = self._box(c, heads, start, length, x.shape[3])
        block = as_bits(block.astype(self.request.query.dtype)) if x.dtype == jnp.uint16 else block
        block = block.reshape(self.nb, self.nh * heads, length, x.shape[3])
        if self.request.spec.layout == "BLHE":
            block = jnp.swapaxes(block, 1, 2)
        return write_at(x, block.reshape(sizes), starts)

    def take_row(self, x: jax.Array, c: Any, start: Any, length: Any) -> jax.Array:
        """A block of a (B, Hq, L) array as (n, R * length)."""
        b0, h0 = self.start(c)
        heads = self.request.group
        return slice_at(x, (b0, h0 * heads, start), (self.nb, self.nh * heads, length)).reshape(self.n, heads * length)

    def put_row(self, x: jax.Array, block: jax.Array, c: Any, start: Any) -> jax.Array:
        b0, h0 = self.start(c)
        heads = self.request.group
        return write_at(x, block.reshape(self.nb, self.nh * heads, -1), (b0, h0 * heads, start))

    def shared(self, c: Any) -> SdpaRequest:
        """What the chunk's tiles need beside q, k and v: bias, masks, sinks, scale and seeds of its batch entries and heads."""
        request, (b0, h0) = self.request, self.start(c)
        heads = request.group

        def cut(x: Any, has_heads: bool) -> Any:
            if x is None:
                return None
            if x.shape[0] != 1:
                x = slice_at(x, (b0, *[0] * (x.ndim - 1)), (self.nb, *x.shape[1:]))
            if has_heads and x.shape[1] != 1:
                x = slice_at(x, (0, h0 * heads, *[0] * (x.ndim - 2)), (x.shape[0], self.nh * heads, *x.shape[2:]))
            return x

        with_heads = {name: cut(getattr(request, name), True) for name in ("bias", "keep_mask", "sinks", "dropout_seeds")}
        masks = jax.tree.map(lambda x: cut(x, False), request.masks)
        return dataclasses.replace(request, scale=cut(request.scale, False), masks=masks, **with_heads)

    def start_in(self, x: Any, c: Any) -> tuple[Any, Any]:
        """Where the chunk begins in a (B|1, Hq|1, …) array."""
        b0, h0 = self.start(c)
        return (b0 if x.shape[0] != 1 else 0), (h0 * self.request.group if x.shape[1] != 1 else 0)

    def spread(self, effect: jax.Array, by_key: bool = False) -> jax.Array:
        """An effect (nb|1, nh*R|1, bq|1, bk|1) against a tile seen as (nb, nh, R, bq, bk), or (nb, nh, bk, R, bq) by key."""
        b, h, bq, bk = effect.shape
        effect = effect.reshape(b, h, 1, bq, bk) if h == 1 else effect.reshape(b, self.nh, self.request.group, bq, bk)
        return jnp.transpose(effect, (0, 1, 4, 2, 3)) if by_key else effect

    def apply(self, change: Callable[..., jax.Array], tile: jax.Array, effect: jax.Array, by_key: bool = False) -> jax.Array:
        """`change(tile, effect)`, where the tile is (n, R * bq, bk), or (n, bk, R * bq) by key, and the effect broadcasts."""
        heads = self.request.group
        view = (tile.shape[1], heads, tile.shape[2] // heads) if by_key else (heads, tile.shape[1] // heads, tile.shape[2])
        return change(tile.reshape(self.nb, self.nh, *view), self.spread(effect, by_key)).reshape(tile.shape)

    def per_head(self, x: jax.Array) -> jax.Array:
        """(nb|1, nh*R|1) -> (n, R, 1), to stand beside rows seen as (n, R, bq)."""
        R = self.request.group
        return jnp.broadcast_to(x, (self.nb, self.nh * R)).reshape(self.n, R, 1)

    def rows(self, c: Any, shared: SdpaRequest, q0: Any, bq: Any) -> jax.Array:
        """The query rows of a block, times their part of the scale: (n, R * bq, E)."""
        R = self.request.group
        rows = self.take(self.request.query, c, q0, bq, R)
        if shared.scale is None:
            return scaled(rows, self.factors.rows)
        factor = self.per_head(shared.scale[:, None].astype(rows.dtype))
        return (rows.reshape(self.n, R, -1) * factor).reshape(rows.shape)

    def _wide(self, name: str, c: Any, k0: Any, bk: Any) -> jax.Array:
        """A block of keys or values, (n, bk, dim); for those of 8 bits what `SdpaRequest.dequantised` makes of them."""
        x, scale = getattr(self.request, name), getattr(self.request, name + "_scale")
        if scale is None:
            return self.take(x, c, k0, bk)
        box = zip((*self.start(c), k0), (self.nb, self.nh, bk), scale.shape, strict=True)
        starts, sizes = zip(*((0, 1) if is_one(own) else (at, size) for at, size, own in box), strict=True)
        own = jnp.broadcast_to(slice_at(scale, starts, sizes), (self.nb, self.nh, bk)).reshape(self.n, bk, 1)
        block = self.take(x, c, k0, bk, dtype=self.dtype) * own.astype(self.dtype)
        return block.astype(self.request.query.dtype).astype(self.operand_dtype)

    def keys(self, c: Any, k0: Any, bk: Any) -> jax.Array:
        """A block of keys, times their part of the scale: (n, bk, E)."""
        return scaled(self._wide("key", c, k0, bk), self.factors.keys)

    def values(self, c: Any, k0: Any, bk: Any, masked: bool) -> jax.Array:
        """A block of values: (n, bk, Ev); masked: with zeros for keys that nobody sees, as 0 * NaN would be NaN. Their scores need
        no such care: a mask selects, and never looks at what it hides."""
        values = self._wide("value", c, k0, bk)
        if self.seen is None or not masked:
            return values
        b0, _ = self.start_in(self.seen, c)
        seen = slice_at(self.seen, (b0, k0), (min(self.nb, self.seen.shape[0]), bk))[:, None, :, None]
        by_head = values.reshape(self.nb, self.nh, *values.shape[1:])
        return jnp.where(seen, by_head, jnp.zeros((), values.dtype)).reshape(values.shape)


def is_one(size: Any) -> bool:
    """Whether a dim is broadcast; a symbolic one is none."""
    return isinstance(size, int) and size == 1


def scaled(x: jax.Array, factor: float) -> jax.Array:
    return x if factor == 1.0 else x * jnp.asarray(factor, x.dtype)


class Factors(NamedTuple):
    """scores = scores_factor * (rows_factor * q) @ (keys_factor * k).T"""

    rows: float
    keys: float
    scores: float


def spread_scale(scale: float, bfloat16: bool) -> Factors:
    """The scale to the queries; for bfloat16, which rounds, only its power of two, which is exact, and the rest to the scores.

    Where the scale itself is extreme, half of its exponent to the keys: q = k = 1e20 with scale = 1e-40 has finite scores, as in
    torch's MATH; 2**64 leaves float32's exponent as much room again.
    """
    if scale != 0 and not 2.0**-64 <= abs(scale) <= 2.0**64:
        root = abs(scale) ** 0.5
        return Factors(root if scale > 0 else -root, root, 1.0)
    if bfloat16 and scale != 0:
        mantissa, exponent = math.frexp(scale)  # scale = mantissa * 2**exponent, 0.5 <= |mantissa| < 1
        return Factors(2.0 ** (exponent - 1), 1.0, 2 * mantissa)
    return Factors(scale, 1.0, 1.0)
