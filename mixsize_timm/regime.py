"""The MixSize regime: which sizes, how often, and what a small image's savings are spent on.

Source: Hoffer et al., "MixSize: Training Convnets With Mixed Image Sizes" (arXiv 1908.08986), and the
authors' reference code.
Nothing here needs torch.
"""
import copy
import math
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any, Mapping, Optional, Sequence, Tuple

ADAPT_MODES = ('b+', 'd+', 'bd+', 'none')
BATCHES = ('base', 'mean')
DROP_RULES = ('tail', 'reference')

# Preset -> [(size relative to the base size S0, probability)]. The two ImageNet presets step by S0 // 7.
_IMAGENET_PRESETS = {
    's224': {-3: 0.8 / 6, -2: 0.8 / 6, -1: 0.8 / 6, 0: 0.2, 1: 0.8 / 6, 2: 0.8 / 6, 3: 0.8 / 6},
    's144': {-4: 0.2, -3: 0.6, 0: 0.1, 1: 0.1},
}
# Preset -> {size over the base size S0: probability}
_SHARE_PRESETS = {
    'cifar': {Fraction(1, 2): 0.2, Fraction(3, 4): 0.3, Fraction(1): 0.3, Fraction(3, 2): 0.2},
    'a123': {Fraction(1, 2): 0.9, Fraction(1): 0.1},
}
PRESETS = (*_IMAGENET_PRESETS, 'cifar', 'a144', 'a123')
# What a preset takes for arguments that are not given. These are ours: docs/results.md, study 6.
PRESET_OPTIONS: Mapping[str, Mapping[str, Any]] = dict.fromkeys(
    ('a144', 'a123'), {'adapt': 'b+', 'anneal': 1., 'batch_of': 'mean'})

SIZE_MULTIPLE = 8  # preset sizes other than the base size are rounded to it


