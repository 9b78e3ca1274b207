"""A small Hugging Face Hub on loopback: what huggingface_hub's client needs, and errors on demand.

    with HubServer() as server:
        server.add_repo('me/x', {'config.json': b'{}'})
        server.fail('/commit/', status=503)
        ...  # a client with HF_ENDPOINT=server.url and HF_TOKEN=WRITE_TOKEN

Files are kept as git and LFS keep them: by the SHA-1 of the git blob, or by SHA-256 where `LFS_SUFFIXES` says so.
Xet, the real Hub's storage for large files, is not there: clients need HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

WRITE_TOKEN, READ_TOKEN = 'hf_secretOfMeToWrite', 'hf_secretOfMeToRead'
TOKENS = {WRITE_TOKEN: ('me', 'write'), READ_TOKEN: ('me', 'read')}
LFS_SUFFIXES = ('.safetensors', '.png', '.bin', '.pth')


def git_oid(content: bytes) -> str:
    """SHA-1 that git gives a file of this content."""
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


@dataclass
class Commit:
    """One commit: the files after it."""

    oid: str
    title: str
    files: dict[str, bytes]
    parent: 'Commit | None' = None


@dataclass
class Repo:
    """A repository, of any type: the last commit of each ref, of which `refs/pr/N` are pull requests."""

    id: str
    private: bool = False
    refs: dict[str, Commit] = field(default_factory=dict)

    def commit(self, ref: str, title: str, files: dict[str, bytes]) -> Commit:
        """Put a commit with these files, and no others, on `ref`."""
        parent = self.refs.get(ref)
        number = sum(len(self.log(name)) for name in self.refs)
        oid = hashlib.sha1(f'{self.id}{ref}{number}{title}'.encode()).hexdigest()
        self.refs[ref] = Commit(oid, title, files, parent)
        return self.refs[ref]

    def log(self, ref: str = 'main') -> list[Commit]:
        """The commits of `ref`, the newest first."""
        commits, commit = [], self.refs.get(ref)
        while commit:
            commits.append(commit)
            commit = commit.parent
        return commits

    def files(self, ref: str = 'main') -> dict[str, bytes]:
        """The files of `ref`, without the .gitattributes that each repository starts with."""
        return {path: content for path, content in self.refs[ref].files.items() if path != '.gitattributes'}

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch, a pull request's ref or a commit's hash names."""
        commits = (commit for ref in self.refs for commit in self.log(ref))
        return self.refs.get(revision) or next((commit for commit in commits if commit.oid == revision), None)


@dataclass
class Fault:
    """An error to make: `status` None breaks the connection; `when` is before or after the request is handled."""

    pattern: str
    status: int | None
    method: str | None
    times: int
    when: str
    stall: float


@dataclass
class Request:
    """A request that came in."""

    method: str
    path: str
    headers: dict[str, str]


class Response(Exception):
    """The response of a route; an error where the status says so."""

    def __init__(self, status: int, body: Any = None, headers: dict[str, str] | None = None, code: str = ''):
        super().__init__(status)
        self.status = status
        self.headers = dict(headers or {})
        if code:
            self.headers['X-Error-Code'] = code
        if isinstance(body, str):
            self.headers['X-Error-Message'] = body
            body = {'error': body}
        self.body = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()


