"""A stand-in for the Hugging Face Hub on this machine: what its Python client asks of model repositories, without Xet.

The real client talks to it, in a subprocess with ``server.environment(cache_dir)`` or here with
``HfApi(endpoint=server.endpoint)``. Repositories live in memory. A blob that is uploaded by LFS is only stored; nothing
but a commit moves a ref, so what a client that fails half-way leaves behind can be seen.
"""
import base64
import hashlib
import json
import os
import re
import secrets
import select
import socket
import sys
import threading
import traceback
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

LFS_EXTENSIONS = ('.safetensors', '.bin', '.png', '.onnx', '.pt', '.pth')
GIT_ATTRIBUTES = ''.join(f'*{ext} filter=lfs diff=lfs merge=lfs -text\n' for ext in LFS_EXTENSIONS).encode()
FIRST_COMMIT = 'initial commit'
NO_CARD = 'empty or missing yaml metadata in repo card'


def stored_by_lfs(path, size):
    """Whether the Hub keeps a file of this name in LFS; the client commits empty files as regular ones."""
    return path.endswith(LFS_EXTENSIONS) and size > 0


def _git_hash(content):
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


class Refusal(Exception):
    """An answer that is an error, in the form that the client turns into its exceptions."""

    def __init__(self, status, message, code=None, headers=None):
        super().__init__(message)
        self.status, self.headers = status, {'X-Error-Message': ' '.join(message.split()), **(headers or {})}
        if code:
            self.headers['X-Error-Code'] = code

    def answer(self):
        return Answer({'error': str(self)}, self.status, self.headers)


@dataclass
class File:
    """One file of a commit."""

    content: bytes
    lfs: bool = False

    @cached_property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self):
        """What git holds of a file in LFS."""
        text = f'version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n'
        return text.encode()

    @cached_property
    def blob_id(self):
        return _git_hash(self.pointer if self.lfs else self.content)

    @property
    def etag(self):
        return self.sha256 if self.lfs else self.blob_id


@dataclass
class Commit:
    sha: str
    parent: str | None
    title: str
    message: str
    date: str
    files: dict[str, File]


@dataclass
class Repo:
    """One model repository: its refs, its commits, and the LFS blobs that were uploaded to it."""

    id: str
    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)

    def commit(self, ref, files, title, message='', parent=None):
        """Make a commit of all of ``files``, and move the ref to it."""
        tree = sorted((path, file.blob_id) for path, file in files.items())
        sha = hashlib.sha1(json.dumps([len(self.commits), parent, title, message, tree]).encode()).hexdigest()
        date = datetime.now(timezone.utc).strftime('%Y-%m-%dT%H:%M:%S.000Z')
        self.commits[sha] = Commit(sha, parent, title, message, date, files)
        self.refs[ref] = sha
        return sha

    def at(self, revision):
        """The commit that a branch, a pull request's ref or (the first five digits or more of) a commit's id names."""
        if revision in self.refs:
            return self.commits[self.refs[revision]]
        if re.fullmatch('[0-9a-f]{5,40}', revision):
            for sha, commit in self.commits.items():
                if sha.startswith(revision):
                    return commit
        raise Refusal(404, f'Invalid rev id: {revision}', 'RevisionNotFound')

    def history(self, revision):
        commit = self.at(revision)
        yield commit
        while commit.parent:
            commit = self.commits[commit.parent]
            yield commit


@dataclass
class Request:
    method: str
    url: str
    headers: dict[str, str]
    body: bytes

    def __post_init__(self):
        split = urlsplit(self.url)
        self.path, self.query = split.path, parse_qs(split.query)

    def json(self):
        return json.loads(self.body or b'{}')

    def flag(self, name):
        return self.query.get(name, ['0'])[0].lower() in ('1', 'true')


