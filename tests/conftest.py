"""What is collected: the comparisons with other libraries only where those are installed (``make test-peers``)."""

from importlib.util import find_spec

import torch

collect_ignore = [] if find_spec("lightly") else ["peers"]
# The networks are small: a second thread gains little, and on a busy machine costs many times the step.
torch.set_num_threads(1)
