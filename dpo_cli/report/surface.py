"""The picture DPO is explained with: the loss over what a pair's probabilities have become, and the run's way there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from dpo_cli.report.drawing import CHOSEN, GROUND, INK, MUTED, PAPER, REJECTED, Picture, drawn
from dpo_cli.report.figures import legend
from dpo_cli.report.loss_view import LossView, Surface
from dpo_cli.report.pairs import Floats, HeldOutPairs, Ranking

_GRID, _ARROWS = 121, 11
# Above so many dots a picture of them is smaller than their coordinates.
_MOST_VECTOR_DOTS = 400
_HEIGHT = 350
_NICE = (0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000)


@dataclass(frozen=True)
class Window:
    """A part of the plane of log-ratios. ratios: axes are the ratios themselves."""

    x1: tuple[float, float]
    x2: tuple[float, float]
    ratios: bool = False

    def grid(self, points: int, *, inset: float = 0.0) -> tuple[Floats, Floats]:
        sides = []
        for low, high in (self.x1, self.x2):
            space = (high - low) * inset
            sides.append(np.linspace(low + space, high - space, points))
        first, second = np.meshgrid(*sides)
        return first, second


def surfaces_of(ranking: Ranking, loss: LossView | None) -> list[Picture]:
    """Nothing for a loss without a value for one pair."""
    pairs = ranking.pairs
    chosen, rejected = pairs.log_ratios()
    finite = np.isfinite(chosen).all(0) & np.isfinite(rejected).all(0)
    if loss is None or not finite.any():
        return []
    painter = _Painter(ranking, loss, chosen[:, finite], rejected[:, finite], ranking.right[-1][finite])
    whole = _square(painter.chosen[-1], painter.rejected[-1], keep=0.98)
    path = _square(painter.path[0], painter.path[1], keep=1.0)
    against = "log π/π_ref" if pairs.reference is not None else "log π/π at the start"
    pictures = [
        painter.picture(
            "surface", "Loss surface and where pairs end", whole, dots=True,
            text=f"{against} of the chosen and of the rejected response. Shade and contours: the run's own loss for a "
            "pair of median length. Arrows: downhill, longer where steeper. Dots: held-out pairs at the end. "
            "Line: their mean at every evaluation, from the star to the diamond.",
        ),
        painter.picture(
            "path", "The way of the mean", path, dots=False,
            text="The same surface, near the mean's path; numbers are steps. Up and right, both responses gain; below "
            "the dashed diagonal the chosen one has gained on the rejected one.",
        ),
    ]  # fmt: skip
    inside = np.exp(np.clip(np.stack((painter.chosen[-1], painter.rejected[-1])), -30, 5))
    reach = float(np.clip(np.quantile(inside.max(0), 0.8), 1.5, 4))
    within = (inside <= reach).all(0).mean()
    pictures.append(
        painter.picture(
            "ratios", "The same in probabilities", Window((0.0, reach), (0.0, reach), ratios=True), dots=True,
            text="x₁ = π/π_ref of chosen, x₂ of rejected. In probabilities the slope in x₂ is x₁/x₂ times that in x₁ "
            "(for losses of the margin alone): the less likely the rejected response, the more a step pushes it down "
            f"rather than the chosen one up. {within:.0%} of pairs lie inside.",
        )
    )  # fmt: skip
    return [picture for picture in pictures if picture is not None]


def _square(first: Floats, second: Floats, *, keep: float) -> Window:
    """Equal scales on both axes, so that the diagonal is one; zero is inside."""
    sides = []
    for values in (first, second):
        low, high = np.quantile(values, [(1 - keep) / 2, (1 + keep) / 2])
        sides.append((min(low, 0.0), max(high, 0.0)))
    reach = max(max(high - low for low, high in sides), 1e-3) * 1.16
    (low1, high1), (low2, high2) = sides
    middle1, middle2 = (low1 + high1) / 2, (low2 + high2) / 2
    return Window((middle1 - reach / 2, middle1 + reach / 2), (middle2 - reach / 2, middle2 + reach / 2))


@dataclass(frozen=True)
class _Painter:
    """chosen, rejected: (evaluations, pairs) finite log-ratios. right: (pairs,) at the end."""

    ranking: Ranking
    loss: LossView
    chosen: Floats
    rejected: Floats
    right: NDArray[np.bool_]

    @property
    def path(self) -> Floats:
        """(2, evaluations) the means, from where policy and reference are one."""
        return np.stack((self.chosen.mean(1), self.rejected.mean(1)))

    def picture(self, name: str, title: str, window: Window, *, dots: bool, text: str) -> Picture | None:
        first, second = window.grid(_GRID)
        ground = self._surface(first, second, ratios=window.ratios)
        if ground is None:
            return None
        at = window.grid(_ARROWS, inset=0.06)
        field = self._surface(*at, ratios=window.ratios)
        assert field is not None

        def draw(axes: Axes) -> None:
            levels = _levels(ground.values)
            axes.contourf(first, second, ground.values, levels=levels, cmap=ListedColormap(GROUND), extend="both")
            lines = axes.contour(
                first, second, ground.values, levels=levels, colors=MUTED, linewidths=0.5, linestyles="-"
            )
            axes.clabel(lines, levels[:: max(1, len(levels) // 6)], fontsize=9, fmt="%g", colors=INK)
            _arrows(axes, at, field)
            if not window.ratios:
                axes.axline((0, 0), slope=1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
            if dots:
                self._dots(axes, ratios=window.ratios)
            self._path(axes, window, numbers=not dots)
            axes.set_xlim(*window.x1)
            axes.set_ylim(*window.x2)
            axes.grid(visible=False)
            side = "x₁, chosen", "x₂, rejected"
            ratio = "log-ratio of chosen", "log-ratio of rejected"
            axes.set_xlabel((side if window.ratios else ratio)[0])
            axes.set_ylabel((side if window.ratios else ratio)[1])
            axes.set_aspect("equal")
            if dots:
                legend(axes, columns=3)

        return drawn(name, title, text, draw, self._table(dots=dots), height=_HEIGHT)

    def _surface(self, first: Floats, second: Floats, *, ratios: bool) -> Surface | None:
        """In ratios, slopes are divided by them: d loss / dx = d loss / dlog x / x."""
        pairs = self.ranking.pairs
        start = _typical(pairs)
        if ratios:
            first, second = np.maximum(first, 1e-2), np.maximum(second, 1e-2)
        x1, x2 = (np.log(first), np.log(second)) if ratios else (first, second)
        tokens = np.median(pairs.tokens, axis=1)
        found = self.loss.surface(x1, x2, start=start, has_reference=pairs.reference is not None, tokens=tokens)
        if found is None or not ratios:
            return found
        return Surface(found.values, found.slope_chosen / first, found.slope_rejected / second)

    def _dots(self, axes: Axes, *, ratios: bool) -> None:
        places = np.stack((self.chosen[-1], self.rejected[-1]))
        if ratios:
            places = np.exp(np.clip(places, -30, 30))
        raster = places.shape[1] > _MOST_VECTOR_DOTS
        size = 13 if places.shape[1] <= _MOST_VECTOR_DOTS else 7
        for name, which, color, mark in (("right", self.right, CHOSEN, "o"), ("wrong", ~self.right, REJECTED, "s")):
            axes.scatter(
                places[0, which], places[1, which], s=size, c=color, marker=mark, alpha=0.75, linewidths=0.4,
                edgecolors=PAPER, label=f"{name} ({which.sum():,})", rasterized=raster, zorder=3,
            )  # fmt: skip

    def _path(self, axes: Axes, window: Window, *, numbers: bool) -> None:
        path = np.exp(self.path) if window.ratios else self.path
        axes.plot(*path, color=PAPER, linewidth=4, zorder=4, solid_joinstyle="round")
        axes.plot(
            *path, color=INK, linewidth=1.8, zorder=5, label="mean", marker="o" if numbers else None, markersize=3.5
        )
        axes.plot(*path[:, 0], marker="*", color=INK, markeredgecolor=PAPER, markersize=13, zorder=6)
        axes.plot(*path[:, -1], marker="D", color=INK, markeredgecolor=PAPER, markersize=7.5, zorder=6)
        steps = self.ranking.pairs.steps
        for place in _apart(path, (window.x1[1] - window.x1[0]) / 12) if numbers else ():
            axes.annotate(
                f"{steps[place]:,}", (float(path[0, place]), float(path[1, place])), xytext=(7, 5),
                textcoords="offset points", color=INK, fontsize=10, zorder=7,
            )  # fmt: skip

    def _table(self, *, dots: bool) -> list[list[object]]:
        table: list[list[object]] = [["what", "step or pair", "log-ratio of chosen", "log-ratio of rejected"]]
        steps = self.ranking.pairs.steps.tolist()
        table += [["mean", step, x1, x2] for step, x1, x2 in zip(steps, *self.path.tolist(), strict=True)]
        if dots:
            ends = zip(self.chosen[-1].tolist(), self.rejected[-1].tolist(), strict=True)
            table += [["pair", place, x1, x2] for place, (x1, x2) in enumerate(ends)]
        return table


def _typical(pairs: HeldOutPairs) -> Floats:
    """(2,) median log-probs that ratios are against."""
    against = np.stack((pairs.chosen[0], pairs.rejected[0])) if pairs.reference is None else pairs.reference
    middle: Floats = np.nanmedian(against, axis=1)
    return middle


def _apart(path: Floats, distance: float) -> list[int]:
    """Places of a path whose labels have room: the last one, the first, then each in turn."""
    shown: list[int] = []
    for place in (path.shape[1] - 1, *range(path.shape[1] - 1)):
        if all(np.hypot(*(path[:, place] - path[:, other])) > distance for other in shown):
            shown.append(place)
    return shown


def _levels(values: Floats) -> Floats:
    """At most as many as there are shades: round numbers where the loss is positive, even steps otherwise."""
    low, high = float(values.min()), float(np.quantile(values, 0.995))
    nice = np.array([level for level in _NICE if low < level < high])
    if low >= 0 and len(nice) >= 3:
        return nice[:: -(-len(nice) // (len(GROUND) - 1))]
    if high - low < 1e-9:
        return np.array([low, low + 1e-6])
    return np.array(MaxNLocator(nbins=len(GROUND) - 2).tick_values(low, high))


def _arrows(axes: Axes, at: tuple[Floats, Floats], field: Surface) -> None:
    """Downhill; lengths as the square root of the slope's, which leaves the gentle ones visible."""
    down = -np.stack((field.slope_chosen, field.slope_rejected))
    size = np.hypot(*down)
    largest = float(np.quantile(size, 0.98)) or 1.0
    length = np.sqrt(np.clip(size / largest, 0, 1))
    shown = length > 0.02
    direction = down / np.maximum(size, 1e-300) * length
    space = at[0][0, 1] - at[0][0, 0]
    axes.quiver(
        at[0][shown], at[1][shown], direction[0][shown], direction[1][shown], color=MUTED, angles="xy",
        scale_units="xy", scale=1.15 / space, width=0.0045, headwidth=4, headlength=4.5, headaxislength=4, zorder=2,
    )  # fmt: skip
