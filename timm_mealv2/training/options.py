"""The options of the training program: timm's by their names, types and defaults, and MEAL V2's own."""

import argparse
from typing import Any

from timm.utils import ParseKwargs

from timm_mealv2.cli.parser import OneLineParser
from timm_mealv2.losses import LABEL_RESTS

_Option = tuple[tuple[str, ...], dict[str, Any]]


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
        except (MemoryError, RecursionError, TypeError) as error:  # a literal that is none
            raise argparse.ArgumentError(self, f'expected KEY=VALUE, got {" ".join(values)!r}: {error}') from None


def _flag(*names: str, help: str) -> _Option:
    return names, {'action': 'store_true', 'help': help}


def _text(*names: str, default: Any = None, help: str, **kwargs: Any) -> _Option:
    return names, {'type': str, 'default': default, 'help': help, **kwargs}


def _int(*names: str, default: Any = None, help: str, **kwargs: Any) -> _Option:
    return names, {'type': int, 'default': default, 'help': help, **kwargs}


def _float(*names: str, default: Any = None, help: str, **kwargs: Any) -> _Option:
    return names, {'type': float, 'default': default, 'help': help, **kwargs}


_OURS: list[_Option] = [
    _text(
        '--teachers',
        nargs='+',
        default=None,
        metavar='TEACHER',
        help='timm names with their tags, hf-hub:USER/REPO, local-dir:FOLDER, ARCHITECTURE=CHECKPOINT or '
        'python:MODULE:FUNCTION',
    ),
    _text(
        '--teacher-classes',
        nargs='+',
        metavar='TEACHER=FILE',
        help="the student's classes among a teacher's: in line k its index of class k (split at the last '=')",
    ),
    _float('--teacher-weights', nargs='+', metavar='WEIGHT', help='one per teacher; equal if not given'),
    _text(
        '--teacher-dtype',
        choices=('float16', 'bfloat16', 'float32'),
        help="autocast of the teachers; without it they run in their weights' dtype",
    ),
    _int('--teacher-img-size', nargs='+', metavar='PIXELS', help='image size for the teachers, for all or for each'),
    _float('--discriminator-weight', default=1.0, help="weight of the discriminator's loss; 0 builds none"),
    _text(
        '--discriminator-mode',
        default='official',
        choices=('official', 'adversarial'),
        help="official: as the authors' code does it; adversarial: reversed gradient, as the paper draws it",
    ),
    _float('--discriminator-lr-scale', default=1.0, help="the discriminator's learning rate over the student's"),
    _float('--hard-label-weight', default=0.0, help='weight of the loss on the labels; 0 does not look at them'),
    _text(
        '--soft-labels', metavar='DIR', help='train on the answers that mealv2-softlabels recorded, without teachers'
    ),
    _flag('--unlabeled', help='discard the labels: any folder of images will do'),
    _int('--crops-per-decode', default=1, metavar='R', help='soft labels: crops of an image each time it is decoded'),
    _text(
        '--label-rest',
        default='uniform',
        choices=LABEL_RESTS,
        help='soft labels: what becomes of the probability that the stored classes leave over',
    ),
    _flag('--allow-decoder-change', help='soft labels: accept an image decoder that gives other pixels'),
    _int('--total-batch-size', help='images an update over all processes, in place of --batch-size'),
    _text('--recipe', metavar='NAME', help='settings of a published training as defaults'),
    _flag('--list-recipes', help='print the recipes and stop'),
    _text('-c', '--config', metavar='FILE', help='YAML file of settings as defaults, such as the args.yaml of a run'),
    _flag('--dry-run', help='print the settings, time a few steps, write nothing'),
    _flag('--no-preflight', help='do not evaluate teachers and student before the first step'),
    _int('--max-bad-images', default=100, help='images that cannot be read and are left out before the run stops'),
    _int('--max-nonfinite', default=10, help='updates in a row that are skipped as they are not finite, likewise'),
    _text('--push-to-hub', metavar='USER/NAME', help='export the best model at the end and push it to the Hub'),
    _flag('--log-tensorboard', help='log to TensorBoard, in the run folder'),
]

