"""Context parallelism on 8 virtual devices: values, gradients and output shardings of one device, for every mask, method and mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_sdpa import dot_product_attention
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.attention.bias import KeyLengths, Packed, QueryLengths, SegmentIds, causal, causal_lower_right, sliding_window
from jax_sdpa.masks import Dense
from jax_sdpa.remat import save_attention
from jax_sdpa.sharding import context_parallel_attention, explain_context_parallel, from_zigzag, to_zigzag, visits
from jax_sdpa.sharding.zigzag import Order

pytestmark = pytest.mark.skipif(len(jax.devices("cpu")) < 8, reason="needs 8 (virtual) CPU devices")

rng = np.random.default_rng(0)
B, HQ, H, L, E, EV = 2, 4, 2, 64, 8, 12
MOVES = ("all-gather", "all-to-all", "collective-permute", "all-reduce", "reduce-scatter")


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def mesh_of(*shape):
    names = {1: ("s",), 2: ("b", "s"), 3: ("b", "h", "s")}[len(shape)]
    return Mesh(np.array(jax.devices("cpu")[: np.prod(shape)]).reshape(shape), names)


def collectives(compiled):
    return set(re.findall(rf"\b({'|'.join(MOVES)})(?:-start)?\(", compiled.as_text()))


def operands(S=L, dtype=jnp.float32):
    return {
        "query": normal(B, HQ, L, E, dtype=dtype), "key": normal(B, H, S, E, dtype=dtype), "value": normal(B, H, S, EV, dtype=dtype)
    }  # fmt: skip


def one_device(q, k, v, mask, bias=None, scale=None, sinks=None, **options):
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    out, lse = dot_product_attention(q, k, v, bias, mask, scale=scale, sinks=sinks, return_residual=True, **options)
    return jnp.swapaxes(out, 1, 2), jnp.swapaxes(lse, 1, 2)


def on_mesh(mesh, **where):
    """The same call over the axis "s" of a mesh, whose other axes divide batch and heads."""
    axes = {"batch_axis": "b" if "b" in mesh.axis_names else None, "head_axis": "h" if "h" in mesh.axis_names else None}

    def call(q, k, v, mask, bias=None, scale=None, sinks=None, **options):
        if bias is not None:
            mask = Dense(bias) if mask is None else mask & bias
        return context_parallel_attention(
            q, k, v, mask, mesh=mesh, axis_name="s", scale=scale, sinks=sinks, enable_gqa=True, return_residual=True,
            **{**axes, **where}, **options,
        )  # fmt: skip

    return call


def stepped(call, mask=None, dlse=True, **options):
    """out, lse and the cotangent of every operand that is given."""
    dout, cotangent = normal(B, HQ, L, EV), normal(B, HQ, L) if dlse else jnp.zeros((B, HQ, L))

    def attend(given):
        more = {name: given[name] for name in ("bias", "scale", "sinks") if name in given}
        return call(given["query"], given["key"], given["value"], mask, **more, **options)

    def step(given):
        (out, lse), pullback = jax.vjp(attend, given)
        return out, lse, pullback((dout.astype(out.dtype), cotangent.astype(lse.dtype)))[0]

    return step


def hold(got, wanted, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=2e-5, atol=atol), got, wanted)


def compare(backend, mesh, given, mask=None, where=None, **options):
    """The compiled program over the mesh, and its results after they have been held to one device's."""
    state = rng.bit_generator.state
    wanted = jax.jit(stepped(one_device, mask, **options))
    rng.bit_generator.state = state  # the same cotangents
    parallel = jax.jit(stepped(on_mesh(mesh, **(where or {})), mask, **options))
    with sdpa_kernel(backend):
        compiled = parallel.lower(given).compile()
        got = compiled(given)
        hold(got, wanted(given))
    return compiled, got


