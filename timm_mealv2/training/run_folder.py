"""The folder of a run: where it is, what it holds, and which of its checkpoints is the newest."""

import logging
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from timm.models import safe_model_name

from timm_mealv2.errors import UserError
from timm_mealv2.models.checkpoint import damage
from timm_mealv2.training.checkpoint_saver import rank_of, read_checkpoint

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run.

    Attributes:
        path: Where it is, or will be.
    """

    path: Path

    @classmethod
    def choose(cls, output: str, experiment: str, model: str) -> 'RunFolder':
        """Return the folder `experiment` in `output`, named by date and model where there is no name.

        Raises:
            UserError: If nothing can be written there.
        """
        name = experiment or f'{datetime.now().strftime("%Y%m%d-%H%M%S")}-{safe_model_name(model)}'
        path = Path(output or './output/train') / name
        text = f'--output and --experiment: {path} cannot be the run folder'
        try:
            there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        except OSError as error:
            raise UserError(f'{text}: {error.strerror}.') from error
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise UserError(f'{text}: {there} takes no files.')
        return cls(path)

    @property
    def summary(self) -> Path:
        """The figures of each epoch."""
        return self.path / 'summary.csv'

    @property
    def wandb_id(self) -> Path:
        """Keeps the id of the run at Weights & Biases."""
        return self.path / 'wandb_id.txt'

    def create(self) -> None:
        """Make the folder.

        Raises:
            UserError: If that is not possible.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f'--output: cannot make the run folder {self.path}: {error.strerror}.') from error

    def holds(self, checkpoint: Path) -> bool:
        """Whether a file lies in this folder."""
        return checkpoint.absolute().parent == self.path.absolute()

    def checkpoint_to_resume(self, resume: str, restarted: bool, dry_run: bool = False) -> Path | None:
        """Return the checkpoint that a run goes on from, whose checksums are right; None to begin.

        Args:
            resume: A file, 'auto' for the newest in the folder, '' for none.
            restarted: Whether torchrun has restarted the run: the newest goes before what was asked for.
            dry_run: Nothing will be written.

        Raises:
            UserError: If the folder holds another run, or the file is damaged or no checkpoint.
        """
        given = Path(resume) if resume not in ('', 'auto') else None
        if restarted or resume == 'auto':
            newest = find_newest(self.path)
            if newest is not None:
                return newest
            if given is None:
                _logger.info(f'No checkpoint in {self.path}: starting fresh.')
        elif not (given and self.holds(given)) and not dry_run and next(self.path.glob('*.pth.tar'), None):
            raise UserError(
                f'{self.path} already holds a run: continue it with --resume auto, or choose another --experiment.'
            )
        if given is not None:
            read_checkpoint(given)
        return given

    def push(self, repository: str) -> None:
        """Export the best checkpoint and push it; whatever happens there, the training is complete."""
        best = self.path / 'model_best.pth.tar'
        checkpoint = best if best.exists() else self.path / 'last.pth.tar'
        folder = self.path / 'hub'
        try:
            # Here, as nobody else needs the card's packages.
            from timm_mealv2.hub.card import CardOptions
            from timm_mealv2.hub.export import export_model
            from timm_mealv2.hub.hub_api import push_model

            export_model(checkpoint, folder, card=CardOptions(repo_id=repository))
            _logger.info(f'Pushed: {push_model(folder, repository)}')
        except Exception as error:
            text = f'{" ".join(str(error).split())} Push later: mealv2-hub push {checkpoint} {repository}'
            _logger.warning(f'The training is complete ({self.path}), but {text}')


def find_newest(folder: str | os.PathLike[str]) -> Path | None:
    """Return the checkpoint in a run folder that is farthest in the run and whole, None if there is none.

    File names do not tell: the name order of timm's recovery files is that of text, and a file that was being written
    when its process died, or its machine, may be cut off. Whole is a file whose checksums are right.
    """
    found: list[tuple[tuple[int, int], bool, Path]] = []
    for path in Path(folder).glob('*.pth.tar'):
        if path.name.startswith(('tmp', 'recovery_tmp')):
            continue
        try:
            # `last` before its hard links: the other names may be cleaned away.
            found.append((rank_of(read_checkpoint(path, verify=False)), path.name.startswith('last'), path))
        except UserError as error:
            _logger.warning(f'Passed over: {error}')
    for *_, path in sorted(found, reverse=True):
        if (part := damage(path)) is None:
            return path
        _logger.warning(f'Passed over: {os.fspath(path)!r} is damaged (checksum of {part}).')
    return None