class HubServer:
    """The server; a context manager that starts and stops it.

    Attributes:
        url: For HF_ENDPOINT.
        repos: By id.
        requests: All that came in, also those that ended in an error.
        faults: How many errors were made, and files sent damaged.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.faults = 0
        self._lfs: dict[str, bytes] = {}
        self._faults: list[Fault] = []
        self._damages: dict[str, list[str]] = {}
        self._lock = threading.RLock()
        self._http = ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
        self._http.daemon_threads = True
        self._http.hub = self  # type: ignore[attr-defined]
        self.url = f'http://127.0.0.1:{self._http.server_address[1]}'

    def __enter__(self) -> 'HubServer':
        threading.Thread(target=self._http.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.shutdown()
        self._http.server_close()

    def add_repo(self, repo_id: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repo:
        """Make a repository with one commit."""
        repo = self.repos[repo_id] = Repo(repo_id, private)
        repo.commit('main', 'initial commit', {'.gitattributes': b'*.safetensors filter=lfs\n', **(files or {})})
        return repo

    def fail(
        self,
        pattern: str,
        *,
        status: int | None = None,
        method: str | None = None,
        times: int = 1,
        when: str = 'before',
        stall: float = 0.0,
    ) -> None:
        """Let the next `times` requests whose path `pattern` (a regular expression) matches end in an error.

        Args:
            pattern: Searched in the path with its query.
            status: Of the response; None breaks the connection instead.
            method: Only requests of this method.
            times: How many requests.
            when: 'before': nothing happens on the server. 'after': the request is handled and its response is lost.
            stall: Seconds without a response before it.
        """
        self._faults.append(Fault(pattern, status, method, times, when, stall))

    def clear_faults(self) -> None:
        """Let no further request end in an error."""
        self._faults.clear()

    def damage(self, path: str, how: str, times: int = 1) -> None:
        """Let the next downloads of the file `path` arrive damaged: 'flip' a byte, or 'truncate' at the half."""
        self._damages[path] = [how] * times

    def count(self, method: str, pattern: str) -> int:
        """How many requests of this method came in for paths that `pattern` matches."""
        return sum(request.method == method and bool(re.search(pattern, request.path)) for request in self.requests)

    # What the handler calls

    def _take_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times and fault.method in (None, method) and re.search(fault.pattern, path):
                    fault.times -= 1
                    self.faults += 1
                    return fault
        return None

    def _respond(self, method: str, path: str, token: str | None, headers: dict[str, str], body: bytes) -> Response:
        url = urlsplit(path)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        try:
            with self._lock:
                if token is not None and token not in TOKENS:
                    raise Response(401, 'Invalid credentials in Authorization header')
                user, role = TOKENS.get(token or '', ('', ''))
                for verb, pattern, route in _ROUTES:
                    if verb == method and (match := re.fullmatch(pattern, url.path)):
                        groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                        return route(_Context(self, user, role, query, headers, body), **groups)
                raise Response(404, 'no such route')
        except Response as response:
            return response


@contextmanager
def connected(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[HubServer]:
    """A Hub for this process, whose client has its own cache and token paths, and waits for nothing."""
    with HubServer() as server:
        for name, value in {
            'ENDPOINT': server.url,
            'HUGGINGFACE_CO_URL_TEMPLATE': server.url + '/{repo_id}/resolve/{revision}/{filename}',
            'HF_HUB_OFFLINE': False,
            'HF_HUB_DISABLE_XET': True,
            'HF_HUB_DISABLE_TELEMETRY': True,
            'HF_HUB_CACHE': str(home / 'hub'),
            'HF_TOKEN_PATH': str(home / 'token'),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv('HF_TOKEN', WRITE_TOKEN)
        clock = SimpleNamespace(**{**vars(time), 'sleep': lambda seconds: None})
        monkeypatch.setattr('huggingface_hub.utils._http.time', clock)
        monkeypatch.setattr('huggingface_hub.file_download.time', clock)
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()


@dataclass
class _Context:
    hub: HubServer
    user: str
    role: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def repo(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and repo_id.split('/')[0] != self.user):
            raise Response(404 if self.user else 401, 'Repository not found', code='RepoNotFound')
        return repo

    def check_write(self, namespace: str) -> None:
        if not self.user:
            raise Response(401, 'Invalid username or password.')
        if self.role != 'write' or namespace != self.user:
            raise Response(403, f"You don't have the rights to write to {namespace}")


def _revision(repo: Repo, revision: str) -> Commit:
    commit = repo.find(revision)
    if commit is None:
        raise Response(404, f'Invalid rev id: {revision}', code='RevisionNotFound')
    return commit


def _whoami(context: _Context) -> Response:
    if not context.user:
        raise Response(401, 'Invalid username or password.')
    return Response(200, {'name': context.user, 'auth': {'accessToken': {'role': context.role}}})


def _create(context: _Context) -> Response:
    wanted = context.json()
    namespace = wanted['organization'] or context.user
    context.check_write(namespace)
    repo_id = f'{namespace}/{wanted["name"]}'
    url = f'{context.hub.url}/{repo_id}'
    if repo_id in context.hub.repos:
        return Response(409, {'error': 'You already created this model repo', 'url': url})
    context.hub.add_repo(repo_id, private=wanted.get('visibility') == 'private')
    return Response(200, {'url': url})


def _validate(context: _Context) -> Response:
    return Response(200, {'errors': [], 'warnings': []})


def _info(context: _Context, repo: str, revision: str = 'main') -> Response:
    found = context.repo(repo)
    commit = _revision(found, revision)
    siblings = [{'rfilename': path} for path in commit.files]
    about = {'id': repo, 'sha': commit.oid, 'private': found.private, 'tags': [], 'siblings': siblings}
    return Response(200, {**about, 'downloads': 0, 'likes': 0})


def _branch(context: _Context, repo: str, branch: str) -> Response:
    found = context.repo(repo)
    context.check_write(repo.split('/')[0])
    if branch in found.refs:
        return Response(409, 'Reference already exists')
    found.refs[branch] = found.refs['main']
    return Response(200)


def _tree(context: _Context, repo: str, revision: str) -> Response:
    entries = []
    for path, content in sorted(_revision(context.repo(repo), revision).files.items()):
        entry: dict[str, Any] = {'type': 'file', 'path': path, 'size': len(content), 'oid': git_oid(content)}
        if path.endswith(LFS_SUFFIXES):
            sha256 = hashlib.sha256(content).hexdigest()
            pointer = f'version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n'.encode()
            entry['oid'] = git_oid(pointer)
            entry['lfs'] = {'oid': sha256, 'size': len(content), 'pointerSize': len(pointer)}
        entries.append(entry)
    return Response(200, entries)


def _preupload(context: _Context, repo: str, revision: str) -> Response:
    found = context.repo(repo)
    if 'create_pr' not in context.query:
        context.check_write(repo.split('/')[0])
    files = _revision(found, revision).files
    response = []
    for wanted in context.json()['files']:
        path = wanted['path']
        is_lfs = path.endswith(LFS_SUFFIXES)
        entry = {'path': path, 'uploadMode': 'lfs' if is_lfs else 'regular', 'shouldIgnore': False}
        if path in files:
            entry['oid'] = hashlib.sha256(files[path]).hexdigest() if is_lfs else git_oid(files[path])
        response.append(entry)
    return Response(200, {'files': response})


def _lfs_batch(context: _Context, repo: str) -> Response:
    context.repo(repo)
    objects = []
    for wanted in context.json()['objects']:
        entry = {'oid': wanted['oid'], 'size': wanted['size']}
        if wanted['oid'] not in context.hub._lfs:
            href = f'{context.hub.url}/lfs/{wanted["oid"]}'
            entry['actions'] = {'upload': {'href': href}, 'verify': {'href': f'{href}/verify'}}
        objects.append(entry)
    return Response(200, {'transfer': 'basic', 'objects': objects})


def _lfs_upload(context: _Context, oid: str) -> Response:
    if hashlib.sha256(context.body).hexdigest() != oid:
        raise Response(400, 'the content has another SHA-256')
    context.hub._lfs[oid] = context.body
    return Response(200)


def _lfs_verify(context: _Context, oid: str) -> Response:
    return Response(200 if oid in context.hub._lfs else 404)


def _commit(context: _Context, repo: str, revision: str) -> Response:
    found = context.repo(repo)
    create_pr = 'create_pr' in context.query
    if not create_pr:
        context.check_write(repo.split('/')[0])
    base = _revision(found, revision)
    header: dict[str, Any] = {}
    files = dict(base.files)
    for line in context.body.splitlines():
        item = json.loads(line)
        value = item['value']
        if item['key'] == 'header':
            header = value
        elif item['key'] == 'file':
            files[value['path']] = base64.b64decode(value['content'])
        elif item['key'] == 'lfsFile':
            if value['oid'] not in context.hub._lfs:
                raise Response(400, f'LFS pointer to a file that is not there: {value["path"]}')
            files[value['path']] = context.hub._lfs[value['oid']]
        elif item['key'] == 'deletedFile':
            del files[value['path']]
        else:
            raise Response(400, f'unknown key {item["key"]}')
    if header.get('parentCommit', base.oid) != base.oid:
        raise Response(412, 'A commit has happened since. Please refresh and try again.')
    pull_request_url = None
    if create_pr:
        number = sum(ref.startswith('refs/pr/') for ref in found.refs) + 1
        revision, pull_request_url = f'refs/pr/{number}', f'{context.hub.url}/{repo}/discussions/{number}'
        found.refs[revision] = base
    elif found.refs.get(revision) is not base:
        raise Response(400, f'{revision} is no branch')
    commit = found.commit(revision, header['summary'], files)
    url = f'{context.hub.url}/{repo}/commit/{commit.oid}'
    return Response(200, {'commitUrl': url, 'commitOid': commit.oid, 'pullRequestUrl': pull_request_url})


def _resolve(context: _Context, repo: str, revision: str, path: str) -> Response:
    commit = _revision(context.repo(repo), revision)
    if path not in commit.files:
        raise Response(404, 'Entry not found', {'X-Repo-Commit': commit.oid}, code='EntryNotFound')
    content = commit.files[path]
    etag = hashlib.sha256(content).hexdigest() if path.endswith(LFS_SUFFIXES) else git_oid(content)
    headers = {'X-Repo-Commit': commit.oid, 'ETag': f'"{etag}"', 'Accept-Ranges': 'bytes'}
    damages = context.hub._damages.get(path)
    if damages and 'head' not in context.query:
        headers['X-Damage'] = damages.pop()
        context.hub.faults += 1
    if wanted := re.fullmatch(r'bytes=(\d+)-(\d*)', context.headers.get('range', '')):
        start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
        if start >= len(content):
            raise Response(416, 'out of range', {'Content-Range': f'bytes */{len(content)}'})
        headers['Content-Range'] = f'bytes {start}-{end}/{len(content)}'
        return Response(206, content[start : end + 1], headers)
    return Response(200, content, headers)


def _resolve_head(context: _Context, **names: str) -> Response:
    context.query['head'] = '1'
    return _resolve(context, **names)


_REPO = r'(?P<repo>[\w.-]+/[\w.-]+)'
_API = rf'/api/(?:models|datasets)/{_REPO}'
_FILES = rf'/(?:datasets/)?{_REPO}'
_REV = r'(?P<revision>[^/]+)'
_ROUTES: tuple[tuple[str, str, Any], ...] = (
    ('GET', '/api/whoami-v2', _whoami),
    ('POST', '/api/repos/create', _create),
    ('POST', '/api/validate-yaml', _validate),
    ('GET', _API, _info),
    ('GET', rf'{_API}/revision/{_REV}', _info),
    ('POST', rf'{_API}/branch/(?P<branch>[^/]+)', _branch),
    ('GET', rf'{_API}/tree/{_REV}', _tree),
    ('POST', rf'{_API}/preupload/{_REV}', _preupload),
    ('POST', rf'{_API}/commit/{_REV}', _commit),
    ('POST', rf'{_FILES}\.git/info/lfs/objects/batch', _lfs_batch),
    ('PUT', r'/lfs/(?P<oid>[0-9a-f]{64})', _lfs_upload),
    ('POST', r'/lfs/(?P<oid>[0-9a-f]{64})/verify', _lfs_verify),
    ('GET', rf'{_FILES}/resolve/{_REV}/(?P<path>.+)', _resolve),
    ('HEAD', rf'{_FILES}/resolve/{_REV}/(?P<path>.+)', _resolve_head),
)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        hub: HubServer = self.server.hub  # type: ignore[attr-defined]
        headers = {key.lower(): value for key, value in self.headers.items()}
        body = self._read_body(headers)
        authorization = headers.get('authorization')
        hub.requests.append(Request(self.command, self.path, headers))
        fault = hub._take_fault(self.command, self.path)
        response = None
        if fault is None or fault.when == 'after':
            token = authorization.removeprefix('Bearer ') if authorization else None
            response = hub._respond(self.command, self.path, token, headers, body)
        if fault is not None:
            time.sleep(fault.stall)
            if fault.status is None:
                self.close_connection = True
                return
            response = Response(fault.status, 'on demand')
        assert response is not None
        self._send(response)

    def _read_body(self, headers: dict[str, str]) -> bytes:
        if headers.get('transfer-encoding') != 'chunked':
            return self.rfile.read(int(headers.get('content-length', 0)))
        body = b''
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, response: Response) -> None:
        damage = response.headers.pop('X-Damage', None)
        body = response.body
        if damage == 'flip':
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        self.send_response(response.status)
        for key, value in response.headers.items():
            self.send_header(key, value)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if damage == 'truncate':
            body = body[: len(body) // 2]
            self.close_connection = True
        if self.command != 'HEAD':
            self.wfile.write(body)