class Answer:
    """A response: bytes, or what becomes JSON."""

    def __init__(self, content, status=200, headers=None):
        self.status, self.headers = status, dict(headers or {})
        self.body = content
        if not isinstance(content, bytes):
            self.body = json.dumps(content, default=str).encode()  # a card may have dates
            self.headers['Content-Type'] = 'application/json; charset=utf-8'


class Hold:
    """Requests that the server keeps waiting; ``HubServer.block_on`` makes it."""

    def __init__(self, matches):
        self.matches = matches
        self._reached, self._released = threading.Event(), threading.Event()
        self._kept, self._changed = 0, threading.Condition()

    def wait(self, timeout=60):
        """Until such a request has arrived; it then waits, its body not read. TimeoutError where none comes."""
        if not self._reached.wait(timeout):
            raise TimeoutError('no request came that the server is to hold')

    def release(self, timeout=60):
        """Let them go on, and return when they are dealt with. One whose client is gone by now has no effect."""
        self._released.set()
        with self._changed:
            if not self._changed.wait_for(lambda: not self._kept, timeout):
                raise TimeoutError('a request that was held is not done')

    def __enter__(self):
        with self._changed:
            self._kept += 1
        self._reached.set()
        self._released.wait()
        return self

    def __exit__(self, *_):
        with self._changed:
            self._kept -= 1
            self._changed.notify_all()


@dataclass
class _Fault:
    matches: object
    how: object
    count: int | None


def _matcher(match):
    if callable(match):
        return match
    wanted, part = match
    return lambda method, path: method == wanted and part in path


