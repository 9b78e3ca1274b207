"""Images that cannot be read, or not as a viewer shows them: the error that names one, and the lists of a run."""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from timm_mealv2.data.decode import IGNORED
from timm_mealv2.data.workers import starting_workers
from timm_mealv2.errors import UserError

_logger = logging.getLogger(__name__)


class UnreadableImage(Exception):
    """An image that cannot be read: the message names it and says why.

    `index` is its place in the data set, or its name in a stream; None where a stored label is what is missing.
    """

    def __init__(self, message: str, index: int | str | None = None) -> None:
        super().__init__(message)
        self.index = index


Ignored = tuple[int | str, str]
"""An image's place in the data set, or its name in a stream, and faults of its file ignored (see `decode`)."""


class Fetched(NamedTuple):
    """A batch, None if none of its images can be read, and what could not be read (index -> path and reason)."""

    batch: Any
    unreadable: dict[int | str, str]
    ignored: Iterable[Ignored] = ()


class BadImages:
    """The images that could not be read since the program started, each of them once, and those read in part.

    Attributes:
        limit: How many a run puts up with.
        found: 'SPLIT #INDEX' -> path and reason.
        ignored: Split -> what is ignored of its images.
    """

    def __init__(self, limit: int = 100) -> None:
        self.limit = limit
        self.found: dict[str, str] = {}
        self.ignored: dict[str, set[Ignored]] = defaultdict(set)
        self._unshared: dict[str, str] = {}
        self._told: Counter[str] = Counter()  # split -> number of entries in `ignored` at the last look

    def report(self, split: str, unreadable: Mapping[Any, str]) -> None:
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

    def readable(self, images: int) -> list[int]:
        """Return the numbers of those of `images` validation images that are not among the unreadable ones."""
        return [index for index in range(images) if f'validation #{index}' not in self.found]

    def tell_ignored(self, gather: Callable[[Any], list[Any]] = lambda value: [value]) -> list[str]:
        """Return a line for each split and each thing that is ignored of its images, if there is news.

        Args:
            gather: Returns what all processes give it (a collective call).
        """
        lines = []
        for of_process in gather(dict(self.ignored)):
            for split, entries in of_process.items():
                self.ignored[split] |= entries
        for split, entries in self.ignored.items():
            counts = Counter(what for _, what in entries)
            if len(entries) > self._told[split]:
                lines += [f'{split}: {counts[what]:,} images {text}' for what, text in IGNORED.items() if counts[what]]
            self._told[split] = len(entries)
        return lines

    def check(self, advice: str = '') -> None:
        """Name all images once more, and raise `UserError` with some `advice`, if they are too many."""
        if len(self.found) > self.limit:
            for text in self.found.values():
                _logger.error(f'Cannot be read: {text}')
            raise UserError(
                f'{len(self.found)} images cannot be read, --max-bad-images allows {self.limit}: they are listed '
                f'above; mend or remove them, or allow more. {advice}'
            )


class ReportingLoader:
    """The batches alone, as timm's `PrefetchLoader` takes them; what could not be read is reported."""

    def __init__(self, loader: Any, bad: BadImages, split: str) -> None:
        self.loader, self.bad, self.split = loader, bad, split

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        with starting_workers():
            batches = iter(self.loader)
        for fetched in batches:
            if isinstance(fetched, UserError):
                raise fetched
            self.bad.report(self.split, fetched.unreadable)
            self.bad.ignored[self.split].update(fetched.ignored)
            if fetched.batch is not None:
                yield fetched.batch
            elif self.split == 'train':  # the other processes wait for a batch of this one
                self.bad.check()
                raise UserError('no image of the training split can be read: look at the log for the reasons.')
