"""Accuracy against image size as a table, files and a page; and the answers to the paper's four questions."""
import csv
import json
import os
from dataclasses import dataclass
from statistics import mean
from typing import Any, Dict, List, Optional, Sequence, Tuple

import jinja2

from . import plots

SIZES_FILE = 'sizes.json'
REPORT_FILES = (SIZES_FILE, 'sizes.csv', 'report.html', *(
    f'{plot}.{kind}' for plot in plots.PLOTS for kind in plots.FORMATS))
METRIC_NAMES = {'top1': 'top-1', 'top5': 'top-5', 'map': 'mAP', 'micro_f1': 'micro F1', 'macro_f1': 'macro F1',
                'sample_f1': 'sample F1'}
WITHIN = 1.  # points of accuracy: what "stays within" means in the question on resilience


@dataclass(frozen=True)
class Curve:
    """A metric against the image size: of one checkpoint, or the mean over several of one name.

    Attributes:
        name: What the checkpoints are called, and their crop where several were measured.
        sizes: Image sizes in pixels, ascending.
        value: The metric as the model is used, at each size.
        low: Lower ends of the 95 % intervals; of several checkpoints the lowest.
        high: Upper ends, or the highest.
        own: The metric with the statistics that the weights were saved with.
        gmacs: Billions of multiply-accumulates of an image.
        calibrated: Whether calibration made a difference between ``value`` and ``own``.
        rows: The results at each size, means over the checkpoints.
        training: Mean of what training cost, as far as it is known.
        runs: Number of checkpoints.
    """
    name: str
    sizes: Tuple[int, ...]
    value: Tuple[float, ...]
    low: Tuple[float, ...]
    high: Tuple[float, ...]
    own: Tuple[float, ...]
    gmacs: Tuple[float, ...]
    calibrated: bool
    rows: Tuple[Dict[str, Any], ...]
    training: Dict[str, float]
    runs: int

    @property
    def best(self) -> int:
        """Where the metric is highest; of equal ones the smallest size."""
        return max(range(len(self.sizes)), key=lambda i: (self.value[i], -self.sizes[i]))


def make_curves(checkpoints: Sequence[Dict[str, Any]], metric: str = 'top1') -> List[Curve]:
    """The curves of a document's checkpoints, those of one name and crop together, in the order they came."""
    crops = {row.get('crop_pct') for checkpoint in checkpoints for row in checkpoint['results']}
    groups: Dict[Tuple[str, Any], List[Tuple[Dict[str, Any], List[Dict[str, Any]]]]] = {}
    for checkpoint in checkpoints:
        for crop in sorted({row.get('crop_pct') for row in checkpoint['results']}, key=lambda x: x or 0):
            rows = sorted((row for row in checkpoint['results'] if row.get('crop_pct') == crop),
                          key=lambda row: row['img_size'])
            groups.setdefault((checkpoint['name'], crop), []).append((checkpoint, rows))
    return [_curve(name if len(crops) == 1 else f'{name}, crop {crop:g}', runs, metric)
            for (name, crop), runs in groups.items()]


def _curve(name: str, runs: List[Tuple[Dict[str, Any], List[Dict[str, Any]]]], metric: str) -> Curve:
    columns = list(zip(*(rows for _, rows in runs)))  # the rows of all runs at each size
    low, high = f'{metric}_low', f'{metric}_high'
    if len(runs) > 1 or low not in runs[0][1][0]:
        low = high = metric
    training = [checkpoint.get('training') or {} for checkpoint, _ in runs]
    return Curve(
        name=name, sizes=tuple(column[0]['img_size'] for column in columns), runs=len(runs),
        value=tuple(mean(row[metric] for row in column) for column in columns),
        low=tuple(min(row[low] for row in column) for column in columns),
        high=tuple(max(row[high] for row in column) for column in columns),
        own=tuple(mean(row[f'{metric}_uncalibrated'] for row in column) for column in columns),
        gmacs=tuple(column[0]['gmacs'] for column in columns),
        calibrated=any(checkpoint['calibrated'] for checkpoint, _ in runs),
        rows=tuple(_mean_rows(column) for column in columns),
        training={key: mean(part[key] for part in training) for key in ('gmacs', 'seconds', 'steps')
                  if all(key in part for part in training)})


