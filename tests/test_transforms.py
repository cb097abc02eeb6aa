"""Every JAX transform through every backend: jit, vmap over any axes, both modes, higher derivatives, remat by name, scan, threads."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import make
from jax.test_util import check_grads

from jax_sdpa import dot_product_attention, scaled_dot_product_attention
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.attention.bias import KeyLengths, QueryLengths, SegmentIds, causal, causal_lower_right, sliding_window
from jax_sdpa.primitive import LSE_NAME, OUT_NAME

rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


sdpa = scaled_dot_product_attention
IDS = jnp.array([0, 0, 1, 1, -1])


def plain(q, k, v, bias=None, scale=None, sinks=None, keep=None):
    """The formula in three lines of jnp, for derivatives of any order: JAX's own are the reference. No empty rows."""
    scores = (1 / np.sqrt(q.shape[-1]) if scale is None else scale) * jnp.einsum("...hle,...hse->...hls", q, k, precision="highest")
    scores = jnp.where(True if keep is None else keep, scores + (0 if bias is None else bias), -jnp.inf)
    if sinks is None:
        return jnp.einsum("...hls,...hse->...hle", jax.nn.softmax(scores), v, precision="highest")
    scores = jnp.concatenate([scores, jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:-1], 1))], -1)
    return jnp.einsum("...hls,...hse->...hle", jax.nn.softmax(scores)[..., :-1], v, precision="highest")


def close(got, wanted, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol * max(1, float(jnp.abs(y).max(initial=0)))), got, wanted)


# --- derivatives


@pytest.mark.parametrize("mode", ["value and grad", "jvp", "grad of grad", "forward over reverse", "reverse over forward", "third"])
def test_derivatives_of_every_order(mode, backend):
    """In q, k, v, a float mask and a traced scale together, against JAX's own derivatives of the formula."""
    x = {"q": normal(1, 2, 3, 4), "k": normal(1, 2, 5, 4), "v": normal(1, 2, 5, 3), "bias": normal(2, 1, 5), "scale": normal()}
    dx, ddx = (jax.tree.map(lambda leaf: normal(*leaf.shape), x) for _ in range(2))
    keep = np.asarray(causal(2).materialise(3, 5))

    def ours(x):
        return jnp.sin(sdpa(x["q"], x["k"], x["v"], causal(2) & x["bias"], scale=x["scale"])).sum()

    def theirs(x):
        return jnp.sin(plain(x["q"], x["k"], x["v"], x["bias"], x["scale"], keep=keep)).sum()

    def along(f, d):
        return lambda x: jax.jvp(f, (x,), (d,))[1]

    transforms = {
        "value and grad": jax.value_and_grad,
        "jvp": lambda f: along(f, dx),
        "grad of grad": lambda f: jax.grad(
            lambda x: sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(jax.grad(f)(x)), jax.tree.leaves(dx), strict=True))
        ),
        "forward over reverse": lambda f: along(jax.grad(f), dx),
        "reverse over forward": lambda f: jax.grad(along(f, dx)),
        "third": lambda f: along(jax.grad(along(f, dx)), ddx),
    }
    with sdpa_kernel(backend):
        got = jax.jit(transforms[mode](ours))(x)
    close(got, jax.jit(transforms[mode](theirs))(x), atol=1e-4)


def test_hessian_and_jacobians(backend):
    q, k = normal(1, 1, 2, 3), normal(1, 1, 4, 3)
    f, g = (lambda q, a=a: jnp.sin(a(q, k, k)).sum() for a in (sdpa, plain))
    with sdpa_kernel(backend):
        for transform in (
            jax.hessian,
            lambda f: jax.jacfwd(jax.jacfwd(f)),
            lambda f: jax.jacrev(jax.jacrev(f)),
            lambda f: jax.jacrev(jax.jacfwd(f)),
        ):
            close(jax.jit(transform(f))(q), jax.jit(transform(g))(q), atol=1e-4)


MASKS = {
    "causal with an empty row": causal(-1),
    "window": sliding_window(1, 1),
    "lengths": KeyLengths(jnp.array([3, 0])),
    "segments with padding": SegmentIds(IDS[:4], IDS),
    "dense": np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]], bool),
}


SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in MASKS if name != "dense"]


