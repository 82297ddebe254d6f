"""The three parts in somebody else's loop: plain PyTorch, Accelerate out of reach."""
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / 'README.md'

SCRIPT = """
import sys
sys.modules['accelerate'] = None  # importing it now fails
import mixsize_timm
print('imported', 'mixsize_timm.train' in sys.modules, 'argparse' in vars(mixsize_timm), flush=True)
import timm, torch
{snippet}
assert 'mixsize_timm.train' not in sys.modules
print('loss', loss.item(), 'norm', smoother.state_dict()['running_norm'])
print('trained', type(model_24).__name__)
"""


def snippet():
    """The README's lines for a loop of one's own."""
    text = README.read_text(encoding='utf-8')
    section = text[text.index('## In your own training loop'):]
    return section[section.index('```python\n') + len('```python\n'):].split('```')[0]


@pytest.fixture(scope='module')
def result():
    """What became of one process that imports the package and then runs the loop."""
    return subprocess.run([sys.executable, '-c', SCRIPT.format(snippet=snippet())], capture_output=True, text=True,
                          timeout=300)


def test_the_readmes_loop_trains_without_accelerate(result):
    assert result.returncode == 0, result.stderr[-3000:]
    assert 'trained ResNet' in result.stdout and 'norm nan' not in result.stdout


def test_the_package_imports_neither_accelerate_nor_its_own_command(result):
    assert result.stdout.startswith('imported False False\n'), result.stderr[-3000:]
