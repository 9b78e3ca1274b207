"""The later studies: longer trainings on stored labels, add-ons of other methods, images without labels, emoji.

Digits differ from CPU to CPU. These studies need not be run on the machine of those in `arms.py`: their starts and
teachers are trained again (`MODELS_OF`), and their rows are compared with one another alone.
Learning rates are those that the same losses were tuned to in `arms.py`; losses of their own tune theirs.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from arms import AUGMENTED, LABELS, MEALV2, MODELS, NO_LABELS, TEACHER_PAIR, TEACHER_SEEDS, WITHOUT, Arm, of_teachers
from arms import STUDIES as FIRST
from data_sets import FASHION, ICONS, TWO, UNLABELED

LENGTHS = (15, 45, 150, 450)
"""Epochs of the study `long`, and at last of `longest`."""

LIVE = Arm('live', 'MEAL V2 without discriminator', f'{MEALV2} {WITHOUT}', 'logit_t1', models=TEACHER_PAIR)


def _long(lengths: Sequence[int]) -> tuple[Arm, ...]:
    """Labels and stored predictions, crops alone and mixed, for each of so many epochs."""
    arms = []
    for epochs in lengths:
        for name, label, lr, options, store in (
            ('labels', 'labels', 'control', LABELS, ''),
            ('stored', 'stored predictions', 'logit_t1', f'{WITHOUT} {NO_LABELS}', 'labels_of'),
        ):
            for images, augmented in (('crops', ''), ('mixed', f' {AUGMENTED}')):
                arms.append(
                    Arm(
                        f'{name}_{images}_{epochs}',
                        f'{epochs} epochs: {label}, {images}',
                        f'{options}{augmented}',
                        lr,
                        epochs=epochs,
                        models=TEACHER_PAIR,
                        control=f'labels_crops_{epochs}',
                        labels=f'{store}_{images}' if store else '',
                        seeds=5 if epochs == 15 and images == 'crops' else 2 if epochs == 450 else 3,
                    )
                )
    return tuple(arms)


def _ledger() -> tuple[Arm, ...]:
    """MEAL V2 without discriminator, and with one thing more or another."""
    good_and_weak = (TEACHER_PAIR[0], ('start', 200))

    def arm(name: str, label: str, options: str = LIVE.options, lr: str | None = LIVE.lr, **others: Any) -> Arm:
        return replace(LIVE, name=name, label=label, options=options, lr=lr, **others)

    def logit(temperature: int, labels: float) -> str:
        words = f'--kd-distill-type logit --kd-temperature {temperature} --task-loss-weight {labels}'
        return f'--teachers {TWO} {words} {LABELS if labels else NO_LABELS}'

    return (
        LIVE,
        arm('kd_t2', 'logit distillation, ensemble, T = 2', logit(2, 0), lr=None),
        arm('kd_t4', 'logit distillation, ensemble, T = 4', logit(4, 0), lr='logit_t4'),
        arm('kd_t2_labels', 'logit distillation, ensemble, T = 2, half labels', logit(2, 0.5), lr='kd_t2'),
        arm('kd_t4_labels', 'logit distillation, ensemble, T = 4, half labels', logit(4, 0.5), lr='logit_t4_labels'),
        arm('dist_2', "DIST's relation terms, weight 2", loss='dist_2'),
        arm('dist_0.5', "DIST's relation terms, weight 0.5", loss='dist_0.5'),
        arm('standardized', 'standardized logits, T = 2', lr=None, loss='standardized'),
        arm('certain', 'images that teachers are sure of weigh more', loss='certain'),
        arm('uncertain', 'images that teachers are unsure of weigh more', loss='uncertain'),
        arm('ema', 'moving average of the weights (EMA), 0.98', f'{LIVE.options} --model-ema --model-ema-decay 0.98'),
        arm('average', 'mean weights of the last 4 epochs', f'{LIVE.options} --checkpoint-hist 4'),
        arm('official', 'official discriminator', MEALV2, lr='mealv2'),
        arm('adversarial', 'adversarial discriminator', f'{MEALV2} --discriminator-mode adversarial', lr='mealv2'),
        arm('test_36', 'tested at 36 pixels, not 32', measured=replace(FASHION, size=36, teacher='')),
        arm(
            'calibrated',
            'calibrated teachers',
            f'--teachers python:studies.ledger:calibrated {WITHOUT} {NO_LABELS}',
        ),
        arm('one', 'one of the 2 a sample, recorded', f'{WITHOUT} {NO_LABELS}', labels='labels_of_one'),
        arm('weak', 'a weak teacher in place of one', of_teachers(good_and_weak), models=good_and_weak),
        arm(
            'weak_weighted',
            'the same, weighted by 1 / error',
            of_teachers(good_and_weak, '--teacher-weights 0.59 0.41'),
            models=good_and_weak,
        ),
    )


def _pool() -> tuple[Arm, ...]:
    """Some 448 steps on images whose labels are not looked at; the learning rate falls with each step."""
    arm = replace(LIVE, options=f'{LIVE.options} --sched-on-updates --unlabeled')
    return tuple(
        replace(arm, name=f'pool_{count}', label=f'{count:,} images without labels', data=data, epochs=epochs)
        for count, data, epochs in (
            (2000, arm.data, 28),
            (9500, f'{UNLABELED}/9500', 6),
            (57000, f'{UNLABELED}/57000', 1),
        )
    )


def _one_teacher() -> tuple[Arm, ...]:
    """One teacher for each sample: in as many steps as with all of them, and in about as much processor time."""
    arms = []
    for count, longer in ((2, 17), (5, 18)):
        teachers = tuple(('teacher', seed) for seed in TEACHER_SEEDS[:count])
        whole = replace(
            LIVE, name=f'all_{count}', label=f'{count} teachers', options=of_teachers(teachers), models=teachers
        )
        one = replace(whole, options=f'{whole.options} --teachers-per-sample 1', control=whole.name)
        arms += [
            whole,
            replace(one, name=f'one_of_{count}', label=f'one of {count} a sample'),
            replace(
                one, name=f'one_of_{count}_longer', label=f'one of {count} a sample, {longer} epochs', epochs=longer
            ),
        ]
    return tuple(arms)


def _icons() -> tuple[Arm, ...]:
    """The main methods on emoji, some 250 steps; the pool is all training images, whose labels are not looked at."""
    one = f'resnet10t={MODELS}/icons_teacher-11/last.pth.tar'
    mealv2 = f'--teachers {ICONS.teacher} {NO_LABELS}'
    logit = f'--teachers {one} --kd-distill-type logit --kd-temperature 4 --task-loss-weight 0.5 {LABELS}'

    def arm(name: str, label: str, options: str, lr: str | None = None, epochs: int = 21) -> Arm:
        return Arm(
            f'icons_{name}',
            label,
            f'{ICONS.options} --sched-on-updates {options}',
            lr,
            'icons_start',
            epochs,
            (('icons_teacher', 10), ('icons_teacher', 11)),
            data=ICONS.folder,
            measured=ICONS,
            seeds=10,
        )

    return (
        arm('control', 'control, cross-entropy', LABELS),
        arm('without', 'MEAL V2 without discriminator', f'{mealv2} {WITHOUT}'),
        arm(
            'rate',
            "without discriminator, logit distillation's rate",
            f'{mealv2} {WITHOUT}',
            'icons_logit',
        ),
        arm('official', 'MEAL V2, official discriminator', mealv2),
        arm('logit', 'logit distillation, one teacher, T = 4, half labels', logit),
        arm(
            'pool',
            'without discriminator, on all images',
            f'{mealv2} {WITHOUT} --train-split train_all',
            'icons_without',
            8,
        ),
    )


STUDIES = FIRST | {
    'icons': _icons(),
    'long': _long(LENGTHS[:-1]),
    'longest': _long(LENGTHS[-1:]),
    'ledger': _ledger(),
    'pool': _pool(),
    'one_teacher': _one_teacher(),
}

MODELS_OF = {
    **dict.fromkeys(('icons', 'long', 'one_teacher'), 'models_later'),
    **dict.fromkeys(('longest', 'ledger', 'pool'), 'models_ledger'),
}
"""Study -> CSV file of its starts, teachers and stores, where not `models`; file and studies are of one machine."""
