"""What the studies train: each arm is a line of options for `train_distill.py`, taken from the repository's root.

Every arm of every seed starts from the same weights, the model `start` of that seed, unless it says otherwise, sees the
same 2,000 images in the same number of steps and ends with a cosine. Arms without labels have no weight decay, those
with labels 5e-4, as in the quick start; the study `recipe` varies that. The arms of the studies `few`, `students`,
`transfer` and `photos` say themselves what they start from and see; each has a control of its own.
"""

from dataclasses import dataclass, replace

from data_sets import COLOR, DIGITS, FASHION, FULL, LABELED, ONE, PHOTOS, SAMPLE, TWO, DataSet

EPOCHS = 15
RECORDED = 50
SEEDS = tuple(range(10))

TUNING_SEED = 100
LEARNING_RATES = (0.05, 0.1, 0.2)
"""Each is tried with the tuning seed, which is not used again; the best top-1 on the tuning images decides.

Arms that differ in their teachers, their mixing or their discriminator's mode alone share one: see `Arm.lr`.
"""

MODELS = 'output/studies/models'

COMMON = (
    '--recipe quickstart --train-split train.tar --val-split validation.tar --checkpoint-hist 1 --channels-last '
    '--workers 0 --no-preflight --val-interval 1000 --log-interval 1000'
)


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Args:
        name: Its name, of no other arm of any study.
        label: What the tables call it.
        options: Options of `train_distill.py` that tell it from the others.
        lr: Name of the arm whose tuned learning rate it takes; None tunes its own.
        start: Model that it starts from; '' is from scratch.
        epochs: Epochs of its images.
        models: Models that it needs besides, as (name, seed).
        control: Name of the arm that it is compared with, where that is not one for its whole study.
        data: Folder of its images.
        labels: Store of predictions that it learns from, recorded for its seed.
        measured: What it is measured on.
        loss: Loss of `ledger.LOSSES` in place of the similarity loss.
        seeds: How many of `SEEDS` it is trained with.
    """

    name: str
    label: str
    options: str
    lr: str | None = None
    start: str = 'start'
    epochs: int = EPOCHS
    models: tuple[tuple[str, int], ...] = ()
    control: str = ''
    data: str = SAMPLE
    labels: str = ''
    measured: DataSet = FASHION
    loss: str = ''
    seeds: int = 5


LABELS, NO_LABELS = '--weight-decay 5e-4', '--weight-decay 0'
MEALV2 = f'--teachers {TWO} {NO_LABELS}'
WITHOUT = '--discriminator-weight 0'
_ADVERSARIAL = '--discriminator-mode adversarial'
_LOGIT = '--kd-distill-type logit --teachers'
_START_RECIPE = '--lr 0.1 --warmup-epochs 5 --epochs 50'
AUGMENTED = '--aa rand-m5 --cutmix 1 --mixup-mode pair'

STUDENTS = {
    'half': ('half as wide', '--model-kwargs channels=[8,16,32,32] stem_width=8 output_stride=8'),
    'wide': ('1.5 times as wide', '--model-kwargs channels=[24,48,96,96] stem_width=24 output_stride=8'),
    'double': ('twice as wide', '--model-kwargs channels=[32,64,128,128] stem_width=32 output_stride=8'),
    'mobilenet': ('mobilenetv3_small_050', '--model mobilenetv3_small_050 --model-kwargs'),
    'efficientnet': ('test_efficientnet', '--model test_efficientnet --model-kwargs output_stride=8'),
}
"""Other students than the quick start's: what tells them from it, and their options, which are never the last ones."""

