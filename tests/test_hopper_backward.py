"""The Hopper backward kernels in Mosaic's interpreter, with race detection; lowered for CUDA; and, marked `gpu`, compiled and run.

The problems are those of the forward's tests. out (rounded) and lse come from the oracle, so that nothing here depends on the forward.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import assert_same_bits, dropped, make
from oracle import band, check, lengths, solve
from test_hopper_forward import CASES as FORWARD
from test_hopper_forward import LONG, alone

from jax_sdpa import compat, dropout, scaled_dot_product_attention
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.attention.bias import KeyLengths, causal, sliding_window
from pallas_kernels import backward_tuning, flash_backward
from pallas_kernels.contracts import BackwardConfig, WalkConfig

pytestmark = pytest.mark.skipif(compat.JAX_VERSION < (0, 11, 2), reason="Mosaic's interpreter and the kernels need jax 0.11.2")

rng = np.random.default_rng(11)
OTHER = WalkConfig(warpgroups=1)
SPLIT = BackwardConfig(dq=OTHER, dkv=None, dk=OTHER, dv=OTHER)
WIDE = WalkConfig(block_k=128, masks_all=True, half=True)
WIDER = BackwardConfig(dq=WIDE, dkv=WIDE, dk=WIDE, dv=WIDE)

FUSE = WalkConfig(**backward_tuning.FUSED)  # adds to dq in any order: not the same bits each time
FUSED = dataclasses.replace(WIDER, fused=FUSE)
FUSED_WIDE = dataclasses.replace(WIDER, fused=dataclasses.replace(FUSE, block_k=128, plain=False, half=True))
FUSED_THREE = dataclasses.replace(WIDER, fused=dataclasses.replace(FUSE, stages=3))

THREE_TILES = dataclasses.replace(WalkConfig(), row_tiles=3)
SEVERAL = BackwardConfig(dq=THREE_TILES, dkv=THREE_TILES, dk=THREE_TILES, dv=THREE_TILES)
BRIEF = dataclasses.replace(SEVERAL, dkv=dataclasses.replace(THREE_TILES, plain=True, brief=1))
TWO = dataclasses.replace(WIDE, split=2)
DIVIDED = BackwardConfig(dq=WIDE, dkv=TWO, dk=TWO, dv=TWO)
IN_ROLES = WalkConfig(roles=True, plain=True, half=True)
ROLES = dataclasses.replace(WIDER, dkv=IN_ROLES, dq=WalkConfig(early=True, brief=1, half=True))
ROLES_WIDE = dataclasses.replace(WIDER, dkv=WalkConfig(roles=True, stages=3, split=2))
ROLES_SEVERAL = dataclasses.replace(WIDER, dkv=dataclasses.replace(IN_ROLES, row_tiles=3))
ROLES_ONE_TILE = dataclasses.replace(WIDER, dkv=dataclasses.replace(IN_ROLES, row_tiles=3, half=False, buffers=1))


TUNED = "tuned"


def usual(problem, *, mask, keep, p):
    """The tuned configuration of a call of these lengths whose heads fill the chip, one row tile a program; `TUNED` is that of the
    few heads which the tests have."""
    (_, Hq, L, E), (_, H, S, Ev) = problem.query.shape, problem.value.shape
    found = flash_backward.chosen(
        heads=10**4 * Hq, group=Hq // H, query_len=L, key_len=S, head_dim=E, value_head_dim=Ev, mask=mask, bias=None,
        keep=keep, drops=p > 0, capped=problem.softcap is not None, deterministic=True,
    )  # fmt: skip
    return BackwardConfig(**{name: one and dataclasses.replace(one, row_tiles=1) for name, one in vars(found).items()})


def kernels(
    problem, *, dtype=jnp.bfloat16, layout="BHLE", mask=None, key=None, p=0.0, keep=None, config=None, interpret=True,
    wants=flash_backward.WANTS, traced_scale=False,
):  # fmt: skip
    """(the compiled-to-be function, its arguments) of a Problem whose arrays are (B, H, length, dim)."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    B, Hq, _, E = problem.query.shape
    swap = (lambda x: jnp.swapaxes(x, 1, 2)) if layout == "BLHE" else (lambda x: x)
    answer = solve(problem)
    arrays = [problem.query, problem.key, problem.value, problem.dout, np.asarray(answer["out"]).astype(np.float32)]
    q, k, v, dout, out = (swap(jnp.asarray(x).astype(dtype)) for x in arrays)
    lse = jnp.asarray(np.asarray(answer["lse"]).astype(np.float32))
    dlse = None if problem.dlse is None else jnp.asarray(problem.dlse, jnp.float32)
    scale = E**-0.5 if problem.scale is None else float(problem.scale)
    more = {
        "mask": None if mask is None else mask.with_batch((B,)),
        "keep": None if keep is None else jnp.asarray(keep),
        "seeds": dropout.seeds(key, B, Hq) if p else None,
        "scale": jnp.full(1, scale, jnp.float32) if traced_scale else None,
    }
    if config is None:
        config = usual(problem, mask=more["mask"], keep=more["keep"], p=p)

    def run(q, k, v, dout, out, lse, dlse, more):
        more = {**more, "scale": scale if more["scale"] is None else more["scale"]}
        delta = flash_backward.row_deltas(out, dout, dlse, 1 if layout == "BHLE" else 2)
        found = flash_backward.backward(
            q, k, v, dout, lse, delta, layout=layout, softcap=problem.softcap, dropout_p=p, generator=dropout, wants=wants,
            config=None if config == TUNED else config, interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None, **more,
        )  # fmt: skip
        return {name: swap(x) for name, x in found.items()}

    return run, (q, k, v, dout, out, lse, dlse, more)


