"""The benchmarks' own arithmetic; what they measure is not measured here."""
import contextlib
import importlib
import io
import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixsize_timm.regime import ADAPT_MODES, Regime

ROOT = Path(__file__).parents[1]
COMMANDS = ('loader', 'sampler', 'smoothing', 'step', 'epoch', 'train_vs_timm', 'growth')


@pytest.fixture(scope='module', autouse=True)
def benchmarks():
    """The commands can be imported by their names, and are forgotten afterwards."""
    sys.path.insert(0, str(ROOT / 'benchmarks'))
    yield
    sys.path.remove(str(ROOT / 'benchmarks'))
    for name in (*COMMANDS, 'common', 'parity'):
        sys.modules.pop(name, None)


def load(name):
    return importlib.import_module(name)


def test_each_command_says_what_it_does(monkeypatch):
    for name in COMMANDS:
        monkeypatch.setattr(sys, 'argv', [name, '--help'])
        output = io.StringIO()
        with pytest.raises(SystemExit) as end, contextlib.redirect_stdout(output):
            load(name).main()
        assert end.value.code == 0 and '--overwrite' in output.getvalue()
        text = (ROOT / 'benchmarks' / 'README.md').read_text(encoding='utf-8')
        assert f'python benchmarks/{name}.py' in text


def test_arms_are_measured_in_turn_and_the_first_round_does_not_count():
    called = []

    def arm(name, factor):
        return lambda: called.append(name) or factor * (1 if len(called) <= 3 else 10)

    figures = load('common').measure({name: arm(name, factor) for name, factor in zip('abc', (1., 2., 3.))}, rounds=2)
    assert called == list('abcabcabc') and figures == {'a': [10, 10], 'b': [20, 20], 'c': [30, 30]}


def test_a_ratio_is_of_the_same_round():
    """A machine that slows down to a half changes no ratio."""
    figures = {'a': [8., 4., 2.], 'b': [4., 2., 1.]}
    assert load('common').ratio(figures, 'a', 'b') == 2
    with pytest.raises(ValueError):
        load('common').ratio({'a': [1.], 'b': [1., 2.]}, 'a', 'b')


def test_a_verdict_says_what_is_wanted():
    verdict = load('common').verdict
    assert verdict(1.6, at_least=1.6) == 'at least 1.6: met' and verdict(1.5, at_least=1.6).endswith('NOT MET')
    assert verdict(1.3, at_most=1.3) == 'at most 1.3: met' and verdict(1.4, at_most=1.3).endswith('NOT MET')
    assert verdict(float('nan'), at_most=1.3).endswith('NOT MET')


def test_a_result_is_not_replaced_unasked_and_says_where_it_comes_from(tmp_path, monkeypatch, capsys):
    common, file = load('common'), tmp_path / 'result.json'
    monkeypatch.setattr(sys, 'argv', ['loader', '--json', str(file)])
    args = common.parse_args(common.make_parser('What.'), 'loader')
    common.write(args, {'figure': 1})
    document = json.loads(file.read_text())
    assert document['results'] == {'figure': 1} and document['command'].startswith('python benchmarks/loader.py --json')
    assert {'commit', 'date', 'machine', 'versions', 'cores', 'threads'} <= document.keys()
    with pytest.raises(SystemExit):
        common.parse_args(common.make_parser('What.'), 'loader')
    assert 'exists: name another file with --json, or add --overwrite' in capsys.readouterr().err
    monkeypatch.setattr(sys, 'argv', [*sys.argv, '--overwrite'])
    common.write(common.parse_args(common.make_parser('What.'), 'loader'), {'figure': 2})
    assert json.loads(file.read_text())['results'] == {'figure': 2} and len(list(tmp_path.iterdir())) == 1


@given(adapt=st.sampled_from(ADAPT_MODES), preset=st.sampled_from(('s144', 's224')), batch=st.integers(8, 300))
def test_timms_scheduled_loader_gets_the_shares_of_delivered_images(adapt, preset, batch):
    """timm draws batches with the weights; what is expected of it has the shares of images with their duplicates."""
    loader, regime = load('loader'), Regime.preset(preset, 224, batch_size=batch, adapt=adapt)
    batches, weights = loader.delivered(regime)
    assert batches == [regime.group(size)[0] * regime.group(size)[1] for size in regime.sizes]
    timms = loader.shares(dict(enumerate(b * w for b, w in zip(batches, weights))))
    ours = loader.shares({i: p * regime.group(size)[1] for i, (size, p) in enumerate(zip(regime.sizes, regime.probs))})
    assert timms == pytest.approx(ours)


def test_the_chosen_seed_gives_an_epoch_of_these_shares(monkeypatch):
    loader, regime = load('loader'), Regime.preset('s144', 224, batch_size=32, adapt='d+')
    monkeypatch.setattr(loader, 'SEEDS', 60)
    batches, weights = loader.delivered(regime)
    seed = loader.nearest_seed(3072, batches, weights)
    schedule = loader.ScheduledBatchSampler(range(3072), batches, weights, seed).schedule
    counts = {choice: sum(b for c, b in schedule if c == choice) for choice in range(len(batches))}
    wanted = loader.shares(dict(enumerate(b * w for b, w in zip(batches, weights))))
    assert sum(abs(share - wanted[choice]) for choice, share in loader.shares(counts).items()) < 0.1


def test_steady_speed_is_read_from_the_log_lines_of_both_scripts():
    steady = load('train_vs_timm').steady
    timms = ['Train: 0 [   0/11 (  0%)]  Loss: 2.3', 'Train: 1 [   0/11 (  0%)]  Loss', 'Train: 1 [  10/11 (100%)]']
    ours = ['Train 0 [   1/11]  32 px', 'Train 1 [   1/11]  32 px', 'nothing', 'Train 1 [  11/11]  32 px']
    for lines in (timms, ours):
        assert steady([(2. * number, line) for number, line in enumerate(lines)], 8) == 8 * 10 / (2 * (len(lines) - 2))
    with pytest.raises(ValueError, match='no two log lines'):
        steady([(0., timms[0]), (1., timms[1])], 8)


def test_growth_of_memory_is_from_where_it_has_settled():
    growth = load('growth').growth
    assert growth([50.] * 10 + [100.] * 190) == 1
    assert growth([100.] * 180 + [103.] * 20) == pytest.approx(1.03)


def test_the_loop_smooths_as_the_smoother_does():
    smoothing = load('smoothing')
    torch = smoothing.torch
    smoothers = smoothing.GradientSmoother(), smoothing.LoopSmoother()
    for scale in (1., 4., 0.5):
        grads = []
        for smoother in smoothers:
            parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 5)]
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, scale)
            smoother(parameters)
            grads.append(torch.cat([parameter.grad for parameter in parameters]))
        torch.testing.assert_close(*grads)


def test_the_script_for_a_gpu_ends_in_time():
    """Nine minutes, of which the last part needs a checkout of timm that is not asked for."""
    script = (ROOT / 'benchmarks' / 'gpu.sh').read_text(encoding='utf-8')
    limits = [int(limit) for limit in re.findall(r'^(?:\[.*\] && )?part (\d+) ', script, re.M)]
    assert len(limits) == 7 and sum(limits) <= 9 * 60
