"""A trained model made ready for publication: a folder for the Hugging Face hub, or an ONNX file."""
import argparse
import copy
import importlib.util
import json
import os
import shlex
import shutil
import tempfile
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

import torch
from huggingface_hub import ModelCard
from timm.layers import SplitBatchNorm2d
from timm.models import load_state_dict, save_for_hf
from torch import nn

from ._version import __version__
from .architectures import default_cfgs
from .args import ARGS_FILE
from .bn_stats import BN_STATS_FILE, BatchNormStats, digest, fingerprint, input_size, set_input_size
from .calibration import calibrated_layers
from .card import CALIBRATED, CARD_FILE, NONE, OWN, PLOT_FILE, REPO_PLACEHOLDER, make_card
from .checkpoint import EMA_FILE, MODEL_FILE, STATE_JSON, read_state
from .curves import METRIC_NAMES, SIZES_FILE, make_curves, write_sizes
from .errors import UsageError, check_writable, refusing
from .layout import CONFIG_FILE, KEY, read_config, sha256, staged, write_config
from .models import Checkpoint, find_checkpoint
from .plots import save_against_size
from .provenance import RUN_FILE, read_run
from .sizes import SizeProbe
from .tokens import holds_token

HUB_FILES = (CONFIG_FILE, MODEL_FILE, BN_STATS_FILE, CARD_FILE, PLOT_FILE, ARGS_FILE, SIZES_FILE, RUN_FILE)
DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}
# What timm's pretrained_cfg says of the weights that training started from, which these are not
_OF_THE_SOURCE = ('tag', 'origin_url', 'paper_name', 'paper_ids', 'license', 'description', 'notes', 'label_names',
                  'label_descriptions')
_ONNX_TOLERANCE = 1e-3  # of a logit, relative to the largest


@dataclass
class Published:
    """A trained model as it is to be published.

    Attributes:
        found: Where it was.
        model: timm model on the CPU, with the batch-norm statistics for ``img_size`` px and that as its input size.
        img_size: Size in pixels that it is published for; of an oblong one the width.
        kind: Which statistics it has: ``calibrated``, ``own`` or, where it has no batch norm, ``none``.
        average: Whether the weights are a moving average.
        stats: Those of all calibrated sizes, if there are any.
        weights: Fingerprint of the weights as they were saved.
        own: Digest of the statistics as they were saved.
        digests: Digests of the calibrated ones, by size.
    """
    found: Checkpoint
    model: Any
    img_size: int
    kind: str
    average: bool
    stats: Optional[BatchNormStats]
    weights: str
    own: str
    digests: Dict[int, str]

    @property
    def sizes(self) -> Tuple[int, ...]:
        """Calibrated sizes in pixels."""
        return self.stats.sizes if self.stats else ()


def prepare(args: argparse.Namespace) -> Published:
    """Load a trained model and give it the statistics that it is published with.

    Args:
        args: ``checkpoint``, as in :func:`~mixsize_timm.models.find_checkpoint`; ``model``, of a file of weights;
            ``img_size`` in pixels, by default the one that the model is meant for; ``stats``, ``calibrated`` for the
            statistics for that size or ``own`` for those of training; ``use_ema``, which has to be said where a run
            has a moving average.

    Raises:
        UsageError: It cannot be had.
    """
    found = find_checkpoint(args.checkpoint, model=args.model, use_ema=args.use_ema is not False)
    with refusing(f'cannot load {found.name}'):
        average = _check_average(found, args.use_ema)
    if args.stats == OWN and found.published.get('statistics') == CALIBRATED:
        raise UsageError(f'{found.name} was exported without the statistics of training: export the run for them')
    model: Any = found.create()
    stats = found.statistics() if calibrated_layers(model) else None
    if stats is not None and not stats.attach(model):
        stats = None  # of other weights, as it has warned
    digests = {size: stats.digest(size) for size in stats.sizes} if stats else {}
    published = Published(found, model, args.img_size or input_size(model), NONE, average, stats, fingerprint(model),
                          digest(model), digests)
    _make_native(model, stats)
    if args.img_size:
        _check_size(published)
        set_input_size(model, args.img_size)
    if calibrated_layers(model):
        published.kind = args.stats
        if args.stats == CALIBRATED:
            _switch(published)
    return published