@pytest.mark.parametrize("shape", [(8,), (2, 4), (2, 2, 2)], ids=str)
def test_the_ring_is_one_devices_call_and_only_permutes(shape, backend):
    """Sequence, sequence and batch, all three: nothing but collective-permutes, results where the operands lie, the same bits twice."""
    mesh = mesh_of(*shape)
    given = operands()
    axes = [name if name in mesh.axis_names else None for name in ("b", "h", "s")]
    spec = NamedSharding(mesh, P(*axes))
    given = {name: jax.device_put(x, spec) for name, x in given.items()}
    compiled, (out, lse, grads) = compare(backend, mesh, given, causal(), {"method": "ring"})
    assert collectives(compiled) == {"collective-permute"}
    jax.tree.map(np.testing.assert_array_equal, compiled(given), (out, lse, grads))
    for x in (out, lse, *grads.values()):
        assert x.sharding.is_equivalent_to(spec, x.ndim), x.sharding


ids = np.sort(rng.integers(-1, 4, (B, L)), -1).astype(np.int32)
MASKS = {
    "none": (lambda: None, {}, {}),
    "window, both lengths": (
        lambda: sliding_window(19, 3) & KeyLengths(jnp.array([64, 21]), jnp.array([5, 0])) & QueryLengths(jnp.array([60, 64])), {}, {},
    ),
    "static lengths and a window": (lambda: sliding_window(7, 5) & KeyLengths(50) & QueryLengths(61, 3), {}, {}),
    "packed": (lambda: Packed(jnp.array([[0, 20, 41, 60], [3, 7, 50, L]]), right=0), {}, {}),
    "segments, dropout": (lambda: SegmentIds(jnp.asarray(ids)) & causal(), {}, {"dropout_p": 0.3, "dropout_rng": jax.random.key(5)}),
    "bias, sinks, scale, softcap": (
        causal, {"bias": (HQ, L, L), "sinks": (HQ,), "scale": ()}, {"softcap": 3.0},
    ),
    "bias of keys, bool mask": (
        lambda: Dense(jnp.asarray(np.random.default_rng(1).random((B, 1, L, L)) < 0.6)), {"bias": (B, 1, 1, L)}, {},
    ),
    "bias of queries, offsets": (lambda: causal(jnp.array([3, -20])), {"bias": (1, L, 1)}, {"dlse": False}),
}  # fmt: skip
METHODS = {
    "ring": {"method": "ring"},
    "zigzag": {"method": "ring", "order": "zigzag"},
    "all_to_all": {"method": "all_to_all"},
    "decode": {"method": "decode"},
}
FAST = {
    ("packed", "ring"), ("window, both lengths", "ring"), ("segments, dropout", "ring"), ("bias, sinks, scale, softcap", "ring"),
    ("bias, sinks, scale, softcap", "all_to_all"), ("window, both lengths", "decode"),
}  # fmt: skip


def zigzagged(given, mask, n):
    """The operands in the zig-zag order of n devices."""
    order = lambda x, axis: x if x.shape[axis] == 1 else to_zigzag(x, n, axis)  # noqa: E731
    lengths = {"query": (2,), "key": (2,), "value": (2,), "bias": (-2, -1)}
    found = {}
    for name, x in given.items():
        for axis in lengths.get(name, ()):
            x = order(x, axis)
        found[name] = x
    if mask is None:
        return found, None
    parts = [Dense(order(order(m.array, -2), -1)) if isinstance(m, Dense) else m for m in mask.parts(L, L)]
    parts = [
        m.local(lambda x: x, lambda x: order(x, -1), lambda x: order(x, -1)) if isinstance(m, SegmentIds) else m for m in parts
    ]
    mask = parts[0]
    for part in parts[1:]:
        mask = mask & part
    return found, mask


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(n, h, marks=[] if (n, h) in FAST else pytest.mark.slow)
        for n in MASKS
        for h in METHODS
        if (n, h) != ("packed", "zigzag")
    ],
)
def test_every_mask_by_every_method(name, how, backend_of_layers):
    """Values and gradients of every operand; for the zig-zag with every array in its order. 4 devices, the fast ones 2."""
    make, more, options = MASKS[name]
    given, mask = operands() | {n: normal(*shape) for n, shape in more.items()}, make()
    mesh = mesh_of(2 if (name, how) in FAST else 4)
    if how != "zigzag":
        compare(backend_of_layers, mesh, given, mask, METHODS[how], **options)
        return
    check_zigzag(backend_of_layers, mesh, given, mask, options)


