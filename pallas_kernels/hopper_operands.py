"""What the backward kernels are given beside the big arrays: masks, dropout's words, a traced scale; made by XLA, read by `refs`.

One `Operands` serves one orientation: rows of queries against tiles of keys (dq), or, transposed, rows of keys against tiles of
queries (dk, dv). It knows which arrays there are, in which order a kernel gets them, and how they lie.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dense, hopper_packing, visits
from pallas_kernels.contracts import ForwardShape, WalkConfig, cuts_few, has_ids
from pallas_kernels.hopper_hidden import hidden_by_numbers, words
from pallas_kernels.hopper_products import Wgmma
from pallas_kernels.hopper_recipe import Recipe, Refs, scale_at, survivor_scale
from pallas_kernels.online_softmax import LOG2E
from pallas_kernels.visits import cdiv

LSE, DELTA, SUM = 0, 1, 2  # what the numbers of a query row are


def row_numbers(lse: jax.Array, delta: jax.Array, length: int, row_sum: jax.Array | None = None) -> jax.Array:
    """(B, Hq, 2, length) float32: lse in base 2 and delta of every row, p = 2**(s - lse).

    Beside a bias lse may be so large that it has lost the sum's logarithm. There: (B, Hq, 3, length), with
    p = exp(s - lse) / row_sum; the first is natural then and may be the row's maximum, the third is row_sum's logarithm in base 2.
    lse is +inf where a row has no keys, or does not exist: p is 0 then for whatever s is finite or -inf.
    """
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse if row_sum is not None else lse * LOG2E)
    delta = jax.lax.optimization_barrier(delta)  # stacked in the fusion that sums it, B8 H16 L2048 D128: 76 us; so 39 (H200)
    more = length - lse.shape[2]
    wide = lambda x, fill: jnp.pad(x, ((0, 0), (0, 0), (0, more)), constant_values=fill)  # noqa: E731
    numbers = [wide(lse, jnp.inf), wide(delta, 0.0)]
    return jnp.stack(numbers if row_sum is None else [*numbers, wide(jnp.log2(row_sum), 0.0)], axis=2)


def query_words(generator: Any, seeds: jax.Array, length: int) -> jax.Array:
    """(B, Hq, 2, length) uint32: dropout's words of every query; Threefry in a loop over query tiles would be dear."""
    queries = jnp.arange(length, dtype=jnp.uint32)
    if seeds.shape[-1] == 4:
        queries = queries + seeds[..., 2, None]
    words = generator.query_words(seeds[..., 0, None], seeds[..., 1, None], queries)
    return jnp.stack(words, axis=2)


def bring_numbers(operands: Sequence[tuple[Any, Any]], b: Any, h: Any, t: Any, now: Any, ready: Any) -> None:
    """Ask for the numbers of query tile t's rows: (an operand (B, Hq, n, length) or None, its ring (stages, n, block)) each."""
    for ref, ring in operands:
        if ref is not None:
            n, block = ring.shape[1:]
            plgpu.copy_gmem_to_smem(ref.at[b, h, pl.ds(0, n), pl.ds(t * block, block)], ring.at[now], ready.at[now])


def key_gradients(shape: ForwardShape, split: int, *dims: int) -> list[jax.ShapeDtypeStruct]:
    """What holds dk or dv of so wide heads, in the call's layout: those of each share of a group, lengths in eights."""
    B, heads, rows = shape.batch, shape.kv_heads * split, cdiv(shape.key_len, 8) * 8
    lead = (B, heads, rows) if shape.layout == "BHLE" else (B, rows, heads)
    return [jax.ShapeDtypeStruct((*lead, dim), shape.dtype) for dim in dims]


@dataclasses.dataclass(frozen=True)
class BiasFacts:
    """Of a bias in one orientation: `dense.kind`, its dtype, its last two sizes as the kernel gets it, and whether these are its
    columns and rows: a tile is transposed on its way into registers then."""

    kind: str
    dtype: Any
    shape: tuple[int, int]
    crossed: bool = False


