"""`jax-sdpa compare` beside torch: what holds, what must fail, what is refused, and what the reports say of it."""

import dataclasses
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sdpa.compare import cases, devices, frameworks, inputs, page, report, runner
from jax_sdpa.compare.command import main

pytestmark = pytest.mark.torch  # and with torch the other libraries of the extra `compare`


def shrunk(shape: cases.Shape) -> cases.Shape:
    """The same call at sizes that take milliseconds: groups of heads, L = S, L = 1 and Ev != E stay what they are."""
    L, S = min(shape.L, 12), min(shape.S, 20)
    return cases.Shape(
        min(shape.B, 3), 2 * shape.Hq // shape.H, 2, min(L, S), L if shape.L == shape.S else S, shape.E // 8, shape.Ev // 8
    )


TINY = tuple(dataclasses.replace(case, small=shrunk(case.small)) for case in cases.CASES)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(cases, "CASES", TINY)
    monkeypatch.setattr(cases, "BY_NAME", {case.name: case for case in TINY})


@pytest.fixture
def cpu():
    return devices.open_device("cpu")


def run(case: cases.Case, cpu: devices.Device, **options) -> runner.Outcome:
    return runner.run_case(case, inputs.draw(case, "small", 0), cpu, repeats=1, **options)


def plant(monkeypatch, change):
    """Let jax_sdpa's output be `change` of what it is."""
    honest = frameworks.Jax.scaled_dot_product_attention
    monkeypatch.setattr(
        frameworks.Jax, "scaled_dot_product_attention", lambda self, *args, **kwargs: change(honest(self, *args, **kwargs))
    )


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_every_case_holds_on_every_backend_that_runs(case, cpu):
    outcome = run(case, cpu)
    verdicts = {cell.backend: cell.verdict for cell in outcome.cells}
    if case.only == "FLASH_ATTENTION":
        assert verdicts == {"FLASH_ATTENTION": "refused"}
        assert outcome.verdict == "refused"
        return
    assert outcome.verdict == "holds", report.Report((outcome,), {}).faults()
    if case.only is None:
        assert verdicts == {
            "MATH": "holds", "EFFICIENT_ATTENTION": "holds", "FLASH_ATTENTION": "refused", "CUDNN_ATTENTION": "refused",
        }  # fmt: skip
    expected = {"out", "dq", "dk", "dv"} | ({"dmask"} if case.name == "t5-bias" else set())
    assert set(outcome.torch_errors) == expected
    for cell in outcome.cells:
        assert set(cell.tensors) == (expected if cell.verdict == "holds" else set())
        if cell.verdict == "holds":
            assert cell.cost.forward_ms > 0
            assert cell.cost.both_ms > 0
            assert cell.cost.both_bytes >= 0


def test_gradients_can_be_left_out(cpu):
    outcome = run(cases.BY_NAME["vit-base"], cpu, gradients=False, backends=("MATH",))
    (cell,) = outcome.cells
    assert set(cell.tensors) == set(outcome.torch_errors) == {"out"}
    assert cell.cost.both_ms is None


def test_float64_leaves_x64_as_it_was(cpu):
    assert not jax.config.jax_enable_x64
    (cell,) = run(cases.BY_NAME["float64"], cpu, backends=("MATH",)).cells
    assert cell.tensors["dq"].error.max < 1e-13
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize("name", ["vit-base", "whisper-cross", "float64", "bert-padding"])
@pytest.mark.parametrize("wrong", [1.05, 0.97])
def test_a_wrong_scale_fails(monkeypatch, cpu, name, wrong):
    honest = frameworks.Jax.scaled_dot_product_attention

    def scaled(self, query, *args, **kwargs):
        return honest(self, query, *args, **kwargs, scale=wrong / query.shape[-1] ** 0.5)

    monkeypatch.setattr(frameworks.Jax, "scaled_dot_product_attention", scaled)
    outcome = run(cases.BY_NAME[name], cpu, backends=("MATH",))
    assert outcome.verdict == "fails"
    assert any("is allowed" in reason for reason in outcome.cells[0].reasons)


def test_a_wrong_gradient_alone_fails(monkeypatch, cpu):
    plant(monkeypatch, lambda out: 0.9 * out + jax.lax.stop_gradient(0.1 * out))
    (cell,) = run(cases.BY_NAME["vit-base"], cpu, backends=("MATH",)).cells
    assert cell.verdict == "fails"
    assert not cell.tensors["out"].faults
    assert all(cell.tensors[name].faults for name in ("dq", "dk", "dv"))


