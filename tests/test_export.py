"""What is exported is the run's model, and its card says what the run's files say."""
import importlib.util
import json
import re
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import write_image_folder
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from mixsize_timm import calibrate_model, cli, evaluate, hub, load, train
from mixsize_timm import export as exporting
from mixsize_timm.bn_stats import BatchNormStats
from mixsize_timm.curves import SIZES_FILE
from mixsize_timm.export import HUB_FILES

CARD_TEMPLATE = Path(__file__).parents[1] / 'hub' / 'card.md.jinja'
TWO = ['--mixsize-sizes', '32', '48']  # the base size and another; test_resnet has all four of its regime
FAMILIES = {
    'test_resnet': [],
    'test_efficientnet': TWO,
    'mobilenetv3_small_050': TWO,
    'test_convnext': ['--img-size', '64', '--mixsize-sizes', '64', '96'],
    'regnetx_002': ['--model-kwargs', 'depth=8', *TWO],
    'vit_tiny_patch16_224': ['--img-size', '64', '--mixsize-sizes', '64', '96', '--model-kwargs',
                             'dynamic_img_size=True', 'depth=2'],
}


@pytest.fixture(scope='module', autouse=True)
def each_plot_is_drawn_once():
    """Most exports are of one run: its plot is drawn the first time, which takes as long as the rest of an export."""
    plots, draw = {}, exporting.save_against_size

    def save(path, *shown):
        if repr(shown) in plots:
            Path(path).write_bytes(plots[repr(shown)])
        else:
            draw(path, *shown)
            plots[repr(shown)] = Path(path).read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, 'save_against_size', save)
        yield


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='module')
def train_run(tmp_path_factory, images):
    """Trains a run on a few images, once for all tests that ask for the same."""
    runs = {}

    def make(*options):
        if options not in runs:
            folder = tmp_path_factory.mktemp('run')
            assert train.main(['--data-dir', str(images), '--num-classes', '2', '--img-size', '32', '-b', '12', '-j',
                               '0', '--epochs', '1', '--lr', '0.01', '--output', str(folder), '--experiment', 'run',
                               *map(str, options)]) == 0
            runs[options] = folder / 'run'
        return runs[options]

    return make


@pytest.fixture
def run(train_run):
    return train_run('--model', 'test_resnet')


@pytest.fixture(scope='module')
def exported(train_run, tmp_path_factory):
    """The export of a run, once; tests that change it take the copy."""
    return export(train_run('--model', 'test_resnet'), tmp_path_factory.mktemp('exported') / 'hub')


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / 'hub')


def export(run, folder, *options, code=0):
    assert hub.main(['export', str(run), str(folder), *map(str, options)]) == code
    return folder


def refusal(capsys, *argv):
    capsys.readouterr()
    assert hub.main([*map(str, argv)]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'Traceback' not in error
    return error


def batch(size, channels=3):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(size))


@torch.inference_mode()
def logits(model, size=32):
    return model.eval()(batch(size))


def timms(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True)


@pytest.mark.parametrize('name', FAMILIES)
def test_a_model_of_any_family_comes_back_to_the_bit(name, train_run, tmp_path, capsys):
    transformers = pytest.importorskip('transformers')
    run = train_run('--model', name, *FAMILIES[name])
    sizes = [row['img_size'] for row in json.loads((run / SIZES_FILE).read_text())['checkpoints'][0]['results']]
    base = yaml.safe_load((run / 'args.yaml').read_text())['img_size']
    for size in (base, sizes[-1]):
        folder = export(run, tmp_path / f'{size}', '--img-size', size)
        assert hub.main(['verify', str(folder)]) == 0
        expected = logits(load(str(run), img_size=size), size)
        assert torch.equal(logits(timms(folder), size), expected) and expected.std() > 0
        assert torch.equal(logits(load(str(folder)), size), expected)
        wrapped = transformers.AutoModelForImageClassification.from_pretrained(folder)
        wrapped = deepcopy(wrapped)  # out of the file, where tensors are not aligned and sums may differ in order
        with torch.inference_mode():
            assert torch.equal(wrapped.eval()(batch(size)).logits, expected)
        assert wrapped.config.id2label == {0: 'cat', 1: 'dog'}
        config = timm.data.resolve_model_data_config(timms(folder), use_test_size=True)
        assert config['input_size'] == (3, size, size)
        assert timm.data.resolve_model_data_config(timms(folder))['input_size'] == (3, size, size)
    for size in sizes:  # the folder for the last size serves the others
        assert torch.equal(logits(load(str(folder), img_size=size), size), logits(load(str(run), img_size=size), size))
    card = ModelCard.load(folder / 'README.md')
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert card.data.library_name == 'timm' and card.data.pipeline_tag == 'image-classification'
    assert yaml.safe_load((folder / 'README.md').read_text().split('---')[1]) == card.data.to_dict()


def test_the_folder_holds_the_whole_of_it_and_no_pickle(run, tmp_path, capsys):
    folder = export(run, tmp_path / 'hub')
    out = capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == sorted(HUB_FILES)
    config = json.loads((folder / 'config.json').read_text())
    assert config['label_names'] == ['cat', 'dog'] and config['num_classes'] == 2
    assert config['pretrained_cfg']['input_size'] == config['pretrained_cfg']['test_input_size'] == [3, 32, 32]
    assert config['mixsize']['regime']['sizes'] == [16, 24, 32, 48] and config['mixsize']['statistics'] == 'calibrated'
    assert BatchNormStats.load(str(folder / 'bn_stats.safetensors')).sizes == (16, 24, 32, 48)
    assert (folder / 'args.yaml').read_bytes() == (run / 'args.yaml').read_bytes()
    assert (folder / 'accuracy-against-size.png').read_bytes().startswith(b'\x89PNG')
    assert f'timm.create_model({f"local-dir:{folder}"!r}, pretrained=True) loads it' in out
    assert 'license is unknown: --license' in out


def test_the_card_says_what_the_run_did(run, tmp_path):
    folder = export(run, tmp_path / 'clothes', '--license', 'apache-2.0', '--description', 'Two kinds of noise.',
                    '--repo-id', 'me/clothes', '--dataset', 'me/noise')
    card = ModelCard.load(folder / 'README.md')
    data = card.data
    assert (data.license, data.datasets, data.metrics, data.model_name) == ('apache-2.0', ['me/noise'], ['accuracy'],
                                                                            'clothes')
    rows = json.loads((run / SIZES_FILE).read_text())['checkpoints'][0]['results']
    assert {(r.metric_name, r.metric_value, r.dataset_split) for r in data.eval_results} == {
        (f'{name} (%) at {row["img_size"]} px', row[key], 'validation')
        for row in rows for key, name in (('top1', 'top-1'), ('top5', 'top-5'))}
    start = json.loads((run / 'run.json').read_text())['starts'][0]
    for text in (start['command'], start['date'], start['versions'], start['machine'], 'Two kinds of noise.',
                 "timm.create_model('hf-hub:me/clothes', pretrained=True)", 'img_size=16', '`cat`, `dog`', '## Limits',
                 '(accuracy-against-size.png)', '@article{hoffer2019mix', 'Trained on 24 images for 1 epoch.'):
        assert text in card.text, text


def numbers(text):
    return re.findall(r'(?<![\w.-])\d(?:[\d,]*\d)?(?:\.\d+)?(?:e-?\d+)?', text)


def test_every_number_in_the_card_is_in_the_runs_own_files(train_run, tmp_path):
    run = train_run('--model', 'test_resnet', '--model-ema', '--model-ema-decay', '0.5')
    folder = export(run, tmp_path / 'clothes', '--use-ema')
    card = (folder / 'README.md').read_text()
    files = [*(run.glob('*.yaml')), *(run.glob('*.json')), run / 'last' / 'state.json']
    text = '\n'.join(path.read_text() for path in files) + CARD_TEMPLATE.read_text()
    known = set(numbers(text)) | {'1', '5', '95'}  # the names of top-1, top-5 and of the 95 % interval
    values = [float(number.replace(',', '')) for number in numbers(text)]

    def is_known(number):
        plain = number.replace(',', '')
        return plain in known or any(plain in (f'{x:.2f}', f'{x:.4f}', f'{x:.4g}', f'{x:.3g}') for x in values)

    found = numbers(card)
    assert len(found) > 60 and [number for number in found if not is_known(number)] == []
    assert not is_known('87.6543')


def test_a_number_that_the_run_does_not_have_is_noticed(copy, capsys):
    card = (copy / 'README.md').read_text()
    first = re.search(r'value: ([\d.]+)', card)
    (copy / 'README.md').write_text(card.replace(first[0], 'value: 99.99', 1))
    assert 'shows other results than sizes.json' in refusal(capsys, 'verify', copy)


def test_its_own_statistics_only_by_name(run, tmp_path):
    folder = export(run, tmp_path / 'hub', '--stats', 'own')
    assert torch.equal(logits(timms(folder)), logits(load(str(run), own_stats=True)))
    assert not torch.equal(logits(timms(folder)), logits(load(str(run))))
    assert hub.main(['verify', str(folder)]) == 0
    assert torch.equal(logits(load(str(folder))), logits(timms(folder)))  # as it was published, not switched
    assert torch.equal(logits(load(str(folder), img_size=32)), logits(load(str(run))))
    rows = json.loads((run / SIZES_FILE).read_text())['checkpoints'][0]['results']
    card = ModelCard.load(folder / 'README.md')
    assert {(r.metric_value, r.metric_args['img_size'], r.metric_args['statistics'])
            for r in card.data.eval_results if r.metric_name.startswith('top-1')} == {
        (row['top1_uncalibrated'], row['img_size'], 'own') for row in rows}
    assert 'With timm alone it has the statistics of training at every size' in card.text


def test_a_size_without_statistics_is_refused_until_they_are_made(train_run, tmp_path, capsys, images):
    run = shutil.copytree(train_run('--model', 'test_resnet'), tmp_path / 'run')
    error = refusal(capsys, 'export', run, tmp_path / 'hub', '--img-size', '40')
    assert 'no statistics calibrated for 40 px, only for 16, 24, 32, 48 px' in error and 'mixsize calibrate' in error
    assert not (tmp_path / 'hub').exists()
    assert calibrate_model.main([str(run), '--sizes', '40', '--calibrate', '1']) == 0
    folder = export(run, tmp_path / 'hub', '--img-size', '40')
    assert torch.equal(logits(timms(folder), 40), logits(load(str(run), img_size=40), 40))
    assert 'Calibrated but not measured: 40 px' in (folder / 'README.md').read_text()


def test_the_moving_average_or_the_weights_has_to_be_said(train_run, tmp_path, capsys):
    run = train_run('--model', 'test_resnet', '--model-ema', '--model-ema-decay', '0.5')
    assert 'say --use-ema or --no-use-ema' in refusal(capsys, 'export', run, tmp_path / 'hub')
    average = export(run, tmp_path / 'average', '--use-ema')
    assert torch.equal(logits(timms(average)), logits(load(str(run))))
    assert 'moving average' in (average / 'README.md').read_text()
    error = refusal(capsys, 'export', run, tmp_path / 'raw', '--no-use-ema')
    assert 'no statistics calibrated' in error  # they are of the average
    raw = export(run, tmp_path / 'raw', '--no-use-ema', '--stats', 'own')
    assert torch.equal(logits(timms(raw)), logits(load(str(run), use_ema=False, own_stats=True)))
    assert not (raw / SIZES_FILE).exists() and 'Not measured' in (raw / 'README.md').read_text()
    assert 'no moving average' in refusal(capsys, 'export', train_run('--model', 'test_resnet'), tmp_path / 'x',
                                          '--use-ema')


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_weights_of_half_the_size(run, tmp_path, dtype):
    folder = export(run, tmp_path / 'hub', '--dtype', dtype)
    tensors = load_file(folder / 'model.safetensors')
    assert tensors['conv1.0.weight'].dtype == getattr(torch, dtype)
    assert tensors['bn1.running_var'].dtype == torch.float32
    model = load(str(run))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype)).float()
    assert torch.equal(logits(timms(folder)), logits(model))
    BatchNormStats.load(str(run / 'last' / 'bn_stats.safetensors')).apply(model, 16)
    assert torch.equal(logits(load(str(folder), img_size=16), 16), logits(model, 16))
    assert hub.main(['verify', str(folder)]) == 0
    assert f'calibrated and measured with float32 weights; here they are {dtype}' in (folder / 'README.md').read_text()


def test_weights_that_float16_cannot_hold_are_refused(run, tmp_path, capsys):
    broken = shutil.copytree(run, tmp_path / 'run')
    weights = load_file(broken / 'last' / 'model.safetensors')
    weights['fc.weight'][0, 0] = 1e5
    save_file(weights, broken / 'last' / 'model.safetensors')
    options = ('--stats', 'own', '--dtype', 'float16')
    assert 'fc.weight is not finite as float16: use --dtype bfloat16' in refusal(
        capsys, 'export', broken, tmp_path / 'hub', *options)
    assert not (tmp_path / 'hub').exists()


def test_only_results_of_these_very_weights_and_statistics_reach_the_card(run, tmp_path, capsys, images):
    other = shutil.copytree(run, tmp_path / 'run')
    weights = load_file(other / 'last' / 'model.safetensors')
    weights['fc.bias'] += 1
    save_file(weights, other / 'last' / 'model.safetensors')
    folder = export(other, tmp_path / 'a', '--stats', 'own')
    out = capsys.readouterr().out
    assert 'Its card shows no accuracy' in out and 'is of other weights or statistics' in out
    assert not ModelCard.load(folder / 'README.md').data.get('eval_results')
    assert not (folder / SIZES_FILE).exists() and not (folder / 'accuracy-against-size.png').exists()
    assert 'has no results of these weights' in refusal(
        capsys, 'export', other, tmp_path / 'b', '--stats', 'own', '--results', other / SIZES_FILE)
    for name, calibrate in (('kept', 'kept'), ('made', '1')):
        assert evaluate.main([str(run), '--sizes', '24', '32', '--calibrate', calibrate, '--no-speed', '--output',
                              str(tmp_path / name)]) == 0
    folder = export(run, tmp_path / 'c', '--results', tmp_path / 'kept' / SIZES_FILE)
    rows = json.loads((folder / SIZES_FILE).read_text())['checkpoints'][0]['results']
    assert [row['img_size'] for row in rows] == [24, 32]
    assert 'has no results of these weights with these statistics' in refusal(
        capsys, 'export', run, tmp_path / 'd', '--results', tmp_path / 'made' / SIZES_FILE)


def test_nothing_is_replaced_unasked(run, tmp_path, capsys):
    folder = export(run, tmp_path / 'hub')
    (folder / 'NOTES.md').write_text('mine')
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert 'already holds config.json: choose another folder, or --overwrite' in refusal(capsys, 'export', run, folder)
    assert 'is what is exported' in refusal(capsys, 'export', folder, folder, '--overwrite')
    assert 'is a run' in refusal(capsys, 'export', folder, run, '--overwrite')
    assert 'is a run' in refusal(capsys, 'export', folder, run / 'last', '--overwrite')
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    export(run, folder, '--overwrite', '--img-size', '48')
    assert (folder / 'NOTES.md').read_text() == 'mine'
    assert torch.equal(logits(timms(folder), 48), logits(load(str(run), img_size=48), 48))


def test_an_exported_folder_can_be_exported_for_another_size(exported, run, tmp_path, capsys):
    first = exported
    second = export(first, tmp_path / 'second', '--img-size', '16')
    assert torch.equal(logits(timms(second), 16), logits(load(str(run), img_size=16), 16))
    assert hub.main(['verify', str(second)]) == 0
    assert {path.name for path in second.iterdir()} == set(HUB_FILES)
    cards = [ModelCard.load(folder / 'README.md').text.split('## Training')[1].split('## Limits')[0]
             for folder in (first, second)]
    assert cards[0] == cards[1] and 'for 1 epoch.' in cards[0]
    assert 'without the statistics of training' in refusal(capsys, 'export', first, tmp_path / 'own', '--stats', 'own')


def test_what_a_token_would_be_published_with_is_refused(run, tmp_path, capsys):
    told = shutil.copytree(run, tmp_path / 'run')
    record = json.loads((told / 'run.json').read_text())
    record['starts'][0]['command'] += ' hf_' + 'x1' * 17
    (told / 'run.json').write_text(json.dumps(record))
    assert 'holds an access token' in (error := refusal(capsys, 'export', told, tmp_path / 'hub'))
    assert 'hf_x1' not in error and not (tmp_path / 'hub').exists()


def test_split_batch_norm_leaves_as_timm_alone_makes_it(train_run, tmp_path):
    run = train_run('--model', 'test_resnet', '--resplit', '--split-bn', '--mixsize', 'off', '--aug-splits', '2')
    folder = export(run, tmp_path / 'hub', '--stats', 'own')
    assert torch.equal(logits(timms(folder)), logits(load(str(run), own_stats=True)))
    assert not any('aux_bn' in name for name in load_file(folder / 'model.safetensors'))
    rows = json.loads((folder / SIZES_FILE).read_text())['checkpoints'][0]['results']
    trained = json.loads((run / SIZES_FILE).read_text())['checkpoints'][0]['results'][0]
    assert [(row['img_size'], row['top1']) for row in rows] == [(32, trained['top1_uncalibrated'])]
    card = ModelCard.load(folder / 'README.md').text
    assert '| img_size | top-1 | 95' not in card and '| img_size | top-1 | top-5 |' in card


def test_one_channel_and_a_head_of_ones_own(train_run, tmp_path):
    run = train_run('--model', 'test_resnet', '--in-chans', '1', '--gp', 'max', '--drop', '0.1')
    folder = export(run, tmp_path / 'hub')
    model = timms(folder)
    assert model.global_pool.pool_type == 'max' and model.conv1[0].in_channels == 1
    with torch.inference_mode():
        assert torch.equal(model.eval()(batch(32, 1)), load(str(run))(batch(32, 1)))
    assert "convert('L')" in (folder / 'README.md').read_text()


def test_timms_calibrated_weights_are_exported_without_the_records_of_a_run(tmp_path, images, capsys):
    torch.manual_seed(1)
    model = timm.create_model('test_resnet', num_classes=2)
    save_file(model.state_dict(), tmp_path / 'weights.safetensors')
    assert calibrate_model.main([
        str(tmp_path / 'weights.safetensors'), '--model', 'test_resnet', '--num-classes', '2', '--sizes', '96', '160',
        '--data-dir', str(images), '-j', '0', '-b', '12', '--output', str(tmp_path / 'calibrated')]) == 0
    folder = export(tmp_path / 'calibrated', tmp_path / 'hub', '--img-size', '96')
    assert torch.equal(logits(timms(folder), 96), logits(load(str(tmp_path / 'calibrated'), img_size=96), 96))
    card = (folder / 'README.md').read_text()
    assert 'How it was trained is not recorded' in card and 'args.yaml' not in card and 'Not measured' in card


@pytest.mark.parametrize('argv, message', [
    (['export', '{tmp}/nowhere', '{tmp}/hub'], 'no checkpoint at'),
    (['export', '{run}', '{tmp}/hub', '--img-size', '0'], '--img-size must be at least 1'),
    (['export', '{run}', '{tmp}/hub', '--img-size', '1'], 'no statistics calibrated for 1 px'),
    (['export', '{run}', '{tmp}/hub', '--results', '{tmp}/none.json'], 'no results at'),
    (['export', '{run}', '{tmp}/hub', '--results', '{run}/args.yaml'], 'holds no results'),
    (['export', '{run}', '{run}/args.yaml/hub'], 'cannot write to'),
    (['export', '{run}', '{tmp}/hub', '--repo-id', 'a/b/c'], "is ORG/NAME, not 'a/b/c'"),
    (['export', '{run}', '{tmp}/hub', '--repo-id', 'a'], "is ORG/NAME, not 'a'"),
    (['export', '{run}', '{tmp}/hub', '--repo-id', 'a/b@c'], 'Repo id'), (['export', '{run}', ''], 'DIR is empty'),
    (['export', '{run}', '{tmp}/hub', '--license', ''], '--license takes an identifier'),
    (['export', '{run}', '{tmp}/hub', '--license', 'Apache 2: foo'], '--license takes an identifier'),
    (['onnx', '{run}', ''], 'is no file'), (['onnx', '{run}', '{run}', '--overwrite'], 'is no file'),
    (['push', '{run}', 'a/b', '--pull-request', '--revision', 'x'], 'leave out --revision'),
    (['push', '{run}', ''], "is ORG/NAME, not ''"),
    (['push', '{run}', 'b'], "is ORG/NAME, not 'b'"), (['pull', 'b'], "is ORG/NAME, not 'b'"),
    (['export', '{run}'], 'DIR'), (['ship'], 'ship'), ([], 'COMMAND'),
    (['verify', '{tmp}/nowhere'], 'no folder at'), (['verify', '{run}'], 'has no config.json'),
])
def test_what_cannot_work_is_one_line(run, tmp_path, capsys, argv, message):
    assert message in refusal(capsys, *(part.format(run=run, tmp=tmp_path) for part in argv))
    assert not (tmp_path / 'hub').exists()


def test_a_folder_that_is_not_whole_is_not_verified(copy, tmp_path, capsys, images):
    folder = copy
    for name, message in (('README.md', 'has no README.md'), ('accuracy-against-size.png', 'which is not there'),
                          (SIZES_FILE, 'other results'), ('bn_stats.safetensors', 'not the statistics of all sizes')):
        broken = shutil.copytree(folder, tmp_path / name)
        (broken / name).unlink()
        assert message in refusal(capsys, 'verify', broken)
    (broken / 'bn_stats.safetensors').write_bytes((folder / 'bn_stats.safetensors').read_bytes())
    assert calibrate_model.main([str(broken), '--data-dir', str(images), '--sizes', '40', '-j', '0', '-b', '12']) == 0
    assert hub.main(['verify', str(broken)]) == 0  # more sizes do no harm
    stats = BatchNormStats.load(str(folder / 'bn_stats.safetensors'))
    stats.by_size[32] = {name: tensor.clone() for name, tensor in stats.by_size[16].items()}
    stats.save(str(broken / 'bn_stats.safetensors'))
    assert 'do not have the statistics calibrated for 32 px' in refusal(capsys, 'verify', broken)
    (folder / 'extra.pth').write_bytes(b'')
    assert 'holds extra.pth, which can run code' in refusal(capsys, 'verify', folder)


HEADER = 'license: unknown'


@pytest.mark.parametrize('name, old, new', [
    ('config.json', '"mixsize": {', '"mixsize": null, "was": {'),
    ('config.json', '"img_size": 32', '"img_size": [1]'),
    ('config.json', '"statistics": "calibrated",', ''),
    ('config.json', '"calibrated_sizes": [', '"calibrated_sizes": ["x",'),
    ('config.json', '"interpolation": ', '"interpolation": 5, "was": '),
    ('config.json', '"crop_pct": ', '"crop_pct": "x", "was": '),
    ('config.json', '"mean": [', '"mean": ["x",'),
    ('README.md', HEADER, 'license: [mit'),
    ('README.md', HEADER, 'license: \tmit'),
    ('README.md', HEADER, 'license: !!python/object/apply:os.getcwd []'),
    ('README.md', HEADER, 'licence: mit'),
    ('README.md', 'value: ', 'value: [1] # '),
    ('README.md', 'img_size: 16', 'img_size: 17'),
    (SIZES_FILE, '"results": [', '"results": [1,'),
    (SIZES_FILE, '"results": [', '"results": [{"top1": 1},'),
    (SIZES_FILE, '"checkpoints": [', '"checkpoints": ["x",'),
    (SIZES_FILE, '"top1": ', '"top1": [1], "was": '),
    ('run.json', '{', '[{'),
    ('args.yaml', 'model: ', 'model: ['),
])
def test_what_is_out_of_order_is_one_line(copy, capsys, name, old, new):
    text = (copy / name).read_text()
    assert old in text
    (copy / name).write_text(text.replace(old, new, 1))
    if name == 'config.json' and 'null' in new:  # then it is anyone's, and timm's part of it is in order
        assert hub.main(['verify', str(copy)]) == 0
    else:
        refusal(capsys, 'verify', copy)


@pytest.mark.parametrize('document', [
    '{', '[]', '{"metric": "top1"}', '{"metric": "top1", "checkpoints": ["x"]}', '{"metric": [], "checkpoints": []}',
    '{"metric": "top1", "checkpoints": [{"weights": "{weights}", "results": [1]}]}',
    '{"metric": "top1", "checkpoints": [{"weights": "{weights}", "results": [{"img_size": 32}]}]}',
    '{"metric": "top1", "checkpoints": [{"weights": "{weights}", "data": "x", "calibrated": 1, "results": '
    '[{"img_size": 32, "statistics": "{statistics}"}]}]}',
])
def test_results_that_are_out_of_order_are_one_line(run, tmp_path, capsys, document):
    entry = json.loads((run / SIZES_FILE).read_text())['checkpoints'][0]
    (tmp_path / 'results.json').write_text(document.replace('{weights}', entry['weights']).replace(
        '{statistics}', next(row['statistics'] for row in entry['results'] if row['img_size'] == 32)))
    error = refusal(capsys, 'export', run, tmp_path / 'hub', '--results', tmp_path / 'results.json')
    assert 'cannot write' not in error and not (tmp_path / 'hub').exists()


def test_another_export_in_its_place_leaves_nothing_of_the_first(train_run, run, tmp_path):
    folder = export(run, tmp_path / 'hub')
    fixed = train_run('--model', 'test_resnet', '--mixsize', 'off', '--val-split', '')
    export(fixed, folder, '--overwrite', '--stats', 'own')
    assert {path.name for path in folder.iterdir()} == set(HUB_FILES) - {
        'bn_stats.safetensors', SIZES_FILE, 'accuracy-against-size.png'}
    assert hub.main(['verify', str(folder)]) == 0


def test_a_file_of_weights_does_not_claim_timms(run, tmp_path, capsys):
    options = ['--model', 'test_resnet', '--stats', 'own', '--img-size', '32']
    folder = export(run / 'last' / 'model.safetensors', tmp_path / 'hub', *options)
    card = ModelCard.load(folder / 'README.md')
    assert card.data.get('base_model') is None and 'timm/test_resnet' not in card.text
    config = json.loads((folder / 'config.json').read_text())
    assert not {'tag', 'license', 'origin_url'} & config['pretrained_cfg'].keys()
    state = load_file(run / 'last' / 'model.safetensors')
    torch.save({'state_dict': state, 'state_dict_ema': {**state, 'fc.bias': state['fc.bias'] + 1}}, tmp_path / 'x.pth')
    torch.save({'state_dict': state}, tmp_path / 'y.pth')
    assert 'say --use-ema or --no-use-ema' in refusal(capsys, 'export', tmp_path / 'x.pth', tmp_path / 'x', *options)
    both = [export(tmp_path / 'x.pth', tmp_path / f'x{choice}', *options, choice) for choice in (
        '--use-ema', '--no-use-ema')]
    assert ['moving average' in (folder / 'README.md').read_text() for folder in both] == [True, False]
    assert not torch.equal(logits(timms(both[0])), logits(timms(both[1])))
    export(tmp_path / 'y.pth', tmp_path / 'y', *options)


def test_a_file_that_is_the_moving_average_is_not_called_the_weights(train_run, tmp_path, capsys):
    run = train_run('--model', 'test_resnet', '--model-ema', '--model-ema-decay', '0.5')
    average = run / 'last' / 'model_ema.safetensors'
    assert 'is a moving average: leave out --no-use-ema' in refusal(
        capsys, 'export', average, tmp_path / 'hub', '--no-use-ema')
    folder = export(run, tmp_path / 'hub', '--use-ema')
    assert 'leave out --use-ema' in refusal(capsys, 'export', folder, tmp_path / 'again', '--no-use-ema')
    assert 'moving average' in (export(folder, tmp_path / 'again') / 'README.md').read_text()


def test_a_run_that_stopped_early_says_so(train_run, tmp_path):
    run = train_run('--model', 'test_resnet', '--epochs', '3', '--stop-epoch', '1')
    folder = export(run, tmp_path / 'hub')
    assert 'for 1 of the 3 planned epochs.' in (folder / 'README.md').read_text()


def test_names_cannot_write_into_the_card(run, tmp_path):
    odd = shutil.copytree(run, tmp_path / 'run')
    record = json.loads((odd / 'run.json').read_text())
    record['data']['class_names'] = ['x`\n\n## Limits\n\n* none', '<script>']
    record['starts'][0]['command'] += " '```\n# Heading'"
    (odd / 'run.json').write_text(json.dumps(record))
    text = ModelCard.load(export(odd, tmp_path / 'hub') / 'README.md').text
    assert text.count('\n## Limits') == 1 and '`x ## Limits * none`, `<script>`' in text
    assert '````sh\n' in text and text.count('````') == 2


def test_onnx_gives_the_calibrated_logits_for_any_batch(run, tmp_path, capsys):
    onnx, runtime = pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')
    file = tmp_path / 'model.onnx'
    assert hub.main(['onnx', str(run), str(file), '--img-size', '48']) == 0
    session = runtime.InferenceSession(str(file))
    images = torch.cat([batch(48), batch(48), batch(48)])
    (given,) = session.run(None, {'images': images.numpy()})
    with torch.inference_mode():
        calibrated, own = load(str(run), img_size=48)(images), load(str(run), own_stats=True)(images)
    assert torch.allclose(torch.from_numpy(given), calibrated, atol=1e-4)
    assert not torch.allclose(torch.from_numpy(given), own, atol=1e-3)
    facts = {entry.key: json.loads(entry.value) for entry in onnx.load(str(file)).metadata_props}
    assert facts['input_size'] == [3, 48, 48] and facts['label_names'] == ['cat', 'dog']
    assert {'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode'} <= facts.keys()
    content = file.read_bytes()
    assert 'is there already' in refusal(capsys, 'onnx', run, file)
    assert file.read_bytes() == content and [path.name for path in tmp_path.iterdir()] == ['model.onnx']


def test_onnx_without_its_libraries_says_how_to_get_them(run, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *rest: None if name == 'onnxruntime' else find(name))
    assert refusal(capsys, 'onnx', run, tmp_path / 'm.onnx') == (
        'mixsize hub: error: onnxruntime is not installed: pip install "mixsize-timm[onnx]"\n')


def test_the_command_is_one_of_mixsize(capsys):
    assert cli.main(['hub', 'verify', 'nowhere']) == 2
    assert capsys.readouterr().err == 'mixsize hub: error: no folder at nowhere\n'
    with pytest.raises(SystemExit):
        cli.main(['hub', '--help'])
    out = capsys.readouterr().out
    assert all(word in out for word in ('export', 'verify', 'push', 'pull', 'onnx'))
