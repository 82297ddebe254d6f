"""Data workers that die, hang or fail: said at once, with the cause, and no process is left behind."""
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from PIL import Image

from mixsize_timm.data import create_loader
from mixsize_timm.regime import Regime
from mixsize_timm.workers import Heartbeats, WorkerError

BATCH = 4


class Images(torch.utils.data.Dataset):
    """Small images; ``act`` is called for each one that is read."""

    def __init__(self, act=lambda index: None):
        self.act = act
        self.transform = None
        self.samples = [(f'folder/{index}.png', 0) for index in range(32)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        self.act(index)
        return Image.new('RGB', (16, 16)), 0


def loader_of(act, **kwargs):
    options = dict(is_training=True, num_workers=1, device=torch.device('cpu'), persistent_workers=False)
    return create_loader(Images(act), (3, 16, 16), BATCH, regime=Regime.fixed(16, batch_size=BATCH),
                         **{**options, **kwargs})


OTHERS = set()  # processes that were there before a test, such as a tracker's


@pytest.fixture(autouse=True)
def others():
    OTHERS.clear()
    OTHERS.update(psutil.Process().children(recursive=True))


def children():
    gc.collect()
    return [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE
            and child not in OTHERS and 'resource_tracker' not in ' '.join(child.cmdline())]


def failure(loader):
    with pytest.raises(WorkerError) as error:
        sum(1 for _ in loader)
    assert '\n' not in str(error.value) and error.value.__cause__ is not None
    return str(error.value)


def kill(number):
    return lambda index: os.kill(os.getpid(), number) if index == 9 else None


def leave(code):
    return lambda index: os._exit(code) if index == 9 else None


@pytest.mark.parametrize('act, said', [
    (kill(signal.SIGKILL), 'data worker 0 was killed by SIGKILL at image folder/9.png: most likely the machine ran'),
    (kill(signal.SIGBUS), 'data worker 0 was killed by SIGBUS at image folder/9.png: most likely shared memory is'),
    (kill(signal.SIGSEGV), 'data worker 0 was killed by SIGSEGV at image folder/9.png: a library crashed'),
    (leave(3), 'data worker 0 ended with exit code 3 at image folder/9.png'),
], ids=['SIGKILL', 'SIGBUS', 'SIGSEGV', 'exit code'])
def test_a_worker_that_dies_is_named_with_its_end_and_its_image(act, said):
    assert failure(loader_of(act)).startswith(said)
    assert not children()


@pytest.mark.parametrize('library', [False, True])
def test_a_worker_outlives_a_signal_to_all_processes_of_a_run_and_ends_when_it_is_not_needed(library):
    threads = []

    def act(index):
        if library and not threads:  # as those that a library starts with a process: signals may come to it
            threads.append(threading.Thread(target=listen, daemon=True))
            threads[0].start()
        time.sleep(0.01)

    def listen():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        time.sleep(600)

    loader = loader_of(act)
    iterator = iter(loader)
    next(iterator)
    worker = children()[0]
    for name in ('TERM', 'USR1', 'HUP', 'INT'):
        subprocess.run(['kill', f'-{name}', str(worker.pid)], check=True)  # not by the worker's parent
    assert sum(1 for _ in iterator) == 7
    del iterator
    assert not children()


def test_a_worker_that_dies_while_the_caller_is_busy_is_explained_too():
    loader = loader_of(lambda index: None, persistent_workers=True)
    with pytest.raises(RuntimeError):
        for _ in loader:
            os.kill(children()[0].pid, signal.SIGKILL)
            time.sleep(5)  # torch's handler of SIGCHLD raises here
    assert 'data worker 0 was killed by SIGKILL' in str(loader.worker_error)
    assert loader_of(None).worker_error is None


@pytest.mark.parametrize('persistent', [False, True])
def test_a_worker_that_hangs_is_killed_and_its_image_named(persistent):
    loader = loader_of(lambda index: time.sleep(600) if index == 9 else None, num_workers=2, worker_timeout=0.5,
                       persistent_workers=persistent)
    said = failure(loader)
    assert said.startswith('data worker ') and 'hung at image folder/9.png for more than 0.5 seconds' in said
    assert not children()


def test_a_worker_that_hangs_is_found_at_the_start_of_the_next_epoch_too():
    loader = loader_of(lambda index: time.sleep(600) if index == 9 else None, worker_timeout=0.5,
                       persistent_workers=True)
    order = [index for group in loader.batch_sampler.plan.groups() for index in group.images.tolist()]
    assert order.index(9) >= BATCH, 'the first batch can be read'
    iterator = iter(loader)
    del iterator
    next(iter(loader.loader.loader))  # left with the workers at the next batches
    if order.index(9) < 3 * BATCH:
        assert 'hung at image folder/9.png' in failure(loader)


@pytest.mark.parametrize('timeout', [0.4, 0])
def test_a_slow_worker_is_waited_for_however_long_its_batch_takes(timeout):
    loader = loader_of(lambda index: time.sleep(0.15), worker_timeout=timeout)  # 0.6 s a batch
    assert sum(1 for _, (images, _) in zip(range(3), loader)) == 3
    assert loader.worker_error is None


class Failing:
    def __call__(self, image, box):
        raise ValueError('no such\ncolour')


@pytest.mark.parametrize('persistent', [False, True])
def test_an_error_in_a_transform_is_one_line_and_keeps_its_cause(persistent):
    loader = loader_of(lambda index: None, persistent_workers=persistent)
    loader.dataset.maker.transforms[16] = Failing()
    first = int(next(loader.batch_sampler.plan.groups()).images[0])
    assert failure(loader) == f'data worker 0 failed at image folder/{first}.png: ValueError: no such colour'
    loader = loader_of(lambda index: None, num_workers=0)
    loader.dataset.maker.transforms[16] = Failing()
    with pytest.raises(ValueError, match='no such\ncolour'):
        next(iter(loader))


@pytest.mark.parametrize('persistent', [False, True])
def test_an_iteration_that_is_left_early_leaves_no_process(persistent):
    loader = loader_of(lambda index: None, num_workers=2, persistent_workers=persistent)
    for _ in loader:
        break
    assert len(children()) == (2 if persistent else 0)
    assert sum(1 for _ in loader) == 8 and loader.worker_error is None
    del loader
    _, alive = psutil.wait_procs(children(), timeout=10)  # one that was told to end may take a moment
    assert not alive


ORPHAN = '''
import sys, time
sys.path.insert(0, sys.argv[1])
from test_workers import children, loader_of
loaders = [loader_of(lambda index, seconds=seconds: time.sleep(seconds), num_workers=2) for seconds in (0, 0.3)]
iterators = [iter(loader) for loader in loaders]
for iterator in iterators:
    next(iterator)
print(*[child.pid for child in children()], flush=True)
time.sleep(600)
'''


def test_workers_end_by_themselves_when_the_main_process_is_killed():
    """Those of two loaders: idle ones, and others that are busy."""
    main = subprocess.Popen([sys.executable, '-c', ORPHAN, os.path.dirname(__file__)], stdout=subprocess.PIPE,
                            text=True)
    workers = [psutil.Process(int(pid)) for pid in main.stdout.readline().split()]
    main.kill()
    main.wait()
    assert len(workers) == 4 and not psutil.wait_procs(workers, timeout=30)[1]


def test_a_heartbeat_says_nothing_in_the_main_process():
    heartbeats = Heartbeats(1)
    with heartbeats.at(3):
        assert heartbeats[0] == (0, -1)