def test_one_nan_fails(monkeypatch, cpu):
    plant(monkeypatch, lambda out: out.at[0, 0, 0, 0].set(jnp.nan))
    (cell,) = run(cases.BY_NAME["vit-base"], cpu, backends=("MATH",), gradients=False).cells
    assert (cell.verdict, cell.reasons) == ("fails", ("out has NaN or inf",))


def test_a_row_that_attends_to_nothing_must_be_zero(monkeypatch, cpu):
    plant(monkeypatch, lambda out: jnp.where(out == 0, jnp.asarray(1e-6, out.dtype), out))
    (cell,) = run(cases.BY_NAME["qwen2-left-padded"], cpu, backends=("MATH",), gradients=False).cells
    assert (cell.verdict, cell.reasons) == ("fails", ("out is not 0 in a row that attends to nothing",))


def test_a_backend_that_raises_fails_its_cell_alone(monkeypatch, cpu):
    def raises(out):
        raise FloatingPointError("planted")

    plant(monkeypatch, raises)
    (cell,) = run(cases.BY_NAME["vit-base"], cpu, backends=("MATH",)).cells
    assert (cell.verdict, cell.reasons) == ("fails", ("FloatingPointError: planted",))


def test_torch_that_refuses_the_call_is_a_failure_with_its_words(cpu):
    case = dataclasses.replace(
        cases.BY_NAME["vit-base"], line=lambda F, **arrays: F.scaled_dot_product_attention(**arrays, scale="a")
    )
    outcome = run(case, cpu)
    assert outcome.verdict == "fails"
    assert "argument 'scale' must be float" in outcome.torch_fault


# --- the command


def compare(*arguments: str) -> int:
    return main(["compare", "--device", "cpu", "--repeats", "1", *arguments])


def test_the_command_prints_a_table_and_writes_json_and_html(tmp_path, capsys):
    written, html = tmp_path / "r.json", tmp_path / "r.html"
    code = compare("--cases", "docs-flash", "t5-bias", "float64", "--json", str(written), "--html", str(html))
    printed = capsys.readouterr().out
    assert code == 0
    assert "cases: 2 hold, 0 fail, 1 refused; cells: 4 hold, 0 fail, 5 refused" in printed
    assert "refused: Flash attention runs on NVID" in printed
    assert "Flash attention runs on NVIDIA GPUs, the program is for cpu." in printed

    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    found = json.loads(written.read_text(), parse_constant=no_constant)
    assert found["schema"] == report.SCHEMA
    assert set(found) == {"schema", "about", "rule", "summary", "exit_code", "cases"}
    assert set(found["about"]) == {"date", "seconds", "versions", "device", "settings"}
    assert set(found["about"]["versions"]) == {"python", "jax-sdpa", "jax", "jaxlib", "torch", "numpy"}
    assert [(case["name"], case["verdict"]) for case in found["cases"]] == [
        ("docs-flash", "refused"), ("t5-bias", "holds"), ("float64", "holds"),
    ]  # fmt: skip
    t5 = found["cases"][1]
    assert set(t5) == {"name", "model", "source", "dtype", "shape", "line", "verdict", "torch", "cells"}
    cell = t5["cells"][0]
    assert set(cell) == {"backend", "verdict", "reasons", "tensors", "cost", "no_gradient"}
    assert set(cell["tensors"]) == {"out", "dq", "dk", "dv", "dmask"}
    assert set(cell["tensors"]["out"]) == {"error", "limit_max", "limit_rms", "faults"}
    assert set(cell["tensors"]["out"]["error"]) == {"max", "rms", "finite"}
    assert set(cell["cost"]) == set(t5["torch"]["cost"]) == {"forward_ms", "both_ms", "forward_bytes", "both_bytes"}

    text = html.read_text()
    assert text.count("data:image/png;base64,") == 3
    assert "sdpa_kernel(backends=[F.SDPBackend.FLASH_ATTENTION])" in text
    assert not re.search(r"(src|href)='http", text)


