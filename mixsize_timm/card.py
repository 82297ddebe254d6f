"""The model card of a published model: what the run recorded, and nothing else."""
import argparse
import os
import re
from dataclasses import replace
from typing import Any, Dict, List, Optional, Sequence

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .architectures import default_cfgs
from .curves import METRIC_NAMES, WITHIN, make_curves, table_cells
from .resources import read_resource

CARD_FILE = 'README.md'
PLOT_FILE = 'accuracy-against-size.png'
REPO_PLACEHOLDER = 'ORG/NAME'  # until it is pushed
TASK = 'image-classification'
CALIBRATED, OWN, NONE = 'calibrated', 'own', 'none'  # which batch-norm statistics are in the weights
_METRIC_TYPES = {'top1': 'accuracy', 'top5': 'accuracy', 'map': 'mean_average_precision', 'micro_f1': 'f1',
                 'macro_f1': 'f1', 'sample_f1': 'f1'}
_WITH = {CALIBRATED: ', calibrated,', OWN: ' with the statistics of training', NONE: ''}
_ADAPT = {'d+': 'more augmented duplicates of each image (D+)', 'b+': 'a larger batch (B+)',
          'bd+': 'a larger batch and more augmented duplicates (BD+)', 'none': 'nothing'}


def make_card(
        *,
        name: str,
        repo_id: str,
        model: Any,
        stats: str,
        sizes: Sequence[int],
        dtype: str,
        metric: str,
        results: Optional[Dict[str, Any]],
        run: Dict[str, Any],
        regime: Optional[Dict[str, Any]],
        args: Optional[argparse.Namespace],
        has_args: bool,
        epochs: str,
        average: bool,
        base_model: Optional[str] = None,
        license: str = 'unknown',
        dataset: str = '',
        description: str = '',
) -> ModelCard:
    """The model card of an exported model.

    Args:
        name: Name of the model.
        repo_id: ``org/name`` on the hub.
        model: timm model as it is exported, its input size in its ``pretrained_cfg``.
        stats: Which batch-norm statistics are in the weights: ``calibrated``, ``own`` or, where it has no batch norm,
            ``none``.
        sizes: Sizes in pixels that there are calibrated statistics for.
        dtype: Type of the exported weights.
        metric: Metric that the table shows.
        results: The model's entry of ``sizes.json``, if it was measured.
        run: What :func:`~mixsize_timm.provenance.read_run` gave.
        regime: The regime of its training, as plain values.
        args: Arguments of the run, if it is known.
        has_args: Whether its ``args.yaml`` is beside the card.
        epochs: What is said of the epochs that it was trained for; empty where they are not known.
        average: Whether the weights are a moving average.
        base_model: Name on the hub of the model whose weights training started from.
        license: Identifier of the license, as the hub has them.
        dataset: Identifier of the data set on the hub; by default told from the arguments of the run.
        description: What the card begins with.
    """
    img_size, architecture = model.pretrained_cfg['input_size'][-1], model.pretrained_cfg['architecture']
    dataset = dataset or dataset_id(args, results)
    split = (results or {}).get('data', {}).get('split', '')
    data = ModelCardData(
        license=license, library_name='timm', pipeline_tag=TASK, tags=[TASK, 'timm', 'mixsize'],
        datasets=[dataset] if dataset else None, base_model=base_model,
        metrics=sorted({_METRIC_TYPES[key] for key in _measured(results)}) or None,
        model_name=name, eval_results=eval_results(results, dataset, split, stats))
    data_of_run, starts = run.get('data', {}), run.get('starts', [])
    registers = architecture in default_cfgs  # ours, which timm knows after an import
    cells, curve = None, None
    if results:
        curve = make_curves([results], metric)[0]
        cells = table_cells(curve, metric)[:-1]  # without the mean, which the results do not have
    others = [size for size in (sizes or (curve.sizes if curve else ())) if size != img_size]
    return ModelCard.from_template(
        data, template_str=read_resource('cards', 'card.md.jinja') + '\n', name=name, repo_id=repo_id,
        architecture=architecture, registers=registers, num_params=sum(p.numel() for p in model.parameters()),
        dtype=dtype, num_classes=model.num_classes, class_names=_shown(data_of_run.get('class_names')),
        img_size=img_size, stats=stats, sizes=sizes, other_size=min(others) if others else None,
        mode='RGB' if model.pretrained_cfg['input_size'][0] == 3 else 'L',
        description=description, table=cells, calibrated=bool(curve and curve.calibrated),
        interval=bool(curve and curve.low != curve.high), split=split,
        dataset_name=_code(dataset) if dataset else 'the data', images=curve.rows[0].get('images') if curve else None,
        measured=(results or {}).get('data', {}).get('weights', dtype), plot=PLOT_FILE,
        regime=regime, probs=[f'{share:.3g}' for share in regime['probs']] if regime else [],
        adapt=_ADAPT[regime['adapt']] if regime else '', average=average, base_model=base_model,
        starts=starts, fence=_fence([start['command'] for start in starts]),
        train_images=data_of_run.get('train_images'), has_args=has_args, epochs=epochs,
        limits=_limits(curve, results, sizes, stats, dtype, img_size, 'timm' if registers else 'timm alone'))


