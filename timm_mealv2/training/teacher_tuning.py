"""The teachers of a run are tuned on its first batch, alike in all processes and whenever the run is resumed."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from timm_mealv2.files import replacing
from timm_mealv2.task import MealV2Task
from timm_mealv2.training.distributed import Processes

_logger = logging.getLogger(__name__)

FILE = 'teachers.json'
"""What was chosen for each teacher, in the run folder."""


def tune_on_first_batch(
    task: MealV2Task, processes: Processes, compile: bool, folder: Path | None, earlier: Sequence[Path]
) -> None:
    """Let the task's first batch tune the teachers, or take what the run has chosen before.

    Args:
        task: A task with live teachers.
        processes: The processes of the run.
        compile: Compile teachers too.
        folder: The run folder, where the choice is kept; None keeps nothing.
        earlier: Folders that may hold the choice of the run so far.
    """

    def tune(module: nn.Module, args: tuple[Any, ...]) -> None:
        hook.remove()
        assert task.teacher is not None
        images = args[0]
        settings = {'device': processes.device.type, 'compile': compile, 'names': list(task.teacher.names)}
        former = next(filter(None, (_read(path / FILE, settings) for path in earlier)), None)
        former = processes.from_first(former)
        choice = former
        if processes.primary and choice is None:
            rows = [row._asdict() for row in task.tune_teachers(images, compile)]
            choice = {**settings, 'images': list(images.shape), 'teachers': rows}
        choice = processes.from_first(choice)
        forms = [row['chosen'] for row in choice['teachers']]
        if former is not None:
            _logger.info(f'The teachers run as before: {", ".join(forms)}.')
        if former is not None or not processes.primary:
            task.teacher.run_as(forms, choice['images'])
        if folder is not None and processes.primary:
            with replacing(folder / FILE) as path:
                path.write_text(json.dumps(choice, indent=2) + '\n')

    hook = task.register_forward_pre_hook(tune)


def _read(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The choice in a file, None if there is none or it was made for something else."""
    try:
        choice: dict[str, Any] = json.loads(path.read_text())
        same = all(choice[name] == value for name, value in settings.items())
        return choice if same and len(choice['teachers']) == len(settings['names']) else None
    except (OSError, KeyError, TypeError, ValueError):
        return None
