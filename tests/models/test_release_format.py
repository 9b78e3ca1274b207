"""Weights written by timm 0.2.1, the version of the release, give the same logits here."""

import subprocess
import sys

import pytest
import timm
import torch

import timm_mealv2  # noqa: F401 - registers the students

ARCHITECTURES = {
    'mealv1_resnet50': 'resnet50',
    'mealv2_resnet18': 'resnet18',
    'mealv2_resnet50': 'resnet50',
    'mealv2_mobilenetv3_small_075': 'tf_mobilenetv3_small_075',
    'mealv2_mobilenetv3_small_100': 'tf_mobilenetv3_small_100',
    'mealv2_mobilenetv3_large_100': 'tf_mobilenetv3_large_100',
    'mealv2_efficientnet_b0': 'tf_efficientnet_b0',
}

# Running statistics as of a trained model rather than 0 and 1; the classifier is scaled for logits of about 1.
SAVE = """
import collections.abc, sys, types
from pathlib import Path

six = types.ModuleType('torch._six')  # gone from torch since 1.13, wanted by timm 0.2.1
six.container_abcs, six.string_classes, six.int_classes, six.inf = collections.abc, (str, bytes), int, float('inf')
sys.modules['torch._six'] = six

import timm, torch

assert timm.__version__ == '0.2.1', timm.__version__
folder = Path(sys.argv[1])
image = torch.load(folder / 'image.pt', weights_only=True)
torch.set_num_threads(1)
with torch.inference_mode():
    for seed, name in enumerate(sys.argv[2:]):
        torch.manual_seed(seed)
        model = timm.create_model(name).eval()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        scale = model(image).std()
        for parameter in model.get_classifier().parameters():
            parameter /= scale
        parallel = torch.nn.DataParallel(model)
        torch.save(parallel(image), folder / f'{name}.logits.pt')
        torch.save(parallel.state_dict(), folder / f'{name}.pth')
"""


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """The folder where timm 0.2.1 wrote, of each architecture, a DataParallel state dict and its logits."""
    folder = tmp_path_factory.mktemp('timm_0_2_1')
    pip = (sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', folder / 'site', 'timm==0.2.1')
    installed = subprocess.run(pip, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f'timm 0.2.1 cannot be installed: {installed.stderr.strip().splitlines()[-1]}')
    torch.save(torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)), folder / 'image.pt')
    program = f'import sys; sys.path.insert(0, {str(folder / "site")!r})\n{SAVE}'
    names = sorted(set(ARCHITECTURES.values()))
    subprocess.run([sys.executable, '-W', 'ignore', '-c', program, folder, *names], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('student', ARCHITECTURES)
def test_weights_of_timm_0_2_1_give_the_same_logits(written, student):
    architecture = ARCHITECTURES[student]
    overlay = {'file': str(written / f'{architecture}.pth')}
    model = timm.create_model(student, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    expected = torch.load(written / f'{architecture}.logits.pt', weights_only=True)
    with torch.inference_mode():
        difference = (model(torch.load(written / 'image.pt', weights_only=True)) - expected).abs().max().item()
    print(f'{student}: max|difference| = {difference:.1e} at max|logit| = {expected.abs().max().item():.1f}')
    assert 0.5 < expected.std() < 2
    assert difference <= 1e-5 * expected.abs().max()  # rounding, which differs from CPU to CPU
