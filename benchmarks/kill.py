"""Kill a run at random moments, resume it each time, and compare its end with that of a run that was left alone.

    python benchmarks/kill.py --json benchmarks/results/kill-cpu.json

One CPU process with data workers, a moving average, mixup, random erasing and duplicates. A third of the kills wait for
a checkpoint that is being written, a twelfth come while the run starts. Each kill is SIGKILL to the process alone; its
data workers end by themselves. When a run ends before all kills are made, its files are compared and the next run is
started. The runs are forked from this process, which has imported everything, so that little time goes into starting
them.
"""
import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from accelerate import Accelerator
from safetensors.numpy import load_file

from mixsize_timm import train
from mixsize_timm.checkpoint import checkpoints_of, position_of
from mixsize_timm.provenance import environment

ARGUMENTS = ['--model', 'test_resnet', '-b', '64', '-j', '2', '--lr', '0.05', '--model-ema', '--model-ema-decay', '0.9',
             '--mixup', '0.2', '--reprob', '0.3', '--drop', '0.1', '--mixsize-duplicates', '2', '--calibrate', '2',
             '--calibrate-val', '1', '--checkpoint-hist', '2', '--checkpoint-interval', '3', '--device', 'cpu']
COMPARED = ('last/model.safetensors', 'last/model_ema.safetensors', 'last/state.safetensors', 'best/model.safetensors',
            'best/model_ema.safetensors', 'last/bn_stats.safetensors', 'summary.csv')


def start(folder: Path, epochs: int, log: Path) -> int:
    """Start the run, or go on with it; the number of its process."""
    process = os.fork()
    if process:
        return process
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1), os.dup2(output, 2)
    os._exit(train.main([*ARGUMENTS, '--epochs', str(epochs), '--output', str(folder.parent), '--experiment',
                         folder.name, '--resume', 'auto']))


def wait(process: int, folder: Path, seconds: float, moment: str) -> bool:
    """Wait for the moment of a kill, counted from when training starts; whether the run was still going on then."""
    def opened() -> float:
        return (folder / 'run.json').stat().st_mtime if (folder / 'run.json').exists() else 0.

    before, end = opened(), time.monotonic() + seconds if moment == 'starting' else None
    while True:
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        if end is None and opened() > before:
            end = time.monotonic() + seconds
        if end is not None and time.monotonic() > end and (moment != 'saving' or any(folder.glob('*.new'))):
            return True
        time.sleep(0.001)


def finish(process: int, log: Path) -> None:
    """Wait for the end of a run, which must be a good one."""
    _, status = os.waitpid(process, 0)
    if status:
        sys.exit(f'a run ended with status {status}:\n' + log.read_text()[-3000:])


def same(one: Path, other: Path) -> bool:
    """Whether two files say the same; of safetensors the order of the metadata is left to chance."""
    if not one.exists() or not other.exists():
        return False
    if one.suffix != '.safetensors':
        return one.read_bytes() == other.read_bytes()
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=30, help='default: 30')
    parser.add_argument('--epochs', type=int, default=8, help='epochs of a run (default: 8)')
    parser.add_argument('--seconds', type=float, default=3., help='longest time to a kill (default: 3)')
    parser.add_argument('--seed', type=int, default=0, help='seed of the moments (default: 0)')
    parser.add_argument('--json', default='', metavar='FILE', help='write what happened')
    args = parser.parse_args()
    draw = random.Random(args.seed)
    work = Path(tempfile.mkdtemp())
    log = work / 'log.txt'
    finish(start(work / 'straight', args.epochs, log), log)
    kills, runs, wrong, ended = [], 0, [], False
    while len(kills) < args.kills or not ended:
        process = start(work / 'killed', args.epochs, log)
        moment = draw.choices(['starting', 'saving', 'any'], [1, 4, 7])[0]
        seconds = draw.uniform(0, args.seconds)
        ended = not (len(kills) < args.kills and wait(process, work / 'killed', seconds, moment))
        if not ended:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            half = [path.name for path in (work / 'killed').glob('*.new')]
            found = checkpoints_of(str(work / 'killed'))
            kills.append({'moment': moment, 'seconds': round(seconds, 3), 'half_written': half,
                          'newest': list(position_of(found[0])) if found else None})
            print(f'kill {len(kills):>2d} after {seconds:.2f} s, half written: {half or "nothing"}, continues after '
                  f'(epoch, step) {kills[-1]["newest"]}', flush=True)
            continue
        finish(process, log)
        runs += 1
        wrong += [name for name in COMPARED if not same(work / 'straight' / name, work / 'killed' / name)]
        print(f'run {runs} ended: {"the same files" if not wrong else f"differs in {wrong}"}', flush=True)
        if wrong:
            break
        shutil.rmtree(work / 'killed')
    result = {'kills': kills, 'runs': runs, 'different': wrong, 'arguments': [*ARGUMENTS, '--epochs', str(args.epochs)],
              'compared': COMPARED, **environment(Accelerator(cpu=True))}
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + '\n')
    saving = sum(bool(kill['half_written']) for kill in kills)
    print(f'{len(kills)} kills, {saving} of them while a checkpoint was written, {runs} runs: '
          + ('every file as of the run that was left alone' if not wrong else f'different: {wrong}'))
    if not wrong:
        shutil.rmtree(work)
    sys.exit(bool(wrong))


if __name__ == '__main__':
    main()
