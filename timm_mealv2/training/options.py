"""The options of the training program: timm's by their names, types and defaults, and MEAL V2's own."""

import argparse
from typing import Any

from timm.utils import ParseKwargs

from timm_mealv2.command_line import (
    AUGMENTATION,
    DATA,
    DEVICE,
    INPUT,
    INTERPOLATIONS,
    TEACHERS,
    TRAIN_SPLIT,
    TUNING,
    OneLineParser,
    Option,
    add_options,
    flag,
)
from timm_mealv2.losses import LABEL_RESTS
from timm_mealv2.option_types import (
    COUNT,
    COUNT_OR_0,
    NOT_NEGATIVE,
    PIXELS,
    POSITIVE,
    PROBABILITY,
    SEED,
    OneOf,
    Range,
    experiment_text,
    file_text,
    model_text,
    optimizer_text,
)

_BELOW_1 = Range(float, 0, below=1)
_FINITE = Range(float)


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
            if not value.partition('=')[0].isidentifier() or '=' not in value:
                raise argparse.ArgumentError(self, f'expected KEY=VALUE, got {value!r}')
        try:
            super().__call__(parser, namespace, values, option_string)
        except (MemoryError, RecursionError, TypeError) as error:  # the value is no Python literal
            raise argparse.ArgumentError(self, f'expected KEY=VALUE, got {" ".join(values)!r}: {error}') from None


_OURS = (
    *TEACHERS,
    *TUNING,
    Option('--discriminator-weight', NOT_NEGATIVE, 'W', "weight of the discriminator's loss; 0 builds none", 1.0),
    Option(
        '--discriminator-mode',
        str,
        'MODE',
        "official: the authors' code; adversarial: reversed gradient",
        'official',
        choices=('official', 'adversarial'),
    ),
    Option('--discriminator-lr-scale', NOT_NEGATIVE, 'X', "the discriminator's learning rate over the student's", 1.0),
    Option('--discriminator-reduction', COUNT, 'N', 'divides the width of the discriminator from layer to layer', 8),
    Option('--hard-label-weight', NOT_NEGATIVE, 'W', 'weight of the loss on the labels', 0.0),
    Option('--soft-labels', str, 'DIR', 'train on predictions stored by mealv2-softlabels'),
    flag('--unlabeled', help='discard the labels: any folder of images will do'),
    Option('--samples-per-decode', COUNT, 'R', 'samples each time an image is decoded', 1),
    Option(
        '--label-rest',
        str,
        'HOW',
        f'soft labels: the other classes: {", ".join(LABEL_RESTS)}',
        'uniform',
        choices=LABEL_RESTS,
    ),
    flag('--allow-pixel-change', help='soft labels: accept images that are decoded to slightly other pixels'),
    Option('--total-batch-size', COUNT, 'IMAGES', 'images of an update over all processes, in place of --batch-size'),
    Option('--recipe', str, 'NAME', 'settings of a published training as defaults'),
    flag('--list-recipes', help='print the recipes and stop'),
    Option('-c --config', str, 'FILE', 'YAML file of settings as defaults, such as args.yaml'),
    flag('--dry-run', help='print the settings, time the training for a while, write nothing'),
    Option('--dry-run-seconds', NOT_NEGATIVE, 'SECONDS', 'how long --dry-run measures', 20.0),
    flag('--no-preflight', help='do not evaluate teachers and student before the first step'),
    flag('--resume-changed', help='resume although seed, teachers or data set differ from the checkpoint'),
    Option('--max-bad-images', COUNT_OR_0, 'N', 'unreadable images that are tolerated', 100),
    Option('--max-nonfinite', COUNT, 'N', 'skipped updates in a row that stop the run', 10),
    Option('--process-timeout', POSITIVE, 'MINUTES', 'how long a process waits for the others', 30.0),
    Option('--push-to-hub', str, 'USER/NAME', 'push the best model to the Hub at the end'),
    flag('--log-tensorboard', help='log to TensorBoard, in the run folder'),
)

