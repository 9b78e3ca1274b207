"""Replaying a store: which crops an epoch takes, that they are the recorded ones, and what does not belong together."""

import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import DataLoader

from timm_mealv2 import EnsembleTeacher
from timm_mealv2.data.dataset import UnreadableImage
from timm_mealv2.errors import UserError
from timm_mealv2.losses import sparse_similarity_loss
from timm_mealv2.soft_labels.crops import Recipe
from timm_mealv2.soft_labels.dataset import CropSampler, MixCrops, SoftLabelDataset, mix_labels
from timm_mealv2.soft_labels.record import record
from timm_mealv2.soft_labels.store import SoftLabelStore


def crops_of(epoch: int, count: int = 12, crops: int = 6, **kwargs: int) -> list[tuple[int, int]]:
    sampler = CropSampler(range(count), crops, **kwargs)
    sampler.set_epoch(epoch)
    taken = list(sampler)
    assert len(taken) == len(sampler)
    return taken


# Which crops an epoch takes


def test_an_epoch_takes_the_next_crop_of_every_image_in_an_order_of_its_own() -> None:
    epochs = [crops_of(epoch) for epoch in range(8)]
    for epoch, taken in enumerate(epochs):
        assert sorted(taken) == [(image, epoch % 6) for image in range(12)]
    assert len({tuple(image for image, _ in taken) for taken in epochs}) == 8
    assert crops_of(3) == epochs[3] != crops_of(3, seed=1)


@pytest.mark.parametrize('per_decode', [2, 3, 4])
def test_with_r_crops_a_decode_r_epochs_visit_every_image_once_with_r_crops(per_decode: int) -> None:
    for block in range(2):
        taken = []
        for epoch in range(block * per_decode, (block + 1) * per_decode):
            part = crops_of(epoch, per_decode=per_decode)
            assert len(part) == 12
            images = [image for image, _ in part]
            assert all(len(set(images[i : i + per_decode])) == 1 for i in range(0, 12, per_decode))
            taken += part
        numbers = [(block * per_decode + turn) % 6 for turn in range(per_decode)]
        assert sorted(taken) == sorted((image, number) for image in range(12) for number in numbers)


@pytest.mark.parametrize('count', [1, 5, 10, 13])
@pytest.mark.parametrize('per_decode', [1, 3, 4])
def test_an_epoch_always_has_as_many_crops_as_images(count: int, per_decode: int) -> None:
    seen = Counter(image for epoch in range(per_decode) for image, _ in crops_of(epoch, count, per_decode=per_decode))
    assert seen.total() == count * per_decode
    assert set(seen) == set(range(count))


