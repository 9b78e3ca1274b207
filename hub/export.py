"""Export a training checkpoint as a folder that plain timm loads; the same as `mealv2-hub export`."""

import sys

from timm_mealv2.cli.hub import main
from timm_mealv2.command_line import run_cli

if __name__ == '__main__':
    run_cli(main, ['export', *sys.argv[1:]])
