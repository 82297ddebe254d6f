"""The six studies: which arms each compares, and what their results say."""
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from mixsize_timm.curves import Curve, make_curves

from .runs import IN_FLOAT32
from .settings import CHEAP, CONTROL, Setting

WITHIN = 1.  # point of accuracy: what counts as equal in the study of resilience
FEWER_OPERATIONS = 3.  # aims of the studies
ERROR_REDUCTION = 0.20
SEEDS = 3  # that a verdict needs
NONE, NO_SIZE, MET = '–', 'no size', 'met'  # in a table
PAPER = ('dplus-equal', 'bplus', 'small-bplus', 'small-dplus')  # its regimes, at equal cost
_DPLUS = ('dplus-equal', 'small-dplus')
_OURS = ('small-bplus-anneal', 'small-bplus-anneal-steps', 'smaller-bplus', 'half-bplus')
_CHEAP = ('small-bplus-cheap', 'small-bplus-anneal-steps-cheap', 'half-bplus-cheap', 'fixed-cheap')
_RIVALS = (*PAPER, *_OURS, 'timm', 'timm-progressive', 'timm-steps', 'timm-half')  # of the control
CONTROLS = (CONTROL, 'fixed-steps')  # in two batches
_ONE_FOR_ALL = (*_DPLUS, 'small-bplus-anneal-steps', 'half-bplus')
Results = Mapping[str, Sequence[Dict[str, Any]]]  # of each arm, its runs that did not fail
Pairs = Sequence[Tuple[Dict[str, Any], Dict[str, Any]]]  # the runs of two arms that have one seed
Cells = Callable[[Setting, Curve, Curve, Pairs], List[str]]


class Table(NamedTuple):
    """What a study found, for the page; a table without rows is left out."""
    header: Sequence[str]
    rows: List[List[str]]


@dataclass(frozen=True)
class Study:
    """One question.

    Attributes:
        title: Heading on the page.
        question: What is asked, and what is aimed at.
        arms: Names of the arms that it needs.
        answer: Gives tables, from the setting and the results of all its arms.
    """
    title: str
    question: str
    arms: Tuple[str, ...]
    answer: Callable[[Setting, Results], List[Table]]


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


def control_name(results: Results) -> str:
    """The fixed size in that of its batches in which it is better at its best size."""
    curves = {name: curve for name in CONTROLS if (curve := curve_of(name, results)) is not None}
    return max(curves, key=lambda name: curves[name].value[curves[name].best], default=CONTROL)


def control_of(results: Results) -> Optional[Curve]:
    """Its curve."""
    return curve_of(control_name(results), results)


def half_size(setting: Setting) -> str:
    """The arm of one size that is smallest: half the base size."""
    return f'specialist-{min(setting.specialists)}'


def pairs_of(arm: str, other: str, results: Results) -> Pairs:
    """The runs of two arms seed by seed."""
    by_seed = {run['seed']: run for run in results.get(other, ())}
    return [(run, by_seed[run['seed']]) for run in results.get(arm, ()) if run['seed'] in by_seed]


def over_seeds(runs: Sequence[Any], value: Callable[[Any], float], sign: str = '') -> str:
    """Mean and standard deviation over runs, for the page; with ``+`` as a difference."""
    values = [value(run) for run in runs]
    return f'{mean(values):{sign}.2f}' + (f' ± {stdev(values):.2f}' if len(values) > 1 else '')


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
    return over_seeds(times, float) if times else NONE


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
        return f'undecided, {seeds} of {SEEDS} seeds'
    return MET if met else '**not met**'


def _best(curve: Curve) -> str:
    return f'{curve.value[curve.best]:.2f} at {curve.sizes[curve.best]} px'


