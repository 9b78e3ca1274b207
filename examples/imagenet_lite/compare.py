"""Compare the converted folders with the original implementation, PyPI's `efficientnet_lite_pytorch`, logit by logit.

`python examples/imagenet_lite/compare.py --weights DIR`; the package itself is imported, from PYTHONPATH too.
"""

from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from convert import VARIANTS, find_weights

from timm_mealv2.command_line import OneLineParser, run_cli
from timm_mealv2.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Print the largest difference of the logits of four random images, for each variant."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument('--weights', type=Path, metavar='DIR', help='where the packages are, if not installed')
    parser.add_argument('--folders', type=Path, default=Path('output/imagenet_lite'), metavar='DIR')
    args = parser.parse_args(argv)
    try:
        from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError('the original implementation is missing: pip install efficientnet_lite_pytorch.') from error
    for variant in VARIANTS:
        original = EfficientNet.from_name(f'efficientnet-lite{variant}')
        path = find_weights(variant, args.weights)
        original.load_state_dict(torch.load(path, map_location='cpu', weights_only=True))
        model = timm.create_model(f'local-dir:{args.folders}/lite{variant}', pretrained=True)
        shape = model.pretrained_cfg['input_size']
        x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            difference = (original.eval()(x) - model.eval()(x)).abs().max().item()
        print(f'lite{variant} at {shape[-1]} pixels: largest difference {difference:g}')


if __name__ == '__main__':
    run_cli(main)
