"""Before a run: will it fit, what to give it, and what this machine can run."""

from recipes.utils.planning.fit import choose, fits, flags, lora_of, measured_speed, memory_of_gpu, on_gpu, print_fits
from recipes.utils.planning.fit import print_parts, step_of
from recipes.utils.planning.machine import check_machine
from recipes.utils.planning.memory import Memory, Step, predict