def _against_control(names: Sequence[str], header: Sequence[str], cells: Cells) -> Callable[[Setting, Results],
                                                                                            List[Table]]:
    """A row for each arm that was run, from its curve and the control's; the control's best first."""
    def answer(setting: Setting, results: Results) -> List[Table]:
        control = control_of(results)
        if control is None:
            return []
        curves = {name: curve for name in names if (curve := curve_of(name, results)) is not None}
        rows = [[curve.label, _best(curve), *cells(setting, curve, control,
                                                   pairs_of(name, control_name(results), results))]
                for name, curve in curves.items()]
        own = [[control.label, _best(control), *[''] * len(header)]] if rows else []
        return [Table(['arm', 'best top-1', *header], own + rows)]

    return answer


def _cheaper_inference(setting: Setting, curve: Curve, control: Curve, pairs: Pairs) -> List[str]:
    match = fewer_operations(curve, control, setting.base_size)
    if match is None:
        return [NO_SIZE, NONE, NONE, _verdict(False, curve, control)]
    size, fewer = match
    ahead = [top1(as_used(run), size) - top1(as_used(other), control.sizes[control.best]) for run, other in pairs]
    verdict = _verdict(fewer >= FEWER_OPERATIONS, curve, control)
    if verdict == MET and mean(ahead) < stdev(ahead):
        verdict += ', within the spread'
    return [f'{size} px', over_seeds(ahead, float, '+') if ahead else NONE, f'{fewer:.2f}', verdict]


def _better_accuracy(setting: Setting, curve: Curve, control: Curve, pairs: Pairs) -> List[str]:
    change = (100 - curve.value[curve.best]) / (100 - control.value[control.best]) - 1
    return [f'{change:+.1%}', _verdict(-change >= ERROR_REDUCTION, curve, control)]


def _cheaper_training(setting: Setting, curve: Curve, control: Curve, pairs: Pairs) -> List[str]:
    reached = curve.value[curve.best] >= control.value[control.best]
    gmacs = curve.training['gmacs'] / control.training['gmacs']
    return [f'{1 / gmacs:.2f}', _verdict(reached and gmacs <= CHEAP, curve, control)]


def _training(setting: Setting, results: Results) -> List[Table]:
    tables = _against_control(_CHEAP, ['times fewer operations', 'aim'], _cheaper_training)(setting, results)
    times = ['', *(times_as_long(name, results) for name in _CHEAP if results.get(name))]
    return [Table([*header[:-1], 'time', header[-1]], [[*row[:-1], time, row[-1]] for row, time in zip(rows, times)])
            for header, rows in tables]


def _resilience(setting: Setting, results: Results) -> List[Table]:
    """One model beside the specialist of each size; then beside whichever model of one size is best there."""
    sizes = sorted([setting.base_size, *setting.specialists])
    specialists = [control_of(results) if size == setting.base_size else curve_of(f'specialist-{size}', results)
                   for size in sizes]
    curves = [curve for curve in specialists if curve is not None]
    if len(curves) < len(sizes):
        return []
    candidates = [*curves, *(curve for name in CONTROLS if (curve := curve_of(name, results)) is not None)]
    best = [max(candidates, key=lambda curve, size=size: _at(curve, size)) for size in sizes]
    return [_beside(sizes, curves, 'its specialist', results), _beside(sizes, best, 'the best', results)]


def _beside(sizes: Sequence[int], rivals: Sequence[Curve], words: str, results: Results) -> Table:
    """What one model is ahead of another at each size."""
    rows = []
    for ours in (curve for name in _ONE_FOR_ALL if (curve := curve_of(name, results)) is not None):
        lead = [_at(ours, size) - _at(rival, size) for size, rival in zip(sizes, rivals)]
        rows.append([ours.label, *(f'{points:+.2f}' for points in lead), _verdict(min(lead) >= -WITHIN, ours, *rivals),
                     _verdict(sum(points > 0 for points in lead) > len(lead) / 2, ours, *rivals)])
    header = [f'{size} px, {words}: {rival.label}' for size, rival in zip(sizes, rivals)]
    return Table(['arm', *header, f'within {WITHIN:g} point of every one', 'better than most'], rows)


