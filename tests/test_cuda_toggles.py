"""The mirror of torch.backends.cuda: switches that are global, part of jit's key, and weaker than a surrounding sdpa_kernel."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_sdpa
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.attention.bias import KeyLengths
from jax_sdpa.backends import cuda
from jax_sdpa.context import TOGGLES, Toggles

SWITCHES = {
    SDPBackend.FLASH_ATTENTION: (cuda.enable_flash_sdp, cuda.flash_sdp_enabled),
    SDPBackend.EFFICIENT_ATTENTION: (cuda.enable_mem_efficient_sdp, cuda.mem_efficient_sdp_enabled),
    SDPBackend.MATH: (cuda.enable_math_sdp, cuda.math_sdp_enabled),
    SDPBackend.CUDNN_ATTENTION: (cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled),
}
Q = jax.ShapeDtypeStruct((1, 2, 64, 64), "bfloat16")


@pytest.fixture(autouse=True)
def _as_at_the_start():
    yield
    TOGGLES.set_global(Toggles())


def _params(*, mask=None, dropout=0.0, causal=False, gqa=False, q=Q, k=Q):
    return cuda.SDPAParams(q, k, k, mask, dropout, causal, gqa)


@pytest.mark.parametrize("backend", SWITCHES, ids=lambda backend: backend.name)
def test_a_switch_turns_its_backend_and_no_other(backend):
    enable, enabled = SWITCHES[backend]
    assert all(on() for _, on in SWITCHES.values())
    enable(False)
    assert {other: on() for other, (_, on) in SWITCHES.items()} == {other: other is not backend for other in SWITCHES}
    assert "has been disabled" in jax_sdpa.explain(Q, Q, Q, device="cpu").rejected[backend][0]
    enable(True)
    assert enabled()


@pytest.mark.parametrize(
    "enable", [*(enable for enable, _ in SWITCHES.values()), cuda.allow_fp16_bf16_reduction_math_sdp], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("value", [1, "True", None, np.bool_(True)])
def test_only_a_bool_turns_a_switch(enable, value):
    with pytest.raises(TypeError, match=f"{enable.__name__} expects a bool, but got {type(value).__name__}"):
        enable(value)
    assert TOGGLES.value == Toggles()


def test_a_surrounding_sdpa_kernel_wins_in_its_thread():
    cuda.enable_math_sdp(False)
    with sdpa_kernel(SDPBackend.MATH):
        assert cuda.math_sdp_enabled()
        assert not cuda.flash_sdp_enabled()
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.extend((cuda.math_sdp_enabled(), cuda.flash_sdp_enabled())))
        thread.start()
        thread.join()
        assert elsewhere == [False, True]
        cuda.enable_math_sdp(True)  # does not leave with the context: the switch is global
    assert cuda.math_sdp_enabled()


def test_a_switch_is_part_of_jits_key():
    traced = []

    @jax.jit
    def call(q):
        traced.append(jax_sdpa.explain(q, q, q, device="cpu").backend)
        return jax_sdpa.scaled_dot_product_attention(q, q, q)

    q = jnp.ones((1, 1, 4, 8))
    first = call(q)
    cuda.enable_math_sdp(False)
    second = call(q)
    cuda.enable_math_sdp(True)
    call(q)
    assert traced == [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]
    np.testing.assert_allclose(first, second, rtol=1e-6)


def test_everything_off_is_an_error_that_says_so():
    for enable, _ in SWITCHES.values():
        enable(False)
    q = jnp.ones((1, 1, 4, 8))
    with pytest.raises(jax_sdpa.NoViableBackendError, match="turning off both the math kernel and the fused kernels"):
        jax_sdpa.scaled_dot_product_attention(q, q, q)


def test_math_may_be_allowed_low_precision():
    q = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 256, 64)), jnp.bfloat16)
    call = jax.jit(lambda q: jax_sdpa.scaled_dot_product_attention(q, q, q))
    with sdpa_kernel(SDPBackend.MATH):
        exact = call(q)
        cuda.allow_fp16_bf16_reduction_math_sdp(True)
        assert cuda.fp16_bf16_reduction_math_sdp_allowed()
        assert not np.array_equal(exact, call(q))
        cuda.allow_fp16_bf16_reduction_math_sdp(False)
        assert np.array_equal(exact, call(q))


def test_params_are_positional_as_in_torch():
    params = cuda.SDPAParams(1, 2, 3, 4, 5, 6, 7)
    names = ("query", "key", "value", "attn_mask", "dropout", "is_causal", "enable_gqa")
    assert tuple(getattr(params, name) for name in names) == (1, 2, 3, 4, 5, 6, 7)
    with pytest.raises(TypeError, match="positional"):
        cuda.SDPAParams(query=1, key=2, value=3, attn_mask=4, dropout=5, is_causal=6, enable_gqa=7)
    with pytest.raises(TypeError, match="params must be an SDPAParams, got tuple"):
        cuda.can_use_flash_attention((Q, Q, Q))


@pytest.mark.parametrize(
    "params",
    [
        _params(),
        _params(causal=True),
        _params(dropout=0.1),
        _params(mask=jnp.ones((64, 64), bool)),
        _params(mask=KeyLengths(jnp.array([3]))),
        _params(gqa=True, q=jax.ShapeDtypeStruct((1, 8, 64, 64), "float32"), k=jax.ShapeDtypeStruct((1, 2, 64, 64), "float32")),
    ],
    ids=["plain", "causal", "dropout", "dense", "structured", "grouped"],
)
def test_efficient_can_run_everything(params):
    assert cuda.can_use_efficient_attention(params, True)  # a warning would be an error here


@pytest.mark.parametrize(
    ("can_use", "enable", "heading", "sentence"),
    [
        (cuda.can_use_flash_attention, cuda.enable_flash_sdp, "Flash attention kernel not used because:", "Flash attention"),
        (cuda.can_use_cudnn_attention, cuda.enable_cudnn_sdp, "cuDNN attention kernel not used because:", "cuDNN attention"),
        (cuda.can_use_efficient_attention, cuda.enable_mem_efficient_sdp, "Memory efficient kernel not used because:", "Memory efficient attention"),
    ],
)  # fmt: skip
def test_debug_warns_with_torchs_heading_and_every_sentence(can_use, enable, heading, sentence):
    params = _params(q=jax.ShapeDtypeStruct((1, 2, 64, 60), "float32"), k=jax.ShapeDtypeStruct((1, 2, 64, 60), "float32"))
    enable(False)
    assert not can_use(params)
    with pytest.warns(UserWarning, match=heading) as caught:
        assert not can_use(params, debug=True)
    (warning,) = caught
    assert f"{sentence} has been runtime disabled." in str(warning.message)
    if can_use is not cuda.can_use_efficient_attention:
        assert "dtype: {Half, BFloat16}. Got float32." in str(warning.message)


def test_what_the_call_would_raise_can_use_raises():
    with pytest.raises(ValueError, match="dropout probability"):
        cuda.can_use_efficient_attention(_params(dropout=1.5))


def test_flash_is_available_or_not_whatever_the_switches_say():
    before = cuda.is_flash_attention_available()
    cuda.enable_flash_sdp(False)
    assert cuda.is_flash_attention_available() is before
    assert not before or any(device.platform == "gpu" for device in jax.devices())
