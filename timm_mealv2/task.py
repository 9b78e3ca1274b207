"""MEAL V2 as a timm training task: one step is soft cross-entropy with the teachers' mean probability, and the loss of
a discriminator between student and teacher outputs.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from timm.task import TrainingTask, resolve_classification_loss
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from timm_mealv2.data.normalize import channel_stats, renormalize
from timm_mealv2.errors import UserError
from timm_mealv2.losses import (
    LABEL_RESTS,
    Discriminator,
    DiscriminatorLoss,
    GradientReversal,
    at_least_float32,
    dense_log_target,
    similarity_loss,
    sparse_similarity_loss,
)
from timm_mealv2.models.ensemble import EnsembleTeacher
from timm_mealv2.models.factory import TeacherSpec, create_ensemble
from timm_mealv2.trainable import MealV2TrainableModule

_logger = logging.getLogger(__name__)

DISCRIMINATOR_MODES = ('official', 'adversarial')

Teacher = str | TeacherSpec | nn.Module


class MealV2Task(TrainingTask):
    """Trains a student to give the mean probability of an ensemble of teachers (MEAL V2, arXiv 2009.08453).

    The same pixels go to the teachers and to the student. With teacher logits z_i, student logits s and
    p = mean_i softmax(z_i), the loss is L = L_sim + discriminator_weight * L_D: L_sim is the cross-entropy of the
    student with p at temperature 1, L_D the loss of a discriminator between the rows s and mean_i z_i (see
    `DiscriminatorLoss`). Student and discriminator are trained by one backward pass and one optimizer; the teachers
    stay in eval mode, get no gradient, and are in no DDP, checkpoint or `state_dict()` (see `EnsembleTeacher`).

    Two modes of the discriminator:

    - 'official' is what the authors' code does: the gradient of L_D reaches the student with its own sign, which makes
      the student easier to tell apart, and the discriminator ends in a ReLU, so that L_D stays at or above ln(2)/2
      and an output can be dead from the start.
    - 'adversarial' is what the paper draws: the gradient is reversed between discriminator and student, which makes
      the student harder to tell apart, and no final ReLU.

    With `teacher_model=None` the teachers' predictions come with the target: float32 [B, 1 + 2K], a row being the hard
    label (-1 where unknown), K class indices, K probabilities (for the rest of 1 see `label_rest`). The discriminator's
    rows are then log-probabilities on both sides, as logits are not stored.

    `after_teachers`, where it is set, is called in each step when live teachers have predicted: for measuring time.
    Make the optimizer of `get_trainable_module()`, before `compile` and `prepare_distributed`.

    Args:
        student_model: The student. Input is taken as normalized with the mean and std of its `pretrained_cfg` as it is
            now (ImageNet's where it has none).
        teacher_model: An `EnsembleTeacher`, used as it is; or what `create_ensemble` makes one of (a module, a text
            that names teachers, or a list of these); or None with stored labels.
        discriminator_weight: Weight of L_D; 0 builds no discriminator.
        discriminator_mode: 'official' or 'adversarial'.
        hard_label_weight: Weight of `criterion(output, target)`. At 0 the target is not looked at, stored labels apart.
        criterion: Loss on class indices [B] or, from Mixup, on soft targets [B, C]; cross-entropy if None. Rows whose
            index is -1 are left out.
        teachers_per_sample: K: the target of an image is the mean of K teachers drawn for it, see
            `EnsembleTeacher.predict`; p and z are then theirs. None for all.
        device: Device of the discriminator; the student's if None.
        dtype: Dtype of the discriminator, the student's if None; at least float32.
        label_rest: What becomes of the probability beyond the stored labels' K classes: 'uniform', or, without a
            discriminator, 'renormalize' or 'drop'; see `timm_mealv2.losses.sparse_similarity_loss`.
        teacher_device: Device of the teachers; `device` if None.
        discriminator_reduction: Factor by which each hidden layer of the discriminator is narrower than the one before.

    Raises:
        UserError: If class counts of student and teachers differ, a teacher shares weights with the student, or so
            many teachers cannot be drawn.
    """

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: Teacher | Sequence[Teacher] | None,
        discriminator_weight: float = 1.0,
        discriminator_mode: str = 'official',
        hard_label_weight: float = 0.0,
        criterion: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        teachers_per_sample: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
        label_rest: str = 'uniform',
        discriminator_reduction: int = 8,
        teacher_device: torch.device | None = None,
    ) -> None:
        parameter = next(student_model.parameters())
        super().__init__(device=device or parameter.device, dtype=dtype or parameter.dtype, verbose=verbose)
        self.after_teachers: Callable[[], None] | None = None
        assert discriminator_mode in DISCRIMINATOR_MODES, discriminator_mode
        assert label_rest in LABEL_RESTS, label_rest
        assert label_rest == 'uniform' or not discriminator_weight, "a discriminator's rows are whole distributions"
        if criterion is not None and not hard_label_weight:
            _logger.warning('criterion is ignored: hard_label_weight is 0.')
        self.discriminator_weight = discriminator_weight
        self.hard_label_weight = hard_label_weight
        self.label_rest = label_rest
        self.criterion = resolve_classification_loss(criterion, self.device)

        student = unwrap_model(student_model)
        num_classes: int | None = getattr(student, 'num_classes', None)
        if num_classes is None:
            raise UserError(f'{type(student).__name__} has no num_classes: set it to the width of its logits.')
        self.num_classes = num_classes
        self.teacher: EnsembleTeacher | None = None
        if teacher_model is not None:
            self.teacher = self._build_teacher(teacher_model, student, teacher_device or self.device)
        self._drawn: dict[str, Any] = {} if teachers_per_sample is None else {'per_sample': teachers_per_sample}
        if self.teacher is not None and teachers_per_sample is not None:
            self.teacher.check_per_sample(teachers_per_sample)
        self._student_cfg = dict(getattr(student, 'pretrained_cfg', None) or {})
        discriminator_loss, rows = self._build_discriminator(discriminator_mode, discriminator_reduction)
        self.trainable_module: nn.Module = MealV2TrainableModule(student_model, discriminator_loss, rows)
        self.register_buffer('first_output_weights', self._output_weights(), persistent=False)
        self.register_state_dict_post_hook(_leave_out_teachers)
        self.register_load_state_dict_pre_hook(_keep_teachers)
        if self.verbose:
            _logger.info(
                f'MealV2Task: {num_classes} classes, discriminator '
                + (f'{discriminator_mode}, weight {discriminator_weight}' if self.discriminator else 'none')
                + (f', hard label weight {hard_label_weight}' if hard_label_weight else '')
            )

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Compute the loss of one batch.

        Args:
            input: Images [B, chans, H, W], normalized for the student.
            target: Class indices [B] or soft targets [B, C], only looked at with a `hard_label_weight`; stored labels
                float32 [B, 1 + 2K] if there are no live teachers.

        Returns:
            'loss' (scalar) and 'output' (student logits [B, C]), with gradient. Scalars without: 'similarity_loss',
            'kl' (of p to the student, nats), 'teacher_agreement' (share of equal top-1, 0..1), and where they are on
            'discriminator_loss', 'discriminator_accuracy' (0..1) and 'hard_label_loss'.
        """
        teacher_rows: Tensor | None
        # The teachers first: their activations are gone before the student's are made, and on a GPU of their own they
        # run beside the student, whose GPU waits for them where their predictions are copied.
        if self.teacher is not None:
            pixels = self._pixels_for(self.teacher, input)
            log_probs, teacher_rows = self.teacher.predict(pixels, **self._drawn)
            if self.after_teachers is not None:
                self.after_teachers()
            output, discriminator_loss, accuracy = self.trainable_module(input, teacher_rows)
            log_probs = log_probs.to(output.device, non_blocking=True)
            teacher_top1 = log_probs.argmax(dim=1)
            similarity, entropy = similarity_loss(output, log_probs)
        else:
            target, soft_target, teacher_rows, teacher_top1 = self._read_labels(target)
            output, discriminator_loss, accuracy = self.trainable_module(input, teacher_rows)
            similarity, entropy = sparse_similarity_loss(output, *soft_target, rest=self.label_rest)

        result = {'loss': similarity, 'output': output, 'similarity_loss': similarity.detach()}
        result['kl'] = (similarity - entropy).detach()
        result['teacher_agreement'] = (output.detach().argmax(dim=1) == teacher_top1).to(entropy.dtype).mean()
        if discriminator_loss is not None:
            result['loss'] = result['loss'] + self.discriminator_weight * discriminator_loss
            result['discriminator_loss'] = discriminator_loss.detach()
            result['discriminator_accuracy'] = accuracy
        if self.hard_label_weight:
            hard_label_loss = self._hard_label_loss(output, target)
            result['loss'] = result['loss'] + self.hard_label_weight * hard_label_loss
            result['hard_label_loss'] = hard_label_loss.detach()
        return result

    @property
    def discriminator(self) -> nn.Module | None:
        """The discriminator that is trained, None if there is none."""
        return _discriminator_of(self.trainable_module)

    def discriminator_warning(self) -> str | None:
        """Return what to tell the user about a discriminator that has learned nothing since it got its weights.

        An output whose weights have not moved is dead (the ReLU after it is 0 for every row) or gets no signal from
        dead hidden units; where both are, the loss stays at ln 2. Waits for the device.
        """
        weights = self._output_weights()
        dead = [] if weights is None else weights.eq(self.get_buffer('first_output_weights')).all(dim=1).tolist()
        if not any(dead):
            return None
        names = ' and '.join(name for name, is_dead in zip(("'student'", "'teacher'"), dead, strict=True) if is_dead)
        return (
            f'The discriminator is dead: its output {names} has not learned anything, as happens with some seeds and '
            "more often with few classes. This is no fault and costs no accuracy: the teachers' mean probability "
            'trains the student. discriminator_weight 0 leaves the discriminator out.'
        )

    def prepare_distributed(self, device_ids: list[int] | None = None, **ddp_kwargs: Any) -> Self:
        """Wrap student and discriminator together in DistributedDataParallel; the teachers stay outside."""
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile what trains, the student's evaluation and each teacher, before DDP; return the student."""
        options = {'backend': backend, 'mode': mode, **compile_kwargs}
        eval_model: Any = torch.compile(self.get_eval_model(), **options)
        trainable_module: Any = torch.compile(self.trainable_module, **options)
        self.eval_model, self.trainable_module = eval_model, trainable_module
        if self.teacher is not None:
            self.teacher.compile_each(**options)
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The student alone, or its EMA; compiled if the task is."""
        model = super().get_eval_model(module=module, ema=ema)
        trainable = unwrap_model(model)
        return trainable.student if isinstance(trainable, MealV2TrainableModule) else model

    @torch.no_grad()
    def nonfinite_teachers(self, input: Tensor) -> list[str]:
        """Run every live teacher on a batch [B, chans, H, W]; return the names of those with a NaN or infinity.

        The images are normalized for the student.
        """
        if self.teacher is None:
            return []
        logits = self.teacher.teacher_logits(self._pixels_for(self.teacher, input))
        finite = logits.softmax(dim=2).isfinite().flatten(1).all(dim=1).tolist()
        return [name for name, whole in zip(self.teacher.names, finite, strict=True) if not whole]

    def log_teacher_rounding(self, input: Tensor) -> None:
        """Log what the live teachers' autocast changes, see `EnsembleTeacher.log_rounding`."""
        if self.teacher is not None:
            self.teacher.log_rounding(self._pixels_for(self.teacher, input))

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """The parameters to clip; `exclude_head` leaves out the student's last two, as timm does for any model."""
        trainable = unwrap_model(self.trainable_module)
        student = list(trainable.student.parameters())
        discriminator = [] if self.discriminator is None else list(self.discriminator.parameters())
        return (student[:-2] if exclude_head else student) + discriminator

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """What a checkpoint holds beside the student: the discriminator's state dict, if there is one."""
        discriminator = _discriminator_of(module if module is not None else self.get_trainable_module(ema=ema))
        return {} if discriminator is None else {'discriminator': discriminator.state_dict()}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Load what `get_task_state` returned. Without a discriminator in `state` the present one is kept."""
        discriminator = _discriminator_of(module if module is not None else self.get_trainable_module(ema=ema))
        discriminator_state = (state or {}).get('discriminator')
        if discriminator is not None and discriminator_state is not None:
            discriminator.load_state_dict(discriminator_state, strict=strict)
            self.first_output_weights = self._output_weights()
        elif discriminator is not None:
            _logger.warning('The checkpoint holds no discriminator: it starts from its initial weights.')
        elif discriminator_state is not None and strict:
            raise UserError('The checkpoint holds a discriminator, the task none: set discriminator_weight above 0.')

    def _build_teacher(
        self, teacher_model: Teacher | Sequence[Teacher], student: nn.Module, device: torch.device
    ) -> EnsembleTeacher:
        if isinstance(teacher_model, EnsembleTeacher):
            teacher = teacher_model
        else:
            in_chans = getattr(student, 'in_chans', None)
            teacher = create_ensemble(teacher_model, num_classes=self.num_classes, in_chans=in_chans)
        if teacher.num_classes != self.num_classes:
            raise UserError(f'The student has {self.num_classes} classes, its teachers {teacher.num_classes}.')
        own = {parameter.data_ptr() for parameter in student.parameters() if parameter.numel()}
        for name, module in zip(teacher.names, teacher.teachers, strict=True):
            if any(parameter.data_ptr() in own for parameter in module.parameters()):
                remedy = 'pass a copy, or leave the student out of the teachers'
                raise UserError(f'Teacher {name} shares weights with the student: {remedy}.')
        return teacher.to(device)

    def _build_discriminator(self, mode: str, reduction: int) -> tuple[DiscriminatorLoss | None, nn.Module | None]:
        """The discriminator's loss, and what makes its rows of the student's logits."""
        if not self.discriminator_weight:
            return None, None
        discriminator = Discriminator(self.num_classes, reduction, final_relu=mode == 'official')
        discriminator.to(device=self.device, dtype=torch.promote_types(self.dtype, torch.float32))
        rows = nn.Sequential()
        if self.teacher is None:
            rows.append(nn.LogSoftmax(dim=1))
        if mode == 'adversarial':
            rows.append(GradientReversal())
        return DiscriminatorLoss(discriminator), rows

    def _output_weights(self) -> Tensor | None:
        """A copy of the weights of the discriminator's last layer, a row for each of its two outputs."""
        return None if self.discriminator is None else self.discriminator.get_parameter('fc3.weight').detach().clone()

    def _pixels_for(self, teacher: EnsembleTeacher, input: Tensor) -> Tensor:
        """The student's images, normalized for the teachers."""
        mine, theirs = (channel_stats(cfg, input.shape[1]) for cfg in (self._student_cfg, teacher.pretrained_cfg))
        return renormalize(at_least_float32(input), *mine, *theirs)

    def _read_labels(self, target: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None, Tensor]:
        """Of stored labels: hard labels [B], (indices, probabilities) [B, K], the rows [B, C], top-1 [B]."""
        k = (target.shape[-1] - 1) // 2
        if target.ndim != 2 or target.shape[1] != 1 + 2 * k or not 1 <= k <= self.num_classes:
            raise UserError(
                f'teacher_model=None expects stored labels [B, 1 + 2K] with 1 <= K <= {self.num_classes}, got a target '
                f'of shape {list(target.shape)}: pass teachers, or a data set of stored labels.'
            )
        hard, indices = target[:, 0].long(), target[:, 1 : 1 + k].long()
        probabilities = target[:, 1 + k :].to(torch.promote_types(self.dtype, torch.float32))
        top1 = indices.gather(1, probabilities.argmax(dim=1, keepdim=True)).squeeze(1)
        rows = None if self.discriminator is None else dense_log_target(indices, probabilities, self.num_classes)
        return hard, (indices, probabilities), rows, top1

    def _hard_label_loss(self, output: Tensor, target: Tensor) -> Tensor:
        output = at_least_float32(output)
        if target.ndim == 1:
            known = target >= 0
            output, target = output[known], target[known]
            if not len(target):  # the mean over no rows would be nan
                return output.sum()
        return self.criterion(output, target)


def scale_discriminator_lr(optimizer: torch.optim.Optimizer, task: MealV2Task, scale: float) -> None:
    """Give the discriminator `scale` times the learning rate of the optimizer, now and through timm's schedulers.

    Its parameters are moved to groups of their own, which get timm's `lr_scale`. Call it before the scheduler is
    made and before a checkpoint is loaded.

    Args:
        optimizer: An optimizer over `task.get_trainable_module()`; changed in place.
        task: The task.
        scale: Factor on the learning rate.
    """
    wanted = set() if task.discriminator is None else set(task.discriminator.parameters())
    groups = optimizer.param_groups
    assert wanted <= {p for group in groups for p in group['params']}, 'make it from task.get_trainable_module()'
    for group in list(groups):
        taken = [parameter in wanted for parameter in group['params']]
        if not any(taken):
            continue
        if not all(taken):
            rest, group = group, dict(group)
            groups.append(group)
            for key in {'params', 'param_names'} & rest.keys():  # names go with the parameters
                values = list(zip(rest[key], taken, strict=True))
                rest[key] = [value for value, is_taken in values if not is_taken]
                group[key] = [value for value, is_taken in values if is_taken]
        group['lr_scale'] = scale
        # A timm scheduler multiplies initial_lr, where there is one, by lr_scale; without any, lr stays this.
        group['lr'] = group.setdefault('initial_lr', group['lr']) * scale


def _leave_out_teachers(task: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for key in [key for key in state_dict if key.startswith(f'{prefix}teacher.')]:
        del state_dict[key]


def _keep_teachers(task: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Load a task's teachers with their own weights: a state dict has none of theirs."""
    _leave_out_teachers(task, state_dict, prefix, None)
    if isinstance(task, MealV2Task) and task.teacher is not None:
        state_dict.update(task.teacher.state_dict(prefix=f'{prefix}teacher.'))


def _discriminator_of(module: nn.Module | None) -> nn.Module | None:
    """The discriminator inside a trainable module, also one wrapped by DDP, EMA or torch.compile."""
    loss: DiscriminatorLoss | None = getattr(unwrap_model(module), 'discriminator_loss', None)
    return None if loss is None else loss.discriminator
