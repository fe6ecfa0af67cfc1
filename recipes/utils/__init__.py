"""What two recipes must agree on, once. Imported before the libraries, so that it can quiet them."""

import logging
import os
import warnings

from huggingface_hub import constants

# Nothing goes to the network unless a hub name is configured (utils/model.py): TRL would report each trainer that is
# built, and bitsandbytes and transformers would fetch kernels.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
OFFLINE_ASKED_FOR, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # unset, it warns at every fork

# The libraries' coming renames and optional extras: the user of a recipe can mend neither.
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", category=DeprecationWarning)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
