"""What came out of a comparison: the counts and the exit code, JSON, and the table in the terminal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from jax_sdpa.compare.extras import need
from jax_sdpa.compare.measure import RULE, Error
from jax_sdpa.compare.runner import FAILS, HOLDS, REFUSED, SHORT, Cell, Cost, Outcome

SCHEMA = 1
"""Of the JSON report; raised when a field changes its meaning or goes."""

EXIT_HOLDS, EXIT_FAILS, EXIT_USAGE, EXIT_NOTHING_RAN = 0, 1, 2, 3

WIDE = 130
"""Columns that the whole table needs; a narrower terminal gets multiples of torch's in place of most numbers."""

MEMORY_NOTE = (
    "Memory: temporaries that XLA plans beside operands and results; for torch what its allocator takes (CUDA) or how far the "
    "process grows (CPU), results included."
)
DROPOUT_NOTE = (
    "Dropout is not compared: the two frameworks draw different bits from one seed, so only a mask passed in could be equal."
)


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcomes of a run and what it was run with (`about`: date, versions, device, settings)."""

    outcomes: tuple[Outcome, ...]
    about: dict[str, Any]

    def counts(self) -> dict[str, dict[str, int]]:
        """{'cases' | 'cells': {'holds' | 'fails' | 'refused': how many}}. What is refused is neither a pass nor a failure."""
        cases = [outcome.verdict for outcome in self.outcomes]
        cells = [cell.verdict for outcome in self.outcomes for cell in outcome.cells]
        verdicts = (HOLDS, FAILS, REFUSED)
        return {
            "cases": {verdict: cases.count(verdict) for verdict in verdicts},
            "cells": {verdict: cells.count(verdict) for verdict in verdicts},
        }

    def exit_code(self) -> int:
        """0: every case that a backend ran holds; 1: one fails; 3: there is none, all were refused."""
        cases = self.counts()["cases"]
        return EXIT_FAILS if cases[FAILS] else EXIT_HOLDS if cases[HOLDS] else EXIT_NOTHING_RAN

    def summary(self) -> str:
        """The counts in a line."""
        parts = []
        for what, counts in self.counts().items():
            parts.append(f"{what}: {counts[HOLDS]} hold, {counts[FAILS]} fail, {counts[REFUSED]} refused")
        return "; ".join(parts)

    def refusals(self) -> dict[str, dict[str, list[str]]]:
        """{backend: {reason: the cases it was given for}}."""
        found: dict[str, dict[str, list[str]]] = {}
        for outcome in self.outcomes:
            for cell in outcome.cells:
                for reason in (*(cell.reasons if cell.verdict == REFUSED else ()), *cell.no_gradient):
                    found.setdefault(SHORT[cell.backend], {}).setdefault(reason, []).append(outcome.case.name)
        return found

    def faults(self) -> list[str]:
        """One line for everything that fails."""
        lines = []
        for outcome in self.outcomes:
            if outcome.torch_fault:
                lines.append(f"{outcome.case.name}: {outcome.torch_fault}")
            for cell in outcome.cells:
                if cell.verdict == FAILS:
                    lines += [f"{outcome.case.name}, {SHORT[cell.backend]}: {reason}" for reason in cell.reasons]
        return lines


# --- JSON


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null, beside a `finite` that says so."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain values.

    {schema, about, rule, summary: counts, exit_code, cases: [{name, model, source, dtype, shape, line, verdict,
    torch: {fault, errors: {tensor: error}, cost}, cells: [{backend, verdict, reasons, no_gradient, tensors: {tensor: {error,
    limit_max, limit_rms, faults}}, cost}]}]}; an error is {max, rms, finite}, a cost {forward_ms, both_ms, forward_bytes,
    both_bytes}.
    """
    cases = []
    for outcome in report.outcomes:
        case = outcome.case
        cases.append(
            {
                "name": case.name,
                "model": case.model,
                "source": case.source,
                "dtype": case.dtype,
                "shape": dataclasses.asdict(outcome.shape),
                "line": case.code(),
                "verdict": outcome.verdict,
                "torch": {
                    "fault": outcome.torch_fault,
                    "errors": {name: dataclasses.asdict(error) for name, error in outcome.torch_errors.items()},
                    "cost": dataclasses.asdict(outcome.torch_cost),
                },
                "cells": [dataclasses.asdict(cell) for cell in outcome.cells],
            }
        )
    return _finite(
        {
            "schema": SCHEMA,
            "about": report.about,
            "rule": RULE,
            "summary": report.counts(),
            "exit_code": report.exit_code(),
            "cases": cases,
        }
    )