class HubServer:
    """The server, running while in its ``with`` block.

    Attributes:
        endpoint: The address, for ``HF_ENDPOINT`` or ``HfApi(endpoint=...)``.
        token: The only token that is good; it may write anywhere.
        user: Whose token it is, and whose are repositories that are named without an owner.
        requests: All requests so far: (method, path with its query as it was sent, headers by lower-case name).
    """

    def __init__(self, token='hf_goodtoken', user='tester'):
        self.token, self.user, self.requests = token, user, []
        self._repos, self._tickets, self._holds, self._faults = {}, {}, [], []
        self._lock, self._closed = threading.RLock(), False
        self._http = _Server(('127.0.0.1', 0), _Handler)
        self._http.hub = self
        self.endpoint = f'http://127.0.0.1:{self._http.server_port}'

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._closed = True  # what is still held is dropped, not done
        for hold in self._holds:
            hold.release()
        self._http.shutdown()
        self._http.server_close()

    def environment(self, cache_dir, token=None):
        """A subprocess's whole environment: this one's, without its own Hugging Face settings, with this server's."""
        kept = {name: value for name, value in os.environ.items()
                if not name.startswith(('HF_', 'HUGGING', 'TRANSFORMERS_'))}
        switches = ('HF_HUB_DISABLE_XET', 'HF_HUB_DISABLE_TELEMETRY', 'HF_HUB_DISABLE_PROGRESS_BARS')
        return {**kept, **dict.fromkeys(switches, '1'), **dict.fromkeys(('NO_PROXY', 'no_proxy'), '127.0.0.1'),
                'HF_ENDPOINT': self.endpoint, 'HF_HOME': str(cache_dir), **({'HF_TOKEN': token} if token else {})}

    def files(self, repo_id, revision='main'):
        """The content of every file, by path."""
        with self._lock:
            return {path: file.content for path, file in self._repos[repo_id].at(revision).files.items()}

    def head(self, repo_id, revision='main'):
        """The id of the commit that a revision names."""
        with self._lock:
            return self._repos[repo_id].at(revision).sha

    def refs(self, repo_id):
        """The commit of each ref: branches by name, pull requests as ``refs/pr/1``."""
        with self._lock:
            return dict(self._repos[repo_id].refs)

    def blobs(self, repo_id):
        """What was uploaded by LFS, by SHA-256, whether or not a commit names it."""
        with self._lock:
            return dict(self._repos[repo_id].blobs)

    def put(self, repo_id, files, *, revision='main', private=False, title='put by the test'):
        """Add files by a commit that no client made, of any names, in a repository or branch made where it is missing.

        Returns:
            The commit's id.
        """
        with self._lock:
            repo = self._repos.get(repo_id) or self._make(repo_id, private)
            repo.refs.setdefault(revision, repo.refs['main'])
            new = {path: File(content, stored_by_lfs(path, len(content))) for path, content in files.items()}
            repo.blobs.update({file.sha256: file.content for file in new.values() if file.lfs})
            head = repo.at(revision)
            return repo.commit(revision, {**head.files, **new}, title, parent=head.sha)

    def fail_on(self, match, how, count=None):
        """Make requests fail. Where several faults match, the first that was asked for is taken.

        Args:
            match: A method and a part of the path (with its query, as sent), or a predicate of the method and the path.
            how: ``'drop'`` closes the connection without reading the body, ``'drop-answer'`` does so after the request
                took effect, and a number is the status to answer without effect. The client asks again after a drop
                and after 429 and 5xx in most calls (not for a commit), up to five times, which takes 23 seconds.
            count: How many requests fail; all of them, if not given.
        """
        assert how in ('drop', 'drop-answer') or isinstance(how, int), how
        self._faults.append(_Fault(_matcher(match), how, count))

    def block_on(self, method, path):
        """Keep requests of this method, with this in their path, waiting. Returns the :class:`Hold` to let them go."""
        self._holds.append(Hold(_matcher((method, path))))
        return self._holds[-1]

    def _make(self, repo_id, private):
        repo = self._repos[repo_id] = Repo(repo_id, private)
        repo.commit('main', {'.gitattributes': File(GIT_ATTRIBUTES)}, FIRST_COMMIT)
        return repo

    def _take_fault(self, method, path):
        with self._lock:
            for fault in self._faults:
                if fault.count != 0 and fault.matches(method, path):
                    fault.count = fault.count and fault.count - 1
                    return fault.how
        return None

    def _knows(self, request):
        """Whether the request has the token; a wrong one is refused even where none is needed."""
        given = request.headers.get('authorization')
        if given is not None and given != f'Bearer {self.token}':
            raise Refusal(401, 'Invalid credentials in Authorization header')
        return given is not None

    def _answer(self, request):
        try:
            with self._lock:
                return self._dispatch(request)
        except Refusal as refusal:
            return refusal.answer()
        except Exception:
            traceback.print_exc()
            return Answer({'error': traceback.format_exc()}, 500)

    def _dispatch(self, request):
        for method, pattern, endpoint, writes in _ENDPOINTS:
            match = pattern.fullmatch(request.path)
            if match and method == request.method.replace('HEAD', 'GET'):
                names = {name: unquote(value) for name, value in match.groupdict().items()}
                known = self._knows(request)
                if writes and not known:
                    raise Refusal(401, 'Invalid username or password.')
                if 'repo' in names:
                    names['repo'] = self._visible(names['repo'], known)
                return endpoint(self, request, **names)
        raise Refusal(404, 'There is no such page.')

    def _visible(self, repo_id, known):
        repo = self._repos.get(repo_id)
        if repo is None or (repo.private and not known):
            raise Refusal(404, 'Repository not found', 'RepoNotFound')
        return repo


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was killed
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Reads requests and writes answers; what they mean is in the endpoints below."""

    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    timeout = 60

    def _serve(self):
        hub, headers = self.server.hub, {name.lower(): value for name, value in self.headers.items()}
        hub.requests.append((self.command, self.path, headers))
        with ExitStack() as stack:
            held = [stack.enter_context(hold) for hold in list(hub._holds) if hold.matches(self.command, self.path)]
            how = hub._take_fault(self.command, self.path)
            body = None if how == 'drop' or hub._closed else self._body()
            if body is None or (held and self._client_is_gone()):
                self.close_connection = True
                return
            if isinstance(how, int):
                answer = Answer({'error': 'a fault that the test asked for'}, how)
            else:
                answer = hub._answer(Request(self.command, self.path, headers, body))
            if how == 'drop-answer':
                self.close_connection = True
                return
        self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _body(self):
        """The request's body, or None where the client went away before its end."""
        try:
            if self.headers.get('Transfer-Encoding', '').lower() == 'chunked':
                return b''.join(self._chunks())
            length = int(self.headers.get('Content-Length', 0))
            body = self.rfile.read(length)
            return body if len(body) == length else None
        except (OSError, ValueError):
            return None

    def _chunks(self):
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _client_is_gone(self):
        try:
            readable = select.select([self.connection], [], [], 0)[0]
            return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b''
        except OSError:
            return True

    def _send(self, answer):
        self.send_response(answer.status)
        for name, value in {'Content-Length': len(answer.body), **answer.headers}.items():
            self.send_header(name, str(value).encode('ascii', 'replace').decode())
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(answer.body)

    def log_message(self, *_):
        pass


