"""The figures in the documents are those of the files they come from."""
import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def digits_benchmark():
    spec = importlib.util.spec_from_file_location('digits', ROOT / 'benchmarks' / 'digits.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results():
    return json.loads((ROOT / 'benchmarks' / 'results' / 'digits-resnet50-cpu.json').read_text())['runs']


def test_the_table_of_the_digits_is_what_was_measured():
    assert digits_benchmark().table(results()) in (ROOT / 'docs' / 'digits.md').read_text(encoding='utf-8')


def test_the_readmes_table_is_of_the_same_runs():
    module = digits_benchmark()
    rows = [line.split('|') for line in module.table(results()).splitlines()]
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    for arm, statistics in ((module.MIXSIZE, 'calibrated'), (module.MIXSIZE, 'running'),
                            ('timm, fixed 32 px', 'running')):
        cells = next(row[5:9] for row in rows if row[1].strip() == arm and row[4].strip() == statistics)
        assert '|'.join(cells) in readme, arm


def test_the_first_command_reaches_what_it_promises():
    ours = [run for run in results() if run['arm'] == digits_benchmark().MIXSIZE]
    assert sorted(run['seed'] for run in ours) == [42, 43, 44]
    accuracies = [row['top1'] for run in ours for row in run['results']]
    assert sum(accuracies) / len(accuracies) >= 97 and min(accuracies) >= 95


def test_links_between_documents_lead_somewhere():
    for document in [*ROOT.glob('*.md'), *ROOT.glob('docs/*.md')]:
        for target in re.findall(r'\]\(([^)#]+)\)', document.read_text(encoding='utf-8')):
            assert target.startswith('http') or (document.parent / target).exists(), (document.name, target)


def test_the_table_of_the_photographs_is_that_of_the_log():
    log = (ROOT / 'docs' / 'logs' / 'clothing-resnet18-96.txt').read_text()
    rows = re.findall(r'^\| (\d+) \| ([\d.]+) \| ([\d.]+) \|$', (ROOT / 'docs' / 'clothing.md').read_text(), re.M)
    assert len(rows) == 7
    for row in rows:
        assert re.search(r'^ +{} +{} +{}$'.format(*row), log, re.M), row
