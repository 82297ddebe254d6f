"""timm's options and ours: none is missing, the same ones agree, and the page that lists them is up to date."""
import json
import os
import re
import subprocess
import sys

import pytest
import timm_arguments
from timm_arguments import DOCS, FACTS, ROOT, VERDICTS, facts_of, name_of, our_actions

from mixsize_timm.args import parse_args
from mixsize_timm.parser import UsageError, build_parser

TIMM = json.loads(FACTS.read_text(encoding='utf-8'))
OPTIONS = {name_of(option['strings'], option['dest']): option for option in TIMM['options']}
LATER = {name_of(option['strings'], option['dest']): option for option in TIMM['later_options']}
REFUSED = {name for name, (status, _) in VERDICTS.items() if status == 'refused'}
OFF = ['--data-dir', 'x', '--mixsize', 'off']


def arguments_with(name):
    """The option with a value that is not its default."""
    action = our_actions()[name]
    if action.nargs == 0:
        return [name]
    value = next(choice for choice in action.choices if choice != action.default) if action.choices else '3'
    return [name, value]


def test_every_option_of_timm_is_taken_or_refused_on_purpose():
    assert {*OPTIONS, *LATER} - our_actions().keys() == REFUSED


def test_every_option_is_written_as_in_timm():
    actions, different = our_actions(), []
    for name, theirs in OPTIONS.items():
        ours = facts_of(actions[name])
        different += [(name, fact, theirs.get(fact), ours.get(fact))
                      for fact in ('strings', 'dest', 'type', 'nargs', 'const', 'flag')
                      if ours.get(fact) != theirs.get(fact)]
        if not {*theirs.get('choices', ())} <= {*ours.get('choices', ())}:  # ours may list what timm checks later
            different.append((name, 'choices', theirs['choices'], ours.get('choices')))
    assert different == []


def test_the_defaults_of_the_same_options_are_timms():
    ours = vars(parse_args(OFF))
    ours['data_dir'] = build_parser().get_default('data_dir')  # here it is given
    if ours['decay_epochs'] is None:  # timm 1.0.31's scheduler then takes 90, but for schedules that the snapshot lacks
        ours['decay_epochs'] = 90
    assert [(name, theirs['default'], ours[theirs['dest']]) for name, theirs in OPTIONS.items()
            if VERDICTS.get(name, ('same',))[0] == 'same' and ours[theirs['dest']] != theirs['default']] == []


def test_what_is_known_of_a_later_option_agrees():
    actions = our_actions()
    for name in LATER.keys() - REFUSED:
        theirs, ours = LATER[name], facts_of(actions[name])
        assert [theirs['strings'], theirs['dest']] == [ours['strings'], ours['dest']]
        for fact in ('type', 'default', 'nargs'):
            assert theirs.get(fact) in (None, ours.get(fact)), (name, fact)


@pytest.mark.parametrize('name, needed', [
    (name, needed) for name, (_, note) in VERDICTS.items()
    for needed in re.findall(r'^needs `([^`]+)`(?: and `[^`]+`)?, refused without', note)])
def test_an_option_is_refused_without_the_one_it_needs(name, needed):
    with pytest.raises(UsageError, match=f'{name} needs {needed}'):
        parse_args(OFF + arguments_with(name))


@pytest.mark.parametrize('name', [name for name, (_, note) in VERDICTS.items() if 'refused with MixSize' in note])
def test_what_mixsize_cannot_have_is_refused_with_it(name):
    with pytest.raises(UsageError, match=f'{name}.* MixSize'):
        parse_args(['--data-dir', 'x', '--mixsize', 's224', *arguments_with(name)])


def test_an_option_of_timms_sweep_is_an_unknown_argument():
    for name in REFUSED:
        with pytest.raises(UsageError, match=f'unrecognized arguments: {name}'):
            parse_args([*OFF, name, 'x'])


def test_a_name_can_be_cut_short_as_in_timms_documentation():
    assert parse_args([*OFF, '--jsd', '--aug-splits', '3']).loss == 'jsd'


def test_every_verdict_is_of_an_option_that_exists():
    assert VERDICTS.keys() <= {*OPTIONS, *LATER}
    assert {status for status, _ in VERDICTS.values()} == {'same', 'mapped', 'refused'}


def test_every_option_that_a_note_names_exists():
    ours = our_actions()
    for name, (_, note) in VERDICTS.items():
        for code in re.findall(r'`(--[^`]+)`', note):
            option, *values = code.split()
            assert option in ours, (name, code)
            assert not values or not ours[option].choices or values[0] in ours[option].choices, (name, code)


def test_the_page_is_what_the_generator_makes():
    assert DOCS.read_text(encoding='utf-8') == timm_arguments.make_docs(), \
        f'run: python tests/timm_arguments.py --write-docs   (it makes {DOCS.relative_to(ROOT)})'


@pytest.mark.skipif('TIMM_CHECKOUT' not in os.environ, reason=(
    "timm's wheel has no train.py, and the tests fetch nothing: the tests before this one hold our options to the "
    'facts kept in timm_arguments.json; set TIMM_CHECKOUT to a clone of its repository to compare those with it'))
def test_the_facts_are_those_of_a_timm_checkout():
    program = 'import sys, timm_arguments; sys.stdout.write(timm_arguments.read_timm(sys.argv[1]))'
    read = subprocess.run(  # a process of its own: here timm is the installed one
        [sys.executable, '-c', program, os.path.abspath(os.environ['TIMM_CHECKOUT'])],
        cwd=ROOT / 'tests', check=True, capture_output=True, text=True)
    assert read.stdout == FACTS.read_text(encoding='utf-8'), \
        'run: python tests/timm_arguments.py $TIMM_CHECKOUT; python tests/timm_arguments.py --write-docs'


def test_help_fits_80_columns(monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    assert [line for line in build_parser().format_help().splitlines() if len(line) > 80] == []


def test_every_option_has_help():
    assert [action.dest for action in build_parser()._actions if not action.help] == []


def test_every_option_is_in_a_group_with_a_title_of_its_own():
    parser = build_parser()
    titles = [group.title for group in parser._action_groups]
    assert all(titles) and len(set(titles)) == len(titles)
    untitled = [action for group in (parser._positionals, parser._optionals) for action in group._group_actions]
    assert sorted(action.dest for action in untitled) == ['config', 'data', 'help', 'recipe']
    grouped = [action for group in parser._action_groups for action in group._group_actions]
    assert sorted(map(id, grouped)) == sorted(map(id, parser._actions))
