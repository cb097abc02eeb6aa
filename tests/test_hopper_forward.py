"""The Hopper forward kernel in Mosaic's interpreter, with race detection: masks, layouts, lengths around its tiles; and lowered.

What the interpreter does not model (asynchronous wgmma, layouts, registers) only a GPU shows. Sizes are tiny: a program a test.
"""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import assert_same_bits, dropped, make, poisoned
from oracle import band, check, lengths, same_segment

from jax_sdpa import compat, dropout
from jax_sdpa.attention.bias import KeyLengths, QueryLengths, SegmentIds, causal, sliding_window
from pallas_kernels.contracts import ForwardConfig, ForwardShape

pytestmark = pytest.mark.skipif(compat.JAX_VERSION < (0, 11, 2), reason="Mosaic's interpreter and the kernels need jax 0.11.2")

NARROW = ForwardConfig(block_k=64)
PINNED = ForwardConfig(row_tiles=3, queries=2, pinned=True)
SEVERAL = ForwardConfig(row_tiles=2, queries=2)
MORE = ForwardConfig(row_tiles=3)
THREE = ForwardConfig(warpgroups=3, registers=(160, 32))
NO_LOADER = ForwardConfig(alone=True, warpgroups=1, stages=1, bias_stages=1)
NO_LOADER_TWO = ForwardConfig(alone=True, block_k=64, stages=3, bias_stages=3)


