"""The `jax-sdpa` command: `compare` runs the comparison with PyTorch, `explain` says which backend a call would run on."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jax_sdpa
from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.attention.bias import causal, causal_lower_right, sliding_window
from jax_sdpa.compare import cases, devices, inputs
from jax_sdpa.compare.extras import MissingExtraError, need
from jax_sdpa.compare.report import DROPOUT_NOTE, EXIT_FAILS, EXIT_HOLDS, EXIT_USAGE, WIDE, Report, as_json, show
from jax_sdpa.compare.runner import BACKENDS, SHORT, Outcome, run_case
from jax_sdpa.dispatch import Choice

COMPARE_EPILOG = f"""
{DROPOUT_NOTE}

exit codes: 0 every case that a backend ran holds; 1 one fails; 2 wrong usage; 3 nothing ran, every backend refused.
What a backend refuses is neither a pass nor a failure, and is counted apart.
"""


def _backend(name: str) -> str:
    """MATH, or math, or EFFICIENT for EFFICIENT_ATTENTION."""
    known = {short: full for full, short in SHORT.items()} | {full: full for full in BACKENDS}
    if name.upper() not in known:
        raise argparse.ArgumentTypeError(f"no backend is called {name}; there are {', '.join(SHORT.values())}.")
    return known[name.upper()]


def _sizes(text: str) -> tuple[int, ...]:
    """1,8,4096,64"""
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected sizes such as 1,8,4096,64, got {text!r}.") from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}.")
    return int(text)


def _new_file(text: str) -> Path:
    """A file that can be written when the run is over."""
    path = Path(text)
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} can't be written: there is no folder for it, or it is one.")
    return path


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="jax-sdpa", description="scaled_dot_product_attention for JAX, beside PyTorch's.")
    commands = top.add_subparsers(dest="command", required=True)

    compare = commands.add_parser(
        "compare", help="errors, gradients, times and memory of every backend beside PyTorch's", epilog=COMPARE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    compare.add_argument("--list", action="store_true", help="print the named cases and stop")
    compare.add_argument("--cases", nargs="+", metavar="NAME", help="only these of the named cases")
    compare.add_argument(
        "--size", choices=("small", "full"), default="small", help="small (default) for two cores, or nearer to the models' own"
    )
    compare.add_argument(
        "--backends", nargs="+", type=_backend, default=BACKENDS, metavar="BACKEND", help=", ".join(SHORT.values())
    )
    compare.add_argument("--repeats", type=_count, default=5, help="samples per time, of which the median counts (default 5)")
    compare.add_argument("--no-gradients", action="store_true", help="compare the forward alone")
    compare.add_argument("--device", choices=devices.NAMES, help="default: a GPU that both frameworks see, else the CPU")
    compare.add_argument("--seed", type=int, default=0, help="of the random inputs (default 0)")
    compare.add_argument("--json", type=_new_file, metavar="FILE", help="write the report as JSON")
    compare.add_argument("--html", type=_new_file, metavar="FILE", help="write the report as one HTML page with plots")
    own = compare.add_argument_group("your own tensors")
    own.add_argument(
        "--inputs", type=Path, metavar="FILE", help=".npz or .safetensors with query, key, value[, attn_mask], as (..., H, L, E)"
    )
    own.add_argument("--causal", "--is-causal", action="store_true", dest="is_causal", help="is_causal=True")
    own.add_argument("--gqa", "--enable-gqa", action="store_true", dest="enable_gqa", help="enable_gqa=True")
    own.add_argument("--scale", type=float, help="scale=…")
    own.add_argument("--dtype", choices=inputs.DTYPES, help="round the tensors to this dtype first")

    explain = commands.add_parser("explain", help="the backend that a call would run on, and why not the others; needs no torch")
    explain.add_argument("--query", type=_sizes, required=True, metavar="B,H,L,E")
    explain.add_argument("--key", type=_sizes, metavar="B,H,S,E", help="default: the query's")
    explain.add_argument("--value", type=_sizes, metavar="B,H,S,Ev", help="default: the key's")
    explain.add_argument("--dtype", choices=inputs.DTYPES, default="float32")
    explain.add_argument("--mask-shape", type=_sizes, metavar="B,H,L,S", help="a dense attn_mask of this shape")
    explain.add_argument("--mask-dtype", choices=("bool", *inputs.DTYPES), default="bool")
    explain.add_argument("--causal", "--is-causal", action="store_true", dest="is_causal", help="upper-left causal: is_causal=True")
    explain.add_argument("--lower-right", action="store_true", help="causal_lower_right(L, S): queries at the end of the keys")
    explain.add_argument("--window", type=_sizes, metavar="LEFT,RIGHT", help="sliding_window(LEFT, RIGHT), -1 = unlimited")
    explain.add_argument("--gqa", "--enable-gqa", action="store_true", dest="enable_gqa")
    explain.add_argument("--scale", type=float)
    explain.add_argument("--dropout", type=float, default=0.0, help="dropout_p=…")
    explain.add_argument("--backends", nargs="+", type=_backend, metavar="BACKEND", help="as within sdpa_kernel([...])")
    explain.add_argument("--device", help="cpu, cuda, cuda:sm90, cuda:sm90:cudnn91600, tpu, there or not; default: the one here")
    explain.add_argument("--grad", action="store_true", help="the call is to be differentiated")
    return top


# --- explain


def _explain(options: argparse.Namespace) -> int:
    """Print the choice; 0 if a backend runs the call, 1 if none does, 2 if there is no such call."""
    try:
        choice = _choice(options)
    except (ValueError, TypeError) as error:  # what the call itself would raise
        return _usage(error)
    print(choice)
    return EXIT_FAILS if choice.backend is None else EXIT_HOLDS


def _choice(options: argparse.Namespace) -> Choice:
    """What `jax_sdpa.explain` answers to the call that the options describe."""
    key = options.key or options.query
    value = options.value or key
    with jax.enable_x64(True) if options.dtype == "float64" else contextlib.nullcontext():
        query, key, value = (jax.ShapeDtypeStruct(shape, jnp.dtype(options.dtype)) for shape in (options.query, key, value))
        arguments: dict[str, Any] = {"is_causal": options.is_causal, "enable_gqa": options.enable_gqa, "scale": options.scale}
        if (mask := _mask(options)) is not None:
            arguments["attn_mask"] = mask
            if options.is_causal and not isinstance(mask, jax.ShapeDtypeStruct):
                arguments |= {"attn_mask": causal() & mask, "is_causal": False}
        if options.dropout:
            arguments |= {"dropout_p": options.dropout, "dropout_rng": jax.random.key(0)}
        allowed = [SDPBackend[name] for name in options.backends or ()]
        with sdpa_kernel(allowed) if allowed else contextlib.nullcontext():
            return jax_sdpa.explain(query, key, value, device=options.device, grad=options.grad, **arguments)


def _mask(options: argparse.Namespace) -> Any:
    """The mask that the options name: dense, structured, or none."""
    L, S = options.query[-2], (options.key or options.query)[-2]
    structured = None
    if options.lower_right:
        structured = causal_lower_right(L, S)
    if options.window:
        if len(options.window) != 2:
            raise ValueError(f"--window takes two distances, LEFT,RIGHT, got {options.window}.")
        window = sliding_window(*options.window, offset=S - L if options.lower_right else 0)
        structured = window if structured is None else structured & window
    if options.mask_shape is None:
        return structured
    if structured is not None:
        raise ValueError("--mask-shape goes with --causal alone or with none of --lower-right and --window.")
    return jax.ShapeDtypeStruct(options.mask_shape, jnp.dtype(options.mask_dtype))


# --- compare


def _work(options: argparse.Namespace) -> list[tuple[cases.Case, inputs.Inputs | None]]:
    """The cases, each with its tensors, or None where they are to be drawn when its turn comes."""
    own = {"is_causal": options.is_causal, "enable_gqa": options.enable_gqa, "scale": options.scale, "dtype": options.dtype}
    if options.inputs is not None:
        if options.cases:
            raise ValueError("--inputs and --cases exclude each other.")
        return [inputs.read(options.inputs, seed=options.seed, **own)]
    if any(own.values()):
        raise ValueError("--causal, --gqa, --scale and --dtype go with --inputs; the named cases have their own.")
    return [(case, None) for case in cases.named(options.cases)]


def _compare(options: argparse.Namespace) -> int:
    if options.list:
        for case in cases.CASES:
            print(f"{case.name:20} {case.model} ({case.dtype}; {case.shape(options.size)})")
        return EXIT_HOLDS
    try:
        work = _work(options)
        for module in ("rich", *(("matplotlib",) if options.html else ())):
            need(module)  # before minutes of work, not after
        device = devices.open_device(options.device)
    except (MissingExtraError, ValueError) as error:
        return _usage(error)
    started = datetime.datetime.now(datetime.UTC)
    outcomes = _run(options, device, work)
    report = Report(
        tuple(outcomes),
        {
            "date": started.isoformat(timespec="seconds"),
            "seconds": round((datetime.datetime.now(datetime.UTC) - started).total_seconds(), 1),
            "versions": devices.versions(),
            "device": device.describe(),
            "settings": {
                "device": device.name, "size": options.size, "seed": options.seed, "repeats": options.repeats,
                "gradients": not options.no_gradients, "torch threads": devices.threads(),
            },
        },
    )  # fmt: skip
    console = _console(sys.stdout)
    show(report, console)
    if options.json:
        options.json.write_text(json.dumps(as_json(report), indent=1, allow_nan=False) + "\n")
    if options.html:
        from jax_sdpa.compare.page import page  # needs matplotlib, which a run without --html does not

        options.html.write_text(page(report), encoding="utf-8")
    return report.exit_code()


def _console(stream: Any) -> Any:
    """rich's console; wide enough for the table where the output is no terminal."""
    console = need("rich.console").Console(file=stream)
    if not console.is_terminal:
        console = need("rich.console").Console(file=stream, width=max(console.width, WIDE + 30))
    return console


