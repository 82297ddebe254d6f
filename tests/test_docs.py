"""The figures in the documents are those of the files they come from."""
import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def digits_benchmark():
    spec = importlib.util.spec_from_file_location('digits', ROOT / 'benchmarks' / 'digits.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_the_digits_is_what_was_measured():
    runs = json.loads((ROOT / 'benchmarks' / 'results' / 'digits-resnet50-cpu.json').read_text())['runs']
    assert digits_benchmark().table(runs) in (ROOT / 'docs' / 'digits.md').read_text(encoding='utf-8')


def test_the_first_command_reaches_what_it_promises():
    runs = json.loads((ROOT / 'benchmarks' / 'results' / 'digits-resnet50-cpu.json').read_text())['runs']
    ours = [run for run in runs if run['arm'] == digits_benchmark().MIXSIZE]
    assert sorted(run['seed'] for run in ours) == [42, 43, 44]
    accuracies = [row['top1'] for run in ours for row in run['results']]
    assert sum(accuracies) / len(accuracies) >= 97 and min(accuracies) >= 95


def test_links_between_documents_lead_somewhere():
    import re
    for document in [*ROOT.glob('*.md'), *ROOT.glob('docs/*.md')]:
        for target in re.findall(r'\]\(([^)#]+)\)', document.read_text(encoding='utf-8')):
            assert target.startswith('http') or (document.parent / target).exists(), (document.name, target)
