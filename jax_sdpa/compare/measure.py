"""Errors against the exact answer, the rule of when they hold, and times.

The rule, once: a tensor holds if it is finite, if rows that are 0 in the exact output are exactly 0, and if its largest error
and its root mean square error are both at most

    max(2 * torch's own error, n units in the last place of the dtype at the size of the exact tensor),

n = 1 for a half-precision output, 2 for its gradients, 4 and 8 for float32 and float64; the size is the largest magnitude for
the largest error, half the root mean square for the root mean square error. Twice an honest implementation's error in the same
precision is the rule of FlashAttention's tests (tests/test_flash_attn.py, "at most twice"); the floor is for the cases in which
torch's error is one single rounding, or by luck less, as in torch's own `_check_equal` (test_transformers.py: 1e-5). The largest
error finds one wrong row, the root mean square a small error everywhere.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

TIMES_TORCH = 2.0
OUTPUT_ULPS = {"float16": 1, "bfloat16": 1, "float32": 4, "float64": 4}
GRADIENT_ULPS = {dtype: 2 * ulps for dtype, ulps in OUTPUT_ULPS.items()}

RULE = (
    "A tensor holds if it is finite, if rows that are 0 in the exact output are exactly 0, and if its largest error and its root "
    "mean square error against torch in float64 are each at most the larger of twice torch's own error in the same dtype and n "
    "units in the last place (n = 1 for half-precision outputs, 2 for their gradients; 4 and 8 in float32 and float64)."
)

TIME_BUDGET = 2.0
"""Seconds after which a measurement takes no further sample; large calls are timed by fewer of them, at least one."""


@dataclasses.dataclass(frozen=True)
class Error:
    """The distance of a tensor from the exact one: its largest and its root mean square; `finite`, has it no NaN and no inf?"""

    max: float
    rms: float
    finite: bool


@dataclasses.dataclass(frozen=True)
class Judged:
    """An error, the limits that the rule sets it, and why it does not hold (empty: it does)."""

    error: Error
    limit_max: float
    limit_rms: float
    faults: tuple[str, ...]


def error_of(found: np.ndarray, exact: np.ndarray) -> Error:
    """How far `found` is from `exact`, both float64; non-finite entries of both in the same places are no distance."""
    if found.shape != exact.shape:
        raise ValueError(f"a tensor of shape {found.shape} was given, the exact one has {exact.shape}.")
    finite = bool(np.isfinite(found).all())
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.where((found == exact) | (np.isnan(found) & np.isnan(exact)), 0.0, np.abs(found - exact))
    if not distance.size:
        return Error(0.0, 0.0, finite)
    return Error(float(distance.max()), float(np.sqrt(np.mean(distance**2))), finite)


def judge(name: str, found: np.ndarray, exact: np.ndarray, torch_error: Error, dtype: str) -> Judged:
    """The rule of this module's docstring for the tensor `name` ('out', 'dq', …) of a case in `dtype`."""
    error = error_of(found, exact)
    ulps = OUTPUT_ULPS if name == "out" else GRADIENT_ULPS
    floor = ulps[dtype] * float(jnp.finfo(dtype).eps)
    finite = exact[np.isfinite(exact)]
    largest = float(np.abs(finite).max(initial=0.0))
    rms = float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0
    honest = torch_error if torch_error.finite else Error(0.0, 0.0, True)  # a NaN of torch's excuses none of ours
    limit_max = max(TIMES_TORCH * honest.max, floor * largest)
    limit_rms = max(TIMES_TORCH * honest.rms, floor * rms / 2)

    faults = []
    if not error.finite:
        faults.append(f"{name} has NaN or inf")
    elif not error.max <= limit_max:
        faults.append(f"{name} is off by {error.max:.1e}, {limit_max:.1e} is allowed")
    elif not error.rms <= limit_rms:
        faults.append(f"{name} is off by {error.rms:.1e} (rms), {limit_rms:.1e} is allowed")
    if name == "out" and exact.ndim and np.any(found[np.all(exact == 0, axis=-1)]):
        faults.append("out is not 0 in a row that attends to nothing")
    return Judged(error, limit_max, limit_rms, tuple(faults))


def median_ms(call: Callable[[], Any], repeats: int) -> float:
    """The median time of a call in milliseconds, after one call to warm up; `call` returns when its result is there."""
    call()
    samples: list[float] = []
    while len(samples) < repeats and sum(samples) < TIME_BUDGET:
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return 1e3 * statistics.median(samples)
