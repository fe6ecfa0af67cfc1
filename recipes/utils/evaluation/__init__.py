"""Runs and adapters loaded again, scores of their answers, and what a difference between two models is worth."""

from recipes.utils.evaluation.evaluate import MODELS, evaluate, print_evaluation, read_rows, rows_to_score
from recipes.utils.evaluation.evaluate import score_answers, score_rows, score_scales, sum_up, write_evaluation
from recipes.utils.evaluation.runs import base_of, check_linear, load_adapter, load_adapter_tokenizer
from recipes.utils.evaluation.runs import newest_run, read_adapter, read_run, set_scale
from recipes.utils.evaluation.statistics import SCORES, Score, column, compare, figure, figures, interval, own_interval
from recipes.utils.evaluation.statistics import score_text, sentence, show, show_difference, show_interval
