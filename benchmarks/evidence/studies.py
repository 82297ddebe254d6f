"""The six studies: which arms each compares, and what their results say."""
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from mixsize_timm.report import Curve, compare, make_curves

from .settings import CHEAP, CONTROL, Setting

WITHIN = 1.  # point of accuracy: what counts as equal in the study of resilience
FEWER_OPERATIONS = 3.  # aims of the studies
ERROR_REDUCTION = 0.20
Results = Mapping[str, Sequence[Dict[str, Any]]]  # of each arm, its runs that did not fail


@dataclass(frozen=True)
class Study:
    """One question.

    Attributes:
        title: Heading on the page.
        question: What is asked, and what is aimed at.
        arms: Names of the arms that it needs.
        answer: Gives sentences, from the setting and the results of all its arms.
    """
    title: str
    question: str
    arms: Tuple[str, ...]
    answer: Callable[[Setting, Results], List[str]]


def curve_of(name: str, results: Results) -> Optional[Curve]:
    """Mean accuracy against size over the seeds of an arm, if it has been run."""
    runs = results.get(name, ())
    return make_curves([{**run, 'name': run['title']} for run in runs])[0] if runs else None


def over_seeds(runs: Sequence[Dict[str, Any]], value: Callable[[Dict[str, Any]], float]) -> str:
    """Mean and standard deviation over runs, in words for the page."""
    values = [value(run) for run in runs]
    return f'{mean(values):.2f}' + (f' ± {stdev(values):.2f}' if len(values) > 1 else '')


def top1(run: Dict[str, Any], size: int, key: str = 'top1') -> float:
    """Accuracy of a run at a size."""
    return next(row[key] for row in run['results'] if row['img_size'] == size)


def mean_top1(run: Dict[str, Any], key: str = 'top1') -> float:
    """Accuracy of a run, the mean over all sizes."""
    return mean(row[key] for row in run['results'])


def best_top1(run: Dict[str, Any]) -> float:
    """Accuracy of a run at its best size."""
    return max(row['top1'] for row in run['results'])


def _verdict(met: bool) -> str:
    return 'met' if met else '**not met**'


def _each(names: Sequence[str], results: Results, line: Callable[[Curve, Dict[str, Any]], str]) -> List[str]:
    """A line for each arm that was run, from its curve and its comparison with the control."""
    control = curve_of(CONTROL, results)
    curves = [curve for name in names if (curve := curve_of(name, results)) is not None]
    return [line(curve, compare(curve, control)) for curve in curves] if control else []


def _cheaper_inference(names: Sequence[str]) -> Callable[[Setting, Results], List[str]]:
    def line(curve: Curve, answers: Dict[str, Any]) -> str:
        target = f'{answers["baseline_best"]:.2f} % of {answers["baseline"]} at {answers["baseline_best_size"]} px'
        if answers['match_size'] is None:
            return (f'{curve.label}: no size reaches the {target}; its best is {answers["best"]:.2f} % at '
                    f'{answers["best_size"]} px. {_verdict(False)}')
        fewer = answers['fewer_operations']
        return (f'{curve.label}: at {answers["match_size"]} px it has the {target}, with {fewer:.2f} times fewer '
                f'operations. {_verdict(fewer >= FEWER_OPERATIONS)}')

    return lambda setting, results: _each(names, results, line)


def _better_accuracy(names: Sequence[str]) -> Callable[[Setting, Results], List[str]]:
    def line(curve: Curve, answers: Dict[str, Any]) -> str:
        change = answers['error_reduction']
        return (f'{curve.label}: {answers["best"]:.2f} % at {answers["best_size"]} px against '
                f'{answers["baseline_best"]:.2f} % of {answers["baseline"]}: an error {abs(change):.1%} '
                f'{"lower" if change >= 0 else "higher"}. {_verdict(change >= ERROR_REDUCTION)}')

    return lambda setting, results: _each(names, results, line)


def _cheaper_training(names: Sequence[str]) -> Callable[[Setting, Results], List[str]]:
    def line(curve: Curve, answers: Dict[str, Any]) -> str:
        reached = answers['best'] >= answers['baseline_best']
        gmacs, seconds = answers['training_gmacs'], answers['training_seconds']
        return (f'{curve.label}: {answers["best"]:.2f} % at {answers["best_size"]} px, '
                f'{"at least" if reached else "less than"} the {answers["baseline_best"]:.2f} % of '
                f'{answers["baseline"]}, '
                f'with {1 / gmacs:.2f} times fewer operations of training and in {1 / seconds:.2f} times less time. '
                f'{_verdict(reached and gmacs <= CHEAP)}')

    return lambda setting, results: _each(names, results, line)


