"""The random generators of a process: kept, restored, and seeded by what is drawn for."""
import random
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Optional

import numpy as np
import torch


def random_state() -> Dict[str, Any]:
    """State of the generators of Python, NumPy and torch on the CPU and the current CUDA device."""
    version, keys, gauss = random.getstate()
    name, words, *rest = np.random.get_state()
    state = {'python': (version, list(keys), gauss),
             'numpy': (name, torch.from_numpy(np.asarray(words).astype(np.int64)), *rest),
             'torch': torch.get_rng_state()}
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Dict[str, Any]) -> None:
    """Restore what :func:`random_state` gave."""
    version, keys, gauss = state['python']
    random.setstate((version, tuple(keys), gauss))
    name, words, *rest = state['numpy']
    np.random.set_state((name, words.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'])
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])


def seed_for(*key: int) -> int:
    """Seed the three generators of the CPU that timm's and torchvision's transforms draw from.

    ``torch.manual_seed`` would take a hundred times as long: it visits every device.

    Args:
        *key: What is drawn for, as integers. Neighbouring keys give unlike streams.

    Returns:
        The seed, for a device's generator.
    """
    state = 0x9E3779B97F4A7C15
    for part in key:  # the mixing step of SplitMix64
        state = (state ^ part) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    random.seed(state)
    np.random.seed(state >> 32)
    torch.default_generator.manual_seed(state)
    return state


@contextmanager
def own_randomness(*key: int, device: Optional[torch.device] = None) -> Iterator[None]:
    """Leave the random state as it was; within, draw from a stream of its own.

    Args:
        *key: Seeds the stream as :func:`seed_for` does; without one the stream goes on from the state as it is.
        device: A CUDA device that is drawn from too.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device is not None and device.type == 'cuda' else None
    try:
        if key:
            seed = seed_for(*key)
            if cuda is not None:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if device is not None and cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
