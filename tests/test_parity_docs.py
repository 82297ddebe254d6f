"""docs/parity.md shows what benchmarks/results/parity.json holds, and that is what the script compares."""
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def parity():
    spec = importlib.util.spec_from_file_location('parity', ROOT / 'benchmarks' / 'parity.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def document():
    return json.loads((ROOT / 'benchmarks' / 'results' / 'parity.json').read_text(encoding='utf-8'))


def test_the_document_shows_the_measured_figures(parity, document):
    text = (ROOT / 'docs' / 'parity.md').read_text(encoding='utf-8')
    for name, body in parity.sections(document).items():
        assert f'<!-- {name} -->\n{body}<!-- /{name} -->\n' in text, name


def test_the_settings_measured_are_those_of_the_script(parity, document):
    assert {run['name']: run['options'] for run in document['runs']} == {
        name: options.split() for name, options in parity.SETTINGS.items()}
    assert document['common'] == [*parity.COMMON.split(), '--seed', str(document['seed']), '--workers', '0']
    assert document['ours'] == parity.OURS


def test_the_verdicts_follow_from_the_figures(parity, document):
    for run in document['runs']:
        assert parity.compare(run) == {key: run[key] for key in ('verdict', 'differences')}, run['name']
        expected = 'rounded' if run['name'] in parity.ROUNDED else 'pass'
        assert run['verdict'] == expected, run['name']


def test_no_setting_is_another_under_a_second_name(parity, document):
    figures = [json.dumps(run['mixsize']) for run in document['runs']
               if run['name'] not in parity.PRELUDES]  # trained as a setting before, beside another timm
    assert len(set(figures)) == len(figures)


def test_a_difference_fails(parity):
    rows = [{'epoch': 0, 'train_loss': 1., 'eval_loss': 1., 'eval_top1': 50.}]

    def verdict(name='sgd', **changes):
        return parity.compare({'name': name, 'timm': {'epochs': rows}, 'mixsize': {'epochs': [{**rows[0], **changes}]}}
                              )['verdict']

    assert verdict() == verdict(eval_top1=50.00009) == 'pass'
    assert verdict(train_loss=1.0002) == verdict(eval_loss=float('nan')) == verdict(epoch=1) == 'FAIL'
    assert verdict('model-dtype', eval_loss=1.1) == 'rounded' and verdict('model-dtype', train_loss=1.1) == 'FAIL'
    assert parity.compare({'name': 'sgd', 'timm': {'error': 'x'}, 'mixsize': {'epochs': rows}}) == {'verdict': 'FAIL'}