def on_kernels(problem, *, times=1, **options):
    """{'query', 'key', 'value'}; with `times`, the same call so often, and the same bits each time."""
    run, args = kernels(problem, **options)
    return {name: np.asarray(x) for name, x in assert_same_bits(run, args, times - 1).items()}


def hold(problem, got):
    """Against the oracle; it wants to see the dtype in an 'out'."""
    check(problem, {"out": next(iter(got.values())), **got}, names=tuple(got))


def of_forward(name):
    """A case of the forward's tests, less what only the forward takes: its configuration, and keys that are no numbers where nobody
    sees them, which `Flash` clears before it comes to the backward kernels (test_flash has them)."""

    def build():
        problem, options = (FORWARD | LONG)[name]()
        return problem, {name: x for name, x in options.items() if name not in ("config", "poison")}

    return build


OWN = {
    "few programs, one warpgroup in each": lambda: (
        make(136, 200, B=1, Hq=2, Hk=1, E=64, keep=band(136, 200, -1, 0, 64)), {"mask": causal(64), "config": TUNED}
    ),
    "nobody loads, grouped": lambda: (
        make(56, 64, B=2, Hq=4, Hk=1, E=64, keep=lengths(56, 64, [64, 0]), dlse=True),
        {"mask": KeyLengths(jnp.array([64, 0])), "config": TUNED, "layout": "BLHE"},
    ),
    "nobody loads, several tiles, causal, dropout": lambda: (
        make(120, 128, B=1, Hq=2, E=128, keep=band(120, 128, -1, 0), survivors=dropped(jax.random.key(1), 1, 2, 120, 128, 0.3)),
        {"mask": causal(), "config": TUNED, "key": jax.random.key(1), "p": 0.3},
    ),
    "nobody loads, three tiles, dq": lambda: (make(72, 192, B=1, Hq=1, E=64), {"config": TUNED}),
    "nobody loads, a dense mask": lambda: (
        make(72, 120, B=1, Hq=2, Hk=1, E=64, Ev=40, keep=(keep := rng.random((1, 2, 72, 120)) < 0.4)), {"keep": keep, "config": TUNED}
    ),
    "all keys in one tile, lse's cotangent": lambda: (make(136, 72, B=1, Hq=2, E=64, dlse=True), {}),
    "three query heads a group, causal": lambda: (
        make(200, 264, B=1, Hq=3, Hk=1, E=64, keep=band(200, 264, -1, 0, 64)), {"mask": causal(64), "layout": "BLHE"}
    ),
    "causal, whole tiles": lambda: (make(256, 256, B=1, Hq=2, E=64, keep=band(256, 256, -1, 0)), {"mask": causal()}),
    "causal, whole tiles of 128": lambda: (make(192, 192, B=1, Hq=1, E=128, keep=band(192, 192, -1, 0)), {"mask": causal(), "config": SEVERAL}),
    "causal, whole tiles, a share for each head, dropout": lambda: (
        make(
            256, 256, B=1, Hq=2, Hk=1, E=64, keep=band(256, 256, -1, 0), survivors=dropped(jax.random.key(1), 1, 2, 256, 256, 0.3)
        ),
        {"mask": causal(), "config": DIVIDED, "key": jax.random.key(1), "p": 0.3},
    ),
    "a window longer than the call": lambda: (
        make(256, 320, B=1, Hq=1, E=64, keep=band(256, 320, 400, 0, 64)), {"mask": sliding_window(400, 0, 64), "config": WIDER}
    ),
    "keys that no query sees": lambda: (make(72, 392, B=1, Hq=1, E=64, keep=band(72, 392, -1, 0)), {"mask": causal()}),
    "dropout in groups, window, lengths": lambda: (
        make(
            136, 200, B=2, Hq=4, Hk=2, E=64, keep=band(136, 200, 70, 3, 40) & lengths(136, 200, [180, 0]),
            survivors=dropped(jax.random.key(1), 2, 4, 136, 200, 0.3), dlse=True,
        ),
        {"mask": sliding_window(70, 3, 40) & KeyLengths(jnp.array([180, 0])), "key": jax.random.key(1), "p": 0.3},
    ),
    "dropout of everything": lambda: (
        make(72, 72, B=1, Hq=1, E=64, survivors=dropped(jax.random.key(1), 1, 1, 72, 72, 1.0), dlse=True),
        {"key": jax.random.key(1), "p": 1.0},
    ),
    "one after the other": lambda: (
        make(136, 136, B=1, Hq=2, Hk=1, E=128, Ev=64, keep=band(136, 136, -1, 0)), {"mask": causal(), "config": SPLIT}
    ),
    "wide tiles, half precision p": lambda: (
        make(200, 264, B=1, Hq=1, E=64, softcap=1.5, keep=band(200, 264, -1, 0)), {"mask": causal(), "config": WIDER}
    ),
    "fused, ragged, scores far below 0": lambda: (
        make(136, 200, B=1, Hq=2, Hk=1, E=128, scale=40.0, keep=band(136, 200, -1, 0, 64), dlse=True), {"mask": causal(64), "config": FUSED}
    ),
    "fused, E 64, BLHE, a window": lambda: (
        make(264, 136, B=1, Hq=2, E=64, keep=band(264, 136, 70, 3, -20)),
        {"mask": sliding_window(70, 3, -20), "config": FUSED, "layout": "BLHE"},
    ),
    "fused, dropout, lengths, E 56, Ev 40": lambda: (
        make(
            136, 200, B=2, Hq=2, E=56, Ev=40, keep=lengths(136, 200, [180, 0]),
            survivors=dropped(jax.random.key(1), 2, 2, 136, 200, 0.3),
        ),
        {"mask": KeyLengths(jnp.array([180, 0])), "key": jax.random.key(1), "p": 0.3, "config": FUSED},
    ),
    "fused, dense mask of each head, softcap": lambda: (
        make(136, 136, B=1, Hq=2, Hk=1, E=128, keep=(keep := rng.random((1, 2, 136, 136)) < 0.4), softcap=2.0),
        {"keep": keep, "config": FUSED},
    ),
    "fused, softcap and dropout, causal, hardly any slope": lambda: (
        make(
            136, 200, B=1, Hq=2, E=64, softcap=0.4, scale=2.0, keep=band(136, 200, -1, 0, -20),
            survivors=dropped(jax.random.key(1), 1, 2, 136, 200, 0.3), dlse=True,
        ),
        {"mask": causal(-20), "key": jax.random.key(1), "p": 0.3, "config": FUSED},
    ),
    "softcap, a window, empty rows, E 128": lambda: (
        make(136, 200, B=1, Hq=2, Hk=1, E=128, softcap=3.0, scale=0.9, keep=band(136, 200, 70, 3, -20)),
        {"mask": sliding_window(70, 3, -20)},
    ),
    "softcap, a window, E 192": lambda: (
        make(136, 200, B=1, Hq=1, E=192, softcap=3.0, scale=0.9, keep=band(136, 200, 70, 3, 40)), {"mask": sliding_window(70, 3, 40)}
    ),
    "a group of three divided between two programs": lambda: (
        make(136, 200, B=1, Hq=6, Hk=2, E=64, keep=band(136, 200, -1, 0, 64)), {"mask": causal(64), "config": DIVIDED, "layout": "BLHE"}
    ),
    "a group divided under a dense mask of each head": lambda: (
        make(136, 136, B=1, Hq=3, Hk=1, E=64, keep=(keep := rng.random((1, 3, 136, 136)) < 0.4)), {"keep": keep, "config": DIVIDED}
    ),
    "fused, wide query tiles, grouped, causal": lambda: (
        make(136, 392, B=1, Hq=4, Hk=2, E=64, keep=band(136, 392, -1, 0, 200)), {"mask": causal(200), "config": FUSED_WIDE}
    ),
    "fused, fewer queries than stages": lambda: (make(40, 136, B=1, Hq=1, E=64), {"config": FUSED_THREE}),
    "several row tiles a program, grouped": lambda: (make(264, 200, B=2, Hq=4, Hk=2, E=64), {"config": SEVERAL}),
    "several row tiles a program, causal, (B, L, H, E)": lambda: (
        make(392, 264, B=1, Hq=2, E=64, keep=band(392, 264, -1, 0)), {"mask": causal(), "config": SEVERAL, "layout": "BLHE"}
    ),
    "roles, ragged, causal, grouped, lse's cotangent": lambda: (
        make(264, 136, B=1, Hq=2, Hk=1, E=64, keep=band(264, 136, -1, 0, -20), dlse=True), {"mask": causal(-20), "config": ROLES}
    ),
    "roles, softcap and dropout, p in float32, a divided group, lengths": lambda: (
        make(
            136, 200, B=2, Hq=3, Hk=1, E=64, softcap=1.5, keep=lengths(136, 200, [180, 0]),
            survivors=dropped(jax.random.key(1), 2, 3, 136, 200, 0.3),
        ),
        {"mask": KeyLengths(jnp.array([180, 0])), "key": jax.random.key(1), "p": 0.3, "config": ROLES_WIDE, "layout": "BLHE"},
    ),
    "roles, several key tiles a program, a dense mask of each head": lambda: (
        make(136, 264, B=1, Hq=2, Hk=1, E=64, keep=(keep := rng.random((1, 2, 136, 264)) < 0.4)),
        {"keep": keep, "config": ROLES_SEVERAL},
    ),
    "roles, several key tiles a program, one tile of p, grouped, causal": lambda: (
        make(136, 264, B=1, Hq=2, Hk=1, E=64, keep=band(136, 264, -1, 0, 130)), {"mask": causal(130), "config": ROLES_ONE_TILE}
    ),
    "roles, E 192, scores far below 0, an early dq in float32": lambda: (
        make(72, 136, B=1, Hq=1, E=192, scale=20.0, keep=band(72, 136, 70, 3, 40)),
        {"mask": sliding_window(70, 3, 40), "config": dataclasses.replace(ROLES, dq=WalkConfig(early=True, masks_all=True))},
    ),
    "roles, one tile, E 256": lambda: (make(8, 16, B=1, Hq=1, E=256), {"config": ROLES}),
    "softcap, a traced negative scale": lambda: (
        make(72, 136, B=2, Hq=1, E=64, softcap=1.5, scale=-0.3), {"traced_scale": True}
    ),
    "fused, softcap, a traced negative scale": lambda: (
        make(72, 136, B=2, Hq=1, E=64, softcap=1.5, scale=-0.3), {"traced_scale": True, "config": FUSED}
    ),
    "a tiny softcap, E 128": lambda: (make(72, 136, B=1, Hq=1, E=128, softcap=1e-3, scale=1e-3), {}),
    "several key tiles a program, one of dO, causal, dropout": lambda: (
        make(
            264, 264, B=1, Hq=2, E=128, keep=band(264, 264, -1, 0), survivors=dropped(jax.random.key(1), 1, 2, 264, 264, 0.3)
        ),
        {"mask": causal(), "key": jax.random.key(1), "p": 0.3, "config": BRIEF},
    ),
    "a traced negative scale": lambda: (make(72, 136, B=2, Hq=1, E=64, scale=-0.3), {"traced_scale": True}),
    "softcap and dropout": lambda: (
        make(72, 136, B=1, Hq=1, E=64, softcap=1.5, survivors=dropped(jax.random.key(1), 1, 1, 72, 136, 0.3)),
        {"key": jax.random.key(1), "p": 0.3},
    ),
}  # fmt: skip

