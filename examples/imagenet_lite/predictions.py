"""Draw what the lite1 + lite2 ensemble and lite0 predict for photos, as one picture (needs matplotlib)."""

from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from crops import open_photo
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import nn

from timm_mealv2.command_line import OneLineParser, run_cli
from timm_mealv2.errors import UserError
from timm_mealv2.models.factory import create_ensemble


@torch.inference_mode()
def top3(model: nn.Module, image: Image.Image) -> list[str]:
    """Return the three likeliest ImageNet classes with their probabilities in percent, one text each."""
    config = resolve_model_data_config(model)
    x = create_transform(**config, is_training=False)(image)
    values, indices = model(x[None]).softmax(dim=1)[0].topk(3)
    names = ImageNetInfo()
    return [
        f'{100 * p:3.0f} %  {names.index_to_description(int(i)).split(",")[0]}'
        for p, i in zip(values.tolist(), indices.tolist(), strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the photos of the command line."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path, help='picture to write, .png')
    parser.add_argument('photos', type=Path, nargs='+', metavar='PHOTO')
    parser.add_argument('--folders', type=Path, default=Path('output/imagenet_lite'), metavar='DIR')
    args = parser.parse_args(argv)
    try:
        import matplotlib
    except ImportError as error:
        raise UserError('matplotlib is missing: pip install matplotlib.') from error
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    ensemble = create_ensemble([f'local-dir:{args.folders}/lite{variant}' for variant in (1, 2)])
    student = timm.create_model(f'local-dir:{args.folders}/lite0', pretrained=True).eval()
    columns = min(3, len(args.photos))
    rows = -(-len(args.photos) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 4.6 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis('off')
    for axis, photo in zip(axes.flat, args.photos, strict=False):
        image = open_photo(photo)
        image.thumbnail((500, 500))
        lines = ['lite1 + lite2', *top3(ensemble, image), 'lite0', *top3(student, image)]
        print(f'{photo.stem}: ' + '; '.join(lines))
        axis.imshow(image)
        axis.text(0, -0.03, '\n'.join(lines), transform=axis.transAxes, va='top', family='monospace', fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out, dpi=60)


if __name__ == '__main__':
    run_cli(main)