_ENDPOINTS = []
_GROUPS = {'repo': '[^/]+/[^/]+', 'path': '.+'}


def _endpoint(method, path, writes=False):
    """Let a function answer a path; the names in braces are its arguments, ``repo`` as the Repo that may be seen."""
    pattern = re.sub(r'\\{(\w+)\\}', lambda m: f'(?P<{m[1]}>{_GROUPS.get(m[1], "[^/]+")})', re.escape(path))

    def register(function):
        _ENDPOINTS.append((method, re.compile(pattern), function, writes))
        return function

    return register


@_endpoint('GET', '/api/whoami-v2', writes=True)
def _whoami(hub, request):
    return Answer({'type': 'user', 'id': '0', 'name': hub.user, 'fullname': hub.user, 'isPro': False, 'orgs': [],
                   'auth': {'type': 'access_token', 'accessToken': {'displayName': 'test', 'role': 'write'}}})


@_endpoint('POST', '/api/repos/create', writes=True)
def _create_repo(hub, request):
    asked = request.json()
    if asked.get('type', 'model') != 'model':
        raise Refusal(400, 'This server has only models.')
    repo_id = f'{asked.get("organization") or hub.user}/{asked["name"]}'
    about = {'url': f'{hub.endpoint}/{repo_id}', 'name': repo_id}
    if repo_id in hub._repos:
        return Answer({'error': 'You already created this model repo', **about}, 409)
    hub._make(repo_id, asked.get('visibility') == 'private' or bool(asked.get('private')))
    return Answer({**about, 'id': repo_id})


@_endpoint('GET', '/api/models/{repo}')
@_endpoint('GET', '/api/models/{repo}/revision/{revision}')
def _model_info(hub, request, repo, revision='main'):
    commit = repo.at(revision)
    card = _card(commit.files['README.md'].content.decode(errors='replace'))[0] if 'README.md' in commit.files else {}
    siblings = [_sibling(path, file, request.flag('blobs')) for path, file in sorted(commit.files.items())]
    return Answer({
        'id': repo.id, 'modelId': repo.id, 'author': repo.id.split('/')[0], 'sha': commit.sha, 'private': repo.private,
        'gated': False, 'disabled': False, 'downloads': 0, 'likes': 0, 'lastModified': commit.date,
        'createdAt': list(repo.history('main'))[-1].date, 'siblings': siblings, 'cardData': card,
        'tags': [], **{key: card[key] for key in ('tags', 'library_name', 'pipeline_tag') if key in card},
    }, headers={'X-Repo-Commit': commit.sha})


def _sibling(path, file, blobs):
    about = {'rfilename': path}
    if blobs:
        about.update(size=len(file.content), blobId=file.blob_id)
        if file.lfs:
            about['lfs'] = {'sha256': file.sha256, 'size': len(file.content), 'pointerSize': len(file.pointer)}
    return about