MODEL_OPTIONS = {
    'start': f'--data-dir {SAMPLE} {_START_RECIPE} {LABELS}',
    'taught_start': f'--data-dir {SAMPLE} {_START_RECIPE} {MEALV2} {WITHOUT}',
    'teacher': f'--data-dir {FULL} --lr 0.2 --sched-on-updates --warmup-epochs 1 --warmup-lr 0.02 --epochs 4 {LABELS}',
    'plain': f'--data-dir {SAMPLE} --lr 0.1 --epochs {EPOCHS} {LABELS}',
    'distilled': f'--data-dir {SAMPLE} --lr 0.2 --epochs {EPOCHS} {MEALV2} {WITHOUT}',
    **{
        f'{name}_{model}': f'--data-dir {source.folder} {source.options} {options} {LABELS}'
        for name, source in COLOR.items()
        for model, options in (
            ('start', _START_RECIPE),
            ('teacher', '--train-split train_all --lr 0.2 --warmup-epochs 5 --epochs 40'),
        )
    },
    **{
        f'start_{count}': f'--data-dir {LABELED}/{count} --lr 0.1 --warmup-epochs 5 --epochs {epochs} {LABELS}'
        for count, epochs in ((200, 200), (600, 120))
    },
    **{
        f'start_{name}': f'{options} --data-dir {SAMPLE} {_START_RECIPE} {LABELS}'
        for name, (_, options) in STUDENTS.items()
    },
}
"""Models that arms start from or learn from. A teacher sees 60,000 images; as it and `start` have the student's
architecture, so have all but those of `STUDENTS`."""

MODEL_STARTS = {'plain': 'start', 'distilled': 'start'}
"""Models that go on from another of the same seed."""

MODEL_DATA = {f'{name}_{model}': source for name, source in COLOR.items() for model in ('start', 'teacher')}
"""Models that are measured on other images than Fashion-MNIST's."""

STORES = {
    'augmented_labels': (
        f'--recipe quickstart --data-dir {SAMPLE} --train-split train.tar --workers 0 --teachers {TWO} {AUGMENTED} '
        '--epochs 20'
    ),
    **{
        f'labels_of_{name}': (
            f'--recipe quickstart --data-dir {SAMPLE} --train-split train.tar --workers 0 --teachers {TWO} {options} '
            f'--epochs {RECORDED}'
        )
        for name, options in (('crops', ''), ('mixed', AUGMENTED), ('one', '--teachers-per-sample 1'))
    },
}
"""Predictions that are recorded before the arms that learn from them: options of `mealv2-softlabels record`."""

TEACHER_SEEDS = (10, 11, 12, 13, 14)
TEACHER_PAIR = tuple(('teacher', seed) for seed in TEACHER_SEEDS[:2])
_WEAK = ('start', 200)


def of_teachers(models: tuple[tuple[str, int], ...], options: str = '') -> str:
    paths = ' '.join(f'resnet10t={MODELS}/{name}-{seed}/last.pth.tar' for name, seed in models)
    return f'--teachers {paths} {WITHOUT} {NO_LABELS} {options}'.strip()


def _methods() -> tuple[Arm, ...]:
    """Study A: what users would pick instead."""
    options = {
        'control': ('control, cross-entropy', LABELS),
        'mealv2': ('MEAL V2, official discriminator', MEALV2),
        'mealv2_without': ('MEAL V2 without discriminator', f'{MEALV2} {WITHOUT}'),
        'logit_t1': (
            'logit distillation, one teacher, T = 1',
            f'{_LOGIT} {ONE} --kd-temperature 1 --task-loss-weight 0 {NO_LABELS}',
        ),
        'logit_t4': (
            'logit distillation, one teacher, T = 4',
            f'{_LOGIT} {ONE} --kd-temperature 4 --task-loss-weight 0 {NO_LABELS}',
        ),
        'logit_t4_labels': (
            'logit distillation, one teacher, T = 4, half labels',
            f'{_LOGIT} {ONE} --kd-temperature 4 --task-loss-weight 0.5 {LABELS}',
        ),
        'mealv2_adversarial': ('MEAL V2, adversarial discriminator', f'{MEALV2} {_ADVERSARIAL}'),
        'ensemble_t4': (
            'logit distillation, ensemble, T = 4',
            f'{_LOGIT} {TWO} --kd-temperature 4 --task-loss-weight 0 {NO_LABELS}',
        ),
        'mean_logits': (
            'mean of logits, no discriminator',
            f'--teachers python:studies.mean_logits:ensemble {WITHOUT} {NO_LABELS}',
        ),
        'mixup': ('mean probability with Mixup (FunMatch)', f'{MEALV2} {WITHOUT} --mixup 1'),
    }
    tuned_with = dict.fromkeys(('mealv2_without', 'mean_logits', 'mixup'), 'logit_t1')
    tuned_with |= {'ensemble_t4': 'logit_t4', 'mealv2_adversarial': 'mealv2'}
    return tuple(
        Arm(name, label, text, tuned_with.get(name), models=TEACHER_PAIR) for name, (label, text) in options.items()
    )


