"""The stand-in for the Hub, asked by the Hub's own client as the Hub is."""
import hashlib
import http.client
import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager

import huggingface_hub.constants
import pytest
from hub_server import FIRST_COMMIT, HubServer
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.sha import git_hash

REPO = 'tester/model'
CARD = '---\nlicense: apache-2.0\ntags: [timm]\n---\n# A model\n'
WEIGHTS = bytes(range(256)) * 2000

UPLOAD = """
import sys
from huggingface_hub import HfApi
HfApi().upload_folder(repo_id='tester/model', folder_path=sys.argv[1])
"""


@contextmanager
def serving():
    with pytest.MonkeyPatch.context() as patch, HubServer() as server:
        patch.setattr(huggingface_hub.constants, 'HF_HUB_DISABLE_XET', True)
        yield server


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture
def api(server):
    """A client that may write, with a repository that is empty."""
    api = HfApi(endpoint=server.endpoint, token=server.token)
    api.create_repo(REPO)
    return api


@pytest.fixture
def stranger(server):
    return HfApi(endpoint=server.endpoint, token=False)


@pytest.fixture
def folder(tmp_path):
    """What to upload: regular files, one of them empty and one in a folder, and one for LFS."""
    (tmp_path / 'upload' / 'sub').mkdir(parents=True)
    for path, content in {'README.md': CARD.encode(), 'empty.bin': b'', 'sub/notes.txt': b'one\r\ntwo',
                          'model.safetensors': WEIGHTS}.items():
        (tmp_path / 'upload' / path).write_bytes(content)
    return tmp_path / 'upload'


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def paths(server, method):
    return [path for used, path, _ in server.requests if used == method]


def status(error):
    return error.value.response.status_code


def test_a_repository_starts_with_one_commit_that_holds_only_gitattributes(server, api):
    [commit] = api.list_repo_commits(REPO)
    assert (commit.title, commit.commit_id) == (FIRST_COMMIT, server.head(REPO))
    assert api.list_repo_files(REPO) == ['.gitattributes'] == list(server.files(REPO))
    info = api.model_info(REPO)
    assert (info.id, info.sha, info.private) == (REPO, server.head(REPO), False)


def test_a_repository_is_made_once(server, api):
    with pytest.raises(HfHubHTTPError, match='already created') as error:
        api.create_repo(REPO)
    assert status(error) == 409
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    assert api.create_repo('short').repo_id == f'{api.whoami()["name"]}/short'


def test_a_private_repository_is_not_found_without_a_token(server, api, stranger, tmp_path):
    api.create_repo('tester/secret', private=True)
    assert api.model_info('tester/secret').private and api.repo_exists('tester/secret')
    assert stranger.repo_exists(REPO) and not stranger.repo_exists('tester/secret')
    assert api.file_exists('tester/secret', '.gitattributes')
    assert not stranger.file_exists('tester/secret', '.gitattributes')
    with pytest.raises(RepositoryNotFoundError):
        stranger.hf_hub_download('tester/secret', '.gitattributes', cache_dir=tmp_path)


def test_a_write_needs_the_token(server, api, stranger, folder):
    bad = HfApi(endpoint=server.endpoint, token='hf_another')
    for client in (stranger, bad):
        for write in (lambda c: c.create_repo('tester/other'), lambda c: c.create_branch(REPO, branch='dev'),
                      lambda c: c.upload_folder(repo_id=REPO, folder_path=folder)):
            with pytest.raises(HfHubHTTPError) as error:
                write(client)
            assert status(error) == 401
    with pytest.raises(HfHubHTTPError, match='Invalid user token'):
        bad.whoami()
    with pytest.raises(HfHubHTTPError, match='Invalid credentials'):
        bad.model_info(REPO)  # even where none is needed
    assert server.refs(REPO).keys() == {'main'} and not server.blobs(REPO) and not api.repo_exists('tester/other')


def test_a_folder_is_uploaded_in_one_commit(server, api, folder):
    first = server.head(REPO)
    info = api.upload_folder(repo_id=REPO, folder_path=folder, commit_message='All of it')
    assert info.oid == server.head(REPO) and info.repo_url.repo_id == REPO
    assert [commit.title for commit in api.list_repo_commits(REPO)] == ['All of it', FIRST_COMMIT]
    files = server.files(REPO)
    assert files.pop('.gitattributes') == server.files(REPO, first)['.gitattributes']
    assert files == contents(folder) and len(server.files(REPO, first)) == 1
    assert server.blobs(REPO) == {hashlib.sha256(WEIGHTS).hexdigest(): WEIGHTS}
    [upload] = [headers for method, _, headers in server.requests if method == 'PUT']
    assert 'authorization' not in upload


