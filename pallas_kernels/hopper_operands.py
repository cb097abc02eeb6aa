"""What the backward kernels are given beside the big arrays: masks, dropout's words, a traced scale; made by XLA, read by `refs`.

One `Operands` serves one orientation: rows of queries against tiles of keys (dq), or, transposed, rows of keys against tiles of
queries (dk, dv). It knows which arrays there are, in which order a kernel gets them, and how they lie.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dense, visits
from pallas_kernels.contracts import ForwardShape, WalkConfig
from pallas_kernels.hopper_products import Wgmma
from pallas_kernels.hopper_scores import Recipe, Refs, shared
from pallas_kernels.online_softmax import LOG2E
from pallas_kernels.visits import cdiv


def row_numbers(lse: jax.Array, delta: jax.Array, length: int) -> jax.Array:
    """(B, Hq, 2, length) float32: lse in base 2 and delta of every row.

    p = 2**(s - lse): +inf where a row has no keys, or does not exist, makes it 0 for whatever s is finite or -inf.
    """
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2E)
    more = length - lse.shape[2]
    wide = lambda x, fill: jnp.pad(x, ((0, 0), (0, 0), (0, more)), constant_values=fill)  # noqa: E731
    return jnp.stack([wide(lse, jnp.inf), wide(delta, 0.0)], axis=2)


def query_words(generator: Any, seeds: jax.Array, length: int) -> jax.Array:
    """(B, Hq, 2, length) uint32: dropout's words of every query; Threefry in a loop over query tiles would be dear."""
    words = generator.query_words(seeds[..., 0, None], seeds[..., 1, None], jnp.arange(length, dtype=jnp.uint32))
    return jnp.stack(words, axis=2)


@dataclasses.dataclass(frozen=True)
class Operands:
    """Of one orientation; `arrays` in the order in which `refs` reads them."""

    mask: Any  # its tree, None without one
    has_ids: bool
    keep_kind: str | None
    generator: Any
    names: tuple[str, ...]
    arrays: tuple[jax.Array, ...]

    @classmethod
    def of(
        cls, shape: ForwardShape, config: WalkConfig, mask: Any, *, keep: Any = None, seeds: Any = None, scale: Any = None,
        generator: Any = None, transposed: bool = False, ordered: bool = False,
    ) -> Operands:  # fmt: skip
        """shape, mask, keep: as the call has them; `transposed` exchanges queries and keys. What is absent is None.
        ordered: with the turns in which row tiles come to a column tile."""
        rows, columns = shape.query_len, shape.key_len
        if transposed:
            mask = None if mask is None else mask.transposed()
            keep = None if keep is None else jnp.swapaxes(keep, 2, 3)
            rows, columns = columns, rows
        arrays, structure = jax.tree.flatten(mask)
        has_ids = any(array.ndim == 2 for array in arrays)
        given: dict[str, Any] = {}
        if keep is not None:
            words = dense.pack(keep, config.rows, config.block_k)
            given |= {"table": visits.listed(words, mask, config.rows, rows, columns, config.block_k), "keep": words}
        elif has_ids:
            given["table"] = visits.table(mask, config.rows, rows, columns, config.block_k)
        if has_ids:  # a tile's ids are loaded whole
            more = (cdiv(size, block) * block - size for size, block in ((rows, config.rows), (columns, config.block_k)))
            arrays = jax.tree.leaves(mask.padded(*more))
        if ordered and mask is None and keep is None:
            pass  # the tile's own number
        elif ordered:
            found = given.get("table")
            found = visits.table(mask, config.rows, rows, columns, config.block_k) if found is None else found
            more = visits.turns(found, cdiv(columns, config.block_k))
            given["turns"] = jnp.broadcast_to(more, (*more.shape[:2], cdiv(rows, config.rows), more.shape[3]))
        if shape.dropout_p > 0:
            given["seeds"] = jnp.broadcast_to(seeds, (shape.batch, shape.q_heads, 2))
        if shape.scale is None:
            given["scale"] = scale.astype(jnp.float32)
        names = (*("mask" for _ in arrays), *given)
        return cls(
            None if mask is None else structure, has_ids, None if keep is None else dense.kind(keep), generator, names,
            (*arrays, *given.values()),
        )  # fmt: skip

    @property
    def seeds(self) -> jax.Array:
        return self.arrays[self.names.index("seeds")]

    def recipe(self, shape: ForwardShape, config: WalkConfig, products: Wgmma) -> Recipe:
        """What `hopper_scores` wants to know; shape: of this orientation."""
        return Recipe(
            shape, config, self.mask, self.has_ids, is_prefix=False, hides=False, bias_kind=None, keep_kind=self.keep_kind,
            generator=self.generator, products=products,
        )  # fmt: skip

    def refs(self, refs: list[Any]) -> Refs:
        """The operands in a kernel's hands."""
        found = dict(zip(self.names, refs, strict=True))
        masks = [ref for name, ref in zip(self.names, refs, strict=True) if name == "mask"]
        return Refs(
            masks, found.get("table"), found.get("keep"), None, None, found.get("seeds"), found.get("scale"), None, None, None
        )

    def turn(self, refs: list[Any], b: Any, h: Any, row_tile: Any, column_tile: Any) -> Any:
        """How many row tiles are to come to this column tile before this one."""
        if "turns" not in self.names:
            return row_tile
        found = refs[self.names.index("turns")]
        return found[(*shared(found, b, h), row_tile, column_tile)]

    def scale_of(self, shape: ForwardShape, refs: Refs, b: Any) -> Any:
        """What dq and dk are still to be multiplied by: the scale, and dropout's factor of survivors."""
        scale: Any = shape.scale if refs.scale is None else refs.scale[0 if refs.scale.shape[0] == 1 else b]
        return scale * survivor_scale(shape, self.generator)


def survivor_scale(shape: ForwardShape, generator: Any) -> float:
    """1 / (1 - p), by which dropout multiplies what survives."""
    if shape.dropout_p == 0:
        return 1.0
    return 1 / (1 - generator.rounded(shape.dropout_p))
