"""Before a run: will it fit, what to give it, and what this machine can run."""

from recipes.utils.planning.curve import Forecast, foretell, name_of_share, read_shares, split_rows, twice
from recipes.utils.planning.fit import choose, fits, measured_speed, memory_of_gpu, memory_of_steps
from recipes.utils.planning.fit import on_gpu, print_memory
from recipes.utils.planning.machine import check_machine
from recipes.utils.planning.memory import Memory, Step, predict
from recipes.utils.planning.price import price_table, trained_tokens
