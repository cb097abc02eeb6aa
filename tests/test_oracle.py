"""The oracle is right: equal to torch float64 MATH, gradients to finite differences; and the tolerance rule catches faults."""

import numpy as np
import pytest
from harness import make
from oracle import EXACT, assert_as_good, band, check, on_torch, solve

rng = np.random.default_rng(0)
EMPTY_ROWS = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)

TORCH_CASES = {
    "plain": (make(4, 6), {}),
    "Ev": (make(4, 6, Ev=3), {}),
    "causal": (make(5, 3, keep=band(5, 3, -1, 0)), {"is_causal": True}),
    "bool mask with an empty row": (make(3, 5, keep=EMPTY_ROWS), {}),
    "float mask with an empty row": (make(3, 5, bias=np.where(EMPTY_ROWS, rng.standard_normal((2, 1, 3, 5)), -np.inf)), {}),
    "bias over keys": (make(3, 5, bias=rng.standard_normal((2, 1, 1, 5))), {}),
    "negative scale": (make(3, 5, scale=-0.7), {}),
    "zero scale": (make(3, 5, scale=0.0), {}),
    "grouped heads": (make(3, 5, Hq=6, Hk=2), {"enable_gqa": True}),
    "Hk differs from Hv": (make(3, 5, Hq=6, Hk=2, Hv=3), {"enable_gqa": True}),
    "one key": (make(4, 1), {}),
    "two batch dims": (make(3, 5, B=(2, 3)), {}),
}


@pytest.mark.torch
@pytest.mark.parametrize("name", TORCH_CASES)
def test_oracle_is_torch_math_in_float64(name):
    problem, options = TORCH_CASES[name]
    theirs = on_torch(problem.but(keep=None) if "is_causal" in options else problem, "float64", **options)
    ours = solve(problem)
    for what, x in theirs.items():
        np.testing.assert_allclose(x, ours[what].astype(np.float64), rtol=1e-12, atol=1e-13, err_msg=what)


def test_gradients_are_those_of_finite_differences():
    problem = make(
        3, 4, Hq=4, Hk=2, dlse=True, softcap=1.5, scale=0.8, sinks=rng.standard_normal(4), bias=rng.standard_normal((2, 1, 3, 1)),
        survivors=rng.integers(0, 2, (2, 4, 3, 4)) * 2.0, keep=band(3, 4, -1, 0),
    )  # fmt: skip

    def loss(changed):
        answer = solve(changed)
        return (answer["out"] * changed.dout).sum() + (answer["lse"] * changed.dlse).sum()

    gradients, h = solve(problem), EXACT(1e-5)
    for name in ("query", "key", "value", "bias", "sinks", "scale"):
        at = np.asarray(getattr(problem, name), EXACT)
        direction = rng.standard_normal(at.shape).astype(EXACT)
        numeric = (loss(problem.but(**{name: at + h * direction})) - loss(problem.but(**{name: at - h * direction}))) / (2 * h)
        assert abs(numeric - (gradients[name] * direction).sum()) < 1e-8, name


def test_empty_rows_and_sinks():
    problem = make(3, 5, keep=EMPTY_ROWS, dlse=True)
    answer = solve(problem)
    assert not answer["out"][..., 1, :].any()
    assert not answer["query"][..., 1, :].any()
    assert np.isneginf(answer["lse"][..., 1]).all()
    assert np.isfinite(answer["lse"][..., [0, 2]]).all()
    alone = solve(problem.but(sinks=np.array([0.5, -1.0])))
    np.testing.assert_allclose(alone["lse"][..., 1].astype(float), np.tile([0.5, -1.0], (2, 1)))
    assert not alone["out"][..., 1, :].any()


def test_the_rule_accepts_honest_results_and_catches_wrong_ones():
    for dtype in (np.float32, "bfloat16", np.float16):
        problem = make(9, 17).rounded(dtype)
        honest = {
            name: x.astype(dtype) for name, x in solve(problem, np.float32).items() if name in ("out", "query", "key", "value")
        }
        check(problem, honest)
        with pytest.raises(AssertionError, match="value: error"):
            check(problem, {**honest, "value": np.where(np.arange(8) == 3, 0, honest["value"]).astype(dtype)})
        with pytest.raises(AssertionError, match="query: error"):
            check(problem, {**honest, "query": (np.asarray(honest["query"], np.float32) * 1.05).astype(dtype)})
        with pytest.raises(AssertionError, match="error nan"):
            check(problem, {**honest, "out": np.full_like(honest["out"], np.nan)})
    with pytest.raises(AssertionError, match="shape"):
        assert_as_good(np.zeros(3), np.zeros((3, 1)), np.zeros((3, 1)))


def test_float64_answered_in_float32_is_caught():
    problem = make(9, 17)
    with pytest.raises(AssertionError, match="out: error"):
        check(problem, {"out": solve(problem, np.float32)["out"].astype(np.float64)})
