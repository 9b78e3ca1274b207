"""Images that cannot be read: the error that names one, and the list of a run, which has a limit."""

import logging
from collections.abc import Callable, Mapping

from timm_mealv2.errors import UserError

_logger = logging.getLogger(__name__)


class UnreadableImage(Exception):
    """An image that cannot be read: the message names it and says why.

    `index` is its place in the data set, -1 where a stored label is what is missing.
    """

    def __init__(self, message: str, index: int = -1) -> None:
        super().__init__(message)
        self.index = index


class BadImages:
    """The images that could not be read since the program started, each of them once.

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
        """Name all images once more, and raise `UserError` with some `advice`, if they are too many."""
        if len(self.found) > self.limit:
            for text in self.found.values():
                _logger.error(f'Cannot be read: {text}')
            raise UserError(
                f'{len(self.found)} images cannot be read, --max-bad-images allows {self.limit}: they are listed '
                f'above; mend or remove them, or allow more. {advice}'
            )
