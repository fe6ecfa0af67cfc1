"""What two recipes must agree on, once. Imported before the libraries, so that it can quiet them."""

import logging
import os
import warnings

# Nothing goes to the network unless a hub name is configured (utils/hub.py): TRL would report each trainer that is
# built, and bitsandbytes and transformers would fetch kernels. The client reads its settings when it is imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # unset, it warns at every fork

from huggingface_hub import constants

OFFLINE_ASKED_FOR, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True

# The libraries' coming renames and optional extras: the user of a recipe can mend neither.
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", category=DeprecationWarning)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# PEFT asks the hub at each save whether the vocabulary was changed; no recipe changes it.
for said in ("Could not find a config file in", "Unable to fetch remote file due to the following error"):
    warnings.filterwarnings("ignore", message=said)
# The trainer takes a share of steps, such as save_steps: 0.1, for a change at each resume; utils/same_run.py compares.
logging.getLogger("transformers.trainer_utils").addFilter(lambda record: "do not match the ones" not in record.msg)
