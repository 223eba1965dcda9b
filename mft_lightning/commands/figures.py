"""Pictures of the data: the lengths of every task, and how evenly tokens are dealt.

Figures are made without pyplot, which keeps global state and may look for a display. matplotlib is an optional extra
and imported only when a figure is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from mft_lightning.commands.panel_names import panel_names
from mft_lightning.data.balance import Balance
from mft_lightning.errors import UserError, first_line
from mft_lightning.screen import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

DPI = 150
HEADER = 0.65  # inches above the panels, for the title and a line below it
MAX_PANELS = 120  # a page of more tasks is not read any more
# The palette of Okabe and Ito, which colour-blind readers tell apart: https://jfly.uni-koeln.de/color/
BLUE, SKY, ORANGE, VERMILLION, INK, GREY = "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#222222", "#767676"
DASHED = (0, (4, 2))
BINS = 48  # of a lengths panel's width
# Asked for only where they are installed; matplotlib's own font has no Chinese, Japanese or Korean.
_EAST_ASIAN = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "PingFang SC")


def require_matplotlib() -> None:
    """Raise where no picture could be made.

    Raises:
        UserError: naming the extra to install.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"Plots need matplotlib ({first_line(error)}). Install it: pip install 'mft_lightning[plots]'."
        ) from error


def lengths_figure(lengths: Mapping[str, np.ndarray], seq_length: int) -> Figure:
    """A histogram of every task's conversations over their tokens, on one logarithmic axis.

    Args:
        lengths: tokens of each conversation by task, ``int64 [conversations]``, at least 1, before any is left out
            or cut.
        seq_length: most tokens of a conversation; what is longer has another colour, and its share stands above.

    Raises:
        UserError: matplotlib is missing.
    """
    shown = dict(list(lengths.items())[:MAX_PANELS])
    columns = 1 if len(shown) <= 4 else min(6, round((len(shown) * 0.7) ** 0.5))
    rows = max(1, ceil(len(shown) / columns))
    width, height = {1: (9.0, 1.9), 2: (4.8, 1.9), 3: (3.8, 1.8)}.get(columns, (2.7, 1.55))
    some = f": the first {len(shown):,} of {len(lengths):,} tasks" if len(shown) < len(lengths) else ""
    figure = _figure(columns * width, rows * height + 1.1, "How long the conversations of each task are" + some)
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False)
    edges = _edges(shown, seq_length)
    _log_axis(panels[0, 0], edges, small=columns > 3)  # of all panels; one by one would take the square of their time
    titles = panel_names([printable(task) for task in shown], {1: 70, 2: 32, 3: 24}.get(columns, 19))
    for axes, title, values in zip(panels.flat, titles, shown.values(), strict=False):
        _lengths_panel(axes, title, np.asarray(values), seq_length, edges, small=columns > 3)
    for number, axes in enumerate(panels.flat):
        if number >= len(shown):
            axes.set_visible(False)
        elif number + columns >= len(shown):  # the lowest of its column
            axes.tick_params(labelbottom=True)
    figure.supxlabel("tokens of a conversation (logarithmic)", fontsize=10, color=INK)
    middle = (1 - HEADER / figure.get_figheight()) / 2
    figure.supylabel("conversations", y=middle, fontsize=10, color=INK)
    _key(figure, _lengths_handles(seq_length))
    return figure


def _edges(lengths: Mapping[str, np.ndarray], seq_length: int) -> np.ndarray:
    """Bin edges for whole numbers, even on a logarithmic axis, one of them just above ``seq_length``.

    Short lengths get a bin each, so that none lies between two numbers and stays empty.
    """
    filled = [values for values in lengths.values() if len(values)]
    highest = max([seq_length, *(int(np.max(values)) for values in filled)])
    shortest = min([seq_length, *(int(np.min(values)) for values in filled)])
    lowest = max(1.0, min(shortest / 1.1, highest / 4))
    ratio = max(1.02, (highest * 1.1 / lowest) ** (1 / BINS))
    below = ceil(np.log(seq_length / lowest) / np.log(ratio))
    above = ceil(np.log(highest * 1.1 / seq_length) / np.log(ratio))
    places = seq_length * ratio ** np.arange(-below, above + 1, dtype=np.float64)
    return np.unique(np.append(np.round(places), min(shortest - 1, round(lowest)))) + 0.5