def check_zigzag(backend, mesh, given, mask, options):
    n, options = mesh.shape["s"], {name: x for name, x in options.items() if name != "dlse"}
    dout, dlse = normal(B, HQ, L, EV), normal(B, HQ, L)

    def step(call, mask, order):
        def attend(given):
            more = {name: given[name] for name in ("bias", "scale", "sinks") if name in given}
            return call(given["query"], given["key"], given["value"], mask, **more, **options)

        def run(given):
            (out, lse), pullback = jax.vjp(attend, given)
            return out, lse, pullback((order(dout, -2), order(dlse, -1)))[0]

        return jax.jit(run)

    moved, moved_mask = zigzagged(given, mask, n)
    with sdpa_kernel(backend):
        out, lse, grads = step(on_mesh(mesh, **METHODS["zigzag"]), moved_mask, lambda x, axis: to_zigzag(x, n, axis))(moved)
        wanted_out, wanted_lse, wanted = step(one_device, mask, lambda x, axis: x)(given)
    hold((from_zigzag(out, n), from_zigzag(lse, n, -1)), (wanted_out, wanted_lse))
    hold(grads, zigzagged(wanted, None, n)[0])


def test_zigzag(backend_of_layers):
    """Causal, what the order is for."""
    check_zigzag(backend_of_layers, mesh_of(2, 4), operands(), causal(), {})


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ring", "all_to_all", "decode"])
@pytest.mark.parametrize("shape", [(8,), (2, 2, 2)], ids=str)
def test_every_method_on_every_mesh(shape, how, backend):
    """Four query heads on 8 devices are too few for all_to_all, which says so."""
    mesh, mask = mesh_of(*shape), SegmentIds(jnp.asarray(ids)) & causal()
    options = {"dropout_p": 0.3, "dropout_rng": jax.random.key(5)}
    if how == "all_to_all" and shape == (8,):
        with pytest.raises(ValueError, match="a multiple of 8 query heads, a device has 4"):
            compare(backend, mesh, operands(), mask, METHODS[how], **options)
        return
    compare(backend, mesh, operands(), mask, METHODS[how], **options)


