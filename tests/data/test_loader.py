"""The loaders: what a batch holds depends on its counters alone, and what cannot be read is left out."""

import dataclasses
import pickle
import signal
import subprocess
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from images import cut_off
from timm.data import create_loader
from torch import Tensor

from timm_mealv2.data.augmentation import Augmentation, Erasing
from timm_mealv2.data.class_names import unlabeled
from timm_mealv2.data.dataset import open_dataset
from timm_mealv2.data.loader import CollateMixed, CollatePairs, TrainLoader, collate_labels, eval_loader
from timm_mealv2.data.samples import EpochSampler, Key, Sample, Samples
from timm_mealv2.data.unreadable import BadImages
from timm_mealv2.errors import UserError

AUGMENTATION = Augmentation((3, 16, 16), scale=(0.3, 1.0), mean=(0.5,) * 3, std=(0.5,) * 3)
MIXUP = {'mixup_alpha': 0.8, 'cutmix_alpha': 1.0, 'label_smoothing': 0.1, 'num_classes': 3}
ERASED = {'reprob': 0.5, 'remode': 'pixel'}
EVALUATED: dict[str, Any] = {'input_size': (3, 16, 16), 'interpolation': 'bilinear', 'crop_pct': 1.0}
EVALUATED |= {'crop_mode': 'center', 'mean': (0.5,) * 3, 'std': (0.5,) * 3}


def make(
    folder: Path,
    *,
    seed: int = 7,
    mode: str = '',
    off_epoch: int = 0,
    batch_size: int = 4,
    sampler: dict[str, Any] | None = None,
    labels: range | None = None,
    without_labels: bool = False,
    augmentation: dict[str, Any] | None = None,
    **kwargs: Any,
) -> TrainLoader:
    """A loader of the sample images, put together as training does it."""
    settings = dataclasses.replace(AUGMENTATION, **augmentation or {})
    collate: Any = collate_labels
    if mode == 'pair':
        settings = dataclasses.replace(settings, mixup=0.8, cutmix=1.0, mixup_off_epoch=off_epoch)
        collate = CollatePairs(3, smoothing=0.1)
    elif mode:
        collate = CollateMixed({**MIXUP, 'mode': mode}, Erasing(settings, seed), seed=seed, off_epoch=off_epoch)
        settings = dataclasses.replace(settings, reprob=0.0)
    dataset = open_dataset('', str(folder), 'train')
    dataset = unlabeled(dataset) if without_labels else dataset
    samples = Samples(dataset, settings, seed, labels=labels)
    order = EpochSampler(21, batch_size, seed=seed, pairs=mode == 'pair', **sampler or {})
    return TrainLoader(samples, order, collate, normalization=((0.5,) * 3, (0.5,) * 3), **kwargs)


def images_of(loader: TrainLoader, epoch: int = 0, start: int = 0) -> list[Tensor]:
    return [images.clone() for images, _ in loader.batches(epoch, start)]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize('mode', ['', 'batch', 'pair'])
def test_workers_and_resuming_change_no_pixel(image_folder: Path, mode: str) -> None:
    whole = images_of(make(image_folder, mode=mode, augmentation=ERASED), epoch=3)
    loader = make(image_folder, mode=mode, augmentation=ERASED, workers=2)
    images_of(loader, epoch=1)
    assert_same(images_of(loader, epoch=3, start=2), whole[2:])
    assert_same(images_of(loader, epoch=3), whole)
    others = images_of(make(image_folder, mode=mode, augmentation=ERASED, prefetch=False), epoch=3)
    assert_same(others, whole)
    assert not torch.equal(images_of(make(image_folder, mode=mode, seed=8), epoch=3)[0], whole[0])


