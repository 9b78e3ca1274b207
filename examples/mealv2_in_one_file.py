"""MEAL V2 (arXiv 2009.08453) on one page: PyTorch, timm and NumPy, and nothing of timm_mealv2.

    python examples/fashion_mnist/quickstart.py  # trains the student's start, among others
    python examples/mealv2_in_one_file.py

The quick start's student learns what two teachers predict on the same pixels, without labels. It ends with the very
weights that the package trains, bit for bit, on the same machine with the same number of threads (OMP_NUM_THREADS=1, as
in the quick start; the recipe leaves the teachers as they are, by default the package folds their batch norm):

    T=local-dir:examples/fashion_mnist/teachers/teacher_
    python train_distill.py --recipe quickstart --seed 0 --channels-last --workers 0 --teachers ${T}a ${T}b \
        --data-dir examples/fashion_mnist/data --train-split train.tar --val-split validation.tar \
        --initial-checkpoint output/quickstart/start/last.pth.tar

The package adds the rest: teachers and data of every kind, mixing, stored labels, several GPUs, mixed precision, exact
resume, evaluation, reports and the Hub.
"""

import argparse
import random
from collections.abc import Sequence
from functools import reduce
from math import log
from pathlib import Path

import numpy as np
import timm
import torch
from timm.data import ImageDataset, create_dataset, create_loader, create_transform
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn import functional as F

EXAMPLE = Path(__file__).resolve().parent / 'fashion_mnist'

# The teachers know more than the student could learn from its images: they were trained on 30 times as many. The
# student is an ordinary network, here of 0.16 M parameters, and starts from weights that are good already.
TEACHERS = [f'local-dir:{EXAMPLE}/teachers/teacher_{name}' for name in 'ab']
STUDENT = 'resnet10t'
STUDENT_OPTIONS = {'channels': (16, 32, 64, 64), 'stem_width': 16, 'output_stride': 8}
NUM_CLASSES = 10

# Normalization that the student and both teachers share. A teacher trained with another mean and std would need its
# own: given the student's it still runs, and predicts badly.
INPUT_SIZE = (1, 32, 32)
MEAN, STD = 0.286, 0.353

# Section 4: random resized crops and flips, no color jitter, mixing or label smoothing. The paper's crops cover 0.08 to
# 1 of an ImageNet picture; so little of a picture of 28x28 pixels shows nothing.
CROP_SCALE = (0.6, 1.0)
FLIP_PROBABILITY = 0.5

# Section 4: SGD with momentum, and no weight decay, because soft labels regularize already. The paper's learning rate
# is 0.01, and 0.001 after 100 of 180 epochs; a run as short as this one goes further with a higher one and a cosine.
EPOCHS = 12
BATCH_SIZE = 128
LR = 0.05
WARMUP_EPOCHS = 0
MOMENTUM = 0.9
WEIGHT_DECAY = 0.0

DISCRIMINATOR_WEIGHT = 1.0
REDUCTION = 8  # each layer of the discriminator is narrower by this factor

SEED = 0
AUGMENTATION, INITIALIZATION = 1, 6  # what a seed is for


def counted_seed(stream: int, *counters: int) -> int:
    """Return a seed in [0, 2**63); equal counters of different streams give unrelated seeds."""
    return int(np.random.SeedSequence([stream, *counters]).generate_state(1, np.uint64)[0] >> 1)


def sample(images: ImageDataset, epoch: int, index: int) -> Tensor:
    """Return a training sample, uint8 [1, 32, 32]: a function of (seed, epoch, image) and of nothing else.

    So it does not matter where, when, in which batch or by which process it is made: teachers could look at it today,
    and the student, at the very same pixels, next week.
    """
    seed = counted_seed(AUGMENTATION, SEED, epoch, index)
    random.seed(seed)  # timm's crop draws from Python's generator
    torch.manual_seed(seed)  # torchvision's flip draws from torch's
    pixels, _ = images[index]  # nobody looks at the label
    return torch.as_tensor(pixels)


def batches(images: ImageDataset, epoch: int) -> Sequence[Tensor]:
    """Return the image numbers of each batch: the epoch's permutation, a function of (seed, epoch), in pieces."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED + epoch))
    return order.split(BATCH_SIZE)


@torch.no_grad()
def ensemble(teachers: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log of the teachers' mean probability (temperature 1), and their mean logits, both [B, C].

    Section 3: where MEAL drew one teacher for each step, the mean of all of them is the stronger supervision.
    """
    logits = [teacher(x) for teacher in teachers]
    weighted = [z.log_softmax(dim=1) + log(1 / len(teachers)) for z in logits]
    return reduce(torch.logaddexp, weighted), sum(z / len(teachers) for z in logits)


def similarity_loss(logits: Tensor, log_p: Tensor) -> Tensor:
    """Return the soft cross-entropy of the student with the teachers' mean probability p.

    Section 3: it is KL(p || student) plus p's entropy, which has no gradient. There is no one-hot label anywhere.
    """
    return -(log_p.exp() * logits.log_softmax(dim=1)).sum(dim=1).mean()


