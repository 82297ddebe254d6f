"""The plots of a report, as PNG and SVG."""
import io
import os
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Sequence, Tuple

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

if TYPE_CHECKING:
    from .curves import Curve

PLOTS = ('accuracy-against-size', 'accuracy-against-gmacs')
FORMATS = ('png', 'svg')
# Okabe and Ito's colours, told apart by the colour-blind, and a marker for each
_COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000', '#999999')
_MARKERS = 'osD^vP*X'
_MAX_TICKS = 12


def draw(folder: str, curves: 'Sequence[Curve]', metric: str) -> Dict[str, str]:
    """Write both plots as PNG (1600 pixels wide) and SVG into a folder.

    Args:
        folder: An existing folder.
        curves: What is shown.
        metric: Name of the metric, in per cent.

    Returns:
        The SVG text of each plot.
    """
    texts = {}
    for name, plot in zip(PLOTS, (against_size, against_gmacs)):
        figure = plot(curves, _label(metric))
        FigureCanvasAgg(figure)
        figure.savefig(os.path.join(folder, f'{name}.png'), dpi=200)
        file = io.StringIO()
        with matplotlib.rc_context({'svg.hashsalt': name}):  # the same file for the same curves
            figure.savefig(file, format='svg', metadata={'Date': None})
        texts[name] = file.getvalue()
        with open(os.path.join(folder, f'{name}.svg'), 'w', encoding='utf-8') as svg:
            svg.write(texts[name])
    return texts


def save_against_size(path: str, curves: 'Sequence[Curve]', metric: str) -> None:
    """Write the plot of accuracy against image size alone, 1200 pixels wide.

    Args:
        path: File of any kind that matplotlib writes.
        curves: What is shown.
        metric: Name of the metric, in per cent.
    """
    figure = against_size(curves, _label(metric))
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)


def _label(metric: str) -> str:
    return f'{metric[:1].upper()}{metric[1:]} accuracy (%)'


def against_size(curves: 'Sequence[Curve]', ylabel: str) -> Figure:
    """Accuracy against image size: solid as the model is used, dashed with its own statistics."""
    figure = Figure(figsize=(8, 5.5), layout='constrained')
    axes = figure.add_subplot()
    for i, curve in enumerate(curves):
        color, marker = _style(i)
        axes.fill_between(curve.sizes, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)
        axes.plot(curve.sizes, curve.value, color=color, marker=marker,
                  label=f'{curve.label}, calibrated' if curve.calibrated else curve.label)
        if curve.calibrated:
            axes.plot(curve.sizes, curve.own, color=color, marker=marker, markersize=4, linestyle='--', linewidth=1,
                      markerfacecolor='white', label=f'{curve.label}, own statistics')
    axes.set_xscale('log')
    _ticks(axes, sorted({size for curve in curves for size in curve.sizes}))
    axes.set_xlabel('Image size (px)')
    bands = [text for text, several in (('one run with its 95 % interval', False),
                                        ('mean of several runs, from the lowest to the highest', True))
             if any(curve.low != curve.high and (curve.runs > 1) == several for curve in curves)]
    if bands:
        axes.set_title('Bands: ' + '; '.join(bands), fontsize=9, color='#555555')
    _finish(figure, axes, ylabel)
    return figure


def against_gmacs(curves: 'Sequence[Curve]', ylabel: str) -> Figure:
    """Accuracy against operations, each point with its image size; the Pareto front of all is marked."""
    figure = Figure(figsize=(8, 5.5), layout='constrained')
    axes = figure.add_subplot()
    front = pareto_front((x, y) for curve in curves for x, y in zip(curve.gmacs, curve.value))
    axes.plot(*zip(*front), color='#999999', linewidth=6, alpha=0.5, solid_capstyle='round',
              label='Pareto front', zorder=1)
    for i, curve in enumerate(curves):
        color, marker = _style(i)
        axes.plot(curve.gmacs, curve.value, color=color, marker=marker, label=curve.label)
    labelled = set()
    for curve in curves:  # each size once where models are of one kind
        for size, x, y in zip(curve.sizes, curve.gmacs, curve.value):
            if (x, y) in front and (size, x) not in labelled:
                labelled.add((size, x))
                axes.annotate(f'{size} px', (x, y), textcoords='offset points', xytext=(0, 7), ha='center', fontsize=8)
    axes.set_xscale('log')
    costs = [x for curve in curves for x in curve.gmacs]
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(costs) > 8 * min(costs) else (1, 1.5, 2, 3, 4, 6, 8)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
    axes.set_xlabel('Operations per image (GMACs)')
    _finish(figure, axes, ylabel)
    return figure


def pareto_front(points: Iterable[Tuple[float, float]]) -> List[Tuple[float, float]]:
    """Of points (cost, value) those that no other equals or beats in both, by ascending cost."""
    front: List[Tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or value > front[-1][1]:
            front.append((cost, value))
    return front


def _style(number: int) -> Any:
    return _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]


def _ticks(axes: Any, sizes: List[int]) -> None:
    """The measured sizes as ticks; of many every second or third."""
    step = -(-len(sizes) // _MAX_TICKS)
    axes.xaxis.set_major_locator(FixedLocator(sizes[::step]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter('{x:g}'))


def _finish(figure: Figure, axes: Any, ylabel: str) -> None:
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=2, frameon=False, fontsize=9)