@dataclass(frozen=True)
class Regime:
    """Square image sizes with probabilities, and the batch and duplicates that go with each size.

    A probability is the share of an epoch's *images* that is trained at the size, not the share of its steps.
    Sizes are kept in ascending order; probabilities are normalised to a sum of one and sizes of probability zero
    are left out.

    Args:
        sizes: Image sizes in pixels, positive and without repeats.
        probs: One non-negative weight for each size. Uniform when not given.
        base_size: The size ``S0`` in pixels that ``batch_size`` and ``duplicates`` are stated for.
        batch_size: Distinct images per device in a step at the base size, ``B0``, or as ``batch_of`` says.
        duplicates: Augmented copies of each image at the base size, ``D0``.
        adapt: What changes with the size: ``b+`` the batch, ``d+`` the duplicates, ``bd+`` both, ``none`` neither.
        max_work: Lower a size's batch where its step would cost more than this many base steps.
        batch_multiple: Round every batch to a multiple of this.
        anneal: How far shares move over the run from small sizes to large ones, -1 to 1; at 1 the size farthest from
            the mean has none at one end of the run and twice its probability at the other. Over the run every size
            keeps its probability, so the cost of a run stays as it is. Below 0 they move from large to small.
        epochs: Epochs of the run, which annealing needs.
        batch_of: ``base``, or ``mean``: ``batch_size`` is the mean over the steps of a run, as near as a whole
            :attr:`base_batch` comes. Where few images are large B+ then takes as many steps an epoch as one size does.

    Raises:
        ValueError: An argument is out of range, or a size's batch rounds to zero.
    """
    sizes: Tuple[int, ...]
    probs: Tuple[float, ...] = ()
    base_size: int = 224
    batch_size: int = 64
    duplicates: int = 1
    adapt: str = 'd+'
    max_work: Optional[float] = None
    batch_multiple: int = 1
    anneal: float = 0.
    epochs: Optional[int] = None
    batch_of: str = 'base'
    _base_batch: int = field(init=False, repr=False, compare=False, default=0)
    _groups: Mapping[int, Tuple[int, int]] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        _check_positive(base_size=self.base_size, batch_size=self.batch_size, duplicates=self.duplicates,
                        batch_multiple=self.batch_multiple)
        if self.adapt not in ADAPT_MODES:
            raise ValueError(f'adapt must be one of {", ".join(ADAPT_MODES)}, not {self.adapt!r}')
        if self.max_work is not None and not self.max_work > 0:
            raise ValueError(f'max_work must be positive, not {self.max_work}')
        if not -1 <= self.anneal <= 1:
            raise ValueError(f'anneal must be from -1 to 1, not {self.anneal}')
        if self.anneal and (self.epochs is None or self.epochs < 1):
            raise ValueError('annealing needs the number of epochs')
        if self.batch_of not in BATCHES:
            raise ValueError(f'batch_of must be one of {", ".join(BATCHES)}, not {self.batch_of!r}')
        sizes, probs = _normalise(self.sizes, self.probs)
        object.__setattr__(self, 'sizes', sizes)
        object.__setattr__(self, 'probs', probs)
        object.__setattr__(self, '_base_batch', self._find_base_batch())
        object.__setattr__(self, '_groups', {size: self._adapt(size) for size in sizes})

    @classmethod
    def preset(cls, name: str, base_size: int = 224, **kwargs: Any) -> 'Regime':
        """A regime of the paper, or ours, scaled to a base size.

        Args:
            name: ``s224`` (mean size equal to the base size), ``s144`` (mean 144 for a base of 224) or ``cifar``, of
                the paper; ours are ``a144``, which is ``s144``, and ``a123``, nine images of ten at half the base
                size and one at all of it: by B+, annealed, and ``batch_size`` the mean over the steps, each of them
                if nothing else is said.
            base_size: Base size ``S0`` in pixels.
            **kwargs: The other arguments of :class:`Regime`.

        Raises:
            ValueError: The preset is unknown, or the base size too small for it.
        """
        kwargs = {**PRESET_OPTIONS.get(name, {}), **kwargs}
        if name == 'a144':
            return cls.preset('s144', base_size, **kwargs)
        if name in _IMAGENET_PRESETS:
            increment = base_size // 7
            weighted = {base_size + k * increment: p for k, p in _IMAGENET_PRESETS[name].items()}
        elif name in _SHARE_PRESETS:
            weighted = {round(base_size * r): p for r, p in _SHARE_PRESETS[name].items()}
        else:
            raise ValueError(f'unknown preset {name!r}, expected one of {", ".join(PRESETS)}')
        merged = merge_sizes({size: size if size == base_size else _round_size(size) for size in weighted}, weighted)
        return cls(tuple(merged), tuple(merged.values()), base_size=base_size, **kwargs)

    @classmethod
    def fixed(cls, size: int, **kwargs: Any) -> 'Regime':
        """A regime of the one size, which is its base size."""
        return cls((size,), (1.0,), base_size=size, **kwargs)

    def group(self, size: int) -> Tuple[int, int]:
        """Distinct images per device and duplicates of each in a step at ``size``: ``(B, D)``."""
        return self._groups[size]

    def relative_work(self, size: int) -> float:
        """Pixels of one step at ``size`` over those of ``batch_size`` images of the base size."""
        batch, duplicates = self.group(size)
        return size**2 * batch * duplicates / (self.base_size**2 * self.batch_size * self.duplicates)

    @property
    def base_batch(self) -> int:
        """Distinct images per device in a step at the base size: ``batch_size``, or what makes that the mean."""
        return self._base_batch

    @property
    def peak_work(self) -> float:
        """The largest relative work of any size: what decides the memory a run needs."""
        return max(self.relative_work(size) for size in self.sizes)

    @property
    def mean_size(self) -> float:
        """Mean image size in pixels, over the images of an epoch."""
        return sum(p * size for size, p in zip(self.sizes, self.probs))

    @property
    def mean_batch(self) -> float:
        """Mean number of distinct images per device in a step, over the steps of an epoch."""
        return 1 / sum(p / self.group(size)[0] for size, p in zip(self.sizes, self.probs))

    @property
    def relative_cost(self) -> float:
        """Pixels of one epoch over those of an epoch at the base size without duplicates."""
        return sum(p * size**2 * self.group(size)[1] for size, p in zip(self.sizes, self.probs)) / self.base_size**2

    def with_sizes(self, moved: Mapping[int, int]) -> 'Regime':
        """The same regime with sizes moved (old size -> new size); sizes that meet merge their probabilities."""
        merged = merge_sizes(moved, dict(zip(self.sizes, self.probs)))
        return replace(self, sizes=tuple(merged), probs=tuple(merged.values()))

    def at(self, epoch: int) -> 'Regime':
        """The regime of one epoch: of an annealed one with the shares of then, in which a size may be missing."""
        if not self.anneal:
            return self
        time = min(epoch / (self.epochs - 1), 1.) if self.epochs and self.epochs > 1 else 0.5
        # from the mean, so that the shares of an epoch have a sum of one; of logarithms, for sizes are ratios
        mean = sum(p * math.log(size) for size, p in zip(self.sizes, self.probs))
        distance = [math.log(size) - mean for size in self.sizes]
        farthest = max(map(abs, distance)) or 1.
        probs = tuple(max(0., p * (1 + self.anneal * (2 * time - 1) * d / farthest))
                      for p, d in zip(self.probs, distance))
        sizes, probs = _normalise(self.sizes, probs)
        regime = copy.copy(self)  # its batches stay those of the run
        for name, value in dict(sizes=sizes, probs=probs, anneal=0., epochs=None).items():
            object.__setattr__(regime, name, value)
        return regime

    def to_dict(self) -> dict:
        """The arguments that make this regime, as plain values for YAML or JSON."""
        values = {k: v for k, v in asdict(self).items() if not k.startswith('_')}
        return {**values, 'sizes': list(self.sizes), 'probs': list(self.probs)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> 'Regime':
        """The regime that :meth:`to_dict` came from."""
        return cls(**{**values, 'sizes': tuple(values['sizes']), 'probs': tuple(values['probs'])})

    def _shape(self, size: int, base_batch: Fraction) -> Tuple[Fraction, int]:
        """Batch, not rounded, and duplicates at a size; fractions, so that a half is a half (half to even)."""
        side = Fraction(self.base_size, size)
        batch, duplicates = base_batch, self.duplicates
        if self.adapt == 'b+' or (self.adapt == 'd+' and side**2 * duplicates < Fraction(1, 2)):
            batch *= side**2
        elif self.adapt == 'd+':
            duplicates = max(1, round(side**2 * duplicates))
        elif self.adapt == 'bd+':
            batch *= side
            duplicates = max(1, round(side * duplicates))
        return batch, duplicates

    def _find_base_batch(self) -> int:
        if self.batch_of == 'base':
            return self.batch_size
        mean = 1 / sum(p / self._shape(size, Fraction(1))[0] for size, p in zip(self.sizes, self.probs))
        return max(1, round(self.batch_size / mean))

    def _adapt(self, size: int) -> Tuple[int, int]:
        """Batch and duplicates at a size."""
        batch, duplicates = self._shape(size, Fraction(self.base_batch))
        rounded = round(batch / self.batch_multiple) * self.batch_multiple
        if self.max_work is not None:
            budget = self.max_work * self.base_size**2 * self.batch_size * self.duplicates
            affordable = math.floor(budget / (size**2 * duplicates) / self.batch_multiple) * self.batch_multiple
            rounded = min(rounded, affordable)
        if rounded < 1:
            raise ValueError(f'a batch of {self.base_batch} at {self.base_size} px rounds to zero at {size} px: '
                             'raise the batch size or leave the size out')
        return rounded, duplicates


def merge_sizes(moved: Mapping[int, int], probs: Mapping[int, float]) -> dict:
    """Probabilities by new size, ascending, where ``moved`` maps old sizes to new ones."""
    merged: dict = {}
    for size, prob in probs.items():
        new = moved.get(size, size)
        merged[new] = merged.get(new, 0.0) + prob
    return dict(sorted(merged.items()))


def _round_size(size: int) -> int:
    return max(SIZE_MULTIPLE, round(Fraction(size, SIZE_MULTIPLE)) * SIZE_MULTIPLE)


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value != int(value) or value < 1:
            raise ValueError(f'{name} must be a whole number of at least 1, not {value}')


def _normalise(sizes: Sequence[int], probs: Sequence[float]) -> Tuple[Tuple[int, ...], Tuple[float, ...]]:
    if not sizes:
        raise ValueError('a regime needs at least one size')
    for size in sizes:
        _check_positive(size=size)
    if len(set(sizes)) != len(sizes):
        raise ValueError(f'a size stands twice in {" ".join(map(str, sizes))}')
    probs = tuple(probs) or (1.0,) * len(sizes)
    if len(probs) != len(sizes):
        raise ValueError(f'{len(sizes)} sizes but {len(probs)} probabilities: give one for each size')
    if any(not math.isfinite(p) or p < 0 for p in probs):
        raise ValueError(f'probabilities must be finite and not negative: {" ".join(map(str, probs))}')
    total = math.fsum(probs)
    if not total > 0:
        raise ValueError('all probabilities are zero')
    used = sorted((int(size), p / total) for size, p in zip(sizes, probs) if p > 0)
    return tuple(size for size, _ in used), tuple(p for _, p in used)
