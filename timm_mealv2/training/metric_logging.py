"""The figures of a run: means over an epoch, summary.csv, TensorBoard and Weights & Biases."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from timm_mealv2.errors import UserError, blamed_on
from timm_mealv2.files import replacing
from timm_mealv2.runs import TIMES
from timm_mealv2.training.run_folder import RunFolder

_WAITING = 100  # batches


class Meters:
    """Means of a task's scalars over the images of an epoch. They stay on the device until they are asked for."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.sums = torch.zeros(1)  # of the values times images, and at the end the images
        self._waiting: list[tuple[dict[str, Tensor], int, Tensor]] = []  # added many at once, which takes less time

    def update(self, scalars: dict[str, Tensor], images: int, applied: Tensor) -> None:
        """Add the scalars of a batch of `images` images, of an update that was applied; otherwise only the names."""
        self._waiting.append((scalars, images, applied))
        if len(self._waiting) == _WAITING:
            self._add()

    def _add(self) -> None:
        for scalars, images, applied in self._waiting:
            values = torch.stack([*(value.float() for value in scalars.values()), applied.float()])
            if tuple(scalars) != self.names:
                self.names, self.sums = tuple(scalars), torch.zeros_like(values)
            self.sums.add_(torch.where(applied, values, 0), alpha=images)
        self._waiting.clear()

    def means(self, distributed: bool = False) -> dict[str, float]:
        """Return the means, over all processes if `distributed` (a collective call); NaN without any image."""
        self._add()
        if not self.names:
            return {}
        sums = self.sums.clone()
        if distributed:
            dist.all_reduce(sums)
        *totals, images = sums.tolist()
        return {name: total / images if images else math.nan for name, total in zip(self.names, totals, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts, for a checkpoint in the middle of an epoch."""
        self._add()
        *sums, images = self.sums.cpu()
        return {
            name: {'sum': total.clone(), 'count': int(images)} for name, total in zip(self.names, sums, strict=True)
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what `state_dict` returned."""
        self.names = tuple(state)
        values = [torch.as_tensor(values['sum'], dtype=torch.float32) for values in state.values()]
        images = max((values['count'] for values in state.values()), default=0)
        self.sums = torch.stack([*values, torch.tensor(float(images))]).to(device)


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
        with path.open(newline='') as file, blamed_on(path):
            rows = [*(former for former in csv.DictReader(file) if int(former['epoch']) < epoch), row]
    with replacing(path) as temporary, temporary.open('w', newline='') as file, blamed_on(path):
        writer = csv.DictWriter(file, dict.fromkeys(name for former in rows for name in former), restval='')
        writer.writeheader()
        writer.writerows(rows)


class Trackers:
    """TensorBoard and Weights & Biases, for those who ask for them.

    Args:
        folder: The run folder, which keeps the id of the run at Weights & Biases: a resumed run goes on there.
        tensorboard: Log to TensorBoard.
        wandb: Arguments of `wandb.init`; None does not log there.

    Raises:
        UserError: If a package is missing.
    """

    def __init__(self, folder: RunFolder, *, tensorboard: bool = False, wandb: dict[str, Any] | None = None) -> None:
        self.board: Any = None
        self.wandb: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError('--log-tensorboard needs the package tensorboard: pip install tensorboard') from None
            self.board = SummaryWriter(str(folder.path))
        if wandb is not None:
            try:
                import wandb as client
            except ImportError:
                raise UserError('--log-wandb needs the package wandb: pip install wandb') from None
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
        if self.board is not None:
            for key, value in values.items():
                self.board.add_scalar(key, value, 0)
        if self.wandb is not None:
            self.wandb.summary.update(values)

    def log(self, epoch: int, trained: dict[str, float], evaluated: dict[str, float], lr: float) -> None:
        """Log the figures of an epoch."""
        values = {f'train/{key}': value for key, value in trained.items()}
        values |= {f'eval/{key}': value for key, value in evaluated.items()}
        values['lr'] = lr
        if self.board is not None:
            for key, value in values.items():
                self.board.add_scalar(key, value, epoch)
        if self.wandb is not None:
            self.wandb.log(values, step=epoch)

    def close(self) -> None:
        """Finish at both."""
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()