def _few(count: int, epochs: int) -> tuple[Arm, ...]:
    """Start, teachers and control know `count` labels of 6,000 images; `epochs` of the labeled ones are 240 steps."""
    start = 'start' if count == 2000 else f'start_{count}'
    teachers = tuple((start, seed) for seed in (210, 211))
    control = Arm(f'few_{count}_control', f'{count} labels: cross-entropy', LABELS, 'control', start, epochs)
    alone = Arm(
        f'few_{count}_alone', f'{count} labels: MEAL V2 on these', of_teachers(teachers), 'logit_t1', start, epochs
    )
    rest = replace(alone, name=f'few_{count}_all', label=f'{count} labels: MEAL V2 on all 6,000', epochs=5)
    return tuple(
        replace(arm, models=teachers, control=control.name, data=f'{LABELED}/{folder}')
        for arm, folder in ((control, count), (alone, count), (rest, 6000))
    )


def _student(name: str, label: str, options: str) -> tuple[Arm, Arm]:
    """Control and MEAL V2 of another student. One of another family tunes its own learning rates."""
    tuned = ('control', 'logit_t1') if label.endswith('wide') else (None, None)
    control = Arm(
        f'{name}_control',
        f'{label}: cross-entropy',
        f'{options} {LABELS}',
        tuned[0],
        f'start_{name}',
        models=TEACHER_PAIR,
    )
    control = replace(control, control=control.name)
    mealv2 = replace(
        control,
        name=f'{name}_mealv2',
        label=f'{label}: MEAL V2',
        options=f'{options} {MEALV2} {WITHOUT}',
        lr=tuned[1],
    )
    return control, mealv2


def _transfer() -> tuple[Arm, ...]:
    """240 steps on 200 digits: of all weights, or of a linear classifier alone on what the network gives."""
    digits = Arm(
        'digits_scratch',
        'from scratch',
        f'{DIGITS.options} {LABELS}',
        start='',
        epochs=120,
        data=DIGITS.folder,
        measured=DIGITS,
    )
    anew = f'{DIGITS.options} {LABELS} --head-init-scale 0 --head-init-bias 0'
    # Layer decay takes every layer but the last below what is trained.
    probe = f'{anew} --freeze-bn --layer-decay 0.1 --layer-decay-no-opt-scale 0.5'
    arms = [digits]
    for way, options in (('fine-tuned', anew), ('linear probe', probe)):
        plain = f'digits_plain_{way.split()[-1]}'
        for start in ('plain', 'distilled'):
            arms.append(
                replace(
                    digits,
                    name=plain.replace('plain', start),
                    label=f'{way}: {start}',
                    options=options,
                    start=start,
                    models=TEACHER_PAIR,
                    control=plain,
                )
            )
    return tuple(arms)


def _photos() -> tuple[Arm, ...]:
    """The first methods of study A on squares of photos."""
    teachers = f'--teachers {PHOTOS.teacher} {NO_LABELS}'
    options = {
        'control': ('control, cross-entropy', LABELS),
        'without': ('MEAL V2 without discriminator', f'{teachers} {WITHOUT}'),
        'official': ('MEAL V2, official discriminator', teachers),
        'logit': (
            'logit distillation, ensemble, T = 4, half labels',
            f'{_LOGIT} {PHOTOS.teacher} --kd-temperature 4 --task-loss-weight 0.5 {LABELS}',
        ),
    }
    return tuple(
        Arm(
            f'photos_{name}',
            label,
            f'{PHOTOS.options} {text}',
            start='photos_start',
            models=(('photos_teacher', 10), ('photos_teacher', 11)),
            data=PHOTOS.folder,
            measured=PHOTOS,
        )
        for name, (label, text) in options.items()
    )


