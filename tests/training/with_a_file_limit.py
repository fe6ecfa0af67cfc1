"""Run the LoRA recipe where no file grows over so many bytes: `python tests/training/with_a_file_limit.py BYTES ...`"""

import resource
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from forks import run_recipe

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error of the write, and not the end of the process
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(run_recipe("sft_lora", *sys.argv[2:]))
