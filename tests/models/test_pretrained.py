"""Released weights: timm's ways of building with them, strict loading, the download and its digest."""

import http.server
import json
import os
import resource
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from timm_mealv2.errors import UserError
from timm_mealv2.models import pretrained

NAME = 'mealv2_mobilenetv3_small_075'
ARCHITECTURE = 'tf_mobilenetv3_small_075'
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_namespace(monkeypatch):
    monkeypatch.delenv('MEALV2_HUB_NAMESPACE', raising=False)


@pytest.fixture
def released(tmp_path):
    """A file as the release has them: the state dict of a DataParallel model."""
    (tmp_path / 'served').mkdir()
    path = tmp_path / 'served' / 'student.pth'
    torch.manual_seed(0)
    torch.save(torch.nn.DataParallel(timm.create_model(ARCHITECTURE)).state_dict(), path)
    return path


def read(released):
    return {key.removeprefix('module.'): value for key, value in torch.load(released, weights_only=True).items()}


def from_file(path, name=NAME, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={'file': str(path)}, **kwargs)


def assert_equal(state, expected, without=()):
    assert state.keys() == expected.keys()
    assert not [key for key in expected if key not in without and not torch.equal(state[key], expected[key])]


# timm's ways of building a model


def test_weights_and_nothing_else_come_from_the_file(released):
    model = from_file(released)
    assert_equal(model.state_dict(), read(released))
    assert not {'file', 'state_dict'} & set(model.pretrained_cfg)  # else they would be in checkpoints and config.json
    assert model.training


def test_num_classes_replaces_the_head_alone(released):
    model = from_file(released, num_classes=7)
    weights = read(released)
    head = {'classifier.weight', 'classifier.bias'}
    assert_equal(model.state_dict(), weights, without=head)
    assert model.num_classes == 7
    assert model.classifier.weight.shape == (7, 1024)

    headless = from_file(released, num_classes=0)
    assert_equal(headless.state_dict(), {key: value for key, value in weights.items() if key not in head})


def test_in_chans_sums_the_first_convolution(released):
    model = from_file(released, in_chans=1)
    weights = read(released)
    assert_equal(model.state_dict(), weights, without={'conv_stem.weight'})
    torch.testing.assert_close(model.conv_stem.weight.detach(), weights['conv_stem.weight'].sum(1, keepdim=True))
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 1000)


def test_features_only_has_the_weights(released):
    model = from_file(released, features_only=True, out_indices=(1, 3))
    weights = read(released)
    assert_equal(model.state_dict(), {key: weights[key] for key in model.state_dict()})
    assert [x.shape[1] for x in model(torch.zeros(1, 3, 64, 64))] == model.feature_info.channels() == [16, 40]
    assert not [m for m in model.modules() if 'state_dict' in (getattr(m, 'pretrained_cfg', None) or ())]


