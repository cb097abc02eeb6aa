"""What the decode kernels share: a program's pieces of the items, and the tiles of keys and values that these read.

A piece is what a program has of one item: a run of key tiles of one batch entry's key/value head (`shares`). Keys lie in one
operand, or on pages of it; a tile is whole pages, or lies in one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import visits
from pallas_kernels.contracts import SCALES_OF_PAGE, DecodeConfig, ForwardShape
from pallas_kernels.hopper_hidden import hidden_by_numbers
from pallas_kernels.hopper_keys import Copy
from pallas_kernels.hopper_memory import rows_of
from pallas_kernels.hopper_products import Wgmma
from pallas_kernels.hopper_recipe import Recipe, Refs, mask_of, shared
from pallas_kernels.shares import Shares


def recipe_of(shape: ForwardShape, config: DecodeConfig, mask: Any, interpret: Any) -> Recipe:
    """Of a decode: masks by numbers, and nothing else between scores and softmax."""
    return Recipe(
        shape, config, None if mask is None else jax.tree.structure(mask), has_ids=False, is_prefix=mask is None or mask.is_prefix,
        hides=hidden_by_numbers(mask, shape.query_len, shape.key_len), bias_kind=None, keep_kind=None, generator=None,
        products=Wgmma(interpret is not None), folded=True,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Paging:
    """page: keys of one, None without pages; block_k: of a tile."""

    page: int | None
    block_k: int

    @property
    def copies(self) -> int:
        """In how many a tile arrives: only a page's keys lie together."""
        return 1 if self.page is None else max(1, self.block_k // self.page)

    @property
    def scales_on_pages(self) -> bool:
        """Whether the scales of 8-bit keys are read where these lie."""
        return self.page is not None and self.page >= SCALES_OF_PAGE

    @property
    def scale_copies(self) -> int:
        return self.copies if self.scales_on_pages else 1

    def parts(self, t: Any) -> list[tuple[Any, Any]]:
        """(the first key, its rows in the tile) of each copy of key tile t."""
        length = self.block_k // self.copies
        return [(t * self.block_k + n * length, pl.ds(n * length, length)) for n in range(self.copies)]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Of one program. share: `Shares.of_program`'s answer; pages: (B, …) int32 in global memory, None without; pool: how many there
    are of them."""

    recipe: Recipe
    refs: Refs
    shares: Shares
    paging: Paging
    program: Any
    share: tuple[Any, Any, Any, Any]
    pages: Any
    pool: int

    @property
    def zero(self) -> Any:
        """An int32 that is no constant while tracing: those become int64 under jax_enable_x64, or operands."""
        return 0 * self.program

    @property
    def count(self) -> Any:
        return self.share[2]

    def loop(self, start: Any, stop: Any, body: Callable[..., Any], state: Any) -> Any:
        return lax.fori_loop(start + self.zero, stop + self.zero, body, state)

    def each(self, body: Callable[[Any, Any], Any]) -> Any:
        """body(n, done) -> done for every piece n: tiles that its predecessors had, and with its own."""
        return self.loop(0, self.count, body, self.zero)

    def place(self, n: Any) -> tuple[Any, Any]:
        """(b, key/value head) of piece n."""
        H = np.int32(self.recipe.shape.kv_heads)
        return lax.div(self.share[0] + n, H), lax.rem(self.share[0] + n, H)

    def slot(self, n: Any) -> Any:
        """Where the results of piece n go."""
        return self.share[0] + n + self.program

    def walk(self, n: Any, b: Any) -> Any:
        """The key tiles of piece n."""
        shape, (_, start, count, end) = self.recipe.shape, self.share
        L, S = shape.query_len, shape.key_len
        walk = visits.ranges(mask_of(self.recipe, self.refs, b), 0, L, L, S, self.recipe.config.block_k)
        if self.shares.whole or (isinstance(walk.steps, int) and walk.steps == 1):
            return walk
        stop = jnp.where(n == count - 1, end, walk.steps)
        return walk.part(jnp.where(n == 0, start, self.zero), stop)

    def _on_page(self, b: Any, key: Any) -> tuple[Any, Any]:
        """(the page that holds this key, where on it). Behind the last page it comes again, and what is no page is one: unseen."""
        assert self.paging.page is not None
        size = np.int32(self.paging.page)
        of = self.pages[b, visits.least(lax.div(key, size), self.pages.shape[1] - 1)]
        return visits.greatest(visits.least(of, self.pool - 1), 0), lax.rem(key, size)

    def keys(self, operand: Any, b: Any, h: Any, t: Any) -> Copy:
        """Of key tile t, the keys or the values, with zeros where their memory has more columns."""

        def copy(memory: Any, ready: Any) -> None:
            columns = memory.shape[-1]
            wide = lambda ref: ref if columns == operand.shape[-1] else ref.at[:, pl.ds(self.zero, columns)]  # noqa: E731
            if self.pages is None:
                bk = self.recipe.config.block_k
                plgpu.copy_gmem_to_smem(wide(rows_of(self.recipe.shape.layout, operand, b, t * bk, bk, h)), memory, ready)
                return
            for key, rows in self.paging.parts(t):
                page, row = self._on_page(b, key)
                plgpu.copy_gmem_to_smem(wide(operand.at[page, pl.ds(row, rows.size), h]), memory.at[rows], ready)

        return copy

    def scales(self, operand: Any, b: Any, h: Any, t: Any) -> Copy:
        """Of key tile t, the scales of its keys or values: (1|B, 1|H, S), or (pages, 1|H, page)."""

        def copy(memory: Any, ready: Any) -> None:
            lead = shared(operand, b, h)
            if not self.paging.scales_on_pages:
                bk = self.recipe.config.block_k
                plgpu.copy_gmem_to_smem(operand.at[(*lead, pl.ds(t * bk, bk))], memory, ready)
                return
            for key, rows in self.paging.parts(t):
                page, row = self._on_page(b, key)
                plgpu.copy_gmem_to_smem(operand.at[page, lead[1], pl.ds(row, rows.size)], memory.at[rows], ready)

        return copy


def operands_of(before: Any, mask_arrays: Sequence[Any], scale: Any, pages: Any) -> list[Any]:
    """What `pieces_of` reads, in its order; None: there is none."""
    scale = None if scale is None else scale.astype(jnp.float32)
    return [x for x in (before, *mask_arrays, scale, pages) if x is not None]


def pieces_of(
    recipe: Recipe, shares: Shares, paging: Paging, operands: Iterator[Any], mask_arrays: Sequence[Any], pool: int
) -> Pieces:
    """This program's, from the kernel's next operands: `before` of the shares, the mask's arrays, the scale, the pages."""
    before = next(operands) if shares.searches else None
    refs = Refs(
        mask=[next(operands) for _ in mask_arrays], table=None, keep=None, bias=None, sinks=None, seeds=None,
        scale=next(operands) if recipe.shape.scale is None else None, bias_s=None, bias_ready=None, bias_free=None,
    )  # fmt: skip
    pages = None if paging.page is None else next(operands)
    program = lax.axis_index("program")
    return Pieces(recipe, refs, shares, paging, program, shares.of_program(program, before), pages, pool)
