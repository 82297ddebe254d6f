"""What is trained: the settings of a data set and a machine, and the arms that are compared under them.

An arm is a way to train. All arms of a setting have its model, data, augmentation, optimizer and schedule; they differ
in the options named here and in the number of epochs, which follows from the cost that an arm is to have.
"""
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Optional

import yaml

from mixsize_timm.regime import Regime
from mixsize_timm.sampler import plan_epoch

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
        sizes: Image sizes that every run is measured at.
        specialists: Sizes besides the base size that a fixed-size model is trained at.
        paper: Options of the paper's regime of a mean size near the base size.
        small: Options of the paper's regime of a small mean size.
        calibrate: Batches that batch norm is calibrated on for each size.
        test_split: Split that every run is measured on, once.
        arguments: Arguments of training that all arms have.
    """
    name: str
    title: str
    data: str
    num_images: int
    base_size: int
    batch_size: int
    epochs: int
    sizes: List[int]
    specialists: List[int]
    paper: Dict[str, Any]
    small: Dict[str, Any]
    calibrate: int
    test_split: str
    arguments: Dict[str, Any]

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
        common = {'base_size': self.base_size, 'batch_size': self.batch_size, 'adapt': adapt}
        if options['mixsize'] == 'custom':
            return Regime(tuple(options['mixsize_sizes']), tuple(options['mixsize_probs']), **common)
        return Regime.preset(options['mixsize'], **common)


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        title: What it is called on the page.
        options: Arguments of training besides those of the setting.
        epochs: Number of epochs.
    """
    title: str
    options: Dict[str, Any]
    epochs: int


def make_arms(setting: Setting) -> Dict[str, Arm]:
    """The arms of a setting by name. A cost is in pixels trained, over those of the control."""
    return {CONTROL: Arm(f'fixed {setting.base_size} px', OFF, setting.epochs),
            **_mixed(setting), **_cheap(setting), **_specialists(setting), **_parts(setting), **_timms(setting),
            **_annealed(setting)}


def _mixsize(setting: Setting, title: str, options: Dict[str, Any], adapt: str, cost: Optional[float] = None,
             anneal: float = 0., **others: Any) -> Arm:
    """MixSize for as many epochs as the control, or at a cost."""
    regime, epochs = setting.regime(options, adapt), setting.epochs
    others = {**others, 'mixsize_anneal': anneal} if anneal else others
    if cost is not None:
        budget = cost * setting.epochs * setting.num_images * setting.base_size**2
        epochs = max(1, round(budget / _pixels(setting, regime)))
        epochs = max(1, round(budget / _pixels(setting, replace(regime, anneal=anneal, epochs=epochs))))
    return Arm(title, {**options, 'mixsize_adapt': adapt, **others}, epochs)


def _pixels(setting: Setting, regime: Regime) -> float:
    """Pixels of an epoch as it is planned, the mean over a run."""
    plans = [plan_epoch(regime, setting.num_images, epoch=epoch) for epoch in range(regime.epochs or 1)]
    return sum(int((plan.size**2 * plan.batch * plan.duplicates).sum()) for plan in plans) / len(plans)


def _mixed(setting: Setting) -> Dict[str, Arm]:
    paper, small = setting.paper, setting.small
    return {
        'dplus': _mixsize(setting, 'MixSize D+, as many epochs', paper, 'd+'),
        'dplus-equal': _mixsize(setting, 'MixSize D+, equal cost', paper, 'd+', 1),
        'bplus': _mixsize(setting, 'MixSize B+, equal cost', paper, 'b+', 1),
        'small-dplus': _mixsize(setting, 'MixSize D+ of small mean size, equal cost', small, 'd+', 1),
        'small-bplus': _mixsize(setting, 'MixSize B+ of small mean size, equal cost', small, 'b+', 1),
    }


def _cheap(setting: Setting) -> Dict[str, Arm]:
    return {
        'small-bplus-cheap': _mixsize(setting, f'MixSize B+ of small mean size, {CHEAP} of the cost', setting.small,
                                      'b+', CHEAP),
        'fixed-cheap': Arm(f'fixed {setting.base_size} px, {CHEAP} of the cost', OFF,
                           max(1, round(CHEAP * setting.epochs))),
    }


def _specialists(setting: Setting) -> Dict[str, Arm]:
    """Fixed sizes at equal cost: as many more epochs as the pixels of an image are fewer."""
    arms = {}
    for size in setting.specialists:
        scale = (setting.base_size / size) ** 2
        arms[f'specialist-{size}'] = Arm(
            f'fixed {size} px, equal cost', {**OFF, 'img_size': size}, max(1, round(scale * setting.epochs)))
    return arms


def _parts(setting: Setting) -> Dict[str, Arm]:
    regime = setting.regime(setting.paper, 'b+')
    over_steps = {'mixsize': 'custom', 'mixsize_sizes': list(regime.sizes),
                  'mixsize_probs': [p * regime.group(size)[0] for size, p in zip(regime.sizes, regime.probs)]}
    drop = {'drop': 0.2, 'drop_path': 0.1}
    return {
        'dplus-rough': _mixsize(setting, 'MixSize D+ without smoothing', setting.paper, 'd+', grad_smoothing=False),
        'bplus-rough': _mixsize(setting, 'MixSize B+ without smoothing', setting.paper, 'b+', 1, grad_smoothing=False),
        'bplus-over-steps': _mixsize(setting, 'MixSize B+, shares of the steps', over_steps, 'b+', 1),
        'dplus-drop': _mixsize(setting, 'MixSize D+ with dropout', setting.paper, 'd+', **drop),
        'dplus-drop-reg': _mixsize(setting, 'MixSize D+ with dropout by size', setting.paper, 'd+', mixsize_reg=1.0,
                                   **drop),
    }


def _annealed(setting: Setting) -> Dict[str, Arm]:
    """Small images early and large ones late, at the cost of the control."""
    paper, small = setting.paper, setting.small
    return {
        'dplus-equal-anneal': _mixsize(setting, 'MixSize D+, annealed, equal cost', paper, 'd+', 1, anneal=1.),
        'bplus-anneal': _mixsize(setting, 'MixSize B+, annealed, equal cost', paper, 'b+', 1, anneal=1.),
        'small-bplus-anneal': _mixsize(setting, 'MixSize B+ of small mean size, annealed, equal cost', small, 'b+', 1,
                                       anneal=1.),
    }


def _timms(setting: Setting) -> Dict[str, Arm]:
    """timm's scheduled sizes, the batch of each as B+ has it: a step costs one of the control's."""
    regime = setting.regime(setting.paper, 'b+')
    sizes = {'mixsize': 'off', 'grad_smoothing': False, 'train_img_sizes': list(regime.sizes),
             'train_batch_sizes': [regime.group(size)[0] for size in regime.sizes],
             'train_batches_per_epoch': setting.num_images // setting.batch_size}
    return {
        'timm': Arm('timm, scheduled sizes', {**sizes, 'train_size_probs': list(regime.probs)}, setting.epochs),
        'timm-progressive': Arm('timm, progressive sizes', {**sizes, 'train_size_schedule': 'progressive'},
                                setting.epochs),
    }
