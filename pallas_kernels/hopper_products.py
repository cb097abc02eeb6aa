"""The matrix products of a Hopper warpgroup (wgmma), for hardware and for Mosaic's interpreter."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dense, hopper_ptx


@dataclasses.dataclass(frozen=True)
class Wgmma:
    """The matrix products, in hardware or, where the kernel is interpreted, as plain dots. The only code that knows which.

    Mosaic's interpreter has no accumulator state and no register operand; its dots read shared memory, which the race
    detector wants committed before TMA writes there again.
    """

    interpret: bool

    def _dot(self, a: Any, b: Any) -> Any:
        result = jnp.dot(a if isinstance(a, jax.Array) else a[...], b[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()
        return result

    def read(self) -> None:
        """After a plain load of what TMA will write again, for the interpreter, which wants to see the two ordered.

        In hardware a fence would do that (`loaded`). It is left out only where what was loaded has been used long before the memory
        is given back.
        """
        if self.interpret:
            plgpu.commit_smem()

    def loaded(self) -> None:
        """Between a plain load of what TMA will write again and the arrival that gives it back; or between a plain store of what
        another warpgroup's products will read and the arrival that says so.

        Each thread fences for itself, since each of the 128 arrives (Mosaic's `barrier_arrive`); for one that arrives for all, they
        would have to meet first.
        """
        if self.interpret:
            plgpu.commit_smem()
        else:
            hopper_ptx.fence()

    def indices(self, tile: tuple[int, int], axis: int) -> Any:
        """0 and on along an axis of a tile (rows, columns), int32."""
        if axis == 1:
            return self.columns(tile[1])
        return jnp.arange(tile[0], dtype=jnp.int32) if self.interpret else hopper_ptx.rows(tile[0])

    def apart(self, tile: tuple[int, int], start: Any) -> Any:
        """start + row - (column & 6) over a tile (rows, columns), int32, start a scalar."""
        if not self.interpret:
            return hopper_ptx.apart(tile, start)
        row, column = (lax.broadcasted_iota(jnp.int32, tile, axis) for axis in (0, 1))
        return start + row - (column & 6)

    def columns(self, length: int, bits: int = -1) -> Any:
        """Those bits of 0 to length - 1, along a tile's columns, int32."""
        return jnp.arange(length, dtype=jnp.int32) & bits if self.interpret else hopper_ptx.columns(length, bits)

    def reciprocal(self, x: Any) -> Any:
        """1 / x of a tile (64, columns) float32."""
        return 1 / x if self.interpret else hopper_ptx.reciprocal(x)

    def widened(self, tile: Any) -> Any:
        """A tile (rows, columns) as float32."""
        if self.interpret or tile.dtype != jnp.bfloat16:
            return tile.astype(jnp.float32)
        return hopper_ptx.widened(tile)

    def store(self, memory: Any, tile: Any) -> None:
        """A tile (64, columns) of halves into shared memory, columns a multiple of 64."""
        if not self.interpret:
            return hopper_ptx.store(memory, tile)
        memory[...] = tile

    def clear(self, memory: Any, seen: tuple[Any, ...]) -> None:
        """Zeros for rows of a tile (64, dim) in shared memory, whose bit in two words is 0; `commit_smem` is left to do."""
        if not self.interpret:
            return hopper_ptx.clear(memory, seen)
        kept, found = dense.bit(seen, lax.broadcasted_iota(jnp.int32, memory.shape, 0)), memory[...]
        memory[...] = jnp.where(kept, found, jnp.zeros_like(found))

    def kept(self, s: Any, words: Sequence[Any], same_rows: bool) -> Any:
        """The scores (rows, keys) that a dense mask keeps, the others -inf; words: of each piece (`dense.pack`), same_rows:
        all rows have the same."""
        return jnp.where(dense.unpack(words, s.shape[1]), s, -jnp.inf) if self.interpret else hopper_ptx.kept(s, words, same_rows)

    def scores(self, q: Any, k: Any) -> Any:
        """q @ k.T: (rows, E), (keys, E) in shared memory -> (rows, keys) float32."""
        kt = k.transpose((1, 0))
        if self.interpret:
            return self._dot(q, kt)

        def body(acc: Any) -> Any:
            plgpu.wgmma(acc, q, kt)
            return acc[...]

        return pl.run_scoped(body, plgpu.ACC((q.shape[0], k.shape[0]), jnp.float32))

    def sum(self, operands: Sequence[tuple[Any, Any]], shape: tuple[int, int]) -> Any:
        """The sum of x @ y, float32: x (rows, n) in registers, y (n, columns) in shared memory."""
        if self.interpret:
            return functools.reduce(lambda a, b: a + b, [self._dot(x, y) for x, y in operands])

        def body(acc: Any) -> Any:
            for x, y in operands:
                plgpu.wgmma(acc, x, y)
            return acc[...]

        return pl.run_scoped(body, plgpu.ACC(shape, jnp.float32))

    def add_each(self, accs: Sequence[Any], left: Sequence[Any], right: Any) -> tuple[Any, ...]:
        """acc + x @ right for each acc and x (rows, n) in registers; right (n, columns) in shared memory."""
        if self.interpret:
            return tuple(acc + self._dot(x, right) for acc, x in zip(accs, left, strict=True))

        def stage(refs: Any) -> None:
            for ref, x in zip(refs, left, strict=True):
                plgpu.wgmma(ref, x, right)

        return pl.run_state(stage)(tuple(plgpu.ACC.init(acc) for acc in accs))

    def add(self, acc: Any, p: Any, v: Any) -> Any:
        """acc + p @ v: p (rows, keys) in registers, v (keys, Ev) in shared memory."""
        if self.interpret:
            return acc + self._dot(p, v)
        return pl.run_state(lambda ref: plgpu.wgmma(ref, p, v))(plgpu.ACC.init(acc))

    def step(
        self, q: Any, k: Any, acc: Any, p: Any, v: Any, before_v: Callable[[], None], after_k: Callable[[], None],
        softmax: Callable[..., tuple[Any, ...]], state: tuple[Any, Any], pin: Any,
    ) -> tuple[Any, tuple[Any, ...]]:  # fmt: skip
        """(acc + p @ v, softmax(q @ k.T, *state)): both products issued at once, the second still running under the softmax.

        softmax(s, m, l) -> (m, l, shrink, p), all float32; p comes back in the dtype of the last one. pin: shared memory for l,
        which holds the second product under all of the softmax; None leaves it to the compiler where to wait.
        """
        if self.interpret:
            s = self.scores(q, k)
            before_v()
            acc = self.add(acc, p, v)
            after_k()
            *after, p32 = softmax(s, *state)
            return acc, (*after, p32.astype(p.dtype))

        def stage(refs: Any) -> None:
            acc_ref, m_ref, l_ref, shrink_ref, p_ref = refs

            def products(s_ref: Any) -> Any:
                plgpu.wgmma(s_ref, q, k.transpose((1, 0)))
                before_v()
                plgpu.wgmma(acc_ref, p, v)
                return plgpu.wgmma_accumulator_load(s_ref, wait_n=1)  # of the two the scores only

            s = pl.run_scoped(products, plgpu.ACC((q.shape[0], k.shape[0]), jnp.float32))
            after_k()
            m_new, l_new, shrink, p32 = lax.optimization_barrier(softmax(s, m_ref[...], l_ref[...]))
            if pin is not None:
                # ptxas puts the wait for the second product before the exponentials, if it may: not across a store of their sum
                pin[...] = l_new
            m_ref[...], l_ref[...], shrink_ref[...], p_ref[...] = m_new, l_new, shrink, p32

        m, l = state
        unset = plgpu.layout_cast(jnp.zeros(p.shape, jnp.float32), plgpu.Layout.WGMMA)
        acc, *after, p32 = pl.run_state(stage)((plgpu.ACC.init(acc), m, l, m, unset))
        # narrowed when the second product, which reads the last p, is done: before, ptxas would serialise (C7513)
        return acc, (*after, p32.astype(p.dtype))
