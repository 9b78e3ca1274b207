"""Make a folder from a file that the authors of MEAL V2 released; the same as `mealv2-hub convert`."""

import sys

from timm_mealv2.cli.hub import main
from timm_mealv2.command_line import run_cli

if __name__ == '__main__':
    run_cli(main, ['convert', *sys.argv[1:]])
