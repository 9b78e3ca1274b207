"""The same as the command `mealv2-softlabels`."""

from timm_mealv2.cli.soft_labels import cli

cli()