@_endpoint('GET', '/api/models/{repo}/tree/{revision}')
@_endpoint('GET', '/api/models/{repo}/tree/{revision}/{path}')
def _tree(hub, request, repo, revision, path=''):
    commit, start = repo.at(revision), f'{path}/' if path else ''
    inside = {name for name in commit.files if name.startswith(start)}
    if path and not inside:
        raise Refusal(404, f'{path} does not exist on "{revision}"', 'EntryNotFound', {'X-Repo-Commit': commit.sha})
    folders = {start + str(parent) for name in inside for parent in PurePosixPath(name[len(start):]).parents}
    entries = sorted(inside | (folders - {f'{start}.'}))
    if not request.flag('recursive'):
        entries = [name for name in entries if '/' not in name[len(start):]]
    return Answer([_entry(commit, name) for name in entries])


def _entry(commit, path):
    file = commit.files.get(path)
    if file is None:
        return {'type': 'directory', 'oid': _git_hash(path.encode()), 'size': 0, 'path': path}
    about = {'type': 'file', 'oid': file.blob_id, 'size': len(file.content), 'path': path}
    if file.lfs:
        about['lfs'] = {'oid': file.sha256, 'size': len(file.content), 'pointerSize': len(file.pointer)}
    return about


@_endpoint('POST', '/api/models/{repo}/paths-info/{revision}')
def _paths_info(hub, request, repo, revision):
    commit = repo.at(revision)
    paths = parse_qs(request.body.decode()).get('paths', [])
    return Answer([_entry(commit, path) for path in paths
                   if path in commit.files or any(name.startswith(f'{path}/') for name in commit.files)])


@_endpoint('GET', '/api/models/{repo}/commits/{revision}')
def _commits(hub, request, repo, revision):
    return Answer([{'id': commit.sha, 'title': commit.title, 'message': commit.message, 'date': commit.date,
                    'authors': [{'user': hub.user}]} for commit in repo.history(revision)])


@_endpoint('GET', '/api/models/{repo}/refs')
def _refs(hub, request, repo):
    branches, pulls = [], []
    for name, sha in repo.refs.items():
        pull = name.startswith('refs/pr/')
        about = {'name': name, 'ref': name if pull else f'refs/heads/{name}', 'targetCommit': sha}
        (pulls if pull else branches).append(about)
    shown = {'pullRequests': pulls} if request.flag('include_prs') else {}
    return Answer({'branches': branches, 'converts': [], 'tags': [], **shown})


@_endpoint('POST', '/api/models/{repo}/branch/{branch}', writes=True)
def _create_branch(hub, request, repo, branch):
    if branch.startswith('refs/'):
        raise Refusal(400, f'Invalid reference for a branch: {branch}')
    if branch in repo.refs:
        raise Refusal(409, f'Reference already exists: refs/heads/{branch}')
    repo.refs[branch] = repo.at(request.json().get('startingPoint') or 'main').sha
    return Answer({})


@_endpoint('GET', '/{repo}/resolve/{revision}/{path}')
def _resolve(hub, request, repo, revision, path):
    commit = repo.at(revision)
    headers = {'X-Repo-Commit': commit.sha, 'Accept-Ranges': 'bytes'}
    if path not in commit.files:
        raise Refusal(404, 'Entry not found', 'EntryNotFound', headers)
    file = commit.files[path]
    headers['ETag'] = f'"{file.etag}"'
    if file.lfs:
        headers.update({'X-Linked-Size': len(file.content), 'X-Linked-ETag': f'"{file.etag}"'})
    headers['Content-Type'] = 'application/octet-stream' if file.lfs else 'text/plain; charset=utf-8'
    return _ranged(file.content, request.headers.get('range'), headers)


