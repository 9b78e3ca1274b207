"""Exported folders to the Hugging Face Hub and back, over connections that break.

The work is huggingface_hub's. Here is what it leaves to its users: repeating a push or pull as a whole, finding out
what arrived by the Hub's checksums, checking a download's, and one line about what went wrong.
"""

import json
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from huggingface_hub import HfApi, ModelInfo, constants, get_session, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars, parse_ratelimit_headers, validate_repo_id
from huggingface_hub.utils import logging as client_logging

from timm_mealv2.errors import UserError, one_line
from timm_mealv2.hub.folder import CONFIG_FILE, EXAMPLES_FOLDER, FILES, is_export, read_config, replacing_export
from timm_mealv2.version import __version__

_logger = logging.getLogger(__name__)

_T = TypeVar('_T')

_PICKLES = ('.bin', '.ckpt', '.joblib', '.pickle', '.pkl', '.pt', '.pth', '.pth.tar')
# With more files than this huggingface_hub's upload over Xet splits a commit that fails into several smaller ones.
_MOST_FILES = 20

_RETRY_DELAYS = (1.0, 3.0, 9.0)  # seconds
_LONGEST_WAIT = 60.0  # seconds that the Hub may want to be left alone (Retry-After)
_TIMEOUT = 120.0  # seconds without a byte; huggingface_hub sets none


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    create_pr: bool = False,
    source: str | os.PathLike[str] | None = None,
) -> str:
    """Push an exported folder to a model repository of the Hugging Face Hub, in one commit or not at all.

    The endpoint and the token are those of huggingface_hub (`HF_ENDPOINT`, `hf auth login`, `HF_TOKEN`). A pickle
    that lies in the repository is removed by the same commit. Nothing is committed where the repository holds these
    files already.

    Args:
        repo_id: USER/NAME; the repository is made if it is not there.
        private: Make it private. One that is there and public is refused.
        revision: Branch, made from the main one if it is not there; the main one if None.
        message: Title of the commit or the pull request.
        create_pr: Open a pull request with the commit.
        source: What an error tells the user to push later, if that is not `folder`.

    Returns:
        URL of the commit or the pull request.

    Raises:
        UserError: Whatever goes wrong: what it was, what arrived, and how to push later.
    """
    folder = Path(folder)
    if create_pr and revision not in (None, constants.DEFAULT_REVISION):
        raise UserError(f'a pull request goes to the main branch: --create-pr cannot go with --revision {revision}.')
    check_repo_id(repo_id, with_namespace=True)
    _check_folder(folder)
    push = _Push(folder, repo_id, private, revision, message or 'Upload with mealv2-hub', create_pr)
    try:
        if get_token() is None:
            raise UserError('there is no token to write with: run `hf auth login` or set HF_TOKEN.')
        with _quiet_client():
            return _retried(push.attempt)
    except Exception as error:  # the client's and its transports' kinds are many; training must survive them all
        reason = _without_token(_reason(error, repo_id, 'write to'))
        later = ['mealv2-hub', 'push', os.fspath(source or folder), repo_id]
        later += ['--private'] * private + ['--create-pr'] * create_pr
        for option, value in (('--revision', revision), ('--message', message)):
            later += [option, value] if value else []
    # Outside of the handler: the client's error may quote the token, and must be in no traceback.
    arrived = f'The new {push.made} is there, but no file.' if push.made else 'Nothing arrived.'
    if push.is_sent:
        try:
            with _quiet_client():
                if url := push.find():
                    return url
        except Exception:
            arrived = 'Whether the files arrived could not be found out.'
    raise UserError(f'{repo_id} was not pushed: {reason} {arrived} Push later: {shlex.join(later)}')


