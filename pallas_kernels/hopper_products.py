"""The matrix products of a Hopper warpgroup (wgmma), for hardware and for Mosaic's interpreter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


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
        """After a plain load of what TMA will write again: the interpreter wants to see it ordered, mbarriers order it anyway."""
        if self.interpret:
            plgpu.commit_smem()

    def scores(self, q: Any, k: Any) -> Any:
        """q @ k.T: (rows, E), (keys, E) in shared memory -> (rows, keys) float32."""
        kt = k.transpose((1, 0))
        if self.interpret:
            return self._dot(q, kt)

        def body(acc: Any) -> Any:
            plgpu.wgmma(acc, q, kt)
            return acc[...]

        return pl.run_scoped(body, plgpu.ACC((q.shape[0], k.shape[0]), jnp.float32))

    def add(self, acc: Any, p: Any, v: Any) -> Any:
        """acc + p @ v: p (rows, keys) in registers, v (keys, Ev) in shared memory."""
        if self.interpret:
            return acc + self._dot(p, v)
        return pl.run_state(lambda ref: plgpu.wgmma(ref, p, v))(plgpu.ACC.init(acc))

    def step(
        self, q: Any, k: Any, acc: Any, p: Any, v: Any, before_v: Callable[[], None], after_k: Callable[[], None],
        softmax: Callable[..., tuple[Any, ...]], state: tuple[Any, Any],
    ) -> tuple[Any, tuple[Any, ...]]:  # fmt: skip
        """(acc + p @ v, softmax(q @ k.T, *state)): both products issued at once, the second still running under the softmax."""
        if self.interpret:
            s = self.scores(q, k)
            before_v()
            acc = self.add(acc, p, v)
            after_k()
            return acc, softmax(s, *state)

        def stage(refs: Any) -> None:
            acc_ref, m_ref, l_ref, shrink_ref, p_ref = refs
            p_now = p_ref[...]

            def products(s_ref: Any) -> Any:
                plgpu.wgmma(s_ref, q, k.transpose((1, 0)))
                before_v()
                plgpu.wgmma(acc_ref, p_now, v)
                return plgpu.wgmma_accumulator_load(s_ref, wait_n=1)  # of the two the scores only

            s = pl.run_scoped(products, plgpu.ACC((q.shape[0], k.shape[0]), jnp.float32))
            after_k()
            m_ref[...], l_ref[...], shrink_ref[...], p_ref[...] = softmax(s, m_ref[...], l_ref[...])

        m, l = state
        acc, *after = pl.run_state(stage)((plgpu.ACC.init(acc), m, l, m, p))
        return acc, tuple(after)