@dataclasses.dataclass(frozen=True)
class Operands:
    """Of one orientation; `arrays` in the order in which `refs` reads them."""

    mask: Any  # its tree, None without one
    has_ids: bool
    keep_kind: str | None
    bias: BiasFacts | None
    generator: Any
    names: tuple[str, ...]
    arrays: tuple[jax.Array, ...]
    hides: bool = False
    own_hides: bool = False
    static: Any = None  # the mask, where it has no arrays
    cuts_few: bool = False

    @classmethod
    def of(
        cls, shape: ForwardShape, config: WalkConfig, mask: Any, *, keep: Any = None, bias: Any = None, seeds: Any = None,
        scale: Any = None, generator: Any = None, seen_keys: Any = None, seen_queries: Any = None, transposed: bool = False,
        interpret: Any = None,
    ) -> Operands:  # fmt: skip
        """shape, mask, keep, bias: as the call has them; `transposed` exchanges queries and keys, but not of a bias as large as the
        scores, which stays as it is (`BiasFacts.crossed`). What is absent is None.

        seen_keys, seen_queries: (B|1, Hq|1, length) bool, who may not hold anything; where numbers hide keys, they say so.
        """
        rows, columns = shape.query_len, shape.key_len
        by_numbers = seen_keys is None and hidden_by_numbers(mask, rows, columns)
        few = cuts_few(mask, keep)
        own_seen, seen = (seen_keys, seen_queries) if transposed else (seen_queries, seen_keys)
        crossed = transposed and dense.tile_bytes(bias) > 0  # a copy would be as large as the scores
        if transposed:
            mask = None if mask is None else mask.transposed()
            bias = bias if bias is None or crossed else jnp.swapaxes(bias, 2, 3)
            rows, columns = columns, rows
        arrays, structure = jax.tree.flatten(mask)
        by_ids = has_ids(mask)
        given: dict[str, Any] = {}
        keep_kind = None
        if keep is not None:
            packed = hopper_packing.packed(keep, config.rows, config.block_k, transposed=transposed, interpret=interpret)
            keep_kind = dense.kind(keep, transposed=transposed)
            given |= {"table": dense.listed(packed, mask, config.rows, rows, columns, config.block_k), "keep": packed}
        elif by_ids:
            given["table"] = visits.table(mask, config.rows, rows, columns, config.block_k)
        if by_ids:  # a tile's ids are loaded whole
            more = (cdiv(size, block) * block - size for size, block in ((rows, config.rows), (columns, config.block_k)))
            arrays = jax.tree.leaves(mask.padded(*more))
        kind = None
        if bias is not None:
            kind = dense.kind(bias)
            bias = dense.padded(bias) if kind == "tile" else bias
            given["bias"] = dense.lay_out(bias, config.rows, config.block_k)
            kind = BiasFacts(kind, bias.dtype, bias.shape[2:], crossed)
        if shape.dropout_p > 0:
            given["seeds"] = jnp.broadcast_to(seeds, (shape.batch, shape.q_heads, seeds.shape[-1]))
        if shape.scale is None:
            given["scale"] = scale.astype(jnp.float32)
        if seen is not None:
            given["seen"] = words(seen, config.block_k)
        if own_seen is not None:
            given["own_seen"] = words(own_seen, config.rows)
        names = (*("mask" for _ in arrays), *given)
        return cls(
            None if mask is None else structure, by_ids, keep_kind, kind, generator, names,
            (*arrays, *given.values()), hides=by_numbers and not transposed, own_hides=by_numbers and transposed,
            static=None if arrays else mask, cuts_few=few,
        )  # fmt: skip

    @property
    def seeds(self) -> jax.Array:
        return self.arrays[self.names.index("seeds")]

    def recipe(self, shape: ForwardShape, config: WalkConfig, products: Wgmma) -> Recipe:
        """What the rooms behind want to know; shape: of this orientation."""
        kind = None if self.bias is None else self.bias.kind
        return Recipe(
            shape, config, self.mask, self.has_ids, is_prefix=False, hides=self.hides, bias_kind=kind,
            keep_kind=self.keep_kind, generator=self.generator, products=products, own_hides=self.own_hides,
            bias_crossed=self.bias is not None and self.bias.crossed, cuts_few=self.cuts_few,
        )  # fmt: skip

    @property
    def came(self) -> dict[str, Any]:
        """The scratch of a loader that has hidden rows to clear: its barrier for `hopper_hidden.bring`."""
        return {"came": plgpu.Barrier()} if self.hides or "seen" in self.names else {}

    @property
    def numbers(self) -> int:
        """Of a row: see `row_numbers`."""
        return 2 if self.bias is None else 3

    def bias_like(self, lead: tuple[int, int]) -> jax.ShapeDtypeStruct:
        """An array like the bias, with these leading dims."""
        assert self.bias is not None
        return jax.ShapeDtypeStruct((*lead, *self.bias.shape), self.bias.dtype)

    def refs(self, refs: list[Any], ring: Any = None) -> Refs:
        """The operands in a kernel's hands; ring: the scratch of `hopper_bias.ring`."""
        ring = ring or {}
        found = dict(zip(self.names, refs, strict=True))
        masks = [ref for name, ref in zip(self.names, refs, strict=True) if name == "mask"]
        return Refs(
            masks, found.get("table"), found.get("keep"), found.get("bias"), None, found.get("seeds"), found.get("scale"),
            ring.get("bias_s"), ring.get("bias_ready"), ring.get("bias_free"), found.get("seen"), found.get("own_seen"),
        )  # fmt: skip

    def scale_of(self, shape: ForwardShape, refs: Refs, b: Any) -> Any:
        """What dq and dk are still to be multiplied by: the scale, and dropout's factor of survivors."""
        return scale_at(shape, refs, b) * survivor_scale(shape, self.generator)
