"""The LoRA recipe where no file can grow over so many bytes: `python tests/with_a_file_limit.py BYTES ARGUMENTS...`"""

import resource
import signal
import sys

from recipes import sft_lora
from recipes.utils.console import first_look, run_main, training_parser

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error of the write, and not the end of the process
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(run_main(sft_lora.main, first_look(training_parser(sft_lora.__doc__), sys.argv[2:])))