TAKEN = [name for name in FORWARD if "bias" not in name]
QUICK = {
    "8 x 8", "block - 8 and + 8, (B, L, H, E), grouped", "causal, first rows empty", "lengths with starts, and traced offsets",
    "segments, packed, causal", "query lengths", "E 64, Ev 128, softcap, float16", "sinks, one of -inf, empty rows",
    "dense mask of each head, causal, several row tiles", "dense mask of queries, narrow", "E 256", "dropout, causal",
}  # fmt: skip
LONGEST = {
    "dropout in groups, window, lengths", "several row tiles a program, causal, (B, L, H, E)",
    "a group divided under a dense mask of each head",
}  # fmt: skip
CASES = OWN | {name: of_forward(name) for name in TAKEN}


assert not OWN.keys() & set(TAKEN), "one of the two would not run"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONGEST or (name in TAKEN and name not in QUICK) else []) for name in CASES]
)  # fmt: skip
def test_the_interpreted_kernels_give_the_oracles_gradients(name):
    problem, options = CASES[name]()
    problem = problem.rounded(options.get("dtype", jnp.bfloat16))
    hold(problem, on_kernels(problem, **options))


ON_A_GPU = {
    **CASES,
    **{name: of_forward(name) for name in LONG},
    "long, causal, 256": lambda: (make(520, 776, B=1, Hq=2, E=256, keep=band(520, 776, -1, 0)), {"mask": causal()}),
    "long, fused": lambda: (make(520, 776, B=1, Hq=2, Hk=1, E=128), {"config": FUSED_THREE}),
    "long, fused, causal": lambda: (
        make(1024, 1024, B=1, Hq=2, E=128, keep=band(1024, 1024, -1, 0)), {"mask": causal(), "config": FUSED}
    ),
    "long, fused, causal, 64": lambda: (
        make(1024, 1024, B=1, Hq=2, E=64, keep=band(1024, 1024, -1, 0)), {"mask": causal(), "config": FUSED}
    ),
    "long, dropout": lambda: (
        make(520, 776, B=1, Hq=2, Hk=1, E=128, survivors=dropped(jax.random.key(1), 1, 2, 520, 776, 0.1)),
        {"key": jax.random.key(1), "p": 0.1},
    ),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_A_GPU)
