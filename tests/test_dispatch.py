"""The choice of a backend: for devices that are not there, under `sdpa_kernel`, from threads, across jit; and how it fails."""

import re
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sdpa import NoViableBackendError, dot_product_attention, explain, scaled_dot_product_attention
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.attention.bias import KeyLengths, causal
from jax_sdpa.context import BACKENDS
from jax_sdpa.device import assume_device, parse
from jax_sdpa.dispatch import HEADINGS

MATH, FLASH, EFFICIENT, CUDNN = (
    SDPBackend.MATH,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
)
XLA = {MATH, EFFICIENT}
SMALL = jax.ShapeDtypeStruct((1, 2, 16, 8), jnp.float32)
LONG = jax.ShapeDtypeStruct((1, 8, 4096, 64), jnp.bfloat16)
Q = jnp.ones((1, 2, 5, 8))


def chosen_in(traced_or_lowered):
    """The backends that a program was lowered to, by the scopes that the primitives leave in its text."""
    text = traced_or_lowered.as_text(debug_info=True)
    return {SDPBackend[name.upper()] for name in re.findall(r"sdpa_(?:forward|backward|tangent)_(\w+?_attention|math)\b", text)}


def lowered(f, *args):
    return jax.jit(f).lower(*args)


# --- devices


@pytest.mark.parametrize("device", ["cpu", "tpu", "rocm", "cuda", "cuda:sm75", "cuda:sm90", "cuda:sm100", "cuda:sm90:cudnn91600"])
def test_explain_answers_for_devices_that_are_not_there(device):
    for shape in (SMALL, LONG):
        choice = explain(shape, shape, shape, is_causal=True, device=device)
        assert choice.backend in BACKENDS
        assert str(choice.device) == re.sub(":cudnn.*", "", device)
        assert set(choice.rejected) == set(BACKENDS) - {choice.backend}
        for reasons in choice.rejected.values():
            assert reasons
            assert all(isinstance(reason, str) and re.fullmatch(r"([A-Z]|cuDNN).*\.", reason, re.S) for reason in reasons)
        assert str(choice).startswith(f"{choice.device}: {choice.backend.name}")
        assert all(reason in str(choice) for reasons in choice.rejected.values() for reason in reasons)
        if not device.startswith("cuda"):
            assert choice.backend in XLA


def test_explain_takes_what_the_call_takes_and_runs_nothing():
    shape = jax.ShapeDtypeStruct((1, 64, 1 << 20, 128), jnp.bfloat16)  # 16 GB each
    grouped = jax.ShapeDtypeStruct((1, 8, 1 << 20, 128), jnp.bfloat16)
    mask = causal() & KeyLengths(jax.ShapeDtypeStruct((1,), jnp.int32))
    choice = explain(shape, grouped, grouped, mask, scale=jax.ShapeDtypeStruct((), jnp.float32), enable_gqa=True, device="cpu")
    assert choice.backend is EFFICIENT
    bias = jax.ShapeDtypeStruct((1, 8, 1, 4096), jnp.float32)
    swap = jax.ShapeDtypeStruct((1, 4096, 8, 64), jnp.bfloat16)
    assert (
        explain(
            swap, swap, swap, bias, call=dot_product_attention, softcap=3.0, return_residual=True, device="cpu", grad=True
        ).backend
        in XLA
    )
    assert explain(Q, Q, Q, dropout_p=0.5, dropout_rng=jax.random.key(0)).backend in XLA
    assert explain(Q, Q, Q).device.platform == {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())


def test_explain_says_why_flash_can_not_run():
    def why(device, shape=LONG):
        return " ".join(explain(shape, shape, shape, device=device).rejected[FLASH])

    assert "NVIDIA GPUs, the program is for cpu" in why("cpu")
    assert "Hopper GPUs (sm90), the program is for cuda:sm80" in why("cuda:sm80")
    assert "assume_device('cuda:sm90')" in why("cuda")
    assert "{Half, BFloat16}. Got float32" in why("cuda:sm90", SMALL)


def test_device_names():
    assert parse("cuda:sm100").architecture == (10, 0)
    assert parse("cuda:sm90:cudnn91600").cudnn == 91600
    assert not parse("cpu").real
    for wrong in ("gpu", "cuda:90", "sm90", "cuda:sm90:", ""):
        with pytest.raises(ValueError, match="device must be a name such as"):
            parse(wrong)
        with pytest.raises(ValueError, match="device must be a name such as"):
            explain(Q, Q, Q, device=wrong)
        with pytest.raises(ValueError, match="device must be a name such as"):
            assume_device(wrong)


def test_on_cpu_short_calls_and_long_calls_take_what_is_faster_and_memory_is_bounded():
    assert explain(LONG, LONG, LONG, device="cpu").backend is EFFICIENT
    for shape in ((64, 64, 512, 64), (1, 1, 65536, 8), (4096, 16, 64, 64), (1, 1, 8192, 64)):
        big = jax.ShapeDtypeStruct(shape, jnp.float32)
        if np.prod(shape[:3]) * shape[2] * 4 > 2**28:
            assert explain(big, big, big, device="cpu").backend is EFFICIENT, shape


