"""What a run says as it goes: a bar or lines within an epoch, one line after each, and everything in train.log."""

import contextlib
import logging
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from timm_mealv2.errors import UserError
from timm_mealv2.runs import TIMES
from timm_mealv2.training.checkpoint_saver import Position
from timm_mealv2.training.metric_logging import Meters
from timm_mealv2.training.timing import Clock

_logger = logging.getLogger(__name__)

_SHORT = {
    'similarity_loss': 'similarity',
    'discriminator_loss': 'discriminator',
    'discriminator_accuracy': 'its accuracy',
    'teacher_agreement': 'agreement',
    'hard_label_loss': 'hard labels',
}
_FIRST = ('loss', 'kl', 'images/s')  # of what a bar has room for
_MUCH_WAITING = 0.1  # share of the time
_BAR = 8  # characters of the bar itself, or more
_NAMES = {'top1': 'top-1', 'top5': 'top-5', 'kl': 'KL'}


class EpochLog:
    """What is said within an epoch: a bar on a terminal, a line of the log from time to time everywhere.

    Args:
        start: Where the epoch is begun.
        batches: Batches of the whole epoch.
        interval: Batches from line to line.
        world_size: Number of processes, each with batches of its own.
        shown: Whether this process says anything.
    """

    def __init__(self, start: Position, batches: int, *, interval: int, world_size: int, shown: bool) -> None:
        self.epoch, self.batches, self.interval, self.world_size = start.epoch, batches, interval, world_size
        self.shown = shown
        self.images, self.began = 0, time.perf_counter()
        self._drawn = -1.0
        self.bar = tqdm(
            total=batches,
            initial=start.batch,
            desc=f'epoch {start.epoch}',
            bar_format='{desc} |{bar}| {n_fmt}/{total_fmt} {remaining} left{postfix}',
            leave=False,
            ncols=shutil.get_terminal_size().columns - 1,
            disable=not (shown and sys.stderr.isatty()),
        )

    @property
    def images_per_second(self) -> float:
        """Images of all processes a second so far."""
        return self.images * self.world_size / (time.perf_counter() - self.began)

    def batch(self, batch: int, images: int, meters: Meters, lr: float, clock: Clock) -> bool:
        """Count a batch of `images` images; return whether a line was due, which all processes make together.

        A line, and the bar once a second, are the only waits for the device.
        """
        self.images += images
        self.bar.update()
        due = (batch + 1) % self.interval == 0 or batch + 1 == self.batches
        if due:
            means = meters.means(self.world_size > 1)
            if self.shown:
                text = ', '.join(self._items(means, lr, clock).values())
                _logger.info(f'epoch {self.epoch} [{batch + 1:>{len(str(self.batches))}}/{self.batches}] {text}')
        if not self.bar.disable and time.perf_counter() - self._drawn >= 1:
            self.bar.set_postfix_str(self._fitting(self._items(meters.means(), lr, clock)))
            self._drawn = time.perf_counter()
        return due

    def _items(self, means: dict[str, float], lr: float, clock: Clock) -> dict[str, str]:
        items = {name: f'{_SHORT.get(name, name)} {value:.4g}' for name, value in means.items()}
        times = clock.means()
        shares = ', '.join(f'{text} {times[key] / sum(times.values()):.0%}' for key, text in TIMES.items())
        speed = f'{self.images_per_second:.0f} images/s'
        return {**items, 'lr': f'lr {lr:.3g}', 'images/s': speed, 'time': f'time: {shares}'}

    def _fitting(self, items: dict[str, str]) -> str:
        """The first of `items`, the most important before the others, that the bar's line has room for."""
        # A terminal that does not tell its width counts as one of 80 columns.
        self.bar.ncols = shutil.get_terminal_size().columns - 1
        room = self.bar.ncols - len(f'epoch {self.epoch} || {self.batches}/{self.batches} 00:00 left') - _BAR
        text = ''
        for name in sorted(items, key=lambda name: name not in _FIRST):
            if len(text) + len(items[name]) + 2 > room:
                break
            text += f', {items[name]}'
        return text[2:]


