"""What a run tells: a bar and lines within an epoch, one line after each, train.log, summary.csv and trackers."""

import contextlib
import csv
import logging
import logging.handlers
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from timm_mealv2.errors import TrainingFailedError, UserError
from timm_mealv2.figures import METRICS, figure
from timm_mealv2.files import replacing
from timm_mealv2.runs import TIMES
from timm_mealv2.training.meters import Clock, Meters, learning_rate
from timm_mealv2.training.run_folder import Position, RunFolder

_logger = logging.getLogger(__name__)


# Where lines go


def _shows_bars() -> bool:
    """Whether a line can be overwritten: on a terminal, and in a notebook."""
    return sys.stderr.isatty() or type(sys.stderr).__module__.startswith('ipykernel')


@contextlib.contextmanager
def logging_of_run(primary: bool) -> Iterator[logging.handlers.MemoryHandler]:
    """Set up `logging` for a run; yields what keeps all lines until `write_log` gives it a file.

    On a terminal or in a notebook, lines appear above the bar, and those that say what the bar shows do not appear.
    Afterwards `logging` is as it was.
    """
    root = logging.getLogger()
    console = logging.StreamHandler()
    if _shows_bars():
        console.addFilter(lambda record: record.name != __name__)
    kept = logging.handlers.MemoryHandler(capacity=1)
    added = [kept] if root.handlers else [console, kept]
    # The first process says what all have to say; unreadable images are each one's own. timm's two tell of each tar
    # file, and of all checkpoints after each epoch.
    levels = {'': logging.INFO, 'timm.data': logging.WARNING, 'timm.utils': logging.WARNING}
    if not primary:
        levels = dict.fromkeys(levels, logging.ERROR) | {'timm_mealv2.data.unreadable': logging.WARNING}
    former = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    for handler in added:
        root.addHandler(handler)
    try:
        with contextlib.ExitStack() as stack:
            if _shows_bars():
                stack.enter_context(logging_redirect_tqdm())
            if not primary:
                stack.enter_context(warnings.catch_warnings(action='ignore'))
            yield kept
    except Exception as error:
        trace = None if isinstance(error, UserError | TrainingFailedError) else sys.exc_info()
        kept.handle(logging.makeLogRecord({'msg': f'error: {error}', 'exc_info': trace}))
        raise
    finally:
        for handler in added:
            root.removeHandler(handler)
        for name, level in former.items():
            logging.getLogger(name).setLevel(level)
        if kept.target is not None:
            with contextlib.suppress(OSError):
                kept.target.close()


def write_log(kept: logging.handlers.MemoryHandler, path: Path) -> None:
    """Add the lines so far to a file, and from now on each as it comes."""
    file = logging.FileHandler(path, encoding='utf-8')
    file.setFormatter(logging.Formatter('%(asctime)s %(message)s', '%Y-%m-%d %H:%M:%S'))
    # A full disk ends the run where it writes a checkpoint, and says so there: not here.
    file.handleError = lambda record: None  # type: ignore[method-assign]
    kept.setTarget(file)
    kept.flush()


def append_summary(path: Path, epoch: int, trained: dict[str, float], evaluated: dict[str, Any], lr: float) -> None:
    """Add an epoch's row to summary.csv, where it replaces that epoch's and all later ones; whole or not at all.

    As in timm's, metrics have the prefixes train_ and eval_; speed and times are none. A new column is the file's last.
    """
    row: dict[str, Any] = {'epoch': epoch}
    for name, value in trained.items():
        if name not in TIMES:
            row[name if name == 'images_per_second' else f'train_{name}'] = value
    row |= {f'eval_{name}': value for name, value in evaluated.items()} | {'lr': lr}
    row |= {name: trained[name] for name in TIMES}
    rows = [row]
    if path.exists():
        with path.open(newline='') as file:
            rows = [*(former for former in csv.DictReader(file) if int(former['epoch']) < epoch), row]
    with replacing(path) as temporary, temporary.open('w', newline='') as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for former in rows for name in former), restval='')
        writer.writeheader()
        writer.writerows(rows)


# What is said


_NAMES = {
    **METRICS,
    'similarity_loss': 'similarity',
    'discriminator_loss': 'discriminator',
    'discriminator_accuracy': 'its accuracy',
    'teacher_agreement': 'agreement',
    'hard_label_loss': 'hard labels',
    'grad_norm': 'grad norm',
}
_ON_THE_BAR = ('loss', 'kl', 'images/s')  # what it has room for
_MUCH_WAITING = 0.1  # share of the time


def named_figures(metrics: Mapping[str, float], names: Iterable[str] | None = None) -> str:
    """Return metrics as a line shows them, all or those of some names: `loss 1.2345, top-1 62.50`."""
    shown = metrics if names is None else dict.fromkeys(name for name in names if name in metrics)
    return ', '.join(f'{_NAMES.get(name, name)} {figure(name, metrics[name])}' for name in shown)