@pytest.mark.parametrize('per_decode', [1, 3])
@pytest.mark.parametrize('world_size', [2, 4])
def test_processes_share_an_epoch(world_size: int, per_decode: int) -> None:
    alone = crops_of(4, per_decode=per_decode)
    parts = [crops_of(4, per_decode=per_decode, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(crop for part in parts for crop in part) == sorted(alone)
    # The first step sees the same crops, whatever the number of processes.
    step = [crop for part in parts for crop in part[:per_decode]]
    assert sorted(step) == sorted(alone[: per_decode * world_size])


def test_processes_get_equally_many_crops_of_a_count_that_cannot_be_shared() -> None:
    parts = [crops_of(0, count=10, rank=rank, world_size=4) for rank in range(4)]
    assert {len(part) for part in parts} == {3}
    assert {image for part in parts for image, _ in part} == set(range(10))


# Mixed labels


def test_mixed_labels_are_those_of_both_images_by_area() -> None:
    torch.manual_seed(0)
    classes = 12
    dense = torch.randn(4, classes, dtype=torch.float64).softmax(dim=1)
    labels = torch.cat([torch.arange(4.0)[:, None], torch.arange(12.0).expand(4, -1), dense.float()], dim=1)
    share = torch.tensor([0.9, 0.6, 0.5, 1.0])
    mixed = mix_labels(labels, share)
    assert mixed.shape == (4, 1 + 4 * classes)
    assert mixed.dtype == torch.float32
    assert (mixed[:, 0] == -1).all()
    logits = torch.randn(4, classes, dtype=torch.float64)
    target = share.double()[:, None] * dense + (1 - share.double()[:, None]) * dense.flip(0)
    expected = -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()
    indices, p = mixed[:, 1 : 1 + 2 * classes].long(), mixed[:, 1 + 2 * classes :]
    loss, _ = sparse_similarity_loss(logits, indices, p)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_an_image_that_was_not_mixed_keeps_its_label_and_its_rest() -> None:
    torch.manual_seed(0)
    indices, p = torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([[0.6, 0.2], [0.5, 0.1]])
    labels = torch.cat([torch.zeros(2, 1), indices, p], dim=1)
    logits = torch.randn(2, 10)
    expected = sparse_similarity_loss(logits, indices.long(), p)
    for share, rows in ((1.0, [0, 1]), (0.0, [1, 0])):
        mixed = mix_labels(labels, torch.tensor([share, share]))
        loss = sparse_similarity_loss(logits[rows], mixed[:, 1:5].long(), mixed[:, 5:])
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem'])
@pytest.mark.parametrize('kind', [{'cutmix_alpha': 1.0, 'mixup_alpha': 0.0}, {'mixup_alpha': 1.0}])
def test_mixed_labels_have_the_shares_of_the_mixed_pixels(mode: str, kind: dict[str, float]) -> None:
    # Images of one value each: the mean of a mixed image tells how much of its partner is in it.
    values = np.array([0, 100, 0, 0, 200, 0], dtype=np.uint8)
    labels = [np.array([-1, number, 1], dtype=np.float32) for number in range(6)]
    batch = [(np.full((3, 32, 32), v, dtype=np.uint8), label) for v, label in zip(values, labels, strict=True)]
    np.random.seed(3)
    images, mixed = MixCrops({**kind, 'mode': mode, 'num_classes': 10, 'label_smoothing': 0.1})(batch)
    assert mixed.shape == (6, 5)
    shown = (mixed[:, 3] * torch.tensor(values) + mixed[:, 4] * torch.tensor(values).flip(0)).numpy()
    np.testing.assert_allclose(images.float().mean(dim=(1, 2, 3)).numpy(), shown, atol=0.51)
    assert (mixed[:, 4] > 0).any()


# A store and its images


@pytest.fixture(scope='module')
def store(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    teachers = EnsembleTeacher([timm.create_model('test_resnet', num_classes=3)])
    out = tmp_path_factory.mktemp('stores') / 'store'
    recipe = Recipe(crops=4, image_size=(16, 16), scale=(0.3, 1.0))
    record(create_dataset('', root=image_folder, split='train'), teachers, out, recipe, top_k=2, workers=0)
    return out


def replayed(root: Path, store: Path, **kwargs: bool) -> SoftLabelDataset:
    return SoftLabelDataset(create_dataset('', root=root, split='train'), SoftLabelStore(store), **kwargs)


def test_a_stored_label_belongs_to_the_very_crop(image_folder: Path, store: Path) -> None:
    torch.manual_seed(0)
    teacher = timm.create_model('test_resnet', num_classes=3)
    mean, std = (torch.tensor(teacher.pretrained_cfg[key])[:, None, None] for key in ('mean', 'std'))
    dataset = replayed(image_folder, store)
    for key in [(0, 0), (0, 3), (20, 1), (7, 2)]:
        pixels, label = dataset[key]
        assert (pixels.dtype, pixels.shape, label.dtype, label.shape) == (np.uint8, (3, 16, 16), np.float32, (5,))
        images = (torch.from_numpy(pixels) / 255 - mean) / std
        with torch.no_grad():
            expected = teacher.eval()(images[None]).softmax(dim=1)[0].topk(2)
        assert label[0] == key[0] // 7
        assert label[1:3].tolist() == expected.indices.tolist()
        np.testing.assert_allclose(label[3:], expected.values, rtol=2e-3)
    assert replayed(image_folder, store, unlabeled=True)[3, 0][1][0] == -1


def test_a_subset_is_accepted_and_looked_up_by_name(image_folder: Path, store: Path, tmp_path: Path) -> None:
    whole = replayed(image_folder, store)
    shutil.copytree(image_folder / 'train', tmp_path / 'train')
    (tmp_path / 'train' / 'cold' / '000.png').unlink()
    subset = replayed(tmp_path, store)
    assert len(subset) == 20
    for number in (0, 5, 19):
        pixels, label = subset[number, 1]
        expected = whole[number + 1, 1]
        assert np.array_equal(pixels, expected[0])
        assert np.array_equal(label, expected[1])


def test_a_tar_of_the_same_names_gives_the_same_crops_to_several_workers(
    image_folder: Path, store: Path, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
        for path in sorted((image_folder / 'train').rglob('*.png')):
            tar.add(path, path.relative_to(image_folder / 'train').as_posix())
    whole = replayed(image_folder, store)
    labels = SoftLabelDataset(create_dataset('', root=tmp_path, split='train.tar'), SoftLabelStore(store))
    keys = [(image, crop) for image in range(21) for crop in range(4)]
    loader = DataLoader(labels, sampler=keys, batch_size=None, num_workers=3, collate_fn=tuple)  # type: ignore[arg-type]
    for key, (pixels, label) in zip(keys, loader, strict=True):
        assert np.array_equal(pixels, whole[key][0])
        assert np.array_equal(label, whole[key][1])


def test_images_of_another_name_size_or_content_are_refused(image_folder: Path, store: Path, tmp_path: Path) -> None:
    def changed(name: str) -> Path:
        shutil.copytree(image_folder / 'train', tmp_path / name / 'train')
        return tmp_path / name / 'train' / 'warm' / '003.png'

    path = changed('name')
    path.rename(path.with_name('new.png'))
    with pytest.raises(UserError, match=r'1 of 21 images are not in the store, warm/new.png'):
        replayed(tmp_path / 'name', store)
    Image.new('RGB', (24, 25)).save(changed('size'))
    with pytest.raises(UserError, match=r'warm/003.png has 24x25 pixels, .*24x24'):
        replayed(tmp_path / 'size', store)
    path = changed('content')
    for other in path.parent.parent.rglob('*.png'):
        Image.new('RGB', (24, 24)).save(other)
    with pytest.raises(UserError, match='other pixels'):
        replayed(tmp_path / 'content', store)
    assert len(replayed(tmp_path / 'content', store, allow_decoder_change=True)) == 21


def test_what_could_not_be_read_when_recording_is_never_trained_on(image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(image_folder / 'train', tmp_path / 'train')
    bad = tmp_path / 'train' / 'plain' / '002.png'
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    teachers = EnsembleTeacher([timm.create_model('test_resnet', num_classes=3)])
    dataset = create_dataset('', root=tmp_path, split='train')
    record(dataset, teachers, tmp_path / 'store', Recipe(crops=1, image_size=(16, 16)), top_k=2, workers=0)
    bad.write_bytes(whole)
    again = replayed(tmp_path, tmp_path / 'store')
    assert sorted(again.images) == [number for number in range(21) if number != 9]
    with pytest.raises(UnreadableImage, match=r'plain/002.png'):
        again[9, 0]