@pytest.mark.parametrize("name", ["dense", *SLOWER])
def test_check_grads_to_second_order_in_float64(name, backend):
    """Finite differences, both modes, through out and lse, with empty rows in the masks."""
    with jax.enable_x64(True), sdpa_kernel(backend):
        q, k, v, sinks = (jnp.asarray(rng.standard_normal(shape)) for shape in ((2, 4, 2, 3), (2, 5, 1, 3), (2, 5, 1, 2), (2,)))
        mask = jnp.asarray(MASKS[name]) if isinstance(MASKS[name], np.ndarray) else MASKS[name]

        @jax.jit
        def f(q, k, v, sinks):
            out, lse = dot_product_attention(q, k, v, mask=mask, softcap=2.0, sinks=sinks, return_residual=True)
            return out, jnp.sin(lse)

        check_grads(f, (q, k, v, sinks), order=2, atol=1e-5, rtol=1e-5)


def test_second_derivatives_at_empty_rows_are_zero(backend):
    q, k, mask = normal(1, 1, 4, 3), normal(1, 1, 5, 3), jnp.asarray(MASKS["dense"])
    with sdpa_kernel(backend):
        hessian = jax.jit(jax.hessian(lambda q: jnp.sin(sdpa(q, k, k, mask)).sum()))(q)
    assert jnp.isfinite(hessian).all()
    assert not hessian[:, :, 1].any()
    assert hessian[:, :, 0].any()


def test_unneeded_gradients_and_integer_operands_cost_nothing(backend):
    """Differentiating in one operand asks for one cotangent."""
    q, k = normal(1, 2, 4, 8), normal(1, 2, 6, 8)
    with sdpa_kernel(backend):
        jaxpr = str(jax.make_jaxpr(jax.grad(lambda v: sdpa(q, k, v, KeyLengths(jnp.array([4]))).sum()))(k))
    assert "wrt=('value',)" in jaxpr
    assert jaxpr.count("sdpa_backward[") == 1
    assert "'query'" not in jaxpr


# --- vmap


def expected_vmap(f, in_axes, args, n):
    def take(x, axis, i):
        return x if axis is None else jax.tree.map(lambda leaf: jnp.take(leaf, i, axis), x)

    return [f(*(take(x, axis, i) for x, axis in zip(args, in_axes, strict=True))) for i in range(n)]


AXES = [
    (0, 0, 0, 0, 0),
    (None, 1, 1, None, None),
    (None, None, None, None, 0),
    (-1, None, 3, 1, 0),
    *(pytest.param(tuple(0 if i == one else None for i in range(5)), marks=pytest.mark.slow) for one in (0, 2, 3)),
]


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_vmap_over_any_axes_for_values_and_gradients(axes, backend):
    """A loop gives the same: operands q, k, v, a bias that is broadcast over the batch, lengths of a structured mask."""
    n, shapes = 3, [(2, 2, 4, 8), (2, 2, 5, 8), (2, 2, 5, 6), (2, 1, 5)]

    def place(shape, axis):
        return shape if axis is None else (*shape[: axis % 5], n, *shape[axis % 5 :]) if axis >= 0 else (*shape, n)

    args = [normal(*place(shape, axis)) for shape, axis in zip(shapes, axes[:4], strict=True)]
    args.append(jnp.array([[5, 2], [0, 4], [3, 3]]) if axes[4] == 0 else jnp.array([5, 2]))

    def f(q, k, v, bias, stops):
        def call(*floats):
            return jnp.sin(sdpa(*floats[:3], KeyLengths(stops) & causal(1) & floats[3]))

        out, pullback = jax.vjp(call, q, k, v, bias)
        return out, pullback(jnp.cos(out)), jax.jvp(call, (q, k, v, bias), (q, k, v, bias))[1]

    with sdpa_kernel(backend):
        got = jax.jit(jax.vmap(f, axes))(*args)
        one = jax.jit(f)
        wanted = expected_vmap(one, axes, args, n)
    close(got, jax.tree.map(lambda *leaves: jnp.stack(leaves), *wanted))