def test_decode_over_a_sharded_cache_gathers_nothing_of_it(backend):
    """One query each, lengths moved; what travels has the size of out. Behind its length a cache may hold anything."""
    mesh = mesh_of(8)
    q, cache, lengths = normal(B, HQ, 1, E), normal(B, H, 256, E), jnp.array([256, 37])
    cache = cache.at[1, :, 37:].set(jnp.nan)
    placed = jax.device_put(cache, NamedSharding(mesh, P(None, None, "s")))

    def call(q, cache, lengths):
        return context_parallel_attention(
            q, cache, cache, KeyLengths(lengths), enable_gqa=True, mesh=mesh, axis_name="s", return_residual=True
        )

    with sdpa_kernel(backend):
        compiled = jax.jit(call).lower(q, placed, lengths).compile()
        hold(compiled(q, placed, lengths), jax.jit(lambda *a: one_device(a[0], a[1], a[1], KeyLengths(a[2])))(q, cache, lengths))
    assert collectives(compiled) == {"all-reduce"}
    moved = re.findall(r"= (.*?) all-reduce(?:-start)?\(", compiled.as_text())
    sizes = [np.prod([int(n) for n in dims.split(",")]) for text in moved for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    assert sizes
    assert max(sizes) <= B * HQ * E


def test_dropout_drops_the_same_weights_on_any_mesh(backend_of_layers):
    q, eye = normal(2, HQ, 40, E), jnp.broadcast_to(jnp.eye(40), (2, HQ, 40, 40))
    options = {"dropout_p": 0.5, "dropout_rng": jax.random.key(3)}
    kept = lambda call: jax.jit(lambda q, eye: call(q, q, eye, None, **options)[0] != 0)  # noqa: E731
    with sdpa_kernel(backend_of_layers):
        wanted = kept(one_device)(q, eye)
        for shape, how in (((4,), "ring"), ((8,), "decode")):
            np.testing.assert_array_equal(kept(on_mesh(mesh_of(*shape), **METHODS[how]))(q, eye), wanted)
        found = kept(on_mesh(mesh_of(2), **METHODS["zigzag"]))(to_zigzag(q, 2), to_zigzag(eye, 2))
        np.testing.assert_array_equal(from_zigzag(found, 2), wanted)
    assert 0.4 < wanted.mean() < 0.6


def test_a_row_of_minus_a_billion_keeps_its_softmax(backend_of_layers):
    """lse = -1e9 + log(S) has no place for the logarithm in float32. Its largest number is taken off a row of the bias first: what
    is left is the softmax of the scores, as in float64."""
    given = operands() | {"bias": jnp.full((1, L, L), -1e9).at[:, : L // 2].set(0.0)}
    step = lambda call: stepped(call, None, dlse=False)  # noqa: E731
    state = rng.bit_generator.state
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(x, jnp.float64) for name, x in given.items()}
        wanted = jax.jit(step(one_device))(wide)
    for how in ("ring", "decode"):
        rng.bit_generator.state = state
        with sdpa_kernel(backend_of_layers):
            out, lse, grads = jax.jit(step(on_mesh(mesh_of(2), **METHODS[how])))(given)
        hold((out, grads), (wanted[0], wanted[2]))
        np.testing.assert_allclose(lse, wanted[1], rtol=1e-6, atol=2e-5)


def test_float64_and_jaxs_layout():
    with jax.enable_x64(True):
        given = operands(dtype=jnp.float64)
        mesh = mesh_of(2)
        swap = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731

        def call(q, k, v):
            out, lse = context_parallel_attention(
                swap(q), swap(k), swap(v), is_causal=True, enable_gqa=True, mesh=mesh, axis_name="s", layout="BLHE", method="ring",
                return_residual=True,
            )  # fmt: skip
            return swap(out), lse

        step = lambda f: jax.jit(jax.value_and_grad(lambda *a: sum(jnp.sin(x).sum() for x in f(*a)), (0, 1, 2)))  # noqa: E731
        got, wanted = step(call)(*given.values()), step(lambda *a: one_device(*a, causal()))(*given.values())
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12), got, wanted)
    assert got[1][0].dtype == np.float64


def test_explicit_axes(backend_of_layers):
    """Batch and heads lie as the query's type says; results are typed by it too."""
    mesh = jax.make_mesh((2, 2, 2), ("b", "h", "s"), axis_types=(AxisType.Explicit,) * 3, devices=jax.devices("cpu")[:8])
    given = operands()

    def loss(f):
        return jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sin(f(q, k, v)).sum(), (0, 1, 2)))

    with sdpa_kernel(backend_of_layers):
        wanted = loss(lambda *a: one_device(*a, causal())[0])(*given.values())
        with jax.set_mesh(mesh):
            placed = [jax.device_put(x, NamedSharding(mesh, P("b", "h", "s"))) for x in given.values()]
            call = lambda q, k, v: context_parallel_attention(  # noqa: E731
                q, k, v, is_causal=True, enable_gqa=True, mesh=mesh, axis_name="s", method="ring"
            )
            got = loss(call)(*placed)
            assert jax.typeof(jax.jit(call)(*placed)).sharding.spec == P("b", "h", "s", None)
    hold(got, wanted)


def test_memory_falls_as_the_devices_grow():
    """Of one device: arguments, results and temporaries of forward and backward; 1/n of the sequence, and 1/n of all of it."""
    shape = (1, 8, 4096, 64)
    totals = []
    for n in (2, 8):
        mesh = mesh_of(n)
        q = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(None, None, "s")))

        def step(q, k, v, mesh=mesh):
            call = lambda *a: context_parallel_attention(*a, is_causal=True, mesh=mesh, axis_name="s", method="ring")  # noqa: E731
            out, pullback = jax.vjp(call, q, k, v)
            return pullback(out)

        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            found = jax.jit(step).lower(q, q, q).compile().memory_analysis()
        totals.append(found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes)
    bytes_of_q = 4 * np.prod(shape)
    assert totals[0] < 20 * bytes_of_q / 2
    assert totals[1] < 20 * bytes_of_q / 8


