"""The same as the command `mealv2-softlabels`."""

from timm_mealv2.soft_labels.command import cli

cli()
