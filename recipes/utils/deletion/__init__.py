"""Rows taken out of a run: found with their copies, and a receipt of their deletion that can be checked."""

from recipes.utils.deletion.receipt import make_receipt, measure, print_held, print_measured, verify
from recipes.utils.deletion.rows import Found, check_parents, find_rows
