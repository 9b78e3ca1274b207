#!/usr/bin/env python3
"""Train a student on the predictions of an ensemble of teachers: `python train_distill.py --help`."""

from timm_mealv2.training.run import cli

if __name__ == '__main__':
    cli()
