"""Tests of pushing and pulling, with huggingface_hub's own client and a real HTTP server on loopback."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from hub_server import READ_TOKEN, WRITE_TOKEN, HubServer, connected
from huggingface_hub import constants
from timm.models import save_for_hf

from timm_mealv2.cli.hub import main
from timm_mealv2.command_line import run_cli
from timm_mealv2.errors import UserError
from timm_mealv2.hub.hub_api import pull_model, push_model


@pytest.fixture(scope='module')
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('exported') / 'student'
    torch.manual_seed(0)
    save_for_hf(timm.create_model('test_resnet', num_classes=3), folder, safe_serialization=True)
    (folder / 'README.md').write_text('---\nlibrary_name: timm\n---\n# A model\n')
    (folder / 'curves.png').write_bytes(b'\x89PNG of the curves')
    return folder


@pytest.fixture
def export(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export, to be changed."""
    return shutil.copytree(exported, tmp_path / 'student')


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with connected(monkeypatch, tmp_path / 'hf_home') as server:
        yield server


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def error_of(function: object, *args: object, **kwargs: object) -> str:
    """The error of a push or pull that must fail: one line, without a token."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)  # type: ignore[operator]
    text = str(caught.value)
    assert '\n' not in text
    assert not any(token in text for token in (WRITE_TOKEN, READ_TOKEN))
    return text


# Pushing


def test_push_makes_the_repository_and_one_commit_with_the_files_of_an_export(server: HubServer, export: Path) -> None:
    expected = files_of(export)
    (export / 'notes.txt').write_text('mine')
    (export / 'pytorch_model.bin').write_bytes(b'pickle')
    url = push_model(export, 'me/x', message='First', private=True)
    repo = server.repos['me/x']
    assert [commit.title for commit in repo.log()] == ['First', 'initial commit']
    assert repo.files() == expected
    assert repo.private
    assert url == f'{server.url}/me/x/commit/{repo.log()[0].oid}'


def test_push_again_commits_what_differs_alone(server: HubServer, export: Path) -> None:
    url = push_model(export, 'me/x')
    assert push_model(export, 'me/x', message='Again') == url
    repo = server.repos['me/x']
    assert len(repo.log()) == 2
    uploads = server.count('PUT', '/lfs/')
    (export / 'README.md').write_text('---\nlibrary_name: timm\n---\n# More\n')
    push_model(export, 'me/x')
    assert repo.files() == files_of(export)
    assert (len(repo.log()), server.count('PUT', '/lfs/')) == (3, uploads)


def test_push_to_a_branch_and_as_a_pull_request(server: HubServer, export: Path) -> None:
    repo = server.add_repo('me/x')
    push_model(export, 'me/x', revision='feature/a')
    assert repo.files('feature/a') == files_of(export)
    assert push_model(export, 'me/x', create_pr=True) == f'{server.url}/me/x/discussions/1'
    assert repo.files('refs/pr/1') == files_of(export)
    assert repo.files() == {}


@pytest.mark.parametrize('status', [504, None])
@pytest.mark.parametrize('when', ['before', 'after'])
def test_a_commit_whose_request_fails_is_sent_once_more_and_made_once(
    server: HubServer, export: Path, status: int | None, when: str
) -> None:
    server.fail('/commit/', status=status, when=when)
    url = push_model(export, 'me/x')
    repo = server.repos['me/x']
    assert repo.files() == files_of(export)
    assert [commit.title for commit in repo.log()] == ['Upload with mealv2-hub', 'initial commit']
    assert url == f'{server.url}/me/x/commit/{repo.log()[0].oid}'
    assert server.count('POST', '/commit/') == (2 if when == 'before' else 1)


def test_a_lost_response_opens_no_second_pull_request(server: HubServer, export: Path) -> None:
    repo = server.add_repo('me/x')
    server.fail('/commit/', status=502, when='after')
    assert '502' in error_of(push_model, export, 'me/x', create_pr=True)
    assert set(repo.refs) == {'main', 'refs/pr/1'}


def test_a_push_that_fails_leaves_no_file(server: HubServer, export: Path) -> None:
    for number, (path, status) in enumerate((('/commit/', 503), ('/commit/', None), ('/lfs/', 500), ('/preup', 403))):
        server.clear_faults()
        server.fail(path, status=status, times=100)
        error = error_of(push_model, export, f'me/x{number}')
        assert error.startswith(f'me/x{number} was not pushed: ')
        assert (str(status) if status else f'no connection to {server.url}') in error
        assert server.repos[f'me/x{number}'].files() == {}


def test_xet_uploads_recognize_a_lost_response(
    server: HubServer, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With Xet huggingface_hub repeats commits itself. Small files alone need no Xet server.
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', False)
    for path in ('model.safetensors', 'curves.png'):
        (export / path).unlink()
    config = json.loads((export / 'config.json').read_text())
    (export / 'config.json').write_text(json.dumps({**config, 'architecture': 'mealv2_ensemble'}))
    server.fail('/commit/', when='after')
    push_model(export, 'me/x')
    push_model(export, 'me/x')
    repo = server.repos['me/x']
    assert repo.files() == files_of(export)
    assert len(repo.log()) == 2


def test_what_may_not_be_pushed(
    server: HubServer, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = server.add_repo('me/there')
    for token, repo_id, expected in (
        (READ_TOKEN, 'me/new', "You don't have the rights"),
        (READ_TOKEN, 'me/there', "You don't have the rights"),
        (WRITE_TOKEN, 'you/new', "You don't have the rights"),
        ('hf_ofNobody', 'me/there', 'Invalid'),
        ('', 'me/there', 'there is no token'),
        (WRITE_TOKEN, 'x', 'USER/NAME'),
        (WRITE_TOKEN, 'https://huggingface.co/me/x', 'USER/NAME'),
    ):
        monkeypatch.setenv('HF_TOKEN', token)
        error = error_of(push_model, export, repo_id)
        assert expected in error
        assert not token or token not in error
    monkeypatch.setenv('HF_TOKEN', WRITE_TOKEN)
    assert 'is there and public' in error_of(push_model, export, 'me/there', private=True)
    (export / 'model.safetensors').unlink()
    assert 'mealv2-hub export' in error_of(push_model, export, 'me/there')
    assert 'there is no such file' in error_of(push_model, tmp_path / 'absent', 'me/there')
    assert (set(server.repos), repo.files()) == ({'me/there'}, {})


def test_no_network(server: HubServer, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    assert 'no connection to http://127.0.0.1:9' in error_of(push_model, export, 'me/x')
    assert 'no connection to http://127.0.0.1:9' in error_of(pull_model, 'me/x', tmp_path / 'x')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert 'HF_HUB_OFFLINE' in error_of(push_model, export, 'me/x')
    assert 'HF_HUB_OFFLINE' in error_of(pull_model, 'me/x', tmp_path / 'x')
    assert server.requests == []


# Pulling


def test_pull_gives_back_what_was_pushed_and_replaces_an_earlier_export(
    server: HubServer, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_model(export, 'me/x', private=True)
    out = tmp_path / 'there' / 'back'
    for _ in range(2):
        assert pull_model('me/x', out) == out
        assert files_of(out) == files_of(export)
        (out / 'README.md').write_text('earlier')
    assert [path.name for path in out.parent.iterdir()] == ['back']
    (out / 'notes.txt').write_text('mine')
    earlier = files_of(out)
    assert 'something else than an earlier export' in error_of(pull_model, 'me/x', out)
    assert files_of(out) == earlier
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    assert pull_model('me/x') == Path('x')
    assert files_of(Path('x')) == files_of(export)


def test_pull_of_a_revision(server: HubServer, export: Path, tmp_path: Path) -> None:
    push_model(export, 'me/x', revision='v1')
    first, former = server.repos['me/x'].log('v1')[0].oid, files_of(export)
    (export / 'README.md').write_text('---\nlibrary_name: timm\n---\n# More\n')
    push_model(export, 'me/x', revision='v1')
    assert files_of(pull_model('me/x', tmp_path / 'a', revision='v1')) == files_of(export)
    assert files_of(pull_model('me/x', tmp_path / 'b', revision=first)) == former
    assert 'v9' in error_of(pull_model, 'me/x', tmp_path / 'c', revision='v9')


def test_what_a_repository_says_runs_nothing_and_writes_nowhere_else(server: HubServer, tmp_path: Path) -> None:
    weights, config = {'model.safetensors': b'weights'}, {'config.json': b'{"architecture": "resnet18"}'}
    others = {'pytorch_model.bin': b'x', 'a/b.PTH': b'x', 'app.py': b'x', '../evil.txt': b'x'}
    server.add_repo('me/more', {**weights, **config, **others})
    assert files_of(pull_model('me/more', tmp_path / 'in/out')) == {**weights, **config}
    assert server.count('GET', '/me/more/resolve/') == 2

    told = b'{"architecture": "resnet18", "model_args": {"pretrained_cfg_overlay": {"url": "http://x/y.pth"}}}'
    server.add_repo('me/told', {**weights, 'config.json': told})
    server.add_repo('me/weights', weights)
    server.add_repo('me/config', config)
    for repo_id, expected in (
        ('me/told', 'model_args .* say where weights come from'),
        ('me/weights', 'me/weights is no exported model'),
        ('me/config', 'me/config is no exported model'),
        ('me/nothing', 'me/nothing was not pulled: .*[Nn]ot [Ff]ound'),
    ):
        with pytest.raises(UserError, match=expected):
            pull_model(repo_id, tmp_path / 'in/new')
    assert [path.name for path in (tmp_path / 'in').iterdir()] == ['out']
    assert not list(tmp_path.rglob('evil*'))


def test_a_flipped_byte_is_noticed(server: HubServer, export: Path, tmp_path: Path) -> None:
    push_model(export, 'me/x')
    out = pull_model('me/x', tmp_path / 'there' / 'earlier')
    for name in ('model.safetensors', 'config.json', 'curves.png'):
        server.damage(name, 'flip')
        assert f'{name} of me/x did not arrive with the checksum' in error_of(pull_model, 'me/x', out)
    assert [path.name for path in out.parent.iterdir()] == ['earlier']
    assert files_of(out) == files_of(export)


def test_a_transfer_that_breaks_is_continued_or_told(
    server: HubServer, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 1024)
    push_model(export, 'me/x')
    server.damage('model.safetensors', 'truncate', times=2)
    assert files_of(pull_model('me/x', tmp_path / 'x')) == files_of(export)
    assert any('range' in request.headers for request in server.requests)
    server.fail('/resolve/.*/model.safetensors', method='GET', times=100)
    assert 'no connection' in error_of(pull_model, 'me/x', tmp_path / 'y')
    assert not (tmp_path / 'y').exists()


def test_the_command_fails_in_one_line_with_exit_code_2(
    server: HubServer, export: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for command, expected in (
        (['push', str(export), 'you/x'], 'error: you/x was not pushed: '),
        (['pull', 'me/y', '--out', str(tmp_path / 'y')], 'error: me/y was not pulled: '),
        (
            ['push', str(export), 'me/x', '--create-pr', '--revision', 'a'],
            'error: argument --revision: not allowed with',
        ),
    ):
        with pytest.raises(SystemExit) as exit_info:
            run_cli(main, command)
        (line,) = capfd.readouterr().err.splitlines()
        assert exit_info.value.code == 2
        assert line.startswith(expected)