def test_the_compiled_kernels_give_the_oracles_gradients_and_the_same_bits(name):
    problem, options = ON_A_GPU[name]()
    problem = problem.rounded(options.get("dtype", jnp.bfloat16))
    config = options.get("config")
    fused = isinstance(config, BackwardConfig) and config.fused is not None  # adds to dq in any order
    hold(problem, on_kernels(problem, **options, interpret=False, times=1 if fused else 20))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["three query heads a group, causal", "dropout in groups, window, lengths", "long, causal"])
def test_the_same_bits_a_thousand_times(name):
    problem, options = ON_A_GPU[name]()
    run, args = kernels(problem.rounded(jnp.bfloat16), **options, interpret=False)
    assert_same_bits(run, args, 1000)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("E", [64, 128, 256])
def test_a_bias_gives_the_same_bits(E, dtype):
    """All SMs at work on long walks: small problems never showed that TMA overtook the loads of a bias (NOTES.md)."""
    q, k, v, dout = (jax.random.normal(key, (2, 8, 4096, E), jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4))
    bias = jax.random.normal(jax.random.key(1), (2, 8, 4096, 4096), dtype)

    def gradients(q, k, v, bias, dout):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out, back = jax.vjp(lambda q, k, v: scaled_dot_product_attention(q, k, v, bias), q, k, v)
        return out, *back(dout)

    assert_same_bits(jax.jit(gradients), (q, k, v, bias, dout), 100)