def _resilience(name: str) -> Callable[[Setting, Results], List[str]]:
    def answer(setting: Setting, results: Results) -> List[str]:
        ours = results.get(name, ())
        specialists = {size: results.get(CONTROL if size == setting.base_size else f'specialist-{size}', ())
                       for size in sorted([setting.base_size, *setting.specialists])}
        if not ours or not all(specialists.values()):
            return []
        lead = {size: mean(top1(run, size) for run in ours) - mean(top1(run, size) for run in runs)
                for size, runs in specialists.items()}
        worst, better = min(lead.values()), sum(value > 0 for value in lead.values())
        points = ', '.join(f'{value:+.2f} at {size} px' for size, value in lead.items())
        return [f'{ours[0]["title"]} against the specialist of each size, in points: {points}. Within {WITHIN:g} point '
                f'of every one: {_verdict(worst >= -WITHIN)}. Better than most: {_verdict(better > len(lead) / 2)}.']

    return answer


def _differences(pairs: Sequence[Tuple[str, str, str]]) -> Callable[[Setting, Results], List[str]]:
    """Accuracy of one arm less that of another, mean over all sizes, seed by seed."""
    def answer(setting: Setting, results: Results) -> List[str]:
        lines = []
        for words, arm, other in pairs:
            by_seed = {run['seed']: run for run in results.get(other, ())}
            both = [(run, by_seed[run['seed']]) for run in results.get(arm, ()) if run['seed'] in by_seed]
            if both:
                parts = []
                for key, kind in (('top1', 'calibrated'), ('top1_uncalibrated', 'uncalibrated')):
                    gains = [mean_top1(run, key) - mean_top1(rival, key) for run, rival in both]
                    spread = f' ± {stdev(gains):.2f}' if len(gains) > 1 else ''
                    parts.append(f'{mean(gains):+.2f}{spread} {kind}')
                lines.append(f'{words} ({arm} less {other}): {", ".join(parts)}, over {len(both)} seeds.')
        return lines

    return answer


def _parts(setting: Setting, results: Results) -> List[str]:
    lines = _differences((
        ('Smoothing, D+', 'dplus', 'dplus-rough'),
        ('Smoothing, B+', 'bplus', 'bplus-rough'),
        ('Shares over images, not steps', 'bplus', 'bplus-over-steps'),
        ('D+ in place of B+ at equal cost', 'dplus-equal', 'bplus'),
        ('Dropout by size, not alike for all', 'dplus-drop-reg', 'dplus-drop'),
        ('B+ in place of timm\'s scheduled sizes', 'bplus', 'timm'),
        ('B+ in place of progressive sizes', 'bplus', 'timm-progressive'),
    ))(setting, results)
    for name in ('dplus', 'bplus', 'timm', CONTROL):
        if runs := results.get(name):
            gain = over_seeds(runs, lambda run: mean_top1(run) - mean_top1(run, 'top1_uncalibrated'))
            lines.append(f'Calibration of {runs[0]["title"]}: {gain} points.')
    return lines


_ANNEALED = ('dplus-equal', 'bplus', 'small-bplus')
_MIXED = ('dplus', 'dplus-equal', 'bplus', 'small-dplus', 'small-bplus')


def make_studies(setting: Setting) -> Dict[str, Study]:
    """The studies by name, as they are for a setting."""
    specialists = tuple(f'specialist-{size}' for size in setting.specialists)
    return {
        'inference': Study(
            'Cheaper inference',
            'The smallest size at which a MixSize model has the best accuracy of the fixed-size model, and how many '
            f'times fewer operations that takes. Aim: at least {FEWER_OPERATIONS:g} times (the paper: about 2).',
            (CONTROL, *_MIXED, 'timm'), _cheaper_inference((*_MIXED, 'timm'))),
        'accuracy': Study(
            'Better accuracy',
            f'The error at the best size, less than that of the fixed-size model at its best. Aim: at least '
            f'{ERROR_REDUCTION:.0%} lower (the paper: 14 %).',
            (CONTROL, *_MIXED, 'timm'), _better_accuracy((*_MIXED, 'timm'))),
        'training': Study(
            'Cheaper training',
            'What a regime of small mean size costs to reach the accuracy of the fixed-size model. Aim: at least '
            f'{1 / CHEAP:g} times less.',
            (CONTROL, 'small-bplus-cheap', 'fixed-cheap'), _cheaper_training(('small-bplus-cheap', 'fixed-cheap'))),
        'resilience': Study(
            'Resilience',
            'One D+ model beside models trained at one size each, at equal cost. Aim: within 1 point of every one of '
            'them, better than most.',
            (CONTROL, 'dplus-equal', *specialists), _resilience('dplus-equal')),
        'parts': Study(
            'What each part does',
            'Differences of top-1 in points, the mean over all sizes, with the standard deviation over the seeds.',
            (CONTROL, 'dplus', 'dplus-rough', 'dplus-equal', 'bplus', 'bplus-rough', 'bplus-over-steps', 'dplus-drop',
             'dplus-drop-reg', 'timm', 'timm-progressive'), _parts),
        'beyond': Study(
            'Past the paper',
            'Annealed regimes, which train small images early and large ones late, beside the same without, at equal '
            'cost: differences of top-1 in points, the mean over all sizes, and their standard deviation over seeds.',
            (*_ANNEALED, *(f'{name}-anneal' for name in _ANNEALED)),
            _differences([(f'{name} annealed', f'{name}-anneal', name) for name in _ANNEALED])),
    }
