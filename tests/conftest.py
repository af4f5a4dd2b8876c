"""What is collected: the comparisons with other libraries only where those are installed (``make test-peers``)."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("lightly") else ["peers"]
