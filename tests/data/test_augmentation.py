"""The settings of augmentation, and erasing in the distribution of timm."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor

from timm_mealv2.data.augmentation import Augmentation, Erasing, pixels_of


@pytest.mark.parametrize('mode', ['const', 'rand', 'pixel'])
def test_erasing_has_the_distribution_of_timm(mode: str) -> None:
    mean, std, size = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 24
    augmentation = Augmentation((3, size, size), mean=mean, std=std, reprob=0.6, remode=mode, recount=3)
    ours = Erasing(augmentation, seed=1)
    timms = RandomErasing(0.6, mode=mode, max_count=3, device='cpu')
    random.seed(2)
    torch.manual_seed(2)
    found: dict[str, list[np.ndarray]] = {'ours': [], 'timm': []}
    background = 255  # far from every fill; a filled pixel may be it by chance, in both alike
    for index in range(1500):
        pixels = np.full((3, size, size), background, dtype=np.uint8)
        ours(pixels, 0, index)
        found['ours'].append(pixels)
        fill = timms(torch.full((3, size, size), torch.nan))
        fill = fill * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        found['timm'].append((fill * 255).round().clamp(0, 255).nan_to_num(background).numpy().astype(np.uint8))
    figures = []
    for images in map(np.stack, found.values()):
        mask = (images != background).any(axis=1)
        values = images.transpose(0, 2, 3, 1)[mask].astype(float)
        areas = mask.mean(axis=(1, 2))
        rows = np.nonzero(mask)[1]
        figures.append([(areas > 0).mean(), areas.mean(), areas.std(), rows.mean() / size, rows.std() / size])
        figures[-1] += [*values.mean(axis=0) / 255, *values.std(axis=0) / 255]
    assert np.allclose(*figures, atol=0.03)
    if mode == 'const':
        assert np.allclose(figures[0][5:8], mean, atol=0.003)


def test_an_augmentation_survives_json() -> None:
    augmentation = Augmentation((3, 16, 20), scale=(0.3, 1.0), cutmix_minmax=(0.2, 0.8), train_crop_mode='rkrc')
    assert Augmentation(**json.loads(json.dumps(dataclasses.asdict(augmentation)))) == augmentation


@pytest.mark.parametrize('mode', ['L', 'RGB', 'CMYK'])
def test_pixels_of_an_image_are_those_of_timm(mode: str) -> None:
    image = Image.frombytes(mode, (7, 5), np.random.default_rng(0).bytes(7 * 5 * len(mode)))
    laid_out = pixels_of(image)
    assert np.array_equal(laid_out, MaybePILToTensor()(image).numpy())
    laid_out[:] = 0  # erasing writes in place
