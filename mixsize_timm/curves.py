"""Accuracy against image size: curves of several runs, tables, and the answers to the paper's four questions."""
import json
import os
from dataclasses import dataclass
from statistics import mean
from typing import Any, Dict, List, Optional, Sequence, Tuple

SIZES_FILE = 'sizes.json'
METRIC_NAMES = {'top1': 'top-1', 'top5': 'top-5', 'map': 'mAP', 'micro_f1': 'micro F1', 'macro_f1': 'macro F1',
                'sample_f1': 'sample F1'}
WITHIN = 1.  # points of accuracy: what "stays within" means in the question on resilience


@dataclass(frozen=True)
class Curve:
    """A metric against the image size: of one checkpoint, or the mean over several of one name.

    Attributes:
        name: What the checkpoints are called.
        crop_pct: Their centre crop.
        label: What the curve is called: the name, and the crop where the name has several.
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
    crop_pct: Optional[float]
    label: str
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
    groups: Dict[Tuple[str, Any], List[Tuple[Dict[str, Any], List[Dict[str, Any]]]]] = {}
    for checkpoint in checkpoints:
        for crop in sorted({row.get('crop_pct') for row in checkpoint['results']}, key=lambda x: x or 0):
            rows = sorted((row for row in checkpoint['results'] if row.get('crop_pct') == crop),
                          key=lambda row: row['img_size'])
            groups.setdefault((checkpoint['name'], crop), []).append((checkpoint, rows))
    names = [name for name, _ in groups]
    return [_curve(name, crop, name if names.count(name) == 1 else f'{name}, crop {crop:g}', runs, metric)
            for (name, crop), runs in groups.items()]


def _curve(name: str, crop_pct: Optional[float], label: str,
           runs: List[Tuple[Dict[str, Any], List[Dict[str, Any]]]], metric: str) -> Curve:
    columns = list(zip(*(rows for _, rows in runs)))  # the rows of all runs at each size
    low, high = f'{metric}_low', f'{metric}_high'
    if len(runs) > 1 or low not in runs[0][1][0]:
        low = high = metric
    training = [checkpoint.get('training') or {} for checkpoint, _ in runs]
    return Curve(
        name=name, crop_pct=crop_pct, label=label, runs=len(runs),
        sizes=tuple(column[0]['img_size'] for column in columns),
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
        'name': curve.label, 'baseline': baseline.label, 'baseline_best': target,
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
    lines: List[str] = []
    for curve in curves:
        cells = table_cells(curve, metric)
        widths = [max(map(len, column)) for column in zip(*cells)]
        if len(curves) > 1 or curve.runs > 1:
            lines.append(f'{curve.label}, mean of {curve.runs} runs' if curve.runs > 1 else curve.label)
        lines += ['  '.join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells] + ['']
    return '\n'.join(lines[:-1])


def table_cells(curve: Curve, metric: str = 'top1') -> List[List[str]]:
    """The cells of a curve's table: a header, a row for each size, and the mean over the sizes."""
    title, digits = METRIC_NAMES.get(metric, metric), '.4f' if metric == 'loss' else '.2f'
    columns = [['img_size', *map(str, curve.sizes), 'mean']]

    def add(name: str, values: Sequence[float]) -> None:
        columns.append([name, *(f'{value:{digits}}' for value in (*values, mean(values)))])

    add(f'{title} calibrated' if curve.calibrated else title, curve.value)
    if curve.low != curve.high:
        ends = [f'{low:{digits}} - {high:{digits}}' for low, high in zip(curve.low, curve.high)]
        columns.append(['lowest - highest' if curve.runs > 1 else '95 % interval', *ends, ''])
    if curve.calibrated:
        add(f'{title} own statistics', curve.own)
    for name, key, form in (('top-5', 'top5', '.2f'), ('loss', 'loss', '.4f'), ('GMACs', 'gmacs', '.4g'),
                            ('images/s', 'images_per_second', '.1f'), ('latency ms', 'latency_ms', '.2f')):
        if key != metric and all(key in row for row in curve.rows):
            columns.append([name, *(f'{row[key]:{form}}' for row in curve.rows), ''])
    return [list(row) for row in zip(*columns)]


def all_answers(curves: Sequence[Curve], baseline: Optional[str]) -> List[Dict[str, Any]]:
    """The answers for each curve of another name against the baseline's of the same crop, else against its first."""
    bases = {curve.crop_pct: curve for curve in reversed(curves) if curve.name == baseline}
    return [compare(curve, bases.get(curve.crop_pct, list(bases.values())[-1]))
            for curve in curves if bases and curve.name != baseline]


def write_sizes(path: str, document: Dict[str, Any]) -> None:
    """Write results as JSON; a file that stood there is replaced when the new one is whole."""
    with open(path + '.new', 'w', encoding='utf-8') as file:
        file.write(json.dumps(document, indent=2) + '\n')
    os.replace(path + '.new', path)