# --- words for numbers, in the table and in the HTML page


def number(x: float | None) -> str:
    """1.9e-3; empty for what was not measured."""
    if x is None:
        return ""
    if x == 0 or not math.isfinite(x):
        return f"{x:.0f}"
    mantissa, exponent = f"{x:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def milliseconds(ms: float | None, torch_ms: float | None = None) -> str:
    """12.3, with '(0.8x)' behind it: the multiple of torch's."""
    if ms is None:
        return ""
    text = f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 1 else f"{ms:.2f}"
    return f"{text} ({ms / torch_ms:.1f}x)" if torch_ms else text


def megabytes(size: int | None) -> str:
    """Bytes as MB."""
    return "" if size is None else f"{size / 1e6:.1f}"


def memory(cost: Cost) -> int | None:
    """The bytes of the most that was measured: forward + backward, else forward."""
    return cost.forward_bytes if cost.both_bytes is None else cost.both_bytes


def shape_words(outcome: Outcome) -> str:
    """bf16 1, 28/4, 256, 128: the dtype, then batch, heads (query/key), length (LxS) and head dim (E/Ev)."""
    short = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}
    return f"{short[outcome.case.dtype]} {outcome.shape}"


def verdict_words(cell: Cell) -> str:
    """'holds', or 'fails: …' or 'refused: …' with the first reason and how many more there are."""
    if cell.verdict == HOLDS:
        return "holds, forward only" if cell.no_gradient else HOLDS
    first, *others = cell.reasons
    return f"{cell.verdict}: {first}" + (f" (+{len(others)} more)" if others else "")


def errors_of(cell: Cell) -> dict[str, Error]:
    return {name: judged.error for name, judged in cell.tensors.items()}


def worst_gradient(errors: dict[str, Error], torch_errors: dict[str, Error]) -> str:
    """'dk 1.1x': the gradient whose root mean square error is the largest multiple of torch's; torch's own: its largest error."""
    gradients = {name: error for name, error in errors.items() if name != "out"}
    if not gradients:
        return ""
    if errors is torch_errors:
        name = max(gradients, key=lambda name: gradients[name].max)
        return f"{name} {number(gradients[name].max)}"
    multiples = {name: error.rms / torch_errors[name].rms for name, error in gradients.items() if torch_errors[name].rms}
    if not multiples:
        return ""
    name = max(multiples, key=lambda name: multiples[name])
    return f"{name} {multiples[name]:.1f}x"


# --- the terminal

STYLES = {HOLDS: "green", FAILS: "bold red", REFUSED: "yellow"}


@dataclasses.dataclass(frozen=True)
class _Row:
    """A line of the table: torch's (`cell` is None) or a backend's."""

    outcome: Outcome
    cell: Cell | None

    @property
    def errors(self) -> dict[str, Error]:
        return self.outcome.torch_errors if self.cell is None else errors_of(self.cell)

    @property
    def cost(self) -> Cost:
        return self.outcome.torch_cost if self.cell is None else self.cell.cost

    def error(self, name: str) -> str:
        found = self.errors.get(name)
        return "" if found is None else number(found.max) if found.finite else "NaN"

    def time(self, field: str, wide: bool) -> str:
        ours, base = getattr(self.cost, field), getattr(self.outcome.torch_cost, field)
        if self.cell is None or wide or not ours or not base:
            return milliseconds(ours, None if self.cell is None else base)
        return f"{ours / base:.1f}x"

    def verdict(self) -> str:
        return (FAILS if self.outcome.torch_fault else "") if self.cell is None else verdict_words(self.cell)

    def style(self) -> str:
        return STYLES[FAILS] if self.cell is None else STYLES[self.cell.verdict]


