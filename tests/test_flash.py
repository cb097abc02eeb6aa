"""FLASH_ATTENTION behind the public functions: the suite's cases through the kernel, interpreted here and compiled on a GPU."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, in_half
from harness import dropped, make, on_jax
from oracle import band, check, lengths, solve

from jax_sdpa import check as checks
from jax_sdpa import compat, dot_product_attention, dropout, explain, scaled_dot_product_attention
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.attention.bias import KeyLengths, QueryLengths, SegmentIds, causal, causal_lower_right, sliding_window
from jax_sdpa.implementations.flash import Flash
from jax_sdpa.masks import as_mask
from jax_sdpa.request import DIFFERENTIABLE
from jax_sdpa.sharding import merge

FLASH = SDPBackend.FLASH_ATTENTION
needs_mosaic = pytest.mark.skipif(compat.JAX_VERSION < (0, 11, 2), reason="Mosaic's interpreter and the kernels need jax 0.11.2")


def interpreted(problem, mask=None, face="torch", gradients=False, **options):
    """{'out', 'lse', with `gradients` a cotangent for each operand} by `Flash` in Mosaic's interpreter; arguments as in `on_jax`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    arrays = {name: getattr(problem, name) for name in ("query", "key", "value", "bias", "sinks")}
    q, k, v, bias, sinks = (None if x is None else jnp.asarray(x) for x in arrays.values())
    if mask is None and problem.keep is not None:
        mask = as_mask(jnp.asarray(problem.keep))
    scale = jnp.asarray(problem.scale) if isinstance(problem.scale, np.ndarray) else problem.scale
    if face == "torch":
        both = mask if bias is None else bias if mask is None else mask & bias
        gqa = len({q.shape[-3], k.shape[-3], v.shape[-3]}) > 1
        request, shape = checks.torch_request(q, k, v, both, scale=scale, enable_gqa=gqa, **options)
    else:
        q, k, v = (jnp.swapaxes(x, -2, -3) for x in (q, k, v))
        request, shape = checks.jax_request(q, k, v, bias, mask, scale=scale, sinks=sinks, softcap=problem.softcap, **options)
    flash = Flash(interpret=plgpu.InterpretGPUParams(detect_races=True))
    torchs = lambda x: np.asarray(x if face == "torch" else jnp.swapaxes(x, -2, -3))  # noqa: E731
    out, lse = jax.jit(flash.run)(request)
    found = {"out": torchs(jnp.reshape(out, shape)), "lse": np.asarray(lse)}
    if not gradients:
        return found
    wrt = tuple(name for name in DIFFERENTIABLE if getattr(request, name) is not None)
    dout = jnp.reshape(torchs(jnp.asarray(problem.dout)), out.shape)
    dlse = None if problem.dlse is None else jnp.asarray(problem.dlse, jnp.float32)
    cts = jax.jit(flash.backward, static_argnames="wrt")(request, out, lse, dout, dlse, wrt=wrt)
    shapes = {name: getattr(problem, name).shape for name in wrt}
    qkv = ("query", "key", "value")
    return found | {name: np.reshape(torchs(x) if name in qkv else np.asarray(x), shapes[name]) for name, x in cts.items()}


def hold(name, problem, got):
    """`check`, but for the gradient of one bias for all: it is 0, the sum of 4788 rows' roundings, 2**-9 of each, whatever the
    honest one's luck was."""
    if name != "bias (1, 1)" or "bias" not in got:
        check(problem, got)
        return
    check(problem, got, names=("out", "query", "key", "value"))
    assert abs(float(got["bias"].item())) <= 3 * 2.0**-9 * solve(problem)["size of bias"]


SOME = [
    "plain 1x1", "plain 7x1", "plain 127x129", "lower right, first rows empty", "offset per batch element, also negative and beyond S",
    "key lengths with left padding", "segments out of order, L != S",
    "boundaries, window, L != S, some used", "everything, torch's face", "everything, JAX's face", "bool (B, H, L, 1)", "bool (B, 1, 1, S)", "bias (L, S), -inf rows", "bias (B, H, L, S) and bool (B, 1, 1, S)", "Hk 2, Hv 3",
    "softcap, bias (H, 1, S)", "softcap, bias (L, 1)", "traced negative scale", "sink of -inf", "bias that drifts, so that the maximum moves in every block",
]  # fmt: skip


@needs_mosaic
@pytest.mark.parametrize("name", [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in SOME)])
def test_the_suites_cases_interpreted(name):
    problem, mask, options = CASES[name]()
    problem = problem.rounded(jnp.bfloat16)
    own_heads = problem.key.shape[-3] == problem.value.shape[-3]  # else the call repeats them before it comes to Flash
    hold(name, problem, interpreted(problem, mask, gradients=own_heads, **options))


@needs_mosaic
@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (1, 256), (256, 1)])
def test_a_bias_beside_a_slope_where_warpgroups_begin_apart_interpreted(rows, columns, monkeypatch):
    """What TMA brings of the bias is given back by every warpgroup: whoever passed by K and V alone would wait for ever."""
    from pallas_kernels import tuning

    monkeypatch.setattr(tuning, "SMS", 1)  # else one warpgroup a program, which never begins apart
    assert tuning.forward_config(heads=1, query_len=256, key_len=256, head_dim=192, value_head_dim=192, sloped=True).warpgroups == 2
    bias = np.random.default_rng(2).standard_normal((1, 1, rows, columns)).astype(np.float32)
    problem = make(256, 256, B=1, Hq=1, E=192, bias=bias, keep=band(256, 256, -1, 0, 0)).rounded("bfloat16")
    check(problem, interpreted(problem, causal(), gradients=True))


DIGITS = [(64, None, 2), (128, None, 3), (256, None, 3), (256, 30.0, 3)]
"""Head dim, softcap, seed."""


def bias_of_keys(E, softcap, seed):
    """(a problem that shows p in half precision, its face)."""
    L, S = 387, 64
    bias = np.random.default_rng(seed).standard_normal((1, 1, 1, S)).astype(np.float32)
    problem = make(L, S, B=1, Hq=1, E=E, softcap=softcap, bias=bias, keep=band(L, S, -1, 0, 0)).rounded("bfloat16")
    return problem, "jax" if softcap else "torch"