class EpochLog:
    """What is said within an epoch: a bar on a terminal, a line of the log from time to time everywhere.

    Args:
        start: Where the epoch is begun.
        batches: Batches of the whole epoch.
        interval: Batches from line to line.
        world_size: Number of processes, each with batches of its own.
        shown: Whether this process says anything.
    """

    def __init__(
        self, start: Position, batches: int, *, interval: int = 50, world_size: int = 1, shown: bool = True
    ) -> None:
        self.epoch, self.batches, self.interval, self.world_size = start.epoch, batches, interval, world_size
        self.shown = shown
        self.images, self.began = 0, time.perf_counter()
        self._drawn = -1.0
        self._bar = tqdm(
            total=batches,
            initial=start.batch,
            desc=f'epoch {start.epoch + 1}',
            bar_format='{desc} |{bar}| {n_fmt}/{total_fmt} {remaining} left{postfix}',
            leave=False,
            dynamic_ncols=True,
            disable=not (shown and _shows_bars()),
        )

    @property
    def images_per_second(self) -> float:
        """Images of all processes a second so far."""
        return self.images * self.world_size / (time.perf_counter() - self.began)

    def batch(self, batch: int, images: int, meters: Meters, optimizer: torch.optim.Optimizer, clock: Clock) -> bool:
        """Count a batch of `images` images; return whether a line was due, which all processes make together.

        A line, and the bar once a second, wait for the device.
        """
        self.images += images
        due = (batch + 1) % self.interval == 0 or batch + 1 == self.batches
        if due:
            means = meters.means(self.world_size > 1)
            if self.shown:
                text = ', '.join(self._items(means, optimizer, clock).values())
                _logger.info(f'epoch {self.epoch + 1} [{batch + 1:>{len(str(self.batches))}}/{self.batches}] {text}')
        if not self._bar.disable:
            self._bar.update()
            if time.perf_counter() - self._drawn >= 1:
                items = self._items(meters.means(), optimizer, clock)
                self._bar.set_postfix_str(', '.join(items[name] for name in _ON_THE_BAR if name in items))
                self._drawn = time.perf_counter()
        return due

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()

    def _items(self, means: dict[str, float], optimizer: torch.optim.Optimizer, clock: Clock) -> dict[str, str]:
        items = {name: named_figures(means, [name]) for name in means}
        times = clock.means()
        shares = ', '.join(f'{text} {times[key] / sum(times.values()):.0%}' for key, text in TIMES.items())
        speed = f'{figure("images_per_second", self.images_per_second)} images/s'
        return {**items, 'lr': f'lr {learning_rate(optimizer):.3g}', 'images/s': speed, 'time': f'time: {shares}'}


def evaluation_bar(batches: Any, shown: bool) -> Any:
    """Return the batches of an evaluation, which a bar counts on a terminal."""
    return tqdm(batches, desc='evaluating', leave=False, dynamic_ncols=True, disable=not (shown and _shows_bars()))


def log_evaluation(rows: Mapping[str, Mapping[str, float]]) -> None:
    """Say all that an evaluation has found, model by model; on a terminal the line of the epoch is enough."""
    for name, metrics in rows.items():
        values = named_figures(metrics, [key for key in metrics if key != 'samples'])
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
        items = [named_figures(trained, ('loss', 'kl'))]
        if evaluated:
            items.append(named_figures(evaluated, ('top1', self.metric)))
            items += [f'best {figure(self.metric, best)}'] if best is not None else []
        items.append(f'{figure("images_per_second", trained["images_per_second"])} images/s')
        trained_here = done - self.first  # nothing, if only the evaluation was left of the epoch
        if trained_here and done < self.epochs:
            left = (time.perf_counter() - self.began) / trained_here * (self.epochs - done)
            items.append(f'{tqdm.format_interval(left)} left')
        return f'{done}/{self.epochs} epochs: {", ".join(filter(None, items))}'

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


class Trackers:
    """TensorBoard and Weights & Biases, for those who ask for them.

    Args:
        folder: The run folder, which keeps the id of the run at Weights & Biases: a resumed run goes on there.
        tensorboard: Log to TensorBoard.
        wandb: Arguments of `wandb.init`; None does not log there.
    """

    def __init__(self, folder: RunFolder, *, tensorboard: bool = False, wandb: dict[str, Any] | None = None) -> None:
        self.board: Any = None
        self.wandb: Any = None
        try:
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(folder.path))
            if wandb is not None:
                import wandb as client
        except ImportError as error:
            raise UserError(f'--log-tensorboard, --log-wandb: {error}: install the package it names.') from None
        if wandb is not None:
            options = {'name': folder.path.name, **wandb}
            if options.get('id'):
                options['resume'] = 'must'
            elif folder.wandb_id.exists():
                options |= {'id': folder.wandb_id.read_text().strip(), 'resume': 'allow'}
            self.wandb = client.init(**options)
            with replacing(folder.wandb_id) as path:
                path.write_text(f'{self.wandb.id}\n')

    def log_preflight(self, rows: Mapping[str, Mapping[str, float]]) -> None:
        """Log what was measured before the first step: at epoch 0 of TensorBoard, in the run's summary at W&B."""
        values = {f'before/{model}/{key}': value for model, row in rows.items() for key, value in row.items()}
        self._add_scalars(values, 0)
        if self.wandb is not None:
            self.wandb.summary.update(values)

    def log(self, epoch: int, trained: dict[str, float], evaluated: dict[str, float], lr: float) -> None:
        """Log the figures of an epoch."""
        values = {f'train/{key}': value for key, value in trained.items()}
        values |= {f'eval/{key}': value for key, value in evaluated.items()} | {'lr': lr}
        self._add_scalars(values, epoch)
        if self.wandb is not None:
            self.wandb.log(values, step=epoch)

    def _add_scalars(self, values: dict[str, float], epoch: int) -> None:
        if self.board is not None:
            for key, value in values.items():
                self.board.add_scalar(key, value, epoch)

    def close(self) -> None:
        """Finish at both."""
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()
