"""The Hopper decode kernels in Mosaic's interpreter, with race detection: shares, pieces, merging, pages, 8 bits; and on a GPU.

Programs are few here, so that items are cut in every way; sizes are tiny.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import assert_same_bits, make, poisoned, quantised
from oracle import band, check, lengths

import jax_sdpa
from jax_sdpa import compat
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.attention.bias import KeyLengths, causal, sliding_window
from jax_sdpa.device import assume_device
from pallas_kernels import flash_decode, visits
from pallas_kernels.decode_tuning import decode_config, eight_bit_bytes, eight_bit_config, shared_bytes
from pallas_kernels.shares import Shares
from pallas_kernels.tuning import SHARED_MEMORY

needs_mosaic = pytest.mark.skipif(compat.JAX_VERSION < (0, 11, 2), reason="Mosaic's interpreter and the kernels need jax 0.11.2")

rng = np.random.default_rng(7)


# --- shares


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("steps", "heads", "programs"), [((4, 1, 4), 1, 3), ((1,), 2, 7), ((3, 9, 1, 1), 2, 5), (6, 3, 4), ((1, 1, 50), 1, 8), ((2,) * 8, 3, 9), ((7, 1), 2, 40)])  # fmt: skip
def test_shares_cover_every_tile_once_and_slots_do_not_collide(steps, heads, programs, whole):
    static = isinstance(steps, int)
    batch = 2 if static else len(steps)
    shares = Shares(batch, heads, programs, steps if static else None, whole)
    tiles = np.broadcast_to(steps, (batch,))
    before = np.asarray(shares.before(jnp.asarray(tiles))) if shares.searches else None
    seen, written, taken = [np.zeros(n, int) for n in np.repeat(tiles, heads)], {}, []
    for p in range(programs):
        first, start, count, end = shares.of_program(np.int32(p), before)
        taken.append(0)
        for n in range(count):
            item = int(first) + n
            lo, hi = start if n == 0 and not whole else 0, end if n == count - 1 and not whole else len(seen[item])
            assert 0 <= lo < hi <= len(seen[item])
            seen[item][lo:hi] += 1
            taken[-1] += int(hi - lo)
            assert item + p not in written
            assert item + p < shares.slots
            written[item + p] = item
    assert all((n == 1).all() for n in seen)
    for item in range(batch * heads):
        first, count = map(int, shares.of_item(np.int32(item), before))
        assert [written.get(slot) for slot in range(first, first + count)] == [item] * count
        assert count <= shares.pieces or len(set(tiles)) > 1, "at most so many where items are alike"
        assert count == 1 or not whole
    if not whole:
        assert max(taken) == -(-sum(tiles) * heads // programs)


def test_static_shares_are_those_of_the_same_number_of_tiles_found_by_search():
    for steps, programs in itertools.product((1, 5, 8), (3, 6, 50)):
        static, traced = Shares(3, 2, programs, steps), Shares(3, 2, programs)
        before = np.asarray(traced.before(jnp.full(1, steps)))
        for p in range(programs):
            np.testing.assert_array_equal(static.of_program(np.int32(p)), traced.of_program(np.int32(p), before))
        for item in range(6):
            np.testing.assert_array_equal(static.of_item(np.int32(item)), traced.of_item(np.int32(item), before))


def test_a_part_of_a_walk():
    walk = visits.RangeWalk(2, 3, 8, 9)
    part = walk.part(1, 4)
    assert [part.tile(i) for i in range(part.steps)] == [walk.tile(i) for i in range(1, 4)]
    assert [part.partial(i) for i in range(part.steps)] == [walk.partial(i) for i in range(1, 4)]


# --- configurations


@pytest.mark.parametrize("rows", [1, 64, 65, 128])
def test_every_configuration_fits_the_shared_memory(rows):
    for E, Ev in itertools.product(range(16, 257, 16), repeat=2):
        config = decode_config(rows=rows, head_dim=E, value_head_dim=Ev)
        assert shared_bytes(config, E, Ev) <= SHARED_MEMORY, (E, Ev)
        assert Ev % config.out_columns(E, Ev) == 0
        eight_bits = eight_bit_config(rows=rows, head_dim=E, value_head_dim=Ev)
        assert (eight_bits is None) == (rows > 64)
        assert eight_bits is None or eight_bit_bytes(eight_bits.stages, rows, E, Ev) <= SHARED_MEMORY, (E, Ev)


@needs_mosaic
@pytest.mark.parametrize(
    ("E", "Ev", "group", "dtype"),
    [
        (64, 160, 2, jnp.bfloat16), (256, 256, 128, jnp.bfloat16), (16, 240, 64, jnp.bfloat16), (208, 144, 65, jnp.bfloat16),
        (64, 160, 2, jnp.int8), (256, 256, 64, jnp.int8), (40, 24, 20, jnp.float8_e4m3fn), (208, 96, 9, jnp.float8_e4m3fn),
    ],
)  # fmt: skip
def test_odd_head_dims_lower_for_cuda_which_counts_the_shared_memory(E, Ev, group, dtype):
    B, H = 3, 2
    q = jax.ShapeDtypeStruct((B, H * group, 1, E), jnp.bfloat16)
    k, v = (jax.ShapeDtypeStruct((B, H, 320, dim), dtype) for dim in (E, Ev))
    scale = jax.ShapeDtypeStruct((B, H, 320), jnp.float32)
    scales = {} if dtype == jnp.bfloat16 else {"key_scale": scale, "value_scale": scale}
    call = functools.partial(flash_decode.decode, layout="BHLE", scale=0.1)
    jax.jit(call).trace(q, k, v, **scales).lower(lowering_platforms=("cuda",))


# --- the kernels


def on_kernel(problem, *, dtype=jnp.bfloat16, layout="BHLE", mask=None, config=None, page=None, whole=False, poison=None, interpret=True, times=1, eight=None):  # fmt: skip
    """{'out', 'lse'}; with `times`, the same call so often, and the same bits each time. page: keys lie in pages in a random order.

    poison: for each batch entry the stretch of keys that somebody sees; the others, and their values, become NaN. eight: keys and
    values of 8 bits and their scales in place of the problem's, which are what they stand for (`quantised`).
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.contracts import DecodeConfig
    from pallas_kernels.flash_decode import decode

    problem = poisoned(problem, poison)
    B, H, S, E = problem.key.shape
    mask = None if mask is None else mask.with_batch((B,))
    q, k, v = (jnp.asarray(x, dtype) for x in (problem.query, problem.key, problem.value))
    scales, pages = {}, None
    if eight is not None:
        k, v = (jnp.asarray(eight[name]) for name in ("key", "value"))
        scales = {name: jnp.asarray(eight[name]) for name in ("key_scale", "value_scale")}
    if page is not None:
        layout, order = "BLHE", rng.permutation(B * (S // page))
        place = np.argsort(order)
        k, v = (jnp.swapaxes(x, 1, 2).reshape(-1, page, H, x.shape[3])[order] for x in (k, v))
        pages = jnp.asarray(place.reshape(B, -1), jnp.int32)
        scales = {
            name: x if x.shape[2] == 1 else jnp.swapaxes(jnp.swapaxes(x, 1, 2).reshape(-1, page, x.shape[1])[order], 1, 2)
            for name, x in scales.items()
        }
        q = jnp.swapaxes(q, 1, 2)
    elif layout == "BLHE":
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    rows = problem.query.shape[1] // H * problem.query.shape[2]
    small = DecodeConfig(block_k=64, stages=3, warpgroups=-(-rows // 64), row_tiles=2, queries=2, programs=5)
    if eight is not None:
        dims = dict(zip(("head_dim", "value_head_dim"), flash_decode.whole_dims(E, v.shape[3], True), strict=True))
        small = dataclasses.replace(eight_bit_config(rows=rows, **dims), stages=3, programs=5)
    config = config or (small if interpret else None)
    sinks = None if problem.sinks is None else jnp.asarray(problem.sinks, jnp.float32)[None]
    scale = problem.scale if isinstance(problem.scale, np.ndarray) else float(E**-0.5 if problem.scale is None else problem.scale)

    def run(q, k, v, mask, sinks, pages, scales):
        return decode(
            q, k, v, layout=layout, scale=jnp.asarray(scale, jnp.float32)[None] if isinstance(scale, np.ndarray) else scale,
            softcap=problem.softcap, mask=mask, sinks=sinks, pages=pages, whole=whole, config=config, **scales,
            interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        )  # fmt: skip

    out, lse = assert_same_bits(run, (q, k, v, mask, sinks, pages, scales), times - 1)
    return {"out": np.asarray(jnp.swapaxes(out, 1, 2) if layout == "BLHE" else out), "lse": np.asarray(lse)}


STOPS, STARTS = [300, 70, 0], [0, 40, 0]
ODD = [0, 1, 129, 0, 0, 64, 65, 191]
LEFT_PADDED = KeyLengths(jnp.array(STOPS), jnp.array(STARTS))
CASES = {
    "one query, groups of 7": lambda: (make(1, 320, B=2, Hq=7, Hk=1, E=64), {}),
    "(B, L, H, E), no groups, 16-bit floats": lambda: (make(1, 264, B=2, Hq=2, E=64), {"layout": "BLHE", "dtype": jnp.float16}),
    "3 queries, groups of 4, (B, L, H, E)": lambda: (make(3, 320, B=2, Hq=8, Hk=2, E=64), {"layout": "BLHE"}),
    "16 queries, groups of 8: two warpgroups, causal at the end": lambda: (
        make(16, 320, B=1, Hq=8, Hk=1, E=64, keep=band(16, 320, -1, 0, 304)), {"mask": causal(304)}
    ),
    "lengths, starts, one of them empty": lambda: (
        make(1, 320, B=3, Hq=4, Hk=2, E=64, keep=lengths(1, 320, STOPS, STARTS)),
        {"mask": LEFT_PADDED, "poison": list(zip(STARTS, STOPS, strict=True))},
    ),
    "a window at traced places, 4 queries": lambda: (
        make(4, 320, B=2, Hq=2, Hk=1, E=64, keep=band(4, 320, 100, 0, np.array([290, 60]))),
        {"mask": sliding_window(100, 0, jnp.array([290, 60]))},
    ),
    "one sequence of an odd length": lambda: (
        make(1, 320, B=1, Hq=2, Hk=2, E=16, keep=lengths(1, 320, [257])), {"mask": KeyLengths(jnp.array([257]))}
    ),
    "two sequences, one of a single key": lambda: (
        make(1, 320, B=2, Hq=1, Hk=1, E=16, keep=lengths(1, 320, [1, 319])), {"mask": KeyLengths(jnp.array([1, 319]))}
    ),
    "eight sequences of 0, 1 and odd lengths": lambda: (
        make(1, 192, B=8, Hq=2, Hk=1, E=16, keep=lengths(1, 192, ODD)), {"mask": KeyLengths(jnp.array(ODD)), "poison": [(0, n) for n in ODD]}
    ),
    "softcap, sinks, negative scale": lambda: (
        make(2, 264, B=1, Hq=4, Hk=2, E=64, softcap=3.0, scale=-0.3, sinks=np.array([0.5, -np.inf, 2.0, 40.0])), {}
    ),
    "lengths with sinks, whole": lambda: (
        make(1, 320, B=3, Hq=2, Hk=1, E=64, keep=lengths(1, 320, STOPS), sinks=np.array([0.5, 1.0])),
        {"mask": KeyLengths(jnp.array(STOPS)), "whole": True},
    ),
    "E 128, Ev 64": lambda: (make(1, 264, B=1, Hq=4, Hk=1, E=128, Ev=64), {}),
    "E 64, Ev 160": lambda: (make(1, 264, B=1, Hq=2, Hk=1, E=64, Ev=160), {}),
    "odd sizes": lambda: (make(1, 261, B=2, Hq=3, Hk=1, E=40, Ev=24), {}),
    "pages of 16": lambda: (
        make(1, 320, B=3, Hq=4, Hk=2, E=64, keep=lengths(1, 320, STOPS)), {"mask": KeyLengths(jnp.array(STOPS)), "page": 16}
    ),
    "pages of 64, 2 queries": lambda: (
        make(2, 320, B=3, Hq=2, Hk=1, E=64, keep=lengths(2, 320, STOPS)),
        {"mask": KeyLengths(jnp.array(STOPS)), "page": 64, "poison": [(0, stop) for stop in STOPS]},
    ),
}  # fmt: skip


@needs_mosaic
@pytest.mark.parametrize("name", CASES)
def test_the_interpreted_kernels_give_the_oracles_numbers(name):
    problem, options = CASES[name]()
    problem = problem.rounded(options.get("dtype", jnp.bfloat16))
    check(problem, on_kernel(problem, **options))


INT8, FP8 = jnp.int8, jnp.float8_e4m3fn
EIGHT_BITS = {
    "int8, a scale for each key, lengths, starts": lambda: (
        make(1, 320, B=3, Hq=4, Hk=2, E=64, keep=lengths(1, 320, STOPS, STARTS)), (INT8, "key"),
        {"mask": LEFT_PADDED, "poison": list(zip(STARTS, STOPS, strict=True))},
    ),
    "fp8, a scale for each key, lengths, (B, L, H, E)": lambda: (
        make(1, 320, B=3, Hq=4, Hk=2, E=64, keep=lengths(1, 320, STOPS, STARTS)), (FP8, "key"),
        {"mask": LEFT_PADDED, "layout": "BLHE", "poison": list(zip(STARTS, STOPS, strict=True))},
    ),
    "int8, groups of 7, a scale for each head": lambda: (make(1, 328, B=2, Hq=7, Hk=1, E=64), (INT8, "head"), {}),
    "fp8, odd sizes, one scale": lambda: (make(1, 261, B=2, Hq=3, Hk=1, E=40, Ev=24), (FP8, "one"), {}),
    "int8, 16 queries, groups of 4, causal at the end": lambda: (
        make(16, 320, B=1, Hq=4, Hk=1, E=64, keep=band(16, 320, -1, 0, 304)), (INT8, "key"), {"mask": causal(304)},
    ),
    "fp8, a window at traced places, 4 queries": lambda: (
        make(4, 320, B=2, Hq=2, Hk=1, E=64, keep=band(4, 320, 100, 0, np.array([290, 60]))), (FP8, "key"),
        {"mask": sliding_window(100, 0, jnp.array([290, 60]))},
    ),
    "fp8, softcap, sinks, negative scale": lambda: (
        make(2, 264, B=1, Hq=4, Hk=2, E=64, softcap=3.0, scale=-0.3, sinks=np.array([0.5, -np.inf, 2.0, 40.0])), (FP8, "key"), {}
    ),
    "int8, lengths with sinks, whole": lambda: (
        make(1, 320, B=3, Hq=2, Hk=1, E=64, keep=lengths(1, 320, STOPS), sinks=np.array([0.5, 1.0])), (INT8, "key"),
        {"mask": KeyLengths(jnp.array(STOPS)), "whole": True, "poison": [(0, stop) for stop in STOPS]},
    ),
    "fp8, E 128, Ev 64": lambda: (make(1, 264, B=1, Hq=4, Hk=1, E=128, Ev=64), (FP8, "key"), {}),
    "int8, E 64, Ev 160": lambda: (make(1, 264, B=1, Hq=2, Hk=1, E=64, Ev=160), (INT8, "key"), {}),
    **{
        f"{narrow.__name__}, pages of {page}, a scale for each {scales}": lambda narrow=narrow, page=page, scales=scales: (
            make(1, 320, B=3, Hq=4, Hk=2, E=64, keep=lengths(1, 320, STOPS)), (narrow, scales),
            {"mask": KeyLengths(jnp.array(STOPS)), "page": page, "poison": [(0, stop) for stop in STOPS]},
        )
        for narrow, page, scales in [(INT8, 16, "key"), (FP8, 32, "key"), (INT8, 64, "key"), (FP8, 64, "head")]
    },
}  # fmt: skip


def on_kernel_of_eight_bits(case, **more):
    """(the problem that the keys and values stand for, what the kernels give)."""
    problem, (narrow, scales), options = case()
    stretches = options.pop("poison", None)
    problem, eight = quantised(problem.rounded(jnp.bfloat16), narrow, scales, stretches=stretches)
    return problem, on_kernel(problem, eight=eight, **options, **more)


@needs_mosaic
@pytest.mark.parametrize(
    "name", [*list(EIGHT_BITS)[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in list(EIGHT_BITS)[2:])]
)
def test_keys_of_eight_bits_give_the_numbers_of_what_they_stand_for(name):
    check(*on_kernel_of_eight_bits(EIGHT_BITS[name]))


MIXED = np.minimum(np.random.default_rng(3).integers(0, 2048, 130), 1024).tolist()
ON_A_GPU = {
    **CASES,
    "long, groups of 7": lambda: (make(1, 8192, B=3, Hq=14, Hk=2, E=128), {}),
    "long, lengths of every size": lambda: (
        make(1, 4096, B=8, Hq=8, Hk=2, E=128, keep=lengths(1, 4096, [4096, 1, 513, 64, 65, 3000, 2048, 0])),
        {"mask": KeyLengths(jnp.array([4096, 1, 513, 64, 65, 3000, 2048, 0])), "layout": "BLHE"},
    ),
    "long, head dims of 256": lambda: (make(5, 2048, B=2, Hq=8, Hk=2, E=256), {}),
    "long, pages of 128": lambda: (
        make(1, 2048, B=4, Hq=8, Hk=2, E=128, keep=lengths(1, 2048, [2048, 100, 1025, 0])),
        {"mask": KeyLengths(jnp.array([2048, 100, 1025, 0])), "page": 128, "poison": [(0, n) for n in (2048, 100, 1025, 0)]},
    ),
    "64 sequences": lambda: (make(1, 512, B=64, Hq=4, Hk=2, E=64), {}),
    "130 sequences of mixed lengths": lambda: (
        make(1, 1024, B=130, Hq=4, Hk=2, E=64, keep=lengths(1, 1024, MIXED)), {"mask": KeyLengths(jnp.array(MIXED))}
    ),
    "one sequence in many pieces": lambda: (make(1, 32768, B=1, Hq=4, Hk=4, E=128), {}),
}  # fmt: skip


@needs_mosaic
@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_A_GPU)
def test_the_compiled_kernels_give_the_oracles_numbers_and_the_same_bits(name):
    problem, options = ON_A_GPU[name]()
    problem = problem.rounded(options.get("dtype", jnp.bfloat16))
    check(problem, on_kernel(problem, **options, interpret=False, times=20))


LENGTHS = [4096, 1, 513, 64, 65, 3000, 2048, 0]
EIGHT_BITS_ON_A_GPU = {
    **EIGHT_BITS,
    **{
        f"{narrow.__name__}, long, {what}": lambda narrow=narrow, options=options: (
            make(1, 4096, B=8, Hq=14, Hk=2, E=128, keep=lengths(1, 4096, LENGTHS)), (narrow, "key"),
            {"mask": KeyLengths(jnp.array(LENGTHS)), "poison": [(0, n) for n in LENGTHS], **options},
        )
        for narrow in (INT8, FP8)
        for what, options in (("lengths of every size", {}), ("pages of 16", {"page": 16}), ("pages of 128", {"page": 128}))
    },
    "int8, long, head dims of 256": lambda: (make(5, 2048, B=2, Hq=8, Hk=2, E=256), (INT8, "key"), {}),
    "fp8, long, head dims of 256": lambda: (make(1, 2048, B=2, Hq=14, Hk=2, E=256), (FP8, "key"), {}),
    "fp8, long, 16 queries of groups of 4": lambda: (make(16, 4096, B=2, Hq=8, Hk=2, E=128), (FP8, "key"), {}),
    "int8, one sequence in many pieces": lambda: (make(1, 32768, B=1, Hq=4, Hk=4, E=128), (INT8, "key"), {}),
}  # fmt: skip


@needs_mosaic
@pytest.mark.gpu
@pytest.mark.parametrize("name", EIGHT_BITS_ON_A_GPU)
def test_keys_of_eight_bits_on_a_gpu(name):
    check(*on_kernel_of_eight_bits(EIGHT_BITS_ON_A_GPU[name], interpret=False, times=20))


@needs_mosaic
@pytest.mark.gpu
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch():
    stops = [4096, 700, 33, 2048, 1025]
    problem = make(1, 4096, B=5, Hq=8, Hk=2, E=128, keep=lengths(1, 4096, stops)).rounded(jnp.bfloat16)
    together = on_kernel(problem, mask=KeyLengths(jnp.array(stops)), whole=True, interpret=False)
    for b, stop in enumerate(stops):
        one = problem.but(**{name: getattr(problem, name)[b : b + 1] for name in ("query", "key", "value")})
        alone = on_kernel(one, mask=KeyLengths(jnp.array([stop])), whole=True, interpret=False)
        for name in ("out", "lse"):
            np.testing.assert_array_equal(alone[name][0], together[name][b])


@needs_mosaic
@pytest.mark.parametrize("options", [{}, {"key_lengths": True}])
def test_a_decode_lowers_for_cuda_through_the_public_function(options):
    """One query to a long cache takes the decode kernels."""
    q, k, n = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
        ((2, 8, 1, 128), jnp.bfloat16), ((2, 2, 1024, 128), jnp.bfloat16), ((2,), jnp.int32)
    ))  # fmt: skip

    def call(q, k, n):
        mask = KeyLengths(n) if options else None
        return jax_sdpa.scaled_dot_product_attention(q, k, k, mask, enable_gqa=True)

    with assume_device("cuda:sm90"), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        text = jax.jit(call).trace(q, k, n).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 2, "pieces and their merging"
    choice = jax_sdpa.explain(q, k, k, KeyLengths(n) if options else None, enable_gqa=True, device="cuda:sm90")
    assert any("decode" in note for note in choice.notes)
