"""What becomes of each option of timm's ``train.py``, which the ``timm`` package on PyPI does not hold.

``python tests/timm_arguments.py PATH_OF_TIMM_CHECKOUT`` reads timm's parser into ``tests/timm_arguments.json``;
``python tests/timm_arguments.py --write-docs`` makes ``docs/timm-arguments.md`` of it, ours, and the verdicts below.
"""
import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FACTS = ROOT / 'tests' / 'timm_arguments.json'
DOCS = ROOT / 'docs' / 'timm-arguments.md'

LATER_VERSION = '1.0.31'
# Options that the source distribution of this version names, without a train.py to read them from: the file that names
# them there, and what it says of them. A type or default that it does not say is null in the JSON file.
LATER = {
    '--task': ('README.md', {'type': 'str', 'default': 'classification'}),
    '--target-format': ('README.md', {'type': 'str'}),
    '--multilabel-threshold': ('README.md', {}),
    '--loss': ('README.md', {'type': 'str'}),
    '--loss-pos-weight': ('tests/test_multilabel.py', {'type': 'str'}),
    '--loss-class-weight': ('tests/test_multilabel.py', {'type': 'str'}),
    '--loss-weight-power': ('tests/test_multilabel.py', {'type': 'float'}),
    '--class-stats': ('tests/test_multilabel.py', {'type': 'str'}),
    '--poly-epsilon': ('tests/test_multilabel.py', {}),
    '--poly-gamma': ('tests/test_multilabel.py', {}),
    '--lr-decay-fn': ('README.md', {'type': 'str'}),
    '--lr-stable-timescale': ('README.md', {}),
    '--stop-epoch': ('README.md', {'type': 'int'}),
    '--save-epochs': ('README.md', {'type': 'int', 'nargs': '+'}),
    '--pretrained-cfg-overlay': ('tests/test_checkpoint_loading.py', {'type': 'NAME=VALUE'}),
    '--sweep-locks': ('tests/test_sweep.py', {'type': 'str'}),
    '--sweep-attempt': ('tests/test_sweep.py', {'type': 'str'}),
}


def _needs(option, note=''):
    return 'same', f'needs `{option}`, refused without it' + (f'; {note}' if note else '')


_FOLDERS = 'checkpoints are folders with safetensors, not `.pth.tar` files'
_SPLITS = 'with `--mixsize off`; refused with MixSize, whose duplicates take the place of splits'
_SWEEP = 'unknown argument: timm\'s `sweep.py` hands it to timm\'s own `train.py`'