@needs_mosaic
@pytest.mark.parametrize(("E", "softcap", "seed"), DIGITS)
def test_the_gradient_of_a_bias_of_keys_keeps_its_digits_interpreted(E, softcap, seed):
    """ds is summed over the queries in float32; of p that waited in half precision its error is 4 to 5 times the honest one's here,
    the largest of 24 problems."""
    problem, face = bias_of_keys(E, softcap, seed)
    check(problem, interpreted(problem, causal(), face=face, gradients=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("E", "softcap", "seed"), DIGITS)
def test_the_gradient_of_a_bias_of_keys_keeps_its_digits(E, softcap, seed):
    problem, face = bias_of_keys(E, softcap, seed)
    check(problem, on_jax(problem, FLASH, mask=causal(), face=face))


@needs_mosaic
def test_a_part_of_a_call_with_dropout_interpreted():
    """The kernels, forward and both of the backward, count queries and keys from where the part begins in the whole call."""
    key, p, q0, k0 = jax.random.key(1), 0.3, 37, 70
    survivors = dropped(key, 2, 2, 136 + q0, 200 + k0, p)[:, :, q0:, k0:]
    problem = make(136, 200, Hq=2, Hk=1, E=64, keep=lengths(136, 200, [180, 0]), survivors=survivors).rounded("bfloat16")
    placed = dropout.at(key, query_position=q0, key_position=jnp.int32(k0))
    check(problem, interpreted(problem, KeyLengths(jnp.array([180, 0])), gradients=True, dropout_p=p, dropout_rng=placed))


@needs_mosaic
def test_two_parts_of_the_keys_merged_and_their_gradients_interpreted():
    """What a ring over two devices asks of the kernels: parts by a moved mask, merged by lse, and a backward of each part from the
    whole call's out and lse. With a bias, whose rows of large numbers come less their largest."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    L, S, cut = 72, 208, 128
    bias = np.random.default_rng(2).standard_normal((2, 2, L, S)).astype(np.float32) + 300 * (np.arange(L) % 3)[:, None]
    problem = make(L, S, Hq=2, Hk=1, E=64, bias=bias, keep=band(L, S, -1, 0, 130)).rounded("bfloat16")
    problem = problem.but(bias=bias)
    q, k, v = (jnp.asarray(getattr(problem, name)) for name in ("query", "key", "value"))
    flash = Flash(interpret=plgpu.InterpretGPUParams())
    request, _ = checks.torch_request(q, k, v, causal(130) & jnp.asarray(bias), enable_gqa=True)
    top = merge.largest(request.bias)
    parts = [
        dataclasses.replace(
            request, key=k[:, :, at], value=v[:, :, at], bias=request.bias[..., at] - top,
            masks=tuple(mask.seen_from(0, at.start) for mask in request.masks),
        ).with_spec(part=True)
        for at in (slice(0, cut), slice(cut, S))
    ]  # fmt: skip
    state = merge.nothing(request)
    for part in parts:
        state = merge.merged(state, jax.jit(flash.run)(part), 1)
    out, lse = state[0].astype(jnp.bfloat16), state[1]
    wrt = ("query", "key", "value", "bias")
    backward = jax.jit(flash.backward, static_argnames="wrt")
    found = [backward(part, out, lse, jnp.asarray(problem.dout), None, wrt=wrt) for part in parts]
    got = {"out": out, "query": sum(x["query"].astype(jnp.float32) for x in found)}
    got |= {name: jnp.concatenate([x[name] for x in found], axis) for name, axis in (("key", 2), ("value", 2), ("bias", 3))}
    check(problem, {name: np.asarray(x.astype(jnp.bfloat16) if name == "query" else x) for name, x in got.items()})


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    problem, mask, options = in_half(name, "bfloat16")
    hold(name, problem, on_jax(problem, FLASH, mask=mask, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("E", [64, 128, 256])
@pytest.mark.parametrize("shape", [(2, 1, 256, 640), (1, 4, 384, 256)], ids=str)
def test_a_bool_mask_of_whole_pieces(shape, E):
    """Packed by our kernels, across for dq and down for dk and dv, with rows, keys and tiles that hold nothing."""
    keep = np.random.default_rng(E).random(shape) < 0.5
    keep[..., 5, :] = keep[..., :, 7] = keep[..., :128, 128:256] = False
    problem = make(*shape[2:], B=2, Hq=4, Hk=2, E=E, keep=keep).rounded("bfloat16")
    check(problem, on_jax(problem, FLASH))


@pytest.mark.gpu
@pytest.mark.parametrize("E", [64, 128, 256])
@pytest.mark.parametrize("shape", [(2, 4, 256, 256), (1, 1, 512, 512), (1, 4, 1, 512), (2, 1, 512, 1)], ids=str)
def test_a_bias_beside_a_slope(shape, E):
    bias = np.random.default_rng(E).standard_normal(shape).astype(np.float32)
    L = max(shape)
    problem = make(L, L, B=2, Hq=4, Hk=2, E=E, bias=bias, keep=band(L, L, -1, 0, 0)).rounded("bfloat16")
    check(problem, on_jax(problem, FLASH, mask=causal()))


@pytest.mark.gpu
@pytest.mark.parametrize("name", SOME)
def test_values_and_gradients_in_float16_with_x64(name):
    problem, mask, options = in_half(name, "float16")
    with jax.enable_x64(True):
        check(problem, on_jax(problem, FLASH, mask=mask, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("E", [1, 8, 40, 64, 72, 80, 96, 112, 128, 160, 192, 224, 256])
@pytest.mark.parametrize("face", ["torch", "jax"])
def test_every_head_dim(E, face):
    for Ev in {E, 256 - E or 1}:
        problem = make(200, 300, B=1, Hq=4, Hk=2, E=E, Ev=Ev, keep=band(200, 300, -1, 0, 100), dlse=face == "jax").rounded(
            "bfloat16"
        )
        got = on_jax(problem, FLASH, mask=causal_lower_right(200, 300), face=face, wrt=())
        check(problem, got)


LONG = {
    "full": None,
    "causal": lambda L: causal(),
    "window": lambda L: sliding_window(255, 0),
    "lengths": lambda L: KeyLengths(jnp.array([L - L // 5, L // 3])),
}


@pytest.mark.gpu
@pytest.mark.parametrize("L", [511, 512, 513, 1000, 4096, 4100])
@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("E", [64, 128, 256])
def test_long_sequences_and_the_same_bits(L, kind, E):
    """Against MATH in float32 at full precision, which the oracle holds elsewhere; then the same bits again."""
    mask = LONG[kind]
    B, H = 2, 2
    q, k, v = (jax.random.normal(key, (B, H, L, E), jnp.bfloat16) for key in jax.random.split(jax.random.key(L), 3))
    mask = None if mask is None else mask(L)
    run = jax.jit(lambda q, k, v: scaled_dot_product_attention(q, k, v, mask))
    with sdpa_kernel(SDPBackend.MATH):
        exact = np.asarray(run(*(x.astype(jnp.float32) for x in (q, k, v))))
    with sdpa_kernel(FLASH):
        got = np.asarray(run(q, k, v))
        again = [np.asarray(run(q, k, v)) for _ in range(5)]
    error = np.abs(got.astype(np.float32) - exact)
    assert error.max() <= 2 * 2.0**-8 * np.abs(exact).max()
    assert all((x.view(np.uint16) == got.view(np.uint16)).all() for x in again)


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("E", [64, 128])
def test_long_gradients(E, kind, p):
    """Against MATH in float32: lengths at which head dim 64 has a kernel of its own, and programs one row tile."""
    L = 8200
    mask = None if LONG[kind] is None else LONG[kind](L)
    q, k, v, dout = (jax.random.normal(key, (2, 1, L, E), jnp.bfloat16) for key in jax.random.split(jax.random.key(L), 4))
    drop = {"dropout_p": p, "dropout_rng": jax.random.key(3)} if p else {}

    def gradients(q, k, v, dout):
        return jax.vjp(lambda q, k, v: scaled_dot_product_attention(q, k, v, mask, **drop), q, k, v)[1](dout)

    with sdpa_kernel(SDPBackend.MATH):
        exact = jax.jit(gradients)(*(x.astype(jnp.float32) for x in (q, k, v, dout)))
    with sdpa_kernel(FLASH):
        got = jax.jit(gradients)(q, k, v, dout)
    for x, expected in zip(got, exact, strict=True):
        error = jnp.linalg.norm(x.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
        assert error <= 2 * 2.9e-3  # twice what the kernels have on random data without a mask (pallas_kernels/NOTES.md)


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("E", [64, 128, 256])
def test_dropout_is_every_backends_mask(p, E):
    key = jax.random.key(3)
    keep = band(140, 270, 50, 0, 100) & lengths(140, 270, [200, 0])
    problem = make(140, 270, Hq=4, Hk=2, E=E, keep=keep, survivors=dropped(key, 2, 4, 140, 270, p)).rounded("bfloat16")
    mask = sliding_window(50, 0, 100) & KeyLengths(jnp.array([200, 0]))
    check(problem, on_jax(problem, FLASH, mask=mask, dropout_p=p, dropout_rng=key))


@pytest.mark.gpu
def test_hidden_keys_may_hold_anything():
    problem = make(200, 300, keep=lengths(200, 300, [170, 0]), E=64).rounded("bfloat16")
    poisoned = {name: getattr(problem, name).copy() for name in ("key", "value")}
    for x in poisoned.values():
        x[0, :, 170:], x[1] = np.nan, np.inf
    got = on_jax(problem.but(**poisoned), FLASH, mask=KeyLengths(jnp.array([170, 0])))
    check(problem, got)


@pytest.mark.gpu
@pytest.mark.parametrize("told", [False, True], ids=["by numbers", "by ids"])
@pytest.mark.parametrize("E", [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256])
def test_hidden_rows_may_hold_anything_at_every_head_dim(E, told):
    """They are cleared in shared memory, whose rows are 32, 64 or 128 bytes wide."""
    keep = lengths(200, 300, [170, 0])
    problem = make(200, 300, Hq=4, Hk=2, keep=keep, E=E).rounded("bfloat16")
    poisoned = {name: getattr(problem, name).copy() for name in ("query", "key", "value", "dout")}
    for name, x in poisoned.items():
        x[0, :, 170 if name in ("key", "value") else 300 :], x[1] = np.nan, np.inf
    mask = KeyLengths(jnp.array([170, 0]))
    if told:
        ids = np.where(np.arange(300) < np.array([[170], [0]]), 0, -1)
        mask = SegmentIds(jnp.zeros((2, 200), jnp.int32), jnp.asarray(ids))
    got = on_jax(problem.but(**poisoned), FLASH, mask=mask)
    check(problem, got)


@needs_mosaic
def test_what_a_mask_hides_may_hold_anything_and_empty_rows_too():
    """Keys that nobody sees, rows that see nothing: NaN and infinity there reach no gradient."""
    keep = lengths(72, 136, [100, 136]) & (np.arange(72) < 50)[:, None]
    problem = make(72, 136, Hq=2, Hk=1, keep=keep, E=64).rounded("bfloat16")
    poisoned = {name: getattr(problem, name).copy() for name in ("query", "key", "value", "dout")}
    poisoned["key"][0, :, 100:], poisoned["value"][0, :, 100:] = np.nan, np.inf
    poisoned["query"][:, :, 50:], poisoned["dout"][:, :, 50:] = np.inf, np.nan
    mask = KeyLengths(jnp.array([100, 136])) & QueryLengths(jnp.array([50]))
    check(problem, interpreted(problem.but(**poisoned), mask, gradients=True))


@needs_mosaic
@pytest.mark.parametrize("keys", [136, 1], ids=["as large as the scores", "of queries"])
def test_what_a_mask_hides_may_hold_anything_beside_a_dense_one(keys):
    """The kernel sees one mask then, in which nothing says which values nobody sees."""
    keep = lengths(72, 136, [100, 33])
    dense = np.random.default_rng(2).random((2, 1, 72, keys)) < 0.8
    problem = make(72, 136, Hq=2, Hk=1, keep=keep & dense, E=64).rounded("bfloat16")
    poisoned = problem.but(value=problem.value.copy())
    poisoned.value[0, :, 100:], poisoned.value[1, :, 33:] = np.nan, np.inf
    check(problem, interpreted(poisoned, KeyLengths(jnp.array([100, 33])) & jnp.asarray(dense)))


@pytest.mark.gpu
def test_under_vmap_jvp_and_second_derivatives():
    q, k, v = (jax.random.normal(key, (3, 2, 2, 72, 64), jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3))

    def attend(q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    def all_of_it(q, k, v):
        hessian = jax.jvp(lambda q: jax.grad(lambda q: attend(q, k, v).astype(jnp.float32).sum())(q), (q,), (k,))[1]
        return jax.vmap(attend, (0, None, 1), 1)(q, k[0], jnp.swapaxes(v, 0, 1)), *jax.jvp(attend, (q, k, v), (v, q, k)), hessian

    with sdpa_kernel(FLASH):
        got = jax.jit(all_of_it)(q, k, v)
    with sdpa_kernel(SDPBackend.MATH):
        expected = jax.jit(all_of_it)(q, k, v)
    for x, y in zip(got, expected, strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert np.abs(x - y).max() <= 0.03 * np.abs(y).max()  # a few roundings to bfloat16, one after another


@pytest.mark.gpu
def test_remat_by_name_runs_the_kernel_once_and_the_default_choice_is_flash():
    q = jax.random.normal(jax.random.key(0), (1, 2, 256, 64), jnp.bfloat16)
    assert explain(q, q, q, is_causal=True).backend is FLASH
    assert explain(q, q, q, is_causal=True, grad=True).backend is FLASH
    policy = jax.checkpoint_policies.save_only_these_names("sdpa_out", "sdpa_lse")

    def loss(q):
        return jnp.sin(jax.checkpoint(lambda q: scaled_dot_product_attention(q, q, q), policy=policy)(q).astype(jnp.float32)).sum()

    def kernels(loss):
        text = jax.jit(jax.grad(loss)).lower(q).compile().as_text()
        return sum("custom-call" in line and "mosaic_gpu" in line for line in text.splitlines())

    assert kernels(loss) == kernels(lambda q: jnp.sin(scaled_dot_product_attention(q, q, q).astype(jnp.float32)).sum())


def _hopper_program(length, **options):
    """The StableHLO of a call lowered for a Hopper that is not here."""
    from jax_sdpa.device import assume_device

    q = jax.ShapeDtypeStruct((2, 4, length, 72), jnp.bfloat16)
    with assume_device("cuda:sm90"), sdpa_kernel(FLASH):
        traced = jax.jit(lambda q: scaled_dot_product_attention(q, q, q, **options)).trace(q)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_mosaic
@pytest.mark.parametrize(
    "options",
    [
        {}, {"is_causal": True}, {"scale": -0.3}, {"attn_mask": "keys"}, {"attn_mask": "dense"}, {"attn_mask": "bias"},
        {"attn_mask": "of heads"}, {"attn_mask": "of queries"}, {"attn_mask": "of keys"},
        {"attn_mask": "segments"}, {"dropout_p": 0.1}, {"dropout_p": 0.1, "is_causal": True},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("length", [72, 200, 256])
def test_calls_lower_for_a_hopper(options, length):
    masks = {
        "keys": KeyLengths(jnp.array([3, length])), "dense": jnp.ones((2, 1, length, length), bool),
        "of heads": jnp.ones((2, 4, 1, 1), bool), "of queries": jnp.ones((length, 1), bool), "of keys": jnp.ones((2, 1, 1, length), bool),
        "bias": jnp.ones((4, length, length)), "segments": SegmentIds(jnp.zeros((2, length), jnp.int32)),
    }  # fmt: skip
    given = {name: masks.get(x, x) if isinstance(x, str) else x for name, x in options.items()}
    given |= {"dropout_rng": jax.random.key(0)} if "dropout_p" in options else {}
    for x64 in (False, True):
        with jax.enable_x64(x64):
            packs = options.get("attn_mask") == "dense" and length % 128 == 0  # by a kernel too
            assert _hopper_program(length=length, **given).count("mosaic_gpu_v2") == 1 + packs


HUGE = {
    "a row of -1e9, float16": (np.full((1, 1, 8, 256), -1e9, np.float32), "float16"),
    "a row of finfo.min": (np.full((1, 1, 8, 256), np.finfo(np.float32).min), "bfloat16"),
    "-1.1e9 and then -1.0e9": (
        np.where(np.arange(256) >= 128, -1.1e9, -1.0e9).astype(np.float32).reshape(1, 1, 1, 256),
        "bfloat16",
    ),
    "2**27 and a step less, 2**28 too": (
        np.where(np.arange(256) % 3 == 0, 2.0**27, 2.0**27 - 8).astype(np.float32)[None, None, None]
        * np.array([[1], [2]] * 4, np.float32),
        "bfloat16",
    ),
    "across 2**27, then back": (
        (2.0**27 + 64 * np.array([[-1], [1]] * 4) * np.where(np.arange(256) >= 128, 1, -1)).astype(np.float32)[None, None],
        "float16",
    ),
    "the same below 0": (
        (-(2.0**27) + 64 * np.array([[-1], [1]] * 4) * np.where(np.arange(256) >= 128, 1, -1)).astype(np.float32)[None, None],
        "bfloat16",
    ),
    "3e38 beside 0": (np.where(np.arange(256) == 7, 3e38, 0).astype(np.float32).reshape(1, 1, 1, 256), "bfloat16"),
}


def assert_huge_biases_are_numbers(name, E, run):
    """By `check`, whose floor is above the result where scores are huge; and, of queries that are all 0, in which a bias alone
    decides, to what half precision holds of it."""
    bias, dtype = HUGE[name]
    problem = make(8, 256, B=1, Hq=1, E=E, bias=bias).rounded(dtype)
    check(problem, run(problem), names=("out",))
    problem = problem.but(query=np.zeros_like(problem.query))
    np.testing.assert_allclose(run(problem)["out"], solve(problem)["out"], rtol=0, atol=2.0**-7 * np.abs(problem.value).max())


@needs_mosaic
@pytest.mark.parametrize("E", [16, 32])  # a scale that is a power of 2, and one that is not
@pytest.mark.parametrize("name", HUGE)
def test_huge_biases_are_numbers(name, E):
    assert_huge_biases_are_numbers(name, E, interpreted)


@pytest.mark.gpu
@pytest.mark.parametrize("E", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("name", HUGE)
def test_huge_biases_are_numbers_on_a_gpu(name, E):
    assert_huge_biases_are_numbers(name, E, lambda problem: on_jax(problem, FLASH))


def assert_large_biases_cost_no_digits(dtype, of, size, S, E, run):
    """Rows all of whose keys have a bias of about `size`, at which float32 numbers are up to 0.06 apart: an error of at most twice
    that of float32 softmax with halves of p, scores made first and the bias added to them. Interpreted, products are exact: only
    a GPU shows what tensor cores cut off where they add to something large."""
    bias = (size + np.random.default_rng(3).standard_normal((1, 1, 64, S))).astype(of)
    problem = make(64, S, B=1, Hq=1, E=E, scale=2.0**-4 if dtype == "bfloat16" else 1.0, bias=bias).rounded(dtype)
    q, k, v, bias = (getattr(problem, name).astype(np.float32) for name in ("query", "key", "value", "bias"))
    scores = (q @ k.swapaxes(-1, -2)) * np.float32(problem.scale) + bias
    p = np.exp(scores - scores.max(-1, keepdims=True))
    honest = (p.astype(dtype).astype(np.float32) @ v / p.sum(-1, keepdims=True)).astype(dtype)
    exact = solve(problem)["out"]
    error = lambda found: np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact)  # noqa: E731
    assert error(run(problem)["out"]) <= 2 * error(honest)


LARGE = [(dtype, of, size) for dtype in ("bfloat16", "float16") for of in ("float32", dtype) for size in (-1e3, 1.5e4, -65504.0, 5e5)
         if of != "float16" or abs(size) <= 65504]  # fmt: skip


@needs_mosaic
@pytest.mark.parametrize(("dtype", "of", "size"), [case for case in LARGE if abs(case[2]) > 2e4])
def test_large_biases_cost_no_digits(dtype, of, size):
    assert_large_biases_cost_no_digits(dtype, of, size, 272, 16, interpreted)


@pytest.mark.gpu
@pytest.mark.parametrize("E", [16, 64, 128, 256])
@pytest.mark.parametrize(("dtype", "of", "size"), LARGE)
def test_large_biases_cost_no_digits_on_a_gpu(dtype, of, size, E):
    assert_large_biases_cost_no_digits(dtype, of, size, 2048, E, lambda problem: on_jax(problem, FLASH))


@pytest.mark.gpu
@pytest.mark.parametrize("E", [64, 128, 256])
@pytest.mark.parametrize("bias", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("q0", [299.0, 300.0, 302.0, 306.0])
def test_what_the_maximum_is_rounded_to_counts_once(q0, bias, E):
    """All scores of a row are 8000 or so, over many tiles: its last keys weigh as much as its first ones."""
    S = 16384
    query, key = jnp.zeros((1, 1, 64, E), jnp.bfloat16), jnp.zeros((1, 1, S, E), jnp.bfloat16)
    value = jnp.broadcast_to((jnp.arange(S) < S // 2)[None, None, :, None], key.shape).astype(jnp.bfloat16)
    mask = None if bias is None else jnp.zeros((64, S), bias)
    with sdpa_kernel(FLASH):
        out = scaled_dot_product_attention(query.at[..., 0].set(q0), key.at[..., 0].set(304.0), value, mask)
    np.testing.assert_allclose(np.asarray(out, np.float32), 0.5, atol=2**-9)


@needs_mosaic
def test_masks_and_sinks_at_the_ends_of_their_types():
    wide = make(8, 200, B=1, Hq=1, E=16, sinks=np.array([-3e38])).rounded("bfloat16")
    check(wide, interpreted(wide, sliding_window(2**31 - 1, -1), face="jax"), names=("out",))
    tiny = make(8, 200, B=1, Hq=1, E=16, scale=1e-46, keep=band(8, 200, -1, 0)).rounded("bfloat16")
    check(tiny, interpreted(tiny, causal()))


def test_every_configuration_fits_the_shared_memory():
    """All head dims, with and without tiles of a bias; the kernel's own count is checked where it is lowered."""
    from pallas_kernels import tuning

    for E in range(8, 257, 8):
        for Ev in range(8, 257, 8):
            for heads, L, bias_bytes, masked in [
                (512, 512, 0, False), (512, 2048, 0, True), (512, 8192, 2, False), (512, 512, 4, True), (512, 64, 4, True),
                (8, 128, 4, True), (512, 128, 0, False), (512, 256, 0, True), (8, 1024, 4, False),
            ]:  # fmt: skip
                for keyed in (False, True) if not bias_bytes else (False,):
                    config = tuning.forward_config(
                        heads=heads, query_len=L, key_len=L, head_dim=E, value_head_dim=Ev, masked=masked, sloped=masked,
                        bias_bytes=bias_bytes, keyed=keyed,
                    )  # fmt: skip
                    needs = tuning.shared_bytes(config, E, Ev, bias_bytes, keyed)
                    assert needs <= tuning.SHARED_MEMORY, (E, Ev, L, bias_bytes, keyed)
                    assert not config.alone or config.stages == config.bias_stages == -(-L // config.block_k)


@needs_mosaic
@pytest.mark.parametrize(
    ("E", "Ev", "bias"), [(256, 240, None), (128, 96, "bfloat16"), (96, 128, "float32"), (256, 256, "float32")]
)
def test_the_widest_calls_lower(E, Ev, bias):
    from jax_sdpa.device import assume_device

    q, v = (jax.ShapeDtypeStruct((64, 4, 256, dim), jnp.bfloat16) for dim in (E, Ev))
    mask = None if bias is None else jax.ShapeDtypeStruct((4, 256, 256), bias)
    with assume_device("cuda:sm90"), sdpa_kernel(FLASH):
        traced = jax.jit(lambda q, v, mask: scaled_dot_product_attention(q, q, v, mask)).trace(q, v, mask)
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu_v2") == 1


def test_what_flash_refuses_and_notes():
    q = jax.ShapeDtypeStruct((1, 2, 256, 64), jnp.bfloat16)
    odd = jax.ShapeDtypeStruct((1, 2, 250, 72), jnp.bfloat16)

    def about(q, mask=None, **options):
        choice = explain(q, q, q, mask, device="cuda:sm90", **options)
        return " ".join(choice.notes if choice.backend is FLASH else choice.rejected[FLASH])

    if compat.JAX_VERSION < (0, 11, 2):
        assert "needs jax 0.11.2 or newer" in about(q)
        return
    assert "Gradients run the kernels; forward mode and second derivatives the XLA implementation" in about(q)
    bias = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    assert "all gradients" not in about(q, bias).lower()
    two = jax.ShapeDtypeStruct((2, 2, 256, 64), jnp.bfloat16)
    assert "a bias that batch entries share is made for one after the other" in about(two, bias, grad=True)
    scale = jax.ShapeDtypeStruct((), jnp.float32)
    assert "one of them is not here: the backward kernels have no gradient of a traced scale" in about(q, scale=scale)
    assert "Gradients run the XLA implementation, all of them, from the saved lse: the backward kernels" in about(
        q, scale=scale, grad=True
    )
    assert "A padded copy is made of query, key, value" in about(odd)
    ids, lengths = SegmentIds(jax.ShapeDtypeStruct((1, 256), jnp.int32)), jax.ShapeDtypeStruct((1,), jnp.int32)
    dense = KeyLengths(lengths) & np.ones((256, 256), bool)
    for mask in (causal(), ids, KeyLengths(lengths), QueryLengths(lengths), dense):
        assert "cop" not in about(q, mask).lower()  # what a mask hides is made zero in shared memory
    assert "head dims from 1 to 256. Got 264 and 264" in about(jax.ShapeDtypeStruct((1, 2, 256, 264), jnp.bfloat16))
    assert "a scale that is finite, got inf" in about(q, scale=float("inf"))
    choice = explain(
        *[jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)] * 3, softcap=5000.0, call=dot_product_attention, device="cuda:sm90"
    )
    assert "a softcap of at most 1000, got 5000" in " ".join(choice.rejected[FLASH])


@needs_mosaic
@pytest.mark.parametrize(
    ("E", "Ev", "L", "bias", "p", "kernels"),
    [
        (256, 256, 256, (1, 1, 1, 256), 0.0, 3), (176, 224, 256, (1, 1, 256, 1), 0.2, 4), (240, 144, 256, (1, 1, 1, 256), 0.2, 4),
        (16, 16, 2048, None, 0.0, 3), (48, 64, 2048, None, 0.0, 3), (56, 40, 2048, None, 0.0, 3), (64, 64, 2048, None, 0.2, 3),
    ],
)  # fmt: skip
def test_gradients_lower_where_memory_is_scarce_and_where_tiles_are_narrow(E, Ev, L, bias, p, kernels, monkeypatch):
    from jax_sdpa.device import assume_device

    monkeypatch.delenv("XLA_FLAGS", raising=False)
    q, k, v = (jax.ShapeDtypeStruct((1, 2, L, dim), jnp.bfloat16) for dim in (E, E, Ev))
    bias = None if bias is None else jax.ShapeDtypeStruct(bias, jnp.float32)
    drop = {"dropout_p": p, "dropout_rng": jax.random.key(0)} if p else {}

    def loss(q, k, v, bias):
        return scaled_dot_product_attention(q, k, v, bias, **drop).astype(jnp.float32).sum()

    with assume_device("cuda:sm90"), sdpa_kernel(FLASH):
        grad = jax.grad(loss, (0, 1, 2) if bias is None else (0, 1, 2, 3))
        text = jax.jit(grad).trace(q, k, v, bias).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == kernels


@needs_mosaic
def test_the_determinism_flag_chooses_the_gradients_kernels(monkeypatch):
    """Head dim 64, long, several heads: a kernel that adds to dq in any order, and one that orders its sums; two that give the same bits
    each time, if XLA is asked for that."""
    from jax_sdpa.device import assume_device

    q, short = (jax.ShapeDtypeStruct((1, 8, length, 64), jnp.bfloat16) for length in (2048, 1024))

    def seen():
        grad = jax.grad(lambda q, k, v: scaled_dot_product_attention(q, k, v).astype(jnp.float32).sum(), (0, 1, 2))
        with assume_device("cuda:sm90"), sdpa_kernel(FLASH):
            text = jax.jit(grad).trace(q, q, q).lower(lowering_platforms=("cuda",)).as_text()
        notes = " ".join(explain(q, q, q, device="cuda:sm90").notes)
        adds = "x8x128x4xf32" in text  # `hopper_adding.PIECE`: sums in the registers' order
        return text.count("stablehlo.custom_call @mosaic_gpu"), adds, "last bits vary from run to run" in notes

    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert seen() == (3, True, True)
    assert "vary" not in " ".join(explain(short, short, short, device="cuda:sm90", is_causal=True).notes)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    jax.clear_caches()
    assert seen() == (3, False, False)
    jax.clear_caches()


def test_row_tiles_leave_no_sm_idle():
    from pallas_kernels.tuning import forward_config

    def row_tiles(B, H, L, E, **options):
        return forward_config(heads=B * H, query_len=L, key_len=L, head_dim=E, value_head_dim=E, **options).row_tiles

    assert row_tiles(32, 16, 512, 128) == 16  # 2048 row tiles: 128 programs, one for each SM
    assert row_tiles(32, 32, 512, 64) == 24  # 3072: 128 programs
    assert row_tiles(8, 16, 2048, 128, masked=True, sloped=True) == row_tiles(1, 16, 16384, 128) == 16
    assert row_tiles(1, 1, 128, 128) == 1
    assert row_tiles(32, 8, 512, 256) == 8


@pytest.mark.parametrize("together", [1, 2, 3, 100])
@pytest.mark.parametrize(("batch", "heads", "row_tiles"), [(1, 1, 1), (1, 3, 4), (2, 7, 3)])
@pytest.mark.parametrize(("per_program", "across"), [(1, False), (3, False), (1, True), (3, True)])
def test_every_item_is_some_programs_and_heads_side_by_side_take_turns(batch, heads, row_tiles, per_program, across, together):
    from pallas_kernels.visits import Items

    items = Items(batch, heads, row_tiles, per_program, together, across)
    of = jax.jit(lambda p: [items.at(p, n) for n in range(items.most)])
    counts = [int(items.count(jnp.int32(p))) for p in range(items.programs)]
    found = [tuple(map(int, item)) for p, n in enumerate(counts) for item in of(jnp.int32(p))[:n]]
    assert sorted(found) == list(itertools.product(range(batch), range(heads), range(row_tiles)))
    if per_program == 1:  # heaviest first in each block of heads, and the last block holds what no block of its own could
        blocks = max(1, batch * heads // together)
        sizes = [together * row_tiles] * (blocks - 1)
        ends = [0, *itertools.accumulate(sizes), len(found)]
        for start, end in itertools.pairwise(ends):
            tiles = [r for _, _, r in found[start:end]]
            assert tiles == sorted(tiles, reverse=True)
    if per_program == 1 and across and together == batch:  # one head of all batch entries, its row tiles one after another
        assert found[: batch * row_tiles] == [(b, 0, r) for r in reversed(range(row_tiles)) for b in range(batch)]


def test_heads_that_share_a_bias_stand_side_by_side():
    from pallas_kernels import dense
    from pallas_kernels.backward_tuning import backward_config
    from pallas_kernels.tuning import forward_config

    def readers(*shape):
        return dense.readers(jax.ShapeDtypeStruct(shape, jnp.float32), 4, 16)

    assert readers(4, 16, 256, 256) == (1, False)
    assert readers(1, 16, 256, 256) == (4, True)
    assert readers(1, 1, 256, 256) == (64, True)
    assert readers(4, 1, 256, 256) == (16, False)
    assert readers(1, 16, 1, 256) == dense.readers(None, 4, 16) == (1, False)

    call = {"heads": 64, "query_len": 4096, "key_len": 4096, "head_dim": 128, "value_head_dim": 128, "bias_bytes": 4}
    config = forward_config(**call, readers=(4, True))
    assert (config.together, config.across) == (4, True)
    config = backward_config(**call, group=1, biased=True, readers=(4, True))
    assert [(own.together, own.across) for own in (config.dq, config.dkv)] == [(4, True)] * 2
    tiny = {"heads": 71, "query_len": 64, "key_len": 2, "head_dim": 8, "value_head_dim": 8, "bias_bytes": 4, "group": 71}
    assert forward_config(**tiny, readers=(71, False)).together == 71  # less than a byte of keys to a query head
    long = {**call, "key_len": 1 << 20}  # whose keys alone are more than the cache
    assert forward_config(**long, readers=(4, True)).together == 1


def test_short_rows_of_keys_need_no_loader():
    from pallas_kernels.tuning import forward_config

    def chosen(L, E, heads=256, S=None, **options):
        config = forward_config(
            heads=heads, query_len=L, key_len=S or L, head_dim=E, value_head_dim=E, masked=options.get("sloped", False), **options
        )
        return (config.warpgroups, config.block_k, config.stages) if config.alone else None

    assert chosen(16, 64) == chosen(64, 128) == chosen(64, 128, drops=True) == (1, 64, 1)
    assert chosen(128, 64) == chosen(4096, 64, S=80) == (1, 128, 1)
    assert chosen(128, 128) == (2, 128, 1)
    assert chosen(128, 128, heads=64) == chosen(128, 64, heads=64, drops=True) == (1, 128, 1)
    assert chosen(128, 256, heads=64, bias_bytes=4) == (1, 64, 2)
    assert chosen(192, 64) == (1, 64, 3)
    assert chosen(256, 64, sloped=True) == (2, 64, 4)
    assert chosen(128, 64, drops=True) is chosen(256, 64) is chosen(128, 256) is chosen(128, 128, sloped=True) is None


def test_a_grid_that_leaves_sms_idle_has_fewer_rows_a_program():
    from pallas_kernels.backward_tuning import backward_config
    from pallas_kernels.tuning import forward_config

    def warpgroups(heads, L, E, sloped=False):
        shape = {"heads": heads, "query_len": L, "key_len": L, "head_dim": E, "value_head_dim": E}
        return forward_config(**shape, masked=sloped, sloped=sloped, seen=L / 2 if sloped else L).warpgroups

    assert [warpgroups(8, L, 64) for L in (512, 1024, 2048, 16384)] == [1, 1, 2, 3]
    assert [warpgroups(heads, 1024, 64) for heads in (16, 32, 64)] == [2, 2, 3]
    assert [warpgroups(heads, 1024, 64, sloped=True) for heads in (16, 32, 64)] == [1, 2, 3]
    assert [warpgroups(heads, 1024, E) for E in (128, 256) for heads in (8, 16)] == [1, 2, 1, 2]
    assert warpgroups(16, 1024, 256, sloped=True) == 1

    config = backward_config(heads=8, group=1, query_len=1024, key_len=1024, head_dim=128, value_head_dim=128)
    assert (config.dq.warpgroups, config.dkv.warpgroups) == (1, 1)
    config = backward_config(heads=16, group=1, query_len=1024, key_len=1024, head_dim=128, value_head_dim=128)
    assert (config.dq.warpgroups, config.dkv.warpgroups) == (2, 2)


def test_heads_side_by_side_are_enough_for_all_sms_and_few_enough_for_the_cache():
    from pallas_kernels.tuning import forward_config, side_by_side

    assert side_by_side(32, 2 << 20) == 8  # two rounds of programs: 4096 rows or keys in tiles of 128, D128
    assert side_by_side(64, 4 << 20) == 4
    assert side_by_side(64, 16 << 20) == 2  # one round, which runs at one time anyway
    assert side_by_side(256, 1 << 20) == side_by_side(10**4, 1 << 30) == 1
    assert side_by_side(1, 0) == 264
    qwen = {"heads": 28, "group": 7, "head_dim": 128, "value_head_dim": 128, "masked": True, "sloped": True}
    assert forward_config(query_len=4096, key_len=4096, seen=2112, **qwen).together == 28
    assert forward_config(query_len=4096, key_len=4096, **{**qwen, "sloped": False}).together == 1


CUT = {
    "causal": (causal(), 264, 264, 64, False, True),
    "causal, three warpgroups": (causal(), 520, 520, 192, True, True),
    "causal, longer keys": (causal(72), 128, 200, 128, False, False),
    "causal, an offset of a tile": (causal(128), 256, 384, 128, False, True),
    "window": (sliding_window(100, 0), 392, 392, 128, False, False),
    "window longer than the call": (sliding_window(500, 0), 392, 392, 128, False, True),
    "causal, in lengths": (causal() & QueryLengths(200), 264, 264, 128, False, False),
    "traced offsets": (causal(jnp.array([0])), 264, 264, 128, False, False),
}


@pytest.mark.parametrize("name", CUT)
def test_which_masks_cut_the_first_tile_of_a_walk_alone(name):
    """Against the mask itself: no other tile that a warpgroup's rows visit hides a key from one of them."""
    from pallas_kernels.visits import cut_once, ranges

    mask, L, S, rows, leads, expected = CUT[name]
    mask = mask.with_batch((1,))
    assert cut_once(mask, rows, 64, L, S, 128, leads) is expected
    if not expected:
        return
    for q_lo in range(0, L, rows):
        walk = ranges(mask, q_lo, rows, L, S, 128)
        for base in range(q_lo, min(q_lo + rows, L), 64):
            kept = np.asarray(mask.keep(jnp.arange(base, min(base + 64, L))[:, None], jnp.arange(S)[None, :]))
            last = kept.any(0).nonzero()[0].max() // 128 if leads else walk.last - 1
            assert kept[:, walk.first * 128 : last * 128].all()


@pytest.mark.parametrize("upward", [False, True])
def test_a_part_of_a_walk_has_its_tiles(upward):
    from pallas_kernels.visits import RangeWalk

    walk = RangeWalk(3, 4, 6, 9, upward)
    part = walk.part(1, 4)
    assert [(part.tile(i), part.partial(i)) for i in range(part.steps)] == [(walk.tile(i), walk.partial(i)) for i in (1, 2, 3)]


@pytest.mark.parametrize(("mask", "L", "S", "block_k", "expected"), [
    (causal(), 384, 384, 64, True), (causal(), 384, 384, 128, True), (causal(64), 256, 320, 64, True), (causal(), 256, 320, 64, True),
    (sliding_window(500, 0), 384, 384, 64, True), (sliding_window(100, 0), 384, 384, 64, False), (causal(32), 256, 288, 64, False),
])  # fmt: skip
def test_which_masks_cut_the_first_queries_of_a_key_tile_alone(mask, L, S, block_k, expected):
    """Upward, as the walks of dk and dv are: behind the first tile that a warpgroup's keys visit, no key is hidden."""
    from pallas_kernels.visits import cut_once, ranges

    mask = mask.with_batch((1,)).transposed()
    assert cut_once(mask, 128, 64, S, L, block_k, block_k == 64, upward=True) is expected
    if not expected:
        return
    for lo in range(0, S, 128):
        walk = ranges(mask, lo, 128, S, L, block_k, upward=True)
        for base in range(lo, min(lo + 128, S), 64):
            kept = np.asarray(mask.keep(jnp.arange(base, min(base + 64, S))[:, None], jnp.arange(L)[None, :]))
            lead = walk.lead(ranges(mask, base, 64, S, L, block_k)) if block_k == 64 else 0
            tiles = [walk.tile(i) for i in range(lead + 1, walk.steps)]
            assert all(kept[:, t * block_k : (t + 1) * block_k].all() for t in tiles)
            assert not kept[:, [x for i in range(lead) for x in range(walk.tile(i) * block_k, (walk.tile(i) + 1) * block_k)]].any()


@needs_mosaic
def test_fewer_keys_than_heads_of_a_group():
    """What such heads read is less than a byte for each of them, by the tuning's count."""
    from jax_sdpa.device import assume_device

    q, k = jnp.zeros((1, 8, 200, 64), jnp.bfloat16), jnp.zeros((1, 1, 4, 64), jnp.bfloat16)
    grad = jax.grad(lambda q, k: scaled_dot_product_attention(q, k, k, sliding_window(2, 0), enable_gqa=True).sum(), (0, 1))
    with assume_device("cuda:sm90"), sdpa_kernel(FLASH):
        assert "mosaic_gpu" in jax.jit(grad).trace(q, k).lower(lowering_platforms=("cuda",)).as_text()
    assert explain(q, k, k, sliding_window(2, 0), enable_gqa=True, device="cuda:sm90").backend is FLASH


@needs_mosaic
def test_one_artefact_for_cpu_and_cuda_holds_the_kernel_and_runs_here():
    from jax import export

    from jax_sdpa.device import assume_device

    q = jax.random.normal(jax.random.key(0), (1, 2, 64, 64), jnp.bfloat16)

    def call(q):
        return scaled_dot_product_attention(q, q, q, is_causal=True)

    with assume_device("cuda:sm90"):
        exported = export.export(jax.jit(call), platforms=("cpu", "cuda"))(q)
    again = export.deserialize(exported.serialize())
    assert again.mlir_module().count("mosaic_gpu_v2") == 1
    if jax.default_backend() == "cpu":
        np.testing.assert_array_equal(np.asarray(again.call(q), np.float32), np.asarray(call(q), np.float32))
