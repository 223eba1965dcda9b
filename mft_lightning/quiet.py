"""Library chatter that says nothing about the user's run. Warnings, and reports a user asked for, are kept."""

import logging
import re
import threading
import warnings

import transformers

from mft_lightning.errors import FULL_DISK
from mft_lightning.ranks import is_first

_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\).*",  # lightning/pytorch/utilities/_pytree.py in 2.6 uses a deprecated API
    r"`is_gradient_checkpointing` is deprecated.*",  # peft 0.21 asks transformers 5.23 by the old name
    r".*does not have many workers which may be a bottleneck.*",  # the plan's batches are cut from memory
    r"This DataLoader will create .* worker processes.*",  # twice for each loader; EvaluatedData.notes says it
    r"The number of training batches .* is smaller than the logging interval.*",  # steps are counted over epochs
    r"The `srun` command is available.*",  # on a cluster's front end; inside a job its lack is an error (layout.py)
    r".*sync_dist=True.* when logging on epoch level in distributed setting.*",  # what is logged is the same everywhere
    r"Since DeepSpeed handles gradient clipping internally.*",  # as docs/parallel.md says
    r".* has both parameters with requires_grad=True and False\..*",  # of LoRA's every layer: docs/parallel.md
)
_ANNOUNCERS = ("lightning", "pytorch_lightning", "transformers.modeling_utils")
_ANNOUNCEMENTS = (
    "The new embeddings will be initialized",  # that grow for new tokens, as docs/training.md says
    "The new lm_head weights will be initialized",
    "Seed set to",
    "GPU available",
    "TPU available",
    "\N{ELECTRIC LIGHT BULB} Tip",
    "`Trainer",
    "`weights_only` was not set",
    "Restor",
    "Loaded model weights",
    "LOCAL_RANK",
    "Initializing distributed",
    "Using bfloat16",
    "Detected KeyboardInterrupt",
    "-----",
)


def quieten() -> None:
    """Leave out announcements of what this program says itself, and transformers' bars for files.

    Lightning's loggers are those of the modules imported so far; commands that do without it have none to quieten.
    """
    for name in [name for name in logging.root.manager.loggerDict if name.startswith(_ANNOUNCERS)]:
        logging.getLogger(name).addFilter(_is_news)  # a filter is kept once, however often it is added
    # of kernels it would like to fetch from a hub, and, at every step, of the float16 that 8 bits are computed in
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # how often it tries again
    transformers.utils.logging.disable_progress_bar()
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _tell_of_thread
    if not is_first():  # the first rank says the same
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        return
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def _tell_of_thread(failed: threading.ExceptHookArgs) -> None:
    """No traceback of TensorBoard's thread where the disk is full: it hands the error on, and the run tells of it."""
    if not (isinstance(failed.exc_value, OSError) and failed.exc_value.errno in FULL_DISK):
        threading.__excepthook__(failed)


def _is_news(record: logging.LogRecord) -> bool:
    return not re.sub(r"^\s*(\[rank: \d+\] )?", "", record.getMessage()).startswith(_ANNOUNCEMENTS)