_DISTILLATION = (
    Option('--kd-model-name', str, 'A,B', 'the same as --teachers, separated by commas'),
    Option(
        '--kd-distill-type',
        str,
        'TASK',
        "mealv2, or timm's own logit, feature or token",
        'mealv2',
        choices=['mealv2', 'logit', 'feature', 'token'],
    ),
    Option('--kd-loss-type', OneOf('kl'), 'LOSS', 'logit: its loss, kl', 'kl'),
    Option('--distill-loss-weight', NOT_NEGATIVE, 'W', "timm's tasks: weight of distillation"),
    Option('--task-loss-weight', NOT_NEGATIVE, 'W', "timm's tasks: weight of the loss on the labels"),
    Option('--kd-temperature', POSITIVE, 'T', 'logit, token: temperature', 4.0),
    Option('--kd-student-feature-dim', COUNT, 'N', "feature: width of the student's features"),
    Option('--kd-teacher-feature-dim', COUNT, 'N', "feature: width of the teacher's features"),
    Option('--kd-token-distill-type', str, 'KIND', 'token: targets, soft or hard', 'soft', choices=['soft', 'hard']),
)

_DATA = (
    Option('data', None, 'DATA', 'folder or tar of the data set, as --data-dir', nargs='?'),
    *DATA,
    TRAIN_SPLIT,
    Option('--val-split', None, 'NAME', 'validation split', 'validation'),
    Option('--train-num-samples', COUNT, 'N', 'size of a training split that does not tell it'),
    Option('--val-num-samples', COUNT, 'N', 'size of a validation split that does not tell it'),
)

_MODEL = (
    Option('--model', model_text, 'NAME', 'the model to train, the student', 'resnet50'),
    flag('--pretrained', help='begin with the pretrained weights of its tag'),
    Option('--pretrained-path', file_text, 'FILE', 'begin with these pretrained weights'),
    Option('--initial-checkpoint', file_text, 'FILE', "begin with a checkpoint's (EMA) weights", ''),
    Option('--resume', str, 'FILE', 'checkpoint to resume; auto: the newest of the run', ''),
    flag('--no-resume-opt', help='do not restore optimizer and loss scaler'),
    *INPUT,
    Option('--gp', str, 'POOL', 'global pooling: fast, avg, max, avgmax, avgmaxc'),
    Option('--crop-pct', Range(float, 0.01, 1), 'SHARE', 'share of the image in evaluation'),
    Option(
        '--interpolation',
        OneOf('', *INTERPOLATIONS),
        'NAME',
        "interpolation of the evaluation; the model's own if not given",
        '',
    ),
    Option('-vb --validation-batch-size', COUNT, 'IMAGES', 'images of a batch of the evaluation, per process'),
    flag('--channels-last', help='channels-last memory format'),
    Option('--fuser', str, 'NAME', 'refused: TorchScript alone has fusers', ''),
    Option('--grad-accum-steps', COUNT, 'BATCHES', 'batches that make up one update', 1),
    flag('--grad-checkpointing', help='recompute activations to save memory'),
    flag('--fast-norm', help="timm's fast normalization layers under AMP"),
    Option('--model-kwargs', None, 'K=V', 'arguments of the model', {}, nargs='*', action=_KeyValues),
    Option('--head-init-scale', NOT_NEGATIVE, 'X', "factor on the classifier's initial weights"),
    Option('--head-init-bias', _FINITE, 'X', "the classifier's initial bias"),
    Option('--torchcompile-mode', str, 'MODE', 'mode of torch.compile'),
    flag('--torchscript', help='refused: TorchScript cannot hold the task'),
    Option(
        '--torchcompile',
        str,
        'BACKEND',
        'compile with this backend; inductor if none is named',
        nargs='?',
        const='inductor',
    ),
)

