"""What the recipes cost, by the planner's arithmetic: a line of each one's header, and the table of docs/recipes.md.

``python tests/recipe_costs.py --write`` puts both where they belong; test_recipes.py compares them.
"""
import json
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import timm
import torch

from mixsize_timm.args import make_regime, parse_args
from mixsize_timm.measure import count_gmacs
from mixsize_timm.planner import EpochCost
from mixsize_timm.recipe import read_recipe, recipe_header, recipe_names
from mixsize_timm.regime import Regime

ROOT = Path(__file__).parents[1]
DOCS = ROOT / 'docs' / 'recipes.md'
# images that an epoch is counted for
IMAGES = {'imagenet': 1281167, 'cifar': 50000, 'digits': 1437, 'finetune': 10000, 'scratch': 3068}


def header_of(name):
    return recipe_header(read_recipe(name))


def arguments(command):
    """What a launch line hands to the training command; N stands for a number that the user knows."""
    words = shlex.split(command)
    behind = words[words.index('mixsize_timm.train') + 1:]
    return ['10' if word == 'N' else word for word in behind]


@cache
def model_of(name, num_classes, kwargs):
    with torch.device('meta'):
        return timm.create_model(name, num_classes=num_classes, **json.loads(kwargs))


@cache
def gmacs(name, num_classes, kwargs, size):
    return count_gmacs(model_of(name, num_classes, kwargs), (3, size, size))


def epoch_cost(args, num_images, world_size=1):
    """The cost of an epoch, and that of one at the base size, as the planner has them."""
    fixed = Regime.fixed(args.img_size, batch_size=args.batch_size)
    regime = make_regime(args, (3, args.img_size, args.img_size))
    sizes = {*(regime or fixed).sizes, args.img_size}
    model = args.model, args.num_classes, json.dumps(args.model_kwargs)
    shared = dict(num_images=num_images, gmacs={size: gmacs(*model, size) for size in sizes}, world_size=world_size,
                  grad_accum_steps=args.grad_accum_steps)
    base = EpochCost(fixed, drop='reference', **shared)
    return EpochCost(regime, drop=args.mixsize_drop, **shared) if regime else base, base


@cache
def figures(name):
    """What the command for one GPU costs: an epoch, the run, and its largest step over one at the base size."""
    args = parse_args(arguments(header_of(name)['launch']))
    cost, base = epoch_cost(args, IMAGES[name.split('_')[0]])
    peak = max(map(cost.work, cost.batches))
    return {'steps': cost.num_steps, 'gmacs': f'{cost.epoch_gmacs:.3g}', 'epochs': args.epochs, 'size': args.img_size,
            'relative': f'{cost.epoch_gmacs / base.epoch_gmacs:.3f}x', 'peak': f'{peak:.2f}x',
            'run': f'{3 * cost.epoch_gmacs * args.epochs:.3g}'}


def cost_line(name):
    cost = figures(name)
    return (f'an epoch of {IMAGES[name.split("_")[0]]} images: {cost["steps"]} steps, {cost["gmacs"]} GMACs forward, '
            f'{cost["relative"]} those of one at {cost["size"]} px; {cost["epochs"]} epochs: {cost["run"]} GMACs '
            f'forward and backward; the largest step is {cost["peak"]} one at {cost["size"]} px')


def table():
    """The recipes as a table of Markdown."""
    rows = [('recipe', 'gives', 'epochs', 'steps', 'GMACs', 'of fixed', 'largest step', 'of the run', 'was run'),
            ('---',) * 9]
    for name in recipe_names():
        cost, header = figures(name), header_of(name)
        rows.append((f'[`{name}`](../recipes/{name}.yaml)', header['gives'], cost['epochs'], cost['steps'],
                     cost['gmacs'], cost['relative'], cost['peak'], cost['run'], header['was run']))
    return '\n'.join(f'| {" | ".join(map(str, row))} |' for row in rows)


def write():
    for name in recipe_names():
        path = ROOT / 'recipes' / f'{name}.yaml'
        lines = cost_line(name).replace('; ', ';\n#            ', 1)
        text = re.sub(r'(?<=^#   costs    ).*(\n#            .*)*', lines, path.read_text(encoding='utf-8'), flags=re.M)
        path.write_text(text, encoding='utf-8')
    text = DOCS.read_text(encoding='utf-8')
    DOCS.write_text(re.sub(r'(?<=<!-- table -->\n).*?(?=\n\n)', lambda _: table(), text, flags=re.S), encoding='utf-8')


if __name__ == '__main__' and sys.argv[1:] == ['--write']:
    write()
