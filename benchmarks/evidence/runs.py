"""Arms trained and measured, each with each seed once; what was begun goes on, what is there is not done again."""
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

from benchmarks.common import HERE as BENCHMARKS
from benchmarks.common import commit
from mixsize_timm.errors import INTERRUPTED, STOPPED

from .settings import Arm, Setting

RESULTS = BENCHMARKS / 'results' / 'evidence'
STOP_SECONDS = 60  # that a stopped training has to save


@dataclass(frozen=True)
class Machine:
    """What runs are made with.

    Attributes:
        data: Folder of all data sets.
        work: Folder of the runs.
        jobs: Runs side by side.
        threads: Threads of each.
        device: Device of each, as torch names it.
        deadline: When to stop, in seconds of ``time.monotonic``; ``None`` for never.
    """
    data: str
    work: Path
    jobs: int
    threads: int
    device: str
    deadline: Optional[float]

    @property
    def over(self) -> bool:
        """Whether it is time to stop."""
        return self.deadline is not None and time.monotonic() > self.deadline


def result_file(setting: Setting, arm: str, seed: int) -> Path:
    """Where a run's result is kept."""
    return RESULTS / setting.name / f'{arm}-{seed}.json'


def read_results(setting: Setting, arm: str) -> List[Dict[str, Any]]:
    """The results of an arm, of all seeds that there are, by seed."""
    files = (RESULTS / setting.name).glob(f'{arm}-*.json')
    seeds = sorted((int(path.stem[len(arm) + 1:]), path) for path in files if path.stem[len(arm) + 1:].isdigit())
    return [json.loads(path.read_text(encoding='utf-8')) for _, path in seeds]


def run_all(setting: Setting, arms: Dict[str, Arm], seeds: List[int], machine: Machine) -> int:
    """Make the runs that are missing, seed by seed, so that each seed has all arms before the next begins.

    Returns:
        How many are still missing.
    """
    missing = [(name, seed) for seed in seeds for name in arms if not result_file(setting, name, seed).exists()]
    print(f'{setting.name}: {len(arms) * len(seeds) - len(missing)} of {len(arms) * len(seeds)} runs are there',
          flush=True)
    with ThreadPoolExecutor(machine.jobs) as pool:
        runs = [pool.submit(_run, setting, name, arms[name], seed, machine) for name, seed in missing]
        try:
            return [run.result() for run in runs].count(False)
        except BaseException:  # Ctrl-C reaches what is running too, and it saves
            pool.shutdown(cancel_futures=True)
            raise


def _run(setting: Setting, name: str, arm: Arm, seed: int, machine: Machine) -> bool:
    """Train and measure; whether a result was written, be it that the training failed."""
    if machine.over:
        return False
    folder = machine.work / setting.name / f'{name}-{seed}'
    train = training_command(setting, name, arm, seed, machine)
    code = 0
    if not (folder / 'finished').exists():
        code = _call(train, folder.with_suffix('.log'), machine)
    if code in (INTERRUPTED, STOPPED) or machine.over:
        return False
    if code:
        failure = folder.with_suffix('.log').read_text(encoding='utf-8').strip().splitlines()[-1:]
        _write(setting, name, arm, seed, {'commands': [_typed(train)], 'failed': ' '.join(failure)})
        return True
    (folder / 'finished').touch()
    evaluate = evaluation_command(setting, folder, machine)
    code = _call(evaluate, folder.with_suffix('.evaluation.log'), machine)
    if code:
        if not machine.over:
            print(f'{setting.name} {name} {seed}: the evaluation failed: see {folder}.evaluation.log', flush=True)
        return False
    report = json.loads((folder / 'evaluation' / 'sizes.json').read_text(encoding='utf-8'))
    measured = report['checkpoints'][0]
    place = {key: value for key, value in report['settings'].items() if key != 'command'}
    _write(setting, name, arm, seed, {
        'commands': [_typed(train), _typed(evaluate)], **place, 'threads': machine.threads, 'jobs': machine.jobs,
        **{key: measured[key] for key in ('model', 'num_params', 'calibrated', 'training')},
        'results': measured['results']})
    return True


def _write(setting: Setting, name: str, arm: Arm, seed: int, result: Dict[str, Any]) -> None:
    path = result_file(setting, name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {'setting': setting.name, 'arm': name, 'title': arm.title, 'seed': seed, 'epochs': arm.epochs,
                'commit': commit(), 'date': time.strftime('%Y-%m-%d'), **result}
    temporary = path.with_suffix('.new')
    temporary.write_text(json.dumps(document, indent=1) + '\n', encoding='utf-8')
    temporary.replace(path)
    best = max((row['top1'] for row in result.get('results', ())), default=None)
    print(f'{setting.name} {name} {seed}: {result.get("failed") or f"best top-1 {best:.2f}"}', flush=True)


def training_command(setting: Setting, name: str, arm: Arm, seed: int, machine: Machine) -> List[str]:
    """The command of a training, which goes on where one was begun."""
    options: Dict[str, Any] = {
        'dataset': f'hfds/{machine.data}/{setting.data}', 'img_size': setting.base_size,
        'batch_size': setting.batch_size, **setting.arguments, **arm.options, 'epochs': arm.epochs,
        'val_split': '', 'calibrate': 0, 'seed': seed, 'device': machine.device,
        'output': machine.work / setting.name, 'experiment': f'{name}-{seed}', 'resume': 'auto'}
    return [sys.executable, '-m', 'mixsize_timm.train', *to_words(options)]


def evaluation_command(setting: Setting, folder: Path, machine: Machine) -> List[str]:
    """The command that measures the final weights at all sizes, calibrated and not."""
    return [sys.executable, '-m', 'mixsize_timm.evaluate', str(folder / 'last'), '--no-speed',
            *to_words({'val_split': setting.test_split, 'calibrate': setting.calibrate, 'sizes': setting.sizes,
                       'device': machine.device,
                       'output': folder / 'evaluation', 'overwrite': True})]


def to_words(options: Dict[str, Any]) -> List[str]:
    """Arguments by name, as the words of a command line."""
    words: List[str] = []
    for name, value in options.items():
        option = '--' + name.replace('_', '-')
        if value is False and name == 'grad_smoothing':
            words.append('--no-grad-smoothing')
        elif isinstance(value, dict):
            words += [option, *(f'{key}={item}' for key, item in value.items())]
        elif isinstance(value, list):
            words += [option, *map(str, value)]
        elif value is True:
            words.append(option)
        elif value is not False and value is not None:
            words += [option, str(value)]
    return words


def _typed(command: List[str]) -> str:
    return shlex.join(['python', *command[1:]])


def _call(command: List[str], log: Path, machine: Machine) -> int:
    """Run a command until it ends or the time is over; its exit code."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, 'OMP_NUM_THREADS': str(machine.threads)}
    with open(log, 'a', encoding='utf-8') as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            left = None if machine.deadline is None else max(0., machine.deadline - time.monotonic())
            return process.wait(left)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # it saves where it is
            return process.wait(STOP_SECONDS)