_RUN_ON = (
    *DEVICE,
    flag('--amp', help='mixed precision'),
    Option(
        '--amp-dtype', OneOf('float16', 'bfloat16'), 'TYPE', 'type of mixed precision: float16 or bfloat16', 'float16'
    ),
    Option(
        '--model-dtype',
        OneOf('float32', 'float16', 'bfloat16'),
        'TYPE',
        'type of weights and images: float32, float16, bfloat16',
    ),
    flag('--no-ddp-bb', help='do not broadcast buffers in each step of DDP'),
    flag('--synchronize-step', help='wait for the device after each step'),
    Option('--local_rank', COUNT_OR_0, 'N', "no effect: torchrun's environment counts", 0),
    Option('--device-modules', str, 'MODULE', 'modules to import first', nargs='+'),
)

_OPTIMIZER = (
    Option('--opt', optimizer_text, 'NAME', 'optimizer of timm.optim.list_optimizers()', 'sgd'),
    Option('--opt-eps', NOT_NEGATIVE, 'X', "epsilon of the optimizer; the optimizer's own if not given"),
    Option('--opt-betas', _BELOW_1, 'BETA', "betas of the optimizer; the optimizer's own if not given", nargs='+'),
    Option('--momentum', NOT_NEGATIVE, 'X', 'momentum of the optimizer', 0.9),
    Option('--weight-decay', NOT_NEGATIVE, 'X', 'weight decay', 2e-5),
    Option('--clip-grad', POSITIVE, 'X', 'bound of the gradient; not clipped if not given'),
    Option('--clip-mode', OneOf('norm', 'value', 'agc'), 'MODE', 'norm, value or agc', 'norm'),
    Option('--layer-decay', POSITIVE, 'X', 'factor on the learning rate from layer to layer'),
    Option('--layer-decay-min-scale', NOT_NEGATIVE, 'X', 'smallest factor of --layer-decay', 0),
    Option('--layer-decay-no-opt-scale', NOT_NEGATIVE, 'X', 'layers whose factor is smaller are not trained'),
    Option('--opt-kwargs', None, 'K=V', 'arguments of the optimizer', {}, nargs='*', action=_KeyValues),
)

_SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'poly', 'plateau', 'wsd', 'rsqrt', 'constant', 'none')
_SCHEDULE = (
    Option('--sched', OneOf(*_SCHEDULES), 'NAME', ', '.join(_SCHEDULES[1:]), 'cosine'),
    flag('--sched-on-updates', help='set the learning rate each update, not each epoch'),
    Option('--lr', NOT_NEGATIVE, 'LR', 'learning rate; from --lr-base and batch size if not given'),
    Option('--lr-base', POSITIVE, 'LR', 'learning rate for --lr-base-size images', 0.1),
    Option('--lr-base-size', COUNT, 'IMAGES', 'images of an update --lr-base is for', 256),
    Option(
        '--lr-base-scale',
        OneOf('', 'linear', 'sqrt'),
        'HOW',
        "linear or sqrt in the batch size; '' chooses by the optimizer",
        '',
    ),
    Option('--lr-noise', PROBABILITY, 'SHARE', 'shares of the run with a noisy rate', nargs='+'),
    Option('--lr-noise-pct', NOT_NEGATIVE, 'SHARE', 'bound of the noise', 0.67),
    Option('--lr-noise-std', NOT_NEGATIVE, 'STD', 'standard deviation of the noise', 1.0),
    Option('--lr-cycle-mul', POSITIVE, 'X', 'factor on the length of the next cycle', 1.0),
    Option('--lr-cycle-decay', NOT_NEGATIVE, 'X', 'factor on the rate of the next cycle', 0.5),
    Option('--lr-cycle-limit', COUNT, 'N', 'number of cycles', 1),
    Option('--lr-k-decay', POSITIVE, 'K', 'k of cosine and poly', 1.0),
    Option('--warmup-lr', NOT_NEGATIVE, 'LR', 'learning rate the warm-up begins with', 1e-5),
    Option('--min-lr', NOT_NEGATIVE, 'LR', 'smallest learning rate', 0),
    Option('--epochs', COUNT, 'EPOCHS', 'length of the training', 300),
    Option('--epoch-repeats', NOT_NEGATIVE, 'N', 'repeats of a streaming set an epoch', 0.0),
    Option('--start-epoch', COUNT_OR_0, 'EPOCH', 'number of the first epoch'),
    Option('--decay-milestones', COUNT_OR_0, 'EPOCH', 'epochs at which multistep decays', [90, 180, 270], nargs='+'),
    Option('--decay-epochs', POSITIVE, 'EPOCHS', 'epochs from step to step', 90),
    Option('--warmup-epochs', COUNT_OR_0, 'EPOCHS', 'length of the warm-up', 5),
    flag('--warmup-prefix', help='train for the warm-up and then for all of --epochs'),
    Option('--cooldown-epochs', COUNT_OR_0, 'EPOCHS', 'epochs at the smallest rate, at the end', 0),
    Option('--patience-epochs', COUNT_OR_0, 'EPOCHS', 'epochs without progress before plateau acts', 10),
    Option('--decay-rate --dr', POSITIVE, 'X', 'factor of a step; power of poly', 0.1),
)