def _check_average(found: Checkpoint, use_ema: Optional[bool]) -> bool:
    """Whether the weights are a moving average, which has to be meant.

    Raises:
        UsageError: It is not said, or not as the checkpoint has it.
    """
    name = found.name
    if found.hub:
        if use_ema is not None:
            raise UsageError(f'{name} holds one set of weights: leave out --use-ema and --no-use-ema')
        return bool(found.published.get('moving_average'))
    there = alone = os.path.basename(found.weights) == EMA_FILE
    if found.weights and not found.weights.endswith('.safetensors'):
        raw, average = (load_state_dict(found.weights, use_ema=which) for which in (False, True))
        there = any(not torch.equal(tensor, average[key]) for key, tensor in raw.items())
    if there and use_ema is None:
        raise UsageError(f'{name} has a moving average of the weights: say --use-ema or --no-use-ema')
    if alone and not use_ema and found.weights == name:
        raise UsageError(f'{name} is a moving average: leave out --no-use-ema')
    if use_ema and not there:
        raise UsageError(f'{name} has no moving average that was validated: leave out --use-ema')
    return there and bool(use_ema)


def _make_native(model: nn.Module, stats: Optional[BatchNormStats]) -> None:
    """Leave out what timm alone does not make: the auxiliary layers of split batch norm, which only training uses."""
    for module in model.modules():
        if isinstance(module, SplitBatchNorm2d):
            module.aux_bn = nn.ModuleList()
    names = model.state_dict().keys()
    for size, statistics in list(stats.by_size.items()) if stats else ():
        stats.by_size[size] = {name: tensor for name, tensor in statistics.items() if name in names}  # type: ignore


def _check_size(published: Published) -> None:
    channels, height, width = published.model.pretrained_cfg['input_size']
    takes = SizeProbe(published.model, channels, (height, width))
    if not takes(published.img_size):
        raise UsageError(f'{published.found.name} does not take images of {published.img_size} px: {takes.reason}')


def _switch(published: Published) -> None:
    """Give the model the statistics for its size."""
    name, size, stats = published.found.name, published.img_size, published.stats
    if stats is None or size not in stats.by_size:
        there = f', only for {", ".join(map(str, stats.sizes))} px' if stats else ''
        raw = published.found.run and not published.average and not published.found.use_ema
        target = ' --no-use-ema --output DIR, and export DIR' if raw else ''
        raise UsageError(f'{name} has no statistics calibrated for {size} px{there}: make them with mixsize calibrate '
                         f'{name} --sizes {size}{target}; or take those of training with --stats own')
    stats.apply(published.model, size)


