"""A folder in the layout of the Hugging Face hub, checked as a whole: that it loads, and that its parts agree."""
import json
import os
from typing import Any, Dict, Optional, Sequence, Set, Tuple

import torch
from huggingface_hub import EvalResult, ModelCard
from timm.data import create_transform, resolve_model_data_config

from .args import ARGS_FILE, read_yaml
from .bn_stats import BatchNormStats, digest, fingerprint
from .card import CALIBRATED, CARD_FILE, PLOT_FILE, eval_results
from .checkpoint import MODEL_FILE
from .curves import SIZES_FILE
from .errors import UsageError, refusing
from .export import check_tokens
from .layout import CONFIG_FILE, is_pickle
from .models import find_checkpoint
from .provenance import read_run
from .sizes import SizeProbe


def verify(folder: str) -> str:
    """Check a folder as a whole: that it loads, that its parts agree, and that it holds nothing but a model.

    Args:
        folder: The folder.

    Returns:
        What it is, in a few words.

    Raises:
        UsageError: Something is wrong with it.
    """
    if not os.path.isdir(folder):
        raise UsageError(f'no folder at {folder}')
    for name in sorted(os.listdir(folder)):
        if is_pickle(name):
            raise UsageError(f'{folder} holds {name}, which can run code when it is read: take it out')
    for name in (CONFIG_FILE, MODEL_FILE, CARD_FILE):
        if not os.path.isfile(os.path.join(folder, name)):
            raise UsageError(f'{folder} has no {name}: mixsize hub export writes such a folder')
    check_tokens(folder)
    with refusing():
        read_run(folder)
        if os.path.isfile(os.path.join(folder, ARGS_FILE)):
            read_yaml(os.path.join(folder, ARGS_FILE))
    found = find_checkpoint(folder)
    ours, stats, model = found.published, found.statistics(), found.create()
    with refusing(f'{folder} is not in order'):
        _verify_model(folder, model)
        _verify_statistics(folder, model, stats, ours)
        _verify_card(folder, ours)
    config: Any = model.pretrained_cfg
    return (f'{config["architecture"]} for {config["input_size"][-1]} px'
            + (f', statistics for {", ".join(map(str, stats.sizes))} px' if stats else ''))


@torch.inference_mode()
def _verify_model(folder: str, model: Any) -> None:
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UsageError(f'{folder}: {name} has values that are not finite')
    config = resolve_model_data_config(model)
    create_transform(**config)
    size = config['input_size']
    if not SizeProbe(model, size[0], size[1:])(size[1:]):
        raise UsageError(f'{folder} does not take images of {size[-2]}x{size[-1]} px')
    logits = model(torch.zeros(1, *size))
    if logits.shape != (1, model.num_classes) or not torch.isfinite(logits).all():
        raise UsageError(f'{folder} gives {list(logits.shape)} logits, not {model.num_classes} finite ones')


def _verify_statistics(folder: str, model: Any, stats: Optional[BatchNormStats], ours: Dict[str, Any]) -> None:
    size: Any = ours.get('img_size')
    if stats is not None and stats.weights != fingerprint(model):
        raise UsageError(f'{folder}: its statistics are of other weights')
    if ours and not set(ours['calibrated_sizes']) <= set(stats.sizes if stats else ()):
        raise UsageError(f'{folder} has not the statistics of all sizes that {CONFIG_FILE} names')
    if ours.get('statistics') != CALIBRATED:
        return
    if stats is None or size not in stats.by_size or stats.digest(size) != digest(model):
        raise UsageError(f'{folder}: its weights do not have the statistics calibrated for {size} px')


def _verify_card(folder: str, ours: Dict[str, Any]) -> None:
    """Check that the card can be read, and shows what was measured."""
    path = os.path.join(folder, CARD_FILE)
    with refusing(f'{path} is no model card'):
        card = ModelCard.load(path)
        data: Any = card.data
        missing = [name for name in ('license', 'library_name', 'pipeline_tag') if not data.get(name)]
    if missing:
        raise UsageError(f'{path} has no {missing[0]} in its header')
    if PLOT_FILE in card.text and not os.path.isfile(os.path.join(folder, PLOT_FILE)):
        raise UsageError(f'{path} shows {PLOT_FILE}, which is not there')
    if ours and _figures(data.get('eval_results') or ()) != _figures(
            eval_results(_results(folder), '', '', ours['statistics'])):
        raise UsageError(f'{path} shows other results than {SIZES_FILE}')


def _figures(results: Sequence[EvalResult]) -> Set[Tuple[str, str, str]]:
    return {(str(result.metric_name), str(result.metric_value), str(result.metric_args)) for result in results}


def _results(folder: str) -> Optional[Dict[str, Any]]:
    path = os.path.join(folder, SIZES_FILE)
    if not os.path.isfile(path):
        return None
    with refusing(f'{path} holds no results'), open(path, encoding='utf-8') as file:
        results = json.load(file)['checkpoints'][0]
        return {**results, 'results': list(results['results'])}
