"""The page of a life: loss, size and vocabulary, gamma, entropy with syntropy's actions, and poison that was kept out."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, never a window

from matplotlib import pyplot as plt

from organism import UsageError

from . import Biography

ACTIONS = {"amplify": "tab:green", "boost": "yellowgreen", "dampen": "tab:orange", "ground": "tab:brown",
           "explore": "tab:cyan", "realign": "tab:red", "steady": "lightgrey", "divide": "tab:purple", "hibernate": "tab:blue"}  # fmt: skip


def draw(life: Biography, path: str | Path, title: str = "") -> None:
    """Write the page to a file; its ending says the format (.png, .svg, .pdf). Raises UsageError for another."""
    figure, axes = plt.subplots(5, 1, figsize=(10, 12), sharex=True, layout="constrained")
    try:
        span = max([row["ts"] for row in [*life.growth, *life.syntropy, *life.events]] + [life.born]) - life.born
        scale, unit = (1, "seconds") if span < 300 else (60, "minutes") if span < 7200 else (3600, "hours")
        for axis, panel in zip(axes, (_loss, _size, _gamma, _syntropy, _poison), strict=True):
            panel(life, axis, lambda ts: (ts - life.born) / scale)
            axis.grid(alpha=0.25)
        for event in life.events:
            if event["kind"] == "growth" and "stage" in event["data"]:
                at = (event["ts"] - life.born) / scale
                for axis in axes:
                    axis.axvline(at, color="black", linewidth=0.8, linestyle=":")
                axes[0].annotate(event["data"]["stage"], (at, 1), xycoords=("data", "axes fraction"), rotation=90, va="top",
                                 ha="right", fontsize=8)  # fmt: skip
        axes[-1].set_xlim(left=0)
        axes[-1].set_xlabel(f"{unit} since birth")
        figure.suptitle(title or "A life")
        figure.savefig(path, dpi=110)
    except ValueError as error:
        raise UsageError(f"The plot cannot be written to {path}: {error}") from error
    finally:
        plt.close(figure)


def _curve(axis, rows, when, name: str, label: str, color: str, drawstyle: str = "default") -> None:
    points = [(when(row["ts"]), row[name]) for row in rows if row[name] is not None]
    if points:
        axis.plot(*zip(*points, strict=True), color=color, linewidth=1.3, label=label, drawstyle=drawstyle)
    axis.set_ylabel(label, color=color)


def _loss(life: Biography, axis, when) -> None:
    _curve(axis, life.growth, when, "loss", "loss (nats a token)", "tab:blue")


def _size(life: Biography, axis, when) -> None:
    _curve(axis, life.growth, when, "n_params", "parameters", "tab:purple", "steps-post")
    axis.set_yscale("log")
    other = axis.twinx()
    _curve(other, life.growth, when, "vocab_size", "vocabulary (tokens)", "tab:olive", "steps-post")


def _gamma(life: Biography, axis, when) -> None:
    _curve(axis, life.growth, when, "gamma_magnitude", "gamma (distance from birth)", "tab:red")
    other = axis.twinx()
    _curve(other, life.growth, when, "corpus_chars", "lived (bytes)", "tab:gray")


def _syntropy(life: Biography, axis, when) -> None:
    _curve(axis, life.syntropy, when, "entropy_after", "entropy (nats)", "dimgray")
    for action, color in ACTIONS.items():
        points = [(when(r["ts"]), r["entropy_after"]) for r in life.syntropy if r["action_taken"] == action]
        if points:
            axis.scatter(*zip(*points, strict=True), color=color, s=16, label=action, zorder=3)
    if life.syntropy:
        axis.legend(fontsize=7, ncols=5, loc="upper right")


def _poison(life: Biography, axis, when) -> None:
    for decision, marker, color in (
        ("refuse", "x", "tab:red"),
        ("delay", "o", "tab:orange"),
        ("roll back", "s", "black"),
    ):
        points = [(when(row["ts"]), row["rule"]) for row in life.quarantine if row["decision"] == decision]
        if points:
            axis.scatter(*zip(*points, strict=True), marker=marker, color=color, s=22, label=decision)
    if life.quarantine:
        axis.legend(fontsize=7, loc="upper right")
    else:
        axis.set_yticks([])
    axis.margins(y=0.2)
    axis.set_ylabel("kept out, by rule")
