"""The parts of the comparison that need none of its extra's libraries: cases, inputs, the rule, the counts, `jax-sdpa explain`."""

import importlib
import inspect
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sdpa.compare import cases, extras, inputs, measure, report, runner
from jax_sdpa.compare.command import main

# --- cases and their inputs


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_cases_are_well_formed(case):
    assert case.model
    assert case.source
    assert case.dtype in inputs.DTYPES
    assert case.only is None or case.only in runner.BACKENDS
    for size in ("small", "full"):
        shape = case.shape(size)
        assert shape.Hq % shape.H == 0
        assert min(shape.B, shape.L, shape.S, shape.E, shape.Ev) > 0
        assert [getattr(shape, name) for name in ("Hq", "H", "E", "Ev")] == [
            getattr(case.small, name) for name in ("Hq", "H", "E", "Ev")
        ]  # scaled down in batch and length alone
    drawn = inputs.draw(case, "small", 0)
    assert list(inspect.signature(case.line).parameters) == ["F", *drawn.arrays]
    assert {drawn.arrays[name].dtype for name in ("query", "key", "value")} == {jnp.dtype(case.dtype)}
    assert case.code().startswith("def ")


def test_names_are_unique_and_the_issue_s_models_are_there():
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    for model in ("docs", "qwen2", "llama3", "mistral", "gemma2", "bert", "whisper", "t5", "vit", "deepseek"):
        assert any(name.startswith(model) for name in names)
    assert {case.dtype for case in cases.CASES} == set(inputs.DTYPES)


def test_pytorch_s_examples_are_typed_as_pytorch_types_them():
    flash, gqa = cases.BY_NAME["docs-flash"].code(), cases.BY_NAME["docs-gqa"].code()
    assert "sdpa_kernel(backends=[F.SDPBackend.FLASH_ATTENTION]):" in flash
    assert "F.scaled_dot_product_attention(query,key,value)\n" in flash
    assert "sdpa_kernel(backends=[F.SDPBackend.MATH]):" in gqa
    assert "F.scaled_dot_product_attention(query,key,value,enable_gqa=True)\n" in gqa
    assert str(cases.BY_NAME["docs-flash"].small) == "32, 8, 128, 64"
    assert str(cases.BY_NAME["docs-gqa"].small) == "32, 32/8, 128, 64"


def test_inputs_depend_on_the_seed_and_the_case_alone():
    case = cases.BY_NAME["float64"]
    first, again, other = (inputs.draw(case, "small", seed) for seed in (0, 0, 1))
    assert np.array_equal(first.arrays["query"], again.arrays["query"])
    assert not np.array_equal(first.arrays["query"], other.arrays["query"])
    assert np.array_equal(first.dout((2, 3)), again.dout((2, 3)))
    assert first.differentiable == ("query", "key", "value")
    assert inputs.draw(cases.BY_NAME["t5-bias"], "small", 0).differentiable == ("query", "key", "value", "attn_mask")


def test_left_padding_leaves_queries_without_keys():
    mask = inputs.draw(cases.BY_NAME["qwen2-left-padded"], "small", 0).arrays["attn_mask"]
    assert (~mask.any(-1)).sum() > 0


