"""What is trained: the settings of a data set and a machine, and the arms that are compared under them.

An arm is a way to train. All arms of a setting have its model, data, augmentation, optimizer and kind of schedule; they
differ in the options named here and in the number of epochs, which follows from the cost that an arm is to have: its
operations of training over those of the control.
"""
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import timm
import yaml

import mixsize_timm.architectures  # noqa: F401  # the networks for CIFAR
from mixsize_timm.measure import count_gmacs
from mixsize_timm.regime import Regime
from mixsize_timm.sampler import epoch_batches

HERE = Path(__file__).resolve().parent
CONTROL = 'fixed'
OFF = {'mixsize': 'off', 'fast_loader': True, 'grad_smoothing': False}
CHEAP = 0.4  # of the control's cost: 2.5 times less


@dataclass(frozen=True)
class Setting:
    """A data set, a model and a budget: one YAML file beside this one.

    Attributes:
        name: Name of the file.
        title: What it is called on the page.
        data: Folder of the data set, below the folder of all data.
        num_images: Training images.
        base_size: Image size of the control, in pixels.
        batch_size: Its batch.
        epochs: Its epochs.
        warmup: Share of its epochs that every arm warms up for, to whole epochs and at least one.
        sizes: Image sizes that every run is measured at.
        specialists: Sizes besides the base size that a fixed-size model is trained at.
        paper: Options of the paper's regime of a mean size near the base size.
        small: Options of the paper's regime of a small mean size, or one made after it.
        smaller: Options of one of ours, with most images at half the base size.
        calibrate: Batches that batch norm is calibrated on for each size.
        test_split: Split that every run is measured on, once.
        model: Name of the timm model.
        model_kwargs: Its arguments.
        arguments: Further arguments of training that all arms have.
        planned: Names of the arms that the studies have here, if not all of them.
        short_side: The data are first rewritten with images of this shorter side, in pixels, if it is given.
        as_in_use: Measure with statistics calibrated on images as in use too.
    """
    name: str
    title: str
    data: str
    num_images: int
    base_size: int
    batch_size: int
    epochs: int
    warmup: float
    sizes: List[int]
    specialists: List[int]
    paper: Dict[str, Any]
    small: Dict[str, Any]
    smaller: Dict[str, Any]
    calibrate: int
    test_split: str
    model: str
    model_kwargs: Dict[str, Any]
    arguments: Dict[str, Any]
    planned: Sequence[str] = ()
    short_side: Optional[int] = None
    as_in_use: bool = True

    @classmethod
    def read(cls, name: str) -> 'Setting':
        """The setting of a name."""
        with open(HERE / f'{name}.yaml', encoding='utf-8') as file:
            return cls(name=name, **yaml.safe_load(file))

    @classmethod
    def names(cls) -> List[str]:
        """All settings there are."""
        return sorted(path.stem for path in HERE.glob('*.yaml'))

    def regime(self, options: Dict[str, Any], adapt: str) -> Regime:
        """The regime that options of training mean."""
        batch_size = options.get('batch_size', self.batch_size)
        common = {'base_size': self.base_size, 'batch_size': batch_size, 'adapt': adapt,
                  'batch_of': options.get('mixsize_batch_of', 'base')}
        if options['mixsize'] == 'custom':
            return Regime(tuple(options['mixsize_sizes']), tuple(options['mixsize_probs']), **common)
        return Regime.preset(options['mixsize'], **common)

    def gmacs(self, size: int) -> float:
        """Billions of multiply-accumulates of a forward pass of one image."""
        return self._gmacs(size)

    @cached_property
    def _gmacs(self) -> Callable[[int], float]:
        model = timm.create_model(self.model, **self.model_kwargs)
        return lru_cache(None)(lambda size: count_gmacs(model, (3, size, size)))

    def epoch_gmacs(self, regime: Regime, epoch: int = 0) -> float:
        """Those of all images of an epoch of a regime."""
        batches = epoch_batches(regime, self.num_images, epoch=epoch)
        return sum(sum(of_size) * regime.group(size)[1] * self.gmacs(size) for size, of_size in batches.items())

    @property
    def steps_batch_size(self) -> int:
        """Batch at the base size with which B+ of small mean size has the control's in the mean over its steps."""
        return round(self.batch_size**2 / self.regime(self.small, 'b+').mean_batch)

    @property
    def budget(self) -> float:
        """Those of all images of the control."""
        steps = self.num_images // self.batch_size  # timm drops the last batch
        return self.epochs * steps * self.batch_size * self.gmacs(self.base_size)


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        title: What it is called on the page, with its cost where that is not the control's.
        options: Arguments of training besides those of the setting.
        epochs: Number of epochs.
    """
    title: str
    options: Dict[str, Any]
    epochs: int


def planned_arms(setting: Setting) -> Dict[str, Arm]:
    """The arms that are to be run, by name."""
    arms = make_arms(setting)
    return {name: arms[name] for name in setting.planned or arms}


def make_arms(setting: Setting) -> Dict[str, Arm]:
    """All arms that there can be of a setting, by name."""
    return {CONTROL: Arm(f'fixed {setting.base_size} px', OFF, setting.epochs),
            **_mixed(setting), **_cheap(setting), **_specialists(setting), **_parts(setting), **_timms(setting),
            **_beyond(setting)}


def _mixsize(setting: Setting, title: str, options: Dict[str, Any], adapt: str, cost: float = 1., anneal: float = 0.,
             **others: Any) -> Arm:
    """MixSize at a share of the control's cost: to half an epoch, or where that is less than its cost, no more."""
    regime, epochs = setting.regime({**options, **others}, adapt), setting.epochs
    others = {**others, 'mixsize_anneal': anneal} if anneal else others
    for _ in range(2):  # the number of epochs has a say in what an annealed one costs
        exact = cost * setting.budget / _mean_gmacs(setting, replace(regime, anneal=anneal, epochs=epochs))
        epochs = max(1, int(exact) if cost < 1 else round(exact))
    return Arm(title, {**options, 'mixsize_adapt': adapt, **others}, epochs)


