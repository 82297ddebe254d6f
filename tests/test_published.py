"""The model that is published in ``hub/`` is what its card says."""
import json
import os
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard

from mixsize_timm import evaluate, load
from mixsize_timm.export import HUB_FILES
from mixsize_timm.verify import verify

ROOT = Path(__file__).parents[1]
MODELS = sorted(path.parent for path in (ROOT / 'hub').glob('*/config.json'))
DATA = Path(os.environ.get('MIXSIZE_DATA', ROOT.parent / 'shared' / 'data')) / 'clothing-224'


@pytest.fixture(params=MODELS, ids=lambda folder: folder.name)
def published(request):
    return request.param


def test_there_is_one():
    assert len(MODELS) == 1


def test_it_is_whole_small_and_in_order(published):
    assert {path.name for path in published.iterdir()} == set(HUB_FILES)
    assert (published / 'model.safetensors').stat().st_size < 10e6
    assert 'statistics for' in verify(str(published))
    card = ModelCard.load(published / 'README.md')
    assert card.data.license != 'unknown' and card.data.datasets and f'# {published.name}' in card.text


def test_its_card_names_the_sizes_near_its_best(published):
    (entry,) = json.loads((published / 'sizes.json').read_text())['checkpoints']
    best = max(row['top1'] for row in entry['results'])
    near = [str(row['img_size']) for row in entry['results'] if row['top1'] >= best - 1]
    assert f'is within a point of its best at {", ".join(near)} px;' in (published / 'README.md').read_text()


def test_timm_loads_it_with_the_statistics_of_its_size(published):
    model = timm.create_model(f'local-dir:{published}', pretrained=True).eval()
    config = json.loads((published / 'config.json').read_text())['mixsize']
    size = config['img_size']
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(model(images), load(str(published))(images))
        assert torch.equal(model(images), load(str(published), img_size=size)(images))
        other = next(other for other in config['calibrated_sizes'] if other != size)
        assert not torch.equal(model(images), load(str(published), img_size=other)(images))


@pytest.mark.skipif(not DATA.is_dir(), reason=(
    'the photographs it was measured on are not part of this repository, and the tests fetch nothing: the tests before '
    'this one load the model, and hold its card to its results; set MIXSIZE_DATA to the folder that has clothing-224/ '
    'to measure it again'))
def test_its_figures_are_repeated(published, tmp_path, monkeypatch):
    original = evaluate.validate
    own = {'loss': 0., 'top1': 0., 'top5': 0.}  # of its own statistics at each size, which the card does not show
    monkeypatch.setattr(evaluate, 'validate', lambda models, *args: [own, *original(models[1:], *args)])
    card = ModelCard.load(published / 'README.md')
    shown = {result.metric_name: result.metric_value for result in card.data.eval_results}
    (entry,) = json.loads((published / 'sizes.json').read_text())['checkpoints']
    sizes = [str(row['img_size']) for row in entry['results']]
    assert evaluate.main([str(published), '--dataset', f'hfds/{DATA}', '--val-split', entry['data']['split'], '--sizes',
                          *sizes, '--calibrate', 'kept', '--no-speed', '-j', '2', '--output', str(tmp_path)]) == 0
    (again,) = json.loads((tmp_path / 'sizes.json').read_text())['checkpoints']
    assert len(again['results']) == len(sizes) > 5
    for row in again['results']:
        assert row['top1'] == pytest.approx(shown[f'top-1 (%) at {row["img_size"]} px'], abs=1e-9)
        assert row['top5'] == pytest.approx(shown[f'top-5 (%) at {row["img_size"]} px'], abs=1e-9)