_REGULARIZATION = (
    Option('--aug-repeats', NOT_NEGATIVE, 'N', 'repeats of an image among the processes', 0),
    Option('--aug-splits', COUNT_OR_0, 'N', 'augmentation splits, 2 or more; 0 for none', 0),
    flag('--jsd-loss', help='Jensen-Shannon loss over the splits'),
    flag('--bce-loss', help='binary cross-entropy'),
    flag('--bce-sum', help='binary cross-entropy: sum over the classes, not the mean'),
    Option('--bce-target-thresh', PROBABILITY, 'P', 'threshold that makes soft targets hard'),
    Option('--bce-pos-weight', POSITIVE, 'W', 'weight of the positive class'),
    flag('--resplit', help='do not erase the first split'),
    Option('--smoothing', _BELOW_1, 'SHARE', 'label smoothing', 0.1),
    Option('--drop', _BELOW_1, 'P', 'dropout', 0.0),
    Option('--drop-connect', _BELOW_1, 'P', 'older name of --drop-path'),
    Option('--drop-path', _BELOW_1, 'P', 'stochastic depth'),
    Option('--drop-block', _BELOW_1, 'P', 'DropBlock'),
)

_BATCH_NORM = (
    Option('--bn-momentum', PROBABILITY, 'X', 'momentum of batch norm'),
    Option('--bn-eps', POSITIVE, 'X', 'epsilon of batch norm'),
    flag('--freeze-bn', help='normalize with the statistics that the student begins with; they stay'),
    flag('--sync-bn', help='synchronize batch norm over the processes'),
    Option(
        '--dist-bn',
        OneOf('', 'reduce', 'broadcast'),
        'HOW',
        "statistics after an epoch: reduce, broadcast or ''",
        'reduce',
    ),
    flag('--split-bn', help='batch norm for each augmentation split'),
    flag('--model-ema', help='keep a moving average (EMA) of the weights'),
    flag('--model-ema-force-cpu', help='keep the average on the CPU, and do not evaluate it'),
    Option('--model-ema-decay', PROBABILITY, 'X', 'decay of the average', 0.9998),
    flag('--model-ema-warmup', help='smaller decay at first'),
)

