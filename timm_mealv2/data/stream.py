"""Streamed data sets (wds/, hfids/, tfds/): decoded as numbered images are, and named where they cannot be read."""

import io
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, BinaryIO

import torch
from PIL import Image
from timm.data import FastCollateMixup, IterableImageDataset, create_loader
from timm.data.loader import fast_collate
from torch import Tensor
from torch.utils.data import default_collate

from timm_mealv2.data.decode import decode
from timm_mealv2.data.samples import Sample, mix_batch
from timm_mealv2.data.seed import Stream, counted_seed, seed_cpu
from timm_mealv2.data.unreadable import BadImages, Fetched, ReportingLoader, UnreadableImage
from timm_mealv2.data.workers import seed_of_worker
from timm_mealv2.errors import UserError, one_line


class StreamedImages(IterableImageDataset):
    """The images of a streamed data set of timm's, for timm's loader with `collate_stream`.

    timm's readers would decode themselves: those of wds/ and hfids/ are made to hand on files.

    Args:
        dataset: timm's data set, as `open_dataset` gives it.
        img_mode: Pillow's mode of the images.
        how: How they are decoded, see `decode`.
    """

    def __init__(self, dataset: Any, img_mode: str = 'RGB', how: str = 'timm') -> None:
        super().__init__('', reader=dataset.reader, target_transform=dataset.target_transform)
        self.split, self.img_mode, self.how = dataset.split_name, img_mode, how
        kind = type(self.reader).__name__
        self.decodes = kind == 'ReaderTfds'  # TensorFlow does, by itself
        if self.decodes and how == 'view':
            raise UserError('--decode view: TensorFlow decodes tfds/ by itself; take another kind of data set.')
        if kind != 'ReaderWds':
            self.reader.input_img_mode = img_mode if self.decodes else None

    def __iter__(self) -> Iterator[Sample | UnreadableImage]:
        if not self.decodes and self.reader.ds is None:
            _keep_undecoded(self.reader)
        for content, target in self.reader:
            name = _name(content)
            try:
                image, ignored = decode(_opened(content), self.img_mode, self.how)
            except MemoryError:
                raise
            except Exception as error:  # Pillow's decoders raise many kinds
                yield UnreadableImage(f'{self.split} {name}: {one_line(error)}', name)
                continue
            if self.target_transform is not None:
                target = self.target_transform(target)
            yield Sample(self.transform(image), target, target, ignored=tuple((name, what) for what in ignored))


def _name(content: Any) -> str:
    """Return the name of what a reader gives: a pair (wds/), a mapping (hfids/), or an image without a name (tfds/)."""
    if isinstance(content, Image.Image):
        return ''
    if isinstance(content, tuple):
        return str(content[0])
    return content['path'] or f'image with CRC-32 {zlib.crc32(content["bytes"]):08x}'


def _opened(content: Any) -> BinaryIO | Image.Image:
    if isinstance(content, Image.Image):
        return content
    data = content[1] if isinstance(content, tuple) else content['bytes']
    if data is not None:
        return io.BytesIO(data)
    import fsspec  # comes with datasets

    return fsspec.open(content['path'], 'rb').open()


_PIXEL = io.BytesIO()
Image.new('L', (1, 1)).save(_PIXEL, 'PNG')


def _keep_undecoded(reader: Any) -> None:
    """Make a reader of wds/ or hfids/ leave the images as they are stored."""
    reader._lazy_init()  # timm does it in the worker process, when the reader is first iterated over
    if hasattr(reader, 'builder'):  # hfids/
        import datasets

        reader.ds = reader.ds.cast_column(reader.input_key, datasets.Image(decode=False))
        return
    import webdataset

    pipeline: list[Any] = reader.ds.pipeline
    timms = pipeline[-2]  # decodes
    pipeline[-2:] = [webdataset.map(partial(_content, timms.args[0], reader.input_key), **timms.kw)]