def test_bfloat16_survives_npz(tmp_path):
    x = np.arange(12).reshape(1, 2, 3, 2).astype(jnp.bfloat16)
    np.savez(tmp_path / "x.npz", query=x, key=x, value=x)
    case, read = inputs.read(tmp_path / "x.npz", is_causal=True)
    assert case.dtype == "bfloat16"
    assert case.model == "your tensors, is_causal=True"
    assert np.array_equal(read.arrays["query"], x)
    assert str(case.small) == "1, 2, 3, 2"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"query": np.zeros((1, 2))}, "must hold query, key, value and perhaps attn_mask, got query"),
        ({name: np.zeros((2, 2)) for name in ("query", "key", "value", "bias")}, "got bias, key, query, value"),
        ({name: np.zeros((2, 2), int) for name in ("query", "key", "value")}, "query must be of dtype .*, got int64"),
        ({name: np.zeros(2) for name in ("query", "key", "value")}, "at least 2 dimensional"),
    ],
)
def test_files_that_are_no_call(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        inputs.read(tmp_path / "x.npz")


def test_files_that_can_not_be_read(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"x\.npz can't be read"):
        inputs.read(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=r"y\.npz can't be read"):
        inputs.read(tmp_path / "y.npz")
    with pytest.raises(ValueError, match=r"must be an \.npz or a \.safetensors file"):
        inputs.read(tmp_path / "x.pt")


# --- the rule

EXACT = np.linspace(-1, 1, 64).reshape(8, 8)
NOTHING = measure.Error(0.0, 0.0, True)


def test_twice_torch_s_error_holds_and_more_does_not():
    torch = measure.error_of(EXACT + 0.01, EXACT)
    assert torch.max == pytest.approx(0.01)
    assert torch.rms == pytest.approx(0.01)
    assert measure.judge("dq", EXACT + 0.0199, EXACT, torch, "float32").faults == ()
    assert measure.judge("dq", EXACT + 0.0201, EXACT, torch, "float32").faults == ("dq is off by 2.0e-02, 2.0e-02 is allowed",)


def test_one_wrong_entry_and_a_small_error_everywhere_are_both_found():
    torch = measure.Error(1e-2, 1e-3, True)
    one = EXACT.copy()
    one[3, 3] += 0.021
    assert "off by 2.1e-02, 2.0e-02" in measure.judge("dq", one, EXACT, torch, "float32").faults[0]
    assert "(rms)" in measure.judge("dq", EXACT + 0.003, EXACT, torch, "float32").faults[0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_one_rounding_holds_though_torch_made_none(dtype):
    rounded = EXACT.astype(jnp.dtype(dtype)).astype(np.float64)
    assert measure.judge("out", rounded, EXACT, NOTHING, dtype).faults == ()
    assert measure.judge("out", EXACT * (1 + 10 * float(jnp.finfo(dtype).eps)), EXACT, NOTHING, dtype).faults


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_fails_even_where_torch_is_not_either(value):
    found = EXACT.copy()
    found[0, 0] = value
    torch = measure.Error(np.nan, np.nan, False)
    assert measure.judge("out", found, EXACT, torch, "float32").faults == ("out has NaN or inf",)
    assert measure.judge("out", EXACT, EXACT, torch, "float32").faults == ()


def test_an_empty_row_is_exactly_zero():
    exact = EXACT.copy()
    exact[2] = 0
    found = exact.copy()
    found[2, 0] = 1e-12
    assert measure.judge("out", found, exact, NOTHING, "float32").faults == ("out is not 0 in a row that attends to nothing",)
    assert measure.judge("dq", found, exact, NOTHING, "float32").faults == ()  # a causal query with one key: 0 up to rounding


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"shape \(8, 8\) was given, the exact one has \(8,\)"):
        measure.error_of(EXACT, EXACT[0])


def test_the_median_of_a_few_calls():
    calls = []
    assert measure.median_ms(lambda: calls.append(1), 3) >= 0
    assert len(calls) == 4


# --- counts and exit codes


def outcome(*verdicts: str) -> runner.Outcome:
    case = cases.BY_NAME["vit-base"]
    cells = tuple(runner.Cell(name, verdict, ("why",)) for name, verdict in zip(runner.BACKENDS, verdicts, strict=False))
    return runner.Outcome(case, case.small, cells)


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ([outcome("holds", "refused")], 0),
        ([outcome("holds"), outcome("refused")], 0),
        ([outcome("holds", "fails")], 1),
        ([outcome("holds"), outcome("refused", "fails")], 1),
        ([outcome("refused", "refused")], 3),
        ([], 3),
    ],
)
def test_exit_codes(outcomes, code):
    assert report.Report(tuple(outcomes), {}).exit_code() == code


def test_refused_is_counted_apart():
    made = report.Report((outcome("holds", "refused"), outcome("refused"), outcome("fails", "holds")), {})
    assert made.summary() == "cases: 1 hold, 1 fail, 1 refused; cells: 2 hold, 1 fail, 2 refused"
    assert made.refusals() == {"EFFICIENT": {"why": ["vit-base"]}, "MATH": {"why": ["vit-base"]}}
    json.dumps(report.as_json(made), allow_nan=False)


@pytest.mark.parametrize(("number", "text"), [(1.94e-3, "1.9e-3"), (0.0, "0"), (float("nan"), "nan"), (None, ""), (12.0, "1.2e1")])
def test_numbers_are_short(number, text):
    assert report.number(number) == text


def test_times_beside_torch_s():
    assert report.milliseconds(12.34, 24.0) == "12.3 (0.5x)"
    assert report.milliseconds(123.4) == "123"
    assert report.milliseconds(None, 1.0) == ""


# --- the command without torch


