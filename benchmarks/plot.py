"""`python -m benchmarks.plot benchmarks/results/NAME.json PICTURE.svg`: what `benchmarks.gpu` measured, as bars (matplotlib)."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

PEERS = {"ours": "#1f6f8b", "torch CUDNN": "#e0a458", "tokamax": "#9bb8a3", "FA4": "#7d6b91", "torch FLASH": "#c9c9c9"}


def draw(measured: dict[str, Any], path: pathlib.Path) -> None:
    """The training shapes ('… full', '… causal'), a panel for each head dim, TFLOP/s of each peer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in measured["rows"] if row["case"].split()[-1] in ("full", "causal") and row["case"].startswith("B")]
    dims = [dim for dim in ("D64", "D128", "D256") if any(f" {dim} " in row["case"] for row in rows)]
    figure, panels = plt.subplots(1, len(dims), figsize=(4.2 * len(dims), 3.6), sharey=True, squeeze=False)
    for panel, dim in zip(panels[0], dims, strict=True):
        own = [row for row in rows if f" {dim} " in row["case"] and "L4096" not in row["case"]]
        for n, (peer, colour) in enumerate(PEERS.items()):
            places = [place + 0.17 * (n - (len(PEERS) - 1) / 2) for place in range(len(own))]
            panel.bar(places, [row["tflops"].get(peer, 0) for row in own], 0.16, label=peer, color=colour)
        panel.set_xticks(range(len(own)), [" ".join(row["case"].split()[2::2]) for row in own], rotation=35, ha="right", fontsize=8)
        panel.set_title(dim)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("TFLOP/s of device time")
    panels[0][0].legend(frameon=False, fontsize=8, ncols=2)  # D64 leaves room above its bars
    machine = measured["machine"]
    figure.suptitle(f"{machine['gpu']}, bfloat16, {machine['date']}, jax {machine['jax']}, torch {machine['torch']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)


def main(argv: list[str]) -> int:
    source, target = map(pathlib.Path, argv)
    draw(json.loads(source.read_text()), target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