def _run(options: argparse.Namespace, device: devices.Device, work: list[tuple[cases.Case, inputs.Inputs | None]]) -> list[Outcome]:
    """Every case in turn, behind a progress bar on stderr."""
    rich = need("rich.progress")
    outcomes = []
    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeElapsedColumn())
    with rich.Progress(*columns, console=_console(sys.stderr), transient=True) as progress:
        steps = [2 + (1 if case.only else len(options.backends)) for case, _ in work]
        bar = progress.add_task("", total=sum(steps))
        done = 0
        for (case, given), count in zip(work, steps, strict=True):
            ticks = itertools.count(done)

            def tick(step: str, case: cases.Case = case, ticks: Iterator[int] = ticks) -> None:
                progress.update(bar, completed=next(ticks), description=f"{case.name}: {step}")

            drawn = inputs.draw(case, options.size, options.seed) if given is None else given
            outcomes.append(
                run_case(
                    case, drawn, device, size=options.size, backends=options.backends, repeats=options.repeats,
                    gradients=not options.no_gradients, tick=tick,
                )
            )  # fmt: skip
            done += count
            progress.update(bar, completed=done)
    return outcomes


def _usage(error: Exception) -> int:
    print(f"jax-sdpa: {error}", file=sys.stderr)
    return EXIT_USAGE


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parser().parse_args(arguments)
    return {"compare": _compare, "explain": _explain}[options.command](options)


if __name__ == "__main__":
    sys.exit(main())