def test_the_files_of_a_revision_are_described_alike_everywhere(server, api, folder):
    api.upload_folder(repo_id=REPO, folder_path=folder)
    siblings = {file.rfilename: file for file in api.repo_info(REPO, files_metadata=True).siblings}
    tree = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True)}
    assert siblings.keys() == server.files(REPO).keys() == tree.keys() - {'sub'}
    for path, file in siblings.items():
        assert (file.size, file.blob_id, file.lfs) == (tree[path].size, tree[path].blob_id, tree[path].lfs)
    assert {path for path, file in siblings.items() if file.lfs} == {'model.safetensors'}
    assert siblings['model.safetensors'].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert siblings['sub/notes.txt'].blob_id == git_hash(b'one\r\ntwo')
    assert [entry.path for entry in api.list_repo_tree(REPO, 'sub')] == ['sub/notes.txt']
    assert 'sub/notes.txt' not in [entry.path for entry in api.list_repo_tree(REPO)]
    assert [entry.path for entry in api.get_paths_info(REPO, ['sub', 'README.md', 'none'])] == ['sub', 'README.md']
    assert api.model_info(REPO).card_data.license == 'apache-2.0'


def test_what_has_not_changed_is_not_uploaded_again(server, api, folder):
    api.upload_folder(repo_id=REPO, folder_path=folder)
    head, before = server.head(REPO), len(server.requests)
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == head == server.head(REPO)
    assert not [path for _, path, _ in server.requests[before:] if '/commit/' in path]
    (folder / 'copy.bin').write_bytes(WEIGHTS)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert server.files(REPO)['copy.bin'] == WEIGHTS and len(paths(server, 'PUT')) == 1


def test_what_was_uploaded_comes_back_byte_for_byte(server, api, stranger, folder, tmp_path):
    first = api.upload_folder(repo_id=REPO, folder_path=folder).oid
    old = contents(folder)
    (folder / 'README.md').write_text(CARD + 'More.\n')
    api.upload_folder(repo_id=REPO, folder_path=folder)
    snapshot = stranger.snapshot_download(REPO, local_dir=tmp_path / 'new', ignore_patterns='.gitattributes')
    assert snapshot == str(tmp_path / 'new')
    got = contents(tmp_path / 'new')
    assert {path: content for path, content in got.items() if not path.startswith('.cache')} == contents(folder)
    for path, content in old.items():
        local = stranger.hf_hub_download(REPO, path, revision=first[:10], cache_dir=tmp_path / 'cache')
        with open(local, 'rb') as file:
            assert file.read() == content, path


def test_the_headers_of_a_file_name_its_commit_size_and_content(server, api, folder):
    api.upload_folder(repo_id=REPO, folder_path=folder)
    tree = {entry.path: entry for entry in api.list_repo_tree(REPO)}
    for path, etag in (('model.safetensors', hashlib.sha256(WEIGHTS).hexdigest()), ('README.md', None)):
        about = api.get_hf_file_metadata(url=f'{server.endpoint}/{REPO}/resolve/main/{path}')
        assert (about.commit_hash, about.size) == (server.head(REPO), len(server.files(REPO)[path]))
        assert about.etag == (etag or tree[path].blob_id)


@pytest.mark.parametrize('asked, expected', [
    ('bytes=0-9', WEIGHTS[:10]), ('bytes=100-', WEIGHTS[100:]), ('bytes=-7', WEIGHTS[-7:]),
    ('bytes=511990-999999', WEIGHTS[511990:])])
def test_a_part_of_a_file_can_be_asked_for(server, asked, expected):
    server.put(REPO, {'model.safetensors': WEIGHTS})
    url = f'{server.endpoint}/{REPO}/resolve/main/model.safetensors'
    with urllib.request.urlopen(urllib.request.Request(url, headers={'Range': asked})) as response:
        assert response.status == 206 and response.read() == expected
        assert response.headers['Content-Range'].endswith(f'/{len(WEIGHTS)}')
    with pytest.raises(urllib.error.HTTPError, match='416'):
        urllib.request.urlopen(urllib.request.Request(url, headers={'Range': f'bytes={len(WEIGHTS)}-'}))