@pytest.mark.gpu
def test_the_same_bits_in_another_process():
    names = [f"backward: {name}" for name in ("three query heads a group, causal", "dropout in groups, window, lengths")]
    assert alone(*names) == alone(*names)


def test_every_configuration_fits_the_shared_memory():
    """All head dims, with dropout and without; what a kernel needs beside this count is small, and its lowering refuses more."""
    from pallas_kernels.tuning import SHARED_MEMORY

    for E in range(8, 257, 8):
        for Ev in range(8, 257, 8):
            for masked, drops, bias_bytes, capped in [
                (False, False, None, False),
                (True, False, None, True),
                (True, True, None, False),
                (True, True, 0, False),
                (False, False, 0, True),
                (True, True, 2, False),
                (False, True, 2, True),
                (False, False, 4, False),
            ]:
                facts = {"head_dim": E, "value_head_dim": Ev, "drops": drops, "capped": capped}
                facts |= {"biased": bias_bytes is not None, "bias_bytes": bias_bytes or 0}
                summed = bias_bytes == 0
                # without a loading warpgroup; several row tiles a program; a fused kernel
                for length, group in ((64, 4), (64, 1), (128, 1), (512, 4), (8192, 4)):
                    lengths = {"heads": 16, "group": group, "query_len": length, "key_len": length}
                    own = {"masked": masked, "sloped": masked and not drops, "summed": summed, "deterministic": False}
                    config = backward_tuning.backward_config(**lengths, **facts, **own)
                    assert not (summed and (config.keys_together(E, Ev) or config.dk).half)
                    assert all(one is None or not one.alone or one.bias_stages == one.stages for one in vars(config).values())
                    for kernel in ("dq", "dkv", "dk", "dv", "fused"):
                        own = getattr(config, kernel)
                        assert own is None or backward_tuning.shared_bytes(kernel, own, **facts) <= SHARED_MEMORY, (kernel, E, Ev)


