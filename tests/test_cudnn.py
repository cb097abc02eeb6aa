"""CUDNN_ATTENTION: what it refuses and why, what is put right around cuDNN's call, what it lowers to, and its numbers on a GPU.

The gradients need a process with XLA_FLAGS=--xla_gpu_deterministic_ops=true, since without it the backend refuses to have any.
"""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from harness import make, on_jax
from oracle import band, check, lengths, solve

import jax_sdpa
from jax_sdpa import compat, device
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.attention.bias import KeyLengths, QueryLengths, SegmentIds, causal, causal_lower_right, sliding_window
from jax_sdpa.check import jax_request, torch_request
from jax_sdpa.device import assume_device, deterministic_ops
from jax_sdpa.implementations.cudnn import Cudnn
from jax_sdpa.masks import as_mask
from jax_sdpa.request import DIFFERENTIABLE

CUDNN = SDPBackend.CUDNN_ATTENTION
HOPPER = "cuda:sm90:cudnn91900"
FLAG = "--xla_gpu_deterministic_ops=true"
rng = np.random.default_rng(3)


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", FLAG)


def _shape(*sizes, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(sizes, dtype)


def _why(q=None, k=None, v=None, mask=None, *, on=HOPPER, grad=False, **options):
    q = _shape(2, 8, 200, 64) if q is None else q
    k = q if k is None else k
    with sdpa_kernel(CUDNN):
        choice = jax_sdpa.explain(q, k, k if v is None else v, mask, device=on, grad=grad, **options)
    return choice.rejected.get(CUDNN, [])


# --- what it refuses

RUNS = {
    "plain": {},
    "float16": {"q": _shape(2, 8, 200, 64, dtype="float16")},
    "causal": {"is_causal": True},
    "causal, L > S": {"is_causal": True, "k": _shape(2, 8, 100, 64)},
    "causal, L < S": {"is_causal": True, "k": _shape(2, 8, 300, 64)},
    "lower right of a square": {"mask": causal_lower_right(200, 200)},
    "two queries": {"q": _shape(2, 8, 2, 64), "k": _shape(2, 8, 300, 64)},
    "window": {"mask": sliding_window(16, 0)},
    "a window that hides nothing": {"mask": sliding_window(199, 199)},
    "window & causal": {"mask": sliding_window(16, 5) & causal()},
    "key lengths": {"mask": KeyLengths(jnp.array([3, 200]))},
    "lengths & causal": {"mask": KeyLengths(jnp.array([3, 200])) & QueryLengths(jnp.array(7)) & causal()},
    "bool": {"mask": _shape(200, 200, dtype="bool")},
    "bool & causal": {"mask": _shape(2, 1, 200, 200, dtype="bool")},
    "float16 bias": {"q": _shape(2, 8, 200, 64, dtype="float16"), "mask": _shape(8, 200, 200, dtype="float16")},
    "grouped": {"k": _shape(2, 2, 200, 64), "enable_gqa": True},
    "Ev != E": {"q": _shape(2, 8, 200, 192), "v": _shape(2, 8, 200, 128)},
    "head dim 256": {"q": _shape(2, 8, 200, 256)},
    "negative scale": {"scale": -2.0},
    "Ampere": {"on": "cuda:sm80:cudnn91900"},
    "Blackwell": {"on": "cuda:sm100:cudnn91900"},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_it_can_run(name, deterministic):
    assert _why(**RUNS[name]) == []
    assert _why(**RUNS[name], grad=True) == []


REFUSES = {
    "CPU": ({"on": "cpu"}, r"runs on NVIDIA GPUs, the program is for cpu"),
    "TPU": ({"on": "tpu"}, r"runs on NVIDIA GPUs"),
    "an unknown GPU": ({"on": "cuda"}, r"architecture is not known here"),
    "an old GPU": ({"on": "cuda:sm75:cudnn91900"}, r"runs on Ampere and newer GPUs \(sm80\), the program is for cuda:sm75"),
    "an old cuDNN": ({"on": "cuda:sm90:cudnn91400"}, r"needs cuDNN 9\.15\.1 or newer, this is 9\.14\.0"),
    "float32": ({"q": _shape(2, 8, 200, 64, dtype="float32")}, r"\{Half, BFloat16\}. Got float32"),
    "head dim 60": ({"q": _shape(2, 8, 200, 60)}, r"multiples of 8 and at most 256. Got 60 and 60"),
    "head dim 264": ({"q": _shape(2, 8, 200, 264)}, r"at most 256. Got 264"),
    "head dim 0": ({"q": _shape(2, 8, 200, 0), "v": _shape(2, 8, 200, 64)}, r"multiples of 8"),
    "head dim 256 on Ampere": ({"q": _shape(2, 8, 200, 256), "on": "cuda:sm86:cudnn91900"}, r"at most 128"),
    "Ev != E on Ampere": ({"v": _shape(2, 8, 200, 32), "on": "cuda:sm80:cudnn91900"}, r"the same head dim on cuda:sm80. Got 64 and 32"),
    "one query": ({"q": _shape(2, 8, 1, 64), "k": _shape(2, 8, 300, 64)}, r"the same bits each time for a single query"),
    "dropout": ({"dropout_p": 0.1, "dropout_rng": jax.random.key(0)}, r"drops other weights"),
    "scale 0": ({"scale": 0.0}, r"finite and not 0, got 0"),
    "scale inf": ({"scale": float("inf")}, r"finite and not 0, got inf"),
    "a traced scale": ({"scale": jax.ShapeDtypeStruct((), "float32")}, r"known while tracing"),
    "lower right": ({"k": _shape(2, 8, 300, 64), "mask": causal_lower_right(200, 300)}, r"the last key of query q is q \+100"),
    "causal with a negative offset": ({"mask": causal(-3)}, r"query q is q -3"),
    "causal with offsets": ({"mask": causal(jnp.array([3, 4]))}, r"an offset for each sequence"),
    "a window to the right": ({"mask": sliding_window(5, 5)}, r"query q is q \+5"),
    "a window without a diagonal": ({"mask": sliding_window(5, -1)}, r"windows only to the left of a causal mask's diagonal"),
    "a window, L > S": ({"mask": sliding_window(5, 0), "k": _shape(2, 8, 100, 64)}, r"windows only where L <= S, got L=200, S=100"),
    "left padding": ({"mask": KeyLengths(jnp.array([9, 9]), jnp.array([1, 2]))}, r"padding before the keys"),
    "segments": ({"mask": SegmentIds(jnp.zeros((2, 200), jnp.int32))}, r"does not support SegmentIds masks"),
    "a mask without queries": ({"mask": _shape(2, 1, 1, 200, dtype="bool")}, r"no broadcast ones. Got \(…, 1, 200\)"),
    "a mask without keys": ({"mask": _shape(200, 1, dtype="bool")}, r"no broadcast ones. Got \(…, 200, 1\)"),
    "a float32 mask": ({"mask": _shape(200, 200, dtype="float32")}, r"of the query's dtype, bfloat16. Got float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSES)
def test_it_refuses(name, deterministic):
    given, sentence = REFUSES[name]
    reasons = _why(**given)
    assert any(re.search(sentence, reason) for reason in reasons), reasons
    assert all(reason.endswith(".") for reason in reasons)
    assert set(reasons) <= set(_why(**given, grad=True))


def test_it_refuses_what_only_jaxs_face_can_ask():
    q = _shape(2, 200, 8, 64)
    call = functools.partial(_why, q, call=jax_sdpa.dot_product_attention)
    assert call() == []
    assert call(return_residual=True) == []
    assert any("does not support softcap" in reason for reason in call(softcap=30.0))
    assert any("does not support sinks" in reason for reason in call(sinks=_shape(8, dtype="float32")))
    assert any("cotangent of lse" in reason for reason in call(return_residual=True, grad=True))


REFUSES_GRADIENTS = {
    "a large batch": ({"q": _shape(65536, 1, 8, 64)}, r"at most 65535 batch elements"),
    "bfloat16 bias": ({"mask": _shape(200, 200)}, r"lost in a row filled with a bfloat16 number such as -1e9"),
    "odd lengths with bias": ({"q": _shape(2, 8, 77, 64, dtype="float16"), "mask": _shape(77, 77, dtype="float16")}, r"even lengths"),
    "an older Blackwell": ({"on": "cuda:sm100:cudnn91800"}, r"deterministic on cuda:sm100 from cuDNN 9\.18\.1 on"),
    "bias on Blackwell": (
        {"q": _shape(2, 8, 8, 64, dtype="float16"), "mask": _shape(8, 8, dtype="float16"), "on": "cuda:sm100:cudnn91900"},
        r"no deterministic gradient of a float mask",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSES_GRADIENTS)
def test_it_refuses_gradients(name, deterministic):
    given, sentence = REFUSES_GRADIENTS[name]
    assert _why(**given) == []
    assert any(re.search(sentence, reason) for reason in _why(**given, grad=True))


def test_no_gradients_unless_xla_is_asked_for_the_same_bits(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert _why() == []
    (reason,) = _why(grad=True)
    assert reason.endswith("XLA_FLAGS=--xla_gpu_deterministic_ops=true makes it.")


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        ("", False),
        ("--xla_gpu_deterministic_ops=true", True),
        ("--xla_gpu_deterministic_ops", True),
        ("--xla_dump_to=/tmp --xla_gpu_exclude_nondeterministic_ops=1", True),
        ("--xla_gpu_deterministic_ops=false", False),
        ("--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=false", False),
    ],
)
def test_what_xla_is_asked_for(flags, asked, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert deterministic_ops() is asked
    assert device.parse("cuda:sm90").deterministic is asked


def test_symbolic_sizes_are_refused_before_they_are_compared():
    from jax import export

    L, S = export.symbolic_shape("L, S")
    reasons = _why(_shape(2, 8, L, 64), _shape(2, 8, S, 64), is_causal=True, grad=True)
    assert any("L, S here are symbolic" in reason for reason in reasons)


def test_the_cudnn_of_a_host_without_one(monkeypatch):
    class NotInstalled:
        @staticmethod
        def cudnn_get_version():
            raise RuntimeError("cuDNN not found.")

    for versions in (None, NotInstalled):
        monkeypatch.setattr(compat.cudnn, "cuda_versions", versions)
        assert compat.cudnn_version() is None
    assert any("cuDNN's version is not known here" in reason for reason in _why(on="cuda:sm90"))


# --- what is put right around cuDNN's call, with a stand-in that has cuDNN's ways


def _bnth(layout, *arrays):
    return [x if layout == "BNTH" else jnp.swapaxes(x, 1, 2) for x in arrays]


def _stand_in_scores(q, k, bias, q_lengths, kv_lengths, scale, causal, window):
    """(scores, who takes part), with what cuDNN 9.19 does on a Hopper: base 2, and no order between masks and NaN."""
    assert scale > 0
    B, N, T, _ = q.shape
    S = k.shape[2]
    s = scale * jnp.einsum("bnte,bnse->bnts", *(x.astype(jnp.float32) for x in (q, jnp.repeat(k, N // k.shape[1], 1))))
    log2e = np.float32(1.442695)
    if bias is not None:
        assert bias.dtype == q.dtype
        assert bias.shape[2:] == (T, S)
        s = (s * log2e + bias.astype(jnp.float32) * log2e) / log2e
    t, j = jnp.arange(T)[:, None], jnp.arange(S)
    keep = jnp.ones((B, 1, T, S), bool)
    if causal:
        keep &= j <= t
    if window is not None:
        assert causal
        assert T <= S
        keep &= j > t - window
    if q_lengths is not None:
        assert q_lengths.dtype == kv_lengths.dtype == jnp.int32
        keep &= (t < q_lengths[:, None, None, None]) & (j < kv_lengths[:, None, None, None])
    return s, keep


def _stand_in(q, k, v, bias, q_lengths, kv_lengths, *, scale, causal, window, layout):
    q, k, v = _bnth(layout, q, k, v)
    s, keep = _stand_in_scores(q, k, bias, q_lengths, kv_lengths, scale, causal, window)
    s = jnp.where(keep, s, -jnp.inf)
    top = s.max(-1, keepdims=True)
    p = jnp.exp(s - jnp.where(jnp.isneginf(top), 0, top))
    total = p.sum(-1, keepdims=True)
    p = p / jnp.where(total == 0, 1, total)
    lse = jnp.where(total == 0, 0.0 if q_lengths is not None else -jnp.inf, top + jnp.log(total))[..., 0]
    out = jnp.einsum("bnts,bnse->bnte", p, jnp.repeat(v, q.shape[1] // v.shape[1], 1).astype(jnp.float32))
    return _bnth(layout, out.astype(q.dtype))[0], lse


def _stand_in_backward(
    q, k, v, bias, q_lengths, kv_lengths, out, lse, dout, *, scale, causal, window, layout, with_dbias
):  # fmt: skip
    q, k, v, out, dout = _bnth(layout, q, k, v, out, dout)
    assert causal or q_lengths is not None, "S % 128 == 64 gives NaN"
    s, keep = _stand_in_scores(q, k, bias, q_lengths, kv_lengths, scale, causal, window)
    p = jnp.where(keep, jnp.exp(s - lse[..., None]), 0)
    group = q.shape[1] // k.shape[1]
    q, k, v, out, dout = (x.astype(jnp.float32) for x in (q, jnp.repeat(k, group, 1), jnp.repeat(v, group, 1), out, dout))
    ds = p * (jnp.einsum("bnte,bnse->bnts", dout, v) - (dout * out).sum(-1, keepdims=True))
    dq = scale * jnp.einsum("bnts,bnse->bnte", ds, k)
    dk = scale * jnp.einsum("bnts,bnte->bnse", ds, q)
    dv = jnp.einsum("bnts,bnte->bnse", p, dout)
    dk, dv = (x.reshape(x.shape[0], -1, group, *x.shape[2:]).sum(2) for x in (dk, dv))
    if q_lengths is not None:  # not written
        dq, dk, dv = (jnp.where((kv_lengths == 0)[:, None, None, None], jnp.nan, x) for x in (dq, dk, dv))
    dtype = jnp.float16 if bias is None else bias.dtype
    grads = [x.astype(dtype) for x in _bnth(layout, dq, dk, dv)]
    if with_dbias:
        axes = tuple(i for i in (0, 1) if bias.shape[i] == 1)
        grads.append(ds.sum(axes, keepdims=True).astype(dtype))
    return tuple(grads)


def _empty_rows_and_bias():
    bias = rng.standard_normal((3, 4, 40, 72))
    bias[..., [0, 9], :] = -np.inf
    bias[..., 5:, 60:] = -np.inf
    return bias


OWN = {
    "plain 200x77": lambda: (make(200, 77, E=64), None),
    "S % 128 == 64": lambda: (make(100, 192, E=64), None),
    "two queries, 300 keys": lambda: (make(2, 300, E=64), None),
    "grouped 8/2": lambda: (make(64, 72, E=64, Hq=8, Hk=2), None),
    "Ev < E": lambda: (make(64, 72, E=128, Ev=64), None),
    "Ev > E, causal": lambda: (make(72, 72, E=64, Ev=128, keep=band(72, 72, -1, 0)), causal()),
    "head dim 256, causal": lambda: (make(100, 100, E=256, keep=band(100, 100, -1, 0)), causal()),
    "causal 200x200": lambda: (make(200, 200, E=64, keep=band(200, 200, -1, 0)), causal()),
    "causal 200x77": lambda: (make(200, 77, E=64, keep=band(200, 77, -1, 0)), causal()),
    "causal 77x200": lambda: (make(77, 200, E=64, keep=band(77, 200, -1, 0)), causal()),
    "window 16": lambda: (make(200, 230, E=64, keep=band(200, 230, 16, 0)), sliding_window(16, 0)),
    "negative scale, causal": lambda: (make(72, 72, E=64, scale=-0.3, keep=band(72, 72, -1, 0)), causal()),
    "key lengths": lambda: (
        make(70, 150, B=4, E=64, keep=lengths(70, 150, [0, 1, 77, 150])), KeyLengths(jnp.array([0, 1, 77, 150]))
    ),
    "key lengths, grouped, two queries": lambda: (
        make(2, 150, B=4, E=64, Hq=8, Hk=2, keep=lengths(2, 150, [0, 1, 77, 150])), KeyLengths(jnp.array([-3, 1, 77, 400]))
    ),
    "key lengths in int16, 1 for all, causal": lambda: (
        make(300, 300, E=64, keep=lengths(300, 300, [200, 200]) & band(300, 300, -1, 0)), KeyLengths(jnp.array(200, jnp.int16)) & causal()
    ),
    "both lengths, causal, window": lambda: (
        make(90, 90, B=3, E=64, keep=lengths(90, 90, [90, 40, 0]) & band(90, 90, 20, 0) & (np.arange(90) < 60)[:, None]),
        KeyLengths(jnp.array([90, 40, 0])) & QueryLengths(jnp.array([60])) & sliding_window(20, 0),
    ),
    "bool with empty rows": lambda: (make(64, 72, E=64, keep=(rng.random((64, 72)) < 0.5) & (np.arange(64) % 3 != 0)[:, None]), None),
    "float mask with empty rows": lambda: (make(40, 72, B=3, Hq=4, E=64, bias=_empty_rows_and_bias()), None),
    "float mask shared by the batch": lambda: (make(40, 72, B=3, Hq=4, E=64, bias=_empty_rows_and_bias()[:1]), None),
    "float mask shared by the heads": lambda: (make(40, 72, B=3, Hq=4, E=64, bias=_empty_rows_and_bias()[:, :1]), None),
    "float mask (L, S)": lambda: (make(40, 72, B=3, Hq=4, E=64, bias=_empty_rows_and_bias()[0, 0]), None),
    "float mask and bool": lambda: (
        make(40, 72, B=3, Hq=4, E=64, bias=_empty_rows_and_bias()[:1], keep=rng.random((1, 1, 40, 1)) < 0.7), None
    ),
    "float mask, lengths, causal": lambda: (
        make(72, 72, B=3, Hq=4, E=64, bias=rng.standard_normal((72, 72)), keep=lengths(72, 72, [72, 40, 0]) & band(72, 72, -1, 0)),
        KeyLengths(jnp.array([72, 40, 0])) & causal(),
    ),
}  # fmt: skip
"""What cuDNN must run in float16, gradients included: (problem, the structured mask to ask with)."""


def _in(problem, dtype):
    problem = problem.rounded(dtype)
    return problem if problem.bias is None else problem.but(bias=problem.bias.astype(dtype))


@pytest.mark.parametrize("face", ["torch", "jax"])
@pytest.mark.parametrize("name", OWN)
def test_what_is_put_right_around_cudnn(name, face, monkeypatch):
    monkeypatch.setattr(compat, "cudnn_attention", _stand_in)
    monkeypatch.setattr(compat, "cudnn_attention_backward", _stand_in_backward)
    problem, mask = OWN[name]()
    problem = _in(problem, np.float16)
    hidden = (
        None if mask is None else mask.with_batch((problem.query.shape[0],)).key_valid(problem.query.shape[2], problem.key.shape[2])
    )
    wrt = tuple(operand for operand in DIFFERENTIABLE if getattr(problem, operand, None) is not None and operand != "scale")

    def program(q, k, v, bias, keep, mask, dout):
        if hidden is not None:  # what no query may look at holds NaN
            k, v = (jnp.where(jnp.atleast_2d(hidden)[:, None, :, None], x, jnp.nan) for x in (k, v))
        mask = mask if keep is None else as_mask(keep)
        if face == "torch":
            both = mask if bias is None else bias if mask is None else mask & bias
            request, _ = torch_request(q, k, v, both, scale=problem.scale, enable_gqa=q.shape[1] != k.shape[1])
        else:
            q, k, v, dout = (jnp.swapaxes(x, 1, 2) for x in (q, k, v, dout))
            request, _ = jax_request(q, k, v, bias, mask, scale=problem.scale)
        request = request.with_spec(wrt=wrt)
        target = device.Device("cuda", (9, 0), 91900, deterministic=True)
        assert Cudnn().reasons_against(request, target) == []
        out, lse = Cudnn().run(request)
        grads = Cudnn().backward(request, out, lse, dout, None, wrt)
        turned = {"out", "query", "key", "value"} if face == "jax" else set()
        return {what: jnp.swapaxes(x, 1, 2) if what in turned else x for what, x in {"out": out, "lse": lse, **grads}.items()}

    keep = problem.keep if mask is None else None
    got = jax.jit(program)(problem.query, problem.key, problem.value, problem.bias, keep, mask, problem.dout)
    got = {what: np.asarray(x) for what, x in got.items()}
    if problem.bias is not None:
        got["bias"] = got["bias"].reshape(problem.bias.shape)
    check(problem, got)


def test_a_bias_of_the_lowest_bfloat16_is_a_number(monkeypatch):
    monkeypatch.setattr(compat, "cudnn_attention", _stand_in)
    problem = _in(make(4, 64, E=64, bias=np.zeros((4, 64))), jnp.bfloat16)
    lowest = float(jnp.finfo(jnp.bfloat16).min)
    problem.bias[0], problem.bias[1, ::2], problem.bias[2], problem.bias[2, 3] = lowest, lowest, -np.inf, lowest
    request, _ = torch_request(problem.query, problem.key, problem.value, jnp.asarray(problem.bias))
    out, lse = Cudnn().run(request)
    check(problem, {"out": np.asarray(out), "lse": np.asarray(lse)})


# --- what it lowers to


def _lowered(f, *args):
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("face", ["torch", "jax"])
@pytest.mark.parametrize(("mask", "kind"), [(None, "NO_MASK"), (causal(), "CAUSAL"), (KeyLengths(jnp.array([5, 8])), "PADDING")])
def test_forward_and_backward_are_cudnns_for_either_layout(face, mask, kind, deterministic):
    q = jnp.ones((2, 16, 4, 64), jnp.bfloat16)

    def call(q, k, v):
        if face == "torch":
            return jax_sdpa.scaled_dot_product_attention(q, k, v, mask)
        return jax_sdpa.dot_product_attention(q, k, v, mask=mask)

    with assume_device(HOPPER), sdpa_kernel(CUDNN):
        forward = _lowered(call, q, q, q)
        both = _lowered(jax.grad(lambda *x: call(*x).astype(jnp.float32).sum(), (0, 1, 2)), q, q, q)
    assert re.findall(r"@(__cudnn\S+)\(", forward) == ["__cudnn$fmhaSoftmax"]
    assert re.findall(r"@(__cudnn\S+)\(", both) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]  # the forward once
    told = [found.replace("\\22", "") for found in re.findall(r"mask_type\\22: \\22\w+", both)]
    assert told == [f"mask_type: {kind}", "mask_type: PADDING" if kind == "NO_MASK" else f"mask_type: {kind}"]
    heads, length = (16, 4) if face == "torch" else (4, 16)  # (B, H, L, E), or (B, L, H, E), which is not transposed in memory
    assert f"dimensions\\22: [\\222\\22, \\22{heads}\\22, \\22{length}\\22, \\22{length}\\22]" in forward
    assert "dims = [0, 2, 1, 3]" not in forward or face == "jax"


def test_dense_masks_go_to_cudnn_as_a_bias(deterministic):
    q = jnp.ones((2, 4, 16, 64), jnp.float16)

    def loss(q, bias):
        return jax_sdpa.scaled_dot_product_attention(q, q, q, bias).astype(jnp.float32).sum()

    with assume_device(HOPPER), sdpa_kernel(CUDNN):
        text = _lowered(jax.grad(loss, (0, 1)), q, jnp.ones((4, 16, 16), jnp.float16))
    assert re.findall(r"@(__cudnn\S+)\(", text) == ["__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"]


def test_second_derivatives_and_forward_mode_lower_without_cudnns_backward(deterministic):
    q = jnp.ones((2, 4, 16, 64), jnp.bfloat16)

    def f(q):
        return jax_sdpa.scaled_dot_product_attention(q, q, q).astype(jnp.float32).sum()

    with assume_device(HOPPER), sdpa_kernel(CUDNN):
        forward_mode = _lowered(lambda q: jax.jvp(f, (q,), (q,)), q)
        second = _lowered(jax.grad(lambda q: jax.grad(f)(q).astype(jnp.float32).sum()), q)
    assert re.findall(r"@(__cudnn\S+)\(", forward_mode) == ["__cudnn$fmhaSoftmax"]
    assert "__cudnn$fmhaSoftmax(" in second


# --- on a GPU

gpu = pytest.mark.gpu
with_gradients = pytest.mark.skipif(not deterministic_ops(), reason=f"gradients need XLA_FLAGS={FLAG}")


def _on_gpu(problem, mask, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return on_jax(problem, CUDNN, mask=mask, **options)


@gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("face", ["torch", "jax"])
@pytest.mark.parametrize("name", OWN)
def test_forward_on_a_gpu(name, face, dtype):
    problem, mask = OWN[name]()
    problem = _in(problem, dtype)
    check(problem, _on_gpu(problem, mask, face=face, wrt=()))


@gpu
@with_gradients
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", OWN)
def test_gradients_on_a_gpu(name, dtype):
    problem, mask = OWN[name]()
    if problem.bias is not None and dtype == "bfloat16":
        pytest.skip("no gradients with a bfloat16 mask")
    problem = _in(problem, dtype)
    check(problem, _on_gpu(problem, mask))


@gpu
@pytest.mark.parametrize("gradients", [False, pytest.param(True, marks=with_gradients)])
@pytest.mark.parametrize("name", CASES)
def test_every_case_that_it_accepts_on_a_gpu(name, gradients):
    problem, mask, options = CASES[name]()
    problem = _in(problem, np.float16)
    if gradients:
        problem, options = problem.but(dlse=None), {}
        if problem.softcap is not None or problem.sinks is not None:
            pytest.skip("JAX's face alone can ask this")
    try:
        got = _on_gpu(problem, mask, **options, **({} if gradients else {"wrt": ()}))
    except jax_sdpa.NoViableBackendError as error:
        pytest.skip(" ".join(line.strip() for line in str(error).splitlines() if "cuDNN attention" in line or "Half" in line))
    check(problem, got)


@gpu
@pytest.mark.parametrize("gradients", [False, pytest.param(True, marks=with_gradients)])
@pytest.mark.parametrize("E", [64, 128])
def test_nan_in_padding_stays_there_on_a_gpu(E, gradients):
    stops = np.array([5, 1, 77, 128])
    problem = _in(make(128, 128, B=4, E=E, keep=lengths(128, 128, stops)), jnp.bfloat16)
    dirty = problem.but(
        key=np.where(lengths(1, 128, stops)[:, :, 0, :, None], problem.key, np.nan).astype(problem.key.dtype),
        value=np.where(lengths(1, 128, stops)[:, :, 0, :, None], problem.value, np.nan).astype(problem.key.dtype),
    )
    check(problem, _on_gpu(dirty, KeyLengths(jnp.asarray(stops)), **({} if gradients else {"wrt": ()})))


@gpu
@with_gradients
@pytest.mark.parametrize(("L", "S"), [(64, 64), (192, 192), (128, 64), (2, 128), (200, 200), (100, 128)])
@pytest.mark.parametrize("kind", ["plain", "bool", "causal"])
def test_gradients_are_finite_where_lse_is_far_below_zero(L, S, kind):
    problem = make(L, S, E=64)
    problem.query[...] *= 0.1
    problem.key[...] *= 0.1
    problem.query[..., 0], problem.key[..., 0] = 1, -120 * 8
    problem = _in(problem, jnp.bfloat16)
    if kind == "bool":
        problem = problem.but(keep=np.ones((L, S), bool))
    got = _on_gpu(problem, causal() if kind == "causal" else None)
    exact = solve(problem.but(keep=band(L, S, -1, 0) if kind == "causal" else None))
    for name in ("query", "key", "value"):
        assert np.isfinite(got[name].astype(np.float32)).all(), name
    check(problem.but(keep=band(L, S, -1, 0) if kind == "causal" else None), {name: got[name] for name in ("out", "value")})
    assert exact["lse"].max() < -88


@gpu
def test_a_bias_of_the_lowest_bfloat16_is_a_number_on_a_gpu():
    problem = _in(make(4, 64, E=64, bias=np.zeros((4, 64))), jnp.bfloat16)
    lowest = float(jnp.finfo(jnp.bfloat16).min)
    problem.bias[0], problem.bias[1, ::2], problem.bias[2], problem.bias[2, 3] = lowest, lowest, -np.inf, lowest
    check(problem, _on_gpu(problem, None, face="jax", wrt=()))


SAME_BITS = {
    "plain": ((2, 16, 2048, 64), 2048, {}),
    "causal": ((2, 16, 2048, 128), 2048, {"is_causal": True}),
    "lengths": ((2, 16, 1000, 128), 1000, {"attn_mask": KeyLengths(jnp.array([700, 1000]))}),
    "a mask": ((2, 16, 512, 64), 512, {"attn_mask": np.tri(512, dtype=bool)}),
    "short": ((1, 2, 8, 128), 8192, {}),
    "shorter": ((1, 2, 2, 128), 8192, {}),
}


@gpu
@pytest.mark.parametrize("gradients", [False, pytest.param(True, marks=with_gradients)])
@pytest.mark.parametrize("name", SAME_BITS)
def test_the_same_program_gives_the_same_bits_on_a_gpu(name, gradients):
    shape, S, options = SAME_BITS[name]
    q, dout = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for _ in range(2))
    k, v = (jnp.asarray(rng.standard_normal((*shape[:2], S, shape[3])), jnp.bfloat16) for _ in range(2))
    call = functools.partial(jax_sdpa.scaled_dot_product_attention, **options)
    with sdpa_kernel(CUDNN):
        run = jax.jit(lambda *x: jax.vjp(call, *x)[1](dout)) if gradients else jax.jit(call)
        first = jax.device_get(run(q, k, v))
        for _ in range(20):
            again = jax.device_get(run(q, k, v))
            assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True))