def _lengths_panel(
    axes: Axes, title: str, lengths: np.ndarray, seq_length: int, edges: np.ndarray, *, small: bool
) -> None:
    size = 7.0 if small else 8.5
    _plain(axes, size)
    # A task's name is text: no dollar sign in it begins a formula.
    style: dict[str, Any] = {"fontsize": size + 1, "fontweight": "bold", "parse_math": False, "fontfamily": _families()}
    axes.set_title(title, loc="left", color=INK, pad=size * 1.9, **style)
    if not len(lengths):
        axes.text(0.5, 0.5, "no conversation", transform=axes.transAxes, ha="center", color=GREY, fontsize=size + 1)
        axes.set_yticks([])
        return
    counts, _ = np.histogram(lengths, edges)
    colours = [VERMILLION if over else BLUE for over in edges[:-1] > seq_length]
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=colours, linewidth=0)
    axes.set_ylim(0, counts.max() * 1.12)
    axes.axvline(seq_length + 0.5, color=GREY, linewidth=1.2, linestyle=":", zorder=0, label="seq_length")
    median, high = (int(q) for q in np.quantile(lengths, (0.5, 0.99), method="higher"))  # as `inspect` prints them
    axes.axvline(median, color=INK, linewidth=1.2, label="median")
    axes.axvline(high, color=INK, linewidth=1.2, linestyle=DASHED, label="p99")
    number = f"{len(lengths):,}" if small else _counted(len(lengths), "conversation")
    told = f"{number}, median {median:,}, p99 {high:,}"
    axes.text(0, 1.03, told, transform=axes.transAxes, fontsize=size, color=INK)
    if over := int(np.count_nonzero(lengths > seq_length)):
        share = over / len(lengths)
        told = f"{share:.1%} longer" if share >= 0.0005 else f"{over:,} longer"
        axes.set_title(told, loc="right", fontsize=size, color=VERMILLION, pad=size * 1.9)


def _lengths_handles(seq_length: int) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    return [
        Line2D([], [], color=INK, linewidth=1.2, label="median"),
        Line2D([], [], color=INK, linewidth=1.2, linestyle=DASHED, label="99th percentile"),
        Line2D([], [], color=GREY, linewidth=1.2, linestyle=":", label=f"data.seq_length {seq_length:,}"),
        Patch(color=VERMILLION, label="longer"),
    ]


def balance_figure(balance: Balance) -> Figure:
    """The micro-batches of an epoch's first steps: their tokens over steps, and how far the worst is off the mean.

    Raises:
        UserError: matplotlib is missing.
    """
    steps, whole = len(balance.mean), balance.steps_per_epoch
    figure = _figure(12, 4.6, "How evenly tokens are dealt to the micro-batches of an optimizer step")
    micros = int(np.median(balance.micros[balance.counted])) if steps else 0
    told = [
        _counted(steps, "step") + ", the whole epoch" if steps == whole else f"first {steps:,} of {whole:,} steps",
        _counted(micros, "micro-batch", "micro-batches") + " a step",
        _counted(balance.world, "device"),
        "packed" if balance.packed else "padded (like lengths share a micro-batch, so that little is padding)",
    ]
    figure.text(0.012, 1 - 0.36 / 4.6, ", ".join(told), fontsize=9, color=INK, va="top")
    over_steps, spread = figure.subplots(1, 2, width_ratios=(2, 1))
    _tokens_over_steps(over_steps, balance)
    _deviations(spread, balance)
    return figure


