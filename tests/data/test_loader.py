"""The training loader: what a batch holds depends on (seed, epoch, batch) alone."""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.data import create_dataset
from torch import Tensor

from timm_mealv2.data.dataset import check_classes, class_names, open_dataset
from timm_mealv2.data.loader import TrainLoader, eval_loader
from timm_mealv2.errors import UserError

TRANSFORM: dict[str, Any] = {
    'scale': (0.3, 1.0),
    'hflip': 0.5,
    'color_jitter': 0.4,
    'interpolation': 'random',
    'mean': (0.5, 0.5, 0.5),
    'std': (0.5, 0.5, 0.5),
}
MIXUP = {'mixup_alpha': 0.8, 'cutmix_alpha': 1.0, 'label_smoothing': 0.1, 'num_classes': 3}


@pytest.fixture
def make(image_folder: Path) -> Callable[..., TrainLoader]:
    def make_loader(transform: dict[str, Any] | None = None, **kwargs: Any) -> TrainLoader:
        dataset = create_dataset('', root=image_folder, split='train')
        kwargs = {'input_size': (3, 16, 16), 'batch_size': 4, 'seed': 7, **kwargs}
        return TrainLoader(dataset, transform={**TRANSFORM, **(transform or {})}, **kwargs)

    return make_loader


def images_of(loader: TrainLoader, epoch: int = 0, start: int = 0) -> list[Tensor]:
    return [images.clone() for images, _ in loader.batches(epoch, start)]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize('prefetch', [True, False])
@pytest.mark.parametrize('workers', [0, 2])
def test_an_epoch_entered_in_the_middle_goes_on_as_the_unbroken_one(
    make: Callable[..., TrainLoader], workers: int, prefetch: bool
) -> None:
    options = {'mixup': MIXUP, 'transform': {'re_prob': 0.5, 're_mode': 'pixel'}, 'prefetch': prefetch}
    whole = images_of(make(workers=0, **options), epoch=3)
    loader = make(workers=workers, **options)
    images_of(loader, epoch=1)
    assert_same(images_of(loader, epoch=3, start=2), whole[2:])
    assert_same(images_of(loader, epoch=3), whole)


def test_epochs_and_seeds_differ(make: Callable[..., TrainLoader]) -> None:
    loader = make()
    assert not torch.equal(images_of(loader, epoch=0)[0], images_of(loader, epoch=1)[0])
    assert not torch.equal(images_of(loader)[0], images_of(make(seed=8))[0])


def test_every_image_comes_once_and_the_last_batch_is_kept(make: Callable[..., TrainLoader]) -> None:
    loader = make(batch_size=8, transform={'no_aug': True})
    batches = images_of(loader)
    assert [len(batch) for batch in batches] == [8, 8, 5]
    assert len(loader) == 3
    assert len({image.numpy().tobytes() for batch in batches for image in batch}) == 21


def test_a_last_batch_of_one_image_is_left_out(make: Callable[..., TrainLoader]) -> None:
    assert [len(batch) for batch in images_of(make(batch_size=5))] == [5, 5, 5, 5]
    assert [len(batch) for batch in images_of(make(batch_size=1))] == [1] * 21


def test_two_processes_share_the_batch_of_one(make: Callable[..., TrainLoader]) -> None:
    whole = images_of(make(batch_size=6), epoch=2)
    ranks = [images_of(make(batch_size=3, rank=rank, world_size=2), epoch=2) for rank in range(2)]
    for batch, first, second in zip(whole[:3], *(rank[:3] for rank in ranks), strict=True):
        assert sorted(x.sum().item() for x in batch) == sorted(x.sum().item() for x in torch.cat([first, second]))


@pytest.mark.parametrize('prefetch', [True, False])
@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem'])
def test_mixing_keeps_an_odd_last_batch(make: Callable[..., TrainLoader], mode: str, prefetch: bool) -> None:
    loader = make(batch_size=8, mixup={**MIXUP, 'mode': mode}, prefetch=prefetch)
    batches = list(loader.batches(0))
    assert [len(images) for images, _ in batches] == [8, 8, 5]
    for images, target in batches:
        assert target.shape == (len(images), 3)
        torch.testing.assert_close(target.sum(dim=1), torch.ones(len(images)))
    odd = batches[-1][1][-1].sort().values  # unmixed: one class and the smoothing
    torch.testing.assert_close(odd, torch.tensor([0.1 / 3, 0.1 / 3, 0.9 + 0.1 / 3]))