def _content(decode_sample: Callable, input_key: str, sample: dict[str, Any]) -> dict[str, Any] | None:
    keys = input_key.split(';')
    data = next((sample[key] for key in keys if key in sample), b'')
    # timm's function knows where the label is.
    decoded = decode_sample({**sample, keys[0]: _PIXEL.getvalue()})
    if decoded is None:
        return None
    shard = sample.get('__url__', '').rpartition('/')[2]
    return {'image': (f'{shard} {sample["__key__"]}', data), 'target': decoded['target']}


def collate_stream(collate: Callable, items: list[Sample | UnreadableImage]) -> Fetched:
    """Make a batch of what a `StreamedImages` gives: `collate` takes the pairs (pixels, label) that could be read."""
    unreadable = {item.index or '': str(item) for item in items if isinstance(item, UnreadableImage)}
    samples = [item for item in items if isinstance(item, Sample)]
    ignored = {entry for sample in samples for entry in sample.ignored}
    pairs: list[tuple[Any, Any]] = [(sample.pixels, sample.target) for sample in samples]
    if not pairs:
        return Fetched(None, unreadable, ignored)
    mixed = isinstance(collate, FastCollateMixup)
    return Fetched(mix_batch(collate, pairs) if mixed else collate(pairs), unreadable, ignored)


def load_stream(dataset: StreamedImages, bad: BadImages, split: str, **options: Any) -> Any:
    """Load a stream with timm's `create_loader`, which has the `options`; what cannot be read is reported."""
    prefetch = options.get('use_prefetcher', True)
    collate = options.pop('collate_fn', None) or (fast_collate if prefetch else default_collate)
    loader = create_loader(
        dataset, collate_fn=partial(collate_stream, collate), worker_seeding=seed_of_worker, **options
    )
    if not prefetch:
        return ReportingLoader(loader, bad, split)
    loader.loader = ReportingLoader(loader.loader, bad, split)
    return loader


class StreamLoader:
    """Training batches of a streaming data set (wds/, tfds/, hfids/), through timm's own loader.

    Such a set has no random access: an epoch can only be entered at its start, and its augmentation is reproducible for
    the same number of processes and workers alone. All epochs have the same number of batches, on every process: a
    stream that ends early, say because it has fewer shards than workers, begins anew.

    Args:
        mixing: Mixes the images of a batch, in the epochs before `mixup_off_epoch` (0: in all).
        **loader: Arguments of timm's `create_loader`.
    """

    resumable = False

    def __init__(
        self,
        dataset: StreamedImages,
        *,
        seed: int,
        rank: int,
        device: torch.device,
        bad: BadImages,
        mixing: FastCollateMixup | None = None,
        mixup_off_epoch: int = 0,
        **loader: Any,
    ) -> None:
        self.dataset, self.seed, self.rank, self.device = dataset, seed, rank, device
        self.mixing, self.mixup_off_epoch = mixing, mixup_off_epoch
        self.batch_size: int = loader['batch_size']
        loader |= {'device': device, 'collate_fn': mixing, 'persistent_workers': False, 'is_training': True}
        self.loader = load_stream(dataset, bad, 'train', **loader)

    def __len__(self) -> int:
        """Batches an epoch on every process, by the data set's own count."""
        return len(self.loader)

    def batch_sizes(self) -> list[int]:
        """Return the number of images of each batch of an epoch: timm's loader drops what fills no batch."""
        return [self.batch_size] * len(self)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `len` batches (images, targets) of `epoch`; `start` must be 0."""
        assert start == 0, 'a streaming data set is entered at the start of an epoch'
        if self.mixing is not None:
            self.mixing.mixup_enabled = not 0 < self.mixup_off_epoch <= epoch
        self.dataset.set_epoch(epoch)
        seed_cpu(counted_seed(Stream.STREAMING, self.seed, self.rank, epoch))
        count = 0
        while count < len(self):
            already = count
            for images, target in islice(self.loader, len(self) - already):
                count += 1
                yield images.to(self.device), target.to(self.device)
            if count == already:
                raise UserError(
                    'the streaming data set gives this process no batch: give fewer --workers or processes.'
                )
