"""Files as one array: whatever their sizes, mapped where that is possible, and never written to."""

import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_sets import noise

from stepwise_lightning.data import mapped_files
from stepwise_lightning.data.mapped_files import mapped_bytes

PAGE = mmap.PAGESIZE


@pytest.mark.parametrize(
    "sizes",
    [[1], [PAGE], [3 * PAGE + 5], [PAGE, 2 * PAGE], [5, 3 * PAGE + 7], [2 * PAGE + 1, 9, 0, PAGE - 10, PAGE], [0]],
)
def test_files_of_any_size_lie_one_behind_the_other(sizes: list[int], tmp_path: Path) -> None:
    parts = [noise(size, seed=number) for number, size in enumerate(sizes)]
    paths = [tmp_path / str(number) for number in range(len(sizes))]
    for path, part in zip(paths, parts, strict=True):
        part.tofile(path)
    joined = mapped_bytes(paths)
    assert joined.dtype == np.uint8 and np.array_equal(joined, np.concatenate(parts))
    joined[:] = 0
    assert all(path.read_bytes() == part.tobytes() for path, part in zip(paths, parts, strict=True))


def test_torch_takes_the_array_without_a_warning_and_keeps_it(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for number, path in enumerate(paths):
        noise(2 * PAGE, seed=number).tofile(path)
    images = torch.from_numpy(mapped_bytes(paths)).view(-1, 8).transpose(0, 1)
    for path in paths:
        path.unlink()
    assert np.array_equal(
        images[3].numpy(), np.concatenate([noise(2 * PAGE, seed=n) for n in (0, 1)]).reshape(-1, 8)[:, 3]
    )
    assert not recwarn.list


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        mapped_bytes([tmp_path / "nowhere"])


# Prints by how many kilobytes what a process shares with no other grows when it reads all of its array. It imports one
# file alone: all of the package takes seconds.
READER = r"""
import re, runpy, sys
from pathlib import Path
mapped_bytes = runpy.run_path(sys.argv[1])["mapped_bytes"]
def own():
    return sum(map(int, re.findall(r"Private_\w+:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text())))
before = own()
array = mapped_bytes(list(map(Path, sys.argv[2:])))
print(sum(int(array[start : start + 2**20].sum()) for start in range(0, len(array), 2**20)), flush=True)
sys.stdin.readline()
print(own() - before, flush=True)
sys.stdin.readline()  # what nobody else holds any more is one's own
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_processes_hold_one_copy(tmp_path: Path) -> None:
    """The first file, which does not end with a page, is each one's own: 2 MB of 66."""
    sizes = {"a": 2**21 + 1, "b": 2**26}
    for name, size in sizes.items():
        np.full(size, 3, np.uint8).tofile(tmp_path / name)
    command = [sys.executable, "-c", READER, mapped_files.__file__, *(str(tmp_path / name) for name in sizes)]
    readers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [int(reader.stdout.readline()) for reader in readers] == 2 * [3 * sum(sizes.values())]
    grown = []
    for reader in readers:
        print(file=reader.stdin, flush=True)
        grown.append(int(reader.stdout.readline()) * 1024)
    for reader in readers:
        reader.communicate("\n")
    assert all(2**21 <= size < 2**23 for size in grown), grown
