"""A run that survives: its folder and record, its trainer, its checkpoints."""

from recipes.utils.training.micro_batch import MicroBatch, observe
from recipes.utils.training.run import Run, begin, check_same_run, recorded
from recipes.utils.training.table import check_settings, device_name, print_run, steps_of
from recipes.utils.training.throughput import Flops, Throughput, count_flops
from recipes.utils.training.trainer import Deadline, EarlyStopping, Resumable, ResumableTrainer
