"""The training program: `main(argv)` builds the parts, then trains, evaluates and saves epoch by epoch."""

import argparse
import logging
import os
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.models import safe_model_name
from timm.scheduler.scheduler import Scheduler
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import distribute_bn, trim_summary, update_summary
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.data import Dataset
from torchvision.utils import save_image
from tqdm import tqdm

from timm_mealv2.cli.parser import run_cli
from timm_mealv2.data.bad_images import BadImages
from timm_mealv2.data.dataset import class_names
from timm_mealv2.data.loader import StreamLoader, TrainLoader
from timm_mealv2.errors import UserError
from timm_mealv2.evaluation import evaluate
from timm_mealv2.files import replacing
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.training.arguments import args_text, paper_differences, parse_args
from timm_mealv2.training.build import (
    build_datasets,
    build_device,
    build_eval_loader,
    build_optimizer,
    build_scheduler,
    build_stepper,
    build_student,
    build_task,
    build_teachers,
    build_train_loader,
    open_split,
)
from timm_mealv2.training.checkpoint_saver import (
    Progress,
    RunSaver,
    find_newest,
    load_buffers,
    load_scheduler_state,
    own_state,
    position,
    process_states,
    read_checkpoint,
    scheduler_state,
)
from timm_mealv2.training.loop import (
    EpochEvents,
    Meters,
    learning_rate,
    train_one_epoch,
    updates_per_epoch,
)
from timm_mealv2.training.signals import EvaluationStoppedError, Signals, TooManyNonFiniteError, Watch

_logger = logging.getLogger(__name__)

SUMMARY = 'summary.csv'

_PATIENCE = 10  # seconds for torchrun to find the process that failed; it looks ten times a second