def test_the_choice_never_looks_at_values():
    """Everything is decided for shapes: a NaN, an empty length or a full mask change nothing."""
    for mask in (KeyLengths(jnp.array([0])), KeyLengths(jnp.array([5]))):
        assert explain(Q * jnp.nan, Q, Q, mask) == explain(Q, Q, Q, mask)


# --- sdpa_kernel


def test_sdpa_kernel_restricts_nests_and_ends():
    def which():
        return explain(SMALL, SMALL, SMALL, device="cpu").backend

    default = which()
    with sdpa_kernel(EFFICIENT):
        assert which() is EFFICIENT
        with sdpa_kernel([MATH]):
            assert which() is MATH  # the inner one replaces the outer one
            with sdpa_kernel([EFFICIENT, MATH, EFFICIENT]):
                assert which() is default
        assert which() is EFFICIENT
        with pytest.raises(KeyError), sdpa_kernel(MATH):
            raise KeyError
        assert which() is EFFICIENT
    assert which() is default


def test_priorities():
    def which():
        return explain(SMALL, SMALL, SMALL, device="cpu").backend

    for order in ([MATH, EFFICIENT], [EFFICIENT, MATH]):
        with sdpa_kernel(order, set_priority=True):
            assert which() is order[0]
        with sdpa_kernel([FLASH, *order], set_priority=True):  # the first that can
            assert which() is order[0]
    with sdpa_kernel([MATH, EFFICIENT]):
        restricted = which()
    with sdpa_kernel([EFFICIENT, MATH]):
        assert which() is restricted  # without a priority the order means nothing


def test_sdpa_kernel_decorates():
    @sdpa_kernel(MATH)
    def decorated():
        return explain(SMALL, SMALL, SMALL, device="cpu").backend

    @sdpa_kernel([EFFICIENT])
    def other():
        return explain(SMALL, SMALL, SMALL, device="cpu").backend, decorated()

    for _ in range(2):
        assert decorated() is MATH
        assert other() == (EFFICIENT, MATH)


@pytest.mark.parametrize("wrong", [(MATH,), "math", 0, None, [0], ["MATH"], {MATH}])
def test_sdpa_kernel_wants_a_backend_or_a_list_of_them(wrong):
    with pytest.raises(TypeError, match="must be an instance of SDPBackend or a list of SDPBackend instances"), sdpa_kernel(wrong):
        pass


def test_backends_that_do_not_exist_here_are_never_viable():
    for backends in ([], [SDPBackend.OVERRIDEABLE], [SDPBackend.ERROR]):
        with (
            sdpa_kernel(backends),
            pytest.raises(NoViableBackendError, match="No viable backend for scaled_dot_product_attention was found"),
        ):
            scaled_dot_product_attention(Q, Q, Q)


def test_the_numbers_are_torchs():
    assert {backend.name: int(backend) for backend in SDPBackend} == {
        "ERROR": -1, "MATH": 0, "FLASH_ATTENTION": 1, "EFFICIENT_ATTENTION": 2, "CUDNN_ATTENTION": 3, "OVERRIDEABLE": 4,
    }  # fmt: skip


# --- the context and jit


def test_one_jitted_function_uses_the_right_backend_each_time():
    traces = []

    @jax.jit
    def f(q):
        traces.append(explain(q, q, q, device="cpu").backend)
        return scaled_dot_product_attention(q, q, q)

    for _ in range(2):
        f(Q)
        with sdpa_kernel(EFFICIENT):
            f(Q)
            assert chosen_in(f.lower(Q)) == {EFFICIENT}
        with sdpa_kernel(MATH):
            f(Q)
            assert chosen_in(f.lower(Q)) == {MATH}
    assert len(traces) == 3
    assert traces[1:] == [EFFICIENT, MATH]


def test_the_context_inside_the_jitted_function_holds_too():
    @jax.jit
    def f(q):
        with sdpa_kernel(EFFICIENT):
            first = scaled_dot_product_attention(q, q, q)
        with sdpa_kernel(MATH):
            return first, scaled_dot_product_attention(q, q, q)

    assert chosen_in(f.lower(Q)) == {EFFICIENT, MATH}


