"""A run that is killed again and again ends as one that was left alone; the full form is a benchmark."""
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_killed_run_ends_with_the_same_files(tmp_path):
    command = [sys.executable, ROOT / 'benchmarks' / 'kill.py', '--kills', '2', '--epochs', '1', '--seconds', '1.5',
               '--seed', '4', '--json', tmp_path / 'result.json']
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500,
                            env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    found = json.loads((tmp_path / 'result.json').read_text())
    assert len(found['kills']) == 2 and found['runs'] >= 1 and found['different'] == []


def test_the_recorded_result_is_of_thirty_kills_some_of_them_while_a_checkpoint_was_written():
    found = json.loads((ROOT / 'benchmarks' / 'results' / 'kill-cpu.json').read_text())
    saving = sum(bool(kill['half_written']) for kill in found['kills'])
    assert len(found['kills']) == 30 and saving >= 5 and found['different'] == [] and found['runs'] >= 1
    assert f'| {saving} of those 30 |' in (ROOT / 'docs' / 'reliability.md').read_text(encoding='utf-8')