@pytest.mark.parametrize('mode', ['', 'pair'])
def test_processes_and_batch_sizes_change_no_pixel(image_folder: Path, mode: str) -> None:
    """Erased and mixed samples too: sets of pixels are compared, the last processes are filled up."""

    def pixels(batch_size: int, rank: int = 0, world_size: int = 1) -> set[bytes]:
        order = {'rank': rank, 'world_size': world_size}
        loader = make(image_folder, mode=mode, batch_size=batch_size, sampler=order, augmentation=ERASED)
        return {image.numpy().tobytes() for batch in images_of(loader, epoch=2) for image in batch}

    whole = pixels(21)
    assert len(whole) == 21
    assert pixels(6) == pixels(3) == whole
    assert pixels(6, 0, 2) | pixels(6, 1, 2) == whole


@pytest.mark.parametrize('mode', ['', 'batch', 'pair'])
def test_a_worker_that_is_started_afresh_makes_the_same_batches(image_folder: Path, mode: str) -> None:
    """Python 3.14 and Windows hand the data set to a worker as a pickle."""
    loader: Any = make(image_folder, mode=mode, augmentation=ERASED, without_labels=True)
    sent = loader.loader.loader.loader.dataset
    received = pickle.loads(ForkingPickler.dumps(sent))
    for batch in loader.sampler:
        assert_same([sent[batch].batch[0]], [received[batch].batch[0]])


def test_every_image_comes_once_and_the_last_batch_is_kept(image_folder: Path) -> None:
    loader = make(image_folder, batch_size=8, augmentation={'no_aug': True})
    batches = images_of(loader)
    assert [len(batch) for batch in batches] == [8, 8, 5]
    assert len(loader) == 3
    assert len({image.numpy().tobytes() for batch in batches for image in batch}) == 21


@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem'])
def test_mixing_keeps_an_odd_last_batch_and_ends_with_its_epoch(image_folder: Path, mode: str) -> None:
    loader = make(image_folder, batch_size=8, mode=mode, off_epoch=2)
    for epoch in range(3):
        batches = list(loader.batches(epoch))
        assert [len(images) for images, _ in batches] == [8, 8, 5]
        for images, target in batches:
            assert target.shape == (len(images), 3)
            torch.testing.assert_close(target.sum(dim=1), torch.ones(len(images)))
        odd = batches[-1][1][-1].sort().values  # unmixed: one class and the smoothing
        torch.testing.assert_close(odd, torch.tensor([0.1 / 3, 0.1 / 3, 0.9 + 0.1 / 3]))
        mixed = any((target.max(dim=1).values < 0.9).any() for _, target in batches)
        assert mixed == (epoch < 2)


def test_a_batch_is_mixed_before_it_is_erased(image_folder: Path) -> None:
    """What is erased is the gray of the mean; an image mixed afterwards would show it through."""
    plain = images_of(make(image_folder, mode='batch'))
    erased = images_of(make(image_folder, mode='batch', augmentation={'reprob': 1.0, 'remode': 'const'}))
    for before, after in zip(torch.cat(plain), torch.cat(erased), strict=True):
        box = before != after
        assert box.any()
        assert (after[box].abs() < 0.01).all()


def test_targets_of_pairs_follow_their_shares(image_folder: Path) -> None:
    samples: Any = make(image_folder, mode='pair').loader.loader.loader.dataset.samples
    loader = make(image_folder, mode='pair', batch_size=20)
    _, target = next(loader.batches(0))
    loader.sampler.set_position(0)
    for key, row in zip(next(iter(loader.sampler)).keys, target, strict=True):
        sample = samples[key]
        expected = torch.full((3,), 0.1 / 3)
        expected[sample.target] += 0.9 * sample.lam
        expected[sample.mixed_target] += 0.9 * (1 - sample.lam)
        torch.testing.assert_close(row, expected)


@pytest.mark.parametrize('mode', ['', 'batch', 'pair'])
def test_without_labels_the_pixels_are_the_same(image_folder: Path, mode: str) -> None:
    labeled, without = (make(image_folder, without_labels=flag, mode=mode) for flag in (False, True))
    assert_same(images_of(labeled), images_of(without))
    assert all((target == -1).all() and target.ndim == 1 for _, target in without.batches(0))


