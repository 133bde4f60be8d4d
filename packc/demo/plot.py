"""The demo's figures as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from packc.demo.result import Result

_COLOURS = {"packc": "tab:blue", "stock Inductor": "tab:orange", "stock eager": "tab:red"}


def draw(packc: Result, stock: list[Result], file: Path) -> None:
    """Loss curves, step times, memory and compile times; the format is the file's ending."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplot_mosaic("tttrrr;ssmmcc")
    contenders = [packc, *stock]
    _loss(axes["t"], {each.name: each.losses() for each in contenders}, "Training: a step on each batch")
    _loss(axes["r"], {each.name: each.repeated for each in contenders}, "The first batch over and over (one shape)")
    _bars(axes["s"], {each.name: each.step_seconds for each in contenders}, "training step, s", log=True)
    _bars(axes["m"], {each.name: each.peak_mib for each in contenders}, "peak memory of a step, MiB")
    compiled = {each.name: each.compile_seconds for each in contenders if each.compile_seconds is not None}
    _bars(axes["c"], compiled, "compile time, cold, s")
    figure.savefig(file, dpi=120)


def _loss(axes: Axes, curves: dict[str, list[float]], title: str) -> None:
    for name, losses in curves.items():
        if losses:
            style = {"linewidth": 2} if name == "packc" else {"linestyle": "", "marker": "o", "fillstyle": "none"}
            axes.plot(range(1, len(losses) + 1), losses, label=name, color=_COLOURS[name], **style)
    axes.set(title=title, xlabel="step", ylabel="loss")
    axes.legend()


def _bars(axes: Axes, heights: dict[str, float], title: str, *, log: bool = False) -> None:
    drawn = axes.bar(list(heights), list(heights.values()), color=[_COLOURS[name] for name in heights])
    axes.bar_label(drawn, fmt="%.3g")
    axes.set_title(title)
    if log:
        axes.set_yscale("log")
    axes.margins(y=0.15)
