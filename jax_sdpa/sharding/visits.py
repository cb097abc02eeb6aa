"""What a piece of the queries sees of a piece of the keys: nothing, everything, or what a mask keeps. Asked of the mask.

Where the mask is static, all devices' answers are known while tracing: each distinct one is a program of its own, with a static
mask (or none), and a device picks its own by a table. Where it holds arrays, what is EMPTY is found out as the program runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_sdpa.masks import Mask
from jax_sdpa.request import SdpaRequest
from jax_sdpa.sharding.zigzag import Order

Case = tuple[Mask, ...]  # the masks of a visit
MOST = 3  # different static masks of one pair of pieces; beyond, one program whose mask is moved by a traced distance


@dataclasses.dataclass(frozen=True)
class Pair:
    """The n_q-th piece of a device's queries against the n_k-th of the keys that it holds at the moment."""

    order: Order
    n_q: int
    n_k: int

    def starts(self, device: Any, step: Any, query_len: int, key_len: int) -> tuple[Any, Any]:
        """Where the two pieces begin, in the whole sequence: device's queries, and the keys of the device `step` before it."""
        owner = (device - step) % self.order.devices
        return self.order.piece(device, self.n_q) * query_len, self.order.piece(owner, self.n_k) * key_len

    def stored(self, device: Any, step: Any, key_len: int) -> Any:
        """Where the keys' piece begins as keys are stored, device after device."""
        return ((device - step) % self.order.devices * self.order.pieces + self.n_k) * key_len


def is_static(request: SdpaRequest) -> bool:
    return not jax.tree.leaves(request.masks)


def case_of(masks: tuple[Mask, ...], q0: int, k0: int, query_len: int, key_len: int) -> Case | None:
    """None: no query of the piece sees any of its keys; (): every one sees all of them."""
    left = []
    for mask in masks:
        seen = mask.seen_from(q0, k0)
        lo, hi = seen.kv_range(0, query_len, query_len, key_len)
        if hi <= lo:
            return None
        if seen.full_range(0, query_len, query_len, key_len) != (0, key_len):
            left.append(seen)
    return tuple(left)


def visit(
    request: SdpaRequest, pair: Pair, steps: Sequence[int], device: Any, step: Any, run: Callable[[Any, Case], Any], state: Any
) -> Any:
    """`run(state, masks)` with the masks of this visit, or the state itself where it is EMPTY.

    request: whose lengths are those of the two pieces, and whose masks have the pieces' ids. steps: those that `step`, a number or
    traced, may be. Nothing in `run` may speak to other devices: each takes its own branch.
    """
    L, S = request.query_len, request.key_len
    q0, k0 = pair.starts(device, step, L, S)
    if not is_static(request):
        masks = tuple(mask.seen_from(q0, k0) for mask in request.masks)
        some: Any = True
        for mask in masks:
            lo, hi = mask.kv_range(0, L, L, S)
            some = some & jnp.any(hi > lo)
        return lax.cond(some, lambda state: run(state, masks), lambda state: state, state)

    devices = range(pair.order.devices)
    found = [[case_of(request.masks, *pair.starts(i, r, L, S), L, S) for r in steps] for i in devices]
    cases = list(dict.fromkeys(case for row in found for case in row))
    partial = [case for case in cases if case]
    moved: Any = None
    if len(partial) > MOST:
        moved = tuple(mask.seen_from(q0, k0) for mask in request.masks)
        cases = [*(case for case in cases if not case), moved]
    numbers = [[cases.index(moved if moved is not None and case else case) for case in row] for row in found]

    def branch(case: Case | None) -> Callable[[Any], Any]:
        return (lambda state: state) if case is None else lambda state: run(state, case)

    if len(cases) == 1:
        return branch(cases[0])(state)
    number = jnp.asarray(np.asarray(numbers, np.int32))[device, step - steps[0]]
    return lax.switch(number, [branch(case) for case in cases], state)