def test_several_samples_a_decode_are_those_of_one_a_decode(image_folder: Path) -> None:
    reads = []

    def pixels(per_decode: int) -> set[bytes]:
        loader = make(image_folder, sampler={'samples_per_decode': per_decode}, batch_size=6)
        dataset: Any = loader.loader.loader.loader.dataset
        reader = dataset.samples.dataset.reader
        dataset.samples.dataset.reader = Counting(reader)
        batches = [images for epoch in range(3) for images in images_of(loader, epoch)]
        reads.append(dataset.samples.dataset.reader.count)
        assert sum(map(len, batches)) == 63
        return {image.numpy().tobytes() for batch in batches for image in batch}

    assert pixels(3) == pixels(1)  # the samples of the three epochs, in another order
    assert reads[0] == 21
    assert reads[1] >= 60  # but for an image that ends one epoch and begins the next


class Counting:
    def __init__(self, reader: Any) -> None:
        self.reader, self.count = reader, 0

    def __getitem__(self, index: int) -> Any:
        self.count += 1
        return self.reader[index]


@pytest.mark.parametrize('prefetch', [True, False])
def test_evaluation_sees_the_whole_split_in_order(image_folder: Path, prefetch: bool) -> None:
    dataset = open_dataset('', str(image_folder), 'validation')
    options: dict[str, Any] = {'batch_size': 5, 'device': torch.device('cpu'), 'num_workers': 0}
    batches = list(eval_loader(dataset, EVALUATED, use_prefetcher=prefetch, **options))
    assert torch.cat([target for _, target in batches]).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    theirs = create_loader(dataset, is_training=False, **EVALUATED, **options)
    assert torch.equal(torch.cat([images for images, _ in batches]), torch.cat([images for images, _ in theirs]))


@pytest.mark.parametrize('workers', [0, 1])
def test_evaluation_leaves_an_unreadable_image_out(spoilt: Path, workers: int) -> None:
    options: dict[str, Any] = {'batch_size': 3, 'device': torch.device('cpu'), 'num_workers': workers}
    whole = torch.cat([x for x, _ in eval_loader(open_dataset('', str(spoilt), 'validation'), EVALUATED, **options)])
    for name in ('cold/001.png', 'plain/002.png', 'plain/003.png', 'warm/000.png'):
        cut_off(spoilt / 'validation' / name)
    bad = BadImages()
    batches = list(eval_loader(open_dataset('', str(spoilt), 'validation'), EVALUATED, bad=bad, **options))
    assert torch.cat([target for _, target in batches]).tolist() == [0] * 3 + [1] * 2 + [2] * 3
    assert torch.equal(torch.cat([x for x, _ in batches]), whole[[0, 2, 3, 4, 5, 9, 10, 11]])
    assert len(bad.found) == 4


def pixels_of(batches: list[tuple[Tensor, Tensor]]) -> list[bytes]:
    return [image.numpy().tobytes() for images, _ in batches for image in images]


@pytest.mark.parametrize('workers', [0, 2])
def test_an_unreadable_image_is_left_out_and_nothing_else_changes(spoilt: Path, workers: int) -> None:
    whole = list(make(spoilt, batch_size=3).batches(1))
    broken = [cut_off(spoilt / 'train' / name) for name in ('cold/002.png', 'warm/005.png')]
    bad = BadImages()
    rest = list(make(spoilt, batch_size=3, workers=workers, bad=bad).batches(1))
    assert len(rest) == len(whole)
    assert sum(len(images) for images, _ in rest) == 19
    assert set(pixels_of(rest)) < set(pixels_of(whole))
    assert sorted(text.split(': ')[0] for text in bad.found.values()) == sorted(broken)