def evaluation_bar(batches: Any, shown: bool) -> Any:
    """Return the batches of an evaluation, which a bar counts on a terminal."""
    columns = shutil.get_terminal_size().columns
    return tqdm(batches, desc='evaluating', leave=False, ncols=columns - 1, disable=None if shown else True)


def log_evaluation(rows: Mapping[str, Mapping[str, float]]) -> None:
    """Say all that an evaluation has found, model by model; on a terminal the line of the epoch is enough."""
    for name, metrics in rows.items():
        values = ', '.join(f'{key} {value:.4g}' for key, value in metrics.items() if key != 'samples')
        _logger.info(f'{name}: {values} on {metrics["samples"]:.0f} images')


class RunLog:
    """One line after each epoch: how far the run is, how good, how fast, and how long it still takes.

    Args:
        start: Where this process begins or goes on.
        epochs: Length of the run.
        batches: Batches of an epoch.
        metric: Metric of the best checkpoint.
    """

    def __init__(self, start: Position, epochs: int, batches: int, metric: str) -> None:
        self.epochs, self.metric = epochs, metric
        self.first, self.began = start.epoch + start.batch / batches, time.perf_counter()
        self._hinted = False

    def line(self, done: int, trained: dict[str, float], evaluated: dict[str, float] | None, best: float | None) -> str:
        """Return the line.

        Args:
            done: Epochs done.
            trained: Means of the last one.
            evaluated: Its evaluation, None if there was none.
            best: The run's best value of the metric.
        """
        items = [f'{name} {trained[key]:.3g}' for key, name in (('loss', 'loss'), ('kl', 'KL')) if key in trained]
        if evaluated:
            names = (name for name in dict.fromkeys(('top1', self.metric)) if name in evaluated)
            items += [f'{_NAMES.get(name, name)} {evaluated[name]:.4g}' for name in names]
            items += [f'best {best:.4g}'] if best is not None else []
        items.append(f'{trained["images_per_second"]:.0f} images/s')
        trained_here = done - self.first  # nothing, if only the evaluation was left of the epoch
        if trained_here and done < self.epochs:
            left = (time.perf_counter() - self.began) / trained_here * (self.epochs - done)
            items.append(f'{tqdm.format_interval(left)} left')
        return f'{done}/{self.epochs} epochs: {", ".join(items)}'

    def hint(self, epoch: int, trained: dict[str, float]) -> str | None:
        """Return once what helps if data is waited for; not in the first epoch, in which the workers start."""
        waiting = trained['time_data'] > _MUCH_WAITING * sum(trained[name] for name in TIMES)
        if not waiting or epoch < self.first + 1 or self._hinted:
            return None
        self._hinted = True
        return (
            f'More than {_MUCH_WAITING:.0%} of the time is waiting for data: more --workers help where there are cores '
            'for them, --samples-per-decode where images take long to decode.'
        )


class TerminalHandler(logging.StreamHandler[Any]):
    """The log on a terminal: lines above the bar, and none of those that say what the bar shows."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a line is shown."""
        return record.name != __name__

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line above the bar."""
        tqdm.write(self.format(record), file=self.stream)


class TrainLog(logging.Handler):
    """train.log: all lines of a run, also those from before its folder is there, and the error that ends it.

    It listens while its context is open, and writes once it has been told where.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter('%(asctime)s %(message)s', '%Y-%m-%d %H:%M:%S'))
        self._path: Path | None = None
        self._lines: list[str] = []

    def __enter__(self) -> Self:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            exc_info = None if isinstance(error, UserError) else (type(error), error, trace)
            self.handle(logging.makeLogRecord({'msg': f'error: {error}', 'exc_info': exc_info}))
        logging.getLogger().removeHandler(self)

    def write_to(self, path: Path) -> None:
        """Add the lines so far to a file, and from now on each as it comes."""
        self._path = path
        self._flush()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line until there is a file."""
        self._lines.append(self.format(record))
        self._flush()

    def _flush(self) -> None:
        # A full disk ends the run where it writes a checkpoint, and says so there: not here.
        if self._path is not None:
            with contextlib.suppress(OSError), self._path.open('a', encoding='utf-8') as file:
                file.write(''.join(f'{line}\n' for line in self._lines))
                self._lines.clear()
