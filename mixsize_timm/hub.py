"""Publish models on the Hugging Face hub, and fetch them: ``mixsize hub export | verify | push | pull | onnx``."""
import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.utils import RepositoryNotFoundError, validate_repo_id
from timm.data import resolve_model_data_config

from .bn_stats import BatchNormStats, digest, fingerprint
from .card import CALIBRATED, CARD_FILE, OWN, PLOT_FILE, REPO_PLACEHOLDER, eval_results
from .checkpoint import MODEL_FILE
from .errors import UsageError, check_writable, refusing, run_command
from .export import DTYPES, HUB_FILES, Export, OnnxExport, check_tokens
from .layout import CONFIG_FILE, KEY, LIBRARY, fetch, hub_errors, is_pickle, read_config, staged
from .models import find_checkpoint
from .parser import Parser
from .report import SIZES_FILE

NAME = 'mixsize hub'


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; the exit code is 0, 2 for what the user can mend, 130 after Ctrl-C."""
    parsed: List[argparse.Namespace] = []

    def run() -> None:
        parsed.append(parse_args(argv))
        _COMMANDS[parsed[0].command][0](parsed[0])

    def stopped() -> str:
        return _COMMANDS[parsed[0].command][1] if parsed else 'nothing was done'

    return run_command(NAME, run, stopped, logging.WARNING)


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    """What the command line says.

    Raises:
        UsageError: An argument's value cannot work.
    """
    parser = Parser(prog=NAME, description='Publish trained models on the Hugging Face hub, and fetch them.',
                    epilog='Also "python -m mixsize_timm.hub ...". Tokens come from "hf auth login" or HF_TOKEN.')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True, parser_class=Parser)
    for add in (_add_export, _add_verify, _add_push, _add_pull, _add_onnx):
        add(commands)
    args = parser.parse_args(argv)
    if getattr(args, 'img_size', None) is not None and args.img_size < 1:
        raise UsageError(f'--img-size must be at least 1, not {args.img_size}')
    for name in ('repo_id', 'repository'):
        value = (getattr(args, name, None) or '').partition('@')[0]
        with refusing():
            if value:
                validate_repo_id(value)
        if value and value.count('/') != 1:
            raise UsageError(f'a repository of the hub is ORG/NAME, not {value}')
    return args


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('checkpoint', metavar='RUN',
                        help='a run\'s folder or a checkpoint in it, a folder in hub layout, a .safetensors or timm '
                             '.pth file, hf-hub:NAME')
    parser.add_argument('--model', default='', metavar='MODEL',
                        help='timm model that the weights of a .safetensors or .pth file are of')
    parser.add_argument('--img-size', type=int, metavar='N',
                        help='image size that it is for (default: the base size)')
    parser.add_argument('--stats', choices=(CALIBRATED, OWN), default=CALIBRATED,
                        help='batch-norm statistics in the weights: those calibrated for the size, or its own of '
                             'training (default: calibrated)')
    parser.add_argument('--use-ema', action=argparse.BooleanOptionalAction, default=None,
                        help='take the moving average of the weights, or the weights; to be said where there are both')
    parser.add_argument('--overwrite', action='store_true', default=False, help='replace what is there')


def _add_export(commands: Any) -> None:
    parser = commands.add_parser('export', help='write a folder in the hub\'s layout')
    _add_checkpoint(parser)
    parser.add_argument('folder', metavar='DIR', help='folder to write')
    parser.add_argument('--dtype', choices=tuple(DTYPES), default='float32', help='type of the weights in the file '
                        '(default: float32)')
    parser.add_argument('--results', default='', metavar='FILE',
                        help='sizes.json of mixsize evaluate with the accuracies for the card (default: the run\'s)')
    parser.add_argument('--license', default='unknown', metavar='ID',
                        help='license of the model, as the hub has them, such as apache-2.0')
    parser.add_argument('--dataset', default='', metavar='ID',
                        help='what the card calls the data set (default: its name or folder)')
    parser.add_argument('--description', default='', metavar='TEXT', help='what the card begins with')
    parser.add_argument('--repo-id', default='', metavar='ORG/NAME',
                        help='where it will be, for the card (default: filled in by mixsize hub push)')


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser('verify', help='check a folder in the hub\'s layout')
    parser.add_argument('folder', metavar='DIR', help='the folder')


def _add_push(commands: Any) -> None:
    parser = commands.add_parser('push', help='verify a folder and publish it, in one commit')
    parser.add_argument('folder', metavar='DIR', help='what mixsize hub export wrote')
    parser.add_argument('repository', metavar='ORG/NAME', help='repository of the hub; made if there is none')
    parser.add_argument('--private', action='store_true', default=False, help='make a repository that is private')
    parser.add_argument('--revision', default=None, metavar='BRANCH', help='branch; made if there is none (default: '
                        'main)')
    parser.add_argument('--pull-request', action='store_true', default=False,
                        help='open a pull request instead of a commit to the branch')
    parser.add_argument('--message', default='', metavar='TEXT', help='title of the commit')
    parser.add_argument('--overwrite', action='store_true', default=False,
                        help='replace a model that is there already (older ones stay in its history)')


def _add_pull(commands: Any) -> None:
    parser = commands.add_parser('pull', help='fetch a repository into a folder, and verify it')
    parser.add_argument('repository', metavar='ORG/NAME', help='repository of the hub, or ORG/NAME@REVISION')
    parser.add_argument('folder', nargs='?', default='', metavar='DIR', help='folder to write (default: NAME)')
    parser.add_argument('--overwrite', action='store_true', default=False, help='replace what is there')


def _add_onnx(commands: Any) -> None:
    parser = commands.add_parser('onnx', help='write an ONNX file')
    _add_checkpoint(parser)
    parser.add_argument('file', metavar='FILE', help='file to write')


def verify(folder: str) -> str:
    """Check a folder as a whole: that it loads, that its parts agree, and that it holds nothing but a model.

    Args:
        folder: The folder.

    Returns:
        What it is, in a line.

    Raises:
        UsageError: Something is wrong with it.
    """
    if not os.path.isdir(folder):
        raise UsageError(f'no folder at {folder}')
    for name in sorted(os.listdir(folder)):
        if is_pickle(name):
            raise UsageError(f'{folder} holds {name}, which can run code when it is read: take it out')
    for name in (CONFIG_FILE, MODEL_FILE, CARD_FILE):
        if not os.path.isfile(os.path.join(folder, name)):
            raise UsageError(f'{folder} has no {name}: mixsize hub export writes such a folder')
    check_tokens(folder)
    found = find_checkpoint(folder)
    config, stats = read_config(folder), found.statistics()
    ours = config.get(KEY, {})
    model: Any = found.create()
    _verify_model(folder, model)
    _verify_statistics(folder, model, stats, ours)
    _verify_card(folder, model, ours)
    size = model.pretrained_cfg['input_size'][-1]
    return (f'{folder} is whole: {config["architecture"]} for {size} px'
            + (f', statistics for {", ".join(map(str, stats.sizes))} px' if stats else ''))


@torch.inference_mode()
def _verify_model(folder: str, model: Any) -> None:
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UsageError(f'{folder}: {name} has values that are not finite')
    size = resolve_model_data_config(model)['input_size']
    with refusing(f'{folder} does not take images of {size[-2]}x{size[-1]} px'):
        logits = model(torch.zeros(1, *size))
    if logits.shape != (1, model.num_classes) or not torch.isfinite(logits).all():
        raise UsageError(f'{folder} gives {list(logits.shape)} logits, not {model.num_classes} finite ones')


def _verify_statistics(folder: str, model: Any, stats: Optional[BatchNormStats], ours: Dict[str, Any]) -> None:
    size = ours.get('img_size')
    if stats is not None and stats.weights != fingerprint(model):
        raise UsageError(f'{folder}: its statistics are of other weights')
    if ours.get('statistics') != CALIBRATED:
        return
    if stats is None or size not in stats.by_size or stats.digest(size) != digest(model):
        raise UsageError(f'{folder}: its weights do not have the statistics calibrated for {size} px')


def _verify_card(folder: str, model: Any, ours: Dict[str, Any]) -> None:
    """Check that the card can be read, and shows what was measured."""
    path = os.path.join(folder, CARD_FILE)
    with refusing(f'{path} is no model card'):
        card = ModelCard.load(path)
        data: Any = card.data
        missing = [name for name in ('license', 'library_name', 'pipeline_tag') if not data.get(name)]
    if missing:
        raise UsageError(f'{path} has no {missing[0]} in its header')
    if PLOT_FILE in card.text and not os.path.isfile(os.path.join(folder, PLOT_FILE)):
        raise UsageError(f'{path} shows {PLOT_FILE}, which is not there')
    shown = {(result.metric_name, result.metric_value) for result in data.get('eval_results') or ()}
    results = _results(folder)
    if not ours or (not shown and not results):
        return
    size, expected = model.pretrained_cfg['input_size'][-1], eval_results(results, '', '', ours['statistics'],
                                                                          ours['img_size'])
    if shown != {(result.metric_name, result.metric_value) for result in expected} or size != ours['img_size']:
        raise UsageError(f'{path} shows other results than {SIZES_FILE}')


def _results(folder: str) -> Optional[Dict[str, Any]]:
    path = os.path.join(folder, SIZES_FILE)
    if not os.path.isfile(path):
        return None
    with refusing(f'{path} holds no results'), open(path, encoding='utf-8') as file:
        results = json.load(file)['checkpoints'][0]
        return {**results, 'results': list(results['results'])}


def push(args: argparse.Namespace) -> None:
    """Publish a folder, in one commit: until that is made nothing of what is there changes."""
    verify(args.folder)
    if get_token() is None:
        raise UsageError('no token for the hub: "hf auth login" keeps one, or set HF_TOKEN')
    api, repo = HfApi(**LIBRARY), args.repository
    with hub_errors(f'cannot push to {repo}'):
        made = _open_repository(api, args)
        with tempfile.TemporaryDirectory() as aside:
            for name in HUB_FILES:  # nothing else that may lie there
                if os.path.isfile(os.path.join(args.folder, name)):
                    shutil.copyfile(os.path.join(args.folder, name), os.path.join(aside, name))
            _name_in_card(os.path.join(aside, CARD_FILE), repo)
            try:
                commit = api.upload_folder(
                    repo_id=repo, folder_path=aside, revision=args.revision, create_pr=args.pull_request,
                    commit_message=args.message or f'Model by mixsize-timm {LIBRARY["library_version"]}')
            except BaseException:
                if made:
                    print(f'{NAME}: {repo} was made, and is empty', file=sys.stderr)
                raise
    where = commit.pr_url if args.pull_request else f'{api.endpoint}/{repo}'
    at = f'@{args.revision}' if args.revision and not args.pull_request else ''
    print(f'{args.folder} is published: {where}\n'
          f'timm.create_model({f"hf-hub:{repo}{at}"!r}, pretrained=True) loads it'
          + (' when it is merged' if args.pull_request else ''))


def _open_repository(api: HfApi, args: argparse.Namespace) -> bool:
    """Find or make the repository and the branch; whether the repository was made."""
    repo, branch = args.repository, args.revision or 'main'
    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=args.private or None)
        if branch != 'main':
            api.create_branch(repo, branch=branch)
        return True
    if args.private and not info.private:
        raise UsageError(f'{repo} is there already, and is public: choose another name, or leave out --private')
    branches = {ref.name for ref in api.list_repo_refs(repo).branches}
    if branch not in branches:
        api.create_branch(repo, branch=branch)
    there = [name for name in HUB_FILES if name in api.list_repo_files(repo, revision=branch)]
    if there and not args.overwrite and not args.pull_request:
        raise UsageError(f'{repo} already holds {there[0]}: --overwrite replaces the model (the old one stays in its '
                         'history), --pull-request proposes it')
    return False


def _name_in_card(path: str, repo: str) -> None:
    with open(path, encoding='utf-8', newline='') as file:
        text = file.read()
    with open(path, 'w', encoding='utf-8', newline='') as file:
        file.write(text.replace(f'hf-hub:{REPO_PLACEHOLDER}', f'hf-hub:{repo}'))


def pull(args: argparse.Namespace) -> None:
    """Fetch a repository into a folder, which appears when the whole of it is there and in order."""
    folder = args.folder or args.repository.partition('@')[0].rpartition('/')[2]
    there = [name for name in HUB_FILES if os.path.exists(os.path.join(folder, name))]
    if there and not args.overwrite:
        raise UsageError(f'{folder} already holds {there[0]}: choose another folder, or --overwrite')
    check_writable(folder)
    cached = fetch(args.repository, HUB_FILES)
    verify(cached)
    with refusing(f'cannot write to {folder}'), staged(folder) as aside:
        for name in os.listdir(cached):
            if name in HUB_FILES:
                shutil.copyfile(os.path.join(cached, name), os.path.join(aside, name))
    print(f'{args.repository} is in {folder}\n{verify(folder)}')


_COMMANDS: Dict[str, Tuple[Callable[[argparse.Namespace], None], str]] = {  # and what Ctrl-C leaves
    'export': (lambda args: Export(args).run(), 'nothing was written'),
    'verify': (lambda args: print(verify(args.folder)), 'nothing was changed'),
    'push': (push, 'the commit was not made, unless it was being made at this moment'),
    'pull': (pull, 'nothing was written; what was fetched stays in the cache'),
    'onnx': (lambda args: OnnxExport(args).run(), 'nothing was written'),
}


if __name__ == '__main__':
    sys.exit(main())
