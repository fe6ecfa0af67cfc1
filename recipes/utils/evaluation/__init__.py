"""Scores of a model's answers, and what a difference between two models is worth."""

from recipes.utils.evaluation.evaluate import MODELS, evaluate, print_evaluation, read_rows, rows_to_score
from recipes.utils.evaluation.evaluate import score_answers, score_rows, score_scales, sum_up, write_evaluation
from recipes.utils.evaluation.statistics import SCORES, Score, column, compare, figure, figures, interval, own_interval
from recipes.utils.evaluation.statistics import score_text, sentence, show, show_difference, show_interval