AUGMENTED_ARM = Arm(
    'augmented',
    'with RandAugment and CutMix, live teachers',
    f'{MEALV2} {WITHOUT} {AUGMENTED}',
    'logit_t1',
    models=TEACHER_PAIR,
)

STUDIES: dict[str, tuple[Arm, ...]] = {
    'methods': _methods(),
    'discriminator': (
        Arm('off', 'none', f'{MEALV2} {WITHOUT}', 'mealv2', models=TEACHER_PAIR),
        *(
            Arm(
                f'{mode}_{weight}',
                f'{mode}, weight {weight}',
                f'{MEALV2} --discriminator-mode {mode} --discriminator-weight {weight}',
                'mealv2',
                models=TEACHER_PAIR,
            )
            for weight in ('10', '0.1')
            for mode in ('official', 'adversarial')
        ),
    ),
    'recipe': (
        *(
            Arm(
                f'decay_{decay}',
                f'weight decay {decay}',
                f'{MEALV2} --weight-decay {decay}',
                'mealv2',
                models=TEACHER_PAIR,
            )
            for decay in ('5e-4', '1e-4', '1e-5')
        ),
        Arm('scratch', 'from scratch', MEALV2, 'mealv2', '', models=TEACHER_PAIR),
        Arm(
            'step',
            'step: tenfold down after 8 of 15 epochs',
            f'{MEALV2} --sched step --decay-epochs 8',
            'mealv2',
            models=TEACHER_PAIR,
        ),
        Arm(
            'slow_discriminator',
            "discriminator's learning rate a tenth",
            f'{MEALV2} --discriminator-lr-scale 0.1',
            'mealv2',
            models=TEACHER_PAIR,
        ),
    ),
    'teachers': (
        *(
            Arm(
                f'hard_{weight}',
                f'2 equal teachers, labels mixed in at {weight}',
                f'{MEALV2} {WITHOUT} --hard-label-weight {weight}',
                'logit_t1',
                models=TEACHER_PAIR,
            )
            for weight in ('0.1', '0.5')
        ),
        *(
            Arm(
                f'equal_{len(models)}',
                f'{len(models)} equal teachers',
                of_teachers(models),
                'logit_t1',
                models=models,
            )
            for models in (tuple(('teacher', seed) for seed in TEACHER_SEEDS[:count]) for count in (3, 5))
        ),
        Arm(
            'unequal',
            'one of them and a weak one',
            of_teachers((TEACHER_PAIR[0], _WEAK)),
            'logit_t1',
            models=(TEACHER_PAIR[0], _WEAK),
        ),
        Arm(
            'unequal_weighted',
            'the same, weighted 4 to 1',
            of_teachers((TEACHER_PAIR[0], _WEAK), '--teacher-weights 4 1'),
            'logit_t1',
            models=(TEACHER_PAIR[0], _WEAK),
        ),
    ),
    'start': (
        Arm(
            'taught_control', 'taught start, then cross-entropy', LABELS, 'control', 'taught_start', models=TEACHER_PAIR
        ),
        Arm('taught', 'taught start', MEALV2, 'mealv2', 'taught_start', models=TEACHER_PAIR),
    ),
    'longer': tuple(
        Arm(f'{arm.name}_long', arm.label, arm.options, arm.lr or arm.name, epochs=3 * EPOCHS, models=TEACHER_PAIR)
        for arm in _methods()
        if arm.name in ('control', 'mealv2_without', 'mixup')
    ),
    'stored': (
        AUGMENTED_ARM,
        *(
            replace(
                AUGMENTED_ARM,
                name=name,
                label=label,
                options=f'{WITHOUT} {NO_LABELS} {AUGMENTED}',
                epochs=epochs,
                labels='augmented_labels',
            )
            for name, label, epochs in (
                ('stored', 'the same, stored labels', EPOCHS),
                ('stored_longer', 'stored labels, as long in processor time', 20),
            )
        ),
    ),
    'few': tuple(arm for count, epochs in ((200, 120), (600, 48), (2000, EPOCHS)) for arm in _few(count, epochs)),
    'transfer': _transfer(),
    'photos': _photos(),
    'students': tuple(arm for name, student in STUDENTS.items() for arm in _student(name, *student)),
}