def kernel(problem, dtype, layout, mask, config, key, p, interpret=True, keep=None):
    """(the compiled-to-be function, its arguments) of a Problem whose arrays are (B, H, length, dim); keep: a dense mask."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.hopper_forward import forward

    (B, Hq, L, E), (_, H, S, Ev) = problem.query.shape, problem.value.shape
    scale = E**-0.5 if problem.scale is None else float(problem.scale)
    shape = ForwardShape(B, Hq, H, L, S, E, Ev, dtype, layout, scale, problem.softcap, p, problem.sinks is not None)
    mask = None if mask is None else mask.with_batch((B,))
    keep = None if keep is None else jnp.asarray(keep)
    bias = None if problem.bias is None else jnp.asarray(problem.bias)
    run = forward(
        shape, config, mask, bias=bias, keep=keep, generator=dropout if p else None,
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )  # fmt: skip
    operands = [jnp.asarray(x, dtype) for x in (problem.query, problem.key, problem.value)]
    operands = [jnp.swapaxes(x, 1, 2) for x in operands] if layout == "BLHE" else operands
    sinks = None if problem.sinks is None else jnp.asarray(problem.sinks, jnp.float32)[None]
    more = {
        "mask_arrays": jax.tree.leaves(mask),
        "bias": bias,
        "keep": keep,
        "sinks": sinks,
        "seeds": dropout.seeds(key, B, Hq) if p else None,
    }
    return (lambda q, k, v, more: run(q, k, v, **more)), (*operands, more)


def on_kernel(
    problem, *, dtype=jnp.bfloat16, layout="BHLE", mask=None, config=None, key=None, p=0.0, keep=None, poison=None, interpret=True,
    times=1,
):  # fmt: skip
    """{'out', 'lse'}; with `times`, the same call so often, and the same bits each time. poison: see `harness.poisoned`."""
    run, args = kernel(poisoned(problem, poison), dtype, layout, mask, config or ForwardConfig(), key, p, interpret, keep)
    out, lse = assert_same_bits(run, args, times - 1)
    return {"out": np.asarray(jnp.swapaxes(out, 1, 2) if layout == "BLHE" else out), "lse": np.asarray(lse)}


PACKED = np.stack([np.repeat([0, 1, 2, -1], [70, 58, 60, 12]), np.repeat([0, 1], [3, 197])])  # ids of two packed rows


rng = np.random.default_rng(5)


def dense(*shape):
    """A dense mask with empty rows, empty tiles and full ones where it is as large as the scores."""
    keep = rng.random(shape) < 0.6
    if shape[2] > 128 and shape[3] > 128:
        keep[..., :64, :128], keep[..., 128:, 128:256], keep[..., 70, :], keep[..., 128:, -40:] = True, False, False, True
    return keep


def biased(*shape, dtype=np.float32):
    bias = rng.standard_normal(shape).astype(np.float32)
    bias[rng.random(shape) < 0.2] = -np.inf
    if shape[2] > 1:
        bias[:, :, 3] = np.finfo(np.float32).min if shape[3] == 1 else -np.inf
    return np.asarray(jnp.asarray(bias, dtype))


def masked_by(L, S, keep, B=2, also=None, E=64, **options):
    picture = keep if also is None else keep & also
    return make(L, S, B=B, Hq=2, E=E, keep=np.broadcast_to(picture, np.broadcast_shapes(picture.shape, (1, 1, L, S))), **options)


def sinks(*values):
    return np.array(values, np.float64)


CASES = {
    "one tile": lambda: (make(128, 128, B=1, Hq=1, E=64), {}),
    "8 x 8": lambda: (make(8, 8, B=1, Hq=1, E=64), {}),
    "8 x 264, scale 0": lambda: (make(8, 264, B=1, Hq=1, E=64, scale=0.0), {}),
    "block - 8 and + 8, (B, L, H, E), grouped": lambda: (make(120, 136, B=2, Hq=4, Hk=2, E=64), {"layout": "BLHE"}),
    "causal": lambda: (make(264, 264, B=1, Hq=1, E=64, keep=band(264, 264, -1, 0)), {"mask": causal()}),
    "causal, first rows empty": lambda: (
        make(200, 136, B=1, Hq=1, E=64, keep=band(200, 136, -1, 0, -72)), {"mask": causal(-72)}
    ),
    "window over narrow tiles": lambda: (
        make(136, 264, B=1, Hq=1, E=64, keep=band(136, 264, 70, 0, 100)), {"mask": sliding_window(70, 0, 100), "config": NARROW}
    ),
    "window, three warpgroups": lambda: (
        make(200, 264, B=1, Hq=1, E=64, keep=band(200, 264, 70, 3, 50)), {"mask": sliding_window(70, 3, 50), "config": THREE}
    ),
    "key lengths, one of them 0": lambda: (
        make(72, 200, B=2, Hq=2, Hk=1, E=64, keep=lengths(72, 200, [150, 0])), {"mask": KeyLengths(jnp.array([150, 0])), "layout": "BLHE"}
    ),
    "lengths with starts, and traced offsets": lambda: (
        make(72, 200, B=2, Hq=1, E=64, keep=lengths(72, 200, [190, 33], [40, 0]) & band(72, 200, -1, 0, np.array([128, -20]))),
        {"mask": KeyLengths(jnp.array([190, 33]), jnp.array([40, 0])) & causal(jnp.array([128, -20]))},
    ),
    "segments, packed, causal": lambda: (
        make(200, 200, B=2, Hq=2, Hk=1, E=64, keep=same_segment(PACKED, PACKED) & band(200, 200, -1, 0)),
        {"mask": SegmentIds(jnp.asarray(PACKED)) & causal(), "layout": "BLHE"},
    ),
    "segments, L != S, shared by the batch": lambda: (
        make(72, 264, B=2, Hq=1, E=64, keep=same_segment(np.arange(72) // 30, np.arange(264) // 100)),
        {"mask": SegmentIds(jnp.arange(72) // 30, jnp.arange(264) // 100)},
    ),
    "query lengths": lambda: (
        make(136, 136, B=1, Hq=1, E=64, keep=(np.arange(136) < 70)[:, None]), {"mask": QueryLengths(jnp.array([70]))}
    ),
    "E 128, Ev 64, negative scale": lambda: (make(64, 136, B=1, Hq=1, E=128, Ev=64, scale=-0.3), {}),
    "E 64, Ev 128, softcap, float16": lambda: (make(64, 136, B=1, Hq=1, E=64, Ev=128, softcap=2.0), {"dtype": jnp.float16}),
    "E 256": lambda: (make(64, 136, B=1, Hq=1, E=256), {"config": NARROW}),
    "E 256, several row tiles": lambda: (
        make(136, 136, B=1, Hq=2, E=256, keep=band(136, 136, -1, 0)), {"mask": causal(), "config": ForwardConfig(block_k=64, row_tiles=2)}
    ),
    "E 96, queries in registers": lambda: (make(64, 264, B=1, Hq=1, E=96), {"config": ForwardConfig(q_registers=True)}),
    "three warpgroups, one without rows": lambda: (
        make(456, 264, B=1, Hq=1, E=64, keep=band(456, 264, -1, 0, -40)),
        {"mask": causal(-40), "config": ForwardConfig(warpgroups=3, registers=(160, 32), row_tiles=3, queries=2, stages=4)},
    ),
    "values that nobody sees are no numbers": lambda: (
        make(72, 264, B=2, Hq=2, Hk=1, E=64, keep=lengths(72, 264, [150, 33], [40, 0])),
        {"mask": KeyLengths(jnp.array([150, 33]), jnp.array([40, 0])), "poison": [(40, 150), (0, 33)], "config": SEVERAL},
    ),
    "E 96": lambda: (make(64, 136, B=1, Hq=1, E=96), {}),
    "sinks, one of -inf, empty rows": lambda: (
        make(64, 136, B=2, Hq=2, E=64, sinks=sinks(1.0, -np.inf), keep=lengths(64, 136, [0, 30])), {"mask": KeyLengths(jnp.array([0, 30]))}
    ),
    "several row tiles a program": lambda: (make(264, 136, B=2, Hq=2, Hk=1, E=64), {"config": SEVERAL}),
    "several row tiles, causal": lambda: (
        make(264, 264, B=1, Hq=2, E=64, keep=band(264, 264, -1, 0)), {"mask": causal(), "config": MORE}
    ),
    "several row tiles, lengths, E 128, Ev 64": lambda: (
        make(200, 264, B=2, Hq=1, E=128, Ev=64, keep=lengths(200, 264, [70, 0])), {"mask": KeyLengths(jnp.array([70, 0])), "config": SEVERAL}
    ),
    "several row tiles, a window, pinned": lambda: (
        make(392, 264, B=1, Hq=2, E=64, keep=band(392, 264, 70, 3, 50)), {"mask": sliding_window(70, 3, 50), "config": PINNED}
    ),
    "dense mask": lambda: (masked_by(200, 392, keep := dense(2, 1, 200, 392)), {"keep": keep}),
    "dense mask of each head, causal, several row tiles": lambda: (
        masked_by(264, 264, keep := dense(1, 2, 264, 264), B=1, also=band(264, 264, -1, 0)),
        {"keep": keep, "mask": causal(), "config": MORE},
    ),
    "dense mask of keys": lambda: (masked_by(72, 200, keep := dense(2, 1, 1, 200)), {"keep": keep}),
    "dense mask of queries, narrow": lambda: (masked_by(72, 200, keep := dense(1, 2, 72, 1)), {"keep": keep, "config": NARROW}),
    "dense mask of keys, padding before and behind": lambda: (
        masked_by(72, 264, keep := lengths(72, 264, [150, 264], [0, 70])[:, :, :1]), {"keep": keep}
    ),
    "dense mask of keys, padding behind": lambda: (
        masked_by(72, 264, keep := lengths(72, 264, [150, 256])[:, :, :1]), {"keep": keep}
    ),
    "dense mask of keys, padding behind and not, wide heads": lambda: (
        masked_by(72, 136, keep := lengths(72, 136, [70, 136])[:, :, :1], E=192), {"keep": keep, "config": ForwardConfig(block_k=64, masks_all=True)}
    ),
    "dense mask of keys, wide heads": lambda: (masked_by(72, 136, keep := dense(2, 1, 1, 136), E=192), {"keep": keep, "config": ForwardConfig(block_k=64, masks_all=True)}),
    "dense mask of keys, padding behind, and a window of whole tiles": lambda: (
        masked_by(136, 256, keep := lengths(136, 256, [150, 256])[:, :, :1], also=band(136, 256, -1, 0, 120)),
        {"keep": keep, "mask": causal(120)},
    ),
    "dense mask that is causal, several row tiles, pinned": lambda: (
        masked_by(264, 264, keep := band(264, 264, -1, 0)[None, None], B=1),
        {"keep": keep, "config": ForwardConfig(row_tiles=2, queries=2, pinned_once=True)},
    ),
    "dense mask, every tile masked": lambda: (
        masked_by(136, 200, keep := dense(1, 2, 136, 200)), {"keep": keep, "config": ForwardConfig(block_k=64, masks_all=True)}
    ),
    "dense mask, all False": lambda: (masked_by(72, 136, keep := np.zeros((1, 1, 72, 136), bool)), {"keep": keep}),
    "bias, bfloat16": lambda: (make(200, 272, B=2, Hq=2, E=64, bias=biased(2, 2, 200, 272, dtype=jnp.bfloat16)), {}),
    "bias, float32, shared by the heads, causal": lambda: (
        make(136, 136, B=2, Hq=2, E=64, bias=biased(2, 1, 136, 136), keep=band(136, 136, -1, 0)), {"mask": causal(), "config": NARROW}
    ),
    "bias, several row tiles, causal": lambda: (
        make(264, 136, B=2, Hq=2, E=64, bias=biased(2, 2, 264, 144)[..., :136], keep=band(264, 136, -1, 0)), {"mask": causal(), "config": SEVERAL}
    ),
    "bias, float16, scale 1": lambda: (
        make(72, 264, B=2, Hq=2, E=64, scale=1.0, bias=biased(2, 2, 72, 264)), {"dtype": jnp.float16}
    ),
    "bias, float16, several row tiles": lambda: (
        make(200, 272, B=1, Hq=2, E=64, bias=biased(1, 2, 200, 272, dtype=jnp.float16)), {"dtype": jnp.float16, "config": SEVERAL}
    ),
    "bias, E 96, sums in chains": lambda: (
        make(72, 264, B=1, Hq=2, E=96, bias=biased(1, 2, 72, 264)), {"config": ForwardConfig(chains=2, bias_stages=1)}
    ),
    "bias, queries in registers, sinks": lambda: (
        make(200, 272, B=1, Hq=1, E=128, scale=0.125, sinks=sinks(0.5), bias=biased(1, 1, 200, 272, dtype=jnp.bfloat16)),
        {"config": ForwardConfig(q_registers=True)},
    ),
    "bias of keys": lambda: (make(72, 200, B=2, Hq=2, E=64, bias=biased(1, 2, 1, 200)), {}),
    "bias of keys, bfloat16, lengths, several row tiles, pinned": lambda: (
        make(392, 264, B=2, Hq=1, E=64, bias=biased(2, 1, 1, 264, dtype=jnp.bfloat16), keep=lengths(392, 264, [70, 0])),
        {"mask": KeyLengths(jnp.array([70, 0])), "config": PINNED},
    ),
    "bias of keys, a causal offset that leaves first tiles to one warpgroup": lambda: (
        make(200, 392, B=1, Hq=1, E=64, bias=biased(1, 1, 1, 392), keep=band(200, 392, -1, 0, 130)),
        {"mask": causal(130), "config": ForwardConfig(block_k=64, bias_stages=1)},
    ),
    "bias of keys, nobody loads": lambda: (
        make(136, 128, B=2, Hq=2, Hk=1, E=64, bias=biased(2, 2, 1, 128)), {"config": NO_LOADER, "layout": "BLHE"}
    ),
    "bias of queries": lambda: (make(72, 200, B=2, Hq=2, E=64, bias=biased(1, 2, 72, 1)), {}),
    "bias, one number, and a dense mask": lambda: (
        masked_by(72, 200, keep := dense(2, 1, 72, 200), bias=np.float32([[[[-3e38]]]])), {"keep": keep}
    ),
    "causal, the mask in the loop": lambda: (
        make(264, 264, B=1, Hq=1, E=64, keep=band(264, 264, -1, 0)), {"mask": causal(), "config": ForwardConfig(spread=True)}
    ),
    "causal, queries in registers, pinned": lambda: (
        make(264, 264, B=1, Hq=1, E=64, keep=band(264, 264, -1, 0)), {"mask": causal(), "config": ForwardConfig(q_registers=True, pinned=True)}
    ),
    "sums in one chain, sinks, one of -inf, empty rows": lambda: (
        make(64, 264, B=2, Hq=2, E=64, sinks=sinks(1.0, -np.inf), keep=lengths(64, 264, [0, 130])),
        {"mask": KeyLengths(jnp.array([0, 130])), "config": ForwardConfig(chains=1)},
    ),
    "sums in two chains, 192 keys a tile, a dense mask": lambda: (
        masked_by(72, 392, keep := dense(1, 1, 72, 392), B=1), {"keep": keep, "config": ForwardConfig(chains=2, block_k=192)}
    ),
    "sums in four chains, several row tiles, causal, pinned": lambda: (
        make(264, 264, B=1, Hq=1, E=64, keep=band(264, 264, -1, 0)),
        {"mask": causal(), "config": ForwardConfig(chains=4, row_tiles=3, queries=2, pinned=True)},
    ),
    "sums in eight chains, 64 keys a tile, dropout": lambda: (
        make(64, 200, B=1, Hq=1, E=64, survivors=dropped(jax.random.key(1), 1, 1, 64, 200, 0.3)),
        {"key": jax.random.key(1), "p": 0.3, "config": ForwardConfig(chains=8, block_k=64)},
    ),
    "dropout, causal, three warpgroups": lambda: (
        make(264, 264, B=1, Hq=1, E=64, keep=band(264, 264, -1, 0), survivors=dropped(jax.random.key(1), 1, 1, 264, 264, 0.3)),
        {"mask": causal(), "key": jax.random.key(1), "p": 0.3, "config": THREE},
    ),
    "heads side by side, one left over, causal": lambda: (
        make(264, 264, B=1, Hq=3, E=64, keep=band(264, 264, -1, 0)), {"mask": causal(), "config": ForwardConfig(together=2)}
    ),
    "heads side by side, several row tiles": lambda: (
        make(264, 72, B=1, Hq=3, E=64), {"config": ForwardConfig(row_tiles=2, queries=2, together=3)}
    ),
    "a bias that the batch shares, batch entries side by side": lambda: (
        make(136, 136, B=3, Hq=2, E=64, bias=biased(1, 2, 136, 136)), {"config": ForwardConfig(together=2, across=True)}
    ),
    "nobody loads": lambda: (make(136, 128, B=2, Hq=2, Hk=1, E=64), {"config": NO_LOADER, "layout": "BLHE"}),
    "nobody loads, causal, several tiles": lambda: (
        make(200, 184, B=1, Hq=2, E=64, keep=band(200, 184, -1, 0, -20)), {"mask": causal(-20), "config": NO_LOADER_TWO}
    ),
    "nobody loads, values that nobody sees are no numbers": lambda: (
        make(72, 136, B=2, Hq=2, Hk=1, E=64, keep=lengths(72, 136, [130, 33], [40, 0])),
        {"mask": KeyLengths(jnp.array([130, 33]), jnp.array([40, 0])), "poison": [(40, 130), (0, 33)], "config": NO_LOADER_TWO},
    ),
    "nobody loads, E 128, Ev 64, sinks, softcap": lambda: (
        make(72, 56, B=1, Hq=2, E=128, Ev=64, softcap=2.0, sinks=sinks(1.0, -np.inf)), {"config": NO_LOADER}
    ),
    "nobody loads, bias and dense mask": lambda: (
        masked_by(136, 184, keep := dense(2, 1, 136, 184), bias=biased(2, 2, 136, 184)), {"keep": keep, "config": NO_LOADER_TWO}
    ),
    "nobody loads, dropout, segments": lambda: (
        make(64, 120, B=1, Hq=1, E=64, keep=same_segment(np.arange(64) // 30, np.arange(120) // 50), survivors=dropped(jax.random.key(1), 1, 1, 64, 120, 0.3)),
        {"mask": SegmentIds(jnp.arange(64)[None] // 30, jnp.arange(120)[None] // 50), "key": jax.random.key(1), "p": 0.3, "config": NO_LOADER},
    ),
    "dropout, causal": lambda: (
        make(64, 136, B=2, Hq=2, Hk=1, E=64, keep=band(64, 136, -1, 0, 72), survivors=dropped(jax.random.key(1), 2, 2, 64, 136, 0.3)),
        {"mask": causal(72), "key": jax.random.key(1), "p": 0.3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_interpreted_kernel_gives_the_oracles_numbers(name):
    problem, options = CASES[name]()
    problem = problem.rounded(options.get("dtype", jnp.bfloat16))
    check(problem, on_kernel(problem, **options))


LONG = {
    "long, full": lambda: (make(512, 1024, B=1, Hq=2, Hk=1, E=128), {}),
    "long, causal": lambda: (make(1024, 1024, B=1, Hq=2, E=128, keep=band(1024, 1024, -1, 0)), {"mask": causal()}),
    "long, window, odd tiles": lambda: (
        make(520, 776, B=1, Hq=2, E=64, keep=band(520, 776, 300, 5, 256)), {"mask": sliding_window(300, 5, 256), "config": THREE}
    ),
    "192 and 128": lambda: (make(520, 776, B=1, Hq=2, E=192, Ev=128), {"config": NARROW}),
}  # fmt: skip
ON_A_GPU = CASES | LONG


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_A_GPU)
def test_the_compiled_kernel_gives_the_oracles_numbers_and_the_same_bits(name):
    problem, options = ON_A_GPU[name]()
    problem = problem.rounded(options.get("dtype", jnp.bfloat16))
    check(problem, on_kernel(problem, **options, interpret=False, times=20))


ALONE = Path(__file__).parent / "alone.py"


def alone(*names):
    """What `alone.py` prints in a process of its own."""
    found = subprocess.run([sys.executable, ALONE, *names], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    return found.stdout


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["several row tiles, causal", "dropout, causal", "bias, several row tiles, causal", "nobody loads"]
)
def test_the_same_bits_a_thousand_times(name):
    problem, options = CASES[name]()
    problem = problem.rounded(jnp.bfloat16)
    run, args = kernel(
        problem, jnp.bfloat16, "BHLE", options.get("mask"), options.get("config", ForwardConfig()), options.get("key"), options.get("p", 0.0),
        interpret=False,
    )  # fmt: skip
    assert_same_bits(run, args, 1000)


@pytest.mark.gpu
def test_the_same_bits_in_another_process():
    names = ("causal", "segments, packed, causal", "dropout, causal")
    assert alone(*names) == alone(*names)


def test_x64_changes_nothing():
    """The interpreter's threads read the global setting, not the context's."""
    problem = make(72, 136, B=1, Hq=1, E=64, keep=band(72, 136, -1, 0, 64)).rounded(jnp.bfloat16)
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        check(problem, on_kernel(problem, mask=causal(64)))
        run, args = kernel(problem, jnp.bfloat16, "BHLE", causal(64), ForwardConfig(), None, 0.0, interpret=False)
        jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",))
    finally:
        jax.config.update("jax_enable_x64", before)


def test_masked_keys_may_hold_nan_and_values_behind_the_end_do_not_exist():
    """A masked score is never looked at; rows past S of the last tile are zeros that TMA fills in."""
    problem = make(72, 200, B=1, Hq=1, E=64, keep=lengths(72, 200, [150])).rounded(jnp.bfloat16)
    keys = problem.key.copy()
    keys[:, :, 150:] = np.nan
    check(problem, on_kernel(problem.but(key=keys), mask=KeyLengths(jnp.array([150]))))


@pytest.mark.parametrize(
    "name",
    [
        "causal",
        "lengths with starts, and traced offsets",
        "dropout, causal",
        "E 128, Ev 64, negative scale",
        "sums in one chain, sinks, one of -inf, empty rows",
        "sums in four chains, several row tiles, causal, pinned",
    ],
)
def test_the_kernel_lowers_for_cuda(name):
    """Layouts, TMA's alignment and shared memory are checked by the lowering; no GPU is needed for it."""
    problem, options = CASES[name]()
    run, args = kernel(
        problem, jnp.bfloat16, options.get("layout", "BHLE"), options.get("mask"), options.get("config", ForwardConfig()),
        options.get("key"), options.get("p", 0.0), interpret=False,
    )  # fmt: skip
    text = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_q": 128}, "block_q must be 64"),
        ({"block_k": 96}, "block_k must be 64, 128"),
        ({"stages": 1}, "stages must be at least 2"),
        ({"stages": 0, "alone": True}, "stages must be at least 1"),
        ({"row_tiles": 2, "alone": True}, "has one row tile"),
        ({"chains": 3}, "chains must be 0, 1, 2, 4 or 8"),
        ({"warpgroups": 4}, "warpgroups must be 1, 2 or 3"),
        ({"warpgroups": 3}, "registers must be at most 512"),
        ({"registers": (216, 80)}, "registers must be at most 504"),
    ],
)
def test_a_configuration_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ForwardConfig(**options)


def test_without_a_loader_all_tiles_are_in_memory():
    problem = make(64, 136, B=1, Hq=1, E=64)
    with pytest.raises(ValueError, match="the rings hold all 2 tiles"):
        kernel(problem, jnp.bfloat16, "BHLE", None, NO_LOADER, None, 0.0)
