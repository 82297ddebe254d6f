"""docs/results.md, docs/results-arms.md and the plots, made of the results of all runs."""
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, Dict, List, Optional, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg

from mixsize_timm.curves import Curve
from mixsize_timm.plots import against_gmacs, against_size

from .runs import read_results
from .settings import CONTROL, Setting, make_arms, planned_arms
from .studies import (
    CONTROLS,
    NO_SIZE,
    NONE,
    SEEDS,
    Results,
    Study,
    as_used,
    control_name,
    control_of,
    curve_of,
    fewer_operations,
    half_size,
    make_studies,
    mean_top1,
    over_seeds,
    times_as_long,
    top1,
    with_bf16,
)

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / 'docs' / 'results.md'
ARMS = ROOT / 'docs' / 'results-arms.md'
PLOTS = ROOT / 'docs' / 'results'
# what most is asked about, besides the control and one size of half the pixels; the plots have eight colours
IN_SHORT = ('small-bplus', 'small-bplus-anneal-steps', 'half-bplus', 'timm', 'timm-progressive', 'timm-half')
HEADER = ['arm', 'seeds', 'best top-1', 'at', 'at the base size', 'mean over sizes', 'training: operations', 'steps',
          'time', 'as good as fixed at', 'inference: times fewer operations']
HEAD = """# Results

What MixSize gives on real images, beside training at one size and timm's scheduled sizes: top-1 in per cent, mean ±
standard deviation over three seeds. This page is made by `python -m benchmarks.evidence page` out of
[a file for each run](../benchmarks/results/evidence), with its commands, commit, machine and versions.
[How the studies are made](../benchmarks/evidence/README.md); [every arm at every size](results-arms.md).
"""
HOW_TO_READ = """## How to read it

* **Arms** have the same operations of training, if nothing else is said. *Fixed* is trained at one size, the control;
  where it was trained in two batches, the better one is what others have to match. *B+* is MixSize with what small
  images save spent on a larger batch, *D+* with it spent on more augmented duplicates ([the method](method.md)); "mean
  20 px" is the mean size over the images of an epoch. *Annealed* regimes train small images early and large ones late.
  The paper's have the control's batch at the base size, and larger ones below; *a mean batch* is that over the steps.
  `a144` and `a123` are presets of ours, annealed, with the control's batch in the mean: `a123` is nine images of ten at
  half the base size. timm's *scheduled* sizes are drawn for each step, its *progressive* ones grow during training.
* **Accuracies** are of the weights at the end of training. With MixSize batch norm is calibrated for each size, on
  augmented images as in the paper. A model of one size, or of timm's loader, is given the better of calibrated and own
  statistics, for each run at each size.
* **Costs** are over those of the first arm of the data set: operations are multiply-accumulates; times are of training
  steps with their loading, on machines that did other work beside, over the control's of the same day, and only of runs
  whose processor has the precision they train in. They are rough.
* **Sizes** "as good as fixed" and best sizes are read off the same means that are shown. "Within the spread" are means
  whose difference, seed by seed, is smaller than its deviation.
* **Settings** were not chosen on the images that are measured on, but for this: that most images of half the size were
  tried at all, on others, is what the fixed size of 16 px had shown on them. Of an arm that is in none of these tables
  single runs were made; they are [with the others](results-arms.md), and judged nowhere.
* **CIFAR-10** is stored as JPEG here, of quality 75 with subsampled colour, and few of its images are trained on: its
  accuracies compare with each other, and lie under published ones.
"""
ARMS_HEAD = """# Every arm at every size

What [the results](results.md) are read from, in the same words; made by the same command.
"""