def pull_folder(repo_id: str, out: str | os.PathLike[str] | None = None, *, revision: str | None = None) -> Path:
    """Download an exported folder from the Hugging Face Hub.

    The folder appears when all its files have the checksums that the Hub states.

    Args:
        repo_id: USER/NAME.
        out: The folder to make, which is returned; NAME in the current one if None. An earlier export is replaced.
        revision: Branch, tag or commit; the main branch if None.

    Raises:
        UserError: If the repository cannot be read, holds pickles or is no export, a file arrives damaged, or `out`
            is something else.
    """
    check_repo_id(repo_id)
    out = Path(repo_id.split('/')[-1] if out is None else out)
    api = _client()
    try:
        with _quiet_client(), replacing_export(out) as folder:
            _retried(lambda: _download(api, repo_id, revision, folder))
        return out
    except UserError:
        raise
    except Exception as error:
        reason = _without_token(_reason(error, repo_id, 'read'))
    raise UserError(f'{repo_id} was not pulled: {reason} {out} is as it was.')


def _download(api: HfApi, repo_id: str, revision: str | None, folder: Path) -> None:
    try:
        commit = api.model_info(repo_id, revision=revision, timeout=_TIMEOUT).sha
    except RevisionNotFoundError:
        raise UserError(f'{repo_id} has no revision {revision}.') from None
    except RepositoryNotFoundError:
        _refuse_other_type(api, repo_id)
        log_in = 'your token may not read it' if get_token() else 'you are not logged in: `hf auth login` or HF_TOKEN'
        raise UserError(f'there is no model {repo_id} on the Hub, or it is private and {log_in}.') from None
    entries = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    files = [entry.path for entry in entries if isinstance(entry, RepoFile)]
    if pickles := [path for path in files if _is_pickle(path)]:
        raise UserError(f'{repo_id} holds pickles, which can run any code: {", ".join(pickles)}. It is not pulled.')
    if CONFIG_FILE not in files:
        raise UserError(f'{repo_id} is no model for timm: it has no {CONFIG_FILE}.')
    api.snapshot_download(repo_id, revision=commit, local_dir=folder)
    # The client compares sizes alone.
    verification = api.verify_repo_checksums(repo_id, revision=commit, local_dir=folder)
    if damaged := [mismatch['path'] for mismatch in verification.mismatches] + verification.missing_paths:
        fault = 'did not arrive with the checksum that the Hub states'
        raise UserError(f'{", ".join(damaged)} of {repo_id} {fault}: nothing is kept, pull again.')
    read_config(folder)  # refuses one that says where weights come from
    if not is_export(folder):
        raise UserError(f'{repo_id} is no model in safetensors: it has no model.safetensors.')
    for path in folder.glob('.*'):  # the client's notes, and git's
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class _Push:
    """One push, of which any attempt may be the one that arrives."""

    def __init__(
        self, folder: Path, repo_id: str, private: bool, revision: str | None, message: str, create_pr: bool
    ) -> None:
        self.folder, self.repo_id, self.private, self.message = folder, repo_id, private, message
        self.revision, self.create_pr = revision or constants.DEFAULT_REVISION, create_pr
        self.api = _client()
        self.made = ''  # the repository or branch that this push made
        self.is_sent = False

    def attempt(self) -> str:
        """Return the URL of the commit or the pull request, which an earlier attempt may have made."""
        parent = self._prepare()
        if (not self.made or self.is_sent) and (url := self.find()):
            return url
        self.is_sent = True
        commit = self.api.upload_folder(
            repo_id=self.repo_id,
            folder_path=self.folder,
            commit_message=self.message,
            revision=None if self.create_pr else self.revision,
            create_pr=self.create_pr,
            # A commit that is sent twice, as its response was lost, is refused, and so is one on top of an unseen one.
            parent_commit=parent,
            allow_patterns=[*FILES, f'{EXAMPLES_FOLDER}/*'],
            delete_patterns=[f'*{suffix}' for suffix in (*_PICKLES, *map(str.upper, _PICKLES))],
        )
        return commit.pr_url or commit.commit_url

    def _prepare(self) -> str | None:
        """Return the branch's last commit; the repository and the branch are made if they are not there."""
        info = self._info()
        if info is None:
            _refuse_other_type(self.api, self.repo_id)
            self.api.create_repo(self.repo_id, private=self.private or None, exist_ok=True)
            self.made = 'repository'
            info = self.api.model_info(self.repo_id, timeout=_TIMEOUT)
        elif self.private and info.private is False:
            raise UserError(f'{self.repo_id} is there and public: make it private in its settings, or drop --private.')
        if self.revision != constants.DEFAULT_REVISION:
            info = self._info(self.revision)
            if info is None:
                self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
                self.made = self.made or f'branch {self.revision}'
                info = self.api.model_info(self.repo_id, revision=self.revision, timeout=_TIMEOUT)
        return info.sha

    def _info(self, revision: str | None = None) -> ModelInfo | None:
        try:
            return self.api.model_info(self.repo_id, revision=revision, timeout=_TIMEOUT)
        except HfHubHTTPError as error:
            if isinstance(error, RepositoryNotFoundError) or error.response.status_code == 404:
                return None
            raise

    def find(self) -> str | None:
        """Return the URL of the commit or the pull request where the Hub holds these very files."""
        try:
            if not self.create_pr:
                commit = self.api.model_info(self.repo_id, revision=self.revision, timeout=_TIMEOUT).sha
                return f'{self.api.endpoint}/{self.repo_id}/commit/{commit}' if self._is_at(commit) else None
            for request in self.api.get_repo_discussions(self.repo_id, discussion_type='pull_request'):
                is_ours = request.title == self.message.strip() and request.status in ('open', 'draft')
                if is_ours and self._is_at(request.git_reference):
                    return request.url
        except HfHubHTTPError as error:
            if _is_transient(error):
                raise
            # Discussions may be turned off.
        return None

    def _is_at(self, revision: str | None) -> bool:
        verification = self.api.verify_repo_checksums(self.repo_id, revision=revision, local_dir=self.folder)
        other = {mismatch['path'] for mismatch in verification.mismatches} | set(verification.extra_paths)
        return not other & set(_files(self.folder)) and not any(map(_is_pickle, verification.missing_paths))


