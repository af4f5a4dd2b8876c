"""What is collected: the comparisons with other libraries only where those are installed (``make test-peers``)."""

import logging
import signal
from importlib.util import find_spec

import pytest
import torch

collect_ignore = [] if find_spec("lightly") else ["peers"]
# The networks are small: a second thread gains little, and on a busy machine costs many times the step.
torch.set_num_threads(1)
# In the background of a script Ctrl-C is ignored, and whatever the tests start and interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _lightning_speaks():
    """Undo what the figures do to Lightning's messages: other tests read them."""
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