def test_a_share_of_a_group_must_fit_the_ring_and_a_fused_kernel_has_one_who_loads():
    alone = WalkConfig(alone=True, warpgroups=1, stages=1, ahead=0, bias_stages=1, split=2)
    own = BackwardConfig(dq=alone, dkv=alone, dk=alone, dv=alone)
    run, args = kernels(make(64, 64, B=1, Hq=3, Hk=1, E=64).rounded(jnp.bfloat16), config=own)
    with pytest.raises(ValueError, match="the rings hold all 2 tiles"):
        run(*args)
    with pytest.raises(ValueError, match="so it cannot be alone"):
        dataclasses.replace(own, fused=alone)


def test_a_fused_kernel_takes_one_row_tile():
    several = dataclasses.replace(FUSED, fused=dataclasses.replace(FUSE, row_tiles=2))
    run, args = kernels(make(72, 136, B=1, Hq=1, E=64).rounded(jnp.bfloat16), config=several)
    with pytest.raises(ValueError, match="one row tile and no bias, got row_tiles 2"):
        run(*args)


@pytest.mark.parametrize(("E", "Ev"), [(256, 256), (256, 240), (208, 208), (192, 192), (192, 128), (128, 128), (64, 64), (16, 256)])
def test_the_widest_calls_lower(E, Ev):
    problem = make(128, 128, B=1, Hq=1, E=E, Ev=Ev).rounded(jnp.bfloat16)
    run, args = kernels(problem, mask=causal(), key=jax.random.key(0), p=0.1, interpret=False)
    assert jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu_v2") >= 2


