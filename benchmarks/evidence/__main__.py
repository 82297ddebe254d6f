"""The studies of docs/results.md: arms trained and measured, and the page made of what was measured."""
import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import List, Optional

import torch

from benchmarks.common import usable_cores

from .page import write_page
from .runs import Machine, run_all
from .settings import Setting, make_arms, planned_arms
from .studies import make_studies

PAGE = 'page'
STUDIES = ('inference', 'accuracy', 'training', 'resilience', 'parts', 'beyond')


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; 0, 2 for what the user can mend, 3 where runs are still missing, 130 after Ctrl-C or SIGTERM."""
    args = _parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    machine = Machine(args.data, args.work, args.jobs, args.threads or max(1, usable_cores() // args.jobs),
                      args.device, time.monotonic() + 60 * args.minutes if args.minutes else None)
    try:
        missing = sum(run_all(setting, arms, args.seeds, machine) for setting, arms in args.runs)
    except ValueError as error:
        print(f'evidence: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('\nevidence: stopped; the same command goes on', file=sys.stderr)
        return 130
    if missing:
        print(f'{missing} runs are missing: the same command goes on', flush=True)
    if PAGE in args.study:
        write_page()
    return 3 if missing else 0


def _parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The arguments, and as ``runs`` the settings with the arms to be run of each."""
    parser = argparse.ArgumentParser(prog='python -m benchmarks.evidence', description=__doc__.splitlines()[0])
    parser.add_argument('study', nargs='+', choices=(*STUDIES, 'all', PAGE), metavar='STUDY',
                        help=f'{", ".join(STUDIES)}; all of them; or page, which writes docs/results.md')
    parser.add_argument('--setting', nargs='+', choices=Setting.names(), metavar='NAME',
                        help=f'{", ".join(Setting.names())} (default: all for the device)')
    parser.add_argument('--arms', nargs='+', metavar='NAME', help='only these arms of the studies')
    parser.add_argument('--seeds', type=int, nargs='+', default=[1, 2, 3], metavar='N', help='(default: 1 2 3)')
    parser.add_argument('--data', default='../shared/data', metavar='DIR', help='folder of the data sets')
    parser.add_argument('--work', type=Path, default=Path('output/evidence'), metavar='DIR', help='folder of the runs')
    parser.add_argument('--jobs', type=int, default=1, metavar='N', help='runs side by side (default: 1)')
    parser.add_argument('--threads', type=int, metavar='N', help='threads of each (default: the cores, dealt out)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--minutes', type=float, metavar='M',
                        help='stop after so long, saved; the same command goes on')
    args = parser.parse_args(argv)
    kind = 'cpu' if args.device == 'cpu' else 'gpu'
    studies = [name for name in STUDIES if name in args.study or 'all' in args.study]
    if studies and not os.path.isdir(args.data):
        parser.error(f'--data {args.data} is no folder')
    # the files of the runs have them in their commands, and are published: no path of a machine
    args.data, args.work = os.path.relpath(args.data), Path(os.path.relpath(args.work))
    args.runs = []
    for name in (args.setting or [name for name in Setting.names() if name.endswith(kind)]) if studies else ():
        setting = Setting.read(name)
        arms = make_arms(setting)
        asked = {arm for study in studies for arm in make_studies(setting)[study].arms}
        wanted = [arm for arm in (arms if args.arms else planned_arms(setting)) if arm in asked]
        if unknown := sorted(set(args.arms or ()) - set(wanted)):
            parser.error(f'{name} has no arm {unknown[0]} in {" ".join(args.study)}: choose from {", ".join(wanted)}')
        args.runs.append((setting, {arm: arms[arm] for arm in args.arms or wanted}))
    return args


if __name__ == '__main__':
    sys.exit(main())