def _mean_gmacs(setting: Setting, regime: Regime) -> float:
    """Operations of an epoch as it is planned, the mean over a run."""
    epochs = range(regime.epochs or 1) if regime.anneal else range(1)
    return sum(setting.epoch_gmacs(regime, epoch) for epoch in epochs) / len(epochs)


def _mean_size(setting: Setting, options: Dict[str, Any]) -> str:
    return f'mean {setting.regime(options, "b+").mean_size:.0f} px'


def _mixed(setting: Setting) -> Dict[str, Arm]:
    """The paper's regimes."""
    wide, small = (_mean_size(setting, options) for options in (setting.paper, setting.small))
    return {
        'dplus-equal': _mixsize(setting, f'MixSize D+, {wide}', setting.paper, 'd+'),
        'bplus': _mixsize(setting, f'MixSize B+, {wide}', setting.paper, 'b+'),
        'small-dplus': _mixsize(setting, f'MixSize D+, {small}', setting.small, 'd+'),
        'small-bplus': _mixsize(setting, f'MixSize B+, {small}', setting.small, 'b+'),
    }


def _cheap(setting: Setting) -> Dict[str, Arm]:
    small = _mean_size(setting, setting.small)
    return {
        'small-bplus-cheap': _mixsize(setting, f'MixSize B+, {small}, {CHEAP} of the cost', setting.small, 'b+', CHEAP),
        'small-bplus-anneal-steps-cheap': _mixsize(setting, f'{_annealed(setting)}, {CHEAP} of the cost', setting.small,
                                                   'b+', CHEAP, anneal=1., batch_size=setting.steps_batch_size),
        'half-bplus-cheap': _mixsize(setting, f'MixSize a123, {CHEAP} of the cost', _half(setting), 'b+', CHEAP,
                                     anneal=1.),
        'fixed-cheap': Arm(f'fixed {setting.base_size} px, {CHEAP} of the cost', OFF,
                           max(1, int(CHEAP * setting.epochs))),
    }


def _specialists(setting: Setting) -> Dict[str, Arm]:
    """Fixed sizes at equal cost: as many more epochs as an image takes fewer operations."""
    arms = {}
    for size in setting.specialists:
        epochs = round(setting.epochs * setting.gmacs(setting.base_size) / setting.gmacs(size))
        arms[f'specialist-{size}'] = Arm(f'fixed {size} px', {**OFF, 'img_size': size}, max(1, epochs))
    return arms


