"""8 virtual devices: under plain jit, batch and heads stay sharded and nothing is gathered; in shard_map, both ways of checking."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import make
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_sdpa import dot_product_attention, dropout, scaled_dot_product_attention
from jax_sdpa.attention import sdpa_kernel
from jax_sdpa.attention.bias import KeyLengths, SegmentIds, causal

pytestmark = pytest.mark.skipif(len(jax.devices("cpu")) < 8, reason="needs 8 (virtual) CPU devices")

MOVES = ("all-gather", "all-to-all", "collective-permute", "all-reduce")


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices("cpu")[:8]).reshape(4, 2), ("batch", "heads"))


def collectives(compiled):
    return re.findall(rf"\b({'|'.join(MOVES)})(?:-start)?\(", compiled.as_text())


SPECS = {"batch": P("batch"), "heads": P(None, "heads"), "batch and heads": P("batch", "heads")}
CALLS = {
    "plain": {},
    "causal, grouped": {"Hk": 2, "mask": lambda L, S: causal()},
    "lengths": {"mask": lambda L, S: causal() & KeyLengths(jnp.array([S, 5, 0, 200]))},
    "segments": {
        "mask": lambda L, S: SegmentIds(jnp.arange(L) // 100 * jnp.ones((4, 1), int), jnp.arange(S) // 90 * jnp.ones((4, 1), int))
    },
    "dropout": {"dropout_p": 0.3},
    "long": {"L": 600, "S": 1100, "mask": lambda L, S: causal(500)},
}


SLOWER = [(name, sharded) for name in CALLS for sharded in ("batch", "heads") if name not in ("plain", "lengths")]


@pytest.mark.parametrize(
    ("name", "sharded"),
    [
        *((name, "batch and heads") for name in CALLS),
        *((name, sharded) for name in ("plain", "lengths") for sharded in ("batch", "heads")),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOWER),
    ],
)
def test_plain_jit_keeps_the_sharding_and_gathers_nothing(name, sharded, backend, mesh):
    options = dict(CALLS[name])
    L, S, Hk = options.pop("L", 130), options.pop("S", 270), options.pop("Hk", 4)
    mask = options.pop("mask", lambda L, S: None)(L, S)
    if "dropout_p" in options:
        options["dropout_rng"] = jax.random.key(0)
    problem = make(L, S, B=4, Hq=4, Hk=Hk)
    given = [jnp.asarray(x, jnp.float32) for x in (problem.query, problem.key, problem.value, problem.dout)]

    def step(q, k, v, dout):
        out, pullback = jax.vjp(lambda *a: scaled_dot_product_attention(*a, mask, enable_gqa=True, **options), q, k, v)
        return out, *pullback(dout)

    sharding = NamedSharding(mesh, SPECS[sharded])
    with sdpa_kernel(backend):
        wanted = jax.jit(step)(*given)
        placed = [jax.device_put(x, sharding) for x in given]
        compiled = jax.jit(step).lower(*placed).compile()
        got = compiled(*placed)
    assert not collectives(compiled), "forward and backward of sharded batch and heads need no communication"
    for x, y in zip(got, wanted, strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim), x.sharding
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_jaxs_layout_and_a_bias_gradient_that_must_be_summed(backend, mesh):
    """A bias that is shared by the batch: its gradient is one all-reduce, and still nothing is gathered."""
    problem = make(130, 270, B=4, Hq=4, Hk=2)
    q, k, v = (jnp.asarray(np.swapaxes(x, 1, 2), jnp.float32) for x in (problem.query, problem.key, problem.value))
    bias = jnp.asarray(np.random.default_rng(0).standard_normal((4, 1, 270)), jnp.float32)
    step = jax.value_and_grad(lambda q, k, v, b: jnp.sin(dot_product_attention(q, k, v, b, is_causal=True)).sum(), (0, 1, 2, 3))
    sharding = NamedSharding(mesh, P("batch", None, "heads"))
    with sdpa_kernel(backend):
        wanted = jax.jit(step)(q, k, v, bias)
        placed = [jax.device_put(x, sharding) for x in (q, k, v)] + [jax.device_put(bias, NamedSharding(mesh, P("heads")))]
        compiled = jax.jit(step).lower(*placed).compile()
        got = compiled(*placed)
    assert set(collectives(compiled)) == {"all-reduce"}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-5), got, wanted)
    assert got[1][0].sharding.is_equivalent_to(sharding, 4)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma, backend, mesh):
    """Manual axes: values, and gradients of sharded and of replicated operands (whose cotangents are summed over the mesh)."""
    problem = make(9, 12, B=4, Hq=4)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (problem.query, problem.key, problem.value))
    bias, stops = jnp.asarray(np.random.default_rng(0).standard_normal((1, 12)), jnp.float32), jnp.array([12, 3, 0, 7])

    def attend(q, k, v, bias, stops):
        return scaled_dot_product_attention(q, k, v, KeyLengths(stops) & causal() & bias)

    spec = P("batch", "heads")
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=(spec, spec, spec, P(), P("batch")), out_specs=spec, check_vma=check_vma)

    def loss(f):
        return jax.jit(jax.value_and_grad(lambda *a: jnp.sin(f(*a, stops)).sum(), (0, 1, 2, 3)))

    with sdpa_kernel(backend):
        got, wanted = loss(mapped)(q, k, v, bias), loss(attend)(q, k, v, bias)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-5), got, wanted)


@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_and_jvp_inside_of_shard_map(check_vma, backend, mesh):
    problem = make(9, 12, B=4, Hq=4)
    q, k = (jnp.asarray(x, jnp.float32) for x in (problem.query, problem.key))

    def inside(q, k):
        def f(q, k):
            return jnp.sin(scaled_dot_product_attention(q, k, k, causal())).sum()

        return jax.grad(f)(q, k), jax.jvp(lambda q: scaled_dot_product_attention(q, k, k), (q,), (q,))[1]

    spec = P("batch", "heads")
    with sdpa_kernel(backend):
        got = jax.jit(jax.shard_map(inside, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=check_vma))(q, k)
        wanted = jax.jit(inside)(q, k)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-5), got, wanted)


def test_dropout_bits_do_not_hang_on_the_sharding(backend, mesh):
    q = jnp.asarray(make(40, 40, B=4, Hq=4).query, jnp.float32)
    eye = jnp.broadcast_to(jnp.eye(40), (4, 4, 40, 40))
    f = jax.jit(lambda q, v: scaled_dot_product_attention(q, q, v, dropout_p=0.5, dropout_rng=jax.random.key(3)) == 0)
    with sdpa_kernel(backend):
        wanted = f(q, eye)
        for spec in SPECS.values():
            sharding = NamedSharding(mesh, spec)
            np.testing.assert_array_equal(f(jax.device_put(q, sharding), jax.device_put(eye, sharding)), wanted)


def test_a_mesh_in_context_with_explicit_axes(backend):
    """Sharding in types: the output is typed as the query is."""
    from jax.sharding import AxisType

    mesh = jax.make_mesh((4, 2), ("batch", "heads"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices("cpu")[:8])
    q = jnp.asarray(make(9, 9, B=4, Hq=4).query, jnp.float32)
    with sdpa_kernel(backend), jax.set_mesh(mesh):
        placed = jax.device_put(q, NamedSharding(mesh, P("batch", "heads")))
        f = jax.jit(jax.value_and_grad(lambda q: jnp.sin(scaled_dot_product_attention(q, q, q, is_causal=True)).sum()))
        got = f(placed)
    with sdpa_kernel(backend):
        wanted = f(q)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-5, atol=2e-5), got, wanted)


MESHES = {"(8)": ((8,), ("b",)), "(2, 4)": ((2, 4), ("b", "h")), "(2, 2, 2)": ((2, 2, 2), ("b", "h", "g"))}


def on(shape, names, kind=None):
    from jax.sharding import AxisType

    devices = jax.devices("cpu")[:8]
    return jax.make_mesh(shape, names, axis_types=((kind or AxisType.Auto),) * len(names), devices=devices)


def grouped(q, k):
    """Value and gradients of a call with 8 query heads and 2 key/value heads, and dropout."""

    def loss(q, k):
        out = scaled_dot_product_attention(
            q, k, k, is_causal=True, enable_gqa=True, dropout_p=0.2, dropout_rng=jax.random.key(1)
        )  # fmt: skip
        return jnp.sin(out).sum()

    return jax.value_and_grad(loss, (0, 1))(q, k)


@pytest.mark.parametrize("explicit", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["automatic", "explicit"])
@pytest.mark.parametrize("name", MESHES)
def test_fewer_key_value_heads_than_devices_are_shared_and_query_heads_stay_divided(name, explicit, backend_of_layers):
    """Nothing is gathered: a device takes the one head that its queries attend with, and its cotangents are summed over the group."""
    from jax.sharding import AxisType

    problem = make(40, 40, B=8, Hq=8, Hk=2)
    q, k = (jnp.asarray(x, jnp.float32) for x in (problem.query, problem.key))
    mesh = on(*MESHES[name], AxisType.Explicit if explicit else None)
    specs = {"(8)": (P(None, "b"), P()), "(2, 4)": (P("b", "h"), P("b")), "(2, 2, 2)": (P("b", ("h", "g")), P("b", "h"))}[name]
    with sdpa_kernel(backend_of_layers):
        wanted = jax.jit(grouped)(q, k)
        with jax.set_mesh(mesh):
            placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip((q, k), specs, strict=True)]
            compiled = jax.jit(grouped).lower(*placed).compile()
            got = compiled(*placed)
    assert set(collectives(compiled)) <= {"all-reduce"}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-5, atol=2e-5), got, wanted)
    for gradient, spec in zip(got[1], specs, strict=True):
        assert gradient.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4), gradient.sharding


def test_vmap_hands_its_mesh_axis_to_the_primitive(backend):
    """Nothing else says that the mapped entries are divided: operands come whole, the result is divided by the named axis."""
    mesh, problem = on((2, 4), ("b", "h")), make(20, 20, B=(4, 2), Hq=8)
    q = jnp.asarray(problem.query, jnp.float32)
    call = lambda q: scaled_dot_product_attention(q, q, q, is_causal=True)  # noqa: E731
    with sdpa_kernel(backend):
        wanted = jax.jit(jax.vmap(call))(q)
        with jax.set_mesh(mesh):
            compiled = jax.jit(jax.vmap(call, spmd_axis_name="b")).lower(q).compile()
            unnamed = jax.jit(jax.vmap(call)).lower(q).compile()
            got = compiled(q)
    assert compiled.output_shardings.spec == P("b")
    assert unnamed.output_shardings.is_fully_replicated
    assert not collectives(compiled)
    np.testing.assert_allclose(got, wanted, atol=2e-5)


@pytest.mark.parametrize("known", ["set_mesh", "a shard_map's alone"])
def test_operands_without_a_mesh_in_a_program_for_several_devices(known, backend):
    """Nothing is divided, and nothing goes wrong: the mesh is known by `set_mesh`, or by no name that attention could see."""
    mesh, q = on((2, 4), ("b", "h")), jnp.asarray(make(20, 20, B=4, Hq=4).query, jnp.float32)

    def call(q):
        return scaled_dot_product_attention(q, q, q, is_causal=True)

    def beside(q):
        return call(q) + jax.shard_map(lambda x: 2 * x, mesh=mesh, in_specs=P("b"), out_specs=P("b"))(q)

    with sdpa_kernel(backend):
        wanted = jax.jit(call)(q)
        if known == "set_mesh":
            with jax.set_mesh(mesh):
                np.testing.assert_allclose(jax.jit(call)(q), wanted, atol=2e-5)
        else:
            np.testing.assert_allclose(jax.jit(beside)(q) - 2 * q, wanted, atol=2e-5)


@pytest.mark.parametrize("manual", [{"b", "h"}, {"b"}], ids=["manual", "partly manual"])
def test_dropout_in_a_shard_map_by_offsets(manual, backend_of_layers):
    """Values and gradients of the whole call, dropout's bits with them, by saying where each device's part begins."""
    mesh, problem = on((2, 4), ("b", "h")), make(20, 20, B=4, Hq=8)
    q, k = (jnp.asarray(x, jnp.float32) for x in (problem.query, problem.key))
    key = jax.random.key(4)

    def call(q, k, rng):
        return scaled_dot_product_attention(q, k, k, is_causal=True, dropout_p=0.4, dropout_rng=rng)

    def inside(q, k):
        place = {"batch": jax.lax.axis_index("b") * q.shape[0]}
        place |= {"head": jax.lax.axis_index("h") * q.shape[1]} if "h" in manual else {}
        return call(q, k, dropout.at(key, **place))

    spec = P("b", "h") if "h" in manual else P("b")
    mapped = jax.shard_map(inside, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=manual)

    def step(f):
        return jax.jit(jax.value_and_grad(lambda q, k: jnp.sin(f(q, k)).sum(), (0, 1)))

    with sdpa_kernel(backend_of_layers):
        got, wanted = step(mapped)(q, k), step(lambda q, k: call(q, k, key))(q, k)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-5), got, wanted)