_DATA: list[_Option] = [
    (('data',), {'nargs': '?', 'default': None, 'help': 'folder or tar of the data set (the same as --data-dir)'}),
    _text('--data-dir', type=None, help='folder or tar of the data set'),
    _text(
        '--dataset',
        type=None,
        default='',
        help='kind and name: torch/cifar10, hfds/NAME, ...; a folder if empty',
    ),
    _text('--train-split', type=None, default='train', help='name of the training split'),
    _text('--val-split', type=None, default='validation', help='name of the validation split'),
    _int('--train-num-samples', help='size of the training split, where a streaming set does not tell it'),
    _int('--val-num-samples', help='size of the validation split, likewise'),
    _flag('--dataset-download', help='download the data set, where its kind can be'),
    _text('--class-map', default='', help='file with the class names in the order of their indices'),
    _text('--input-img-mode', help="Pillow's image mode; by default RGB, or L for one channel"),
    _text('--input-key', help='key of the images in a sample'),
    _text('--target-key', help='key of the labels in a sample'),
    _flag('--dataset-trust-remote-code', help="run a Hugging Face data set's own code"),
]

_MODEL: list[_Option] = [
    _text('--model', default='resnet50', help='the model to train, the student'),
    _flag('--pretrained', help='start from the pretrained weights of its tag'),
    _text('--pretrained-path', help='start from these pretrained weights'),
    _text('--initial-checkpoint', default='', help='start from the weights of this checkpoint (EMA where it has them)'),
    _text('--resume', default='', help='continue from this checkpoint, or `auto`: the newest of the experiment'),
    _flag('--no-resume-opt', help='do not restore optimizer and loss scaler'),
    _int('--num-classes', help="number of classes; the model's own if not given"),
    _text('--gp', help='global pooling: fast, avg, max, avgmax, avgmaxc'),
    _int('--img-size', help='image size, square'),
    _int('--in-chans', help='image channels'),
    _int('--input-size', nargs=3, metavar='N', help='channels, height and width'),
    _float('--crop-pct', help='share of the image that evaluation crops'),
    _float('--mean', nargs='+', metavar='MEAN', help='mean of the pixels (0..1)'),
    _float('--std', nargs='+', metavar='STD', help='standard deviation of the pixels (0..1)'),
    _text('--interpolation', default='', help='interpolation of the evaluation'),
    _int('-b', '--batch-size', default=128, help='images a batch and process'),
    _int('-vb', '--validation-batch-size', help='the same for the evaluation'),
    _flag('--channels-last', help='channels-last memory format'),
    _text('--fuser', default='', help='refused: TorchScript alone has fusers'),
    _int('--grad-accum-steps', default=1, help='batches an update'),
    _flag('--grad-checkpointing', help='recompute activations to save memory'),
    _flag('--fast-norm', help="timm's fast normalisation layers under AMP"),
    (
        ('--model-kwargs',),
        {'nargs': '*', 'default': {}, 'action': _KeyValues, 'metavar': 'K=V', 'help': 'arguments of the model'},
    ),
    _float('--head-init-scale', help="factor on the classifier's initial weights"),
    _float('--head-init-bias', help="the classifier's initial bias"),
    _text('--torchcompile-mode', help='mode of torch.compile'),
    _flag('--torchscript', help='refused: TorchScript cannot hold the task'),
    _text('--torchcompile', nargs='?', const='inductor', help='compile with this backend (inductor)'),
]

_DEVICE: list[_Option] = [
    _text('--device', default='cuda', help='device; the CPU where there is no CUDA and none is asked for'),
    _flag('--amp', help='mixed precision'),
    _text('--amp-dtype', default='float16', help='its type: float16 or bfloat16'),
    _text('--model-dtype', help='type of weights and images: float32, float16, bfloat16'),
    _flag('--no-ddp-bb', help='do not broadcast buffers in each step of DDP'),
    _flag('--synchronize-step', help='wait for the device after each step'),
    _int('--local_rank', default=0, help="given by older launchers; torchrun's environment counts"),
    _text('--device-modules', nargs='+', metavar='MODULE', help='modules to import first'),
]

