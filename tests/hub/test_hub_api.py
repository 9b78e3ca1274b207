"""Tests of pushing and pulling, with huggingface_hub's own client and a real HTTP server on loopback."""

import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from hub_server import OTHER_TOKEN, READ_TOKEN, TOKENS, WRITE_TOKEN, HubServer, connected
from huggingface_hub import constants
from timm.models import save_for_hf

from timm_mealv2.cli.hub import main
from timm_mealv2.command_line import run_cli
from timm_mealv2.errors import UserError
from timm_mealv2.hub import hub_api
from timm_mealv2.hub.hub_api import pull_folder, push_folder

CARD = b'---\nlicense: apache-2.0\nlibrary_name: timm\n---\n# A model\n'


@pytest.fixture(scope='module')
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('exported') / 'student'
    torch.manual_seed(0)
    save_for_hf(timm.create_model('test_resnet', num_classes=3), folder, safe_serialization=True)
    (folder / 'README.md').write_bytes(CARD)
    (folder / 'curves.png').write_bytes(b'\x89PNG of the curves')
    (folder / 'examples').mkdir()
    (folder / 'examples' / '01.png').write_bytes(b'\x89PNG of an example')
    return folder


@pytest.fixture
def export(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export, to be changed."""
    return shutil.copytree(exported, tmp_path / 'student')


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with connected(monkeypatch, tmp_path / 'hf_home') as server:
        yield server


@pytest.fixture(autouse=True)
def _no_token_anywhere(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> Iterator[None]:
    """Whatever a test does, no token is printed, logged or stored."""
    caplog.set_level(logging.DEBUG)
    yield
    printed = ''.join(capfd.readouterr())
    stored = b''.join(path.read_bytes() for path in tmp_path.rglob('*') if path.is_file())
    for token in TOKENS:
        assert token not in printed
        assert token not in caplog.text
        assert token.encode() not in stored


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def push_error(*args: object, **kwargs: object) -> str:
    """The error of a push that must fail: one line, without a token, and with no other error behind it."""
    with pytest.raises(UserError) as caught:
        push_folder(*args, **kwargs)  # type: ignore[arg-type]
    return checked(caught.value)


def pull_error(*args: object, **kwargs: object) -> str:
    with pytest.raises(UserError) as caught:
        pull_folder(*args, **kwargs)  # type: ignore[arg-type]
    return checked(caught.value)


def checked(error: UserError) -> str:
    text = str(error)
    assert '\n' not in text
    assert not any(token in text for token in TOKENS)
    assert error.__cause__ is None or isinstance(error.__cause__, ValueError)
    return text


# Pushing


def test_push_makes_the_repository_and_one_commit_with_all_files(server: HubServer, export: Path) -> None:
    url = push_folder(export, 'me/x', message='First')
    repo = server.repos['model', 'me/x']
    assert [commit.title for commit in repo.log()] == ['First', 'initial commit']
    assert repo.files() == files_of(export)
    assert not repo.private
    assert url == f'{server.url}/me/x/commit/{repo.log()[0].oid}'


def test_push_prints_nothing(server: HubServer, export: Path, capfd: pytest.CaptureFixture[str]) -> None:
    server.fail('/preupload/', status=503)
    push_folder(export, 'me/x')
    push_folder(export, 'me/x')
    assert ''.join(capfd.readouterr()) == ''


def test_push_of_the_same_content_makes_no_second_commit(server: HubServer, export: Path) -> None:
    url = push_folder(export, 'me/x')
    assert push_folder(export, 'me/x', message='Again') == url
    assert len(server.repos['model', 'me/x'].log()) == 2


def test_push_updates_the_readme_and_sends_no_weights_twice(server: HubServer, export: Path) -> None:
    push_folder(export, 'me/x')
    uploads = server.count('PUT', '/lfs/')
    (export / 'README.md').write_bytes(CARD + b'More.\n')
    push_folder(export, 'me/x')
    repo = server.repos['model', 'me/x']
    assert repo.files()['README.md'] == CARD + b'More.\n'
    assert len(repo.log()) == 3
    assert server.count('PUT', '/lfs/') == uploads


def test_push_private(server: HubServer, export: Path) -> None:
    push_folder(export, 'me/x', private=True)
    push_folder(export, 'me/x', private=True)
    assert server.repos['model', 'me/x'].private
    server.add_repo('me/public')
    assert 'public' in push_error(export, 'me/public', private=True)
    assert server.repos['model', 'me/public'].files() == {}


def test_push_sends_the_files_of_an_export_alone(
    server: HubServer, export: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = files_of(export)
    (export / 'notes.txt').write_text('mine')
    (export / '__pycache__').mkdir()
    (export / '__pycache__' / 'app.pyc').write_bytes(b'cache')
    push_folder(export, 'me/x')
    assert server.repos['model', 'me/x'].files() == expected
    assert '__pycache__/app.pyc, notes.txt' in caplog.text


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'last.pth.tar', 'examples/x.PKL'])
def test_push_refuses_a_folder_with_a_pickle(server: HubServer, export: Path, name: str) -> None:
    (export / name).write_bytes(b'')
    assert name in push_error(export, 'me/x')
    assert server.requests == []


def test_push_refuses_what_is_no_export(server: HubServer, export: Path) -> None:
    (export / 'model.safetensors').unlink()
    assert 'mealv2-hub export' in push_error(export, 'me/x')
    assert 'mealv2-hub export' in push_error(export / 'nothing', 'me/x')
    assert server.requests == []


def test_push_removes_a_pickle_that_lies_in_the_repository(server: HubServer, export: Path) -> None:
    server.add_repo('me/x', {'pytorch_model.bin': b'pickle', 'old/model.PTH': b'pickle', 'notes.md': b'kept'})
    push_folder(export, 'me/x')
    repo = server.repos['model', 'me/x']
    assert repo.files() == {**files_of(export), 'notes.md': b'kept'}
    assert len(repo.log()) == 2


def test_push_to_a_new_branch(server: HubServer, export: Path) -> None:
    server.add_repo('me/x')
    push_folder(export, 'me/x', revision='feature/a')
    repo = server.repos['model', 'me/x']
    assert repo.files('feature/a') == files_of(export)
    assert repo.files() == {}
    push_folder(export, 'me/new', revision='v2')
    assert server.repos['model', 'me/new'].files('v2') == files_of(export)


def test_push_as_a_pull_request_once(server: HubServer, export: Path) -> None:
    repo = server.add_repo('you/x')
    url = push_folder(export, 'you/x', create_pr=True)
    assert url == f'{server.url}/you/x/discussions/1'
    assert repo.files('refs/pr/1') == files_of(export)
    assert repo.files() == {}
    assert push_folder(export, 'you/x', create_pr=True) == url
    assert '--revision' in push_error(export, 'you/x', create_pr=True, revision='dev')
    assert len(repo.pull_requests) == 1


# Errors that pass


ONCE = ('/repos/create', '/api/models/me/x', '/validate-yaml', '/branch/', '/commit/')


@pytest.mark.parametrize('status', [503, 429, None])
def test_errors_that_pass_are_survived(server: HubServer, export: Path, status: int | None) -> None:
    for number, path in enumerate(ONCE):
        server.fail(path.replace('me/x', f'me/x{number}'), status=status, times=2)
        push_folder(export, f'me/x{number}', revision='dev')
        repo = server.repos['model', f'me/x{number}']
        assert repo.files('dev') == files_of(export)
        assert len(repo.log('dev')) == 2


@pytest.mark.parametrize('status', [504, None])
def test_a_lost_response_is_recognized_and_nothing_done_twice(
    server: HubServer, export: Path, status: int | None
) -> None:
    for number, path in enumerate(('/repos/create', '/branch/', '/commit/', '/lfs/[0-9a-f]+$')):
        server.fail(path, status=status, when='after')
        url = push_folder(export, f'me/x{number}', revision='dev')
        repo = server.repos['model', f'me/x{number}']
        assert repo.files('dev') == files_of(export)
        assert [commit.title for commit in repo.log('dev')] == ['Upload with mealv2-hub', 'initial commit']
        assert url.endswith(f'/me/x{number}/commit/{repo.log("dev")[0].oid}')
        assert server.count('POST', f'/me/x{number}/commit/') == 1


def test_a_lost_response_opens_no_second_pull_request(server: HubServer, export: Path) -> None:
    repo = server.add_repo('you/x')
    server.fail('/commit/', when='after')
    assert push_folder(export, 'you/x', create_pr=True) == f'{server.url}/you/x/discussions/1'
    assert len(repo.pull_requests) == 1


def test_a_commit_is_not_repeated_though_it_could_not_be_looked_up(server: HubServer, export: Path) -> None:
    server.add_repo('me/x')
    server.fail('/commit/', status=502, when='after')
    server.fail('/tree/[0-9a-f]{40}', status=404)
    push_folder(export, 'me/x')
    assert len(server.repos['model', 'me/x'].log()) == 2


def test_a_commit_is_recognized_without_sending_it_again(server: HubServer, export: Path) -> None:
    repo = server.add_repo('me/x')
    server.fail('/commit/', status=503, when='after', headers={'Retry-After': '3600'})
    assert push_folder(export, 'me/x') == f'{server.url}/me/x/commit/{repo.log()[0].oid}'
    assert repo.files() == files_of(export)
    assert server.count('POST', '/preupload/') == 1


def test_a_push_on_top_of_what_was_not_seen_is_built_again(server: HubServer, export: Path) -> None:
    server.add_repo('me/x')
    server.fail('/commit/', status=412)
    push_folder(export, 'me/x')
    assert server.repos['model', 'me/x'].files() == files_of(export)
    assert server.count('POST', '/commit/') == 2


def test_the_wait_that_the_hub_asks_for(server: HubServer, export: Path) -> None:
    server.fail('/commit/', status=429, headers={'Retry-After': '1'})
    start = time.monotonic()
    push_folder(export, 'me/x')
    assert time.monotonic() - start > 1
    for headers in ({'Retry-After': '3600'}, {'RateLimit': '"api";r=0;t=3600'}):
        server.fail('/api/models/me/y', status=429, headers=headers)
        error = push_error(export, 'me/y')
        assert '429' in error
        assert '3600 s' in error
    assert ('model', 'me/y') not in server.repos


def test_a_silent_connection_ends(server: HubServer, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_api, '_TIMEOUT', 0.3)
    server.fail('/commit/', stall=1)
    server.fail('/repos/create', stall=1)
    server.fail('/api/models/me/x', stall=1)
    start = time.monotonic()
    push_folder(export, 'me/x')
    assert time.monotonic() - start < 5
    assert server.repos['model', 'me/x'].files() == files_of(export)


def test_xet_uploads_recognize_a_lost_response(
    server: HubServer, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With Xet huggingface_hub repeats commits itself. Small files alone need no Xet server.
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', False)
    for path in ('model.safetensors', 'curves.png', 'examples/01.png'):
        (export / path).unlink()
    config = json.loads((export / 'config.json').read_text())
    (export / 'config.json').write_text(json.dumps({**config, 'architecture': 'mealv2_ensemble'}))
    server.fail('/commit/', when='after')
    push_folder(export, 'me/x')
    push_folder(export, 'me/x')
    repo = server.repos['model', 'me/x']
    assert repo.files() == {name: content for name, content in files_of(export).items() if '/' not in name}
    assert len(repo.log()) == 2
    (export / 'README.md').write_bytes(CARD + b'More.\n')
    server.fail('/commit/', status=503, times=100)
    assert '503' in push_error(export, 'me/x')
    assert len(repo.log()) == 2


# Errors that stay


@pytest.mark.parametrize('status', [500, None])
def test_a_push_that_fails_leaves_no_file_and_says_how_to_go_on(
    server: HubServer, export: Path, status: int | None
) -> None:
    for number, path in enumerate(('/commit/', '/lfs/', '/preupload/', '/validate-yaml')):
        server.clear_faults()
        server.fail(path, status=status, times=100)
        error = push_error(export, f'me/x{number}', message='Two words', source='run/last.pth.tar')
        assert (str(status) if status else 'no connection') in error
        assert 'The new repository is there, but no file.' in error
        assert error.endswith(f"Push later: mealv2-hub push run/last.pth.tar me/x{number} --message 'Two words'")
        assert server.repos['model', f'me/x{number}'].files() == {}


def test_a_push_whose_end_is_unknown_says_so(server: HubServer, export: Path) -> None:
    server.fail('/commit/', times=100)
    server.fail('/tree/[0-9a-f]{40}', times=1000)
    assert 'Whether the files arrived could not be found out.' in push_error(export, 'me/x')


FORBIDDEN = [
    (READ_TOKEN, 'me/new', '403'),
    (READ_TOKEN, 'me/there', '403'),
    (WRITE_TOKEN, 'you/new', 'the token may not write to you/new'),
    (OTHER_TOKEN, 'me/there', 'the token may not write to me/there'),
    (OTHER_TOKEN, 'me/hidden', '403'),
    ('hf_ofNobody', 'me/there', 'does not know the token'),
    ('hf_of\nNobody', 'me/there', 'does not know the token'),
    ('hf_o\xe9f', 'me/there', 'malformed'),
    (None, 'me/there', 'there is no token'),
    (WRITE_TOKEN, 'me/data', 'a data set'),
    (WRITE_TOKEN, 'me/demo', 'a Space'),
    (WRITE_TOKEN, 'datasets/me/data', 'USER/NAME'),
    (WRITE_TOKEN, 'x', 'USER/NAME'),
    (WRITE_TOKEN, 'me/a--b', 'USER/NAME'),
    (WRITE_TOKEN, 'https://huggingface.co/me/x', 'USER/NAME'),
]


def test_what_may_not_be_pushed(server: HubServer, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add_repo('me/there')
    server.add_repo('me/hidden', private=True)
    server.add_repo('me/data', type='dataset')
    server.add_repo('me/demo', type='space')
    before = {key: repo.log() for key, repo in server.repos.items()}
    for token, repo_id, expected in FORBIDDEN:
        monkeypatch.delenv('HF_TOKEN', raising=False)
        if token:
            monkeypatch.setenv('HF_TOKEN', token)
        error = push_error(export, repo_id)
        assert expected in error
        assert 'Nothing arrived' in error or 'USER/NAME' in error
        assert token is None or token not in error
    assert {key: repo.log() for key, repo in server.repos.items()} == before


def test_a_commit_hash_is_no_branch(server: HubServer, export: Path) -> None:
    repo = server.add_repo('me/x')
    assert 'is no branch' in push_error(export, 'me/x', revision=repo.log()[0].oid)
    assert repo.files() == {}


def test_a_card_that_the_hub_refuses(server: HubServer, export: Path) -> None:
    (export / 'README.md').write_text('---\n: [\n---\n')
    assert 'README.md' in push_error(export, 'me/x')
    assert server.repos['model', 'me/x'].files() == {}


def test_a_token_that_the_server_sends_back_is_not_shown(server: HubServer, export: Path) -> None:
    for status in (400, 403):
        server.fail('/commit/', status=status, body=b'{"error": "no: {authorization}"}')
        error = push_error(export, 'me/x')
        assert f'({status}: no: Bearer <token>)' in error


def test_no_network(server: HubServer, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    error = push_error(export, 'me/x')
    assert 'no connection to 127.0.0.1:9' in error
    assert 'Nothing arrived.' in error
    assert 'no connection to 127.0.0.1:9' in pull_error('me/x', tmp_path / 'x')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert 'HF_HUB_OFFLINE' in push_error(export, 'me/x')
    assert 'HF_HUB_OFFLINE' in pull_error('me/x', tmp_path / 'x')
    assert server.requests == []


def test_an_endpoint_that_is_no_hub(server: HubServer, export: Path, tmp_path: Path) -> None:
    server.fail('/', status=200, times=100, body=b'<html>Welcome</html>')
    assert 'HF_ENDPOINT' in push_error(export, 'me/x')
    assert 'HF_ENDPOINT' in pull_error('me/x', tmp_path / 'x')


# Pulling


def test_pull_gives_back_what_was_pushed(
    server: HubServer, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_folder(export, 'me/x')
    assert pull_folder('me/x', tmp_path / 'there' / 'back') == tmp_path / 'there' / 'back'
    assert files_of(tmp_path / 'there' / 'back') == files_of(export)
    assert [path.name for path in (tmp_path / 'there').iterdir()] == ['back']
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    assert pull_folder('me/x') == Path('x')
    assert files_of(Path('x')) == files_of(export)


def test_pull_replaces_an_earlier_export_and_nothing_else(server: HubServer, export: Path, tmp_path: Path) -> None:
    push_folder(export, 'me/x')
    out = shutil.copytree(export, tmp_path / 'out')
    (out / 'README.md').write_bytes(b'earlier')
    pull_folder('me/x', out)
    assert files_of(out) == files_of(export)
    (out / 'notes.txt').write_text('mine')
    assert 'notes.txt' in pull_error('me/x', out)
    mine = tmp_path / 'mine'
    mine.mkdir()
    (mine / 'notes.txt').write_text('mine')
    assert 'no earlier export' in pull_error('me/x', mine)
    assert files_of(mine) == {'notes.txt': b'mine'}


def test_pull_of_a_revision(server: HubServer, export: Path, tmp_path: Path) -> None:
    push_folder(export, 'me/x', revision='v1')
    first = server.repos['model', 'me/x'].log('v1')[0].oid
    (export / 'README.md').write_bytes(CARD + b'More.\n')
    push_folder(export, 'me/x', revision='v1')
    assert (pull_folder('me/x', tmp_path / 'a', revision='v1') / 'README.md').read_bytes() == CARD + b'More.\n'
    assert (pull_folder('me/x', tmp_path / 'b', revision=first) / 'README.md').read_bytes() == CARD
    assert 'no revision v9' in pull_error('me/x', tmp_path / 'c', revision='v9')


def test_pull_of_a_private_repository(
    server: HubServer, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_folder(export, 'me/x', private=True)
    assert files_of(pull_folder('me/x', tmp_path / 'x')) == files_of(export)
    monkeypatch.setenv('HF_TOKEN', OTHER_TOKEN)
    assert 'your token may not read it' in pull_error('me/x', tmp_path / 'y')
    monkeypatch.delenv('HF_TOKEN')
    assert 'hf auth login' in pull_error('me/x', tmp_path / 'y')
    assert not (tmp_path / 'y').exists()


def test_what_may_not_be_pulled(server: HubServer, tmp_path: Path) -> None:
    weights, config = {'model.safetensors': b'weights'}, {'config.json': b'{"architecture": "resnet18"}'}
    server.add_repo('me/pickles', {**weights, **config, 'pytorch_model.bin': b'x', 'a/b.PTH': b'x'})
    server.add_repo('me/weights', weights)
    server.add_repo('me/config', config)
    told = b'{"architecture": "resnet18", "model_args": {"pretrained_cfg_overlay": {"url": "http://x/y.pth"}}}'
    server.add_repo('me/told', {**weights, 'config.json': told})
    server.add_repo('me/data', {'train.csv': b''}, type='dataset')
    for repo_id, expected in {
        'me/pickles': 'pytorch_model.bin',
        'me/weights': 'no config.json',
        'me/config': 'no model.safetensors',
        'me/told': 'its model_args (pretrained_cfg_overlay) say where weights come from',
        'me/data': 'a data set',
        'me/nothing': 'there is no model me/nothing',
        'hf-hub:me/x': 'USER/NAME',
    }.items():
        assert expected in pull_error(repo_id, tmp_path / 'out')
        assert list(tmp_path.glob('*out*')) == []
    assert 'a/b.PTH' in pull_error('me/pickles', tmp_path / 'out')
    assert server.count('GET', '/me/pickles/resolve/') == 0


def test_a_flipped_byte_is_noticed(server: HubServer, export: Path, tmp_path: Path) -> None:
    push_folder(export, 'me/x')
    earlier = files_of(pull_folder('me/x', tmp_path / 'there' / 'earlier'))
    for name in ('model.safetensors', 'config.json', 'examples/01.png'):
        for out in ('new', 'earlier'):
            server.damage(name, 'flip')
            error = pull_error('me/x', tmp_path / 'there' / out)
            assert f'{name} of me/x did not arrive with the checksum' in error
    assert [path.name for path in (tmp_path / 'there').iterdir()] == ['earlier']
    assert files_of(tmp_path / 'there' / 'earlier') == earlier


def test_a_transfer_that_breaks_is_continued_or_told(
    server: HubServer, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 1024)
    push_folder(export, 'me/x')
    server.damage('model.safetensors', 'truncate', times=2)
    server.fail('/resolve/.*/config.json', method='GET')
    server.fail('/resolve/.*/README.md', method='HEAD', status=503)
    server.fail('/api/models/me/x', method='GET', status=503)
    server.fail('/tree/', status=500)
    assert files_of(pull_folder('me/x', tmp_path / 'x')) == files_of(export)
    assert any('range' in request.headers for request in server.requests)
    server.fail('/resolve/.*/model.safetensors', method='GET', times=100)
    assert 'no connection' in pull_error('me/x', tmp_path / 'y')
    assert not (tmp_path / 'y').exists()


def test_the_command_fails_in_one_line_with_exit_code_2(
    server: HubServer, export: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.add_repo('me/x')
    server.fail('/commit/', status=503, times=100)
    for command, expected in (
        (['push', str(export), 'me/x'], 'me/x was not pushed: '),
        (['push', str(export), 'you/x'], 'the token may not write to you/x'),
        (['pull', 'me/y', '--out', str(tmp_path / 'y')], 'there is no model me/y'),
    ):
        with pytest.raises(SystemExit) as exit_info:
            run_cli(main, command)
        (line,) = capfd.readouterr().err.splitlines()
        assert exit_info.value.code == 2
        assert line.startswith('error: ')
        assert expected in line
    assert server.repos['model', 'me/x'].files() == {}
