"""neural-tangents' structured derivatives for ``tangents.py``, which starts this in a process of its own.

It reads a file of parameters and inputs, answers each line on standard input with the processor seconds of one kernel,
and writes the kernel beside that file at the end.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import jax  # noqa: E402 - it reads its flags when it is imported
import neural_tangents as nt  # noqa: E402
import numpy as np  # noqa: E402
from jax import numpy as jnp  # noqa: E402

CHANNELS = ("NCHW", "OIHW", "NCHW")


def network(parameters: list[Any], x: Any) -> Any:
    """Return the outputs of layers with a ReLU between them; those of images are averaged before the last one."""
    *inner, (weight, bias) = parameters
    for kernel, shift in inner:
        if kernel.ndim == 4:
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=CHANNELS)
            x = jax.nn.relu(x + shift[:, None, None])
        else:
            x = jax.nn.relu(x @ kernel + shift)
    return (x.mean((2, 3)) if x.ndim == 4 else x) @ weight + bias


def main() -> None:
    """Answer one line after the other."""
    path = Path(sys.argv[1])
    jax.config.update("jax_enable_x64", True)
    given = np.load(path)
    values = [jnp.asarray(given[f"arr_{index}"]) for index in range(len(given.files))]
    x, parameters = values[0], list(zip(values[1::2], values[2::2], strict=True))
    # without vmap_axes it takes 6.9 s for the wide network, and 0.11 s with
    kernel = jax.jit(
        nt.empirical_ntk_fn(
            network, vmap_axes=0, implementation=nt.NtkImplementation.STRUCTURED_DERIVATIVES, trace_axes=(-1,)
        )
    )
    kernel(x, None, parameters).block_until_ready()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        result = kernel(x, None, parameters).block_until_ready()
        print(time.process_time() - start, flush=True)
    np.save(path.with_suffix(".npy"), np.asarray(result))


if __name__ == "__main__":
    main()