_OPTIMIZER: list[_Option] = [
    _text('--opt', default='sgd', help='optimizer, one of timm.optim.list_optimizers()'),
    _float('--opt-eps', help='its epsilon'),
    _float('--opt-betas', nargs='+', metavar='BETA', help='its betas'),
    _float('--momentum', default=0.9, help='its momentum'),
    _float('--weight-decay', default=2e-5, help='weight decay'),
    _float('--clip-grad', help='bound of the gradient'),
    _text('--clip-mode', default='norm', help='norm, value or agc'),
    _float('--layer-decay', help='factor on the learning rate from layer to layer'),
    _float('--layer-decay-min-scale', default=0, help='smallest such factor'),
    _float('--layer-decay-no-opt-scale', help='layers below this factor are not trained'),
    (
        ('--opt-kwargs',),
        {'nargs': '*', 'default': {}, 'action': _KeyValues, 'metavar': 'K=V', 'help': 'arguments of the optimizer'},
    ),
]

_SCHEDULE: list[_Option] = [
    _text('--sched', default='cosine', help='cosine, tanh, step, multistep, poly, plateau, wsd, rsqrt, constant, none'),
    _flag('--sched-on-updates', help='set the learning rate each update, not each epoch'),
    _float('--lr', help='learning rate; from --lr-base and the batch size if not given'),
    _float('--lr-base', default=0.1, help='learning rate for --lr-base-size images an update'),
    _int('--lr-base-size', default=256, help='images an update that --lr-base is for'),
    _text('--lr-base-scale', default='', help='linear or sqrt in the batch size; by the optimizer if empty'),
    _float('--lr-noise', nargs='+', metavar='T', help='shares of the run between which the rate is noisy'),
    _float('--lr-noise-pct', default=0.67, help='bound of the noise'),
    _float('--lr-noise-std', default=1.0, help='standard deviation of the noise'),
    _float('--lr-cycle-mul', default=1.0, help='factor on the length from cycle to cycle'),
    _float('--lr-cycle-decay', default=0.5, help='factor on the rate from cycle to cycle'),
    _int('--lr-cycle-limit', default=1, help='number of cycles'),
    _float('--lr-k-decay', default=1.0, help='k of cosine and poly'),
    _float('--warmup-lr', default=1e-5, help='learning rate at the start of the warm-up'),
    _float('--min-lr', default=0, help='smallest learning rate'),
    _int('--epochs', default=300, help='epochs'),
    _float('--epoch-repeats', default=0.0, help='repeats of a streaming data set in an epoch'),
    _int('--start-epoch', help='number of the first epoch'),
    _int('--decay-milestones', default=[90, 180, 270], nargs='+', metavar='EPOCH', help='epochs of multistep'),
    _float('--decay-epochs', default=90, help='epochs from step to step'),
    _int('--warmup-epochs', default=5, help='epochs of warm-up'),
    _flag('--warmup-prefix', help='count the warm-up beside the epochs'),
    _int('--cooldown-epochs', default=0, help='epochs at the smallest rate, at the end'),
    _int('--patience-epochs', default=10, help='epochs without progress before plateau acts'),
    _float('--decay-rate', '--dr', default=0.1, help='factor of a step; the power of poly'),
]

