"""Tangent kernels from neural-tangents' structured derivatives, in a separate process of ``tangents.py``.

Read parameters and inputs from a file, compute a kernel for each line on standard input and print its processor
seconds, and write the last kernel next to the file.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import jax  # noqa: E402 - jax reads XLA_FLAGS on import
import neural_tangents as nt  # noqa: E402
import numpy as np  # noqa: E402
from jax import numpy as jnp  # noqa: E402

CHANNELS = ("NCHW", "OIHW", "NCHW")


def network(parameters: list[Any], x: Any) -> Any:
    """Return the outputs of layers with ReLU between them and, for images, average pooling before the last layer."""
    *inner, (weight, bias) = parameters
    for kernel, shift in inner:
        if kernel.ndim == 4:
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=CHANNELS)
            x = jax.nn.relu(x + shift[:, None, None])
        else:
            x = jax.nn.relu(x @ kernel + shift)
    return (x.mean((2, 3)) if x.ndim == 4 else x) @ weight + bias


def main() -> None:
    """Compute one kernel for each line of standard input."""
    path = Path(sys.argv[1])
    jax.config.update("jax_enable_x64", True)
    arrays = np.load(path)
    values = [jnp.asarray(arrays[f"arr_{index}"]) for index in range(len(arrays.files))]
    x, parameters = values[0], list(zip(values[1::2], values[2::2], strict=True))
    # vmap_axes reduces the time of the wide network from 6.9 s to 0.11 s
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