def test_the_zigzag_gives_every_device_the_same_work():
    """Counted in pieces of work, and asked of the mask: what it leaves EMPTY is not computed."""
    for n in (2, 4):
        work = {}
        for name in ("contiguous", "zigzag"):
            order, size = Order(name, n), 64 // (n if name == "contiguous" else 2 * n)
            per_device = [0] * n
            for device in range(n):
                for step in range(n):
                    for n_q in range(order.pieces):
                        for n_k in range(order.pieces):
                            q0, k0 = visits.Pair(order, n_q, n_k).starts(device, step, size, size)
                            case = visits.case_of((causal(),), q0, k0, size, size)
                            kept = causal().seen_from(q0, k0).materialise(size, size)
                            assert {None: not kept.any(), (): kept.all()}.get(case, kept.any() and not kept.all())
                            per_device[device] += int(kept.sum())
            work[name] = per_device
        assert len(set(work["zigzag"])) == 1, work
        assert work["contiguous"][-1] > 1.4 * np.mean(work["contiguous"])


def test_what_a_mask_leaves_empty_is_a_branch_of_its_own():
    """A window as long as a piece, on 8 devices: of the 8 visits two are computed, the others are the empty branch of a switch."""
    mesh, q = mesh_of(8), normal(1, 2, 128, 8)
    call = lambda q: context_parallel_attention(q, q, q, sliding_window(15, 0), mesh=mesh, axis_name="s", method="ring")  # noqa: E731
    jaxpr = str(jax.make_jaxpr(call)(q))
    assert jaxpr.count("sdpa_forward[") == 2 + 0  # the first visit, and that of the neighbour's keys inside of the loop
    assert "cond[" in jaxpr


@pytest.mark.parametrize("how", ["ring", "all_to_all", "decode"])
def test_saved_names_keep_the_forward_from_running_twice(how):
    mesh, q = mesh_of(2), normal(1, 2, 16, 8)
    call = lambda q: jnp.sin(context_parallel_attention(q, q, q, is_causal=True, mesh=mesh, axis_name="s", **METHODS[how])).sum()  # noqa: E731
    count = lambda f: str(jax.jit(jax.grad(f)).trace(q).jaxpr).count("sdpa_forward[")  # noqa: E731
    plain = count(call)
    assert plain >= 1
    assert count(jax.checkpoint(call, policy=save_attention)) == plain
    assert count(jax.checkpoint(call)) == 2 * plain
    hold(jax.jit(jax.grad(jax.checkpoint(call, policy=save_attention)))(q), jax.jit(jax.grad(call))(q))


@pytest.mark.parametrize("how", ["ring", "all_to_all", pytest.param("decode", marks=pytest.mark.slow)])
def test_second_derivatives_vmap_and_forward_mode(how):
    """vmap, and gradients of gradients, work for all; the ring refuses forward mode."""
    mesh, q = mesh_of(2), normal(3, 1, 2, 8, 4)

    def call(q):
        return context_parallel_attention(q, q, q, is_causal=True, mesh=mesh, axis_name="s", **METHODS[how])

    def one(q):
        return one_device(q, q, q, causal())[0]

    def gradient(f):
        return jax.grad(lambda q: jnp.sin(f(q)).sum())

    def twice(f):
        return jax.jit(jax.grad(lambda q: (gradient(f)(q) ** 2).sum()))

    hold(jax.jit(jax.vmap(gradient(call)))(q), jax.jit(jax.vmap(gradient(one)))(q))
    hold(twice(call)(q[0]), twice(one)(q[0]))
    if how == "ring":
        with pytest.raises(TypeError, match="custom_vjp"):
            jax.jvp(call, (q[0],), (q[0],))
        return
    along = lambda f: jax.jit(lambda q, dq: jax.jvp(f, (q,), (dq,)))  # noqa: E731
    hold(along(call)(q[0], q[1]), along(one)(q[0], q[1]))