_CONTINUE = '--resume auto with the same --output and --experiment continues'


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the arguments say; without them, those of the command line.

    Raises:
        UserError: What the user can mend.
    """
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stderr)
    if int(os.environ.get('RANK', 0)) > 0:
        logging.getLogger().setLevel(logging.WARNING)
    with Signals(log=int(os.environ.get('RANK', 0)) == 0) as signals:
        device = build_device(args)
        try:
            _Run(args, device, signals).run()
        except RuntimeError as error:
            if args.distributed and _tells_of_another(error):
                time.sleep(_PATIENCE)
            raise
        finally:
            if args.distributed:
                dist.destroy_process_group()


def _tells_of_another(error: RuntimeError) -> bool:
    """Whether an error is a broken connection: another process has failed, and its error is the one to show.

    torchrun, which shows the earliest by the second, ends this process before its own is told.
    """
    return isinstance(error, dist.DistError) or 'gloo' in str(error).lower()


def cli() -> None:
    """Run `main` as the command `mealv2-train`."""
    run_cli(record(main))  # torchrun shows the error of the process that failed first


def _unknown(target: Any) -> int:
    return -1


@dataclass
class _Validation:
    """The images a model is judged by, and whether by labels or by agreement with the teachers."""

    loader: Any
    by_agreement: bool

    def metric(self, eval_metric: str) -> str:
        """The metric to rank checkpoints by where `eval_metric` is asked for."""
        if not self.by_agreement:
            return eval_metric
        return 'kl' if eval_metric == 'loss' else 'agreement'


class _Run:
    """One run: its parts, and the order in which they are put together and used."""

    def __init__(self, args: argparse.Namespace, device: torch.device, signals: Signals) -> None:
        self.args = args
        self.device = device
        self.primary = args.rank == 0
        self.folder = self._choose_folder()
        _check_folder(self.folder)
        resume = self._choose_checkpoint()

        self.bad = BadImages(args.max_bad_images)
        self.watch = Watch(signals, self.bad, max_nonfinite=args.max_nonfinite, distributed=args.distributed)
        self.saver: RunSaver | None = None
        self.student, self.data_config = build_student(args, device)
        train, validation = build_datasets(args, self.data_config['input_size'][0])
        self.class_names = class_names(train)
        self.teachers = build_teachers(args, self.data_config['input_size'][0], device)
        self.task = build_task(args, self.student, self.teachers, device)
        self.optimizer = build_optimizer(args, self.task)
        self.loader: TrainLoader | StreamLoader = build_train_loader(args, train, self.data_config, device, self.bad)
        self.validation = self._build_validation(validation)
        self.eval_metric = self.validation.metric(args.eval_metric) if self.validation is not None else ''
        self.decreasing = self.eval_metric in ('loss', 'kl')
        if args.model_ema:
            ema_device = torch.device('cpu') if args.model_ema_force_cpu else None
            self.task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=ema_device)
        self.stepper = build_stepper(args, self.task, self.optimizer, device, self.watch.agree)
        self.scheduler: Scheduler | None
        self.scheduler, self.epochs = build_scheduler(args, self.optimizer, self.loader, self.decreasing)
        self.meters = Meters()
        self.buffers: list[dict[str, Tensor]] = []
        self.resumed = resume
        self.start = self._resume(resume) if resume else Progress()
        # A run that continues itself is past its start.
        if args.start_epoch is not None and not (resume and args.resume in ('', 'auto')):
            updates = args.start_epoch * updates_per_epoch(self.loader, args.grad_accum_steps)
            self.start = Progress(args.start_epoch, update=updates)
            self._step_schedule(args.start_epoch, updates)

        if args.torchcompile is not None:
            self.task.compile(backend=args.torchcompile or 'inductor', mode=args.torchcompile_mode)
        if args.distributed:
            ids = [device] if device.type == 'cuda' else None
            self.task.prepare_distributed(device_ids=ids, broadcast_buffers=not args.no_ddp_bb)
            load_buffers(self.task, self.buffers)

    # Before the first step

    def _choose_folder(self) -> Path:
        args = self.args
        output = Path(args.output or './output/train')
        if args.experiment:
            return output / args.experiment
        moment = datetime.now().strftime('%Y%m%d-%H%M%S')
        return output / f'{moment}-{safe_model_name(args.model)}'

    def _choose_checkpoint(self) -> Path | None:
        """The checkpoint to continue from, the same on every process."""
        args = self.args
        given = Path(args.resume) if args.resume not in ('', 'auto') else None
        restarted = bool(args.experiment) and int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0
        if restarted:
            _logger.info('The process group was restarted: continuing from its newest checkpoint.')
        if not restarted and args.resume != 'auto':
            own = given is not None and given.absolute().parent == self.folder.absolute()
            if not own and not args.dry_run and next(self.folder.glob('*.pth.tar'), None):
                raise UserError(
                    f'{self.folder} already holds a run: continue it with --resume auto, or choose another '
                    '--experiment.'
                )
            return given
        chosen: list[Any] = [find_newest(self.folder) if self.primary else None]
        if args.distributed:
            dist.broadcast_object_list(chosen)
        if chosen[0] is None and given is None:
            _logger.info(f'No checkpoint in {self.folder}: starting fresh.')
        return chosen[0] or given

    def _resume(self, path: Path) -> Progress:
        """Load a checkpoint into task, optimizer, scaler, schedule and meters."""
        args = self.args
        checkpoint = read_checkpoint(path)
        try:
            resume_task_checkpoint(
                self.task,
                path,
                optimizer=None if args.no_resume_opt else self.optimizer,
                loss_scaler=None if args.no_resume_opt else self.stepper.scaler,
                log_info=False,
            )
            if self.task.has_ema():
                load_task_ema_checkpoint(self.task, path)
        except (KeyError, RuntimeError, ValueError) as error:
            text = ' '.join(str(error).split())
            raise UserError(f'{path} does not fit this model or optimizer: {text[:400]}') from error
        updates = updates_per_epoch(self.loader, args.grad_accum_steps)
        start = position(checkpoint, updates)
        if start.batch and not (self.loader.resumable and checkpoint.get('batches') == len(self.loader)):
            _logger.info('The epoch cannot be entered where it was left (streaming, or batches of another size).')
            start = Progress(start.epoch, update=start.epoch * updates)
        else:
            own = own_state(checkpoint, args.rank, args.world_size)
            self.meters.load_state_dict(own.get('meters', {}), self.device)
            self.buffers = own.get('buffers', [])
        if self.scheduler is not None and 'scheduler' in checkpoint and not args.no_resume_opt:
            load_scheduler_state(self.scheduler, checkpoint['scheduler'])
        elif 'progress' not in checkpoint or args.no_resume_opt:
            self._step_schedule(start.epoch, start.update)
        if 'faults' in checkpoint:
            self.watch.load_state_dict(checkpoint['faults'])
        _logger.info(f'Continuing from {path}: epoch {start.epoch}, batch {start.batch}, update {start.update}.')
        return start

    def _step_schedule(self, epoch: int, update: int) -> None:
        if self.scheduler is not None:
            if self.args.sched_on_updates:
                self.scheduler.step_update(update)
            else:
                self.scheduler.step(epoch)

    def _build_validation(self, validation: Dataset | None) -> _Validation | None:
        args = self.args
        build = partial(build_eval_loader, args, data_config=self.data_config, device=self.device, bad=self.bad)
        by_agreement = args.unlabeled and (validation is None or len(class_names(validation) or ()) != args.num_classes)
        if by_agreement and self.teachers is None:
            _logger.info('No validation split with labels, and no live teachers to agree with: there is no evaluation.')
            return None
        if validation is None:
            _logger.info('No validation split: evaluating by agreement with the teachers on the training images.')
            validation = open_split(args, args.train_split, self.data_config['input_size'][0])
        if by_agreement:
            validation.target_transform = _unknown  # type: ignore[attr-defined]
        return _Validation(build(dataset=validation), by_agreement)

    # The run

    def run(self) -> None:
        args = self.args
        if self.primary:
            self._announce()
        if args.dry_run:
            self._dry_run()
            return
        if self.resumed is None and not args.no_preflight and self.teachers is not None:
            self._preflight(self.teachers)
        self.saver = self._open_folder() if self.primary else None
        trackers = _Trackers(args, self.folder) if self.primary else None
        events = EpochEvents(
            log_interval=args.log_interval,
            log=self.primary,
            distributed=args.distributed,
            recovery_interval=args.recovery_interval,
            save_recovery=self._save_recovery,
            after_update=self._stop_if_needed,
            save_images=self._save_images if args.save_images and self.primary else None,
            synchronize=args.synchronize_step,
        )
        with self.watch.signals.deferred():
            start = self.start
            while start.epoch < self.epochs:
                start = self._run_epoch(start, events, trackers)
        if self.saver is not None and trackers is not None:
            trackers.close()
            if self.saver.best_metric is not None:
                _logger.info(f'Best {self.eval_metric}: {self.saver.best_metric:.4g} (epoch {self.saver.best_epoch}).')
            _logger.info(f'Written: {self.folder}')
            if args.push_to_hub:
                self._push(args.push_to_hub)

    def _push(self, repository: str) -> None:
        """Export the best checkpoint and push it; whatever happens there, the training is complete."""
        best = self.folder / 'model_best.pth.tar'
        checkpoint = best if best.exists() else self.folder / 'last.pth.tar'
        folder = self.folder / 'hub'
        try:
            # Here, as nobody else needs the card's packages.
            from timm_mealv2.hub.card import CardOptions
            from timm_mealv2.hub.client import push_folder
            from timm_mealv2.hub.export import export_model

            export_model(checkpoint, folder, card=CardOptions(repo_id=repository))
            _logger.info(f'Pushed: {push_folder(folder, repository)}')
        except Exception as error:
            text = ' '.join(str(error).split())
            if 'mealv2-hub push' not in text:
                text += f' Push later: mealv2-hub push {checkpoint} {repository}'
            _logger.warning(f'The training is complete ({self.folder}), but {text}')

    def _run_epoch(self, start: Progress, events: EpochEvents, trackers: '_Trackers | None') -> Progress:
        """Train from `start` to the end of its epoch, evaluate, save; return where the next one starts."""
        args, epoch = self.args, start.epoch
        rate = learning_rate(self.optimizer)
        try:
            trained = train_one_epoch(
                self.stepper,
                self.loader,
                start=start,
                meters=self.meters,
                scheduler=self.scheduler,
                events=events,
                watch=self.watch,
                world_size=args.world_size,
            )
        except TooManyNonFiniteError as error:
            newest = find_newest(self.folder)
            text = f'the last good checkpoint is {newest}' if newest else 'no checkpoint was written before'
            raise UserError(f'{error} {text[0].upper()}{text[1:]}.') from error
        updates = (epoch + 1) * updates_per_epoch(self.loader, args.grad_accum_steps)
        trained_to = Progress(epoch, len(self.loader), updates)
        if start.batch < len(self.loader):  # of a run continued at the epoch's end they are shared already
            self._share_batch_norm()
        self._stop_if_needed(trained_to, self.meters)
        last = epoch + 1 == self.epochs
        try:
            evaluated = self._validate() if last or (epoch + 1) % args.val_interval == 0 else None
        except EvaluationStoppedError:
            evaluated = None
        self._stop_if_needed(trained_to, self.meters)
        self.meters = Meters()
        metric = evaluated[self.eval_metric] if evaluated else None
        if self.scheduler is not None:
            self.scheduler.step(epoch + 1, metric)
        end = Progress(epoch + 1, update=updates)
        self._keep(end)
        if self.saver is not None and trackers is not None:
            self._finish_epoch(epoch, trained, evaluated, rate, trackers)
            self.saver.save_checkpoint(epoch, metric)
            self.saver.remove_recovery()
        return end

    def _stop_if_needed(self, position: Progress, meters: Meters) -> None:
        """End the run at `position`, on all processes, if a signal has come or too many images cannot be read."""
        watch = self.watch
        if not watch.signal and len(self.bad.found) <= self.bad.limit:
            return
        self._save_recovery(position, meters)
        watch.wait()
        if watch.signal:
            watch.signals.leave(watch.signal, f' at epoch {position.epoch}, batch {position.batch}; {_CONTINUE}')
        self.bad.check(f'Saved where it was; {_CONTINUE}')

    def _announce(self) -> None:
        args = self.args
        if args.recipe or args.dry_run:
            _logger.info(f'Settings other than the defaults:\n{args_text(args, changed=True)}')
        if isinstance(self.teachers, EnsembleTeacher):
            for name, teacher in zip(self.teachers.names, self.teachers.teachers, strict=True):
                own = getattr(teacher, 'pretrained_cfg', {})
                differing = [
                    f'{key} {own[key]} (here {self.data_config[key]})'
                    for key in ('interpolation', 'crop_pct', 'input_size')
                    if own.get(key) is not None and own[key] != self.data_config[key]
                ]
                if differing:
                    _logger.info(f'Teacher {name} was evaluated with other images: {", ".join(differing)}.')
            if differences := paper_differences(args):
                _logger.info(
                    f'Differs from the paper: {", ".join(differences)}. (--recipe NAME sets the published training, '
                    '--list-recipes lists them)'
                )
        parameters = sum(p.numel() for p in self.student.parameters()) / 1e6
        _logger.info(
            f'{args.model}: {parameters:.2f} M parameters, {len(self.loader)} batches of {args.batch_size} an epoch on '
            f'{args.world_size} process(es), {self.epochs} epochs.'
        )

    def _preflight(self, teachers: EnsembleTeacher) -> None:
        """Evaluate ensemble, teachers and the student's start, so that a wrong teacher is seen in time."""
        models = {'ensemble': teachers, 'student (start)': self._eval_student()}
        rows = self._evaluate(models, reference='ensemble', members=True)
        self.bad.check()
        if self.primary:
            rows = {name.replace('ensemble/', 'teacher '): row for name, row in rows.items()}
            width = max(map(len, rows))
            _logger.info(f'Before the first step, on {rows["ensemble"]["samples"]:.0f} images:')
            for name, metrics in rows.items():
                shown = [f'{key} {metrics[key]:.4g}' for key in ('top1', 'top5', 'agreement', 'kl') if key in metrics]
                _logger.info(f'  {name:<{width}}  {"  ".join(shown)}')

    def _open_folder(self) -> RunSaver:
        args = self.args
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f'--output: cannot make the run folder {self.folder}: {error.strerror}.') from error
        with replacing(self.folder / 'args.yaml') as path:
            path.write_text(args_text(args))
        saver = RunSaver(
            self.task,
            constant={
                'data_config': self.data_config,
                'class_names': self.class_names,
                'batches': len(self.loader),
                'faults': self.watch.state,
            },
            optimizer=self.optimizer,
            args=argparse.Namespace(**{key: value for key, value in vars(args).items() if key != 'explicit'}),
            amp_scaler=self.stepper.scaler,
            checkpoint_dir=str(self.folder),
            recovery_dir=str(self.folder),
            decreasing=self.decreasing,
            max_history=args.checkpoint_hist,
        )
        if self.resumed is not None and self.resumed.absolute().parent == self.folder.absolute():
            saver.restore(self.resumed)
        return saver

    def _dry_run(self) -> None:
        """Time a few steps; nothing is written."""
        seconds = []
        for batch, (images, target) in enumerate(self.loader.batches(0)):
            began = time.perf_counter()
            self.task.train()
            self.stepper.step(images, target, update=batch, part=0, parts=1)
            if images.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
            if batch == 3:
                break
        # The first step also allocates and chooses kernels.
        step = min(seconds[1:] or seconds)
        if self.device.type == 'cuda':
            memory = torch.cuda.max_memory_allocated() / 2**30
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rate = self.args.batch_size * self.args.world_size / step
        hours = step * len(self.loader) * self.epochs / 3600
        if self.primary:
            print(
                f'dry run: {step:.3f} s a step, {rate:.0f} images/s, peak memory {memory:.2f} GiB, '
                f'{hours:.2f} hours for {self.epochs} epochs without evaluation; nothing was written'
            )

    # An epoch's end

    def _eval_student(self, ema: bool = False) -> nn.Module:
        return self.task.get_eval_model(ema=ema)

    def _evaluate(
        self, models: dict[str, nn.Module], reference: str | None = None, members: bool = False
    ) -> dict[str, dict[str, float]]:
        assert self.validation is not None, 'there is nothing to judge by'
        batches = self.watch.until_stopped(self.validation.loader)
        # None shows the bar on a terminal alone.
        loader = tqdm(batches, desc='evaluating', leave=False, disable=None if self.primary else True)
        with self.stepper.autocast():
            return evaluate(
                models,
                loader,
                device=self.device,
                reference=reference,
                members=members,
                data_config=self.data_config,
                distributed=self.args.distributed,
            )

    def _validate(self) -> dict[str, float] | None:
        """Metrics of the student, of its average (EMA) where that is evaluated; None with nothing to judge by."""
        if self.validation is None:
            return None
        models = {'student': self._eval_student()}
        if self.task.has_ema() and not self.args.model_ema_force_cpu:
            models['student (EMA)'] = self._eval_student(ema=True)
        reference = None
        if self.validation.by_agreement and self.teachers is not None:
            models, reference = {**models, 'ensemble': self.teachers}, 'ensemble'
        rows = self._evaluate(models, reference)
        rows.pop('ensemble', None)
        if self.primary:
            for name, metrics in rows.items():
                values = ', '.join(f'{key} {value:.4g}' for key, value in metrics.items() if key != 'samples')
                _logger.info(f'{name}: {values} on {metrics["samples"]:.0f} images')
        return {key: value for key, value in list(rows.values())[-1].items() if key != 'samples'}

    def _share_batch_norm(self) -> None:
        if self.args.distributed and self.args.dist_bn in ('broadcast', 'reduce'):
            for ema in (False, True) if self.task.has_ema() else (False,):
                module = self.task.get_trainable_module(ema=ema)
                distribute_bn(module, self.args.world_size, self.args.dist_bn == 'reduce')

    def _finish_epoch(
        self,
        epoch: int,
        trained: dict[str, float],
        evaluated: dict[str, float] | None,
        rate: float,
        trackers: '_Trackers',
    ) -> None:
        # An epoch without evaluation leaves its columns empty.
        columns = ('agreement', 'kl') if self.validation and self.validation.by_agreement else ('loss', 'top1', 'top5')
        append_summary(self.folder / SUMMARY, epoch, trained, evaluated or dict.fromkeys(columns, ''), rate)
        trackers.log(epoch, trained, evaluated or {}, rate)

    def _keep(self, position: Progress, meters: Meters | None = None) -> None:
        """Gather what the next checkpoint holds of this process and the others: they all call it."""
        processes = process_states(self.task, meters.state_dict() if meters else None, self.args.distributed)
        if self.saver is not None:
            self.saver.keep(position, processes, scheduler_state(self.scheduler))

    def _save_recovery(self, position: Progress, meters: Meters) -> None:
        self._keep(position, meters)
        if self.saver is not None:
            self.saver.save_recovery(position.epoch, position.batch)

    def _save_images(self, batch: int, images: Tensor) -> None:
        save_image(images, self.folder / f'train-batch-{batch}.jpg', padding=0, normalize=True)


