"""Export a training checkpoint as a folder that plain timm loads; the same as `mealv2-hub export`."""

import sys

from timm_mealv2.cli import run_cli
from timm_mealv2.hub import main

if __name__ == '__main__':
    run_cli(main, ['export', *sys.argv[1:]])
