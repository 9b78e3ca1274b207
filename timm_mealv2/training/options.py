"""The options of the training program: timm's by their names, types and defaults, and MEAL V2's own."""

import argparse
from typing import Any

from timm.utils import ParseKwargs

from timm_mealv2.command_line import (
    AMP,
    AUGMENTATION,
    BELOW_1,
    COUNT,
    COUNT_OR_0,
    DATA,
    DEVICE,
    INPUT,
    INTERPOLATIONS,
    NOT_NEGATIVE,
    PER_SAMPLE,
    POSITIVE,
    PROBABILITY,
    SEED,
    TEACHERS,
    TRAIN_SPLIT,
    UNLABELED,
    VAL_SPLIT,
    OneLineParser,
    Option,
    add_options,
    experiment_text,
    file_text,
    flag,
    model_text,
    number,
    one_of,
    optimizer_text,
)
from timm_mealv2.losses import LABEL_RESTS


class _KeyValues(ParseKwargs):
    """timm's action for KEY=VALUE, which a text without '=' makes fail with a traceback."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        for value in values:
            if '=' not in value:
                raise argparse.ArgumentError(self, f'expected KEY=VALUE, got {value!r}')
        super().__call__(parser, namespace, values, option_string)


_OURS = (
    *TEACHERS,
    PER_SAMPLE,
    Option(
        '--teacher-device', str, "cuda:1, cpu, or cuda:+N, each process's index + N (default: the student's device)"
    ),
    flag('--teacher-compile', 'torch.compile for each teacher'),
    Option('--discriminator-weight', NOT_NEGATIVE, "weight of the discriminator's loss; 0 builds none", 1.0),
    Option(
        '--discriminator-mode',
        str,
        "official: the authors' code; adversarial: reversed gradient",
        'official',
        choices=('official', 'adversarial'),
    ),
    Option('--discriminator-lr-scale', NOT_NEGATIVE, "discriminator's learning rate relative to the student's", 1.0),
    Option('--discriminator-reduction', COUNT, 'width reduction of the discriminator from layer to layer', 8),
    Option('--hard-label-weight', NOT_NEGATIVE, 'weight of the label loss', 0.0),
    Option('--soft-labels', str, 'train on predictions stored by mealv2-softlabels', metavar='DIR'),
    UNLABELED,
    Option('--label-rest', str, 'how to treat probability outside the stored top-K', 'uniform', choices=LABEL_RESTS),
    flag('--allow-pixel-change', help='train on samples whose pixels are not the recorded ones, and count them'),
    Option('--total-batch-size', COUNT, 'global batch size per optimizer step, in place of --batch-size'),
    Option('--recipe', str, 'settings of a recipe (see --list-recipes); command-line options override them'),
    flag('--list-recipes', help='print the recipes and stop'),
    Option(
        '-c --config', str, 'YAML file of settings, such as args.yaml; command-line options override it', metavar='FILE'
    ),
    flag('--dry-run', help='estimate the time in half a minute, write nothing'),
    flag('--no-preflight', help='skip the evaluation of teachers and student before training'),
)

_DISTILLATION = (
    Option('--kd-model-name', str, 'the same as --teachers, separated by commas', metavar='A,B'),
    Option(
        '--kd-distill-type',
        str,
        "mealv2, or timm's own logit or feature (token is refused)",
        'mealv2',
        choices=['mealv2', 'logit', 'feature', 'token'],
    ),
    Option('--kd-loss-type', one_of('kl'), 'logit: its loss, kl', 'kl'),
    Option('--distill-loss-weight', NOT_NEGATIVE, "timm's tasks: weight of the distillation loss"),
    Option('--task-loss-weight', NOT_NEGATIVE, "timm's tasks: weight of the label loss"),
    Option('--kd-temperature', POSITIVE, 'logit: temperature', 4.0),
    Option('--kd-student-feature-dim', COUNT, "feature: width of the student's features"),
    Option('--kd-teacher-feature-dim', COUNT, "feature: width of the teacher's features"),
)

_DATA = (
    Option('data', None, 'the data set, as --data-dir', nargs='?', metavar='DATA'),
    *DATA,
    TRAIN_SPLIT,
    VAL_SPLIT,
    Option('--train-num-samples', COUNT, 'size of a training split that does not tell it'),
    Option('--val-num-samples', COUNT, 'size of a validation split that does not tell it'),
    Option('--samples-per-decode', COUNT, 'samples drawn from each decoded image', 1),
)

_MODEL = (
    Option('--model', model_text, 'the model to train, the student', 'resnet50'),
    flag('--pretrained', help='begin with the pretrained weights of its tag'),
    Option('--pretrained-path', file_text, 'begin with these pretrained weights', metavar='FILE'),
    Option('--initial-checkpoint', str, 'begin with (EMA) weights, named as a teacher is', '', metavar='MODEL'),
    Option('--resume', str, 'checkpoint to resume; auto: the newest of the run', '', metavar='FILE'),
    flag('--no-resume-opt', help='do not restore optimizer and loss scaler'),
    *INPUT,
    Option('--gp', str, 'global pooling: fast, avg, max, avgmax, avgmaxc'),
    Option(
        '--crop-pct', number(float, '0.01 to 1', lambda value: 0.01 <= value <= 1), 'center-crop ratio for evaluation'
    ),
    Option(
        '--interpolation',
        one_of('', *INTERPOLATIONS),
        "interpolation for evaluation (default: the model's)",
        '',
    ),
    Option('-vb --validation-batch-size', COUNT, 'batch size for evaluation, per process (default: --batch-size)'),
    flag('--channels-last', help='channels-last memory format'),
    Option('--grad-accum-steps', COUNT, 'batches per optimizer step', 1),
    flag('--grad-checkpointing', help='recompute activations to save memory'),
    flag('--fast-norm', help="timm's fast normalization layers under AMP"),
    Option('--model-kwargs', None, 'arguments of the model', {}, nargs='*', action=_KeyValues, metavar='K=V'),
    Option('--head-init-scale', NOT_NEGATIVE, "factor on the classifier's initial weights"),
    Option('--head-init-bias', number(float, 'a number', lambda _: True), "the classifier's initial bias"),
    Option('--torchcompile-mode', str, 'mode of torch.compile'),
    Option('--torchcompile', str, 'compile with this backend; inductor if none is named', nargs='?', const='inductor'),
)

_DEVICE = (
    *DEVICE,
    *AMP,
    Option(
        '--model-dtype',
        one_of('float32', 'float16', 'bfloat16'),
        'type of weights and images: float32, float16, bfloat16',
    ),
    flag('--no-ddp-bb', help='do not broadcast buffers in each step of DDP'),
    flag('--find-unused-parameters', help='for a student with parameters that get no gradient, under DDP'),
    flag('--synchronize-step', help='wait for the device after each step'),
    Option('--device-modules', str, 'modules to import first', nargs='+'),
)

_OPTIMIZER = (
    Option('--opt', optimizer_text, 'optimizer of timm.optim.list_optimizers()', 'sgd'),
    Option('--opt-eps', NOT_NEGATIVE, "epsilon of the optimizer (default: the optimizer's)"),
    Option('--opt-betas', BELOW_1, "betas of the optimizer (default: the optimizer's)", nargs='+'),
    Option('--momentum', NOT_NEGATIVE, 'momentum of the optimizer', 0.9),
    Option('--weight-decay', NOT_NEGATIVE, 'weight decay', 2e-5),
    Option('--clip-grad', POSITIVE, 'gradient clipping threshold (default: no clipping)'),
    Option('--clip-mode', one_of('norm', 'value', 'agc'), 'gradient clipping: norm, value or agc', 'norm'),
    Option('--layer-decay', POSITIVE, 'layer-wise learning rate decay'),
    Option('--layer-decay-min-scale', NOT_NEGATIVE, 'smallest factor of --layer-decay', 0),
    Option('--layer-decay-no-opt-scale', NOT_NEGATIVE, 'layers whose factor is smaller are not trained'),
    Option('--opt-kwargs', None, 'arguments of the optimizer', {}, nargs='*', action=_KeyValues, metavar='K=V'),
)

_SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'poly', 'plateau', 'wsd', 'rsqrt', 'constant', 'none')
_SCHEDULE = (
    Option('--sched', one_of(*_SCHEDULES), ', '.join(_SCHEDULES[1:]), 'cosine'),
    flag('--sched-on-updates', help='set the learning rate each update, not each epoch'),
    Option('--lr', NOT_NEGATIVE, 'learning rate (default: --lr-base, scaled by the batch size)'),
    Option('--lr-base', POSITIVE, 'learning rate for --lr-base-size images', 0.1),
    Option('--lr-base-size', COUNT, 'global batch size that --lr-base is for', 256),
    Option(
        '--lr-base-scale',
        one_of('', 'linear', 'sqrt'),
        "linear or sqrt in the batch size; '' chooses by the optimizer",
        '',
    ),
    Option('--lr-noise', PROBABILITY, 'start and end of learning rate noise, as shares of the training', nargs='+'),
    Option('--lr-noise-pct', NOT_NEGATIVE, 'limit of learning rate noise', 0.67),
    Option('--lr-noise-std', NOT_NEGATIVE, 'standard deviation of learning rate noise', 1.0),
    Option('--lr-cycle-mul', POSITIVE, 'length multiplier of each further cycle', 1.0),
    Option('--lr-cycle-decay', NOT_NEGATIVE, 'learning rate factor of each further cycle', 0.5),
    Option('--lr-cycle-limit', COUNT, 'number of cycles', 1),
    Option('--lr-k-decay', POSITIVE, 'k of cosine and poly', 1.0),
    Option('--warmup-lr', NOT_NEGATIVE, 'initial learning rate of the warm-up', 1e-5),
    Option('--min-lr', NOT_NEGATIVE, 'lower bound of the learning rate', 0),
    Option('--epochs', COUNT, 'epochs to train', 300),
    Option('--epoch-repeats', NOT_NEGATIVE, 'repeats of a streaming data set per epoch', 0.0),
    Option('--start-epoch', COUNT_OR_0, 'first epoch, in place of that of the checkpoint'),
    Option('--decay-milestones', COUNT_OR_0, 'epochs at which multistep decays', [90, 180, 270], nargs='+'),
    Option('--decay-epochs', POSITIVE, 'epochs between decays', 90),
    Option('--warmup-epochs', COUNT_OR_0, 'epochs of warm-up', 5),
    flag('--warmup-prefix', help='train for the warm-up and then for all of --epochs'),
    Option('--cooldown-epochs', COUNT_OR_0, 'epochs at the minimum learning rate, at the end', 0),
    Option('--patience-epochs', COUNT_OR_0, 'epochs without improvement before plateau decays', 10),
    Option('--decay-rate --dr', POSITIVE, 'decay factor; power of poly', 0.1),
)

_REGULARIZATION = (
    flag('--bce-loss', help='binary cross-entropy'),
    flag('--bce-sum', help='binary cross-entropy: sum over the classes, not the mean'),
    Option('--bce-target-thresh', PROBABILITY, 'threshold that makes soft targets hard'),
    Option('--bce-pos-weight', POSITIVE, 'weight of the positive class'),
    Option('--smoothing', BELOW_1, 'label smoothing', 0.1),
    Option('--drop', BELOW_1, 'dropout', 0.0),
    Option('--drop-connect', BELOW_1, 'older name of --drop-path'),
    Option('--drop-path', BELOW_1, 'stochastic depth'),
    Option('--drop-block', BELOW_1, 'DropBlock'),
)

_BATCH_NORM = (
    Option('--bn-momentum', PROBABILITY, 'momentum of batch norm'),
    Option('--bn-eps', POSITIVE, 'epsilon of batch norm'),
    flag('--freeze-bn', help="keep the student's initial batch norm statistics"),
    flag('--sync-bn', help='synchronize batch norm over the processes'),
    Option(
        '--dist-bn',
        one_of('', 'reduce', 'broadcast'),
        "batch norm statistics after each epoch: reduce, broadcast or ''",
        'reduce',
    ),
)

_EMA = (
    flag('--model-ema', help='keep an exponential moving average (EMA) of the weights'),
    flag('--model-ema-force-cpu', help='keep the EMA on the CPU, and do not evaluate it'),
    Option('--model-ema-decay', PROBABILITY, 'decay of the EMA', 0.9998),
    flag('--model-ema-warmup', help='smaller EMA decay at first'),
)

_RUN = (
    Option('--seed', SEED, 'random seed', 42),
    Option('--log-interval', COUNT, 'batches between log lines', 50),
    Option('--val-interval', COUNT, 'epochs between evaluations', 1),
    Option('--recovery-interval', COUNT_OR_0, 'optimizer steps between recovery checkpoints; 0 for none', 0),
    Option('--checkpoint-hist', COUNT, 'checkpoints to keep', 10),
    flag('--save-images', help='save a batch of images with each line of the log'),
    flag('--pin-mem', help='pin batches in memory'),
    flag('--no-prefetcher', help='normalize on the CPU, not on the device'),
    Option('--output', str, 'folder of the experiments (default: output/train)', '', metavar='DIR'),
    Option('--experiment', experiment_text, 'run folder in --output (default: date and model)', ''),
    Option('--eval-metric', one_of('top1', 'top5', 'loss'), 'ranks the checkpoints: top1, top5 or loss', 'top1'),
    flag('--log-wandb', help='log to Weights & Biases'),
    Option('--wandb-project', str, 'project at Weights & Biases'),
    Option('--wandb-tags', str, 'tags of the run at Weights & Biases', [], nargs='+'),
    Option('--wandb-resume-id', str, 'run to continue there; a resumed run knows its own', ''),
    flag('--resume-changed', help='resume although seed, teachers or data set differ from the checkpoint'),
    Option('--max-bad-images', COUNT_OR_0, 'unreadable images to tolerate', 100),
    Option('--process-timeout', POSITIVE, "torch's timeout of collective calls, in minutes", 30.0),
    Option('--push-to-hub', str, 'push the best model to the Hub at the end', metavar='USER/NAME'),
    flag('--log-tensorboard', help='log to TensorBoard, in the run folder'),
)

_NO_EFFECT = (
    Option('--local_rank', COUNT_OR_0, "torchrun's environment counts", 0),
    Option('--worker-seeding', one_of('all', 'part'), 'every sample is seeded by itself', 'all'),
    flag('--use-multi-epochs-loader', help='workers are always kept from epoch to epoch'),
)

_TORCHSCRIPT = 'TorchScript cannot hold a training task; use --torchcompile'
_NAFLEX = 'teachers and loaders work on images'
_ONE_SIZE = 'teachers, stored labels and samples have one image size a run'
_ONE_IMAGE = 'every model sees one and the same augmented image of a sample'
_OTHER_TASK = "timm's train.py distils tokens"
REFUSED = (
    Option('--fuser', str, _TORCHSCRIPT, ''),
    flag('--torchscript', help=_TORCHSCRIPT),
    Option('--tta', COUNT_OR_0, "timm's loaders make no copies of an image to average", 0),
    flag('--naflex-loader', help=_NAFLEX),
    Option('--naflex-train-seq-lens', int, _NAFLEX, [128, 256, 576, 784, 1024], nargs='+'),
    Option('--naflex-max-seq-len', int, _NAFLEX, 576),
    Option('--naflex-patch-sizes', int, _NAFLEX, nargs='+'),
    Option('--naflex-patch-size-probs', float, _NAFLEX, nargs='+'),
    Option('--naflex-loss-scale', str, _NAFLEX, 'linear', choices=['none', 'sqrt', 'linear']),
    flag('--naflex-patchify-channels-first', help=_NAFLEX),
    Option('--train-img-sizes', int, _ONE_SIZE, nargs='+'),
    Option('--train-batch-sizes', int, _ONE_SIZE, nargs='+'),
    Option('--train-size-probs', float, _ONE_SIZE, nargs='+'),
    Option('--train-size-schedule', str, _ONE_SIZE, 'constant', choices=['constant', 'progressive']),
    Option('--train-size-schedule-spread', float, _ONE_SIZE, 0.65),
    Option('--train-size-random-mix', float, _ONE_SIZE, 0.1),
    Option('--train-batches-per-epoch --train-steps-per-epoch', int, _ONE_SIZE),
    Option('--variable-batch-loss-scale', str, _ONE_SIZE, 'none', choices=['none', 'sqrt', 'linear']),
    Option('--aug-repeats', float, 'an epoch shows each image once', 0),
    Option('--aug-splits', int, _ONE_IMAGE, 0),
    flag('--jsd-loss', help=_ONE_IMAGE),
    flag('--split-bn', help=_ONE_IMAGE),
    flag('--resplit', help=_ONE_IMAGE),
    Option('--kd-token-distill-type', str, _OTHER_TASK, 'soft', choices=['soft', 'hard']),
)
"""timm's options that are refused, and why."""

