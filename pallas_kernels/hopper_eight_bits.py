"""The ring of 8-bit key and value tiles before the ring of half precision: who brings them, who widens them.

wgmma takes halves of both operands alike, so tiles of a quantised cache are widened on their way, exactly (int8 and e4m3 are
numbers of bfloat16), and their scales meet the scores: s[:, j] * key_scale[j], p[:, j] * value_scale[j]. A slot holds one tile of
K and one of V in 8 bits:

    k8_ready, v8_ready   loader -> converter    the tile has arrived (TMA counts its bytes); k8_ready counts the tile's scales too
    k8_free, v8_free     converter -> loader    it has been widened into its slot of `hopper_keys.Ring`

The scales have no barriers of their own. They have arrived with the 8-bit keys, so when k_ready says so of the widened ones; and
the loader, when it brings tile n, knows that tile n - narrow_stages has been widened, hence that the computing warpgroups have read
the keys of tile n - narrow_stages - stages, hence all scales before it: with one slot more than both rings have, none is
overwritten.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.contracts import DecodeConfig, ForwardShape
from pallas_kernels.hopper_hidden import Bits, Part, Span
from pallas_kernels.hopper_keys import Copy, Ring
from pallas_kernels.hopper_memory import swizzle_of, tile
from pallas_kernels.hopper_program import slot
from pallas_kernels.hopper_scores import ROW

UPCAST = plgpu.Layout.WGMMA_UPCAST_2X
"""Four neighbours of a row in a thread: 32 bits to load, 64 to store, free of bank conflicts beside the swizzles."""

KEY, VALUE = 0, 1  # whose scales


def widened(x: Any, dtype: Any) -> Any:
    """x in half precision, exactly; the hardware has e4m3 -> float16 only."""
    return x.astype(dtype) if x.dtype == jnp.int8 else x.astype(jnp.float32).astype(dtype)


@dataclasses.dataclass(frozen=True)
class NarrowRing:
    """k8_s (narrow_stages, block_k, E), v8_s (…, Ev), scales_s (stages of both rings + 1, 2, block_k) float32, and the barriers of
    this module's docstring."""

    ring: Ring
    k8_s: Any
    v8_s: Any
    scales_s: Any
    k8_ready: Any
    v8_ready: Any
    k8_free: Any
    v8_free: Any

    @staticmethod
    def scratch(shape: ForwardShape, config: DecodeConfig, dtype: Any, copies: int, scale_copies: int) -> dict[str, Any]:
        """For a kernel's scratch_types; copies, scale_copies: in how many a tile arrives, and the scales of its keys, or values."""
        stages, bk = config.narrow_stages, config.block_k
        k8_s, v8_s = (tile((stages, bk), dim, dtype) for dim in (shape.head_dim, shape.value_head_dim))
        free = plgpu.Barrier(num_barriers=stages)
        return {
            "k8_s": k8_s,
            "v8_s": v8_s,
            "scales_s": plgpu.SMEM((config.scale_stages, 2, bk), jnp.float32),
            "k8_ready": plgpu.Barrier(num_arrivals=copies + 2 * scale_copies, num_barriers=stages),
            "v8_ready": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            "k8_free": free,
            "v8_free": free,
        }

    @property
    def _config(self) -> DecodeConfig:
        return self.ring.recipe.config  # type: ignore[return-value]

    def _room(self, free: Any, number: Any) -> Any:
        """The slot of tile `number`, once its last tile has been widened."""
        stages = self._config.narrow_stages
        now = slot(number, stages)
        pl.when(number >= stages)(lambda: plgpu.barrier_wait(free.at[now]))
        return now

    def bring_keys(self, number: Any, copy: Copy, copy_scales: tuple[Copy, Copy]) -> None:
        """Ask for the keys of tile `number`, and for the scales of keys and values."""
        now = self._room(self.k8_free, number)
        copy(self.k8_s.at[now], self.k8_ready.at[now])
        scales = self.scales_s.at[slot(number, self._config.scale_stages)]
        for of, copy_scale in zip((KEY, VALUE), copy_scales, strict=True):
            copy_scale(scales.at[of], self.k8_ready.at[now])

    def bring_values(self, number: Any, copy: Copy) -> None:
        now = self._room(self.v8_free, number)
        copy(self.v8_s.at[now], self.v8_ready.at[now])

    def widen_keys(self, number: Any, t: Any, seen: Span | Bits | None) -> None:
        """Key tile t, the ring's of that number; the values' scales of keys that nobody sees become 0: 0 * NaN would be NaN."""
        now, then = slot(number, self._config.narrow_stages), slot(number, self._config.stages)
        plgpu.barrier_wait(self.k8_ready.at[now])
        self._wait_for_room(self.ring.k_free, number, then)
        self._widen(self.k8_s.at[now], self.ring.k_s.at[then], None)
        if seen is not None:
            scales = self.scales_s.at[slot(number, self._config.scale_stages), VALUE]
            part = self._part(t, seen)

            @pl.when(part.cut)
            def _() -> None:
                found = plgpu.load(scales, layout=ROW, optimized=False)  # pyright: ignore[reportCallIssue]
                key = plgpu.broadcasted_iota(jnp.int32, found.shape, 0, layout=ROW)
                scales[...] = jnp.where(part.kept(0, key), found, 0.0)

        self._hand_over(self.ring.k_ready.at[then], self.k8_free.at[now])

    def widen_values(self, number: Any, t: Any, seen: Span | Bits | None) -> None:
        """The values of key tile t; those of keys that nobody sees become 0 where 8 bits may say NaN."""
        now, then = slot(number, self._config.narrow_stages), slot(number, self._config.stages)
        narrow, wide = self.v8_s.at[now], self.ring.v_s.at[then]
        plgpu.barrier_wait(self.v8_ready.at[now])
        self._wait_for_room(self.ring.v_free, number, then)
        if seen is None or narrow.dtype == jnp.int8:
            self._widen(narrow, wide, None)
        else:
            part = self._part(t, seen)
            pl.when(part.cut)(lambda: self._widen(narrow, wide, part))
            pl.when(~part.cut)(lambda: self._widen(narrow, wide, None))
        self._hand_over(self.ring.v_ready.at[then], self.v8_free.at[now])

    def _part(self, t: Any, seen: Span | Bits) -> Part:
        bk = self._config.block_k
        return seen.part(t * bk, bk)

    def _wait_for_room(self, free: Any, number: Any, then: Any) -> None:
        pl.when(number >= self._config.stages)(lambda: plgpu.barrier_wait(free.at[then]))

    def _widen(self, narrow: Any, wide: Any, part: Part | None) -> None:
        """(block_k, dim) in 8 bits -> in half precision, with zeros for the hidden rows of `part`."""
        for row, column, shape in _pieces(narrow, wide):
            where = pl.ds(row, shape[0]), pl.ds(column, shape[1])
            x = widened(plgpu.load(narrow.at[where], layout=UPCAST), wide.dtype)  # pyright: ignore[reportCallIssue]
            if part is not None:
                key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=UPCAST)
                x = jnp.where(part.kept(row, key), x, jnp.zeros_like(x))
            wide[where] = x

    def _hand_over(self, ready: Any, free: Any) -> None:
        plgpu.commit_smem()  # wgmma sees what was written, and TMA may write where everybody has read
        plgpu.barrier_arrive(ready)
        plgpu.barrier_arrive(free)

    @property
    def rings(self) -> list[tuple[Any, int]]:
        """As `hopper_program.drain` wants them, of the loader."""
        stages = self._config.narrow_stages
        return [(self.k8_free, stages), (self.v8_free, stages)]


def _pieces(narrow: Any, wide: Any) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """(row, column, shape) of what is widened at a time: whole swizzles of both, which few registers hold."""
    keys, dim = wide.shape
    columns = max(swizzle_of(dim, ref.dtype)[1] for ref in (narrow, wide))
    for row in range(0, keys, 64):
        for column in range(0, dim, columns):
            yield row, column, (64, columns)
