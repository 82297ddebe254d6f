"""How far the planner's estimate of memory is off: bytes of an image, against the resident memory of real steps.

Trains two steps with few and with more images, each in a process of its own on the CPU, by the planner's own trial; the
difference of their peaks is what an image takes. Prints the table and writes JSON.

    python benchmarks/memory.py
"""
import resource
import subprocess
import sys
from statistics import median

from common import make_parser, measure, parse_args, print_table, write  # benchmarks/common.py, beside this file

from mixsize_timm.planner import Planner, Trial, parse_plan_args

CASES = [('resnet50', 128), ('resnet50', 224), ('resnet18', 224), ('convnext_atto', 224), ('vit_tiny_patch16_224', 224)]
FEW, MORE = 8, 24  # images


def planner(model: str, size: int) -> Planner:
    """The plan of one size."""
    return Planner(*parse_plan_args(['--model', model, '--mixsize', 'off', '--img-size', str(size), '--num-images',
                                     '1000', '--device', 'cpu', '-b', str(FEW)]))


def peak(model: str, size: int, images: int) -> float:
    """Peak resident memory, in bytes, of a process that trains two steps."""
    command = [sys.executable, __file__, '--child', model, str(size), str(images)]
    environment = ['env', 'MALLOC_MMAP_THRESHOLD_=65536']  # what is freed goes back to the system
    return float(subprocess.run([*environment, *command], check=True, capture_output=True, text=True).stdout)


def child(model: str, size: int, images: int) -> None:
    plan = planner(model, size)
    Trial(plan.args, plan.model, plan.accelerator, plan.data).run(size, images, 2, lambda meter: None)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> None:
    args = parse_args(make_parser(__doc__), 'memory')
    results, rows = [], []
    for model, size in CASES:
        figures = measure({str(images): lambda n=images, m=model, s=size: peak(m, s, n) for images in (FEW, MORE)},
                          args.rounds, warmup=0)
        measured = (median(figures[str(MORE)]) - median(figures[str(FEW)])) / (MORE - FEW)
        estimated = planner(model, size).describe()['memory']['per_image'][size]
        results.append({'model': model, 'img_size': size, 'peaks': figures, 'measured': measured,
                        'estimated': estimated})
        rows.append([model, size, measured / 1e6, estimated / 1e6, estimated / measured])
    print_table(['model', 'px', 'MB an image, resident', 'estimated', 'estimated / resident'], rows)
    write(args, results)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--child']:
        child(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        main()
