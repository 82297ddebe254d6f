"""Publish models on the Hugging Face hub, and fetch them: ``mixsize hub export | verify | push | pull | onnx``."""
import argparse
import logging
import os
import re
import shutil
import sys
import tempfile
from typing import Any, Callable, Dict, List, Optional, Tuple

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import RepositoryNotFoundError, validate_repo_id

from .card import CALIBRATED, CARD_FILE, OWN
from .errors import UsageError, check_writable, refusing, run_command
from .export import DTYPES, HUB_FILES, Export, OnnxExport, present
from .layout import CONFIG_FILE, KEY, LIBRARY, fetch, hub_errors, read_config, staged, write_config
from .parser import Parser
from .verify import verify

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
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    if getattr(args, 'img_size', None) is not None and args.img_size < 1:
        raise UsageError(f'--img-size must be at least 1, not {args.img_size}')
    if not re.fullmatch('[a-z0-9][a-z0-9.+-]*', getattr(args, 'license', 'mit')):
        raise UsageError(f'--license takes an identifier of the hub, such as apache-2.0, not {args.license!r}')
    if getattr(args, 'pull_request', False) and args.revision:
        raise UsageError('--pull-request is to main: leave out --revision')
    repo = getattr(args, 'repository', getattr(args, 'repo_id', '') or None)
    if repo is not None:
        repo = repo.partition('@')[0] if args.command == 'pull' else repo
        if repo.count('/') != 1:
            raise UsageError(f'a repository of the hub is ORG/NAME, not {repo!r}')
        with refusing():
            validate_repo_id(repo)


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


def push(args: argparse.Namespace) -> None:
    """Publish a folder, in one commit: until that is made nothing of what is there changes."""
    if get_token() is None:
        raise UsageError('no token for the hub: "hf auth login" keeps one, or set HF_TOKEN')
    verify(args.folder)
    for name in present(args.folder):
        if os.path.islink(os.path.join(args.folder, name)):
            raise UsageError(f'{args.folder}/{name} is a link, whose target would be published: put the file there')
    api, repo = HfApi(**LIBRARY), args.repository
    with hub_errors(f'cannot push to {repo}'), tempfile.TemporaryDirectory() as aside:
        for name in present(args.folder):  # nothing else that may lie there
            shutil.copyfile(os.path.join(args.folder, name), os.path.join(aside, name))
        _name_in_card(aside, repo)
        made = _open_repository(api, args)
        try:
            commit = api.upload_folder(
                repo_id=repo, folder_path=aside, revision=args.revision, create_pr=args.pull_request,
                delete_patterns=sorted(set(HUB_FILES) - set(os.listdir(aside))),  # of a model before
                commit_message=args.message or f'Model by mixsize-timm {LIBRARY["library_version"]}')
        except BaseException:
            if made:
                print(f'{NAME}: {made} was made, without the model', file=sys.stderr)
            raise
    where = commit.pr_url if args.pull_request else f'{api.endpoint}/{repo}'
    at = f'@{args.revision}' if args.revision else ''
    print(f'{args.folder} is {"proposed" if args.pull_request else "published"}: {where}\n'
          f'timm.create_model({f"hf-hub:{repo}{at}"!r}, pretrained=True) loads it'
          + (' when it is merged' if args.pull_request else ''))


def _open_repository(api: HfApi, args: argparse.Namespace) -> str:
    """Find or make the repository and the branch; what was made."""
    repo, branch = args.repository, args.revision or 'main'
    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        if args.pull_request:
            raise
        api.create_repo(repo, private=args.private or None)
        if branch != 'main':
            api.create_branch(repo, branch=branch)
        return repo
    if args.private and not info.private:
        raise UsageError(f'{repo} is there already, and is public: choose another name, or leave out --private')
    if branch not in {ref.name for ref in api.list_repo_refs(repo).branches}:
        api.create_branch(repo, branch=branch)
        return f'the branch {branch} of {repo}'
    there = sorted(set(HUB_FILES) & set(api.list_repo_files(repo, revision=branch)))
    if there and not args.overwrite and not args.pull_request:
        raise UsageError(f'{repo} already holds {there[0]}: --overwrite replaces the model (the old one stays in its '
                         'history), --pull-request proposes it')
    return ''


def _name_in_card(folder: str, repo: str) -> None:
    """Let a card say where its model is, instead of where it was to be."""
    config, path = read_config(folder), os.path.join(folder, CARD_FILE)
    before = (config.get(KEY) or {}).get('repo_id')
    if not before:
        return
    with open(path, encoding='utf-8', newline='') as file:
        text = file.read()
    with open(path, 'w', encoding='utf-8', newline='') as file:
        file.write(text.replace(f"'hf-hub:{before}'", f"'hf-hub:{repo}'"))
    config[KEY]['repo_id'] = repo
    write_config(folder, config)


def pull(args: argparse.Namespace) -> None:
    """Fetch a repository into a folder, whose files change when the whole of it is there and in order."""
    folder = args.folder or args.repository.partition('@')[0].rpartition('/')[2]
    there = present(folder)
    if there and not args.overwrite:
        raise UsageError(f'{folder} already holds {there[0]}: choose another folder, or --overwrite')
    if there and CONFIG_FILE not in there:
        raise UsageError(f'{folder} holds {there[0]}, and no model: choose another folder')
    check_writable(folder)
    cached = fetch(args.repository, HUB_FILES)
    what = verify(cached)
    with refusing(f'cannot write to {folder}'), staged(folder, HUB_FILES) as aside:
        for name in present(cached):
            shutil.copyfile(os.path.join(cached, name), os.path.join(aside, name))
    print(f'{args.repository} is in {folder}, and whole: {what}')


_COMMANDS: Dict[str, Tuple[Callable[[argparse.Namespace], None], str]] = {  # and what Ctrl-C leaves
    'export': (lambda args: Export(args).run(), 'nothing was written'),
    'verify': (lambda args: print(f'{args.folder} is whole: {verify(args.folder)}'), 'nothing was changed'),
    'push': (push, 'the commit was not made, unless it was being made at this moment'),
    'pull': (pull, 'nothing was written; what was fetched stays in the cache'),
    'onnx': (lambda args: OnnxExport(args).run(), 'nothing was written'),
}


if __name__ == '__main__':
    sys.exit(main())