@pytest.mark.parametrize("wanted", [MATH, EFFICIENT], ids=lambda b: b.name)
def test_backward_runs_what_forward_chose_when_traced_outside_of_the_context(wanted):
    other = ({MATH, EFFICIENT} - {wanted}).pop()

    @sdpa_kernel(wanted)
    def forward(q):
        return scaled_dot_product_attention(q, q, q).sum()

    def step(q):
        with sdpa_kernel(other):
            out, pullback = jax.vjp(forward, q)
            return out, pullback(1.0)

    assert chosen_in(lowered(step, Q)) == {wanted}
    with sdpa_kernel(wanted):
        _, pullback = jax.vjp(lambda q: scaled_dot_product_attention(q, q, q), Q)
    assert chosen_in(lowered(pullback, Q)) == {wanted}
    with sdpa_kernel(wanted):
        _, pushforward = jax.linearize(lambda q: scaled_dot_product_attention(q, q, q), Q)
    assert chosen_in(lowered(pushforward, Q)) == {wanted}
    assert chosen_in(lowered(jax.grad(jax.checkpoint(forward)), Q)) == {wanted}


def test_threads_have_contexts_of_their_own():
    f = jax.jit(lambda q: scaled_dot_product_attention(q, q, q))
    wanted = [MATH, EFFICIENT] * 4
    got, start = [None] * len(wanted), threading.Barrier(len(wanted))

    def work(i):
        with sdpa_kernel(wanted[i]):
            start.wait()
            got[i] = chosen_in(f.lower(Q))
            np.asarray(f(Q))

    with sdpa_kernel([]):  # a context of this thread alone
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(wanted))]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert got == [{backend} for backend in wanted]


def test_one_trace_lowered_for_two_platforms_chooses_for_each():
    from jax import export

    exported = export.export(jax.jit(lambda q: scaled_dot_product_attention(q, q, q)), platforms=("cpu", "cuda"))(SMALL)
    assert exported.platforms == ("cpu", "cuda")
    with assume_device("cuda:sm90"):
        assert explain(SMALL, SMALL, SMALL).device.platform == jax.default_backend().replace("gpu", "cuda")


# --- no backend


def failure(backends, call, *args, **options):
    """(the NoViableBackendError, the warnings before it) of a call that none of the backends can run."""
    with sdpa_kernel(backends), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(NoViableBackendError) as error:
            call(*args, **options)
    assert all(warning.category is UserWarning for warning in caught)
    return error.value, [str(warning.message) for warning in caught]


def test_no_viable_backend_warns_for_each_enabled_one_and_raises_while_tracing():
    sdpa = scaled_dot_product_attention
    for trace in (sdpa, lambda *a: jax.eval_shape(sdpa, *a), lambda *a: jax.jit(sdpa).trace(*a)):
        error, (text,) = failure(FLASH, trace, Q, Q, Q)
        assert text.startswith(HEADINGS[FLASH])
        assert "Expected query, key and value to all be of dtype: {Half, BFloat16}. Got float32." in text
        assert isinstance(error, RuntimeError)
        assert str(error).startswith("No available kernel. Aborting execution.")
        assert all(reason in str(error) for reason in text.splitlines()[1:])


def test_headings_are_torchs():
    assert HEADINGS[FLASH] == "Flash attention kernel not used because:"
    assert HEADINGS[EFFICIENT] == "Memory efficient kernel not used because:"
    assert HEADINGS[CUDNN] == "cuDNN attention kernel not used because:"


def test_what_only_another_platform_could_run_fails_while_lowering():
    """cuDNN can run this on a Hopper, so tracing succeeds; lowered for this CPU it can't."""

    def call(q):
        return scaled_dot_product_attention(q, q, q, is_causal=True)

    with sdpa_kernel(CUDNN):
        assert explain(LONG, LONG, LONG, is_causal=True, device="cuda:sm90:cudnn91600").backend is CUDNN
        traced = jax.jit(call).trace(LONG)
        with pytest.warns(UserWarning, match=HEADINGS[CUDNN]), pytest.raises(NoViableBackendError, match="No available kernel"):
            traced.lower(lowering_platforms=("cpu",))


def test_two_enabled_backends_two_warnings():
    q = jnp.ones((2, 3, 5, 7))
    options = {"dropout_p": 0.1, "dropout_rng": jax.random.key(0)}
    error, texts = failure([FLASH, CUDNN], scaled_dot_product_attention, q, q, q, jnp.ones((5, 5)), **options)
    assert {text.splitlines()[0] for text in texts} == {HEADINGS[FLASH], HEADINGS[CUDNN]}
    assert all(reason in str(error) for text in texts for reason in text.splitlines()[1:])


def test_a_default_call_that_picks_another_backend_is_silent():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.jit(jax.grad(lambda q: scaled_dot_product_attention(q, q, q, is_causal=True).sum()))(Q)
        with sdpa_kernel([FLASH, CUDNN, MATH]):
            scaled_dot_product_attention(Q, Q, Q)
        explain(Q, Q, Q, device="cuda:sm80")
    assert not caught


@pytest.mark.parametrize("wrt", ["query", "bias"])
def test_explain_with_grad_asks_for_every_gradient(wrt):
    bias = jax.ShapeDtypeStruct((2, 16, 16), jnp.float32) if wrt == "bias" else None
    choice = explain(SMALL, SMALL, SMALL, bias, device="cpu", grad=True)
    assert choice.backend in XLA