_AUGMENTATION: list[_Option] = [
    _flag('--no-aug', help='no augmentation: evaluation crops, for tests'),
    _text('--train-crop-mode', help='rrc (random resized crop), rkrc or rkrr (aspect ratio kept)'),
    _float('--scale', nargs='+', default=[0.08, 1.0], metavar='SHARE', help='area of the random crop'),
    _float('--ratio', nargs='+', default=[3 / 4, 4 / 3], metavar='RATIO', help='aspect ratio of the random crop'),
    _float('--hflip', default=0.5, help='probability of a horizontal flip'),
    _float('--vflip', default=0.0, help='probability of a vertical flip'),
    _float('--color-jitter', default=0.4, metavar='STRENGTH', help='colour jitter'),
    _float('--color-jitter-prob', metavar='P', help='probability of it; always if not given'),
    _float('--grayscale-prob', metavar='P', help='probability of grey'),
    _float('--gaussian-blur-prob', metavar='P', help='probability of a blur'),
    _text('--aa', metavar='POLICY', help="timm's AutoAugment policy, such as rand-m9-mstd0.5 or augmix-m5-w2"),
    _float('--aug-repeats', default=0, help='repeats of an image among the processes'),
    _int('--aug-splits', default=0, help='augmentation splits: 0, or 2 and more'),
    _flag('--jsd-loss', help='Jensen-Shannon loss over the splits'),
    _flag('--bce-loss', help='binary cross-entropy'),
    _flag('--bce-sum', help='its sum over the classes, not the mean'),
    _float('--bce-target-thresh', help='threshold that makes its soft targets hard'),
    _float('--bce-pos-weight', help='its weight of the positive class'),
    _float('--reprob', default=0.0, metavar='P', help='probability of random erasing'),
    _text('--remode', default='pixel', help='its fill: const, rand or pixel'),
    _int('--recount', default=1, help='its number of regions'),
    _flag('--resplit', help='do not erase the first split'),
    _float('--mixup', default=0.0, metavar='ALPHA', help='Mixup; 0 for none'),
    _float('--cutmix', default=0.0, metavar='ALPHA', help='CutMix; 0 for none'),
    _float('--cutmix-minmax', nargs='+', metavar='RATIO', help='smallest and largest box of CutMix, in place of alpha'),
    _float('--mixup-prob', default=1.0, metavar='P', help='probability of mixing'),
    _float('--mixup-switch-prob', default=0.5, metavar='P', help='probability of CutMix where both are on'),
    _text('--mixup-mode', default='batch', help='batch, pair or elem'),
    _int('--mixup-off-epoch', default=0, metavar='EPOCH', help='first epoch without mixing; 0 for never'),
    _float('--smoothing', default=0.1, help='label smoothing'),
    _text('--train-interpolation', default='random', help='interpolation of the training crops'),
    _float('--drop', default=0.0, metavar='P', help='dropout'),
    _float('--drop-connect', metavar='P', help='older name of --drop-path'),
    _float('--drop-path', metavar='P', help='stochastic depth'),
    _float('--drop-block', metavar='P', help='DropBlock'),
]

_BATCH_NORM: list[_Option] = [
    _float('--bn-momentum', help='momentum of batch norm'),
    _float('--bn-eps', help='epsilon of batch norm'),
    _flag('--sync-bn', help='synchronise batch norm over the processes'),
    _text('--dist-bn', default='reduce', help="statistics of batch norm after an epoch: reduce, broadcast or ''"),
    _flag('--split-bn', help='batch norm for each augmentation split'),
]

_EMA: list[_Option] = [
    _flag('--model-ema', help='keep a moving average of the weights'),
    _flag('--model-ema-force-cpu', help='keep it on the CPU, and do not evaluate it'),
    _float('--model-ema-decay', default=0.9998, help='its decay'),
    _flag('--model-ema-warmup', help='smaller decay at the start'),
]

