"""Push an exported folder or a checkpoint to the Hugging Face Hub; the same as `mealv2-hub push`."""

import sys

from timm_mealv2.cli.hub import main
from timm_mealv2.command_line import run_cli

if __name__ == '__main__':
    run_cli(main, ['push', *sys.argv[1:]])