def write_page() -> None:
    """Write both pages and the plots."""
    found = {name: _read(Setting.read(name)) for name in Setting.names()}
    settings = [Setting.read(name) for name, results in found.items() if any(results.values())]
    parts = [HEAD, '## In short\n', *(_in_short(setting, found[setting.name]) for setting in settings), HOW_TO_READ,
             (Path(__file__).parent / 'summary.md').read_text(encoding='utf-8')]
    titles = {name: study for setting in settings[:1] for name, study in make_studies(setting).items()}
    for number, (name, study) in enumerate(titles.items(), 1):
        parts.append(f'## {number}. {study.title}\n\n{study.question}\n')
        parts += filter(None, (_section(setting, make_studies(setting)[name], found[setting.name])
                               for setting in settings))
    PAGE.write_text('\n'.join(parts), encoding='utf-8')
    arms = (_every_arm(setting, found[setting.name]) for setting in settings)
    ARMS.write_text('\n'.join([ARMS_HEAD, *arms, _provenance(settings, found)]), encoding='utf-8')
    for path in (PAGE, ARMS):
        print(f'{path.relative_to(ROOT)} is written')


def _read(setting: Setting) -> Dict[str, List[Dict[str, Any]]]:
    """All runs by arm, each under the arm's title of today."""
    return {name: [{**run, 'title': arm.title} for run in read_results(setting, name)]
            for name, arm in make_arms(setting).items()}


def _whole(found: Dict[str, List[Dict[str, Any]]]) -> Results:
    """The runs that did not fail."""
    return {name: [run for run in runs if 'failed' not in run] for name, runs in found.items()}


def _planned(setting: Setting, found: Dict[str, List[Dict[str, Any]]]) -> Dict[str, List[Dict[str, Any]]]:
    """Those of the arms that are judged."""
    return {name: found[name] for name in planned_arms(setting)}


def _in_short(setting: Setting, found: Dict[str, List[Dict[str, Any]]]) -> str:
    """The arms that most is asked about, those of them that have all their seeds, and the plots of them."""
    results = _whole(_planned(setting, found))
    names = [name for name in (*CONTROLS, half_size(setting), *IN_SHORT) if len(results.get(name, ())) >= SEEDS]
    rows = _measured(setting, results, names)
    return '\n'.join([f'### {setting.title}\n', *_table(HEADER, rows), '', *_plots(setting, results)]) if rows else ''


def _measured(setting: Setting, results: Results, names: Sequence[str]) -> List[List[str]]:
    """A row of :data:`HEADER` for each arm that was run."""
    control, target, rows = curve_of(CONTROL, results), control_of(results), []
    for name in names:
        curve = curve_of(name, results)
        if curve is None or control is None:
            continue
        runs, best = [as_used(run) for run in results[name]], curve.sizes[curve.best]
        costs = [f'{curve.training[what] / control.training[what]:.2f}' for what in ('gmacs', 'steps')]
        match = None if name in CONTROLS else fewer_operations(curve, target, setting.base_size)
        none = NONE if name in CONTROLS else NO_SIZE
        inference = [f'{match[0]} px', f'{match[1]:.2f}'] if match else [none, NONE]
        top1s = (over_seeds(runs, lambda run, size=size: top1(run, size)) for size in (best, setting.base_size))
        rows.append([curve.label, str(len(runs)), next(top1s), f'{best} px', next(top1s), over_seeds(runs, mean_top1),
                     *costs, times_as_long(name, results), *inference])
    return rows


def _every_arm(setting: Setting, found: Dict[str, List[Dict[str, Any]]]) -> str:
    """What all arms gave and cost, and their accuracies at every size."""
    planned = _planned(setting, found)
    made, wanted = sum(min(SEEDS, len(runs)) for runs in planned.values()), SEEDS * len(planned)
    unfinished = [f'**Not finished:** {made} of {wanted} runs have been made.\n'] if made < wanted else []
    rows = _measured(setting, _whole(planned), tuple(planned))
    return '\n'.join([f'## {setting.title}\n', *unfinished, *_table(HEADER, rows), '', _accuracies(setting, found)])


def _plots(setting: Setting, results: Results) -> List[str]:
    """The control in the better of its batches and the arms beside it, as they are judged."""
    names = (control_name(results), half_size(setting), *IN_SHORT)
    curves = [replace(curve, calibrated=False) for name in names if (curve := curve_of(name, results)) is not None]
    lines = []
    PLOTS.mkdir(exist_ok=True)
    for kind, plot in (('size', against_size), ('gmacs', against_gmacs)):
        figure = plot(curves, 'Top-1 accuracy (%)')
        FigureCanvasAgg(figure)
        file = PLOTS / f'{setting.name}-{kind}.png'
        figure.savefig(file, dpi=110, bbox_inches='tight', metadata={'Software': None})
        lines.append(f'![Accuracy against {"image size" if kind == "size" else "operations"}, {setting.title}]'
                     f'({file.relative_to(PAGE.parent).as_posix()})\n')
    return lines