def _at(curve: Curve, size: int) -> float:
    return curve.value[curve.sizes.index(size)]


def _differences(pairs: Sequence[Tuple[str, str, str]]) -> Callable[[Setting, Results], Table]:
    """Accuracy of one arm less that of another, mean over all sizes, seed by seed."""
    def answer(setting: Setting, results: Results) -> Table:
        rows = []
        for words, arm, other in pairs:
            both = pairs_of(arm, other, results)
            if both:
                gains = [over_seeds(both, lambda pair, key=key: mean_top1(pair[0], key) - mean_top1(pair[1], key), '+')
                         for key in ('top1', 'top1_uncalibrated')]
                rows.append([words, both[0][0]['title'], both[0][1]['title'], *gains, str(len(both))])
        return Table(['what', 'top-1 of', 'less that of', 'calibrated', 'not calibrated', 'seeds'], rows)

    return answer


_PARTS = _differences((
    ('smoothing', 'small-bplus-cheap', 'cheap-rough'),
    ('shares of images, not of steps', 'small-bplus-cheap', 'cheap-over-steps'),
    ('dropout', 'cheap-drop', 'small-bplus-cheap'),
    ('dropout by size, not alike for all', 'cheap-drop-reg', 'cheap-drop'),
    ('D+, not B+', 'dplus-equal', 'bplus'),
    ('D+, not B+', 'small-dplus', 'small-bplus'),
    ('B+, not timm\'s scheduled sizes', 'bplus', 'timm'),
    ('B+, not progressive sizes', 'bplus', 'timm-progressive'),
))
_BEYOND = _differences((
    ('annealed', 'small-bplus-anneal', 'small-bplus'),
    ('a mean batch as the control\'s, in more steps', 'small-bplus-anneal-steps', 'small-bplus-anneal'),
    ('as small a batch for one size', 'fixed-steps', CONTROL),
    ('as small a batch for timm\'s scheduled sizes', 'timm-steps', 'timm'),
    ('not one size, both in as small a batch', 'small-bplus-anneal-steps', 'fixed-steps'),
    ('not timm\'s scheduled sizes, both in as small a batch', 'small-bplus-anneal-steps', 'timm-steps'),
    ('smaller images', 'smaller-bplus', 'small-bplus'),
    ('nine images of ten at half the size', 'half-bplus', 'small-bplus-anneal-steps'),
    ('smoothing in that', 'half-bplus', 'half-bplus-rough'),
    ('annealing in that', 'half-bplus', 'half-bplus-even'),
    ('not timm\'s progressive sizes', 'half-bplus', 'timm-progressive'),
    ('smoothed and annealed, not timm\'s scheduled sizes of the same images', 'half-bplus', 'timm-half'),
))


def _parts(setting: Setting, results: Results) -> List[Table]:
    return [_PARTS(setting, results), _calibration(setting, results)]


def _calibration(setting: Setting, results: Results) -> Table:
    """Accuracy with calibrated statistics less that with the model's own; and with those of images as in use."""
    header, rows = ['calibration of', 'on augmented images', 'seeds'], []
    if setting.as_in_use:
        header += ['on images as in use, more than that', f'at {setting.base_size} px', 'seeds']
    for runs in filter(None, results.values()):
        gain = over_seeds(runs, lambda run: mean_top1(run) - mean_top1(run, 'top1_uncalibrated'), '+')
        row = [runs[0]['title'], gain, str(len(runs))]
        both = [run for run in runs if setting.as_in_use and 'top1_as_in_use' in run['results'][0]]
        if both:
            row += [over_seeds(both, lambda run: mean_top1(run, 'top1_as_in_use') - mean_top1(run), '+'),
                    over_seeds(both, lambda run: top1(run, setting.base_size, 'top1_as_in_use')
                               - top1(run, setting.base_size), '+'), str(len(both))]
        rows.append(row + [NONE] * (len(header) - len(row)))
    return Table(header, rows)


