"""Make a folder that names the teachers of an ensemble; the same as `mealv2-hub export-ensemble`."""

import sys

from timm_mealv2.cli import run_cli
from timm_mealv2.hub import main

if __name__ == '__main__':
    run_cli(main, ['export-ensemble', *sys.argv[1:]])