GROUPS: dict[str, tuple[Option, ...]] = {
    'mealv2': _OURS,
    'distillation': _DISTILLATION,
    'data': _DATA,
    'model': _MODEL,
    'device': _DEVICE,
    'optimizer': _OPTIMIZER,
    'schedule': _SCHEDULE,
    'augmentation': AUGMENTATION,
    'regularization': _REGULARIZATION,
    'batch-norm': _BATCH_NORM,
    'ema': _EMA,
    'run': _RUN,
    'no-effect': _NO_EFFECT,
    'refused': REFUSED,
}
"""Group, as `--help GROUP` names it -> its options."""

BEGIN = """\
mealv2-train trains an image classifier, the student, on what one or more teachers predict. It needs three options:

  --data-dir DIR         images as DIR/train/CLASS/* and DIR/validation/CLASS/*
  --model NAME           the student, a model of timm
  --teachers NAME ...    models of timm with their tag, checkpoints, or exported folders

as in

  mealv2-train --data-dir DIR --model resnet18 --pretrained --teachers resnet50.a1_in1k resnet101.a1_in1k --dry-run

--dry-run estimates the time in half a minute. To see a whole training first, in a clone of the repository:

  python examples/fashion_mnist/quickstart.py

mealv2-train --list-recipes lists the recipes, mealv2-train --help the options.
"""


