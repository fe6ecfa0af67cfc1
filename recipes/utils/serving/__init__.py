"""A model behind an OpenAI-compatible endpoint: is it the one that was evaluated?"""

from recipes.utils.serving.client import Endpoint, Reply
from recipes.utils.serving.compare import ask, compare_served, print_served, scored_rows
