"""One YAML file and flags to the arguments of the libraries' classes."""

from recipes.utils.config.config import FLAGS, Config, c_compiler, check_machine, load_config, read_config
from recipes.utils.config.keys import SECTIONS, RunOptions, key_names
