"""The ring of key and value tiles in shared memory: who brings them, who attends to them, who waits for what.

A slot of the ring holds one tile of K and one of V; tile number n of a program, counted over all its items, lies in slot n modulo
the stages:

    k_ready, v_ready   loader -> computers    the tile has arrived (TMA counts its bytes)
    k_free, v_free     computers -> loader    every computing warpgroup has read it
    v_came             the loader's own       a tile of V in which it still has to clear what nobody sees
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.contracts import ForwardConfig, ForwardShape
from pallas_kernels.hopper_hidden import Bits, Span, bring
from pallas_kernels.hopper_memory import TILE, tile
from pallas_kernels.hopper_program import pass_by, slot
from pallas_kernels.hopper_recipe import Recipe, filled
from pallas_kernels.hopper_scores import Rows
from pallas_kernels.online_softmax import over_columns

Copy = Callable[[Any, Any], None]  # (a tile in shared memory, the barrier that hears of its bytes)
Loop = Callable[[Any, Any, Callable[..., Any], Any], Any]


@dataclasses.dataclass(frozen=True)
class Ring:
    """k_s (stages, block_k, E), v_s (stages, block_k, Ev), and the barriers of this module's docstring, one a stage; copies: in how
    many a tile arrives, each of which its barrier counts."""

    recipe: Recipe
    k_s: Any
    v_s: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any
    v_came: Any = None
    copies: int = 1

    @staticmethod
    def tiles(shape: ForwardShape, config: ForwardConfig) -> dict[str, Any]:
        """Its memory, for a kernel's scratch_types."""
        k_s, v_s = (tile((config.stages, config.block_k), dim, shape.dtype) for dim in (shape.head_dim, shape.value_head_dim))
        return {"k_s": k_s, "v_s": v_s}

    @staticmethod
    def barriers(config: ForwardConfig, *, hides: bool, copies: int = 1) -> dict[str, Any]:
        """Its barriers, for a kernel's scratch_types."""
        free = plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages)
        ready = plgpu.Barrier(num_arrivals=copies, num_barriers=config.stages)
        came = {"v_came": plgpu.Barrier(num_arrivals=copies)} if hides else {}
        return {"k_ready": ready, "v_ready": ready, "k_free": free, "v_free": free, **came}

    def _room(self, free: Any, number: Any) -> Any:
        """The slot of tile `number`, once its last tile has been read."""
        stages = self.recipe.config.stages
        now = slot(number, stages)
        pl.when(number >= stages)(lambda: plgpu.barrier_wait(free.at[now]))
        return now

    def bring_keys(self, number: Any, copy: Copy) -> None:
        now = self._room(self.k_free, number)
        copy(self.k_s.at[now], self.k_ready.at[now])

    def bring_values(self, number: Any, copy: Copy, t: Any, seen: Span | Bits | None) -> None:
        """The values of key tile t; those of keys that nobody sees become 0."""
        bk = self.recipe.config.block_k
        part = None if seen is None else seen.part(t * bk, bk)  # asked before the wait, which hides how long memory takes
        now = self._room(self.v_free, number)
        bring(copy, self.v_s.at[now], self.v_ready.at[now], part, self.v_came, self.copies)

    @property
    def rings(self) -> list[tuple[Any, Any, int]]:
        """(ready, free, stages) of each."""
        stages = self.recipe.config.stages
        return [(self.k_ready, self.k_free, stages), (self.v_ready, self.v_free, stages)]

    def attend(
        self, rows: Rows, query: Callable[[], Any], done: Any, loop: Loop, *, others: Sequence[tuple[Any, Any, int]] = (),
        pin: Any = None, between: Callable[[], None] | None = None,
    ) -> tuple[Any, Any, Any]:  # fmt: skip
        """(acc, m, l) of the rows after their walk, `done` tiles into the ring: the first step, each other one with the PV of the
        one before it, the last PV.

        query: waits for the queries' tile in shared memory and gives it; others: rings that hold a tile for each step too; pin: as
        `Wgmma.step`'s; between: called where the queries have been read and one product is left.
        """
        recipe = rows.recipe
        config, products = recipe.config, recipe.products
        stages, tile_of_rows = config.stages, (config.block_q, recipe.shape.value_head_dim)

        def step(i: Any, state: Any) -> Any:
            acc, m, l, p = state
            now, before = slot(done + i, stages), slot(done + i - 1, stages)
            packed = [] if recipe.cuts_first_only else rows.keep_words(i)
            plgpu.barrier_wait(self.k_ready.at[now])
            acc, (m, l, shrink, p) = products.step(
                q, self.k_s.at[now], acc, p, self.v_s.at[before],
                lambda: plgpu.barrier_wait(self.v_ready.at[before]), lambda: plgpu.barrier_arrive(self.k_free.at[now]),
                functools.partial(rows.softmax, i=i, packed=packed, number=done + i), (m, l), pin,
            )  # fmt: skip
            plgpu.barrier_arrive(self.v_free.at[before])
            return acc * over_columns(shrink, acc), m, l, p

        first = rows.lead
        if not isinstance(first, int):
            pass_by((*self.rings, *others), done, done + first)
        packed, now = rows.keep_words(first), slot(done + first, stages)
        q = query()
        plgpu.barrier_wait(self.k_ready.at[now])
        if config.q_registers:
            q = plgpu.load(q, layout=TILE)  # pyright: ignore[reportCallIssue]
            products.read()
        s = products.scores(q, self.k_s.at[now])
        plgpu.barrier_arrive(self.k_free.at[now])
        m, l, _, p = rows.softmax(s, *rows.first(), i=first, packed=packed, number=done + first, is_first=True)
        state = filled(tile_of_rows, 0.0, TILE), m, l, p.astype(recipe.shape.dtype)
        if not (isinstance(rows.walk.steps, int) and rows.walk.steps == 1):
            # else an unused iota in the loop would keep Mosaic's layout inference searching for a minute, and fail
            state = loop(first + 1, rows.walk.steps, step, state)
        acc, m, l, p = state
        if between is not None:
            between()
        end = slot(done + rows.walk.steps - 1, stages)
        plgpu.barrier_wait(self.v_ready.at[end])
        acc = products.add(acc, p, self.v_s.at[end])
        plgpu.barrier_arrive(self.v_free.at[end])
        return acc, m, l.sum(axis=1) if config.sums else l