def test_vmap_of_vmap_out_axes_and_a_mapped_scale(backend):
    q, scale = normal(3, 2, 2, 4, 8), jnp.array([0.3, -1.0, 0.0])

    def call(q, s):
        return sdpa(q, q, q, scale=s)

    with sdpa_kernel(backend):
        inner = jax.vmap(call, (0, None), out_axes=1)
        got = jax.jit(jax.vmap(inner, (0, 0), out_axes=-1))(q, scale)
        for i in range(3):
            close(got[..., i], inner(q[i], scale[i]))
        gradient = jax.grad(lambda s: jnp.sin(jax.vmap(call)(q, s)).sum())(scale)
        close(gradient, jnp.stack([jax.grad(lambda s, i=i: jnp.sin(call(q[i], s)).sum())(scale[i]) for i in range(3)]))


def test_vmap_of_every_structured_mask(backend):
    q, k = normal(3, 1, 2, 4, 8), normal(3, 1, 2, 5, 8)
    masks = [
        sliding_window(1, 0, jnp.array([0, 1, -4])), KeyLengths(jnp.array([1, 5, 0]), jnp.array([0, 2, 0])) & QueryLengths(jnp.array([1, 0, 4])),
        SegmentIds(rng.integers(-1, 2, (3, 4)), rng.integers(-1, 2, (3, 5))),
    ]  # fmt: skip

    def call(q, k, mask):
        return jax.grad(lambda q, k: jnp.sin(sdpa(q, k, k, mask)).sum(), (0, 1))(q, k)

    with sdpa_kernel(backend):
        for mask in masks:
            mask = jax.tree.map(jnp.asarray, mask)
            got = jax.jit(jax.vmap(call))(q, k, mask)
            close(got, jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected_vmap(jax.jit(call), (0, 0, 0), (q, k, mask), 3)))


def test_vmap_over_sinks_and_lse_cotangent(backend):
    q, k, sinks = normal(2, 4, 2, 8), normal(3, 2, 5, 2, 8), normal(3, 2)

    def f(q, k, s):
        out, lse = dot_product_attention(q, k, k, sinks=s, softcap=1.0, return_residual=True)
        return jnp.sin(out).sum() + jnp.cos(lse).sum()

    g = jax.value_and_grad(f, (0, 1, 2))
    with sdpa_kernel(backend):
        got = jax.jit(jax.vmap(g, (None, 0, 0)))(q, k, sinks)
        close(got, jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected_vmap(jax.jit(g), (None, 0, 0), (q, k, sinks), 3)))


@pytest.mark.parametrize("keys_mapped", [True, False])
def test_dropout_under_vmap_is_dropout_of_each(keys_mapped, backend):
    """vmap(f)(x)[i] == f(x[i]): a mapped axis is no batch coordinate; the same key gives each entry the same mask."""
    q = normal(3, 2, 2, 9, 8)
    keys = jax.random.split(jax.random.key(0), 3) if keys_mapped else jax.random.key(0)

    def f(q, key):
        return sdpa(q, q, q, dropout_p=0.5, dropout_rng=key)

    g = jax.jit(lambda q, key: (f(q, key), jax.grad(lambda q: jnp.sin(f(q, key)).sum())(q)))
    axes = (0, 0 if keys_mapped else None)
    with sdpa_kernel(backend):
        got = jax.jit(jax.vmap(g, axes))(q, keys)
        wanted = [g(q[i], keys[i] if keys_mapped else keys) for i in range(3)]
    close(got, jax.tree.map(lambda *leaves: jnp.stack(leaves), *wanted), atol=1e-5)


def test_dropout_is_the_same_on_every_backend_and_in_backward():
    """A value of one-hot rows reads the probabilities off; dropped ones are exactly 0, and so are their gradients."""
    q, k, v = normal(2, 3, 33, 8), normal(2, 3, 40, 8), jnp.broadcast_to(jnp.eye(40), (2, 3, 40, 40))
    seen = []
    for backend in (SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION):
        with sdpa_kernel(backend):

            def f(v):
                return sdpa(q, k, v, dropout_p=0.4, dropout_rng=jax.random.key(7))

            out, pullback = jax.vjp(f, v)
            (dv,) = pullback(jnp.broadcast_to(jnp.eye(33, 40), out.shape))  # dv[s, l] = weights[l, s]
        seen.append(np.asarray(out == 0))
        np.testing.assert_array_equal(np.swapaxes(dv[..., :33], -1, -2) == 0, out == 0)
    np.testing.assert_array_equal(*seen)
    assert 0.3 < seen[0].mean() < 0.5


# --- control flow, remat, threads


