"""The report as one HTML file: the counts, plots of errors, times and memory, a table, and the line of every case."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from html import escape
from typing import Any

from jax_sdpa.compare.extras import need
from jax_sdpa.compare.measure import RULE
from jax_sdpa.compare.report import (
    DROPOUT_NOTE,
    EXIT_FAILS,
    EXIT_HOLDS,
    MEMORY_NOTE,
    Report,
    megabytes,
    memory,
    milliseconds,
    number,
    shape_words,
    verdict_words,
)
from jax_sdpa.compare.runner import FAILS, GRADIENTS, HOLDS, REFUSED, SHORT, Cell, Cost, Outcome

COLORS = {"MATH": "#4477aa", "EFFICIENT": "#228833", "FLASH": "#ee6677", "CUDNN": "#aa3377", "torch": "#222222"}
"""Paul Tol's bright scheme: told apart by colour-blind readers too."""

MARKERS = {"out": "o", "dq": "<", "dk": ">", "dv": "^", "dmask": "s", "forward": "o", "forward + backward": "D"}

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: #222; }
table { border-collapse: collapse; width: 100%; font-size: 13px }
th, td { padding: 2px 8px; text-align: right; white-space: nowrap }
th { border-bottom: 2px solid #222; } td:first-child, td:nth-child(2), td:last-child { text-align: left; }
td:last-child { white-space: normal; } tr.case td { border-top: 1px solid #bbb; }
.holds { color: #187a2f; } .fails { color: #c00; font-weight: bold; } .refused { color: #96690a; }
pre { background: #f5f5f5; padding: .6em; overflow-x: auto; } img { max-width: 100%; } .note { color: #555; font-size: 13px; }
"""

Points = list[tuple[int, float, str, str]]  # (case, x, backend, kind of marker)


def page(report: Report) -> str:
    """The whole page, plots included, as a string."""
    worst = {EXIT_HOLDS: HOLDS, EXIT_FAILS: FAILS}.get(report.exit_code(), REFUSED)
    about = report.about
    facts = [about["date"], about["device"], ", ".join(f"{name} {version}" for name, version in about["versions"].items())]
    facts.append(", ".join(f"{name} {value}" for name, value in about["settings"].items()))
    return "\n".join(
        [
            "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>jax-sdpa compare</title>",
            f"<style>{STYLE}</style></head><body><h1>scaled_dot_product_attention: jax_sdpa beside PyTorch</h1>",
            f"<p><b class='{worst}'>{report.summary()}</b></p>",
            f"<p class='note'>{'<br>'.join(escape(fact) for fact in facts)}</p>",
            *_faults(report),
            f"<h2>Errors</h2><p>{escape(RULE)}</p>",
            _plot(report, _error_points, "root mean square error / torch's own, against torch in float64", limits=(1.0, 2.0)),
            "<h2>Times</h2>",
            _plot(report, _time_points, "time / torch's", limits=(1.0,)),
            f"<h2>Memory</h2><p>{MEMORY_NOTE}</p>",
            _plot(report, _memory_points, "MB, forward + backward"),
            "<h2>All numbers</h2><p>Errors are the largest against torch in float64; in parentheses multiples of torch's.</p>",
            _table(report),
            *_refusals(report),
            "<h2>The calls</h2><p>F is torch or jax_sdpa; both run the same lines.</p>",
            *(_call(outcome) for outcome in report.outcomes),
            f"<p class='note'>{DROPOUT_NOTE}</p></body></html>",
        ]
    )


def _faults(report: Report) -> list[str]:
    if not (faults := report.faults()):
        return []
    return ["<h2 class='fails'>At fault</h2><ul>", *(f"<li>{escape(fault)}</li>" for fault in faults), "</ul>"]


def _refusals(report: Report) -> list[str]:
    lines = ["<h2>Why backends refuse</h2>"] if report.refusals() else []
    for backend, reasons in report.refusals().items():
        lines.append(f"<p><b>{backend}</b></p><ul>")
        for reason, cases in reasons.items():
            lines.append(f"<li>{escape(reason)} <span class='note'>({escape(', '.join(cases))})</span></li>")
        lines.append("</ul>")
    return lines


def _call(outcome: Outcome) -> str:
    case = outcome.case
    return (
        f"<h3>{escape(case.name)}</h3><p>{escape(case.model)}; {escape(shape_words(outcome))}; source: {escape(case.source)}</p>"
        f"<pre>{escape(case.code())}</pre>"
    )


# --- the table


def _table(report: Report) -> str:
    tensors = ["out", *GRADIENTS.values()]
    head = ["case", "", *tensors, "fwd ms", "fwd+bwd ms", "MB fwd", "MB fwd+bwd", "verdict"]
    lines = ["<table><tr>", *(f"<th>{name}</th>" for name in head), "</tr>"]
    for outcome in report.outcomes:
        errors = [number(outcome.torch_errors[name].max) if name in outcome.torch_errors else "" for name in tensors]
        torch_verdict = f"<span class='{FAILS}'>{escape(outcome.torch_fault)}</span>"
        lines.append(_row([escape(outcome.case.name), "torch", *errors, *_costs(outcome.torch_cost), torch_verdict], "case"))
        for i, cell in enumerate(outcome.cells):
            errors = [_error(cell, outcome, name) for name in tensors]
            verdict = f"<span class='{cell.verdict}' title='{escape(' '.join(cell.reasons))}'>{escape(verdict_words(cell))}</span>"
            name = escape(shape_words(outcome)) if i == 0 else ""
            lines.append(_row([name, SHORT[cell.backend], *errors, *_costs(cell.cost, outcome.torch_cost), verdict]))
    return "\n".join([*lines, "</table>"])


def _row(texts: list[str], kind: str = "") -> str:
    return f"<tr class='{kind}'>{''.join(f'<td>{text}</td>' for text in texts)}</tr>"


def _error(cell: Cell, outcome: Outcome, name: str) -> str:
    if name not in cell.tensors:
        return ""
    error, base = cell.tensors[name].error, outcome.torch_errors[name].max
    text = number(error.max) if error.finite else "NaN"
    return f"{text} ({error.max / base:.1f}x)" if base and error.finite else text


def _costs(cost: Cost, torch: Cost | None = None) -> list[str]:
    torch = Cost() if torch is None else torch
    times = [milliseconds(cost.forward_ms, torch.forward_ms), milliseconds(cost.both_ms, torch.both_ms)]
    return [*times, megabytes(cost.forward_bytes), megabytes(cost.both_bytes)]


# --- the plots


def _error_points(i: int, outcome: Outcome) -> Points:
    return [
        (i, judged.error.rms / outcome.torch_errors[name].rms, SHORT[cell.backend], name)
        for cell in outcome.cells
        for name, judged in cell.tensors.items()
        if judged.error.finite and judged.error.rms and outcome.torch_errors[name].rms
    ]


def _time_points(i: int, outcome: Outcome) -> Points:
    points: Points = []
    for cell in outcome.cells:
        for field, kind in (("forward_ms", "forward"), ("both_ms", "forward + backward")):
            ours, torch = getattr(cell.cost, field), getattr(outcome.torch_cost, field)
            if ours and torch:
                points.append((i, ours / torch, SHORT[cell.backend], kind))
    return points


def _memory_points(i: int, outcome: Outcome) -> Points:
    sizes = {"torch": memory(outcome.torch_cost)} | {SHORT[cell.backend]: memory(cell.cost) for cell in outcome.cells}
    return [(i, size / 1e6, backend, "out") for backend, size in sizes.items() if size]


def _plot(report: Report, points_of: Callable[[int, Outcome], Points], label: str, limits: tuple[float, ...] = ()) -> str:
    """A dot for each measurement, cases from top to bottom, a logarithmic axis; vertical lines at `limits`."""
    points = [point for i, outcome in enumerate(report.outcomes) for point in points_of(i, outcome)]
    if not points:
        return "<p class='note'>Nothing was measured.</p>"
    figure = need("matplotlib.figure").Figure(figsize=(10, 1.2 + 0.3 * len(report.outcomes)), layout="constrained")
    axes = figure.add_subplot()
    backends = list(dict.fromkeys(backend for _, _, backend, _ in points))
    kinds = list(dict.fromkeys(kind for *_, kind in points))
    for b, backend in enumerate(backends):
        offset = 0.5 * ((b + 0.5) / len(backends) - 0.5)  # backends stand side by side within a case's line
        for kind in kinds:
            mine = [(x, i + offset) for i, x, owner, its_kind in points if (owner, its_kind) == (backend, kind)]
            if mine:
                name = backend if len(kinds) == 1 else f"{backend} {kind}"
                axes.plot(*zip(*mine, strict=True), MARKERS[kind], color=COLORS[backend], ms=5, alpha=0.8, label=name, ls="")
    for limit in limits:
        axes.axvline(limit, color="#888888", lw=1, ls="-" if limit == 1 else ":")
    axes.set_xscale("log")
    ticker = need("matplotlib.ticker")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")  # 0.5 rather than 5 x 10^-1
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel(label)
    axes.set_yticks(range(len(report.outcomes)), [outcome.case.name for outcome in report.outcomes])
    axes.set_ylim(len(report.outcomes) - 0.5, -0.5)
    axes.grid(axis="x", which="both", color="#eeeeee")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    return _image(figure, label)


def _image(figure: Any, label: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f"<img alt='{escape(label)}' src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"
