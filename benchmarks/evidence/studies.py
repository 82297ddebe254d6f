"""The six studies: which arms each compares, and what their results say."""
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from mixsize_timm.curves import Curve, make_curves

from .runs import IN_FLOAT32
from .settings import CHEAP, CONTROL, Setting

WITHIN = 1.  # point of accuracy: what counts as equal in the study of resilience
FEWER_OPERATIONS = 3.  # aims of the studies
ERROR_REDUCTION = 0.20
SEEDS = 3  # that a verdict needs
NO_TIME = '–'  # no run of an arm has a time that compares
PAPER = ('dplus-equal', 'bplus', 'small-bplus', 'small-dplus')  # its regimes, at equal cost
_DPLUS = ('dplus-equal', 'small-dplus')
_OURS = ('small-bplus-anneal', 'small-bplus-anneal-steps', 'smaller-bplus', 'half-bplus')
_CHEAP = ('small-bplus-cheap', 'small-bplus-anneal-steps-cheap', 'half-bplus-cheap', 'fixed-cheap')
_RIVALS = (*PAPER, *_OURS, 'timm', 'timm-steps', 'timm-half')  # of the control
_CONTROLS = (CONTROL, 'fixed-steps')  # in two batches
_ONE_FOR_ALL = (*_DPLUS, 'small-bplus-anneal-steps', 'half-bplus')
Line = Callable[[Setting, Curve, Curve], str]
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


def as_used(run: Dict[str, Any]) -> Dict[str, Any]:
    """A run with the accuracies that it is judged by.

    With MixSize those of calibrated statistics, as the package publishes them. A model that timm's or one size's loader
    trained gets the better of calibrated and own statistics at each size: nobody need calibrate it.
    """
    if run['options']['mixsize'] != 'off':
        return run
    rows = [{**row, 'top1': max(row['top1'], row['top1_uncalibrated'])} for row in run['results']]
    return {**run, 'results': rows}


def curve_of(name: str, results: Results) -> Optional[Curve]:
    """Mean accuracy against size over the seeds of an arm, as it is judged, if it has been run."""
    runs = results.get(name, ())
    return make_curves([{**as_used(run), 'name': run['title']} for run in runs])[0] if runs else None


def control_of(results: Results) -> Optional[Curve]:
    """The fixed size's curve in that of its batches in which it is better at its best size."""
    curves = [curve for name in _CONTROLS if (curve := curve_of(name, results)) is not None]
    return max(curves, key=lambda curve: curve.value[curve.best], default=None)


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


