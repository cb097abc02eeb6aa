"""What every Hopper kernel here is made of: warpgroups that compute and one that loads, or none (`alone`), rings of tiles in memory
between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import visits
from pallas_kernels.contracts import ForwardConfig


def slot(n: Any, of: int) -> Any:
    """Where tile n lies in a ring of so many."""
    return lax.rem(n, np.int32(of))


def pass_by(rings: Sequence[tuple[Any, Any, int]], start: Any, stop: Any) -> None:
    """A computing warpgroup lets the tiles [start, stop) of rings (ready, free, stages) go, of which it sees nothing: every tile is
    waited for and given back, in every ring that has one for each step, that phases may be counted."""

    def let_go(n: Any, _: Any) -> None:
        for ready, free, of in rings:
            plgpu.barrier_wait(ready.at[slot(n, of)])
            plgpu.barrier_arrive(free.at[slot(n, of)])

    lax.fori_loop(start, stop, let_go, None)


def drain(config: ForwardConfig, rings: Sequence[tuple[Any, int]], done: Any, more: int = 0) -> None:
    """The loading warpgroup's last act, after `done` (int32) tiles: every completed phase of the barriers (free, stages) must be
    waited for before the program ends. more: tiles that came behind those, and which nobody gives back. One that computes as well
    has nothing to wait for."""
    if config.alone:
        return
    for free, of in rings:
        wait = lambda n, _, free=free, of=of: plgpu.barrier_wait(free.at[slot(n, of)])  # noqa: E731
        lax.fori_loop(visits.greatest(done + more - of, 0 * done), done, wait, None)


def check_room(config: ForwardConfig, tiles: int, *stages: int) -> None:
    """Without a loading warpgroup nobody waits for room: rings of so many stages must hold all of a program's tiles."""
    if config.alone and tiles > min(stages):
        raise ValueError(f"Without a loading warpgroup the rings hold all {tiles} tiles, got {config}.")


def in_roles(config: ForwardConfig, wg: Any, compute: Callable[[], None], load: Callable[[], None], interpret: Any) -> None:
    """The first warpgroups compute, the last one loads, each with the registers of its role. Where there is none (`alone`), the
    first one loads, then computes."""
    if config.alone:
        pl.when(wg == 0)(load)
        compute()
        return

    @pl.when(wg < config.warpgroups)
    def _compute() -> None:
        if interpret is None:
            plgpu.set_max_registers(config.registers[0], action="increase")
        compute()

    @pl.when(wg == config.warpgroups)
    def _load() -> None:
        if interpret is None:
            plgpu.set_max_registers(config.registers[1], action="decrease")
        load()


def launch(
    kernel: Callable[..., None], config: ForwardConfig, *, programs: int, out_type: Sequence[Any], scratch_types: dict[str, Any],
    interpret: Any, scratch_bytes: int = 0,
) -> Callable[..., Any]:  # fmt: skip
    """The kernel as a function of its operands; its axes are "program" and "wg", those of `config` and the one that loads, if
    one does.

    scratch_bytes: of shared memory, where maxima and sums cross warps, which all warpgroups of a program have in common. None need
    it whose rows of a tile are a product's: those lie within four threads.
    """
    return plgpu.kernel(
        kernel,
        out_type=list(out_type),
        grid=(programs,),
        grid_names=("program",),
        num_threads=config.warpgroups + (not config.alone),
        thread_name="wg",
        scratch_types=scratch_types,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup, reduction_scratch_bytes=scratch_bytes,
            unsafe_no_auto_barriers=True,
        ),
        **({} if interpret is None else {"interpret": interpret}),
    )  # fmt: skip