def _escape(text: str) -> str:
    return need("rich.markup").escape(text)


def _columns(wide: bool, with_mask: bool) -> dict[str, Callable[[_Row], str]]:
    """What the table shows of a row, by heading."""
    gradients: dict[str, Callable[[_Row], str]] = {
        name: (lambda row, name=name: row.error(name)) for name in ("dq", "dk", "dv", *(("dmask",) if with_mask else ()))
    }
    if not wide:
        gradients = {"gradients": lambda row: worst_gradient(row.errors, row.outcome.torch_errors)}
    return {
        "": lambda row: "torch" if row.cell is None else SHORT[row.cell.backend],
        "out": lambda row: row.error("out"),
        **gradients,
        "fwd ms": lambda row: row.time("forward_ms", wide),
        "fwd+bwd ms": lambda row: row.time("both_ms", wide),
        **({"MB": lambda row: megabytes(memory(row.cost))} if wide else {}),
    }


def table(report: Report, width: int) -> Any:
    """The rich table: per case torch's line, then one for each backend; errors are the largest against torch in float64."""
    with_mask = any("dmask" in outcome.torch_errors for outcome in report.outcomes)
    columns = _columns(width >= WIDE, with_mask)
    headings = ["case (batch, heads, length, dim)" if width >= WIDE else "case", *columns]
    rows, groups = [], []
    for outcome in report.outcomes:
        names = iter([outcome.case.name, *([f"  {shape_words(outcome)}"] if width >= WIDE else ())])
        groups.append([_Row(outcome, None), *(_Row(outcome, cell) for cell in outcome.cells)])
        rows += [[next(names, ""), *(show(row) for show in columns.values())] for row in groups[-1]]
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]

    text = need("rich.text").Text
    made = need("rich.table").Table(box=need("rich.box").SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for i, (heading, own) in enumerate(zip(headings, widths, strict=True)):
        made.add_column(heading, justify="left" if i < 2 else "right", width=own)
    made.add_column("verdict", no_wrap=True, overflow="ellipsis", width=max(12, width - sum(widths) - 2 * len(headings) - 1))
    texts = iter(rows)
    for group in groups:
        for row in group:
            made.add_row(*(text(cell) for cell in next(texts)), text(row.verdict(), row.style()), end_section=row is group[-1])
    return made


def show(report: Report, console: Any) -> None:
    """Print the table, why backends refuse, what is at fault, the counts."""
    console.print(table(report, console.width))
    for backend, reasons in report.refusals().items():
        console.print(f"\n[yellow]{backend} refused because:[/]")
        for reason, cases in reasons.items():
            where = f"{len(cases)} cases" if len(cases) > 3 else ", ".join(cases)
            console.print(f"  {_escape(reason)} [dim]({_escape(where)})[/]", highlight=False)
    if faults := report.faults():
        console.print("\n[bold red]At fault:[/]")
        for fault in faults:
            console.print(f"  {_escape(fault)}", highlight=False)
    versions = ", ".join(f"{name} {version}" for name, version in report.about["versions"].items())
    notes = (RULE, MEMORY_NOTE, DROPOUT_NOTE, f"{report.about['device']}; {versions}")
    console.print("\n[dim]" + _escape("\n".join(notes)) + "[/]", highlight=False)
    color = {EXIT_HOLDS: "green", EXIT_FAILS: "red"}.get(report.exit_code(), "yellow")
    console.print(f"\n[bold {color}]{report.summary()}[/]", highlight=False)