def test_what_is_missing_is_refused_by_its_own_error(server, api, tmp_path):
    with pytest.raises(RepositoryNotFoundError):
        api.model_info('tester/none')
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision='none')
    with pytest.raises(RevisionNotFoundError):
        list(api.list_repo_tree(REPO, revision='0' * 40))
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(REPO, '.gitattributes', revision='none', cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, 'config.json', cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, 'folder'))
    assert not api.file_exists(REPO, 'config.json') and api.file_exists(REPO, '.gitattributes')
    with pytest.raises(EntryNotFoundError):
        api.create_commit(REPO, [CommitOperationDelete('config.json')], commit_message='Delete')


def test_a_pull_request_leaves_main_as_it_was(server, api, folder):
    head = server.head(REPO)
    info = api.upload_folder(repo_id=REPO, folder_path=folder, create_pr=True)
    assert (info.pr_num, info.pr_revision) == (1, 'refs/pr/1')
    assert server.head(REPO) == head and list(server.files(REPO)) == ['.gitattributes']
    assert server.files(REPO, 'refs/pr/1').keys() == contents(folder).keys() | {'.gitattributes'}
    assert api.model_info(REPO, revision='refs/pr/1').sha == info.oid
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert [(ref.ref, ref.target_commit) for ref in refs.pull_requests] == [('refs/pr/1', info.oid)]
    assert [ref.name for ref in refs.branches] == ['main']
    assert api.upload_folder(repo_id=REPO, folder_path=folder, create_pr=True).pr_num == 2


