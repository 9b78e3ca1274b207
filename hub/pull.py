"""Get a folder from the Hugging Face Hub, verified; the same as `mealv2-hub pull`."""

import sys

from timm_mealv2.cli import run_cli
from timm_mealv2.hub import main

if __name__ == '__main__':
    run_cli(main, ['pull', *sys.argv[1:]])