def explain(capsys, *arguments: str) -> tuple[int, str]:
    code = main(["explain", *arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_explain_prints_the_choice_and_every_reason(capsys):
    code, text = explain(capsys, "--query", "1,8,4096,64", "--dtype", "float32", "--causal", "--device", "cuda:sm90", "--grad")
    assert code == 0
    assert text.startswith("cuda:sm90: EFFICIENT_ATTENTION\n")
    assert "FLASH_ATTENTION not used because:\n" in text
    assert "Expected query, key and value to all be of dtype: {Half, BFloat16}. Got float32." in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["--query", "1,8,16,64", "--key", "1,2,32,64", "--value", "1,2,32,48", "--gqa", "--dtype", "bfloat16"],
        ["--query", "1,8,16,64", "--mask-shape", "1,1,16,16", "--mask-dtype", "float32", "--grad"],
        ["--query", "1,8,16,64", "--key", "1,8,32,64", "--lower-right", "--window", "7,0"],
        ["--query", "1,8,16,64", "--causal", "--window", "7,-1", "--dropout", "0.1", "--scale", "0.5"],
        ["--query", "8,16,64", "--dtype", "float64"],
    ],
)
def test_explain_takes_every_kind_of_call(capsys, arguments):
    code, text = explain(capsys, *arguments, "--device", "cpu")
    assert code == 0
    assert text.startswith("cpu: ")
    assert not jax.config.jax_enable_x64


def test_explain_a_call_that_no_backend_runs(capsys):
    code, text = explain(capsys, "--query", "1,8,16,64", "--device", "cpu", "--backends", "flash")
    assert code == 1
    assert text.startswith("cpu: no viable backend\n")
    assert "MATH not used because:\n    It has been disabled by sdpa_kernel" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--query", "1,8,16,64", "--key", "1,3,16,64", "--gqa"], "must divide the number of heads"),
        (["--query", "1,8,16,64", "--device", "abacus"], "device must be a name such as"),
        (["--query", "1,8,16,64", "--window", "3"], "--window takes two distances"),
        (["--query", "1,8,16,64", "--lower-right", "--mask-shape", "16,16"], "--mask-shape goes with"),
    ],
)
def test_explain_says_what_is_wrong(capsys, arguments, message):
    code, text = explain(capsys, *arguments)
    assert code == 2
    assert message in text


def test_the_list_of_cases(capsys):
    assert main(["compare", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(case.name in printed for case in cases.CASES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backends", "overrideable"], "no backend is called overrideable"),
        (["--repeats", "0"], "at least 1"),
        (["--json", "/no/such/folder/r.json"], "can't be written"),
        (["--device", "tpu"], "invalid choice"),
    ],
)
def test_wrong_usage_is_said_before_any_work(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(["compare", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "vit-base", "bart"], "no case is called bart; there are docs-flash, "),
        (["--causal"], "--causal, --gqa, --scale and --dtype go with --inputs"),
        (["--inputs", "x.npz", "--cases", "vit-base"], "--inputs and --cases exclude each other"),
        (["--inputs", "x.pt"], "must be an .npz or a .safetensors file"),
    ],
)
def test_options_that_do_not_go_together(capsys, arguments, message):
    assert main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_library_is_named_with_its_extra(monkeypatch, capsys):
    honest = importlib.import_module

    def without(name, *args):
        if name.partition(".")[0] in ("torch", "rich"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])
        return honest(name, *args)

    monkeypatch.setattr(extras.importlib, "import_module", without)
    assert main(["compare"]) == 2
    assert "the comparison needs rich, which is not installed: pip install 'jax-sdpa[compare]'" in capsys.readouterr().err
    with pytest.raises(extras.MissingExtraError, match="needs torch"):
        extras.need("torch.nn.attention")


def test_a_library_that_lacks_something_itself_says_so(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'sympy'", name="sympy")

    monkeypatch.setattr(extras.importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="sympy") as caught:
        extras.need("torch")
    assert not isinstance(caught.value, extras.MissingExtraError)


def test_explain_imports_no_library_of_the_extra():
    program = (
        "import sys; from jax_sdpa.compare.command import main; "
        "main(['explain', '--query', '1,8,16,64', '--device', 'cpu']); "
        "print([m for m in ('torch', 'rich', 'matplotlib', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    module = subprocess.run(
        [sys.executable, "-m", "jax_sdpa.compare", "compare", "--list"], capture_output=True, text=True, check=True
    )
    assert "llama3-8b-decode" in module.stdout