@pytest.mark.parametrize('options', [{'mode': 'batch'}, {'mode': 'pair', 'batch_size': 4}, {'without_labels': True}])
def test_every_way_of_loading_leaves_it_out(spoilt: Path, options: dict[str, Any]) -> None:
    for index in range(3):
        cut_off(spoilt / 'train' / 'cold' / f'{index:03}.png')
    bad = BadImages()
    loader = make(spoilt, bad=bad, **{'batch_size': 3, **options})
    batches = list(loader.batches(0))
    assert len(bad.found) == 3
    for images, target in batches:
        assert len(images) == len(target) >= 2
        assert images.isfinite().all()
    assert sum(len(images) for images, _ in batches) < 21


def test_a_batch_of_which_nothing_is_left_takes_the_next_images(spoilt: Path) -> None:
    for path in (spoilt / 'train').rglob('00[0-5].png'):
        cut_off(path)
    batches = list(make(spoilt, batch_size=2).batches(0))
    assert [len(images) for images, _ in batches] == [2] * 10
    assert len(set(pixels_of(batches))) == 3


def test_a_split_without_one_readable_image_is_refused(spoilt: Path) -> None:
    for path in (spoilt / 'train').rglob('*.png'):
        cut_off(path)
    with pytest.raises(UserError, match='no image of the training split can be read'):
        list(make(spoilt).batches(0))
    bad = BadImages(5)
    with pytest.raises(UserError, match='--max-bad-images allows 5'):
        list(make(spoilt, bad=bad).batches(0))
    assert len(bad.found) < 21  # the folder is not searched to its end
    bad = BadImages(5)
    with pytest.raises(UserError, match='--max-bad-images allows 5'):
        list(make(spoilt, bad=bad, batch_size=21).batches(0))
    assert len(bad.found) == 6  # nor is a batch


@pytest.mark.parametrize('workers', [0, 1])
def test_a_label_beyond_the_classes_is_named_with_its_image(image_folder: Path, workers: int) -> None:
    with pytest.raises(UserError, match=r'warm/00\d.png has the label 2, expected 0 to 1: set') as error:
        list(make(image_folder, labels=range(2), workers=workers).batches(0))
    assert 'Traceback' not in str(error.value)


class Slow:
    """Images of a worker that is in the middle of one when it is told to end."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> Sample:
        time.sleep(0.5)
        return self.samples[key]


def _load_until_killed(folder: Path, found: Any, fails: bool) -> None:
    samples: Any = make(folder).loader.loader.loader.dataset.samples  # type: ignore[attr-defined]
    order = EpochSampler(21, 2, seed=7)
    loader: Any = TrainLoader(Slow(samples), order, normalization=((0.5,) * 3, (0.5,) * 3), workers=2)
    batches = loader.batches(0)
    next(batches)
    workers = [worker.pid for worker in loader.loader.loader.loader._iterator._workers]
    for worker in workers:  # not from the main process
        subprocess.run(['kill', '-INT', str(worker)], check=True)
        subprocess.run(['kill', '-TERM', str(worker)], check=True)
    next(batches)
    found.put(workers)
    if not fails:
        signal.pause()
    raise SystemExit  # with workers that something still refers to


def _gone(pid: int) -> bool:
    try:
        return Path(f'/proc/{pid}/stat').read_text().split()[2] == 'Z'
    except FileNotFoundError:
        return True


@pytest.mark.skipif(not Path('/proc').exists(), reason='asks Linux for a process')
@pytest.mark.parametrize('fails', [False, True])
def test_workers_ignore_signals_and_end_with_the_main_process(image_folder: Path, fails: bool) -> None:
    context = torch.multiprocessing.get_context('fork')
    found: Any = context.Queue()
    main: Any = context.Process(target=_load_until_killed, args=(image_folder, found, fails))
    main.start()
    workers = found.get(timeout=60)
    if not fails:
        assert not any(map(_gone, workers))
        main.kill()
    main.join(timeout=20)
    assert main.exitcode == (0 if fails else -signal.SIGKILL)
    end = time.monotonic() + 20
    while not all(map(_gone, workers)):
        assert time.monotonic() < end
        time.sleep(0.1)
