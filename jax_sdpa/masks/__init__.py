"""Which keys a query may attend to: small frozen values that combine with `&`, and nothing about any backend.

A structured mask is integer arithmetic on positions, never an L x S array. Every backend asks it the same four questions:

* `keep(q_idx, k_idx)`: may query q attend to key k? (True = takes part). Plain operators: NumPy, XLA and kernels alike.
* `kv_range(q_lo, q_hi, L, S)`: `[lo, hi)`, outside of which no query of `[q_lo, q_hi)` keeps any key: blocks out there are EMPTY.
* `full_range(q_lo, q_hi, L, S)`: `[lo, hi)`, inside of which every query of the block keeps every key: blocks in there are FULL.
* `key_valid(L, S)`: the keys that some query may see; the others never reach the result, whatever they hold, NaN included.

Ranges are Python ints where the mask is static (its blocks are then skipped while tracing) and arrays with the mask's batch
dims where it holds arrays (a loop bound). A new kind of mask is one class here.
"""

from __future__ import annotations

from jax_sdpa.masks.base import And, Dense, Index, Mask, as_mask
from jax_sdpa.masks.packed import KeyRanges, Packed
from jax_sdpa.masks.positions import Band, KeyLengths, QueryLengths, causal, sliding_window
from jax_sdpa.masks.segments import SegmentIds

__all__ = [
    "EVERYTHING",
    "And",
    "Band",
    "Dense",
    "Index",
    "KeyLengths",
    "KeyRanges",
    "Mask",
    "Packed",
    "QueryLengths",
    "SegmentIds",
    "as_mask",
    "causal",
    "conjunction",
    "sliding_window",
]

EVERYTHING = Band()  # keeps every key


def conjunction(masks: tuple[Mask, ...]) -> Mask:
    """One mask for a request's parts: none, one or several."""
    return EVERYTHING if not masks else masks[0] if len(masks) == 1 else And(masks)
