"""Make a folder that names the teachers of an ensemble; the same as `mealv2-hub export-ensemble`."""

import sys

from timm_mealv2.cli.hub import main
from timm_mealv2.command_line import run_cli

if __name__ == '__main__':
    run_cli(main, ['export-ensemble', *sys.argv[1:]])
