"""What a Hopper kernel knows of a call: `Recipe`, its static facts, and `Refs`, its operands in memory; and what follows from these
alone: scale, softcap, the mask with a batch entry's numbers, the walk.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import visits
from pallas_kernels.contracts import ForwardConfig, ForwardShape
from pallas_kernels.hopper_products import Wgmma
from pallas_kernels.online_softmax import LOG2E

MOST = 3e38  # nearly the largest float32


def filled(shape: tuple[int, ...], value: Any, layout: Any) -> Any:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def shared(ref: Any, *index: Any) -> tuple[Any, ...]:
    """The leading indices of an operand that may be shared by the batch, or by all heads."""
    return tuple(0 if size == 1 else i for size, i in zip(ref.shape, index, strict=False))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A call's static facts. mask: its tree, None without one; the kinds are `dense.kind`'s, None without bias or keep.

    is_prefix: every query keeps the same first keys, if not all (`contracts.Mask.is_prefix`). hides, own_hides: whether numbers
    hide some columns from every row, some rows from every column (`hopper_hidden`). folded: rows are (heads of a group, L), all in
    one tile. cut_once: no tile but the first of a walk is cut: `visits.cut_once`, or the list says so (`visits.ListWalk.cut_once`).
    bias_crossed: tiles of a bias lie transposed in shared memory. upward: walks begin with the first tile that a slope cuts, not
    with the last one. slope_from_p: softcap's slope is made of p when it is wanted, and not held beside it (`hopper_gradients`).
    cuts_few: the mask is `is_prefix`, or that transposed.
    """

    shape: ForwardShape
    config: ForwardConfig
    mask: Any
    has_ids: bool
    is_prefix: bool
    hides: bool
    bias_kind: str | None
    keep_kind: str | None
    generator: Any
    products: Wgmma
    folded: bool = False
    own_hides: bool = False
    cut_once: bool = False
    bias_crossed: bool = False
    upward: bool = False
    slope_from_p: bool = False
    cuts_few: bool = False

    def slope_wanted_late(self) -> Recipe:
        """With softcap's slope made of p, where that says enough: not in half precision, nor beside a bias, which would be wanted
        again, nor of a small cap: lse + ln p is off by 1e-6, however small the scores.

        Where p waits from step to step, a slope beside it spills (D128 168 bytes, causal 120; D64 dq, a window, 264).
        """
        enough = self.bias_kind is None and not getattr(self.config, "half", False)
        return dataclasses.replace(self, slope_from_p=enough and self.shape.softcap is not None and self.shape.softcap >= 0.1)

    @property
    def holds_slope(self) -> bool:
        return self.shape.softcap is not None and not self.slope_from_p

    @property
    def drops(self) -> bool:
        return self.shape.dropout_p > 0

    @property
    def listed(self) -> bool:
        """Whether XLA says which tiles to visit."""
        return self.keep_kind is not None or self.has_ids

    @property
    def ragged(self) -> bool:
        return self.shape.key_len % self.config.block_k != 0

    @property
    def cuts_first_only(self) -> bool:
        """Whether no tile but the first of a walk needs the mask."""
        return self.cut_once or (self.is_prefix and self.keep_kind is None)

    @property
    def leads(self) -> bool:
        """Whether the first tiles of a walk may hold nothing for one of its warpgroups: a slope's last keys are the last row's."""
        config = self.config
        return self.mask is not None and not (self.is_prefix or self.listed) and config.rows - config.block_q >= config.block_k

    @property
    def leaves_out(self) -> bool:
        """Whether some warpgroups have no rows: the last ones of a head's last row tile."""
        return visits.cdiv(self.shape.query_len, self.config.block_q) % self.config.warpgroups != 0

    @property
    def huge(self) -> bool:
        return self.bias_kind is not None

    @property
    def waits(self) -> bool:
        """A positive factor may wait for the exponent; any other is applied to the scores, where softcap and bias want it too."""
        scale = self.shape.scale
        return scale is not None and 1e-30 < scale < 1e30 and self.shape.softcap is None and self.bias_kind is None

    @property
    def factor(self) -> float:
        """What is left to multiply the scores by, in base 2."""
        return self.shape.scale * LOG2E if self.waits else LOG2E  # type: ignore[operator]


@dataclasses.dataclass(frozen=True)
class Refs:
    """The operands beside q, k and v, in global memory; in shared memory the ring of a bias's tiles, or of its numbers for their
    columns. None: there is none.

    seen, own_seen: bits of the columns, and of the rows, that are not hidden from everybody (`hopper_hidden`)."""

    mask: list[Any]
    table: Any
    keep: Any
    bias: Any
    sinks: Any
    seeds: Any
    scale: Any
    bias_s: Any
    bias_ready: Any
    bias_free: Any
    seen: Any = None
    own_seen: Any = None


def scale_at(shape: ForwardShape, refs: Refs, b: Any) -> Any:
    """The scale of batch entry b: a number, or the operand's."""
    return shape.scale if refs.scale is None else refs.scale[shared(refs.scale, b)]


def adjusted(recipe: Recipe, refs: Refs, b: Any, s: Any) -> Any:
    """A tile of scores of batch entry b after scale, where it cannot wait for the exponent, and softcap."""
    if recipe.shape.softcap is not None:
        return capped(recipe.shape.softcap, below_cap(recipe, refs, b, s))
    return s if recipe.waits else s * scale_at(recipe.shape, refs, b)


def below_cap(recipe: Recipe, refs: Refs, b: Any, s: Any) -> Any:
    """r = 1 / (1 + e**2x) with x = scale * s / softcap, of which tanh(x) = 1 - 2r is made: the hardware's tanh has 11 bits."""
    twice = scale_at(recipe.shape, refs, b) * (2 * LOG2E / recipe.shape.softcap)  # type: ignore[operator]
    # infinite it would make NaN of the zeros of a row that does not exist; so large, every other score is at the cap anyway
    twice = min(max(twice, -MOST), MOST) if isinstance(twice, float) else jnp.clip(twice, -MOST, MOST)
    return recipe.products.reciprocal(1 + jnp.exp2(s * twice))


def capped(softcap: float, r: Any) -> Any:
    """softcap * tanh(x), of `below_cap`."""
    return softcap - (2 * softcap) * r


def survivor_scale(shape: ForwardShape, generator: Any) -> float:
    """1 / (1 - p), by which dropout multiplies what survives."""
    return 1.0 if shape.dropout_p == 0 else 1 / (1 - generator.rounded(shape.dropout_p))


def mask_of(recipe: Recipe, refs: Refs, b: Any, by_query: Any = None, by_key: Any = None) -> Any:
    """The mask with the numbers of this batch entry, and the ids of a tile."""
    if recipe.mask is None:
        return None
    return jax.tree.unflatten(recipe.mask, refs.mask).local(lambda ref: ref[shared(ref, b)], by_query, by_key)


def walk_of(recipe: Recipe, refs: Refs, b: Any, h: Any, tile: Any, q_lo: Any, rows: int) -> Any:
    """Which key tiles the rows [q_lo, q_lo + rows) of row tile `tile` visit."""
    if recipe.keep_kind is not None:
        return visits.ListWalk(refs.table, shared(refs.table, b, h, tile))
    if recipe.has_ids:
        return visits.RangeWalk(*(refs.table[(*shared(refs.table, b), tile, n)] for n in range(4)))
    shape = recipe.shape
    mask, upward = mask_of(recipe, refs, b), recipe.upward
    return visits.ranges(mask, q_lo, rows, shape.query_len, shape.key_len, recipe.config.block_k, upward)
