"""The figures in the documents are those of the files they come from."""
import importlib
import json
import re
import sys
from pathlib import Path

from mixsize_timm.curves import make_curves

ROOT = Path(__file__).parents[1]


def benchmark(name):
    sys.path.insert(0, str(ROOT / 'benchmarks'))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def digits_benchmark():
    return benchmark('digits')


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


def test_the_table_of_the_four_settings_is_that_of_the_report():
    document = json.loads((ROOT / 'docs' / 'sizes' / 'sizes.json').read_text())
    assert benchmark('sizes').table(document) in (ROOT / 'docs' / 'sizes.md').read_text(encoding='utf-8')


def test_one_model_serves_all_sizes_and_a_fixed_one_falls():
    module = benchmark('sizes')
    document = json.loads((ROOT / 'docs' / 'sizes' / 'sizes.json').read_text())
    curves = {curve.name: curve for curve in make_curves(document['checkpoints'])}
    assert all(curve.runs == 3 and curve.sizes == (16, 24, 32, 48) for curve in curves.values())
    assert min(curves['MixSize D+'].value) >= 97
    assert min(curves[module.FIXED].value) < 50
    cost = [curve.training['steps'] for curve in curves.values()]
    pixels = [run['training']['megapixels'] for run in document['checkpoints']]
    assert max(cost) / min(cost) < 1.05 and max(pixels) / min(pixels) < 1.1


def test_the_tables_of_calibration_are_what_was_measured():
    module = benchmark('calibration')
    runs = json.loads((ROOT / 'benchmarks' / 'results' / 'calibration-digits-resnet18-cpu.json').read_text())['runs']
    text = (ROOT / 'docs' / 'method.md').read_text(encoding='utf-8')
    assert module.table(runs, module.KNOWN) in text and module.table(runs, module.BETWEEN) in text
