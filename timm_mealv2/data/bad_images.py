"""Images read for a loader: one that cannot be read is left out of its batch, named and counted.

timm's own access takes the next image in its place, which nobody is told of. A user's mistake that a worker process
finds is handed on as a value.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from timm_mealv2.data.dataset import UnreadableImage, read_image
from timm_mealv2.data.samples import Key, KeyBatch, Sample
from timm_mealv2.data.seed import preserved_generators
from timm_mealv2.errors import UserError

_logger = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]


class BadImages:
    """The images of a run that could not be read, each of them once.

    Attributes:
        limit: How many a run puts up with.
        found: 'SPLIT #INDEX' -> path and reason.
    """

    def __init__(self, limit: int = 100) -> None:
        self.limit = limit
        self.found: dict[str, str] = {}
        self._unshared: dict[str, str] = {}

    def report(self, split: str, unreadable: Mapping[int, str]) -> None:
        """Log and count the images (index -> path and reason) of `split` that are not known yet."""
        for index, text in unreadable.items():
            key = f'{split} #{index}'
            if key not in self.found:
                self.found[key] = self._unshared[key] = text
                _logger.warning(f'Left out, an image that cannot be read: {text}')

    def restore(self, found: Mapping[str, str], splits: Mapping[str, Dataset]) -> None:
        """Take over what `found` had when it was saved, without the images that can be read now.

        `splits` are the data sets by the names they were reported with; what is of another is taken over untested.
        """
        for key, text in found.items():
            split, _, index = key.partition(' #')
            if split in splits:
                try:
                    read_image(splits[split], int(index))
                    _logger.info(f'Can be read again: {text.split(": ")[0]}')
                    continue
                except UnreadableImage as error:
                    text = str(error)
            self.found[key] = self._unshared[key] = text

    @property
    def news(self) -> bool:
        """Whether this process has found images that the others have not been told of."""
        return bool(self._unshared)

    def share(self, gather: Callable[[dict[str, str]], list[dict[str, str]]]) -> None:
        """Tell all processes what each has found; `gather` (a collective call) returns what all give it."""
        for found in gather(self._unshared):
            self.found.update(found)
        self._unshared.clear()

    def check(self, advice: str = '') -> None:
        """Name all images once more, and raise `UserError` with some `advice`, if they are too many."""
        if len(self.found) > self.limit:
            for text in self.found.values():
                _logger.error(f'Cannot be read: {text}')
            raise UserError(
                f'{len(self.found)} images cannot be read, --max-bad-images allows {self.limit}: they are listed '
                f'above; mend or remove them, or allow more. {advice}'
            )


class SampleSource(Protocol):
    """Makes samples from keys; the keys' images are numbered from 0."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: Key) -> Sample: ...


Collate = Callable[[KeyBatch, list[Sample]], Batch]
"""Makes a batch of the samples that could be read; the keys are those of the samples."""


class Fetched(NamedTuple):
    """A batch, None if none of its images can be read, and what could not be read (index -> path and reason)."""

    batch: Batch | None
    unreadable: dict[int, str]


class ReadableBatches(Dataset):
    """Makes whole batches, in a worker: what cannot be read is left out.

    Args:
        fill: Fill up a batch of which less than two images are left: every process has something to train on, and
            batch norm a variance. The next images of the data set take the place, or, where the labels are stored,
            copies of what is left.
        limit: Images that may be unreadable: beyond that the batch is given up, as a folder that is gone takes long to
            search to its end.
    """

    def __init__(self, samples: SampleSource, collate: Collate, *, limit: int, fill: bool = False) -> None:
        self.samples, self.collate, self.fill, self.limit = samples, collate, fill, limit

    def __getitem__(self, batch: KeyBatch) -> Fetched | UserError:
        read: list[tuple[Key, Sample]] = []
        unreadable: dict[int, str] = {}
        try:
            with preserved_generators():
                for key in batch.keys:
                    if len(unreadable) <= self.limit:
                        self._add(key, read, unreadable)
                if self.fill and len(read) < min(2, len(batch.keys)):
                    self._fill_up(batch.keys, read, unreadable)
                if not read:
                    return Fetched(None, unreadable)
                keys, samples = zip(*read, strict=True)
                return Fetched(self.collate(batch._replace(keys=list(keys)), list(samples)), unreadable)
        except UserError as error:  # torch would add the worker's traceback to its text
            return error

    def _add(self, key: Key, read: list[tuple[Key, Sample]], unreadable: dict[int, str]) -> None:
        try:
            read.append((key, self.samples[key]))
        except UnreadableImage as error:
            unreadable[error.index] = str(error)

    def _fill_up(self, keys: list[Key], read: list[tuple[Key, Sample]], unreadable: dict[int, str]) -> None:
        if keys[-1].label is not None:
            read += read[:1]
            return
        asked = {key.index for key in keys}
        for step in range(1, len(self.samples)):
            index = (keys[-1].index + step) % len(self.samples)
            if index not in asked:
                self._add(keys[-1]._replace(index=index, pair=None), read, unreadable)
            if len(read) >= min(2, len(keys)) or len(unreadable) > self.limit:
                return


class ReportingLoader:
    """The batches alone, as timm's `PrefetchLoader` takes them; what could not be read is reported."""

    def __init__(self, loader: DataLoader, bad: BadImages, split: str, skip_empty: bool = False) -> None:
        self.loader, self.bad, self.split, self.skip_empty = loader, bad, split, skip_empty

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for fetched in self.loader:
            if isinstance(fetched, UserError):
                raise fetched
            self.bad.report(self.split, fetched.unreadable)
            if fetched.batch is not None:
                yield fetched.batch
            elif not self.skip_empty:
                self.bad.check()
                raise UserError('no image of the training split can be read: look at the log for the reasons.')