def _ranged(content, asked, headers):
    """All of a file, or the one range of bytes that a request asks for."""
    match = re.fullmatch(r'bytes=(\d*)-(\d*)', asked or '')
    if not match or not any(match.groups()):
        return Answer(content, headers=headers)
    first, last, size = match[1], match[2], len(content)
    begin = int(first) if first else max(size - int(last), 0)
    end = min(int(last) + 1, size) if first and last else size
    if begin >= end:
        return Answer(b'', 416, {**headers, 'Content-Range': f'bytes */{size}'})
    return Answer(content[begin:end], 206, {**headers, 'Content-Range': f'bytes {begin}-{end - 1}/{size}'})


@_endpoint('POST', '/api/validate-yaml')
def _validate_yaml(hub, request):
    _, errors, warnings = _card(request.json()['content'])
    return Answer({'errors': [{'message': message} for message in errors],
                   'warnings': [{'message': message} for message in warnings]}, 400 if errors else 200)


def _card(text):
    """What a model card's YAML block says, what is wrong with it, and what to warn of."""
    match = re.match(r'\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)', text, re.DOTALL)
    if not match:
        return {}, [], [NO_CARD]
    try:
        card = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return {}, [f'bad YAML: {error}'], []
    if card is None:
        return {}, [], [NO_CARD]
    if not isinstance(card, dict):
        return {}, ['"value" must be of type object'], []
    errors = []
    if not isinstance(card.get('license', ''), str):
        errors.append('"license" must be a string')
    if not isinstance(card.get('model-index', []), list):
        errors.append('"model-index" must be an array')
    else:
        errors += _index_errors(card.get('model-index', []))
    return card, errors, []


def _index_errors(index):
    """What the entries of a model index lack of what the Hub's own reader of them takes for granted."""
    for i, model in enumerate(index):
        where = f'model-index[{i}]'
        if not isinstance(model, dict) or not isinstance(model.get('name'), str):
            yield f'"{where}.name" is required'
        elif not isinstance(model.get('results'), list):
            yield f'"{where}.results" must be an array'
        else:
            for j, result in enumerate(model['results']):
                yield from _result_errors(result, f'{where}.results[{j}]')


def _result_errors(result, where):
    if not isinstance(result, dict):
        yield f'"{where}" must be of type object'
        return
    for part, keys in (('task', ['type']), ('dataset', ['type', 'name'])):
        for key in keys:
            if not isinstance(result.get(part), dict) or not isinstance(result[part].get(key), str):
                yield f'"{where}.{part}.{key}" is required'
    metrics = result.get('metrics')
    if not isinstance(metrics, list) or not metrics:
        yield f'"{where}.metrics" is required'
        return
    for k, metric in enumerate(metrics):
        for key in ('type', 'value'):
            if not isinstance(metric, dict) or metric.get(key) is None:
                yield f'"{where}.metrics[{k}].{key}" is required'


@_endpoint('POST', '/api/models/{repo}/preupload/{revision}', writes=True)
def _preupload(hub, request, repo, revision):
    there, answers = repo.at(revision).files, []
    for file in request.json()['files']:
        mode = 'lfs' if stored_by_lfs(file['path'], file['size']) else 'regular'
        about = {'path': file['path'], 'uploadMode': mode, 'shouldIgnore': False}
        if file['path'] in there:
            about['oid'] = there[file['path']].etag
        answers.append(about)
    return Answer({'files': answers})


@_endpoint('POST', '/{repo}.git/info/lfs/objects/batch', writes=True)
def _lfs_batch(hub, request, repo):
    asked = request.json()
    if asked.get('operation') != 'upload' or 'basic' not in asked.get('transfers', ['basic']):
        raise Refusal(422, 'This server takes only basic uploads.')
    objects = []
    for blob in asked['objects']:
        about = {'oid': blob['oid'], 'size': blob['size']}
        if blob['oid'] not in repo.blobs:
            ticket = secrets.token_hex(8)  # an upload carries no token: its address is the permission
            hub._tickets[ticket] = repo, blob['oid'], blob['size']
            verify = f'{hub.endpoint}/{quote(repo.id)}.git/info/lfs/verify'
            about['actions'] = {'upload': {'href': f'{hub.endpoint}/lfs/{ticket}/{blob["oid"]}'},
                                'verify': {'href': verify}}
        objects.append(about)
    return Answer({'transfer': 'basic', 'objects': objects})