@pytest.mark.parametrize("wants", [("query",), ("key",), ("value",), ("query", "value")])
def test_what_nobody_asks_for_is_not_made(wants):
    problem = make(72, 136, B=1, Hq=1, E=64).rounded(jnp.bfloat16)
    run, args = kernels(problem, wants=wants, interpret=False)
    text = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == len(wants)
    got = on_kernels(problem, wants=wants)
    assert set(got) == set(wants)
    hold(problem, got)


@pytest.mark.parametrize("name", ["three query heads a group, causal", "dropout in groups, window, lengths", "E 256", "dense mask"])
def test_the_kernels_lower_for_cuda_also_with_x64(name):
    problem, options = CASES[name]()
    for x64 in (False, True):
        with jax.enable_x64(x64):
            run, args = kernels(problem, **options, interpret=False)
            text = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") >= 2


@pytest.mark.parametrize("of", [pytest.param("kernel", marks=pytest.mark.gpu), "XLA"])
@pytest.mark.parametrize("heads_axis", [1, 2])
@pytest.mark.parametrize(("shape", "dtype"), [((2, 3, 5, 2), "float16"), ((3, 1, 2, 1), "bfloat16"), ((1, 2, 1, 3), "bfloat16")])
def test_sums_in_the_registers_order_are_put_in_order(shape, dtype, heads_axis, of):
    """Thread 32 w + 4 g + c of a piece has the columns 8 n + 2 c and the next one of its rows 16 w + g and 16 w + g + 8."""
    from pallas_kernels.hopper_adding import in_order

    B, Hq, rows, columns = shape
    wanted = np.random.default_rng(0).standard_normal((B, Hq, 64 * rows, 64 * columns)).astype(np.float32)
    row, column = np.divmod(np.arange(64 * 64), 64)
    thread = 32 * (row // 16) + 4 * (row % 8) + column % 8 // 2
    sums = np.zeros((B, Hq, rows, columns, 8, 128, 4), np.float32)
    pieces = wanted.reshape(B, Hq, rows, 64, columns, 64).transpose(0, 1, 2, 4, 3, 5).reshape(B, Hq, rows, columns, -1)
    sums[..., column // 8, thread, 2 * (row // 8 % 2) + column % 2] = pieces
    factor = 0.25 if of == "kernel" else jnp.full((1, 1, 1, 1), 0.25)
    found = jax.jit(lambda sums: in_order(sums, factor, jnp.dtype(dtype), heads_axis))(sums)
    wanted = jnp.asarray(0.25 * wanted).astype(dtype)
    np.testing.assert_array_equal(found, wanted if heads_axis == 1 else jnp.swapaxes(wanted, 1, 2))


def test_a_factor_beyond_float32_is_infinite():
    from pallas_kernels.hopper_adding import put_in_order

    for factor, number in ((1e39, "7f800000"), (-0.5, "bf000000")):
        assert f"f31, 0f{number};" in put_in_order(2, 3, 1, 1, factor, "bf16")