def _beyond(setting: Setting, results: Results) -> List[Table]:
    """Each regime of ours against the best of the paper's, by best accuracy and by the mean over all sizes."""
    planned = [name for name in PAPER if name in results]
    rivals = [curve for name in planned if (curve := curve_of(name, results)) is not None]
    rows = []
    for name in _OURS if rivals and len(rivals) == len(planned) else ():
        curve = curve_of(name, results)
        if curve is None:
            continue
        best = curve.value[curve.best] - max(rival.value[rival.best] for rival in rivals)
        over = mean(curve.value) - max(mean(rival.value) for rival in rivals)
        rows.append([curve.label, _best(curve), f'{best:+.2f}', f'{mean(curve.value):.2f}', f'{over:+.2f}',
                     _verdict(best > 0 and over > 0, curve, *rivals)])
    header = ['arm', 'best top-1', 'beside the paper\'s best', 'mean over sizes', 'beside the paper\'s best',
              'better in both']
    return [Table(header, rows), _BEYOND(setting, results)]


def make_studies(setting: Setting) -> Dict[str, Study]:
    """The studies by name, as they are for a setting."""
    specialists = tuple(f'specialist-{size}' for size in setting.specialists)
    rivals = (*_RIVALS, half_size(setting))
    return {
        'inference': Study(
            'Cheaper inference',
            'The smallest size at which a model has the best accuracy of the fixed-size model, which stands first, and '
            'how many times fewer operations that takes than the size that one was trained at. Aim: at least '
            f'{FEWER_OPERATIONS:g} times (the paper: about 2).',
            (*CONTROLS, *rivals), _against_control(
                rivals, ['as good as that at', 'ahead there', 'times fewer operations', 'aim'], _cheaper_inference)),
        'accuracy': Study(
            'Better accuracy',
            'The error at the best size beside that of the fixed-size model at its own, which stands first. Aim: at '
            f'least {ERROR_REDUCTION:.0%} lower (the paper: 14 %).',
            (*CONTROLS, *rivals), _against_control(rivals, ['error', 'aim'], _better_accuracy)),
        'training': Study(
            'Cheaper training',
            'Whether a regime of small mean size reaches the accuracy of the fixed-size model, which stands first, in '
            f'a training of fewer operations. Aim: at least {1 / CHEAP:g} times fewer. Times are over the control\'s.',
            (*CONTROLS, *_CHEAP), _training),
        'resilience': Study(
            'Resilience',
            'Top-1 of one model less that of specialists, each trained at the one size for as many operations, in '
            f'points. Aim: within {WITHIN:g} point of every one of them, better than most. Then less that of whichever '
            'model of one size is best at the size, which need not be its specialist.',
            (*CONTROLS, *_ONE_FOR_ALL, *specialists), _resilience),
        'parts': Study(
            'What each part does',
            'Differences of top-1 in points, the mean over all sizes, seed by seed. Smoothing, shares and dropout are '
            f'changed in B+ of small mean size at {CHEAP} of the cost.',
            (CONTROL, 'small-bplus-cheap', 'cheap-rough', 'cheap-over-steps', 'cheap-drop', 'cheap-drop-reg', *PAPER,
             'timm', 'timm-progressive'), _parts),
        'beyond': Study(
            'Past the paper',
            'Annealed regimes, which train small images early and large ones late; those in so small a batch that its '
            'mean over the steps is the control\'s; nine images of ten at half the base size. Aim: better than every '
            'regime of the paper that is judged there, both at the best size and in the mean over all sizes. Then what '
            'each difference makes: top-1 in points, the mean over all sizes, seed by seed.',
            (*CONTROLS, 'timm', 'timm-progressive', 'timm-steps', 'timm-half', *PAPER, *_OURS, 'half-bplus-rough',
             'half-bplus-even'), _beyond),
    }