def forwards(jaxpr):
    return str(jaxpr).count("sdpa_forward[")


def test_checkpoint_by_name_runs_the_forward_once(backend):
    q = normal(1, 2, 4, 8)

    def f(q):
        return jnp.sin(sdpa(q, q, q, is_causal=True)).sum()

    policy = jax.checkpoint_policies.save_only_these_names(OUT_NAME, LSE_NAME)
    with sdpa_kernel(backend):
        named, unnamed = jax.grad(jax.checkpoint(f, policy=policy)), jax.grad(jax.checkpoint(f))
        assert forwards(jax.make_jaxpr(jax.grad(f))(q)) == 1
        assert forwards(jax.jit(named).trace(q).jaxpr) == 1
        assert forwards(jax.jit(unnamed).trace(q).jaxpr) == 2
        for g in (named, unnamed):
            close(jax.jit(g)(q), jax.grad(f)(q))


def test_scan_while_and_cond(backend):
    q, w = normal(1, 2, 4, 8), normal(3, 8, 8) / 3

    def layers(q, w, loop):
        def body(x, w):
            return sdpa(x @ w, x, x, is_causal=True)

        if loop == "scan":
            return jax.lax.scan(lambda x, w: (body(x, w), None), q, w)[0]
        for i in range(3):
            q = jax.lax.cond(i >= 0, body, lambda x, w: x, q, w[i]) if loop == "cond" else body(q, w[i])
        return q

    with sdpa_kernel(backend):
        wanted, *others = (
            jax.jit(jax.value_and_grad(lambda q, w, l=l: jnp.sin(layers(q, w, l)).sum(), (0, 1)))(q, w)
            for l in ("", "scan", "cond")
        )
        for other in others:
            close(other, wanted)
        last = jax.jit(
            lambda q: jax.lax.fori_loop(0, jnp.asarray(2), lambda i, x: sdpa(x, x, x, KeyLengths(jnp.array([i + 2]))), q)
        )(q)
        two = sdpa(q, q, q, KeyLengths(jnp.array([2])))
        close(last, sdpa(two, two, two, KeyLengths(jnp.array([3]))))


def test_threads_compute_what_one_thread_does(backend):
    f = jax.jit(jax.value_and_grad(lambda q: jnp.sin(sdpa(q, q, q, is_causal=True)).sum()))
    inputs = [normal(1, 2, 4 + i % 2, 8) for i in range(8)]
    got = [None] * 8

    def work(i):
        with sdpa_kernel(backend):
            got[i] = f(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    with sdpa_kernel(backend):
        close(got, [f(x) for x in inputs])


def test_the_same_program_gives_the_same_bits(backend):
    """Gradients included, also of what is summed over the batch and the heads."""
    problem = make(70, 130, Hq=4, Hk=2)
    q, k, v, bias = (
        jnp.asarray(x, jnp.float32) for x in (problem.query, problem.key, problem.value, rng.standard_normal((1, 130)))
    )

    def f(q, k, v, b):
        return jnp.sin(sdpa(q, k, v, causal(60) & b, enable_gqa=True, dropout_p=0.2, dropout_rng=jax.random.key(1))).sum()

    with sdpa_kernel(backend):
        run = jax.jit(jax.value_and_grad(f, (0, 1, 2, 3)))
        first = run(q, k, v, bias)
        for _ in range(3):
            jax.tree.map(np.testing.assert_array_equal, run(q, k, v, bias), first)


def test_no_tracer_leaks_and_no_hidden_state(backend):
    q = normal(1, 2, 4, 8)
    with sdpa_kernel(backend), jax.checking_leaks():
        jax.jit(jax.grad(lambda q: sdpa(q, q, q, causal_lower_right(4, 4)).sum()))(q)


def test_strict_promotion_and_ranks(backend):
    """The switches by which careful programs forbid implicit promotion find nothing to complain about."""
    q, k, bias = normal(2, 4, 2, 8), normal(2, 5, 1, 8), normal(2, 4, 5)
    with sdpa_kernel(backend), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):

        def f(q, k, b):
            return dot_product_attention(q, k, k, b, KeyLengths(jnp.array([3, 5])) & causal(), sinks=normal(2), softcap=2.0)

        jax.jit(jax.grad(lambda *a: f(*a).sum(), (0, 1, 2)))(q, k, bias)