def test_explain_says_which_and_why():
    mesh = mesh_of(8)
    q, kv = (jax.ShapeDtypeStruct((1, heads, 4096, 64), "bfloat16") for heads in (16, 4))
    where = {"mesh": mesh, "axis_name": "s", "device": "cpu"}
    plan = explain_context_parallel(q, kv, kv, is_causal=True, enable_gqa=True, **where)
    assert plan.method == "all_to_all"
    assert plan.choice.backend is SDPBackend.EFFICIENT_ATTENTION
    plan = explain_context_parallel(q, kv, kv, is_causal=True, enable_gqa=True, order="zigzag", **where)
    assert plan.method == "ring"
    assert plan.rejected["all_to_all"] == ["all_to_all needs the sequence in order, not in zig-zag: it needs no balance."]
    few = jax.ShapeDtypeStruct((1, 16, 1, 64), "bfloat16")
    plan = explain_context_parallel(few, kv, kv, KeyLengths(4000), enable_gqa=True, **where)
    assert plan.method == "decode"
    assert "The ring needs L to be a multiple of 8, got 1" in str(plan)
    odd = jax.ShapeDtypeStruct((1, 6, 4096, 64), "bfloat16")
    plan = explain_context_parallel(odd, odd, odd, mesh=mesh, axis_name="s", device="cuda:sm90", grad=True)
    assert plan.method == "ring"
    assert "all_to_all needs a multiple of 8 query heads, a device has 6." in str(plan)
    bias = jax.ShapeDtypeStruct((4096, 4096), "float32")
    assert explain_context_parallel(q, kv, kv, bias, enable_gqa=True, **where).method == "ring"


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"axis_name": "t"}, ValueError, "axis_name must be an axis of the mesh"),
        ({"mesh": 3}, TypeError, "mesh must be a jax.sharding.Mesh, got int"),
        ({"method": "tree"}, ValueError, "method must be None or one of"),
        ({"order": "random"}, ValueError, "order must be one of"),
        ({"layout": "LBHE"}, ValueError, "layout must be 'BHLE'"),
        ({"batch_axis": "s"}, ValueError, "batch_axis must name axes of the mesh"),
        ({"head_axis": "b"}, ValueError, "the query heads, 1, must be a multiple of the 2 devices"),
        (
            {"method": "all_to_all"},
            ValueError,
            "cannot run this call: all_to_all needs a multiple of 4 query heads, a device has 1",
        ),
        ({"query": normal(2, 1, 10, 4)}, ValueError, "The ring needs L to be a multiple of 4, got 10: pad it"),
        ({"query": normal(1, 2, 1, 8, 4)}, ValueError, "rank 4"),
        ({"query": normal(2, 1, 0, 4)}, ValueError, "no scores at all"),
        ({"is_causal": True, "attn_mask": causal()}, ValueError, "is_causal=True"),
        ({"attn_mask": causal_lower_right(3, 3)}, ValueError, "was made for lengths"),
        ({"dropout_p": 0.5}, ValueError, "needs a key"),
        (
            {"attn_mask": Packed(jnp.array([0, 4, 8])), "method": "ring", "order": "zigzag"},
            ValueError,
            "zig-zag takes no packed sequences",
        ),
    ],
)
def test_errors(change, error, match):
    q = normal(2, 1, 8, 4)
    call = {"query": q, "key": q, "value": q, "mesh": mesh_of(2, 4), "axis_name": "s", **change}
    with pytest.raises(error, match=match):
        context_parallel_attention(**call)


def test_zigzag_and_back():
    x = jnp.arange(48).reshape(2, 24)
    for n in (2, 3):
        np.testing.assert_array_equal(from_zigzag(to_zigzag(x, n, 1), n, 1), x)
    with pytest.raises(ValueError, match="a multiple of 10, got 24 at axis 1"):
        to_zigzag(x, 5, 1)
