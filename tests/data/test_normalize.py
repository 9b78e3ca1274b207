"""Pixels normalized for one model, brought to what another takes."""

import pytest
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_loader

from timm_mealv2.data.normalize import channel_stats, renormalize

IMAGENET = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def normalize(pixels, mean, std):
    return (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]


def test_pixels_come_out_as_if_normalized_with_the_other_statistics():
    pixels = torch.rand(2, 3, 5, 4, dtype=torch.float64)
    result = renormalize(normalize(pixels, *IMAGENET), *IMAGENET, *HALF)
    torch.testing.assert_close(result, normalize(pixels, *HALF), rtol=0, atol=1e-14)


def test_equal_statistics_return_the_very_tensor():
    x = torch.rand(2, 3, 4, 4)
    assert renormalize(x, *IMAGENET, *channel_stats({'mean': list(IMAGENET[0])}, 3)) is x


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_memory_format_and_gradient_are_kept(dtype):
    x = torch.rand(2, 3, 4, 6).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    result = renormalize(x, *IMAGENET, *HALF)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    result.sum().backward()
    expected = (torch.tensor(IMAGENET[1], dtype=torch.float64) / 0.5).to(dtype)
    torch.testing.assert_close(x.grad[0, :, 0, 0], expected)


def test_half_pixels_lose_one_rounding_only():
    x = torch.randn(1, 3, 8, 8).half()
    torch.testing.assert_close(
        renormalize(x, *IMAGENET, *HALF), renormalize(x.double(), *IMAGENET, *HALF).half(), rtol=1e-3, atol=1e-4
    )


def test_statistics_come_from_the_config_or_are_those_of_imagenet():
    assert channel_stats(None, 3) == channel_stats({'mean': None}, 3) == IMAGENET
    assert channel_stats({'mean': [0.1, 0.2, 0.3], 'std': (0.5,)}, 3) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))


@pytest.mark.filterwarnings('ignore:Length of split')
def test_grey_statistics_are_those_of_the_loader_of_timm():
    class Black(torch.utils.data.Dataset):
        transform = None

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return torch.zeros(1, 4, 4, dtype=torch.uint8).numpy(), 0

    loader = create_loader(
        Black(), (1, 4, 4), batch_size=2, mean=IMAGENET[0], std=IMAGENET[1], num_workers=0, device=torch.device('cpu')
    )
    (x, _), *_ = loader
    mean, std = channel_stats({'mean': IMAGENET[0], 'std': IMAGENET[1]}, 1)
    torch.testing.assert_close(x, torch.full_like(x, -mean[0] / std[0]))