# Options that are not plainly the same: their status, and what happens.
VERDICTS = {
    '--config': ('same', 'values are checked as on the command line, as in timm 1.0.31'),
    'data': ('same', 'the same as `--data-dir`'),
    '--pretrained-path': ('same', 'implies `--pretrained`'),
    '--resume': ('mapped', 'takes a run\'s folder, a checkpoint folder in it, `auto` as in timm 1.0.31, or a timm '
                           '`.pth.tar` checkpoint'),
    '--no-resume-opt': _needs('--resume'),
    '--img-size': ('same', 'with MixSize the base size'),
    '--input-size': ('same', 'with MixSize the base size, which must be square'),
    '--batch-size': ('same', 'with MixSize the batch at the base size'),
    '--fuser': _needs('--torchscript'),
    '--torchscript': ('same', 'with `--mixsize off`; refused with MixSize: a scripted model\'s batch norm cannot be '
                              'calibrated'),
    '--torchcompile': ('same', 'one static graph for each size'),
    '--torchcompile-mode': _needs('--torchcompile'),
    '--device': ('mapped', '`cpu`, or a device such as `cuda:1`, is handed to Accelerate; `cuda`, the default, is '
                           'whatever accelerator Accelerate finds, the CPU if none'),
    '--amp': ('mapped', 'to `--mixed-precision fp16`, or `bf16` with `--amp-dtype bfloat16`; fp16 on a CPU is refused'),
    '--amp-dtype': ('mapped', 'needs `--amp`, refused without it; to `--mixed-precision` with it'),
    '--no-ddp-bb': ('mapped', 'to Accelerate\'s `DistributedDataParallelKwargs(broadcast_buffers=False)`'),
    '--local_rank': ('mapped', 'to `LOCAL_RANK` of the environment; refused if they disagree'),
    '--clip-grad': ('same', 'after gradient smoothing'),
    '--clip-mode': _needs('--clip-grad'),
    '--layer-decay-min-scale': _needs('--layer-decay'),
    '--layer-decay-no-opt-scale': _needs('--layer-decay'),
    '--lr-base': ('same', 'scaled to `--batch-size`: MixSize\'s duplicates and other batches do not count'),
    '--epoch-repeats': ('same', 'for data sets that stream; refused for others, where timm ignores it'),
    '--decay-epochs': ('same', 'the default is timm 1.0.31\'s own: 90, or 0.2 of the schedule for wsd and rsqrt'),
    '--aug-repeats': ('mapped', 'to `--mixsize-duplicates`: a whole number, refused beside another '
                                '`--mixsize-duplicates`; with `--mixsize off` timm\'s `RepeatAugSampler`, refused '
                                'unless there are several processes, as timm asserts'),
    '--aug-splits': ('same', _SPLITS),
    '--split-bn': ('same', _SPLITS),
    '--jsd-loss': ('mapped', 'to `--loss jsd`, as in timm 1.0.31; it needs `--aug-splits`, so `--mixsize off`'),
    '--bce-loss': ('mapped', 'to `--loss bce`, as in timm 1.0.31'),
    '--bce-pos-weight': ('mapped', 'to `--loss-pos-weight`, as in timm 1.0.31'),
    '--smoothing': ('same', 'the default is 0 with `--task multilabel`, as in timm 1.0.31'),
    '--drop-connect': ('mapped', 'to `--drop-path`; timm\'s script takes it and ignores it'),
    '--model-ema': ('same', 'what is validated is calibrated with MixSize'),
    '--model-ema-force-cpu': _needs('--model-ema'),
    '--model-ema-decay': _needs('--model-ema'),
    '--model-ema-warmup': _needs('--model-ema'),
    '--worker-seeding': ('same', 'with `--mixsize off`; refused with MixSize unless `all`: each augmentation is seeded '
                                 'by its image'),
    '--recovery-interval': ('mapped', 'to `--checkpoint-interval`; ' + _FOLDERS),
    '--checkpoint-hist': ('same', _FOLDERS),
    '--eval-metric': ('same', 'the default is `map` with `--task multilabel`, as in timm 1.0.31'),
    '--tta': ('mapped', '2 averages an image and its mirror image, more is refused; timm\'s script averages N '
                        'consecutive, different images, as its loader makes no copies'),
    '--use-multi-epochs-loader': ('same', 'with `--mixsize off`; refused with MixSize, whose loader keeps its workers '
                                          'anyway, and together with `--mixup-off-epoch`, which its workers would not '
                                          'hear of'),
    **dict.fromkeys(('--train-num-samples', '--val-num-samples'),
                    ('same', 'for data sets that stream; refused for others, where timm ignores it')),
    **dict.fromkeys(('--opt-eps', '--opt-betas'),
                    ('same', 'refused for an optimizer that has none, where timm ignores it')),
    **dict.fromkeys(('--no-aug', '--train-crop-mode', '--scale', '--ratio'),
                    ('same', 'refused beside `--train-pad`, a crop that timm has not')),
    '--mixup-mode': ('same', 'refused with `--naflex-loader`, which mixes by batch'),
    '--multilabel-threshold': ('same', 'refused unless `--task multilabel`'),
    '--log-wandb': ('same', 'through Accelerate\'s trackers'),
    '--wandb-project': _needs('--log-wandb', 'the default is a project named mixsize-timm'),
    '--wandb-tags': _needs('--log-wandb'),
    '--wandb-resume-id': ('same', 'needs `--log-wandb` and `--resume`, refused without them'),
    '--train-img-sizes': ('same', 'timm\'s own scheduled loader, as with `--mixsize off`; refused with MixSize: use '
                                  '`--mixsize-sizes` and `--mixsize-probs`'),
    **{option: _needs('--train-img-sizes') for option in (
        '--train-batch-sizes', '--train-size-probs', '--train-size-schedule', '--train-size-schedule-spread',
        '--train-size-random-mix', '--train-batches-per-epoch', '--variable-batch-loss-scale')},
    '--naflex-loader': ('same', 'as with `--mixsize off`; refused with MixSize: NaFlex has its own sizes'),
    **{option: _needs('--naflex-loader') for option in (
        '--naflex-train-seq-lens', '--naflex-max-seq-len', '--naflex-patch-sizes', '--naflex-loss-scale',
        '--naflex-patchify-channels-first')},
    '--naflex-patch-size-probs': _needs('--naflex-patch-sizes'),
    **{option: _needs('--kd-model-name') for option in (
        '--kd-distill-type', '--distill-loss-weight', '--task-loss-weight')},
    '--kd-model-name': ('same', 'refused if it was trained for another number of classes, unless for features: timm '
                                'draws its classifier anew'),
    '--kd-temperature': _needs('--kd-model-name', 'not of the kind `feature`'),
    '--kd-student-feature-dim': _needs('--kd-model-name', 'of the kind `feature`'),
    '--kd-teacher-feature-dim': _needs('--kd-model-name', 'of the kind `feature`'),
    '--kd-token-distill-type': _needs('--kd-model-name', 'of the kind `token`'),
    '--save-epochs': ('same', _FOLDERS),
    '--sweep-locks': ('refused', _SWEEP),
    '--sweep-attempt': ('refused', _SWEEP),
}