def _parts(setting: Setting) -> Dict[str, Arm]:
    """The cheap B+ of small mean size with one thing changed."""
    regime = setting.regime(setting.small, 'b+')
    over_steps = {'mixsize': 'custom', 'mixsize_sizes': list(regime.sizes),
                  'mixsize_probs': [p * regime.group(size)[0] for size, p in zip(regime.sizes, regime.probs)]}
    drop = {'drop': 0.2, 'drop_path': 0.1}

    def part(words: str, options: Dict[str, Any] = setting.small, **others: Any) -> Arm:
        title = f'MixSize B+, {_mean_size(setting, setting.small)}, {words}, {CHEAP} of the cost'
        return _mixsize(setting, title, options, 'b+', CHEAP, **others)

    return {
        'cheap-rough': part('no smoothing', grad_smoothing=False),
        'cheap-over-steps': part('shares of steps', over_steps),
        'cheap-drop': part('dropout', **drop),
        'cheap-drop-reg': part('dropout by size', mixsize_reg=1.0, **drop),
    }


def _beyond(setting: Setting) -> Dict[str, Arm]:
    """Small images early and large ones late; so, and one size, in as small a batch; most images at half the size."""
    batch_size = setting.steps_batch_size
    images = setting.num_images // batch_size * batch_size  # fewer are dropped
    small, smaller = (_mean_size(setting, options) for options in (setting.small, setting.smaller))
    return {
        'small-bplus-anneal': _mixsize(setting, f'MixSize B+, {small}, annealed', setting.small, 'b+', anneal=1.),
        'small-bplus-anneal-steps': _mixsize(setting, _annealed(setting), setting.small, 'b+', anneal=1.,
                                             batch_size=batch_size),
        'fixed-steps': Arm(f'fixed {setting.base_size} px, batch of {batch_size}', {**OFF, 'batch_size': batch_size},
                           round(setting.budget / (images * setting.gmacs(setting.base_size)))),
        'smaller-bplus': _mixsize(setting, f'MixSize B+, {smaller}', setting.smaller, 'b+'),
        'half-bplus': _mixsize(setting, 'MixSize a123', _half(setting), 'b+', anneal=1.),
        'half-bplus-rough': _mixsize(setting, 'MixSize a123, no smoothing', _half(setting), 'b+', anneal=1.,
                                     grad_smoothing=False),
        'half-bplus-even': _mixsize(setting, 'MixSize a123, not annealed', _half(setting), 'b+'),
    }


def _annealed(setting: Setting) -> str:
    """The preset a144, or on CIFAR-10 what is made after it."""
    if setting.small['mixsize'] == 's144':
        return 'MixSize a144'
    return f'MixSize B+, {_mean_size(setting, setting.small)}, annealed, mean batch of {setting.batch_size}'


def _half(setting: Setting) -> Dict[str, Any]:
    """The preset a123: nine images of ten at half the base size, one at all of it, the mean batch the control's."""
    return {'mixsize': 'custom', 'mixsize_sizes': [setting.base_size // 2, setting.base_size],
            'mixsize_probs': [0.9, 0.1], 'mixsize_batch_of': 'mean'}


def _timms(setting: Setting) -> Dict[str, Arm]:
    """timm's scheduled sizes, the batch of each as B+ has it, at equal cost."""
    return {
        'timm': _timm(setting, 'timm, scheduled sizes'),
        'timm-progressive': _timm(setting, 'timm, progressive sizes', progressive=True),
        'timm-steps': _timm(setting, f'timm, scheduled sizes, mean batch of {setting.batch_size}',
                            batch_size=setting.steps_batch_size),
        'timm-half': _timm(setting, 'timm, scheduled sizes, a123\'s images', _half(setting)),
    }


def _timm(setting: Setting, title: str, options: Optional[Dict[str, Any]] = None, progressive: bool = False,
          **others: Any) -> Arm:
    """The paper's sizes and shares as timm takes them, of the steps; or those of a regime, and its images at each."""
    regime = setting.regime({**(options or setting.paper), **others}, 'b+')
    batches = [regime.group(size)[0] for size in regime.sizes]
    of_images = [share / batch for share, batch in zip(regime.probs, batches)]
    shares = [round(share / sum(of_images), 4) for share in of_images] if options else list(regime.probs)
    if progressive:  # in the mean at all sizes alike
        shares = [1 / len(batches)] * len(batches)
    step = sum(share * batch * setting.gmacs(size) for share, batch, size in zip(shares, batches, regime.sizes))
    schedule = {'train_size_schedule': 'progressive'} if progressive else {'train_size_probs': shares}
    return Arm(title, {
        'mixsize': 'off', 'grad_smoothing': False, 'train_img_sizes': list(regime.sizes), 'train_batch_sizes': batches,
        **schedule, 'train_batches_per_epoch': round(setting.budget / setting.epochs / step), **others},
        setting.epochs)