class Export:
    """One run of ``mixsize hub export``. The constructor finds what cannot work; :meth:`run` writes the folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.name = os.path.basename(os.path.abspath(args.folder))
        self.published = prepare(args)
        self._check_folder()
        found = self.published.found
        self.records = found.run or found.folder  # a run's, or those that were published with it
        with refusing(f'the records of {found.name} are not in order'):
            self.record = read_run(self.records)
            self.metric, self.results, self.without = self._find_results()
            self.regime = self.record.get('regime') or (self.results or {}).get('regime')
        self.before = found.published
        self.base_model = self._base_model()
        self.model = _cast(self.published.model, args.dtype)
        if found.weights:
            for name in _OF_THE_SOURCE:
                self.model.pretrained_cfg.pop(name, None)

    def _check_folder(self) -> None:
        folder, source = self.args.folder, self.published.found.folder
        if not folder:
            raise UsageError('DIR is empty: name the folder to write')
        there = present(folder)
        if os.path.exists(os.path.join(folder, STATE_JSON)) or (ARGS_FILE in there and CONFIG_FILE not in there):
            raise UsageError(f'{folder} is a run, or a checkpoint of one: choose another folder')
        if source and os.path.realpath(source) == os.path.realpath(folder):
            raise UsageError(f'{folder} is what is exported: choose another folder')
        if there and not self.args.overwrite:
            raise UsageError(f'{folder} already holds {there[0]}: choose another folder, or --overwrite')
        check_writable(folder)

    def _find_results(self) -> Tuple[str, Optional[Dict[str, Any]], str]:
        """What was measured of these very weights and statistics.

        Returns:
            The metric; the model's entry of ``sizes.json`` with the rows that are of them, if there are any; and if
            not, why not.
        """
        found, published = self.published.found, self.published
        path = self.args.results or os.path.join(self.records, SIZES_FILE)
        if not os.path.exists(path):
            if self.args.results:
                raise UsageError(f'no results at {path}: check --results')
            return 'top1', None, f'{found.name} has no {SIZES_FILE}'
        with refusing(f'{path} holds no results'), open(path, encoding='utf-8') as file:
            document = json.load(file)
            entries = [entry for entry in document['checkpoints'] if entry.get('weights') == published.weights]
            entry = entries[0] if entries else {'results': ()}
            own_too = entry.get('statistics') == published.own
            rows = [row for row in (self._of_these(row, own_too) for row in entry['results']) if row]
            if published.kind == OWN and not own_too:
                rows = []
            metric = document['metric'] if document['metric'] in METRIC_NAMES else 'top1'
        if rows:
            calibrated = entry['calibrated'] if any(row['statistics'] != published.own for row in rows) else 0
            return metric, {**entry, 'name': self.name, 'checkpoint': self.name, 'calibrated': calibrated,
                            'results': rows}, ''
        if self.args.results:
            raise UsageError(f'{path} has no results of these weights with these statistics: mixsize evaluate with '
                             '--calibrate kept makes them')
        return metric, None, f'{path} is of other weights or statistics'

    def _of_these(self, row: Dict[str, Any], own_too: bool) -> Optional[Dict[str, Any]]:
        """A row of results if it is of these statistics; what it says of the model's own where there are no others.

        Args:
            row: The row.
            own_too: Whether what it says of the model's own statistics is of these.
        """
        published = self.published
        if row.get('crop_pct') not in (None, published.model.pretrained_cfg['crop_pct']):
            return None
        statistics = published.digests.get(row['img_size'], published.own)
        if row.get('statistics') == statistics:
            return row
        if statistics != published.own or not own_too:
            return None
        kept: Dict[str, Any] = {name: row[name] for name in ('img_size', 'images', 'gmacs', 'crop_pct') if name in row}
        own = {name: value for name, value in row.items() if name.endswith('_uncalibrated')}
        return {**kept, **{name.rpartition('_')[0]: value for name, value in own.items()}, **own,
                'statistics': statistics}

    def _base_model(self) -> Optional[str]:
        """Name on the hub of the model whose weights training started from, or that these are."""
        found, known = self.published.found, self.published.model.pretrained_cfg.get('hf_hub_id')
        if found.args is not None:
            return known if found.args.pretrained else None
        if found.hub:
            name = found.name.partition(':')[2] if found.name.startswith('hf') else None
            return self.before.get('base_model') if self.before else name
        return None if found.weights else known

    def _epochs(self) -> Dict[str, Any]:
        """Epochs that the checkpoint was trained for, and that it was to be, as far as it says so."""
        found = self.published.found
        if found.args is None:
            return {name: self.before.get(name) for name in ('epochs', 'planned_epochs')}
        return {'epochs': read_state(found.folder, 'epoch'), 'planned_epochs': found.args.epochs}

    def run(self) -> None:
        """Write the folder; a file of it that stood there is replaced when all are whole."""
        folder = self.args.folder
        with refusing(f'the records of {self.published.found.name} are not in order'):
            card = self._card()
        with refusing(f'cannot write to {folder}'), staged(folder, HUB_FILES) as aside:
            self._save_model(aside)
            self._save_records(aside)
            card.save(os.path.join(aside, CARD_FILE))
            check_tokens(aside)
        self._say()

    def _save_model(self, folder: str) -> None:
        published, model = self.published, self.model
        size = model.pretrained_cfg['input_size']
        names = self.record.get('data', {}).get('class_names')
        labels = {'label_names': names} if names and len(names) == model.num_classes else {}
        save_for_hf(model, folder, model_config=labels, safe_serialization=True,
                    data_config=dict(input_size=size, test_input_size=size))
        config = read_config(folder)
        config.get('model_args', {}).pop('num_classes', None)  # it says so elsewhere, and transformers gives it too
        config[KEY] = {
            'version': __version__, 'img_size': published.img_size, 'statistics': published.kind,
            'calibrated_sizes': list(published.sizes), 'moving_average': published.average, 'dtype': self.args.dtype,
            'base_model': self.base_model, **self._epochs(), 'regime': self.regime,
            'repo_id': self.args.repo_id or REPO_PLACEHOLDER, 'sha256': sha256(os.path.join(folder, MODEL_FILE))}
        write_config(folder, config)
        if published.stats:
            stats = BatchNormStats(fingerprint(model))
            stats.by_size = published.stats.by_size
            stats.save(os.path.join(folder, BN_STATS_FILE))

    def _save_records(self, folder: str) -> None:
        for name in (ARGS_FILE, RUN_FILE):
            if self.records and os.path.exists(os.path.join(self.records, name)):
                shutil.copyfile(os.path.join(self.records, name), os.path.join(folder, name))
        if self.results:
            write_sizes(os.path.join(folder, SIZES_FILE), {'metric': self.metric, 'checkpoints': [self.results]})
            save_against_size(os.path.join(folder, PLOT_FILE), make_curves([self.results], self.metric),
                              METRIC_NAMES[self.metric])

    def _card(self) -> ModelCard:
        args, published, epochs = self.args, self.published, self._epochs()
        done, planned = epochs['epochs'], epochs['planned_epochs']
        text = f'{done} epoch{"" if done == 1 else "s"}' if done else ''
        if done and planned and done < planned:
            text = f'{done} of the {planned} planned epochs'
        return make_card(
            name=self.name, repo_id=args.repo_id or REPO_PLACEHOLDER, model=self.model, stats=published.kind,
            sizes=published.sizes, dtype=args.dtype, metric=self.metric, results=self.results, run=self.record,
            regime=self.regime, args=published.found.args, epochs=text, average=published.average,
            has_args=os.path.exists(os.path.join(self.records, ARGS_FILE)), base_model=self.base_model,
            license=args.license, dataset=args.dataset, description=args.description)

    def _say(self) -> None:
        folder, published = self.args.folder, self.published
        megabytes = os.path.getsize(os.path.join(folder, MODEL_FILE)) / 1e6
        kind = {CALIBRATED: 'calibrated statistics', NONE: 'no statistics'}.get(published.kind, 'its own statistics')
        print(f'{folder} holds {self.model.pretrained_cfg["architecture"]} for {published.img_size} px with {kind}, '
              f'{"moving average, " if published.average else ""}{self.args.dtype}, {megabytes:.2f} MB')
        if self.without:
            print(f'Its card shows no accuracy: {self.without}; mixsize evaluate with --calibrate kept makes a '
                  f'{SIZES_FILE} for --results')
        if self.args.license == 'unknown':
            print('Its card says that the license is unknown: --license apache-2.0, for one, would state it')
        push = shlex.join(['mixsize', 'hub', 'push', folder, self.args.repo_id or REPO_PLACEHOLDER])
        after = ', after import mixsize_timm' if self.model.pretrained_cfg['architecture'] in default_cfgs else ''
        print(f'timm.create_model({f"local-dir:{folder}"!r}, pretrained=True) loads it{after}; {push} publishes it')


def present(folder: str) -> List[str]:
    """The files of the layout that are in a folder."""
    return [name for name in HUB_FILES if os.path.lexists(os.path.join(folder, name))]


def check_tokens(folder: str) -> None:
    """Refuse a folder that would publish an access token.

    Raises:
        UsageError: There is one in a text file.
    """
    for name in (CONFIG_FILE, CARD_FILE, ARGS_FILE, SIZES_FILE, RUN_FILE):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            with open(path, encoding='utf-8', errors='replace') as file:
                if holds_token(file.read()):
                    raise UsageError(f'{name} holds an access token: take it out of the run\'s records first')


def _cast(model: nn.Module, dtype: str) -> Any:
    """A copy of another type; its batch-norm statistics stay as they are, since variances can exceed float16."""
    result: Any = copy.deepcopy(model).to(DTYPES[dtype])
    for name, layer in calibrated_layers(model).items():
        for buffer in ('running_mean', 'running_var'):
            if getattr(layer, buffer, None) is not None:
                setattr(result.get_submodule(name), buffer, getattr(layer, buffer).clone())
    for name, tensor in result.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UsageError(f'{name} is not finite as {dtype}: ' + (
                'use --dtype bfloat16' if dtype == 'float16' else 'the weights are broken, export another checkpoint'))
    return result


class OnnxExport:
    """One run of ``mixsize hub onnx``. The constructor finds what cannot work; :meth:`run` writes the file."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        missing = [name for name in ('onnx', 'onnxruntime', 'onnxscript') if importlib.util.find_spec(name) is None]
        if missing:
            raise UsageError(f'{missing[0]} is not installed: pip install "mixsize-timm[onnx]"')
        if not args.file or os.path.isdir(args.file):
            raise UsageError(f'{args.file or "FILE"} is no file: name the one to write')
        if os.path.exists(args.file) and not args.overwrite:
            raise UsageError(f'{args.file} is there already: choose another, or --overwrite')
        check_writable(os.path.dirname(os.path.abspath(args.file)))
        self.published = prepare(args)

    def run(self) -> None:
        """Write the file when it gives what the model gives."""
        import onnx
        from timm.utils.onnx import onnx_export

        model, folder = self.published.model, os.path.dirname(os.path.abspath(self.args.file))
        os.makedirs(folder, exist_ok=True)
        images = torch.randn(2, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
        with refusing(f'cannot make ONNX of {self.published.found.name}'), tempfile.TemporaryDirectory(
                dir=folder) as aside:
            path = os.path.join(aside, 'model.onnx')
            onnx_export(model, path, images, use_dynamo=True, external_data=False, input_names=['images'],
                        output_names=['logits'])
            graph = onnx.load(path)
            onnx.helper.set_model_props(graph, self._facts())
            onnx.save(graph, path)
            difference = self._check(path, images)
            os.replace(path, self.args.file)
        print(f'{self.args.file} takes images [N, {", ".join(map(str, images.shape[1:]))}], float32 and normalised; '
              f'logits as the model\'s within {difference:.1e} in onnxruntime')

    def _facts(self) -> Dict[str, str]:
        """What the file says about itself: how images are prepared, and the classes."""
        config = self.published.model.pretrained_cfg
        found = self.published.found
        names = read_run(found.run or found.folder).get('data', {}).get('class_names') or config.get('label_names')
        facts = {name: config[name] for name in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')}
        facts.update(statistics=self.published.kind, **({'label_names': names} if names else {}))
        return {name: json.dumps(value) for name, value in facts.items()}

    def _check(self, path: str, images: torch.Tensor) -> float:
        """The largest difference of a logit, of batches of other lengths than the one that was traced too."""
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
        worst = 0.
        for batch in (images, images[:1], torch.cat([images, images[:1]])):
            with torch.inference_mode():
                expected = self.published.model(batch)
            logits = torch.from_numpy(session.run(None, {'images': batch.numpy()})[0])
            worst = max(worst, float((logits - expected).abs().max()))
            if not torch.allclose(logits, expected, atol=_ONNX_TOLERANCE * float(expected.abs().max()), rtol=0):
                raise UsageError(f'onnxruntime gives other logits than the model, by up to {worst:.1e}: nothing was '
                                 'written')
        return worst
