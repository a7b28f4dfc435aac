"""How figures look, and how one becomes SVG for the page, and SVG, PNG and CSV beside it."""

from __future__ import annotations

import csv
import io
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart. The page turns each into a CSS variable of its own, so
# that dark screens get lighter ones; a file by itself keeps these.
INK, MUTED, LINE, PAPER = "#1b1f24", "#5c6671", "#d5dae0", "#fffffe"
CHOSEN, REJECTED, MARGIN, OTHER = "#0072b2", "#d55e00", "#009e73", "#a0538a"
SERIES = (CHOSEN, REJECTED, MARGIN, OTHER, "#b07a00", "#3a8fbf", "#7a7f00", "#8c564b")
DARK = {
    INK: "#e6e9ed", MUTED: "#a3adb8", LINE: "#3a424b", PAPER: "#15181c", CHOSEN: "#5cb8f2", REJECTED: "#ff8f4a",
    MARGIN: "#35cfa3", OTHER: "#dc9ac6", SERIES[4]: "#e8b23f", SERIES[5]: "#9bd3f5", SERIES[6]: "#c9cf52",
    SERIES[7]: "#d7a79d",
}  # fmt: skip
# Ground of a loss surface, from low to high, light and dark.
_LEVELS = 12
_LIGHT_ENDS, _DARK_ENDS = ((0xF3, 0xF7, 0xFA), (0x9F, 0xB3, 0xC6)), ((0x1B, 0x21, 0x28), (0x55, 0x6A, 0x80))


def _blend(ends: tuple[tuple[int, ...], tuple[int, ...]], share: float) -> str:
    return "#" + "".join(f"{round(low + (high - low) * share):02x}" for low, high in zip(*ends, strict=True))


GROUND = tuple(_blend(_LIGHT_ENDS, level / (_LEVELS - 1)) for level in range(_LEVELS))
DARK |= {light: _blend(_DARK_ENDS, level / (_LEVELS - 1)) for level, light in enumerate(GROUND)}

# One CSS pixel of a phone to a point: a figure is as wide as the narrowest column it is shown in.
_POINTS = 72
WIDTH, HEIGHT = 360, 232
_STYLE: dict[Any, Any] = {
    "font.size": 10.5, "axes.titlesize": 10.5, "axes.labelsize": 10.5, "xtick.labelsize": 10, "ytick.labelsize": 10,
    "legend.fontsize": 10, "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
    "axes.edgecolor": LINE, "axes.facecolor": PAPER, "figure.facecolor": PAPER, "savefig.facecolor": PAPER,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.6,
    "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.8, "lines.markersize": 4,
    "svg.fonttype": "none", "svg.hashsalt": "dpo-report", "text.parse_math": False, "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 5), "axes.unicode_minus": True, "figure.constrained_layout.use": True,
}  # fmt: skip
_PNG_DPI = 200


@dataclass(frozen=True)
class Picture:
    """name: of its files. title, text: above it on the page. table: the numbers in it, a header first."""

    name: str
    title: str
    text: str
    svg: str
    png: bytes
    table: Sequence[Sequence[object]]

    @property
    def csv(self) -> str:
        return as_csv(self.table)

    @property
    def inline(self) -> str:
        """The figure as an element of the page: in its colours, with ids of its own."""
        body = self.svg[self.svg.index("<svg") :]
        body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
        body = re.sub(r'\s(?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", body, count=5)
        body = body.replace("xlink:href=", "href=")
        body = re.sub(r'\bid="([^"]+)"', rf'id="{self.name}-\1"', body)
        body = re.sub(r"url\(#([^)]+)\)", rf"url(#{self.name}-\1)", body)
        body = re.sub(r'href="#([^"]+)"', rf'href="#{self.name}-\1"', body)
        for color in DARK:
            body = body.replace(color, f"var(--c{color[1:]})")
        return body.replace("<svg", '<svg role="img" aria-hidden="true"', 1)


def as_csv(table: Sequence[Sequence[object]]) -> str:
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(
        [["" if each is None else each for each in row] for row in table]
    )
    return written.getvalue()


def palette() -> tuple[str, str]:
    """CSS declarations of the colours, for light and for dark screens."""
    light = "".join(f"--c{color[1:]}:{color};" for color in DARK)
    return light, "".join(f"--c{color[1:]}:{dark};" for color, dark in DARK.items())


def drawn(
    name: str,
    title: str,
    text: str,
    draw: Callable[[Axes], None],
    table: Sequence[Sequence[object]],
    *,
    height: float = HEIGHT,
) -> Picture:
    """A picture of one plot, drawn by `draw`."""
    # What a font lacks is a box in the PNG; the page and the SVG hold text.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure = Figure(figsize=(WIDTH / _POINTS, height / _POINTS))
        axes = figure.subplots()
        draw(axes)
        # Laid out once; each of the two files would do it again.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None}, dpi=_PNG_DPI)
        figure.savefig(png, format="png", dpi=_PNG_DPI, metadata={"Software": None})
    return Picture(name, title, text, _slim(svg.getvalue()), png.getvalue(), table)


def _slim(svg: str) -> str:
    """Coordinates, not text, to a hundredth of a point, and the reader's own font."""
    svg = re.sub(r'="[^"]*"', lambda attribute: re.sub(r"(\d\.\d\d)\d+", r"\1", attribute[0]), svg)
    return re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px; font-family: system-ui, sans-serif", svg)