def _section(setting: Setting, study: Study, found: Dict[str, List[Dict[str, Any]]]) -> str:
    """The answers of a study for a setting, nothing where it has no arms of it."""
    arms, found = planned_arms(setting), _planned(setting, found)
    names = [name for name in study.arms if name in arms]
    parts = [[*_table(*table), ''] for table in study.answer(setting, _whole(found)) if table.rows]
    lines = []
    for name in names:
        failed = [run for run in found[name] if 'failed' in run]
        if failed:
            lines.append(f'{arms[name].title}: {len(failed)} of {len(found[name])} runs failed: {failed[0]["failed"]}')
    missing = [arms[name].title for name in names if not found[name]]
    if missing:
        lines.append(f'Not run: {"; ".join(missing)}.')
    if lines:
        parts.append([*(f'- {line}' for line in lines), ''])
    return '\n'.join([f'### {setting.title}\n', *sum(parts, [])]) if parts else ''


def _accuracies(setting: Setting, found: Dict[str, List[Dict[str, Any]]]) -> str:
    results = _whole(found)
    control = curve_of(CONTROL, results)
    rows = [row for name, runs in results.items() for row in _rows(name, runs, control, setting.sizes)]
    header = ['arm', 'files', 'epochs', 'cost', 'seeds', 'statistics', *(f'{size} px' for size in setting.sizes)]
    return '\n'.join([*_table(header, rows), ''])


def _rows(name: str, all_runs: Sequence[Dict[str, Any]], control: Optional[Curve],
          sizes: Sequence[int]) -> List[List[str]]:
    rows = []
    for key, kind in (('top1', 'calibrated'), ('top1_as_in_use', 'calibrated as in use'), ('top1_uncalibrated', 'own')):
        runs = [run for run in all_runs if key in run['results'][0]]
        if not runs:
            continue
        cells = [over_seeds(runs, lambda run, size=size, key=key: top1(run, size, key)) for size in sizes]
        cost = mean(run['training']['gmacs'] for run in runs) / control.training['gmacs'] if control else None
        rows.append([runs[0]['title'], f'`{name}`', str(runs[0]['options']['epochs']), f'{cost:.2f}' if cost else '-',
                     str(len(runs)), kind, *cells])
    return rows


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> List[str]:
    return [f'| {" | ".join(cells)} |' for cells in (header, ['---'] * len(header), *rows)]


def _provenance(settings: Sequence[Setting], found: Dict[str, Dict[str, List[Dict[str, Any]]]]) -> str:
    lines = ['## Where it was measured\n']
    for setting in settings:
        runs = [run for arm in found[setting.name].values() for run in arm]
        whole = [run for run in runs if 'failed' not in run]
        places = sorted({f'{run["machine"]}, {run["device"]}, {run["threads"]} thread{"s" * (run["threads"] > 1)}, '
                         f'{"bf16" if run["options"].get("amp") else "float32"}; {run["versions"]}' for run in whole})
        commits = sorted({str(run['commit']) for run in runs})
        timed = with_bf16(whole)
        seconds = mean(run['training']['seconds'] for run in timed) if timed else 0
        wide = len(whole) - len(timed)
        others = f' (without {wide} whose bf16 was computed in float32)' if wide else ''
        lines.append(f'- {setting.title}: {len(runs)} runs, {len(runs) - len(whole)} failed, '
                     f'{min(run["date"] for run in runs)} to {max(run["date"] for run in runs)}, {seconds:.0f} s of '
                     f'training each on average{others}; {" and ".join(places)}; commit{"s" * (len(commits) > 1)} '
                     f'{", ".join(commits)}. '
                     f'All settings: [{setting.name}.yaml](../benchmarks/evidence/{setting.name}.yaml).')
    return '\n'.join(lines) + '\n'