def check_repo_id(repo_id: str, with_namespace: bool = False) -> None:
    """Raise a `UserError` if this cannot be the name of a repository, with the user's if that is wanted."""
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise UserError(f'{repo_id!r} names no repository: expected USER/NAME. {error}') from error
    if with_namespace and '/' not in repo_id:
        raise UserError(f'{repo_id!r} does not say whose repository: expected USER/NAME.')


def _check_folder(folder: Path) -> None:
    if not folder.is_dir() or not is_export(folder):
        raise UserError(f'{folder} is no exported folder: make one with `mealv2-hub export`.')
    paths = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob('*')) if path.is_file()]
    if pickles := [path for path in paths if _is_pickle(path)]:
        raise UserError(f'{folder} holds pickles, which are not pushed: {", ".join(pickles)}. Remove them.')
    files = _files(folder)
    if len(files) > _MOST_FILES:
        raise UserError(f'{folder} holds {len(files)} files, more than the {_MOST_FILES} that go in one commit.')
    if others := [path for path in paths if path not in files]:
        _logger.warning('Not pushed, as no part of an export: %s', ', '.join(others))


def _files(folder: Path) -> list[str]:
    """The files of an export, as paths in the repository."""
    paths = [folder / name for name in FILES - {EXAMPLES_FOLDER}] + list((folder / EXAMPLES_FOLDER).rglob('*'))
    return sorted(path.relative_to(folder).as_posix() for path in paths if path.is_file())


def _is_pickle(path: str) -> bool:
    return path.lower().endswith(_PICKLES)


def _refuse_other_type(api: HfApi, repo_id: str) -> None:
    """Raise if `repo_id`, which is no model, is a data set or a Space."""
    for repo_type, name in (('dataset', 'a data set'), ('space', 'a Space')):
        try:
            api.repo_info(repo_id, repo_type=repo_type, timeout=_TIMEOUT)
        except HfHubHTTPError as error:
            if _is_transient(error):
                raise
        else:
            raise UserError(f'{repo_id} is {name}, not a model: name another repository.')