def test_a_planted_error_makes_the_exit_code_1(monkeypatch, capsys):
    plant(monkeypatch, lambda out: 1.05 * out)
    assert compare("--cases", "vit-base", "docs-flash", "--backends", "math", "flash") == 1
    printed = capsys.readouterr().out
    assert "cases: 0 hold, 1 fail, 1 refused" in printed
    assert "vit-base, MATH: out is off by" in printed


def test_a_nan_is_null_in_json(monkeypatch, tmp_path):
    plant(monkeypatch, lambda out: out * jnp.nan)
    assert compare("--cases", "vit-base", "--backends", "math", "--json", str(tmp_path / "r.json")) == 1
    (cell,) = json.loads((tmp_path / "r.json").read_text())["cases"][0]["cells"]
    assert cell["tensors"]["out"]["error"] == {"max": None, "rms": None, "finite": False}


def test_what_is_refused_is_no_pass(capsys):
    assert compare("--cases", "docs-flash") == 3
    assert "0 hold, 0 fail, 1 refused" in capsys.readouterr().out


def test_a_case_whose_backend_was_not_asked_for_is_refused(cpu):
    (cell,) = run(cases.BY_NAME["docs-gqa"], cpu, backends=("EFFICIENT_ATTENTION",)).cells
    assert (cell.backend, cell.verdict) == ("MATH", "refused")


def test_the_table_fits_into_80_columns(cpu):
    from rich.console import Console

    outcome = run(cases.BY_NAME["t5-bias"], cpu)
    console = Console(width=80, file=io.StringIO())
    console.print(report.table(report.Report((outcome,), {}), 80))
    lines = console.file.getvalue().splitlines()
    assert len([line for line in lines if line.strip()]) == 2 + 1 + len(
        runner.BACKENDS
    )  # head, rule, torch, backends: none is wrapped


def test_a_report_without_any_measurement_has_a_page(cpu):
    outcome = run(cases.BY_NAME["docs-flash"], cpu, backends=("MATH",))
    about = {"date": "", "device": "", "versions": {}, "settings": {}}
    assert "Nothing was measured." in page.page(report.Report((outcome,), about))


# --- the user's own tensors


def tensors(dtype: str, heads: tuple[int, int] = (4, 2)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"query": (2, heads[0], 6, 8), "key": (2, heads[1], 9, 8), "value": (2, heads[1], 9, 5)}
    return {name: rng.standard_normal(shape).astype(jnp.dtype(dtype)) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_own_tensors(tmp_path, capsys, dtype, suffix):
    import safetensors.numpy

    path = tmp_path / f"mine.{suffix}"
    arrays = tensors(dtype) | {"attn_mask": np.tri(6, 9, 3, dtype=bool)}
    np.savez(path, **arrays) if suffix == "npz" else safetensors.numpy.save_file(arrays, path)
    assert compare("--inputs", str(path), "--gqa", "--scale", "0.5", "--json", str(tmp_path / "r.json")) == 0
    assert "cases: 1 hold, 0 fail, 0 refused; cells: 2 hold, 0 fail, 2 refused" in capsys.readouterr().out
    (case,) = json.loads((tmp_path / "r.json").read_text())["cases"]
    assert case["name"] == path.name
    assert case["dtype"] == dtype
    assert case["model"] == "your tensors, enable_gqa=True, scale=0.5"


def test_own_tensors_rounded_causal_and_with_a_bias(tmp_path):
    path = tmp_path / "mine.npz"
    arrays = tensors("float32", (2, 2))
    np.savez(path, **arrays)
    assert compare("--inputs", str(path), "--causal", "--dtype", "bfloat16", "--backends", "math") == 0
    np.savez(path, **arrays, attn_mask=np.zeros((6, 9), np.float32))
    assert compare("--inputs", str(path), "--backends", "math", "--json", str(tmp_path / "r.json")) == 0
    (case,) = json.loads((tmp_path / "r.json").read_text())["cases"]
    assert "dmask" in case["cells"][0]["tensors"]


def test_own_tensors_that_torch_refuses(tmp_path, capsys):
    path = tmp_path / "mine.npz"
    np.savez(path, **tensors("float32", (4, 3)))
    assert compare("--inputs", str(path)) == 1
    assert "torch: RuntimeError" in capsys.readouterr().out


def test_a_gpu_that_is_not_there(capsys):
    if any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("there is one")
    assert main(["compare", "--device", "cuda"]) == 2
    assert "sees no GPU" in capsys.readouterr().err
