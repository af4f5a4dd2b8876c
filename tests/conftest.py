"""Fixtures of all tests. The comparisons with other libraries run where those are installed (``make test-peers``)."""

import logging
import signal
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec

import pytest
from cached_parsers import cache_class_parsers
from fresh_processes import PRELOAD, ProcessServer, server, start_server, stop_server
from matplotlib.artist import allow_rasterization
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure

collect_ignore = [] if find_spec("lightly") else ["peers"]
_draw = Figure.draw


@allow_rasterization  # without it, Matplotlib would keep the method in subclasses
def _leave_blank(figure: Figure, renderer: RendererBase) -> None:
    """Draw nothing; see ``rendered_figures``."""


def pytest_configure(config: pytest.Config) -> None:
    """Set up the processes that run tests, which the controller of pytest-xdist does not."""
    if config.getoption("numprocesses", None):
        return
    import torch

    # The networks are small: a second thread gains little, and on a busy machine costs many times the step.
    torch.set_num_threads(1)
    # In the background of a script Ctrl-C is ignored, and processes that the tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    Figure.draw = _leave_blank
    cache_class_parsers()
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist imports these in any case, the server shares them
        for name in PRELOAD:
            import_module(name)
    elif "lightning" in sys.modules:
        # Its log would go to a stream that pytest captures and the server closes.
        raise pytest.UsageError("a conftest.py imports Lightning: import it in the fixture that needs it")
    start_server()


def pytest_unconfigure() -> None:
    """End the server of fresh processes."""
    stop_server()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed torch before the fixtures of a test: encoders and data modules without a seed use the global one."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="module")
def rendered_figures() -> Iterator[None]:
    """Render the figures of this module; other tests build figures, but save blank images, which takes less time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "draw", _draw)
        yield


@pytest.fixture(scope="session")
def processes() -> ProcessServer:
    """Return a server that runs functions in fresh processes, or on the ranks of a process group.

    ``processes.run(function, *args)`` returns the value of ``function(*args)`` in a fresh process,
    ``processes.run_ranks(2, function, *args)`` the values of two ranks, and ``processes.launch`` returns exit statuses
    and output instead of failing the test. The function must be importable: define it at the top level of the module.
    Use this rather than ``subprocess`` with ``sys.executable``, which imports torch and Lightning once more.
    """
    return server()


@pytest.fixture(autouse=True)
def _lightning_messages() -> None:
    """Undo the change of Lightning's log level by the figures, and let pytest read the messages."""
    logger = logging.getLogger("lightning.pytorch")
    logger.setLevel(logging.INFO)
    logger.propagate = True  # if Lightning is imported before pytest 8 has its handlers, it switches this off