def eval_results(results: Optional[Dict[str, Any]], dataset: str, split: str, stats: str) -> List[EvalResult]:
    """The results in the form of the hub: a model's metrics at each size, in per cent.

    Args:
        results: The model's entry of ``sizes.json``.
        dataset: Identifier of the data set.
        split: Its split.
        stats: Which batch-norm statistics the metrics are with; of its own those of training, at every size.
    """
    found = []
    for row in results['results'] if results else ():
        for key in _measured(results):
            found.append(EvalResult(
                task_type=TASK, task_name='Image Classification', dataset_type=dataset or 'unknown',
                dataset_name=dataset or 'unknown', dataset_split=split or None, metric_type=_METRIC_TYPES[key],
                metric_name=f'{METRIC_NAMES[key]} (%) at {row["img_size"]} px',
                metric_value=row[f'{key}_uncalibrated' if stats == OWN else key],
                metric_args={'img_size': row['img_size'], 'statistics': stats}))
    return found


def dataset_id(args: Optional[argparse.Namespace], results: Optional[Dict[str, Any]] = None) -> str:
    """What a data set is called, told from the arguments of a run or from its results; the folder's name of one."""
    named = (args.dataset or args.data_dir if args else (results or {}).get('data', {}).get('data')) or ''
    kind, _, rest = named.partition('/')
    if kind in ('hfds', 'hfids', 'tfds', 'wds', 'torch'):
        return rest
    folder = os.path.basename(os.path.normpath(named)) if named else ''
    return '' if folder in ('.', '..') else folder


def _measured(results: Optional[Dict[str, Any]]) -> List[str]:
    rows = results['results'] if results else []
    return [key for key in METRIC_NAMES if rows and all(key in row for row in rows)]


def _code(text: Any) -> str:
    """A text as Markdown shows it to the letter."""
    return f'`{" ".join(re.sub("`", " ", str(text)).split())}`'


def _shown(names: Optional[Sequence[str]], most: int = 20) -> Optional[List[str]]:
    return [_code(name) for name in names] if names and len(names) <= most else None


def _fence(texts: Sequence[str]) -> str:
    """Backticks that none of the texts can close."""
    return '`' * max(3, 1 + max((len(part) for text in texts for part in re.findall('`+', text)), default=0))


def _limits(curve: Any, results: Optional[Dict[str, Any]], sizes: Sequence[int], stats: str, dtype: str,
            img_size: int, timm: str) -> List[str]:
    lines = ['It names one of its classes for any image, whatever the image shows.']
    if curve is None:
        lines.append('Its accuracy was not measured.')
    else:
        used = replace(curve, value=curve.own) if stats == OWN else curve
        bound = used.value[used.best] - WITHIN
        near = ', '.join(str(size) for size, value in zip(used.sizes, used.value) if value >= bound)
        lines.append(f'Measured on one split of one data set. There, its accuracy{_WITH[stats]} is within a point of '
                     f'its best at {near} px; of sizes outside the table nothing is known.')
    unmeasured = [str(size) for size in sizes if curve is None or size not in curve.sizes]
    if curve is not None and unmeasured:
        lines.append(f'Calibrated but not measured: {", ".join(unmeasured)} px.')
    if sizes:
        lines.append('At a size without statistics of its own `mixsize_timm` takes those of the nearest; '
                     '`mixsize calibrate` makes them for any size, from unlabelled images.')
    if stats != NONE:
        kind = f'for {img_size} px' if stats == CALIBRATED else 'of training'
        lines.append(f'With {timm} it has the statistics {kind} at every size.')
    measured = (results or {}).get('data', {}).get('weights', dtype)
    if measured != dtype:
        lines.append(f'It was calibrated and measured with {measured} weights; here they are {dtype}.')
    return lines