class _Help(argparse.Action):
    """`--help` shows how to begin and MEAL V2's options, `--help GROUP` those of a group, `--help all` all."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        groups = ', '.join(GROUPS)
        if values not in (None, 'all', *GROUPS):
            raise argparse.ArgumentError(self, f'there is no group {values!r}: all, {groups}')
        shown = GROUPS if values == 'all' else [values or 'mealv2']
        if values is None:
            print(BEGIN)
        for group in parser._action_groups:
            if group.title in shown:
                formatter = parser._get_formatter()
                formatter.start_section(group.title)
                formatter.add_text(group.description)
                formatter.add_arguments(group._group_actions)
                formatter.end_section()
                print(formatter.format_help())
        if values is None:
            formatter = parser._get_formatter()
            formatter.add_text(f'--help GROUP shows the options of a group, --help all those of all: {groups}')
            print(formatter.format_help(), end='')
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Return a fresh parser of every option; those of timm's train.py have its names, types and defaults."""
    parser = OneLineParser(
        prog='mealv2-train',
        usage='%(prog)s [OPTION ...] [DATA]',
        description='Train an image classifier on the predictions of an ensemble of teachers (MEAL V2), or without.',
        add_help=False,
    )
    text = 'how to begin; the options of a GROUP, or of all'
    parser.add_argument('-h', '--help', nargs='?', action=_Help, default=argparse.SUPPRESS, metavar='GROUP', help=text)
    for title, options in GROUPS.items():
        add_options(parser.add_argument_group(title, 'refused, and why' if title == 'refused' else None), options)
    return parser