INTRO = """\
# timm's arguments, one by one

The {count} options of timm's `train.py` at [commit {short}] (version {version}), and
{later} more that timm {later_version} names, whose source distribution lacks `train.py`. Made by
`python tests/timm_arguments.py --write-docs` of [the facts of timm's parser](../tests/timm_arguments.json), our parser
and notes; tests compare the two parsers. A name can be cut short where it stays the only one, as in timm.

* *same*: names, type, number of values, choices, default and meaning agree; of timm {later_version}'s, what is known;
* *mapped*: taken under its name, done under another or by other means;
* *refused*: an error of one line, before training starts; a note says if an option is refused in some cases only.

[commit {short}]: {url}/tree/{commit}

| option | status | what happens |
|---|---|---|
"""


def name_of(strings, dest):
    """The name of an option in the verdicts: its first long form, or that of a positional."""
    return next((string for string in strings if string.startswith('--')), dest)


def facts_of(action):
    """The facts of one option; what is absent is ``None``."""
    flag = action.nargs == 0
    pairs = any(base.__name__ == 'ParseKwargs' for base in type(action).__mro__)  # timm's own, whichever timm that is
    facts = {
        'strings': list(action.option_strings),
        'dest': action.dest,
        'type': None if flag else 'NAME=VALUE' if pairs else getattr(action.type, '__name__', 'str'),
        'default': action.default,
        'nargs': None if flag else action.nargs,
        'choices': list(action.choices) if action.choices else None,
        'const': action.const,
        'flag': flag or None,
    }
    return {key: value for key, value in facts.items() if value is not None or key in ('type', 'default')}


def read_timm(checkout):
    """The text of the JSON file, of the parser in a timm checkout's ``train.py``."""
    checkout = str(Path(checkout).resolve())
    sys.path.insert(0, checkout)
    train, timm = importlib.import_module('train'), importlib.import_module('timm')
    if not (str(timm.__file__).startswith(checkout) and str(train.__file__).startswith(checkout)):
        raise SystemExit(f'{timm.__file__} was imported, not the timm of {checkout}')
    commit = subprocess.run(['git', '-C', checkout, 'rev-parse', 'HEAD'], check=True, capture_output=True, text=True)
    options = [facts_of(action) for action in train.config_parser._actions + train.parser._actions
               if action.dest != 'help']
    known = {string for option in options for string in option['strings']}
    later = [{'strings': [string], 'dest': string[2:].replace('-', '_'), 'type': None, 'default': None, **said,
              'named_in': file} for string, (file, said) in LATER.items() if string not in known]
    head = {'repository': 'https://github.com/huggingface/pytorch-image-models', 'commit': commit.stdout.strip(),
            'version': timm.__version__}
    lists = {'options': options, 'later_version': LATER_VERSION, 'later_options': later}
    entries = [f' {json.dumps(key)}: {_lines(value)}' for key, value in {**head, **lists}.items()]
    return '{\n' + ',\n'.join(entries) + '\n}\n'


def _lines(value):
    if not isinstance(value, list):
        return json.dumps(value)
    return '[\n' + ',\n'.join(f'  {json.dumps(item)}' for item in value) + '\n ]'


def our_actions():
    """Our parser's options, by each of their strings; a positional by its name."""
    from mixsize_timm.parser import build_parser  # not above: it would import another timm before the checkout's

    return {string: action for action in build_parser()._actions for string in action.option_strings or [action.dest]}


def make_docs():
    """The text of the page."""
    timm = json.loads(FACTS.read_text(encoding='utf-8'))
    ours = our_actions()
    text = INTRO.format(
        count=len(timm['options']), later=len(timm['later_options']), later_version=timm['later_version'],
        url=timm['repository'], commit=timm['commit'], short=timm['commit'][:8], version=timm['version'])
    for option in timm['options'] + timm['later_options']:
        name = name_of(option['strings'], option['dest'])
        status, note = VERDICTS.get(name, ('same', '') if name in ours else ('refused', 'unknown argument'))
        notes = [f'named in `{option["named_in"]}` of timm {timm["later_version"]}'] if 'named_in' in option else []
        if name in ours and ours[name].choices and 'choices' not in option:
            notes.append('takes ' + ', '.join(f'`{choice}`' if choice else '`""`' for choice in ours[name].choices))
        notes += [note] if note else []
        strings = ', '.join(f'`{string}`' for string in option['strings'] or [name])
        text += f'| {strings} | {status} | {"; ".join(notes)} |\n'
    return text


def main():
    """Write the JSON file or the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)  # one timm is imported for each
    what.add_argument('checkout', nargs='?', help='timm checkout to read the parser of')
    what.add_argument('--write-docs', action='store_true', help=f'write {DOCS.relative_to(ROOT)}')
    args = parser.parse_args()
    if args.checkout:
        FACTS.write_text(read_timm(args.checkout), encoding='utf-8')
    else:
        DOCS.write_text(make_docs(), encoding='utf-8')


if __name__ == '__main__':
    main()