@pytest.mark.parametrize('prefetch', [True, False])
def test_mixing_ends_with_its_epoch(make: Callable[..., TrainLoader], prefetch: bool) -> None:
    loader = make(mixup=MIXUP, mixup_off_epoch=2, workers=1, prefetch=prefetch)
    mixed = [any((target.max(dim=1).values < 0.9).any() for _, target in loader.batches(e)) for e in range(3)]
    assert mixed == [True, True, False]


@pytest.mark.parametrize('mixup', [None, MIXUP])
@pytest.mark.parametrize('prefetch', [True, False])
def test_without_labels_the_pixels_are_the_same(
    make: Callable[..., TrainLoader], prefetch: bool, mixup: dict[str, Any] | None
) -> None:
    labelled, unlabelled = (make(unlabeled=flag, mixup=mixup, prefetch=prefetch) for flag in (False, True))
    assert_same(images_of(labelled), images_of(unlabelled))
    assert all((target == -1).all() and target.ndim == 1 for _, target in unlabelled.batches(0))


def test_repeats_of_an_image_are_augmented_differently(make: Callable[..., TrainLoader]) -> None:
    batches = images_of(make(repeats=3))
    views = {image.numpy().tobytes() for batch in batches for image in batch}
    assert len(views) == sum(len(batch) for batch in batches)


def test_batches_of_scheduled_sizes(make: Callable[..., TrainLoader]) -> None:
    sizes = {'input_sizes': [(3, 16, 16), (3, 24, 24)], 'batch_sizes': [4, 2], 'choice_weights': None}
    loader = make(sizes=sizes)
    whole = images_of(loader, epoch=1)
    assert {(len(b), b.shape[-1]) for b in whole} == {(4, 16), (2, 24)}
    assert sum(map(len, whole)) == 20
    assert_same(images_of(loader, epoch=1, start=3), whole[3:])


def test_augmentation_splits_give_a_clean_and_an_augmented_copy(make: Callable[..., TrainLoader]) -> None:
    images, target = next(iter(make(splits=2, transform={'auto_augment': 'augmix-m5-w2'}).batches(0)))
    assert images.shape == (8, 3, 16, 16)
    assert torch.equal(target[:4], target[4:])
    assert not torch.equal(images[:4], images[4:])


def test_evaluation_sees_the_whole_split_in_order(image_folder: Path) -> None:
    dataset = open_dataset('', str(image_folder), 'validation')
    config = {'input_size': (3, 16, 16), 'interpolation': 'bilinear', 'crop_pct': 1.0, 'crop_mode': 'center'}
    config |= {'mean': (0.5,) * 3, 'std': (0.5,) * 3}
    loader = eval_loader(dataset, config, batch_size=5, device=torch.device('cpu'), num_workers=0)
    assert torch.cat([target for _, target in loader]).tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_what_cannot_be_opened_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / 'empty').mkdir()
    for root, text in (('absent', 'no data set at'), ('empty', 'cannot open')):
        with pytest.raises(UserError, match=text):
            open_dataset('', str(tmp_path / root), 'train')
    with pytest.raises(UserError, match='--data-dir'):
        open_dataset('', None, 'train')


def test_classes_of_a_tar_are_compared_too(image_folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
        tar.add(image_folder / 'train', 'train')
    dataset = open_dataset('', str(tmp_path), 'train.tar')
    assert class_names(dataset) == ['cold', 'plain', 'warm']
    with pytest.raises(UserError, match='3 classes, the model 10'):
        check_classes(dataset, None, 10)


def test_class_counts_and_names_are_compared(image_folder: Path, tmp_path: Path) -> None:
    train = open_dataset('', str(image_folder), 'train')
    check_classes(train, open_dataset('', str(image_folder), 'validation'), 3)
    with pytest.raises(UserError, match='3 classes, the model 10'):
        check_classes(train, None, 10)
    other = tmp_path / 'validation'
    other.mkdir()
    for name in ('cold', 'plain', 'wet'):
        (other / name).symlink_to(image_folder / 'validation' / 'cold')
    with pytest.raises(UserError, match='warm, wet'):
        check_classes(train, open_dataset('', str(tmp_path), 'validation'), 3)
