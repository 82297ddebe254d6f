"""What several test files share: small image folders, and clean random states."""
import io
import os
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from mixsize_timm import measure
from mixsize_timm.checkpoint import take_snapshot, write_snapshot
from mixsize_timm.sizes import SizeProbe

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background without it
os.environ.setdefault('OMP_NUM_THREADS', '1')  # for processes: models are tiny, and their threads wait for each other
torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5  # s that torch waits for each worker of a loader that failed

LONGEST = ('test_arguments', 'test_processes', 'test_train', 'test_export', 'test_launch', 'test_hub', 'test_recipes',
           'test_kill')


def pytest_collection_modifyitems(items):
    """The files that take longest first: one of them begun last would leave the other processes of xdist idle."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)  # it is shared by all accelerators of a process
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def structure(model):
    """What a pass without arithmetic depends on, as text: kinds, settings and shapes of the parts of a model."""
    parts = [(name, type(part), {key: value for key, value in vars(part).items() if key != 'training' and isinstance(
        value, (bool, int, float, str, tuple, type(None)))}) for name, part in model.named_modules()]
    return f'{parts} {[(name, *tensor.shape) for name, tensor in model.state_dict().items()]}'


COUNTED, TAKEN = {}, {}
ASKED_EACH_TIME = ('test_measure', 'test_sizes', 'test_planner')  # whose subject it is


@pytest.fixture(scope='module', autouse=True)
def models_are_asked_once(request):
    """Runs of the tests train the same few models: which sizes they take, and their operations, are asked once."""
    count, take = measure.count_gmacs, SizeProbe.__call__

    def counting(model, input_size=(3, 224, 224)):
        key = structure(model), input_size
        if key not in COUNTED:
            COUNTED[key] = count(model, input_size)
        return COUNTED[key]

    def taking(probe, size):
        probe.structure = getattr(probe, 'structure', None) or structure(probe.model)
        key = probe.structure, probe.in_chans, probe.device, size
        if key not in TAKEN:
            TAKEN[key] = '' if take(probe, size) else probe.reason
        probe.reason = TAKEN[key] or probe.reason
        return not TAKEN[key]

    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ not in ASKED_EACH_TIME:
            patch.setattr(measure, 'count_gmacs', counting)
            patch.setattr(SizeProbe, '__call__', taking)
        yield


def write_images(folder, count, size=(40, 30), seed=0):
    """``count`` JPEGs of coloured noise in a folder that is made."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'{i:03d}.jpg')


def smooth(width=150, height=101, mode='RGB'):
    """A picture without noise, of which a smaller one tells as much."""
    y, x = np.mgrid[:height, :width]
    channels = [128 + 100 * np.sin(x / 17), 128 + 100 * np.cos(y / 13), (x + y) % 251]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8)).convert(mode)


def encoded(image, kind='JPEG', **options):
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


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


def copy_run(run, folder):
    """A copy of a run's folder in which checkpoints share files as they do there: what damages one damages both."""
    copies = {}

    def copy(source, target):
        file = os.stat(source).st_ino
        if file in copies:
            os.link(copies[file], target)
        else:
            copies[file] = shutil.copy2(source, target)

    return shutil.copytree(run, folder, copy_function=copy)


def save_checkpoint(folder, model, state=None, ema=None, position=(0, 0)):
    """Write a checkpoint as a run does."""
    write_snapshot(str(folder), take_snapshot(model, state, ema, position, position[0] * 100 + position[1]))
