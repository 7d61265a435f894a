"""``megarl convert hf-to-megatron`` as a script."""

import os
import sys

# this folder is not searched for modules: its inspect.py would hide Python's own
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or ".") != os.path.dirname(os.path.realpath(__file__))]

from megarl.cli.command_line import run
from megarl.cli.convert import alone, hf_to_megatron

app = alone(hf_to_megatron)

if __name__ == "__main__":
    run(app)
