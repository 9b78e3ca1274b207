"""Images read for a loader: one that cannot be read is left out of its batch, named and counted.

timm's own access takes the next image in its place, which nobody is told of. A user's mistake that a worker process
finds is handed on as a value: torch would add the worker's traceback to its text.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from timm_mealv2.data.dataset import UnreadableImage, image_names, read_image
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
        """Name all images once more, if they are too many.

        Args:
            advice: How the run can be continued.

        Raises:
            UserError: If they are.
        """
        if len(self.found) > self.limit:
            for text in self.found.values():
                _logger.error(f'Cannot be read: {text}')
            raise UserError(
                f'{len(self.found)} images cannot be read, --max-bad-images allows {self.limit}: they are listed '
                f'above; mend or remove them, or allow more. {advice}'
            )


class Images(Dataset):
    """The images of a data set, transformed. One that cannot be read is an error, where timm takes the next one."""

    def __init__(self, dataset: Dataset, labels: range | None = None) -> None:
        self.dataset = dataset
        self.labels = labels
        self.transform: Any = None
        dataset.transform = None  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            image, target = read_image(self.dataset, index)
        except (TypeError, ValueError) as error:
            raise UserError(f'the label of image {self._name(index)} is no class index: {error}.') from error
        if self.labels is not None and target not in self.labels:
            raise UserError(
                f'image {self._name(index)} has the label {target}, expected {max(self.labels.start, 0)} to '
                f'{self.labels.stop - 1}: set --num-classes, or map the labels with --class-map.'
            )
        return image if self.transform is None else self.transform(image), target

    def _name(self, index: int) -> str:
        return image_names(self.dataset)[index]


class Fetched(NamedTuple):
    """What a worker read: the samples, and which images it could not read (index -> path and reason)."""

    samples: list[tuple[Any, Any]]
    unreadable: dict[int, str]
    key: Any = None  # of the first sample asked for


class ReadableDataset(Dataset):
    """Fetches whole batches of a data set for evaluation, without what cannot be read."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitems__(self, indices: list[int]) -> Fetched | UserError:
        fetched = Fetched([], {})
        for index in indices:
            try:
                fetched.samples.append(self.dataset[index])
            except UnreadableImage as error:
                fetched.unreadable[index] = str(error)
            except UserError as error:  # as in _CountedDataset
                return error
        return fetched


class Collate:
    """Collates what a worker read; what it could not read goes on beside the batch, which is None if nothing is."""

    def __init__(self, collate: Callable[[Any], Batch]) -> None:
        self.collate = collate

    def __call__(self, fetched: Fetched | UserError) -> tuple[Batch | None, dict[int, str]] | UserError:
        if isinstance(fetched, UserError):
            return fetched
        return self.collate_fetched(fetched) if fetched.samples else None, fetched.unreadable

    def collate_fetched(self, fetched: Fetched) -> Batch:
        return self.collate(fetched.samples)


class ReportingLoader:
    """The batches alone, as timm's `PrefetchLoader` takes them; what could not be read is reported."""

    def __init__(self, loader: DataLoader, bad: BadImages, split: str, skip_empty: bool = False) -> None:
        self.loader = loader
        self.bad = bad
        self.split = split
        self.skip_empty = skip_empty

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for fetched in self.loader:
            if isinstance(fetched, UserError):
                raise fetched
            batch, unreadable = fetched
            self.bad.report(self.split, unreadable)
            if batch is not None:
                yield batch
            elif not self.skip_empty:
                self.bad.check()
                raise UserError('no image of the training split can be read: look at the log for the reasons.')


def ignore_signals(worker: int) -> None:
    """Let a worker process leave Ctrl-C and a cluster's SIGTERM, which reach every process, to the training process.

    That one finishes its step first, and ends its workers with a SIGTERM of its own.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_leave_when_told, daemon=True).start()


def _leave_when_told() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def keep_signals_from_workers(loader: PrefetchLoader | DataLoader) -> None:
    """Let the workers of a loader of timm's ignore signals, beside what timm does when they start."""
    inner = loader.loader if isinstance(loader, PrefetchLoader) else loader
    inner.worker_init_fn = _WorkerStart(inner.worker_init_fn)


class _WorkerStart:
    def __init__(self, former: Callable[[int], None] | None) -> None:
        self.former = former

    def __call__(self, worker: int) -> None:
        ignore_signals(worker)
        if self.former is not None:
            self.former(worker)
