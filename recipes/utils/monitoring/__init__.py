"""Callbacks that watch a run: each is one line in a recipe, and a run goes on without it where it is left out."""

from recipes.utils.monitoring.ledger import Ledger, read_ledger
from recipes.utils.monitoring.progress import Progress
from recipes.utils.monitoring.report import Report, refresh_report, write_report
from recipes.utils.monitoring.samples import Samples
from recipes.utils.monitoring.trackers import Trackers