def build_discriminator() -> nn.Sequential:
    """Return the network that tells student from teachers by their final outputs alone: [B, C] -> [B, 2] logits.

    Section 3 places it there, and nowhere deeper. Sizes and the ReLU after the last layer are those of the authors'
    code, which needs 64 classes or more; below, two units stand where C // 8**2 would leave none.
    """
    sizes = [NUM_CLASSES, max(2, NUM_CLASSES // REDUCTION), max(2, NUM_CLASSES // REDUCTION**2), 2]
    layers = [nn.Linear(sizes[0], sizes[1]), nn.Linear(sizes[1], sizes[2]), nn.Linear(sizes[2], sizes[3])]
    return nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())))


def discriminator_loss(discriminator: nn.Module, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return the binary cross-entropy over both outputs: [1, 0] for the rows of the student, [0, 1] for the teachers'.

    Its gradient reaches the student with the loss's own sign, as in the authors' code. The paper's figure shows an
    adversary, for which the student's gradient would be reversed.
    """
    output = discriminator(torch.cat([student_logits, teacher_logits]))
    labels = torch.eye(2).repeat_interleave(len(student_logits), dim=0)
    return F.binary_cross_entropy_with_logits(output, labels)


@torch.inference_mode()
def evaluate(model: nn.Module, data_dir: Path) -> float:
    """Return the top-1 accuracy in percent on the validation images."""
    images = create_dataset('', root=str(data_dir), split='validation.tar', input_img_mode='L')
    pixels = {'input_size': INPUT_SIZE, 'mean': (MEAN,), 'std': (STD,), 'interpolation': 'bilinear', 'crop_pct': 1.0}
    loader = create_loader(images, batch_size=250, num_workers=0, device=torch.device('cpu'), **pixels)
    return 100 * sum(int((model(x).argmax(dim=1) == label).sum()) for x, label in loader) / len(images)


def main(argv: Sequence[str] | None = None) -> None:
    """Train the student from its start; save it, and the discriminator."""
    parser = argparse.ArgumentParser(description="MEAL V2 in one file: distil the quick start's student.")
    parser.add_argument('--start', type=Path, default='output/quickstart/start/last.pth.tar', help='initial weights')
    parser.add_argument('--data-dir', type=Path, default=EXAMPLE / 'data', help='folder of train.tar, validation.tar')
    parser.add_argument('--epochs', type=int, default=EPOCHS)
    parser.add_argument('--out', type=Path, default='output/mealv2_in_one_file.pth', help='file for the weights')
    args = parser.parse_args(argv)

    torch.manual_seed(counted_seed(INITIALIZATION, SEED))  # the discriminator's initial weights depend on it
    student = timm.create_model(STUDENT, num_classes=NUM_CLASSES, in_chans=INPUT_SIZE[0], **STUDENT_OPTIONS)
    timm.models.load_checkpoint(student, str(args.start))
    student.to(memory_format=torch.channels_last)  # faster on a CPU
    teachers = [timm.create_model(name, pretrained=True).eval() for name in TEACHERS]
    discriminator = build_discriminator()

    # One optimizer, one learning rate and one backward pass train both, as in the authors' code.
    trained = nn.ModuleList([student, discriminator])
    optimizer = create_optimizer_v2(trained, opt='momentum', lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    scheduler, _ = create_scheduler_v2(optimizer, 'cosine', num_epochs=args.epochs, warmup_epochs=WARMUP_EPOCHS)
    transform = create_transform(
        INPUT_SIZE,
        is_training=True,
        scale=CROP_SCALE,
        hflip=FLIP_PROBABILITY,
        color_jitter=None,
        interpolation='bilinear',
        use_prefetcher=True,  # which would normalize; the pixels stay uint8
    )
    images = create_dataset('', root=str(args.data_dir), split='train.tar', input_img_mode='L', transform=transform)

    for epoch in range(args.epochs):
        scheduler.step(epoch)
        trained.train()
        for batch in batches(images, epoch):
            pixels = torch.stack([sample(images, epoch, index) for index in batch.tolist()])
            x = (pixels.float() - 255 * MEAN) / (255 * STD)
            log_p, teacher_logits = ensemble(teachers, x)
            logits = student(x)
            similarity = similarity_loss(logits, log_p)
            discrimination = discriminator_loss(discriminator, logits, teacher_logits)
            optimizer.zero_grad()
            (similarity + DISCRIMINATOR_WEIGHT * discrimination).backward()
            optimizer.step()
        print(f'epoch {epoch}: similarity loss {similarity:.4f}, discriminator loss {discrimination:.4f}', flush=True)

    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save({'state_dict': student.state_dict(), 'discriminator': discriminator.state_dict()}, args.out)
    print(f'top-1 {evaluate(student.eval(), args.data_dir):.2f} %; the weights are in {args.out}')


if __name__ == '__main__':
    main()
