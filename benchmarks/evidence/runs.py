"""Arms trained and measured, each with each seed once; what was begun goes on, what is there is not done again."""
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from benchmarks.common import HERE as BENCHMARKS
from benchmarks.common import commit
from mixsize_timm.build import has_fast_bf16
from mixsize_timm.errors import INTERRUPTED, STOPPED

from .settings import Arm, Setting

RESULTS = BENCHMARKS / 'results' / 'evidence'
IN_FLOAT32 = 'benchmarks.evidence.bf16'  # what training runs through where the processor has no bf16
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
    _processes: List[subprocess.Popen] = field(default_factory=list, repr=False)
    _stopped: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def over(self) -> bool:
        """Whether it is time to stop."""
        return self._stopped.is_set() or (self.deadline is not None and time.monotonic() > self.deadline)

    def stop(self) -> None:
        """Ask all that runs to save and end."""
        self._stopped.set()
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def call(self, command: List[str], log: Path, kept_open: int) -> int:
        """Run a command until it ends or the time is over.

        Args:
            command: Its words.
            log: File that its output is added to.
            kept_open: A file that it inherits: what is locked stays so until it has ended.

        Returns:
            Its exit code.
        """
        environment = {**os.environ, 'OMP_NUM_THREADS': str(self.threads)}
        with open(log, 'a', encoding='utf-8') as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment,
                                       pass_fds=(kept_open,))
            self._processes.append(process)
            if self._stopped.is_set():  # between the look at it and the start
                self.stop()
            try:
                return process.wait(None if self.deadline is None else max(0., self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
            try:
                return process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                return process.wait()


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

    Raises:
        ValueError: A result that is there was made by other commands than its arm has now.
    """
    wanted = [(name, seed) for seed in seeds for name in arms]
    missing = [(name, seed) for name, seed in wanted if not result_file(setting, name, seed).exists()]
    for name, seed in set(wanted) - set(missing):
        _check(setting, name, arms[name], seed)
    print(f'{setting.name}: {len(wanted) - len(missing)} of {len(wanted)} runs are there', flush=True)
    with ThreadPoolExecutor(machine.jobs) as pool:
        try:
            if missing and not pool.submit(_prepare, setting, machine).result():
                return len(missing)
            runs = [pool.submit(_run, setting, name, arms[name], seed, machine) for name, seed in missing]
            return [run.result() for run in runs].count(False)
        except BaseException:
            machine.stop()
            pool.shutdown(cancel_futures=True)
            raise


def _prepare(setting: Setting, machine: Machine) -> bool:
    """Rewrite the data with smaller images, where the setting says so; whether they are there."""
    command = preparation_command(setting, machine)
    if not command:
        return True
    folder = data_folder(setting, machine)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix('.log')
    with _locked(folder.with_suffix('.lock')) as lock:
        if lock is None:
            print(f'{folder} is in use by another process', flush=True)
            return False
        code = machine.call(command, log, lock)
    if code and not machine.over:
        print(f'{folder}: the data were not prepared: see {log}', flush=True)
    return code == 0


def _check(setting: Setting, name: str, arm: Arm, seed: int) -> None:
    path = result_file(setting, name, seed)
    trained = json.loads(path.read_text(encoding='utf-8'))['options']
    if trained != training_options(setting, arm):
        raise ValueError(f'{path} was made with other options than the arm has now: remove it to run the arm again')


def _run(setting: Setting, name: str, arm: Arm, seed: int, machine: Machine) -> bool:
    """Train and measure; whether a result was written, be it that the training failed."""
    folder = machine.work / setting.name / f'{name}-{seed}'
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix('.lock')) as lock:
        if lock is None:
            print(f'{folder} is in use by another process', flush=True)
        if lock is None or machine.over:
            return False
        origin = {'commit': commit(), 'date': time.strftime('%Y-%m-%d')}
        train = training_command(setting, name, arm, seed, machine)
        log = folder.with_suffix('.log')
        code = 0 if (folder / 'finished').exists() else machine.call(train, log, lock)
        if code in (INTERRUPTED, STOPPED) or code < 0 or code > 128 or machine.over:  # by a signal: it goes on
            return False
        if code:
            last = ' '.join(log.read_text(encoding='utf-8').strip().splitlines()[-1:])
            _write(setting, name, arm, seed, {**origin, 'commands': [_typed(train)], 'code': code, 'failed': last})
            return True
        (folder / 'finished').touch()
        ways = (True, False) if setting.as_in_use else (True,)
        evaluations = [evaluation_command(setting, folder, machine, augmented) for augmented in ways]
        for evaluate in evaluations:
            if machine.call(evaluate, folder.with_suffix('.evaluation.log'), lock):
                if not machine.over:
                    print(f'{folder}: the evaluation failed: see {folder.with_suffix(".evaluation.log")}', flush=True)
                return False
    reports = [json.loads((_report_folder(folder, augmented) / 'sizes.json').read_text(encoding='utf-8'))
               for augmented in ways]
    measured = reports[0]['checkpoints'][0]
    rows = measured['results']
    for report in reports[1:]:
        rows = [{**row, **{f'{key}_as_in_use': other[key] for key in ('top1', 'loss') if key in other}}
                for row, other in zip(rows, report['checkpoints'][0]['results'])]
    place = {key: value for key, value in reports[0]['settings'].items() if key != 'command'}
    preparation = preparation_command(setting, machine)
    _write(setting, name, arm, seed, {
        'commands': [_typed(train), *map(_typed, evaluations)],
        **({'preparation': _typed(preparation)} if preparation else {}), **place, **origin, 'threads': machine.threads,
        'jobs': machine.jobs, **{key: measured[key] for key in ('model', 'num_params', 'calibrated', 'training')},
        'results': rows})
    return True


@contextmanager
def _locked(path: Path) -> Iterator[Optional[int]]:
    """A lock that a child keeps which inherits it; ``None`` where another process has it."""
    with open(path, 'w', encoding='utf-8') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
        else:
            yield file.fileno()


def _write(setting: Setting, name: str, arm: Arm, seed: int, result: Dict[str, Any]) -> None:
    path = result_file(setting, name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {'setting': setting.name, 'arm': name, 'title': arm.title, 'seed': seed,
                'options': training_options(setting, arm), **result}
    temporary = path.with_suffix('.new')
    temporary.write_text(json.dumps(document, indent=1) + '\n', encoding='utf-8')
    temporary.replace(path)
    best = max((row['top1'] for row in result.get('results', ())), default=None)
    print(f'{setting.name} {name} {seed}: {result.get("failed") or f"best top-1 {best:.2f}"}', flush=True)


def training_options(setting: Setting, arm: Arm) -> Dict[str, Any]:
    """The arguments of training that make an arm what it is."""
    return {'model': setting.model, 'model_kwargs': setting.model_kwargs, 'img_size': setting.base_size,
            'batch_size': setting.batch_size, **setting.arguments, **arm.options, 'epochs': arm.epochs,
            'warmup_epochs': max(1, round(setting.warmup * arm.epochs))}


def data_folder(setting: Setting, machine: Machine) -> Path:
    """The folder that training reads."""
    if setting.short_side is None:
        return Path(machine.data) / setting.data
    return machine.work / 'data' / f'{setting.data}-{setting.short_side}'


def preparation_command(setting: Setting, machine: Machine) -> List[str]:
    """The command that makes that folder, where it is not the data as they are."""
    if setting.short_side is None:
        return []
    return [sys.executable, '-m', 'mixsize_timm.prepare', str(Path(machine.data) / setting.data),
            str(data_folder(setting, machine)), *to_words({
                'short_side': setting.short_side, 'format': 'parquet', 'split': ['train', 'validation', 'test']})]


def training_command(setting: Setting, name: str, arm: Arm, seed: int, machine: Machine) -> List[str]:
    """The command of a training, which goes on where one was begun."""
    in_bf16 = setting.arguments.get('amp_dtype') == 'bfloat16' and machine.device == 'cpu'
    through = [IN_FLOAT32] if in_bf16 and not has_fast_bf16() else []
    return [sys.executable, '-m', *through, 'mixsize_timm.train', *to_words({
        'dataset': f'hfds/{data_folder(setting, machine)}', **training_options(setting, arm), 'val_split': '',
        'calibrate': 0, 'seed': seed, 'device': machine.device, 'output': machine.work / setting.name,
        'experiment': f'{name}-{seed}', 'resume': 'auto'})]


def _report_folder(folder: Path, augmented: bool) -> Path:
    return folder / ('evaluation' if augmented else 'evaluation-as-in-use')


def evaluation_command(setting: Setting, folder: Path, machine: Machine, augmented: bool) -> List[str]:
    """The command that measures the final weights at all sizes, calibrated, on augmented images or not, and not."""
    return [sys.executable, '-m', 'mixsize_timm.evaluate', str(folder / 'last'), '--no-speed', *to_words({
        'val_split': setting.test_split, 'calibrate': setting.calibrate, 'sizes': setting.sizes,
        'device': machine.device, 'output': _report_folder(folder, augmented), 'overwrite': True}),
        '--calibrate-aug' if augmented else '--no-calibrate-aug']


def to_words(options: Dict[str, Any]) -> List[str]:
    """Arguments by name, as the words of a command line."""
    words: List[str] = []
    for name, value in options.items():
        option = '--' + name.replace('_', '-')
        if name == 'grad_smoothing':
            words += [] if value else ['--no-grad-smoothing']
        elif isinstance(value, bool):
            words += [option] if value else []
        elif isinstance(value, dict):
            words += [option, *(f'{key}={item}' for key, item in value.items())] if value else []
        elif isinstance(value, list):
            words += [option, *map(str, value)]
        else:
            words += [option, str(value)]
    return words


def _typed(command: List[str]) -> str:
    return shlex.join(['python', *command[1:]])
