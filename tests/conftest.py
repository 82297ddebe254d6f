"""What several test files share: small image folders, and clean random states."""
import random

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from mixsize_timm.checkpoint import take_snapshot, write_snapshot


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)  # it is shared by all accelerators of a process
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def write_images(folder, count, size=(40, 30), seed=0):
    """``count`` JPEGs of coloured noise in a folder that is made."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'{i:03d}.jpg')


def write_image_folder(folder):
    """An image folder as timm reads it: ``train`` and ``validation``, two classes each."""
    for split, count in (('train', 12), ('validation', 4)):
        for number, name in enumerate(('cat', 'dog')):
            write_images(folder / split / name, count, seed=number)
    return folder


@pytest.fixture
def image_folder(tmp_path):
    """One for each test."""
    return write_image_folder(tmp_path / 'data')


def save_checkpoint(folder, model, state=None, ema=None, position=(0, 0)):
    """Write a checkpoint as a run does."""
    write_snapshot(str(folder), take_snapshot(model, state, ema, position, position[0] * 100 + position[1]))
