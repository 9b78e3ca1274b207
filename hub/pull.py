"""Get a folder from the Hugging Face Hub, verified; the same as `mealv2-hub pull`."""

import sys

from timm_mealv2.cli.hub import main
from timm_mealv2.command_line import run_cli

if __name__ == '__main__':
    run_cli(main, ['pull', *sys.argv[1:]])
