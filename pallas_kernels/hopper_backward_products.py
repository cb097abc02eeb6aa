"""The matrix products of the backward kernels, in the order in which they stay in flight under what is done to a tile.

Both loops are pipelined over two steps, so that, but for `plain`, some product runs under each piece of elementwise work: in the dq
kernel the last step's dS @ K under this step's p and dS; in the dk/dv kernel P.T @ dO under dS, dS.T @ Q under the next step's p.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper_products import Wgmma

State = tuple[Any, ...]  # p, and softcap's slope if it is held: tiles, float32 or, from step to step, halves

Gradient = Callable[..., tuple[Any, ...]]
"""(state, dp, *sums) -> (ds, *sums): float32; sums are what else adds up over the steps, ds by row for a bias."""


def _unset(shape: tuple[int, ...]) -> Any:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


@dataclasses.dataclass(frozen=True)
class Spread:
    """How ds reaches whoever makes dq of it: store(ds) puts a warpgroup's own into shared memory, tell() says that it is there."""

    store: Callable[[Any], None]
    tell: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class BackwardWgmma(Wgmma):
    """The steps of the two loops. What waits for memory and gives it back comes as functions without arguments."""

    def queries_step(
        self, q: Any, k: Any, dout: Any, v: Any, dq: Any, ds: Any, k_before: Any, *, before_v: Callable[[], None],
        after_v: Callable[[], None], probabilities: Callable[[Any], State], gradient: Gradient, sums: Sequence[Any] = (),
        plain: bool = False,
    ) -> tuple[Any, Any, tuple[Any, ...]]:  # fmt: skip
        """(dq + ds @ k_before, the next ds, the next sums): tiles (queries, keys); ds in half precision, in registers.

        plain: that product is behind before the others begin: 16 registers less.
        """
        if self.interpret:
            state = probabilities(self.scores(q, k))
            before_v()
            dp = self.scores(dout, v)
            after_v()
            new, *sums = gradient(state, dp, *sums)
            return self.add(dq, ds, k_before), new.astype(ds.dtype), tuple(sums)

        def stage(refs: Any) -> None:
            dq_ref, ds_ref, *sum_refs = refs

            def products(s_ref: Any, dp_ref: Any) -> Any:
                plgpu.wgmma(s_ref, q, k.transpose((1, 0)))
                before_v()
                plgpu.wgmma(dp_ref, dout, v.transpose((1, 0)))
                if not plain:
                    plgpu.wgmma(dq_ref, ds, k_before)
                state = probabilities(plgpu.wgmma_accumulator_load(s_ref, wait_n=1 if plain else 2))
                return state, plgpu.wgmma_accumulator_load(dp_ref, wait_n=0 if plain else 1)

            if plain:
                plgpu.wgmma(dq_ref, ds, k_before)
                plgpu.wgmma_wait(0)

            shape = (q.shape[0], k.shape[0])
            state, dp = pl.run_scoped(products, plgpu.ACC(shape, jnp.float32), plgpu.ACC(shape, jnp.float32))
            after_v()
            found = lax.optimization_barrier(gradient(state, dp, *(ref[...] for ref in sum_refs)))
            for ref, new in zip((ds_ref, *sum_refs), found, strict=True):
                ref[...] = new

        dq, ds32, *after = pl.run_state(stage)((plgpu.ACC.init(dq), _unset(ds.shape), *sums))
        return dq, ds32.astype(ds.dtype), tuple(after)  # narrowed when the product that reads the last ds is done (C7513)

    def keys_step(
        self, k: Any, q: Any, v: Any, dout: Any, dk: Any, dv: Any, state: State, q_next: Any, *, dtype: Any,
        before_dout: Callable[[], None], after_dout: Callable[[], None], before_next: Callable[[], None],
        weights: Callable[[State], Any], gradient: Gradient, probabilities: Callable[[Any], State], sums: Sequence[Any] = (),
        spread: Spread | None = None, plain: bool = False, before_end: Callable[[], None] = lambda: None,
    ) -> tuple[Any, Any, State, tuple[Any, ...]]:  # fmt: skip
        """(dk + ds @ q, dv + p @ dout, the next state, the next sums): tiles (keys, queries); dk or dv None where it is not
        wanted; q_next None in the last step.

        spread: takes ds as well, in every step but such a last one. plain: nothing is in flight under ds, which takes fewer
        registers. before_end: a wait for memory, behind the next state and before dk's product is waited for, which ptxas would
        else do before the exponentials.
        """
        wide = lambda state: tuple(x.astype(jnp.float32) for x in state)  # noqa: E731
        if self.interpret:
            before_dout()
            if dk is not None:
                ds, *sums = gradient(wide(state), self.scores(v, dout), *sums)
                dk = self.add(dk, ds.astype(dtype), q)
                if spread is not None:
                    spread.store(ds.astype(dtype))
                    spread.tell()
            if dv is not None:
                dv = self.add(dv, weights(state).astype(dtype), dout)
            after_dout()
            if q_next is None:
                return dk, dv, state, tuple(sums)
            before_next()
            state = probabilities(self.scores(k, q_next))
            before_end()
            return dk, dv, state, tuple(sums)

        tile = state[0].shape
        early = dk is not None and (dv is None or plain)  # dout has been read before ds is made

        def stage(refs: dict[str, Any]) -> None:
            state = tuple(ref[...] for ref in refs["state"])
            before_dout()

            def first(dp_ref: Any = None) -> Any:
                if dk is not None:
                    plgpu.wgmma(dp_ref, v, dout.transpose((1, 0)))
                if dv is not None:
                    plgpu.wgmma(refs["dv"], weights(state).astype(dtype), dout)
                return None if dk is None else plgpu.wgmma_accumulator_load(dp_ref, wait_n=0 if dv is None or plain else 1)

            dp = first() if dk is None else pl.run_scoped(first, plgpu.ACC(tile, jnp.float32))
            ds = None
            if early:
                after_dout()
            if dk is not None:
                ds, *found = gradient(wide(state), dp, *(ref[...] for ref in refs["sums"]))
                ds = ds.astype(dtype)
                for ref, new in zip(refs["sums"], found, strict=True):
                    ref[...] = new
                if spread is not None:
                    spread.store(ds)

            def second(s_ref: Any) -> Any:
                before_next()
                plgpu.wgmma(s_ref, k, q_next.transpose((1, 0)))
                if dk is not None:
                    plgpu.wgmma(refs["dk"], ds, q)
                if spread is not None:
                    spread.tell()
                return plgpu.wgmma_accumulator_load(s_ref, wait_n=0 if dk is None else 1)  # dv is behind then

            if q_next is None:
                if dk is not None:
                    plgpu.wgmma(refs["dk"], ds, q)
                return
            s = pl.run_scoped(second, plgpu.ACC(tile, jnp.float32))
            if not early:
                after_dout()
            for ref, new in zip(refs["state"], probabilities(s), strict=True):
                ref[...] = new
            before_end()

        refs: dict[str, Any] = {"state": state, "sums": tuple(sums)}
        refs |= {name: plgpu.ACC.init(acc) for name, acc in (("dk", dk), ("dv", dv)) if acc is not None}
        after = pl.run_state(stage)(refs)
        if q_next is None and not early:
            after_dout()
        return after.get("dk"), after.get("dv"), after["state"], after["sums"]

    def role_step(
        self, own: Any, tile: Any, acc: Any, x: Any, before: Any, *, before_tile: Callable[[], None],
        before_last: Callable[[], None], after_last: Callable[[], None], elementwise: Callable[..., tuple[Any, ...]],
        sums: Sequence[Any] = (), plain: bool = False,
    ) -> tuple[Any, Any, tuple[Any, ...]]:  # fmt: skip
        """(acc + x @ before, the next x, the next sums): x (keys, queries) in half precision, in registers; `before` the tile of
        the step before. elementwise(own @ tile.T, *sums) -> (the next x, *sums), float32.

        plain: acc's product first, and nothing in flight under `elementwise`; `before` is given back early.
        """
        if self.interpret:
            before_last()
            acc = self.add(acc, x, before)
            after_last()
            before_tile()
            new, *found = elementwise(self.scores(own, tile), *sums)
            return acc, new.astype(x.dtype), tuple(found)

        def stage(refs: Any) -> None:
            acc_ref, x_ref, *sum_refs = refs

            def products(s_ref: Any) -> Any:
                if plain:
                    before_last()
                    plgpu.wgmma(acc_ref, x, before)
                before_tile()
                plgpu.wgmma(s_ref, own, tile.transpose((1, 0)))
                if plain:
                    plgpu.wgmma_wait(1)
                    after_last()
                else:
                    before_last()
                    plgpu.wgmma(acc_ref, x, before)
                return plgpu.wgmma_accumulator_load(s_ref, wait_n=0 if plain else 1)

            s = pl.run_scoped(products, plgpu.ACC((own.shape[0], tile.shape[0]), jnp.float32))
            found = lax.optimization_barrier(elementwise(s, *(ref[...] for ref in sum_refs)))
            for ref, new in zip((x_ref, *sum_refs), found, strict=True):
                ref[...] = new

        acc, x32, *found = pl.run_state(stage)((plgpu.ACC.init(acc), _unset(x.shape), *sums))
        if not plain:
            after_last()
        return acc, x32.astype(x.dtype), tuple(found)  # narrowed when the product that reads the last x is done (C7513)

    def product(self, a: Any, b: Any) -> Any:
        """a @ b, both in shared memory, float32."""
        if self.interpret:
            return self._dot(a, b)

        def of(ref: Any) -> Any:
            plgpu.wgmma(ref, a, b)
            return plgpu.wgmma_accumulator_load(ref, wait_n=0)

        return pl.run_scoped(of, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))