def test_global_pool_and_dropout_are_passed_on(released):
    model = from_file(released, global_pool='max', drop_rate=0.3, drop_path_rate=0.1).eval()
    assert_equal(model.state_dict(), read(released))
    assert (model.global_pool.pool_type, model.drop_rate) == ('max', 0.3)
    assert [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    x = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(model(x), from_file(released).eval()(x))


def test_dtype_and_device_are_passed_on(released):
    model = from_file(released, dtype=torch.float64, device='cpu')
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert_equal(
        {k: v.float() for k, v in model.state_dict().items()}, {k: v.float() for k, v in read(released).items()}
    )


def test_checkpoint_path_takes_a_released_file(released):
    assert_equal(timm.create_model(NAME, checkpoint_path=released).state_dict(), read(released))


@pytest.mark.parametrize('safe', [True, False], ids=['safetensors', 'bin'])
def test_folder_saved_by_timm_is_loaded_and_a_wrong_one_refused(tmp_path, safe):
    trained = timm.create_model(NAME, num_classes=5)
    timm.models.save_for_hf(trained, tmp_path / 'saved', safe_serialization=safe)
    load = partial(timm.create_model, f'local-dir:{tmp_path / "saved"}', pretrained=True)
    model = load()
    assert_equal(model.state_dict(), trained.state_dict())
    assert load(num_classes=2).num_classes == 2
    config = tmp_path / 'saved/config.json'
    config.write_text(config.read_text().replace('"num_classes": 5', '"num_classes": 4'))
    with pytest.raises(UserError, match=r'with 4 classes.*classifier\.weight \[5, 1024\] instead of \[4, 1024\]'):
        load(num_classes=2)
    (tmp_path / 'saved' / ('model.safetensors' if safe else 'pytorch_model.bin')).unlink()
    with pytest.raises(UserError, match=r'no weights there; expected model\.safetensors or pytorch_model\.bin'):
        load()


def test_torch_hub_loads_a_student(released):
    load = partial(torch.hub.load, str(ROOT), source='local')
    model = load(NAME, pretrained=True, pretrained_cfg_overlay={'file': str(released)})
    assert_equal(model.state_dict(), read(released))
    assert load('mealv2_resnet50', pretrained_cfg='in1k_380', device='meta').pretrained_cfg['tag'] == 'in1k_380'


# Files that do not fit


@pytest.mark.parametrize(
    'kwargs',
    [{}, {'num_classes': 7}, {'in_chans': 1}, {'features_only': True}],
    ids=['full', 'head', 'grey', 'features'],
)
def test_file_that_does_not_fit_is_refused(released, tmp_path, kwargs):
    weights = read(released)
    del weights['conv_head.bias']
    weights['conv_head.bias_'] = weights['bn1.bias']
    weights['classifier.weight'] = torch.zeros(999, 1024)
    torch.save(weights, released)
    with pytest.raises(UserError) as error:
        from_file(released, **kwargs)
    assert str(error.value) == (
        f'{released} does not fit {NAME} (weights of a {ARCHITECTURE} with 1000 classes and 3 input channels are '
        f'expected): 1 missing (conv_head.bias); 1 unexpected (conv_head.bias_); '
        f'1 of another shape (classifier.weight [999, 1024] instead of [1000, 1024])'
    )


def test_weights_of_another_architecture_are_refused(released):
    with pytest.raises(
        UserError, match=r'mealv2_resnet18 .*117 missing \(conv1\.weight, layer1\..*, \.\.\.\); 239 unexpected'
    ):
        from_file(released, name='mealv2_resnet18')


def test_given_state_dict_is_checked_too(released):
    create = partial(timm.create_model, NAME, pretrained=True)
    weights = torch.load(released, weights_only=True)
    assert_equal(create(pretrained_cfg_overlay={'state_dict': weights}).state_dict(), read(released))
    weights.pop('module.bn1.bias')
    with pytest.raises(UserError, match=r'the given state_dict does not fit.*1 missing \(bn1\.bias\)'):
        create(pretrained_cfg_overlay={'state_dict': weights})


@pytest.mark.parametrize('content', ['cut', 'text', 'code'])
def test_file_that_is_no_state_dict_is_one_line(released, content):
    if content == 'cut':
        released.write_bytes(released.read_bytes()[: released.stat().st_size // 2])
    elif content == 'text':
        released.write_text('404: Not Found')
    else:
        torch.save({'path': Path('/')}, released)
    with pytest.raises(UserError, match='cannot be read as a state dict') as error:
        from_file(released)
    assert '\n' not in str(error.value)


def test_absent_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r'absent\.pth: no such file'):
        from_file(tmp_path / 'absent.pth')


# The download


class Server(http.server.ThreadingHTTPServer):
    def __init__(self, handler, files=None):
        super().__init__(('127.0.0.1', 0), handler)
        self.requests: list[str] = []
        self.files: dict[str, bytes] = files or {}


class FileHandler(http.server.SimpleHTTPRequestHandler):
    server: Server
    cut = False

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.requests.append(self.path)
        super().do_GET()

    def copyfile(self, source, outputfile):
        data = source.read()
        outputfile.write(data[: len(data) // 2] if self.cut else data)


class CuttingHandler(FileHandler):
    cut = True


@contextmanager
def serving(handler, files=None):
    with Server(handler, files) as server:
        threading.Thread(target=partial(server.serve_forever, poll_interval=0.02), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


@pytest.fixture(params=[FileHandler])
def server(request, released):
    with serving(partial(request.param, directory=str(released.parent))) as server:
        yield server


@pytest.fixture
def cache(tmp_path):
    return tmp_path / 'torch_home/hub/checkpoints'


def download(server, file='student.pth', name=NAME, **kwargs):
    overlay = {'url': f'http://127.0.0.1:{server.server_port}/{file}'}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def files(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_download_enters_timms_cache_with_its_digest(server, released, cache, capfd):
    assert_equal(download(server).state_dict(), read(released))
    assert files(cache) == ['student.pth', 'student.pth.sha256']
    check = subprocess.run(['sha256sum', '--check', 'student.pth.sha256'], cwd=cache, check=False, capture_output=True)
    assert check.returncode == 0
    assert '100%' in capfd.readouterr().err  # the progress bar
    assert_equal(download(server, num_classes=1000).state_dict(), read(released))
    assert server.requests == ['/student.pth']


def test_cache_dir_is_used_instead(server, released, cache, tmp_path):
    model = download(server, cache_dir=tmp_path / 'mine')
    assert_equal(model.state_dict(), read(released))
    assert (files(tmp_path / 'mine'), files(cache)) == (['student.pth', 'student.pth.sha256'], [])


def test_file_put_into_the_cache_by_hand_gets_its_digest_recorded(server, released, cache):
    cache.mkdir(parents=True)
    (cache / 'student.pth').write_bytes(released.read_bytes())
    assert_equal(download(server).state_dict(), read(released))
    assert files(cache) == ['student.pth', 'student.pth.sha256']
    assert server.requests == []


def test_processes_that_start_together_download_once(server, cache):
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: download(server, device='cpu'), range(3)))
    assert server.requests == ['/student.pth']
    assert files(cache) == ['student.pth', 'student.pth.sha256']


def test_damaged_cache_is_told_and_mended_as_the_message_says(server, released, cache):
    download(server)
    with (cache / 'student.pth').open('ab') as file:
        file.write(b'x')
    with pytest.raises(UserError, match=r'has SHA-256 .*: delete .*/student\.pth and load again$'):
        download(server)
    (cache / 'student.pth').unlink()
    assert_equal(download(server).state_dict(), read(released))


def test_another_file_at_the_source_is_told_and_accepted_as_the_message_says(server, released, cache):
    download(server)
    (cache / 'student.pth').unlink()
    torch.save({key: value + 1 for key, value in read(released).items()}, released)
    with pytest.raises(UserError, match=r'another file than before; delete .*/student\.pth\.sha256 to accept it$'):
        download(server)
    assert files(cache) == ['student.pth.sha256']
    (cache / 'student.pth.sha256').unlink()
    assert_equal(download(server).state_dict(), read(released))


def test_pinned_digest_comes_first(server, cache, monkeypatch):
    monkeypatch.setitem(pretrained.KNOWN_SHA256, 'student.pth', '0' * 64)
    with pytest.raises(UserError, match=r'but KNOWN_SHA256 says 0{64}: that is not the released file'):
        download(server)
    assert files(cache) == []


def test_download_that_does_not_fit_leaves_nothing(server, cache):
    with pytest.raises(UserError, match=r'student\.pth does not fit mealv2_resnet18'):
        download(server, name='mealv2_resnet18')
    assert files(cache) == []


@pytest.mark.parametrize('server', [CuttingHandler], indirect=True)
def test_truncated_download_leaves_nothing(server, cache):
    with pytest.raises(UserError, match='cut off'):
        download(server)
    assert files(cache) == []


def test_failed_download_leaves_nothing(server, cache):
    with pytest.raises(UserError, match=r'absent\.pth cannot be downloaded: HTTPError: HTTP Error 404'):
        download(server, file='absent.pth')
    with pytest.raises(UserError, match=r'cannot be downloaded: URLError: .*refused.*check the network'):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={'url': 'http://127.0.0.1:1/student.pth'})
    assert files(cache) == []


def test_cache_that_is_no_folder_is_one_line(server, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match=r'file cannot be used as a cache: .*choose another cache_dir'):
        download(server, cache_dir=tmp_path / 'file')


def test_full_disk_is_no_matter_of_the_network(server, cache):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(UserError, match=r'checkpoints cannot be used as a cache: OSError: .*File too large'):
            download(server)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(cache) == []


# The Hub


class HubHandler(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as serves files of repositories: `server.files` has path -> content."""

    server: Server

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.server.requests.append(f'{self.command} {self.path}')
        content = self.server.files.get(self.path)
        known = any(path.startswith(self.path.partition('/resolve/')[0] + '/') for path in self.server.files)
        self.send_response(200 if content is not None else 404)
        self.send_header('Content-Length', str(len(content or b'')))
        if content is None:
            self.send_header('X-Error-Code', 'EntryNotFound' if known else 'RepoNotFound')
        else:
            self.send_header('ETag', '"0123456789abcdef"')
            self.send_header('X-Repo-Commit', '1' * 40)
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(self.server.files.get(self.path, b''))


LOAD_FROM_HUB = """
import json, os, sys
import timm, torch, timm_mealv2

folder, answers = sys.argv[1], {}
for name in sys.argv[2:]:
    try:
        model = timm.create_model(name, pretrained=True)
        torch.save(model.state_dict(), f'{folder}/{name}.pth')
        answers[name] = model.pretrained_cfg['hf_hub_id']
    except timm_mealv2.errors.UserError as error:
        answers[name] = str(error)
print(json.dumps(answers))
"""


def test_namespace_takes_the_weights_from_the_hub(tmp_path):
    resnet, mobilenet, efficientnet = 'mealv2_resnet18', NAME, 'mealv2_efficientnet_b0'
    cutmix = 'mealv2_resnet50.cutmix_in1k'
    expected = {name: timm.create_model(name).state_dict() for name in (resnet, mobilenet)}
    torch.save(expected[mobilenet], tmp_path / 'pytorch_model.bin')
    repositories = {
        f'/me/{resnet}.in1k/resolve/main/model.safetensors': safetensors.torch.save(expected[resnet]),
        f'/me/{mobilenet}.in1k/resolve/main/pytorch_model.bin': (tmp_path / 'pytorch_model.bin').read_bytes(),
        f'/me/{efficientnet}.in1k/resolve/main/model.safetensors': safetensors.torch.save(expected[resnet]),
    }
    with serving(HubHandler, repositories) as hub:
        environment = {key: value for key, value in os.environ.items() if key != 'HF_HUB_OFFLINE'} | {
            'HF_ENDPOINT': f'http://127.0.0.1:{hub.server_port}',
            'HF_HOME': str(tmp_path / 'hf'),
            'HF_HUB_DISABLE_XET': '1',
            'MEALV2_HUB_NAMESPACE': 'me',
            'NO_PROXY': '127.0.0.1',
            'PYTHONPATH': str(ROOT),
        }
        command = [sys.executable, '-c', LOAD_FROM_HUB, tmp_path, resnet, mobilenet, efficientnet, cutmix]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        answers = json.loads(result.stdout)

    for name, weights in expected.items():
        assert answers[name] == f'me/{name}.in1k'
        assert_equal(torch.load(tmp_path / f'{name}.pth', weights_only=True), weights)
    assert answers[efficientnet].startswith(f'me/{efficientnet}.in1k does not fit {efficientnet} ')
    assert answers[cutmix].startswith(f'no weights from me/{cutmix} on the Hub: RepositoryNotFoundError: 404')
    assert answers[cutmix].endswith('check the network, the token and MEALV2_HUB_NAMESPACE')
    assert '\n' not in answers[cutmix]
    # What is asked for: safetensors first, then the pickle.
    assert f'HEAD /me/{mobilenet}.in1k/resolve/main/model.safetensors' in hub.requests
    assert f'HEAD /me/{cutmix}/resolve/main/model.safetensors' in hub.requests


def test_given_weights_come_before_the_namespace(released, server, monkeypatch):
    monkeypatch.setenv('MEALV2_HUB_NAMESPACE', 'me')
    assert_equal(from_file(released).state_dict(), read(released))
    assert_equal(download(server).state_dict(), read(released))
    assert 'hf_hub_id' not in timm.create_model(NAME, device='meta').pretrained_cfg
