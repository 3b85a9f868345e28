"""The plots that a run leaves: loss.png, and curves.png of a policy."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minillm.io.disk import write_atomically
from minillm.tools.folder import read_metrics
from minillm.tools.streams import printable

Events = Sequence[dict[str, Any]]
POLICY_CURVES = (("score", "rubric"), ("kl", "length"), ("entropy", "explained_variance", "clip_share"))
"""What is drawn over the steps, one panel each."""


def plot_loss(folder: Path, key: str, unit: str) -> None:
    """loss.png: what training and validation events hold under `key`, over the steps."""
    events = read_metrics(folder)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for event, style in (("train", "-"), ("val", "o-")):
        draw(axes, events, event, "step", key, style, label=event)
    axes.set(xlabel="step", ylabel=unit)
    axes.set_title(printable(f"loss of {folder.name}"), parse_math=False)
    if axes.lines:
        axes.legend()
    save(figure, folder / "loss.png")


def plot_policy(folder: Path) -> None:
    """curves.png: what a policy gained over the steps, and over √KL how far it went for that.

    As long as the reward model is right, score and rubric rise together; where it is exploited, the score
    goes on rising while the rubric falls (Gao et al. 2023, arXiv 2210.10760, figure 1: both over √KL).
    """
    events = read_metrics(folder)
    events = [e | {"root_kl": max(0, e["kl"]) ** 0.5} if "kl" in e else e for e in events]
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    for axes, keys in zip(panels, POLICY_CURVES, strict=False):
        for event, style, suffix in (("train", "-", ""), ("val", "o-", ", held out")):
            for color, key in enumerate(keys):
                draw(axes, events, event, "step", key, style, label=key + suffix, color=f"C{color}")
        axes.set(xlabel="step")
    for key in ("score", "rubric"):
        draw(panels[3], events, "val", "root_kl", key, "o-", label=f"{key}, held out")
    panels[3].set(xlabel="√KL to the reference, nats a response")
    for axes in panels:
        if axes.lines:
            axes.legend(fontsize=8)
    save(figure, folder / "curves.png")


def draw(axes: Axes, events: Events, event: str, x: str, y: str, style: str, **how: Any) -> None:
    """One curve: `y` over `x` in all events of a kind that hold both; none where none does."""
    points = [(e[x], e[y]) for e in events if e["event"] == event and x in e and y in e]
    if points:
        axes.plot(*zip(*points, strict=True), style, markersize=3, **how)


def save(figure: Figure, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter of the folder's name that the font does not have
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