def _check_folder(folder: Path) -> None:
    """Refuse a run folder that cannot be one, before anything is loaded."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:
        raise UserError(f'--output and --experiment: {folder} cannot be the run folder: {error.strerror}.') from error
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f'--output and --experiment: {folder} cannot be the run folder: {there} takes no files.')


def append_summary(path: Path, epoch: int, trained: dict[str, float], evaluated: dict[str, Any], rate: float) -> None:
    """Add an epoch's row to summary.csv, in place of it and all later ones if they are there; whole or not at all.

    timm's `update_summary` prefixes the columns with train_ and eval_; the speed is no metric and has no prefix.
    """
    with replacing(path) as temporary:
        if path.exists():
            shutil.copyfile(path, temporary)
            trim_summary(temporary, epoch)
        new = not temporary.stat().st_size
        update_summary(epoch, trained, evaluated, temporary, lr=rate)
        if new:
            text = temporary.read_text()
            temporary.write_text(text.replace('train_images_per_second', 'images_per_second', 1))


class _Trackers:
    """TensorBoard and Weights & Biases, for who asked for them."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.board: Any = None
        self.wandb: Any = None
        if args.log_tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError('--log-tensorboard needs the package tensorboard: pip install tensorboard') from None
            self.board = SummaryWriter(str(folder))
        if args.log_wandb:
            try:
                import wandb
            except ImportError:
                raise UserError('--log-wandb needs the package wandb: pip install wandb') from None
            resume = {'resume': 'must', 'id': args.wandb_resume_id} if args.wandb_resume_id else {}
            config = {key: value for key, value in vars(args).items() if key != 'explicit'}
            self.wandb = wandb.init(
                project=args.wandb_project, name=folder.name, config=config, tags=args.wandb_tags, **resume
            )

    def log(self, epoch: int, trained: dict[str, float], evaluated: dict[str, float], rate: float) -> None:
        if self.board is None and self.wandb is None:
            return
        values = {f'train/{key}': value for key, value in trained.items()}
        values |= {f'eval/{key}': value for key, value in evaluated.items()}
        values['lr'] = rate
        if self.board is not None:
            for key, value in values.items():
                self.board.add_scalar(key, value, epoch)
        if self.wandb is not None:
            self.wandb.log(values, step=epoch)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()
