"""MEAL V2 in a loop of Hugging Face's accelerate, which brings devices, processes and mixed precision.

    pip install accelerate
    accelerate launch examples/accelerate_loop.py

`MealV2Task` is a module like any other: `prepare` takes it whole. The optimizer gets what is trained, the student and
the discriminator; the teachers have no gradient, and the task's state dict leaves them out.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from timm.data import create_dataset, create_transform
from torch.utils.data import DataLoader

from timm_mealv2 import MealV2Task

EXAMPLE = Path(__file__).resolve().parent / 'fashion_mnist'
TEACHERS = [f'local-dir:{EXAMPLE}/teachers/teacher_{name}' for name in 'ab']


def main(argv: Sequence[str] | None = None) -> None:
    """Train a student on the sample of Fashion-MNIST, and save it."""
    parser = argparse.ArgumentParser(description='Train a student with MEAL V2 and accelerate.')
    parser.add_argument('--data-dir', type=Path, default=EXAMPLE / 'data', help='folder of train.tar')
    parser.add_argument('--epochs', type=int, default=10)
    parser.add_argument('--out', type=Path, default=Path('output/accelerate/student.pth'), help='file for the weights')
    args = parser.parse_args(argv)

    accelerator = Accelerator()
    student = timm.create_model('resnet10t', in_chans=1, num_classes=10)
    student.pretrained_cfg.update(mean=(0.286,), std=(0.353,))  # what the pixels below are normalized with
    task = MealV2Task(student, TEACHERS)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05, momentum=0.9)
    transform = create_transform(
        (1, 32, 32), is_training=True, scale=(0.6, 1.0), color_jitter=None, mean=(0.286,), std=(0.353,)
    )
    images = create_dataset('', root=str(args.data_dir), split='train.tar', input_img_mode='L', transform=transform)
    task, optimizer, loader = accelerator.prepare(task, optimizer, DataLoader(images, batch_size=128, shuffle=True))

    for epoch in range(args.epochs):
        task.train()  # the teachers stay in eval mode
        for pixels, target in loader:  # the target is not looked at
            result = task(pixels, target)
            accelerator.backward(result['loss'])
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(f'epoch {epoch}: KL {result["kl"]:.3f}, agreement {result["teacher_agreement"]:.3f}')

    args.out.parent.mkdir(parents=True, exist_ok=True)
    accelerator.save(student.state_dict(), args.out)
    accelerator.print(args.out)


if __name__ == '__main__':
    main()