def _client() -> HfApi:
    return HfApi(library_name='timm_mealv2', library_version=__version__)


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Keep huggingface_hub's warnings off stderr, as an error is one line of ours; and its bars if nobody watches."""
    level = client_logging.get_verbosity()
    if level == logging.WARNING:  # otherwise the user chose it
        client_logging.set_verbosity_error()
    hidden = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not sys.stderr.isatty()
    try:
        with disable_progress_bars() if hidden else nullcontext():
            yield
    finally:
        client_logging.set_verbosity(level)


def _retried(attempt: Callable[[], _T]) -> _T:
    """Return what `attempt()` returns, called again after errors that pass."""
    for delay in (*_RETRY_DELAYS, None):
        try:
            session = get_session()
            if session.timeout.read is None:
                session.timeout = _TIMEOUT
            return attempt()
        except Exception as error:
            wait = _wanted_wait(error)
            if delay is None or wait > _LONGEST_WAIT or not _is_transient(error):
                raise
            _logger.debug('%s: trying again in %g s', type(error).__name__, max(delay, wait))
        time.sleep(max(delay, wait))
    raise AssertionError('the last attempt returns or raises')


def _is_transient(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 412, 429) or error.response.status_code >= 500
    # A response that is no JSON comes from a gateway. HTTPError is the transport's: there was no response.
    return isinstance(error, HTTPError | json.JSONDecodeError) and not _is_malformed(error)


def _is_malformed(error: Exception) -> bool:
    """Whether the request could not be sent for what is in it: a header with the token, or the endpoint."""
    return type(error).__name__ in ('InvalidURL', 'LocalProtocolError', 'UnsupportedProtocol', 'UnicodeEncodeError')


def _wanted_wait(error: Exception) -> float:
    """Seconds that the Hub wants to be left alone, 0 where it does not say."""
    if not isinstance(error, HfHubHTTPError):
        return 0.0
    limit = parse_ratelimit_headers(error.response.headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    seconds = error.response.headers.get('Retry-After', '')
    return float(seconds) if seconds.isdigit() else 0.0


def _reason(error: BaseException, repo_id: str, verb: str) -> str:
    """Say what went wrong and what to do; `verb` is what the token was needed for."""
    while isinstance(error, LocalEntryNotFoundError) and error.__cause__:  # how a download wraps what it meets
        error = error.__cause__
    request = error.response.request if isinstance(error, HfHubHTTPError) else getattr(error, 'request', None)
    host = urlsplit(str(request.url) if request else constants.ENDPOINT).netloc.rpartition('@')[2]
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OfflineModeIsEnabled):
        return 'HF_HUB_OFFLINE is set: unset it to go online.'
    if isinstance(error, HfHubHTTPError):
        status, wait = error.response.status_code, _wanted_wait(error)
        may_not = f'the token may not {verb} {repo_id}: use one that may, or another repository'
        reasons = {
            401: 'the Hub does not know the token: log in again with `hf auth login`, or correct HF_TOKEN',
            402: may_not,
            403: may_not,
            404: f'{host} does not find {repo_id} or one of its parts',
            412: 'others pushed to it at the same time',
            429: f'{host} limits requests' + (f', and wants {wait:g} s of rest' if wait else ''),
        }
        reason = reasons.get(status, f'{host} is out of order' if status >= 500 else f'{host} refuses it')
        said = ' '.join((error.server_message or '').split())[:200]
        return f'{reason} ({status}{said and ": "}{said}).'
    if isinstance(error, Exception) and _is_malformed(error):  # its text quotes the token
        return 'the token or HF_ENDPOINT is malformed: log in again with `hf auth login`, or correct them.'
    if isinstance(error, HTTPError):
        return f'there is no connection to {host}, or it broke ({type(error).__name__}).'
    if isinstance(error, json.JSONDecodeError):
        return f'{host} does not respond as the Hub does: is HF_ENDPOINT right?'
    return f'{type(error).__name__}: {one_line(error).rstrip(".")}.'


def _without_token(text: str) -> str:
    """The text with the token, which a server may send back, taken out."""
    try:
        token = get_token()
    except Exception:  # an OIDC exchange that fails
        token = None
    return text.replace(token, '<token>') if token else text