def test_a_branch_goes_its_own_way(server, api, folder):
    first = server.head(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    head = server.head(REPO)
    api.create_branch(REPO, branch='dev/one', revision=first)
    assert server.refs(REPO) == {'main': head, 'dev/one': first}
    api.upload_file(repo_id=REPO, path_in_repo='a.txt', path_or_fileobj=b'a', revision='dev/one')
    assert set(api.list_repo_files(REPO, revision='dev/one')) == {'.gitattributes', 'a.txt'}
    assert server.head(REPO) == head and 'a.txt' not in server.files(REPO)
    with pytest.raises(HfHubHTTPError, match='already exists') as error:
        api.create_branch(REPO, branch='dev/one')
    assert status(error) == 409
    api.create_branch(REPO, branch='dev/one', exist_ok=True)
    with pytest.raises(BadRequestError):
        api.create_branch(REPO, branch='refs/pr/3')
    with pytest.raises(RevisionNotFoundError):
        api.create_branch(REPO, branch='two', revision='none')
    with pytest.raises(RevisionNotFoundError):
        api.upload_folder(repo_id=REPO, folder_path=folder, revision='none')


def test_a_commit_on_a_parent_that_is_no_longer_the_head_is_refused(server, api, folder):
    first = server.head(REPO)
    second = api.upload_file(repo_id=REPO, path_in_repo='a.txt', path_or_fileobj=b'a').oid
    with pytest.raises(HfHubHTTPError, match='A commit has happened since') as error:
        api.upload_folder(repo_id=REPO, folder_path=folder, parent_commit=first)
    assert status(error) == 412 and server.head(REPO) == second
    third = api.upload_folder(repo_id=REPO, folder_path=folder, parent_commit=second).oid
    assert server.head(REPO) == third
    api.upload_file(repo_id=REPO, path_in_repo='b.txt', path_or_fileobj=b'b', parent_commit=first, create_pr=True)
    assert set(server.files(REPO, 'refs/pr/1')) == {'.gitattributes', 'b.txt'}  # it starts at its parent


def test_deletion_is_part_of_a_commit(server, api, folder):
    api.upload_folder(repo_id=REPO, folder_path=folder)
    api.create_commit(REPO, [CommitOperationDelete('sub/'), CommitOperationDelete('empty.bin'),
                             CommitOperationAdd('subtle.txt', b'stays')], commit_message='Clean')
    assert set(server.files(REPO)) == {'.gitattributes', 'README.md', 'model.safetensors', 'subtle.txt'}


INDEX = '---\nmodel-index:\n- name: model\n  results:\n  - {}\n---\n'
RESULT = '{task: {type: image-classification}, dataset: {type: digits, name: Digits}, metrics: [{type: accuracy%s}]}'


@pytest.mark.parametrize('card, message', [
    ('---\nlicense: [unclosed\n---\n', 'bad YAML'),
    ('---\n- license\n---\n', '"value" must be of type object'),
    ('---\nlicense: 2\n---\n', '"license" must be a string'),
    ('---\nmodel-index: model\n---\n', '"model-index" must be an array'),
    ('---\nmodel-index:\n- results: []\n---\n', r'"model-index\[0\].name" is required'),
    (INDEX.format(RESULT % ''), r'"model-index\[0\].results\[0\].metrics\[0\].value" is required')])
def test_a_card_that_is_not_valid_is_refused_before_anything_is_uploaded(server, api, folder, card, message):
    head = server.head(REPO)
    (folder / 'README.md').write_text(card)
    with pytest.raises(ValueError, match=f'Invalid metadata in README.md.\n- {message}'):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert server.head(REPO) == head and not server.blobs(REPO)


def test_a_card_that_is_valid_is_taken_and_one_without_metadata_warned_of(server, api):
    api.upload_file(repo_id=REPO, path_in_repo='README.md', path_or_fileobj=CARD.encode())
    card = INDEX.format(RESULT % ', value: 97.5')
    api.upload_file(repo_id=REPO, path_in_repo='README.md', path_or_fileobj=card.encode())
    [result] = api.model_info(REPO).card_data.eval_results
    assert (result.dataset_name, result.metric_value) == ('Digits', 97.5)
    with pytest.warns(UserWarning, match='empty or missing yaml metadata'):
        api.upload_file(repo_id=REPO, path_in_repo='README.md', path_or_fileobj=b'# A model\n')
    assert server.files(REPO)['README.md'] == b'# A model\n'


def test_a_card_is_checked_by_the_commit_too(server, api, monkeypatch):
    monkeypatch.setattr(HfApi, '_validate_yaml', lambda *_, **__: None)
    head = server.head(REPO)
    with pytest.raises(BadRequestError, match='"license" must be a string'):
        api.upload_file(repo_id=REPO, path_in_repo='README.md', path_or_fileobj=b'---\nlicense: 2\n---\n')
    assert server.head(REPO) == head


def start(server, folder, tmp_path):
    env = server.environment(tmp_path / 'home', token=server.token)
    return subprocess.Popen([sys.executable, '-c', UPLOAD, str(folder)], env=env, stderr=subprocess.PIPE, text=True)


def test_a_client_killed_before_its_commit_leaves_the_head_and_another_finishes(server, api, folder, tmp_path):
    head = server.head(REPO)
    hold = server.block_on('POST', '/commit/main')
    client = start(server, folder, tmp_path)
    hold.wait()
    assert server.blobs(REPO) and client.poll() is None
    client.kill()
    client.communicate()
    hold.release()
    assert server.refs(REPO) == {'main': head} and list(server.files(REPO)) == ['.gitattributes']
    again = start(server, folder, tmp_path)
    assert again.communicate(timeout=60)[1] == '' and again.returncode == 0
    assert server.files(REPO).items() > contents(folder).items()
    assert len(paths(server, 'PUT')) == 1 and len(api.list_repo_commits(REPO)) == 2


def test_a_client_killed_in_an_upload_leaves_neither_blob_nor_commit(server, api, folder, tmp_path):
    (folder / 'model.safetensors').write_bytes(WEIGHTS * 40)  # more than the buffers between them hold
    head = server.head(REPO)
    hold = server.block_on('PUT', '/lfs/')
    client = start(server, folder, tmp_path)
    hold.wait()
    client.kill()
    client.communicate()
    hold.release()
    assert server.head(REPO) == head and not server.blobs(REPO)
    assert not [path for path in paths(server, 'POST') if '/commit/' in path]


def test_a_request_that_was_held_goes_on_when_released(server, api):
    hold = server.block_on('POST', '/commit/main')
    future = api.run_as_future(api.upload_file, repo_id=REPO, path_in_repo='a.txt', path_or_fileobj=b'a')
    hold.wait()
    assert 'a.txt' not in server.files(REPO)
    hold.release()
    assert server.files(REPO)['a.txt'] == b'a' and future.result(timeout=30).oid == server.head(REPO)


def test_faults_happen_where_and_as_often_as_asked(server, api, folder):
    head = server.head(REPO)
    server.fail_on(('PUT', '/lfs/'), 'drop', count=1)
    server.fail_on(lambda method, path: '/commit/' in path, 503, count=1)
    with pytest.raises(HfHubHTTPError, match='a fault that the test asked for') as error:
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert status(error) == 503 and server.head(REPO) == head
    assert len(paths(server, 'PUT')) == 2 and len(server.blobs(REPO)) == 1  # the client tried again
    server.fail_on(('POST', '/commit/'), 'drop-answer', count=1)
    with pytest.raises(Exception, match='(?i)disconnected|reset'):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert server.files(REPO).items() > contents(folder).items()  # though the client does not know


def post(server, path, body):
    headers = {'Authorization': f'Bearer {server.token}', 'Content-Type': 'application/json'}
    request = urllib.request.Request(server.endpoint + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def test_a_blob_must_be_what_was_announced(server, api):
    oid, other = (hashlib.sha256(content).hexdigest() for content in (b'right', b'other'))
    batch = {'operation': 'upload', 'transfers': ['basic'], 'objects': [{'oid': oid, 'size': 5}]}
    [blob] = post(server, f'/{REPO}.git/info/lfs/objects/batch', batch)['objects']
    verify = blob['actions']['verify']['href'].removeprefix(server.endpoint)
    for content in (b'wrong', b'longer'):
        with pytest.raises(urllib.error.HTTPError, match='400'):
            urllib.request.urlopen(urllib.request.Request(blob['actions']['upload']['href'], content, method='PUT'))
    with pytest.raises(urllib.error.HTTPError, match='404'):
        post(server, verify, {'oid': oid, 'size': 5})
    urllib.request.urlopen(urllib.request.Request(blob['actions']['upload']['href'], b'right', method='PUT')).close()
    post(server, verify, {'oid': oid, 'size': 5})
    with pytest.raises(urllib.error.HTTPError, match='400'):
        post(server, verify, {'oid': oid, 'size': 6})
    assert list(server.blobs(REPO)) == [oid] and list(server.files(REPO)) == ['.gitattributes']
    operation = CommitOperationAdd('a.bin', b'other')
    operation._upload_mode, operation._is_uploaded = 'lfs', True  # a client that believes it has uploaded it
    with pytest.raises(BadRequestError, match='LFS pointer'):
        api.create_commit(REPO, [operation], commit_message='Nothing behind it')
    assert other not in server.blobs(REPO) and 'a.bin' not in server.files(REPO)


def test_a_request_that_is_cut_short_has_no_effect(server, api):
    lines = [{'key': 'header', 'value': {'summary': 'Cut'}},
             {'key': 'file', 'value': {'path': 'a.txt', 'content': ''}}]
    body = ''.join(json.dumps(line) + '\n' for line in lines).encode()
    for missing, answered in ((9, False), (0, True)):
        head = server.head(REPO)
        connection = http.client.HTTPConnection(server.endpoint.removeprefix('http://'))
        connection.putrequest('POST', f'/api/models/{REPO}/commit/main')
        connection.putheader('Authorization', f'Bearer {server.token}')
        connection.putheader('Content-Length', str(len(body) + missing))
        connection.endheaders(body)
        connection.sock.shutdown(socket.SHUT_WR)
        with connection.sock.makefile('rb') as answer:
            assert bool(answer.read()) == answered == (server.head(REPO) != head)
        connection.close()


def test_a_hostile_repository_can_be_made(server, api, stranger, tmp_path):
    sha = server.put('someone/hostile', {'pytorch_model.bin': b'a pickle', '../evil': b'outside', 'a b#?.txt': b'odd'})
    assert sha == server.head('someone/hostile')
    assert set(stranger.list_repo_files('someone/hostile')) == {'.gitattributes', *server.files('someone/hostile')}
    assert '../evil' in stranger.list_repo_files('someone/hostile')
    for path, content in (('pytorch_model.bin', b'a pickle'), ('a b#?.txt', b'odd')):
        with open(stranger.hf_hub_download('someone/hostile', path, cache_dir=tmp_path), 'rb') as file:
            assert file.read() == content
    server.put('someone/hostile', {'new.txt': b'new'}, revision='dev')
    assert 'new.txt' not in server.files('someone/hostile') and '../evil' in server.files('someone/hostile', 'dev')
    server.put('someone/secret', {'a.txt': b'a'}, private=True)
    assert api.repo_exists('someone/secret') and not stranger.repo_exists('someone/secret')


def test_a_subprocess_gets_this_server_and_nothing_of_this_machines(server, tmp_path, monkeypatch):
    for name in ('HF_TOKEN', 'HF_HUB_OFFLINE', 'HUGGING_FACE_HUB_TOKEN', 'TRANSFORMERS_OFFLINE', 'HF_HUB_CACHE'):
        monkeypatch.setenv(name, '1')
    env = server.environment(tmp_path)
    assert {name: value for name, value in env.items() if name.startswith(('HF_', 'HUGGING', 'TRANSFORMERS'))} == {
        'HF_ENDPOINT': server.endpoint, 'HF_HOME': str(tmp_path), 'HF_HUB_DISABLE_XET': '1',
        'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1'}
    assert env['PATH'] and server.environment(tmp_path, token=server.token)['HF_TOKEN'] == server.token