def _tokens_over_steps(axes: Axes, balance: Balance) -> None:
    """A bar from the lightest to the heaviest of each step; no lines, as one step says nothing of the next."""
    _plain(axes, 8.5)
    steps = np.arange(len(balance.mean)) + 1
    size = float(np.clip(150 / max(1, len(steps)), 1.3, 4))
    axes.vlines(steps, balance.lightest, balance.heaviest, color=SKY, alpha=0.5, linewidth=1.3 * size, label="range")
    for name, colour in (("heaviest", VERMILLION), ("mean", INK), ("lightest", BLUE)):
        values = getattr(balance, name)
        axes.plot(steps, values, color=colour, linestyle="", marker="o", markersize=size, markeredgewidth=0, label=name)
    if balance.short.any():
        at = int(np.flatnonzero(balance.short)[0])
        axes.axvspan(at + 0.5, at + 1.5, color=GREY, alpha=0.2, linewidth=0, zorder=0, label="short last batch")
    axes.set_xlim(0.5, max(1, len(steps)) + 0.5)
    _whole_numbers(axes.xaxis, 8)
    axes.set_xlabel("optimizer step", fontsize=9.5, color=INK)
    axes.set_ylabel("tokens of a micro-batch", fontsize=9.5, color=INK)
    handles, names = axes.get_legend_handles_labels()
    _key_above(axes, handles[1:], names[1:], scale=5 / size)  # the bars speak for themselves


def _deviations(axes: Axes, balance: Balance) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    _plain(axes, 8.5)
    axes.set_xlabel("worst micro-batch of a step off its mean", fontsize=9.5, color=INK)
    axes.set_ylabel("steps", fontsize=9.5, color=INK)
    values = balance.deviation[balance.counted]
    if not len(values):
        axes.text(0.5, 0.5, "no step", transform=axes.transAxes, ha="center", color=GREY)
        return
    top = max(float(values.max()), 0.01)
    bins = int(np.clip(2 * len(values) ** 0.5, 6, 30))
    axes.hist(values, bins=list(np.linspace(0, top, bins + 1)), color=BLUE, linewidth=0)
    axes.set_xlim(0, top * 1.03)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=1 if top < 0.06 else 0))
    median, high = balance.quantile(0.5), balance.quantile(0.9)
    axes.axvline(median, color=INK, linewidth=1.2, label=f"median {median:.1%}")
    axes.axvline(high, color=INK, linewidth=1.2, linestyle=DASHED, label=f"90th percentile {high:.1%}")
    _key_above(axes, *axes.get_legend_handles_labels())


def _counted(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _figure(width: float, height: float, title: str) -> Figure:
    """An empty figure of inches, with the title above the place of the panels."""
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    below = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - HEADER / height), w_pad=0.06, h_pad=0.06)
    figure = Figure(figsize=(width, height), dpi=DPI, layout=below, facecolor="white")
    figure.text(0.012, 1 - 0.1 / height, title, fontsize=12, fontweight="bold", color=INK, va="top")
    return figure


def _key(figure: Figure, handles: list[Any]) -> None:
    """A legend in the line below the title."""
    place = (0.012, 1 - 0.36 / figure.get_figheight())
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=place,
        ncols=len(handles),
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        borderpad=0,
        borderaxespad=0,
    )


def _key_above(axes: Axes, handles: Any, names: Any, scale: float = 1) -> None:
    axes.legend(
        handles,
        names,
        loc="lower left",
        bbox_to_anchor=(0, 1.01),
        ncols=len(names),
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        markerscale=scale,
        borderaxespad=0,
        handletextpad=0.5,
        columnspacing=1.4,
    )


def _families() -> list[str]:
    """Fonts for names that a user gave, in the order in which a letter is looked for."""
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    return ["DejaVu Sans", *(name for name in _EAST_ASIAN if name in installed)]


def _plain(axes: Axes, size: float) -> None:
    """No box around the panel, whole numbers with separators, a faint grid behind the counts."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.tick_params(labelsize=size, colors=INK, length=0, pad=3)
    axes.tick_params(axis="x", length=3, color=GREY)
    _whole_numbers(axes.yaxis, 4)


def _whole_numbers(axis: Axis, bins: int) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axis.set_major_locator(MaxNLocator(bins, integer=True, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _log_axis(axes: Axes, edges: np.ndarray, *, small: bool) -> None:
    """Powers of two: with those times 1.5 where they are few, not all of them where they would stand too close."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    first, last = int(np.ceil(np.log2(edges[0]))), int(np.floor(np.log2(edges[-1])))
    stride = ceil((last - first + 1) / (5 if small else 9))
    ticks = 2.0 ** np.arange(first, last + 1, stride)
    if last - first < 3:
        ticks = np.union1d(ticks, 1.5 * 2.0 ** np.arange(max(1, first - 1), last + 1))
    axes.set_xscale("log", base=2)
    axes.set_xlim(edges[0], edges[-1])
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
