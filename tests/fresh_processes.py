"""Fresh processes for tests, forked from a server that has imported torch and Lightning and has run nothing.

Starting Python and importing Lightning takes seconds of processor time; a fork takes milliseconds.
"""

import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

PRELOAD = (
    "stepwise_lightning.commands.lightning_cli",
    "stepwise_lightning.plots.trajectories",
    "matplotlib.backends.backend_agg",
    "torch.utils.tensorboard",
    "torchvision.datasets",
)


@dataclass
class Outcome:
    """Result of one process.

    Attributes:
        status: exit status, −n if signal n ended the process, None if it was killed at the timeout.
        output: standard output and standard error.
        value: return value of the function, None if it did not return.

    """

    status: int | None
    output: str
    value: Any = None


class ProcessServer:
    """Runs functions in fresh processes.

    Create it before tests are collected: its processes then start in the state of a new interpreter that has imported
    ``PRELOAD``, with default random state, no process group and no test module. The server ends with its creator.
    """

    def __init__(self) -> None:
        self._connection, connection = Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, where pytest-xdist has a thread
            self._pid = os.fork()
        if self._pid == 0:
            self._connection.close()
            _serve(connection)
        connection.close()

    def launch(
        self,
        function: Callable[..., Any],
        *args: Any,
        ranks: int = 1,
        environment: dict[str, str] | None = None,
        timeout: float = 300,
    ) -> list[Outcome]:
        """Call ``function(*args)`` in fresh processes and return their outcomes by rank.

        The processes inherit the working directory, the environment, ``sys.path`` and the warning filters of the test.

        Args:
            function: defined at the top level of an importable module.
            args: picklable arguments.
            ranks: number of processes; two or more get the environment variables of ``torchrun``, which
                ``dist.init_process_group("gloo")`` and Lightning's ``strategy="ddp"`` read.
            environment: additional environment variables.
            timeout: seconds until processes that still run are killed.

        """
        variables = dict(os.environ) | (environment or {}) | (_rendezvous(ranks) if ranks > 1 else {})
        state = pickle.dumps((os.getcwd(), variables, sys.path, warnings.filters, pickle.dumps((function, args))))
        with tempfile.TemporaryDirectory() as folder:
            self._connection.send((state, ranks, folder, timeout))
            outcomes = []
            for rank, status in enumerate(self._connection.recv()):
                value = Path(folder, f"{rank}.pickle")
                output = Path(folder, f"{rank}.txt").read_text(errors="replace")
                outcomes.append(Outcome(status, output, pickle.loads(value.read_bytes()) if value.exists() else None))
        return outcomes

    def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call ``function(*args)`` in a fresh process and return its value; see :meth:`launch`."""
        return self.run_ranks(1, function, *args, **options)[0]

    def run_ranks(self, ranks: int, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """Call ``function(*args)`` on every rank and return the values by rank; see :meth:`launch`."""
        outcomes = self.launch(function, *args, ranks=ranks, **options)
        failures = [f"rank {rank}: {each}" for rank, each in enumerate(outcomes) if each.status != 0]
        assert not failures, "\n".join(failures)
        return [outcome.value for outcome in outcomes]

    def close(self) -> None:
        """End the server."""
        self._connection.close()
        os.waitpid(self._pid, 0)


def stepwise(*arguments: str) -> None:
    """Run the command line in this process."""
    from stepwise_lightning.__main__ import main

    sys.argv = ["stepwise", *arguments]
    main()


_server: ProcessServer | None = None


def start_server() -> None:
    """Start the server of this pytest process."""
    global _server
    _server = ProcessServer()


def server() -> ProcessServer:
    """Return the server of this pytest process."""
    assert _server is not None
    return _server


def stop_server() -> None:
    """End the server of this pytest process, if there is one."""
    if _server is not None:
        _server.close()


def _rendezvous(ranks: int) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}


def _serve(connection: Connection) -> NoReturn:
    """Fork processes on request until the other end of the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends pytest, which closes the connection
    for stream in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    kept = connection.fileno()
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
    try:
        while True:
            state, ranks, folder, timeout = connection.recv()
            for name in PRELOAD:
                import_module(name)
            children = {}
            for rank in range(ranks):
                if not (child := os.fork()):
                    connection.close()
                    _run(state, rank, ranks, folder)
                children[child] = rank
            connection.send(_wait(connection, children, time.monotonic() + timeout))
    except EOFError:
        os._exit(0)
    finally:
        os._exit(1)


def _wait(connection: Connection, children: dict[int, int], deadline: float) -> list[int | None]:
    """Return the exit statuses by rank; kill the processes at the deadline or when pytest has ended."""
    statuses: list[int | None] = [None] * len(children)
    killed = False
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            rank = children.pop(child)
            statuses[rank] = None if killed else os.waitstatus_to_exitcode(status)
        elif not killed and (time.monotonic() > deadline or connection.poll()):
            killed = True
            for each in children:
                os.kill(each, signal.SIGKILL)
        else:
            time.sleep(0.005)
    return statuses


def _run(state: bytes, rank: int, ranks: int, folder: str) -> NoReturn:
    """Call the function in this process as the main program and end with the exit status of Python."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(f"{folder}/{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.__stdout__ = open(1, "w", buffering=1)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1)  # noqa: SIM115
    status = 1
    # The first use of torch's thread pool after a fork replaces it, and two threads that do so at once abort ("Invalid
    # thread pool!"): do it before autograd starts a thread.
    torch = sys.modules["torch"]
    torch.set_num_threads(torch.get_num_threads())
    try:
        directory, variables, path, filters, call = pickle.loads(state)
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(variables | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}))
        sys.path[:] = path
        warnings.resetwarnings()
        warnings.filters.extend(filters)
        function, args = pickle.loads(call)
        value = pickle.dumps(function(*args))
        Path(folder, f"{rank}.pickle").write_bytes(value)
        status = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        else:
            status = stop.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
