"""Runs and adapters loaded again, scores of their answers, and what a difference between two models is worth."""

from recipes.utils.evaluation.against import score_against
from recipes.utils.evaluation.baseline import prompts_of, read_system, trained_rows
from recipes.utils.evaluation.evaluate import best_baselines, evaluate, print_evaluation, read_rows, rows_digest, sum_up
from recipes.utils.evaluation.evaluate import rows_to_score, score_rows, score_scales, within_limit, write_evaluation
from recipes.utils.evaluation.gates import decide, print_gates, read_gate, rows_of_runs
from recipes.utils.evaluation.runs import base_of, check_linear, load_adapter, load_adapter_tokenizer, set_scale
from recipes.utils.evaluation.runs import load_adapters_base, newest_run, read_adapter, read_record, read_run
from recipes.utils.evaluation.scores import SCORES, add_metrics, field_names, read_metrics, score_of, score_text
from recipes.utils.evaluation.statistics import column, compare, figure, figures, own_interval
from recipes.utils.evaluation.verdicts import FEW, sentence, show, show_difference, show_interval