@_endpoint('PUT', '/lfs/{ticket}/{oid}')
def _lfs_upload(hub, request, ticket, oid):
    repo, expected, size = hub._tickets.get(ticket, (None, None, None))
    if repo is None or oid != expected:
        raise Refusal(403, 'Nothing was to be uploaded here.')
    if len(request.body) != size or hashlib.sha256(request.body).hexdigest() != oid:
        raise Refusal(400, 'The content is not what was announced.')
    repo.blobs[oid] = request.body
    return Answer(b'', headers={'ETag': f'"{oid}"'})


@_endpoint('POST', '/{repo}.git/info/lfs/verify', writes=True)
def _lfs_verify(hub, request, repo):
    asked = request.json()
    content = repo.blobs.get(asked['oid'])
    if content is None:
        raise Refusal(404, f'{asked["oid"]} was not uploaded')
    if len(content) != asked['size']:
        raise Refusal(400, f'{asked["oid"]} has {len(content)} bytes, not {asked["size"]}')
    return Answer({'message': 'ok'})


@_endpoint('POST', '/api/models/{repo}/commit/{revision}', writes=True)
def _commit(hub, request, repo, revision):
    header, *operations = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    about, pull, ref = header['value'], request.flag('create_pr'), revision
    if revision not in repo.refs:
        raise Refusal(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
    head, parent = repo.at(revision), about.get('parentCommit')
    if pull:
        head = repo.at(parent or revision)
        number = 1 + sum(name.startswith('refs/pr/') for name in repo.refs)
        ref = f'refs/pr/{number}'
    elif parent and not head.sha.startswith(parent):
        raise Refusal(412, 'A commit has happened since. Please refresh and try again.')
    files = dict(head.files)
    for operation in operations:
        _apply(repo, files, operation['key'], operation['value'])
    sha = repo.commit(ref, files, about['summary'], about.get('description', ''), head.sha)
    answer = {'success': True, 'commitOid': sha, 'commitUrl': f'{hub.endpoint}/{repo.id}/commit/{sha}'}
    if pull:
        answer['pullRequestUrl'] = f'{hub.endpoint}/{repo.id}/discussions/{number}'
    return Answer(answer)


def _apply(repo, files, key, value):
    """Do one operation of a commit to a dict of files."""
    path = value['path']
    if any(part in ('', '.', '..', '.git') for part in path.rstrip('/').split('/')):
        raise Refusal(400, f'Invalid path: {path}')
    if key == 'file':
        files[path] = File(base64.b64decode(value['content']))
        if path == 'README.md' and (errors := _card(files[path].content.decode(errors='replace'))[1]):
            raise Refusal(400, f'Invalid metadata in README.md: {"; ".join(errors)}')
    elif key == 'lfsFile':
        content = repo.blobs.get(value['oid'])
        if content is None or len(content) != value.get('size', len(content)):
            raise Refusal(400, 'Your push was rejected because an LFS pointer pointed to a file that does not exist.')
        files[path] = File(content, lfs=True)
    elif key in ('deletedFile', 'deletedFolder'):
        inside = f'{path.rstrip("/")}/' if key == 'deletedFolder' else None
        gone = [name for name in files if name == path or (inside and name.startswith(inside))]
        if not gone:
            raise Refusal(404, 'A file with this name doesn\'t exist', 'EntryNotFound')
        for name in gone:
            del files[name]
    else:
        raise Refusal(400, f'unknown operation {key}')