_MISCELLANEOUS = (
    Option('--seed', SEED, 'N', 'seed of everything random', 42),
    Option('--worker-seeding', OneOf('all', 'part'), 'HOW', 'no effect: every sample is seeded by itself', 'all'),
    Option('--log-interval', COUNT, 'BATCHES', 'batches from line to line of the log', 50),
    Option('--val-interval', COUNT, 'EPOCHS', 'epochs from evaluation to evaluation', 1),
    Option(
        '--recovery-interval',
        COUNT_OR_0,
        'UPDATES',
        'updates from recovery checkpoint to recovery checkpoint; 0 for none',
        0,
    ),
    Option('--checkpoint-hist', COUNT, 'N', 'checkpoints to keep', 10),
    flag('--save-images', help='save a batch of images with each line of the log'),
    flag('--pin-mem', help='pin batches in memory'),
    flag('--no-prefetcher', help='normalize on the CPU, not on the device'),
    Option('--output', str, 'DIR', 'folder of the experiments; output/train if not given', ''),
    Option('--experiment', experiment_text, 'NAME', 'the run folder in --output; else date-model', ''),
    Option('--eval-metric', OneOf('top1', 'top5', 'loss'), 'NAME', 'ranks the checkpoints: top1, top5 or loss', 'top1'),
    Option('--tta', COUNT_OR_0, 'N', 'refused from 2 on: no loader makes the copies', 0),
    flag('--use-multi-epochs-loader', help='no effect: workers are always kept from epoch to epoch'),
    flag('--log-wandb', help='log to Weights & Biases'),
    Option('--wandb-project', str, 'NAME', 'project at Weights & Biases'),
    Option('--wandb-tags', str, 'TAG', 'tags of the run at Weights & Biases', [], nargs='+'),
    Option('--wandb-resume-id', str, 'ID', 'run to continue there; a resumed run knows its own', ''),
)

_SIZES = (
    Option('--train-img-sizes', PIXELS, 'PIXELS', 'image sizes, of which each batch has one', nargs='+'),
    Option('--train-batch-sizes', COUNT, 'IMAGES', 'batch size for each image size', nargs='+'),
    Option('--train-size-probs', NOT_NEGATIVE, 'W', 'weight of each image size', nargs='+'),
    Option(
        '--train-size-schedule',
        str,
        'HOW',
        'constant or progressive sizes',
        'constant',
        choices=['constant', 'progressive'],
    ),
    Option('--train-size-schedule-spread', NOT_NEGATIVE, 'X', 'width of the progressive window', 0.65),
    Option('--train-size-random-mix', PROBABILITY, 'P', 'share of other sizes in the progressive window', 0.1),
    Option(
        '--train-batches-per-epoch --train-steps-per-epoch',
        COUNT,
        'BATCHES',
        'length of an epoch, with --train-img-sizes',
    ),
    Option(
        '--variable-batch-loss-scale',
        str,
        'HOW',
        "a batch's loss is weighted by its size: none, sqrt or linear",
        'none',
        choices=['none', 'sqrt', 'linear'],
    ),
    flag('--naflex-loader', help='refused, as all NaFlex options: teachers need images'),
    Option('--naflex-train-seq-lens', int, 'N', 'refused', [128, 256, 576, 784, 1024], nargs='+'),
    Option('--naflex-max-seq-len', int, 'N', 'refused', 576),
    Option('--naflex-patch-sizes', int, 'N', 'refused', nargs='+'),
    Option('--naflex-patch-size-probs', float, 'P', 'refused', nargs='+'),
    Option('--naflex-loss-scale', str, 'HOW', 'refused', 'linear', choices=['none', 'sqrt', 'linear']),
    flag('--naflex-patchify-channels-first', help='refused'),
)

GROUPS: dict[str, tuple[Option, ...]] = {
    'MEAL V2': _OURS,
    'distillation': _DISTILLATION,
    'data set': _DATA,
    'model': _MODEL,
    'device': _RUN_ON,
    'optimizer': _OPTIMIZER,
    'learning rate': _SCHEDULE,
    'augmentation': AUGMENTATION,
    'regularization': _REGULARIZATION,
    'batch norm and moving average': _BATCH_NORM,
    'miscellaneous': _MISCELLANEOUS,
    'changing image sizes': _SIZES,
}


def build_parser() -> argparse.ArgumentParser:
    """Return a fresh parser of every option; those of timm's train.py have its names, types and defaults."""
    parser = OneLineParser(
        prog='mealv2-train',
        usage='%(prog)s [OPTION ...] [DATA]',
        description='Train an image classifier on the predictions of an ensemble of teachers (MEAL V2), or without.',
    )
    for title, options in GROUPS.items():
        add_options(parser.add_argument_group(title), options)
    return parser
