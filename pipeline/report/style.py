"""How figures look and are saved: legible in print, in grey, and for the colour-blind.

Colours are those of Okabe and Ito ("Color Universal Design", 2008); every line also has a marker
and a dash pattern of its own, so that nothing hangs on colour. matplotlib is imported only here and
in the files of figures, and only when one is drawn.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = list[tuple[float, float, float, float]]
"""Points (x, middle, low, high), ascending in x."""

WIDTH = 7.2
"""Inches: what an A4 page leaves between its margins."""

BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK, GREY = "#E69F00", "#56B4E9", "#000000", "#595959"
_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_DPI = 150

_SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine draws the same
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    # Names of runs come from outside: "$" in them begins no formula.
    "text.parse_math": False,
    # Letters become outlines, so that a picture looks alike wherever it is opened.
    "svg.fonttype": "path",
    # Ids in the picture are random otherwise.
    "svg.hashsalt": "editfleet",
}


@dataclass(frozen=True)
class Picture:
    """A finished figure.

    Attributes:
        name: stem of its files.
        caption: what it shows, and in which units.
        alt: its message in words, for those who do not see it.
        svg: the picture.
        png: the same in pixels.
    """

    name: str
    caption: str
    alt: str
    svg: bytes
    png: bytes


def line_style(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of the line with this number, unlike those of any other near it."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number % len(_DASHES)],
    }


def draw(
    name: str,
    caption: str,
    alt: str,
    paint: Callable[["Figure"], None],
    height: float,
) -> Picture:
    """Make a figure of the page's width and `height` inches, have it painted, and save it."""
    with _drawing():
        from matplotlib.figure import Figure

        # Not through pyplot: no window, no state that other threads or the user's code would see.
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure)
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        # The second picture has the places of the first, which take longest to find.
        figure.set_layout_engine("none")
        figure.savefig(png, format="png", dpi=_DPI, metadata={"Software": None})
    return Picture(name, caption, alt, svg.getvalue(), png.getvalue())


def panels(figure: "Figure", count: int, columns: int, **choices: Any) -> list["Axes"]:
    """Lay out `count` panels in rows of `columns`; the last may end with gaps."""
    rows = -(-count // columns)
    grid = figure.subplots(rows, columns, squeeze=False, **choices).ravel().tolist()
    for unused in grid[count:]:
        unused.set_visible(False)
    found: list[Axes] = grid[:count]
    return found


def error_bar(value: float, low: float, high: float) -> list[list[float]]:
    """How far an interval goes below and above one value, as matplotlib wants it.

    Runs of earlier versions have intervals that miss a mean of 0 or 1 by a rounding error.
    """
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def legend_below(figure: "Figure", axes: "Axes", columns: int = 3) -> None:
    """One legend for the whole figure, of the lines that are labelled in `axes`."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))


def plot_curve(
    axes: "Axes", curve: Curve, label: str, style: dict[str, Any], *, banded: bool = True
) -> None:
    """Draw a line through the middles, with its band from low to high."""
    if not curve:
        return
    x, middle, low, high = zip(*curve, strict=True)
    # Many points: markers now and then still tell lines apart.
    every = max(1, len(x) // 12)
    axes.plot(x, middle, label=label, markevery=every, **style)
    if banded and low != high:
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def whole_numbers(axis: Any) -> None:
    """Tick an axis of rounds, layers or steps at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))


def from_zero(axes: "Axes") -> None:
    """Let y begin at 0, with room above the highest point."""
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])


def log_scale(axes: "Axes") -> None:
    """Make y logarithmic, ticked in plain numbers: without formulas there is no power of ten."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter(plain)
    # Within a power of ten there may be no other ticks.
    axes.yaxis.set_minor_formatter(plain if high < 10 * low else NullFormatter())


@contextmanager
def _drawing() -> Iterator[None]:
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context(_SETTINGS):
        # A letter that the font lacks is drawn as a box; the page beside it has the real one.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield
