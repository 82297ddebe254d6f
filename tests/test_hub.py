"""Pushing to the hub and loading from it, with the real client and a server on loopback."""
import json
import os
import shutil
import signal
import subprocess
import sys

import huggingface_hub.constants
import pytest
import timm
import torch
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file

from mixsize_timm import evaluate, hub, load, train
from mixsize_timm.export import HUB_FILES

TOKEN = 'hf_' + 'aB3' * 11
REPO = 'tester/digits'
# timm, and transformers, in a process that cannot import this package
READ = """
import sys
sys.modules['mixsize_timm'] = None
import timm, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
model = timm.create_model('hf-hub:' + sys.argv[1], pretrained=True).eval()
wrapped = AutoModelForImageClassification.from_pretrained(sys.argv[1]).eval()
with torch.inference_mode():
    images = load_file(sys.argv[2])['images']
    save_file({'timm': model(images), 'transformers': wrapped(images).logits}, sys.argv[3])
print(timm.data.resolve_model_data_config(model)['input_size'])
"""
SHORT = ['--model', 'test_resnet', '-b', '256', '--epochs', '1', '--calibrate', '2', '-j', '0']


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    assert train.main([*SHORT, '--output', str(folder), '--experiment', 'run']) == 0
    return folder / 'run'


@pytest.fixture(scope='module')
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp('exported') / 'digits'
    assert hub.main(['export', str(run), str(folder), '--license', 'apache-2.0']) == 0
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / 'digits')


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server that this process's client talks to, with a token, an empty cache, and nothing of this machine's."""
    with HubServer(token=TOKEN) as server:
        constants = huggingface_hub.constants
        for name in [name for name in os.environ if name.startswith(('HF_', 'HUGGING'))]:
            monkeypatch.delenv(name)
        for name, value in server.environment(tmp_path / 'home', token=TOKEN).items():
            if name.startswith(('HF_', 'NO_', 'no_')):
                monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, 'ENDPOINT', server.endpoint)
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE',
                            server.endpoint + '/{repo_id}/resolve/{revision}/{filename}')
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
        monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'no-token'))
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True, raising=False)  # older versions have no Xet
        yield server


def run_hub(*argv, code=0):
    assert hub.main([*map(str, argv)]) == code


def refusal(capsys, *argv):
    capsys.readouterr()
    run_hub(*argv, code=2)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith('mixsize hub')]
    assert len(lines) >= 1 and 'Traceback' not in captured.err and TOKEN not in captured.err + captured.out
    return captured.err


def images(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))


@torch.inference_mode()
def logits(model, size=32):
    return model.eval()(images(size))


def in_another_process(server, tmp_path, size):
    save_file({'images': images(size)}, tmp_path / 'images')
    result = subprocess.run(
        [sys.executable, '-c', READ, REPO, tmp_path / 'images', tmp_path / 'logits'], capture_output=True,
        text=True, env=server.environment(tmp_path / 'other-home', token=TOKEN), cwd=tmp_path, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    return load_file(tmp_path / 'logits'), result.stdout


def test_a_pushed_model_is_loaded_by_timm_alone_to_the_bit(server, run, tmp_path, capsys):
    folder = tmp_path / 'digits-24'
    run_hub('export', run, folder, '--img-size', '24')
    run_hub('push', folder, REPO)
    out = capsys.readouterr().out
    assert f'{server.endpoint}/{REPO}' in out and "timm.create_model('hf-hub:tester/digits', pretrained=True)" in out
    given, said = in_another_process(server, tmp_path, 24)
    expected = logits(load(str(run), img_size=24), 24)
    assert torch.equal(given['timm'], expected) and torch.equal(given['transformers'], expected)
    assert '(3, 24, 24)' in said and torch.equal(logits(load(f'hf-hub:{REPO}'), 24), expected)
    for size in (16, 48):
        assert torch.equal(logits(load(f'hf-hub:{REPO}', img_size=size), size),
                           logits(load(str(run), img_size=size), size))


def test_a_push_is_one_commit_of_the_folders_files_with_the_name_in_the_card(server, folder):
    (folder / 'notes.txt').write_text('mine')
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run_hub('push', folder, REPO, '--message', 'The first')
    assert [commit.title for commit in HfApi(token=TOKEN).list_repo_commits(REPO)] == ['The first', 'initial commit']
    there = server.files(REPO)
    assert there.keys() == {*HUB_FILES, '.gitattributes'}
    card = there.pop('README.md').decode()
    assert f"'hf-hub:{REPO}'" in card and 'ORG/NAME' not in card
    for name in set(HUB_FILES) - {'README.md', 'config.json'}:
        assert there[name] == before[name], name
    assert there['config.json'].replace(REPO.encode(), b'ORG/NAME') == before['config.json']
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert '/api/validate-yaml' in {path for _, path, _ in server.requests}
    assert ModelCard(card).data.license == 'apache-2.0'


def test_private_branch_and_pull_request(server, folder, capsys):
    run_hub('push', folder, REPO, '--private', '--revision', 'v1')
    assert HfApi(token=TOKEN).model_info(REPO).private
    assert 'model.safetensors' in server.files(REPO, 'v1') and 'model.safetensors' not in server.files(REPO, 'main')
    assert "'hf-hub:tester/digits@v1'" in capsys.readouterr().out
    assert torch.equal(logits(load(f'hf-hub:{REPO}@v1')), logits(load(str(folder))))
    head = server.head(REPO)
    run_hub('push', folder, REPO, '--revision', 'v2')  # a branch that is made replaces nothing
    assert 'model.safetensors' in server.files(REPO, 'v2') and server.head(REPO) == head
    refs = server.refs(REPO)
    assert 'already holds' in refusal(capsys, 'push', folder, REPO, '--revision', 'v2')
    assert 'no such repository' in refusal(capsys, 'push', folder, 'tester/none', '--pull-request')
    assert server.refs(REPO) == refs and not HfApi(token=TOKEN).repo_exists('tester/none')
    run_hub('push', folder, REPO, '--pull-request')
    assert server.head(REPO) == head and 'model.safetensors' in server.files(REPO, 'refs/pr/1')
    assert '/discussions/1' in capsys.readouterr().out


def test_a_model_that_is_there_is_replaced_only_when_asked(server, folder, capsys):
    server.put(REPO, {'README.md': b'---\nlicense: mit\n---\nmine', 'LICENSE': b'mine'})
    (folder / 'args.yaml').unlink()
    server.put(REPO, {'args.yaml': b'of another model'})
    head = server.head(REPO)
    assert 'already holds README.md: --overwrite replaces' in refusal(capsys, 'push', folder, REPO)
    assert 'is public' in refusal(capsys, 'push', folder, REPO, '--private', '--overwrite')
    assert server.head(REPO) == head
    run_hub('push', folder, REPO, '--overwrite')
    assert server.files(REPO)['LICENSE'] == b'mine' and 'model.safetensors' in server.files(REPO)
    assert 'args.yaml' not in server.files(REPO)
    assert len(list(HfApi(token=TOKEN).list_repo_commits(REPO))) == 4


def test_a_link_is_not_followed_to_what_it_would_publish(server, folder, tmp_path, capsys):
    (tmp_path / 'secret').write_text('model: secret')
    (folder / 'args.yaml').unlink()
    (folder / 'args.yaml').symlink_to(tmp_path / 'secret')
    assert 'args.yaml is a link' in refusal(capsys, 'push', folder, REPO)
    assert server.requests == []


def test_a_card_follows_its_model_from_name_to_name(server, folder, tmp_path):
    run_hub('push', folder, REPO)
    run_hub('pull', REPO, tmp_path / 'pulled')
    run_hub('push', tmp_path / 'pulled', 'tester/other')
    card = server.files('tester/other')['README.md'].decode()
    assert "'hf-hub:tester/other'" in card and REPO not in card
    run_hub('pull', 'tester/other', tmp_path / 'pulled', '--overwrite')


def test_a_pull_in_the_place_of_another_leaves_nothing_of_it(server, folder, run, tmp_path):
    run_hub('push', folder, REPO)
    small, weights = tmp_path / 'small', tmp_path / 'weights.safetensors'
    shutil.copyfile(run / 'last' / 'model.safetensors', weights)
    run_hub('export', weights, small, '--model', 'test_resnet', '--stats', 'own')
    run_hub('push', small, 'tester/small')
    run_hub('pull', REPO, tmp_path / 'pulled')
    run_hub('pull', 'tester/small', tmp_path / 'pulled', '--overwrite')
    assert {path.name for path in (tmp_path / 'pulled').iterdir()} == {path.name for path in small.iterdir()}
    run_hub('verify', tmp_path / 'pulled')
    run_hub('push', small, REPO, '--overwrite')
    assert 'bn_stats.safetensors' not in server.files(REPO)


def test_what_is_not_whole_is_not_pushed(server, folder, capsys):
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-100])
    assert 'truncated or altered' in refusal(capsys, 'push', folder, REPO)
    assert server.requests == []


def test_without_a_token_or_with_a_wrong_one_nothing_happens(server, folder, capsys, monkeypatch):
    monkeypatch.delenv('HF_TOKEN')
    assert 'no token for the hub: "hf auth login"' in refusal(capsys, 'push', folder, REPO)
    wrong = 'hf_' + 'zZ9' * 11
    monkeypatch.setenv('HF_TOKEN', wrong)
    error = refusal(capsys, 'push', folder, REPO)
    assert 'cannot push to tester/digits' in error and wrong not in error and '401' in error


def test_a_card_that_the_hub_refuses_says_why(server, folder, capsys):
    card = (folder / 'README.md').read_text().replace('license: apache-2.0', 'license: [1, 2]')
    (folder / 'README.md').write_text(card)
    error = refusal(capsys, 'push', folder, REPO)
    assert 'license' in error and f'{REPO} was made, without the model' in error
    assert server.files(REPO).keys() == {'.gitattributes'}


@pytest.mark.parametrize('method, path', [('PUT', '/lfs/'), ('POST', '/commit/')])
def test_a_push_that_is_interrupted_leaves_the_remote_as_it_was(server, folder, tmp_path, method, path):
    server.put(REPO, {'README.md': b'---\nlicense: mit\n---\nmine'})
    before, refs = server.files(REPO), server.refs(REPO)
    hold = server.block_on(method, path)
    client = subprocess.Popen(
        [sys.executable, '-m', 'mixsize_timm.hub', 'push', folder, REPO, '--overwrite'], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=server.environment(tmp_path / 'home', token=TOKEN))
    hold.wait()
    client.send_signal(signal.SIGINT if method == 'POST' else signal.SIGKILL)
    out, error = client.communicate(timeout=60)
    hold.release()
    assert server.files(REPO) == before and server.refs(REPO) == refs
    if method == 'POST':
        assert client.returncode == 130 and error.splitlines()[-1].startswith('mixsize hub: stopped; ')
    assert TOKEN not in out + error
    run_hub('push', folder, REPO, '--overwrite')  # another finishes it
    assert server.files(REPO)['model.safetensors'] == (folder / 'model.safetensors').read_bytes()


def test_the_token_is_sent_and_nowhere_written(server, folder, tmp_path, capsys, caplog):
    with caplog.at_level('DEBUG'):
        run_hub('push', folder, REPO)
        run_hub('pull', REPO, tmp_path / 'pulled')
        load(f'hf-hub:{REPO}', img_size=16)
    assert any(headers.get('authorization') == f'Bearer {TOKEN}' for _, _, headers in server.requests)
    assert not any(TOKEN in path for _, path, _ in server.requests)
    captured = capsys.readouterr()
    assert TOKEN not in captured.out + captured.err + caplog.text
    written = [path for path in tmp_path.rglob('*') if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert written == [] and not any(TOKEN.encode() in content for content in server.files(REPO).values())


def test_a_pulled_folder_is_the_pushed_one(server, folder, tmp_path, monkeypatch, capsys):
    run_hub('push', folder, REPO)
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    run_hub('pull', REPO)
    pulled = os.path.join(os.getcwd(), 'digits')
    assert sorted(os.listdir(pulled)) == sorted(HUB_FILES) and not any(map(os.path.islink, os.listdir(pulled)))
    assert torch.equal(logits(load(pulled, img_size=48), 48), logits(load(str(folder), img_size=48), 48))
    assert 'and whole: test_resnet for 32 px' in capsys.readouterr().out
    assert 'already holds config.json' in refusal(capsys, 'pull', REPO)
    assert 'already holds' in refusal(capsys, 'pull', f'{REPO}@main', pulled)
    run_hub('pull', REPO, '--overwrite')


@pytest.mark.parametrize('repo, message', [
    ('tester/none', 'no such repository, or it is private'), ('tester/digits@v9', 'no such revision'),
])
def test_what_the_hub_does_not_have_is_one_line(server, folder, tmp_path, capsys, repo, message):
    run_hub('push', folder, REPO)
    assert message in refusal(capsys, 'pull', repo, tmp_path / 'pulled')
    with pytest.raises(ValueError, match=message):
        load(f'hf-hub:{repo}')
    assert not (tmp_path / 'pulled').exists()


def test_a_hub_that_cannot_be_reached_is_one_line(folder, tmp_path, capsys, monkeypatch):
    with HubServer() as gone:
        endpoint = gone.endpoint
    monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', endpoint)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    assert 'cannot fetch tester/digits from the hub' in refusal(capsys, 'pull', REPO, tmp_path / 'pulled')


def test_what_was_fetched_serves_without_the_hub(server, folder, monkeypatch):
    run_hub('push', folder, REPO)
    there = logits(load(f'hf-hub:{REPO}', img_size=16), 16)
    asked = len(server.requests)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    assert torch.equal(logits(load(f'hf-hub:{REPO}', img_size=16), 16), there)
    assert len(server.requests) == asked


def test_a_repository_with_pickled_weights_alone_is_refused_and_they_are_not_fetched(server, folder, tmp_path, capsys):
    torch.save(load_file(folder / 'model.safetensors'), tmp_path / 'pytorch_model.bin')
    config = json.loads((folder / 'config.json').read_text())
    config.pop('mixsize')
    server.put(REPO, {'config.json': json.dumps(config).encode(),
                      'pytorch_model.bin': (tmp_path / 'pytorch_model.bin').read_bytes()})
    with pytest.raises(ValueError, match='pickled weights only .pytorch_model.bin., which can run code'):
        load(f'hf-hub:{REPO}')
    assert 'pickled weights only' in refusal(capsys, 'pull', REPO, tmp_path / 'pulled')
    assert 'pickled weights only' in refusal_of(evaluate, capsys, f'hf-hub:{REPO}', '--dataset', 'digits')
    trained = [*SHORT, '--output', str(tmp_path / 'out')]
    for options in (['--model', f'hf-hub:{REPO}', '--pretrained'], ['--kd-model-name', f'hf-hub:{REPO}']):
        assert 'pickled weights only' in refusal_of(train, capsys, *trained, *options)
    assert not any(method == 'GET' and 'resolve' in path and 'pytorch_model' in path
                   for method, path, _ in server.requests)
    assert torch.equal(logits(load(f'hf-hub:{REPO}', unsafe_pickle=True)), logits(load(str(folder), own_stats=True)))
    assert train.main([*trained, '--model', f'hf-hub:{REPO}', '--pretrained', '--unsafe-pickle']) == 0


def refusal_of(command, capsys, *argv):
    capsys.readouterr()
    assert command.main([*argv]) == 2
    return capsys.readouterr().err


def test_names_that_lead_out_of_the_cache_are_not_fetched(server, folder, tmp_path):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    server.put(REPO, {**files, '../../../evil.py': b'evil', '/tmp/evil.py': b'evil', 'evil/model.safetensors': b'evil'})
    assert torch.equal(logits(load(f'hf-hub:{REPO}')), logits(load(str(folder))))
    run_hub('pull', REPO, tmp_path / 'pulled')
    assert not [path for path in tmp_path.rglob('*') if path.is_file() and path.read_bytes() == b'evil']


@pytest.mark.parametrize('change, message', [
    (lambda config: config['pretrained_cfg'].update(file='/etc/passwd'), 'names weights elsewhere'),
    (lambda config: config['pretrained_cfg'].update(hf_hub_filename='../../x.bin'), 'names weights elsewhere'),
    (lambda config: config.update(architecture='../x'), 'has no model'),
    (lambda config: config['model_args'].update(in_chans=10**9), 'model argument of 1e\\+09'),
    (lambda config: config.update(mixsize=dict(config['mixsize'], sha256='0')), 'it was altered'),
])
def test_a_repository_that_is_not_to_be_trusted_is_refused(server, folder, tmp_path, capsys, change, message):
    config = json.loads((folder / 'config.json').read_text())
    change(config)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    server.put(REPO, {**files, 'config.json': json.dumps(config).encode()})
    with pytest.raises(ValueError, match=message) as caught:
        load(f'hf-hub:{REPO}')
    assert '\n' not in str(caught.value)
    refusal(capsys, 'pull', REPO, tmp_path / 'pulled')
    assert not (tmp_path / 'pulled').exists()


def test_a_truncated_file_on_the_hub_is_one_line(server, folder, tmp_path, capsys):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    server.put(REPO, {**files, 'model.safetensors': files['model.safetensors'][:-1000]})
    assert 'truncated or altered' in refusal(capsys, 'pull', REPO, tmp_path / 'pulled')


def test_evaluation_takes_a_repository_of_the_hub(server, folder, run, tmp_path):
    run_hub('push', folder, REPO)
    assert evaluate.main([f'hf-hub:{REPO}', '--dataset', 'digits', '--sizes', '16', '32', '--calibrate', 'kept',
                          '--no-speed', '-j', '0', '--output', str(tmp_path / 'report')]) == 0
    (entry,) = json.loads((tmp_path / 'report' / 'sizes.json').read_text())['checkpoints']
    assert entry['model'] == 'test_resnet'
    trained = {row['img_size']: row['top1'] for row in json.loads((run / 'sizes.json').read_text())[
        'checkpoints'][0]['results']}
    assert {row['img_size']: row['top1'] for row in entry['results']} == {16: trained[16], 32: trained[32]}


def test_training_starts_from_a_pushed_model(server, folder, tmp_path):
    run_hub('push', folder, REPO)
    assert train.main([*SHORT, '--model', f'hf-hub:{REPO}', '--pretrained', '--epochs', '1', '--output',
                       str(tmp_path / 'tuned'), '--experiment', 'run']) == 0
    out = tmp_path / 'again'
    run_hub('export', tmp_path / 'tuned' / 'run', out)
    assert ModelCard.load(out / 'README.md').data.base_model == REPO
    assert timm.create_model(f'local-dir:{out}', pretrained=True).num_classes == 10
