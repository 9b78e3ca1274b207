"""The students: registration, configs, strict loading, the download and its digest."""

import http.server
import threading
from functools import partial
from pathlib import Path

import pytest
import timm
import torch

from timm_mealv2.errors import UserError

NAME = 'mealv2_mobilenetv3_small_075'
REPO = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.delenv('MEALV2_HUB_NAMESPACE', raising=False)


@pytest.fixture
def released(tmp_path):
    """A file as the release has them: the state dict of a DataParallel model."""
    (tmp_path / 'served').mkdir()
    path = tmp_path / 'served' / 'student.pth'
    torch.manual_seed(0)
    torch.save(torch.nn.DataParallel(timm.create_model('tf_mobilenetv3_small_075')).state_dict(), path)
    return path


class _Handler(http.server.SimpleHTTPRequestHandler):
    cut = False

    def log_message(self, *args):
        pass

    def copyfile(self, source, outputfile):
        data = source.read()
        outputfile.write(data[: len(data) // 2] if self.cut else data)


class _CuttingHandler(_Handler):
    cut = True


@pytest.fixture(params=[_Handler])
def server(request, released):
    handler = partial(request.param, directory=str(released.parent))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}/'
        httpd.shutdown()


def _files(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith('.lock')) if folder.exists() else []


def test_only_downloadable_students_are_listed_as_pretrained():
    listed = timm.list_pretrained('mealv*', exclude_filters='mealv2_ensemble*')
    assert len(listed) == 8
    assert not [name for name in listed if 'resnet18' in name]


def test_student_has_its_own_config():
    model = timm.create_model('mealv2_resnet50.in1k_380')
    data = timm.data.resolve_model_data_config(model)
    assert model.pretrained_cfg['architecture'] == 'mealv2_resnet50'
    assert (data['input_size'], data['interpolation'], data['crop_pct']) == ((3, 380, 380), 'bilinear', 0.875)
    assert data['mean'] == timm.data.IMAGENET_DEFAULT_MEAN


def test_student_without_released_file_names_the_recipe():
    with pytest.raises(UserError, match='mealv2-train --recipe mealv2_resnet18_224'):
        timm.create_model('mealv2_resnet18', pretrained=True)


def test_unknown_tag_lists_the_known_ones():
    with pytest.raises(UserError, match=r"no tag 'in22k'.*mealv2_resnet50\.cutmix_in1k"):
        timm.create_model('mealv2_resnet50.in22k')


@pytest.mark.parametrize(
    'kwargs',
    [{}, {'num_classes': 7}, {'in_chans': 1}, {'features_only': True, 'out_indices': (1, 3)}],
    ids=['full', 'classes', 'channels', 'features'],
)
def test_file_is_loaded_and_a_wrong_one_refused(released, kwargs):
    overlay = {'file': str(released)}
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    weights = {k.removeprefix('module.'): v for k, v in torch.load(released, weights_only=True).items()}
    torch.testing.assert_close(model.state_dict()['blocks.1.0.bn1.weight'], weights['blocks.1.0.bn1.weight'])
    key = 'blocks.1.0.conv_pw.weight'
    assert torch.equal(model.state_dict()[key], weights[key])
    assert not {'file', 'state_dict'} & set(model.pretrained_cfg)

    del weights['conv_head.bias']
    torch.save(weights, released)
    with pytest.raises(UserError, match=r'1 missing \(conv_head\.bias\)'):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def test_download_is_cached_and_its_digest_checked(server, tmp_path):
    create = partial(timm.create_model, NAME, pretrained=True)
    cache = tmp_path / 'torch/hub/checkpoints'
    create(pretrained_cfg_overlay={'url': server + 'student.pth'})
    assert _files(cache) == ['student.pth', 'student.pth.sha256']
    create(pretrained_cfg_overlay={'url': 'http://127.0.0.1:1/student.pth'})  # from the cache
    with (cache / 'student.pth').open('ab') as file:
        file.write(b'x')
    with pytest.raises(UserError, match=r'SHA-256.*delete .*student\.pth and download it again'):
        create(pretrained_cfg_overlay={'url': server + 'student.pth'})
    (cache / 'student.pth').unlink()
    create(pretrained_cfg_overlay={'url': server + 'student.pth'})


@pytest.mark.parametrize('url', ['{}absent.pth', 'http://127.0.0.1:1/student.pth'], ids=['404', 'refused'])
def test_failed_download_leaves_nothing(server, tmp_path, url):
    with pytest.raises(UserError, match='cannot be downloaded'):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={'url': url.format(server)})
    assert _files(tmp_path / 'torch/hub/checkpoints') == []


@pytest.mark.parametrize('server', [_CuttingHandler], indirect=True)
def test_truncated_download_leaves_nothing(server, tmp_path):
    with pytest.raises(UserError, match='cut off'):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={'url': server + 'student.pth'})
    assert _files(tmp_path / 'torch/hub/checkpoints') == []


def test_torch_hub_loads_a_student():
    model = torch.hub.load(str(REPO), NAME, source='local', pretrained=False, num_classes=3)
    assert model.num_classes == 3