_MISCELLANEOUS: list[_Option] = [
    _int('--seed', default=42, help='seed'),
    _text('--worker-seeding', default='all', help='all or part; every sample is seeded by itself either way'),
    _int('--log-interval', default=50, help='batches from line to line of the log'),
    _int('--val-interval', default=1, help='epochs from evaluation to evaluation'),
    _int('--recovery-interval', default=0, help='updates from recovery checkpoint to recovery checkpoint; 0 for none'),
    _int('--checkpoint-hist', default=10, help='checkpoints to keep'),
    _int('-j', '--workers', default=4, help='worker processes that load images'),
    _flag('--save-images', help='save a batch of images with each line of the log'),
    _flag('--pin-mem', help='pin batches in memory'),
    _flag('--no-prefetcher', help='normalise in the workers, not on the device'),
    _text('--output', default='', help='folder of the experiments (output/train)'),
    _text('--experiment', default='', help='name of the run folder in it; date and model if empty'),
    _text('--eval-metric', default='top1', help='metric of the best checkpoint: top1, top5 or loss'),
    _int('--tta', default=0, help='refused from 2: no loader makes the copies that would be averaged'),
    _flag('--use-multi-epochs-loader', help='keep the workers from epoch to epoch; they always are'),
    _flag('--log-wandb', help='log to Weights & Biases'),
    _text('--wandb-project', help='its project'),
    _text('--wandb-tags', default=[], nargs='+', metavar='TAG', help='its tags'),
    _text('--wandb-resume-id', default='', help='the run there to continue'),
    _int('--train-img-sizes', nargs='+', metavar='PIXELS', help='image sizes from which each batch takes one'),
    _int('--train-batch-sizes', nargs='+', metavar='N', help='the batch size for each of them'),
    _float('--train-size-probs', nargs='+', metavar='P', help='the weight of each of them'),
    _text('--train-size-schedule', default='constant', choices=['constant', 'progressive'], help='how they come'),
    _float('--train-size-schedule-spread', default=0.65, help='width of the progressive window'),
    _float('--train-size-random-mix', default=0.1, help='share of other sizes in it'),
    _int('--train-batches-per-epoch', '--train-steps-per-epoch', help='batches an epoch, with --train-img-sizes'),
    _text(
        '--variable-batch-loss-scale',
        default='none',
        choices=['none', 'sqrt', 'linear'],
        help="weight of a batch's loss by its size",
    ),
    _flag('--naflex-loader', help='refused, as all NaFlex options: the teachers need images'),
    _int('--naflex-train-seq-lens', nargs='+', default=[128, 256, 576, 784, 1024], metavar='N', help='refused'),
    _int('--naflex-max-seq-len', default=576, help='refused'),
    _int('--naflex-patch-sizes', nargs='+', metavar='N', help='refused'),
    _float('--naflex-patch-size-probs', nargs='+', metavar='P', help='refused'),
    _text('--naflex-loss-scale', default='linear', choices=['none', 'sqrt', 'linear'], help='refused'),
    _flag('--naflex-patchify-channels-first', help='refused'),
]

_DISTILLATION: list[_Option] = [
    _text('--kd-model-name', help='the same as --teachers, separated by commas'),
    _text(
        '--kd-distill-type',
        default='mealv2',
        choices=['mealv2', 'logit', 'feature', 'token'],
        help="mealv2, or one of timm's own tasks",
    ),
    _text('--kd-loss-type', default='kl', help='logit: its loss'),
    _float('--distill-loss-weight', help="timm's tasks: weight of the distillation loss"),
    _float('--task-loss-weight', help="timm's tasks: weight of the loss on the labels"),
    _float('--kd-temperature', default=4.0, help='logit, token: temperature'),
    _int('--kd-student-feature-dim', help="feature: width of the student's features"),
    _int('--kd-teacher-feature-dim', help="feature: width of the teacher's features"),
    _text('--kd-token-distill-type', default='soft', choices=['soft', 'hard'], help='token: its targets'),
]

_GROUPS: dict[str, list[_Option]] = {
    'MEAL V2': _OURS,
    'distillation': _DISTILLATION,
    'data set': _DATA,
    'model': _MODEL,
    'device': _DEVICE,
    'optimizer': _OPTIMIZER,
    'learning rate': _SCHEDULE,
    'augmentation and regularisation': _AUGMENTATION,
    'batch norm': _BATCH_NORM,
    'moving average': _EMA,
    'miscellaneous': _MISCELLANEOUS,
}


def build_parser() -> argparse.ArgumentParser:
    """Return a fresh parser of every option; those of timm's train.py have its names, types and defaults."""
    parser = OneLineParser(
        prog='mealv2-train',
        usage='%(prog)s [OPTION ...] [DATA]',
        description='Train an image classifier on the answers of an ensemble of teachers (MEAL V2), or without.',
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for title, options in _GROUPS.items():
        group = parser.add_argument_group(title)
        for names, kwargs in options:
            group.add_argument(*names, **kwargs)
    return parser
