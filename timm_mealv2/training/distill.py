"""One call from Python: `distill` trains as the program does, with its settings and its code."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import nn
from torch.utils.data import Dataset

from timm_mealv2.data.seed import preserved_generators
from timm_mealv2.errors import UserError
from timm_mealv2.models.ensemble import teacher_name
from timm_mealv2.models.factory import TeacherSpec
from timm_mealv2.runs import read_run
from timm_mealv2.training import run
from timm_mealv2.training.logs import logging_of_run
from timm_mealv2.training.options import build_parser
from timm_mealv2.training.settings import complete, convert, with_files
from timm_mealv2.training.stopping import Signals

Teacher = str | TeacherSpec | nn.Module

# Options that are arguments here, and those that make a student of a name.
_ARGUMENTS = ('model', 'teachers', 'kd_model_name', 'data_dir', 'dry_run')
_OF_A_NAME = (
    *('pretrained', 'pretrained_path', 'gp', 'bn_momentum', 'bn_eps'),
    *('drop', 'drop_path', 'drop_connect', 'drop_block'),
)


@dataclass(frozen=True)
class Distilled:
    """What a training has made.

    Attributes:
        model: The student with the weights of the last epoch, in eval mode, on the device of the training.
        history: An entry an epoch, as in summary.csv: 'epoch', 'train_loss', 'eval_top1' (percent), 'lr' and so on;
            None where an epoch was not evaluated.
        folder: The run folder, with `model_best.pth.tar`, `last.pth.tar` and `train.log`.
    """

    model: nn.Module
    history: list[dict[str, float | None]]
    folder: Path


def distill(
    student: str | nn.Module,
    teachers: Teacher | Sequence[Teacher] | None,
    data: str | os.PathLike[str] | tuple[Dataset, Dataset],
    *,
    epochs: int,
    lr: float | None = None,
    output: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Distilled:
    """Train a student on the mean probability of teachers, as `mealv2-train` does: the same seed gives the same bits.

    Signal handlers, `logging` and the random generators are as they were afterwards. Ctrl-C stops at once; the folder
    keeps the checkpoint of the last whole epoch.

    Args:
        student: A model of timm by its name, or a module, which is trained in place. `num_classes` is the width of its
            logits. The checkpoints of a module can be read with its name and the `model_kwargs` that are said here.
        teachers: Texts that name teachers (see `timm_mealv2.models.factory`) and modules, which are frozen and left as
            they are; None for `soft_labels`, or to train on the labels alone.
        data: A folder or a file, as `--data-dir` takes it; or the data sets to train and to evaluate on, timm's or
            others whose items are (PIL image, class index).
        epochs: Epochs to train.
        lr: Learning rate; None scales the default by the batch size.
        output: Folder of the run folder, which `experiment` names; None makes a temporary one.
        **options: Any option of `mealv2-train` by its name with underscores, such as `img_size=128`, `amp=True`,
            `pretrained=True` or `recipe='mealv2_resnet50_224'`.

    Raises:
        TypeError: If there is no option of a name.
        UserError: If a value is not possible, settings contradict each other, or something cannot be read.
    """
    module = isinstance(student, nn.Module)
    for name in (*_ARGUMENTS, *(_OF_A_NAME if module else ())):
        if name in options:
            why = ': the student is a module' if name in _OF_A_NAME else ''
            raise TypeError(f'distill() got an unexpected keyword argument {name!r}{why}')
    files = {name: os.fspath(options.pop(name)) for name in ('recipe', 'config') if options.get(name)}
    options |= {'epochs': epochs, 'lr': lr, 'output': output or tempfile.mkdtemp(prefix='mealv2-')}
    parts: dict[str, Any] = {}
    if isinstance(student, nn.Module):
        parts['student'] = student
        if getattr(student, 'num_classes', None) is None:
            raise UserError(f'{type(student).__name__} has no num_classes: set it to the width of its logits.')
    else:
        options['model'] = student
    if isinstance(data, str | os.PathLike):
        options['data_dir'] = data
    else:
        parts['datasets'] = tuple(data)
    given = convert({name: value for name, value in options.items() if value is not None})
    args = with_files(build_parser(), given | files)
    if isinstance(student, nn.Module):
        args.model = teacher_name(student).partition('.')[0]
    args.teachers = [teachers] if isinstance(teachers, Teacher) else list(teachers or ())
    cuda = range(torch.cuda.device_count())
    with preserved_generators(), torch.random.fork_rng(cuda), logging_of_run(primary=True) as log:
        trainer = run.train(complete(args), log, Signals(log=False), **parts)
    model = unwrap_model(trainer.task.get_eval_model()).eval()
    rows = read_run(trainer.folder.path).rows
    columns = dict.fromkeys(name for row in rows for name in row)
    history = [{**{name: row.get(name) for name in columns}, 'epoch': int(row['epoch'])} for row in rows]
    return Distilled(model, history, trainer.folder.path)