def with_bf16(runs: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """The runs whose bf16 was not computed in float32: the times of others do not compare."""
    return [run for run in runs if IN_FLOAT32 not in run['commands'][0]]


def times_as_long(name: str, results: Results) -> str:
    """Time of training of an arm over the control's of the same day, as other days had other machines; for the page."""
    of_control: Dict[str, List[float]] = {}
    for run in with_bf16(results[CONTROL]):
        of_control.setdefault(run['date'], []).append(run['training']['seconds'])
    times = [run['training']['seconds'] / mean(of_control[run['date']]) for run in with_bf16(results[name])
             if run['date'] in of_control]
    return f'{mean(times):.2f}' if times else NO_TIME


def fewer_operations(curve: Curve, control: Curve, base_size: int) -> Optional[Tuple[int, float]]:
    """The smallest size with the control's best accuracy, and how many times fewer operations it takes.

    Fewer than the control takes at the size that it was trained at, not at its best size: that one may be a larger one
    by no more than chance.
    """
    operations = control.gmacs[control.sizes.index(base_size)]
    return next(((size, operations / gmacs) for size, gmacs, value in zip(curve.sizes, curve.gmacs, curve.value)
                 if value >= control.value[control.best]), None)


def _verdict(met: bool, *curves: Curve) -> str:
    seeds = min(curve.runs for curve in curves)
    if seeds < SEEDS:
        return f'Undecided: {seeds} of {SEEDS} seeds.'
    return 'Met.' if met else '**Not met.**'


def _best(curve: Curve) -> str:
    return f'{curve.value[curve.best]:.2f} % at {curve.sizes[curve.best]} px'


def _each(names: Sequence[str], line: Line) -> Callable[[Setting, Results], List[str]]:
    """A line for each arm that was run, from its curve and the control's."""
    def answer(setting: Setting, results: Results) -> List[str]:
        control = control_of(results)
        curves = [curve for name in names if (curve := curve_of(name, results)) is not None]
        return [f'{curve.label}: {line(setting, curve, control)}' for curve in curves] if control else []

    return answer


def _cheaper_inference(setting: Setting, curve: Curve, control: Curve) -> str:
    match = fewer_operations(curve, control, setting.base_size)
    if match is None:
        return (f'no size reaches the {_best(control)} of {control.label}; its best is {_best(curve)}. '
                f'{_verdict(False, curve, control)}')
    size, fewer = match
    return (f'at {size} px it reaches the {_best(control)} of {control.label}, with {fewer:.2f} times fewer operations '
            f'than at {setting.base_size} px. {_verdict(fewer >= FEWER_OPERATIONS, curve, control)}')


def _better_accuracy(setting: Setting, curve: Curve, control: Curve) -> str:
    error, target = 100 - curve.value[curve.best], 100 - control.value[control.best]
    change = 1 - error / target
    return (f'{_best(curve)} against {_best(control)} of {control.label}: an error {abs(change):.1%} '
            f'{"lower" if change >= 0 else "higher"}. {_verdict(change >= ERROR_REDUCTION, curve, control)}')


def _cheaper_training(setting: Setting, curve: Curve, control: Curve) -> str:
    reached = curve.value[curve.best] >= control.value[control.best]
    gmacs = curve.training['gmacs'] / control.training['gmacs']
    return (f'{_best(curve)}, {"at least" if reached else "less than"} the {_best(control)} of {control.label}, with '
            f'{1 / gmacs:.2f} times fewer operations of training. '
            f'{_verdict(reached and gmacs <= CHEAP, curve, control)}')


def _training(setting: Setting, results: Results) -> List[str]:
    lines = _each(_CHEAP, _cheaper_training)(setting, results)
    times = [f'{results[name][0]["title"]} {words}' for name in _CHEAP
             if results.get(name) and (words := times_as_long(name, results)) != NO_TIME]
    return lines + [f'Time of training over the control\'s: {", ".join(times)}.'] if times else lines


def _resilience(setting: Setting, results: Results) -> List[str]:
    specialists = {size: control_of(results) if size == setting.base_size else curve_of(f'specialist-{size}', results)
                   for size in sorted([setting.base_size, *setting.specialists])}
    curves = [curve for curve in specialists.values() if curve is not None]
    if len(curves) < len(specialists):
        return []
    lines = []
    for ours in (curve for name in _ONE_FOR_ALL if (curve := curve_of(name, results)) is not None):
        lead = [ours.value[ours.sizes.index(size)] - curve.value[curve.sizes.index(size)]
                for size, curve in zip(specialists, curves)]
        points = ', '.join(f'{value:+.2f} at {size} px' for size, value in zip(specialists, lead))
        better = sum(value > 0 for value in lead)
        lines.append(
            f'{ours.label} against the specialist of each size, in points: {points}. Within {WITHIN:g} point of every '
            f'one: {_verdict(min(lead) >= -WITHIN, ours, *curves)} Better than most: '
            f'{_verdict(better > len(lead) / 2, ours, *curves)}')
    return lines


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
                seeds = f'{len(both)} seed{"s" * (len(both) > 1)}'
                lines.append(f'{words} ({arm} less {other}): {", ".join(parts)}, over {seeds}.')
        return lines

    return answer


def _parts(setting: Setting, results: Results) -> List[str]:
    lines = _differences((
        ('Smoothing', 'small-bplus-cheap', 'cheap-rough'),
        ('Shares over images, not steps', 'small-bplus-cheap', 'cheap-over-steps'),
        ('Dropout', 'cheap-drop', 'small-bplus-cheap'),
        ('Dropout by size, not alike for all', 'cheap-drop-reg', 'cheap-drop'),
        ('D+ in place of B+', 'dplus-equal', 'bplus'),
        ('D+ in place of B+, of small mean size', 'small-dplus', 'small-bplus'),
        ('B+ in place of timm\'s scheduled sizes', 'bplus', 'timm'),
        ('B+ in place of progressive sizes', 'bplus', 'timm-progressive'),
    ))(setting, results)
    for name in ('dplus-equal', 'bplus', 'small-bplus', 'timm', CONTROL):
        if runs := results.get(name):
            gain = over_seeds(runs, lambda run: mean_top1(run) - mean_top1(run, 'top1_uncalibrated'))
            lines.append(f'Calibration of {runs[0]["title"]}: {gain} points.')
    for runs in results.values():
        if runs := [run for run in runs if 'top1_as_in_use' in run['results'][0]]:
            gain = over_seeds(runs, lambda run: mean_top1(run, 'top1_as_in_use') - mean_top1(run))
            at_base = over_seeds(runs, lambda run: top1(run, setting.base_size, 'top1_as_in_use')
                                 - top1(run, setting.base_size))
            lines.append(f'Calibration of {runs[0]["title"]} on images as in use, not augmented: {gain} points, '
                         f'{at_base} at {setting.base_size} px, over {len(runs)} seed{"s" * (len(runs) > 1)}.')
    return lines


def _beyond(setting: Setting, results: Results) -> List[str]:
    """Each regime of ours against the best of the paper's, by best accuracy and by the mean over all sizes."""
    planned = [name for name in PAPER if name in results]
    rivals = [curve for name in planned if (curve := curve_of(name, results)) is not None]
    lines = []
    for name in _OURS if rivals and len(rivals) == len(planned) else ():
        curve = curve_of(name, results)
        if curve is None:
            continue
        best = curve.value[curve.best] - max(rival.value[rival.best] for rival in rivals)
        over = mean(curve.value) - max(mean(rival.value) for rival in rivals)
        lines.append(f'{curve.label}: {_best(curve)}, {best:+.2f} points beside the best of the paper\'s regimes '
                     f'({", ".join(planned)}); mean over all sizes {mean(curve.value):.2f} %, {over:+.2f} points '
                     f'beside the best. {_verdict(best > 0 and over > 0, curve, *rivals)}')
    return lines + _differences((('Annealed', 'small-bplus-anneal', 'small-bplus'),
                                 ('A mean batch as large as the control\'s, in more steps',
                                  'small-bplus-anneal-steps', 'small-bplus-anneal'),
                                 ('As small a batch for the fixed size', 'fixed-steps', CONTROL),
                                 ('As small a batch for timm\'s scheduled sizes', 'timm-steps', 'timm'),
                                 ('In place of the fixed size, both in as small a batch',
                                  'small-bplus-anneal-steps', 'fixed-steps'),
                                 ('In place of timm\'s scheduled sizes, both in as small a batch',
                                  'small-bplus-anneal-steps', 'timm-steps'),
                                 ('Smaller images', 'smaller-bplus', 'small-bplus'),
                                 ('Nine images of ten at half the size', 'half-bplus',
                                  'small-bplus-anneal-steps'),
                                 ('In place of timm\'s scheduled sizes with the same images at each size',
                                  'half-bplus', 'timm-half')))(setting, results)


def make_studies(setting: Setting) -> Dict[str, Study]:
    """The studies by name, as they are for a setting."""
    specialists = tuple(f'specialist-{size}' for size in setting.specialists)
    return {
        'inference': Study(
            'Cheaper inference',
            'The smallest size at which a MixSize model has the best accuracy of the fixed-size model, and how many '
            f'times fewer operations that takes. Aim: at least {FEWER_OPERATIONS:g} times (the paper: about 2).',
            (*_CONTROLS, *_RIVALS), _each(_RIVALS, _cheaper_inference)),
        'accuracy': Study(
            'Better accuracy',
            f'The error at the best size, over that of the fixed-size model at its best. Aim: at least '
            f'{ERROR_REDUCTION:.0%} lower (the paper: 14 %).',
            (*_CONTROLS, *_RIVALS), _each(_RIVALS, _better_accuracy)),
        'training': Study(
            'Cheaper training',
            'Whether a regime of small mean size reaches the accuracy of the fixed-size model, with so many times '
            f'fewer operations of training: at least {1 / CHEAP:g}.',
            (*_CONTROLS, *_CHEAP), _training),
        'resilience': Study(
            'Resilience',
            'One D+ model, of a mean size near the base size or a small one, or one of the regime of study 6, beside '
            'models trained at one size each, at equal cost. Aim: within 1 point of every one of them, better than '
            'most.',
            (*_CONTROLS, *_ONE_FOR_ALL, *specialists), _resilience),
        'parts': Study(
            'What each part does',
            'Differences of top-1 in points, the mean over all sizes, with the standard deviation over the seeds. '
            f'Smoothing, shares and dropout are changed in B+ of small mean size at {CHEAP} of the cost.',
            (CONTROL, 'small-bplus-cheap', 'cheap-rough', 'cheap-over-steps', 'cheap-drop', 'cheap-drop-reg', *PAPER,
             'timm', 'timm-progressive'), _parts),
        'beyond': Study(
            'Past the paper',
            'An annealed regime, which trains small images early and large ones late; the same in so small a batch '
            'that its mean over the steps is the control\'s batch; most images at half the base size; that annealed, '
            'in such a batch, at these two sizes alone; all at equal cost. Aim: better than every regime of the paper, '
            'both at the best size and in the mean over all sizes. Then the differences that each makes, and what the '
            'smaller batch does for the fixed size and for timm\'s scheduled sizes: top-1 in points, the mean over all '
            'sizes, with the standard deviation over the seeds.',
            (*_CONTROLS, 'timm', 'timm-steps', 'timm-half', *PAPER, *_OURS), _beyond),
    }