def _mean_rows(rows: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    return {key: mean(row[key] for row in rows) for key, value in rows[0].items()
            if isinstance(value, (int, float)) and all(key in row for row in rows)}


def compare(curve: Curve, baseline: Curve) -> Dict[str, Any]:
    """The paper's four questions on a model, against another one.

    Returns:
        ``match_size``, the smallest size with at least the baseline's best accuracy, and ``fewer_operations``, how
        many times fewer than at the baseline's best size (both ``None`` where it is not reached); ``best`` and
        ``best_size``; ``error_reduction`` of the best accuracies, a share of the baseline's error (``None`` where that
        is 0); ``training_gmacs``, ``training_seconds`` and ``training_steps``, relative to the baseline's as far as
        known; ``range``, the smallest and the largest size around the best one within 1 point of it, and
        ``baseline_range``.
    """
    target = baseline.value[baseline.best]
    matching = [i for i, value in enumerate(curve.value) if value >= target]
    error = 100 - target
    answers: Dict[str, Any] = {
        'name': curve.name, 'baseline': baseline.name, 'baseline_best': target,
        'baseline_best_size': baseline.sizes[baseline.best],
        'match_size': curve.sizes[matching[0]] if matching else None,
        'fewer_operations': baseline.gmacs[baseline.best] / curve.gmacs[matching[0]] if matching else None,
        'best': curve.value[curve.best], 'best_size': curve.sizes[curve.best],
        'error_reduction': (curve.value[curve.best] - target) / error if error > 0 else None,
        'range': size_range(curve), 'baseline_range': size_range(baseline)}
    for key in ('gmacs', 'seconds', 'steps'):
        known = baseline.training.get(key) and key in curve.training
        answers[f'training_{key}'] = curve.training[key] / baseline.training[key] if known else None
    return answers


def size_range(curve: Curve) -> Tuple[int, int]:
    """The smallest and the largest size, with all measured ones between, within a point of the best accuracy."""
    first = last = curve.best
    bound = curve.value[curve.best] - WITHIN
    while first > 0 and curve.value[first - 1] >= bound:
        first -= 1
    while last + 1 < len(curve.sizes) and curve.value[last + 1] >= bound:
        last += 1
    return curve.sizes[first], curve.sizes[last]


def answer_lines(answers: Dict[str, Any]) -> List[str]:
    """The answers of :func:`compare` as four sentences."""
    base, base_size = f'{answers["baseline_best"]:.2f} %', answers['baseline_best_size']
    if answers['match_size'] is None:
        first = f'no size reaches the best accuracy of {answers["baseline"]} ({base} at {base_size} px)'
    else:
        first = (f'at {answers["match_size"]} px it has at least the best accuracy of {answers["baseline"]} ({base} at '
                 f'{base_size} px), with {answers["fewer_operations"]:.2f} times fewer operations')
    second = f'its best accuracy is {answers["best"]:.2f} % at {answers["best_size"]} px'
    if answers['error_reduction'] is not None:
        change = answers['error_reduction']
        second += f', an error {abs(change):.0%} {"lower" if change >= 0 else "higher"}'
    costs = [f'{answers[f"training_{key}"]:.2f} times the {what}' for key, what in (
        ('gmacs', 'operations'), ('steps', 'steps'), ('seconds', 'seconds')) if answers[f'training_{key}'] is not None]
    third = f'training took {", ".join(costs)}' if costs else 'what training cost is not known'
    fourth = 'within {:g} point of its best from {} to {} px; {} from {} to {} px'.format(
        WITHIN, *answers['range'], answers['baseline'], *answers['baseline_range'])
    return [f'Cheaper inference: {first}', f'Better accuracy: {second}', f'Cheaper training: {third}',
            f'Resilience: {fourth}']


def format_table(curves: Sequence[Curve], metric: str = 'top1') -> str:
    """The curves as a table for a terminal, a block for each, with the mean over the sizes."""
    header, body = table_cells(curves, metric)
    several = len(curves) > 1
    lines: List[str] = []
    for curve, rows in zip(curves, body):
        cells = [header, *rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
        title = f'{curve.name}, mean of {curve.runs} runs' if curve.runs > 1 else curve.name
        lines += ([title] if several or curve.runs > 1 else []) + [
            '  '.join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells] + ['']
    return '\n'.join(lines[:-1])


def table_cells(curves: Sequence[Curve], metric: str = 'top1') -> Tuple[List[str], List[List[List[str]]]]:
    """The header of a table, and its cells: rows for each curve, the last one the mean over the sizes."""
    title = METRIC_NAMES.get(metric, metric)
    calibrated = any(curve.calibrated for curve in curves)
    runs = max(curve.runs for curve in curves)
    intervals = any(curve.low != curve.high for curve in curves)
    columns = [('img_size', 'size')]
    columns += [(f'{title} calibrated' if calibrated else title, 'value')]
    columns += [('lowest to highest' if runs > 1 else '95 % interval', 'interval')] if intervals else []
    columns += [(f'{title} own statistics', 'own')] if calibrated else []
    rest = [('top-5', 'top5', '.2f'), ('loss', 'loss', '.4f'), ('GMACs', 'gmacs', '.4g'),
            ('images/s', 'images_per_second', '.1f'), ('latency ms', 'latency_ms', '.2f')]
    rest = [part for part in rest
            if part[1] != metric and all(part[1] in row for curve in curves for row in curve.rows)]
    header = [name for name, _ in columns] + [name for name, *_ in rest]
    digits = '.4f' if metric == 'loss' else '.2f'
    body = []
    for curve in curves:
        rows = []
        for i, size in enumerate(curve.sizes):
            cells = {'size': str(size), 'value': f'{curve.value[i]:{digits}}', 'own': f'{curve.own[i]:{digits}}',
                     'interval': f'{curve.low[i]:{digits}} - {curve.high[i]:{digits}}'}
            rows.append([cells[key] for _, key in columns] + [f'{curve.rows[i][key]:{form}}' for _, key, form in rest])
        means = {'size': 'mean', 'value': f'{mean(curve.value):{digits}}', 'own': f'{mean(curve.own):{digits}}',
                 'interval': ''}
        body.append([*rows, [means[key] for _, key in columns] + [''] * len(rest)])
    return header, body


def write_report(folder: str, document: Dict[str, Any]) -> None:
    """Write the results as files: ``sizes.json``, ``sizes.csv``, the plots as PNG and SVG, ``report.html``.

    Args:
        folder: An existing folder.
        document: ``metric``, ``baseline`` (a name, or ``None``), ``settings`` (names and values to be shown), and
            ``checkpoints``: each with ``name``, ``checkpoint``, ``model``, ``calibrated``, ``training`` and
            ``results``, the rows of :func:`~mixsize_timm.measure.measure_sizes`. The answers are added.
    """
    metric = document['metric']
    curves = make_curves(document['checkpoints'], metric)
    document['answers'] = answers = all_answers(curves, document['baseline'])
    write_sizes(os.path.join(folder, SIZES_FILE), document)
    with open(os.path.join(folder, 'sizes.csv'), 'w', encoding='utf-8', newline='') as file:
        rows = [{'name': checkpoint['name'], 'checkpoint': checkpoint['checkpoint'], **row}
                for checkpoint in document['checkpoints'] for row in checkpoint['results']]
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    images = plots.draw(folder, curves, METRIC_NAMES.get(metric, metric))
    environment = jinja2.Environment(loader=jinja2.PackageLoader(__package__, '.'), autoescape=True,
                                     trim_blocks=True, lstrip_blocks=True)
    header, body = table_cells(curves, metric)
    page = environment.get_template('report.html.jinja').render(
        document=document, curves=curves, header=header, body=body, images=images,
        answers=[(part, [line.partition(': ') for line in answer_lines(part)]) for part in answers])
    with open(os.path.join(folder, 'report.html'), 'w', encoding='utf-8') as file:
        file.write(page)


def all_answers(curves: Sequence[Curve], baseline: Optional[str]) -> List[Dict[str, Any]]:
    """The answers for each curve against the baseline; none without one."""
    base = next((curve for curve in curves if baseline is not None and curve.name == baseline), None)
    return [compare(curve, base) for curve in curves if curve is not base] if base is not None else []


def write_sizes(path: str, document: Dict[str, Any]) -> None:
    """Write results as JSON; a file that stood there is replaced when the new one is whole."""
    with open(path + '.new', 'w', encoding='utf-8') as file:
        file.write(json.dumps(document, indent=2) + '\n')
    os.replace(path + '.new', path)
