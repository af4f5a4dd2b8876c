"""A pretend GPU: CPU tensors marked as being on a device, with the errors and the synchronisations of a GPU.

A tensor is on the device if its storage is marked; views, ``detach()``, ``.data`` and parameters share the mark. Values
are real and results equal those of the CPU bit for bit: whole Trainers run.

Raised: operands on two devices, ``numpy()`` of a device tensor, CPU generators, operations without a CUDA kernel,
float64 on ``mps``. Counted by source line: operations for which the CPU waits (values read, masks as indices, blocking
copies in both directions), and random draws on the device.

Not covered: copies made by ``torch.save``, rounding and limits of real kernels, streams, NCCL.
"""

import sys
from collections import Counter
from contextlib import ExitStack
from unittest import mock

import torch
from lightning.fabric.accelerators import MPSAccelerator
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode

BASE, PACKAGE = torch._C.TensorBase, "/stepwise_lightning/"
# A device tensor accepts CPU indices, not the reverse.
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
ACROSS_DEVICES = INDEXING | {"aten::copy_", "aten::_to_copy", "aten::_has_compatible_shallow_copy_type"}
# Operations whose result or size the CPU must read.
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2"}
# the second name in earlier versions of torch
GRAPH_CHECKS = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
GRAPH_CHECK = next(name for name in GRAPH_CHECKS if hasattr(torch.optim.Optimizer, name))
NO_FLOAT64 = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"


def is_on_device(t: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return t.layout == torch.strided and not t.is_meta and getattr(t.untyped_storage(), "on_pretend_gpu", False)


def tensors_in(*values) -> list[Tensor]:
    """Return the tensors in nested containers; faster than torch's pytree."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(*value)
        elif isinstance(value, dict):
            found += tensors_in(*value.values())
    return found


class PretendGPU(TorchDispatchMode):
    """Context with one pretend device: ``with PretendGPU("cuda") as gpu: x.to(gpu.device)``.

    Attributes:
        device: ``cuda:0`` or ``mps:0``.
        waits: number of synchronisations by (operation, "file function" of this package or "elsewhere").
        draws: number of random draws on the device by operation.

    """

    def __init__(self, kind="cuda"):
        super().__init__()
        self.kind, self.device = kind, torch.device(kind, 0)
        self.waits, self.draws = Counter(), Counter()
        self.in_device_function = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name
        operands, device = tensors_in(args, kwargs), kwargs.get("device")
        creates = device is not None and torch.device(device).type == self.kind
        if creates:
            kwargs["device"] = torch.device("cpu")
        on = [t for t in operands if is_on_device(t)]
        self._check_devices(name, args, operands, on)
        if on or creates:
            self._check_draw(func, kwargs)
        if on:
            self._check_kernel(func)
            self._count_wait(name, args, operands, on)
        result = func(*args, **kwargs)
        if name == "aten::copy_":  # into a tensor that stays on its device
            return result
        for t in tensors_in(result) if on or creates or (self.in_device_function and not operands) else ():
            if self.kind == "cuda" or t.dtype != torch.float64:
                t.untyped_storage().on_pretend_gpu = True
            elif on or creates:  # otherwise an allocation in the backward pass of the CPU's part of a graph
                raise TypeError(NO_FLOAT64)
        return result

    def _check_devices(self, name, args, operands, on):
        # zero-dimensional CPU tensors are accepted by device kernels
        off = [t for t in operands if not is_on_device(t) and t.ndim and not t.is_meta]
        allowed = name in ACROSS_DEVICES and not (name in INDEXING and not is_on_device(args[0]))
        if on and off and not allowed and not name.startswith("profiler::"):
            raise RuntimeError(f"{name}: expected all tensors on one device, got {self.device} and cpu {off[0].shape}")

    def _check_draw(self, func, kwargs):
        if torch.Tag.nondeterministic_seeded in func.tags:
            if kwargs.get("generator") is not None:
                raise RuntimeError(f"{func._schema.name}: expected a '{self.kind}' generator, got 'cpu'")
            self.draws[func._schema.name] += 1

    def _check_kernel(self, func):
        if self.kind == "cuda" and torch.backends.cuda.is_built():
            composite = "CompositeExplicitAutograd"
            keys = ("CUDA", composite, f"{composite}NonFunctional", "CompositeImplicitAutograd")
            if not any(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) for key in keys):
                raise NotImplementedError(f"{func.name()} has no CUDA kernel")

    def _count_wait(self, name, args, operands, on):
        masks = name in INDEXING and any(t.dtype in (torch.bool, torch.uint8) for t in operands[1:])
        cpu_indices = name in INDEXING and any(t.ndim and not is_on_device(t) for t in operands)
        crosses = name == "aten::copy_" and is_on_device(args[0]) != is_on_device(args[1])
        if name in WAITING or masks or cpu_indices or (crosses and not (len(args) > 2 and args[2])):
            self.count(name.removeprefix("aten::"))

    def count(self, operation):
        frame = sys._getframe(1)
        # asynchronous.py waits for its callers
        while frame is not None and (PACKAGE not in (path := frame.f_code.co_filename) or "/asynchronous.py" in path):
            frame = frame.f_back
        place = frame and f"{frame.f_code.co_filename.rpartition(PACKAGE)[2]} {frame.f_code.co_name}"
        self.waits[operation, place or "elsewhere"] += 1

    def moved(self, x, to_device, dtype, blocking):
        # A combined move and cast casts on the source.
        on_mps = self.kind == "mps" and (to_device or x.dtype != torch.float64)
        if on_mps and (dtype or x.dtype) == torch.float64:
            raise TypeError(NO_FLOAT64)
        if blocking or not to_device:
            self.count("to the GPU" if to_device else "to the CPU")
        with torch._C._DisableTorchDispatch():
            copy = BASE.to(x.detach(), dtype=dtype or x.dtype, copy=True)
        copy.untyped_storage().on_pretend_gpu = to_device
        return copy

    def to(self, t, *args, **kwargs):
        """Replace ``Tensor.to``."""
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        named = {k: v for k, v in kwargs.items() if k in ("device", "dtype", "non_blocking")}
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*[a for a in args if not isinstance(a, bool)], **named)
        if t.is_meta or (device is not None and device.type == "meta"):
            return BASE.to(t, *args, **kwargs)
        to_device = (t.device if device is None else device).type == self.kind
        if to_device != is_on_device(t):
            t = _Move.apply(t, self, to_device, dtype, not (non_blocking or True in args))
        rest = {k: v for k, v in kwargs.items() if k in ("copy", "memory_format")}
        return BASE.to(t, dtype or t.dtype, **rest)

    def __enter__(self):
        self._stack = ExitStack()
        for owner, changes in self._replacements():
            for name, value in changes.items():
                self._stack.enter_context(mock.patch.object(owner, name, value))
        self._stack.enter_context(_DeviceFunctions(self))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._stack.close()

    def _replacements(self):
        cuda, cpu_device, rng_state = self.kind == "cuda", BASE.device, [torch.get_rng_state()]

        def device(t):
            with torch._C.DisableTorchFunction():
                return self.device if is_on_device(t) else cpu_device.__get__(t)

        def numpy(t, *args, **kwargs):
            if is_on_device(t):
                raise TypeError(f"can't convert {self.device} device type tensor to numpy")
            return BASE.numpy(t, *args, **kwargs)

        def tolist(t):
            if is_on_device(t):
                self.count("tolist")
            return BASE.tolist(t)

        methods = dict(
            device=property(device), is_cuda=property(lambda t: cuda and is_on_device(t)), numpy=numpy, tolist=tolist,
            to=lambda t, *args, **kwargs: self.to(t, *args, **kwargs), cpu=lambda t, *args, **kwargs: self.to(t, "cpu"),
            cuda=lambda t, *args, **kwargs: self.to(t, self.device), pin_memory=lambda t, *args: t,
            new_tensor=lambda t, data, dtype=None: torch.tensor(data, dtype=dtype or t.dtype, device=t.device),
        )  # fmt: skip
        machine = dict(
            is_available=lambda: True, device_count=lambda: 1, is_initialized=lambda: True, _lazy_init=lambda: None,
            set_device=lambda d: None, current_device=lambda: 0, empty_cache=lambda: None,
            get_device_capability=lambda d=None: (9, 0), get_device_name=lambda d=None: "pretend GPU",
            get_rng_state=lambda d=0: rng_state[0].clone(), set_rng_state=lambda s, d=0: rng_state.__setitem__(0, s),
            is_bf16_supported=lambda *args: True, current_stream=lambda d=None: None, Event=lambda: _Event(self),
        )  # fmt: skip
        creation = {name: self._with_device(getattr(torch, name)) for name in ("tensor", "as_tensor")}
        return [
            (Tensor, methods),
            (torch.cuda, machine if cuda else {}),
            (torch, creation | {"autocast": _CPUAutocast}),
            (torch.optim.Optimizer, {GRAPH_CHECK: lambda optimizer: None}),
            (MPSAccelerator, {} if cuda else {"is_available": staticmethod(lambda: True)}),
        ]

    def _with_device(self, create):
        def created(data, *args, device=None, **kwargs):
            modes = reversed(_get_current_function_mode_stack())  # of ``with torch.device``
            device = device or next((mode.device for mode in modes if isinstance(mode, DeviceContext)), None)
            t = create(data, *args, device="cpu", **kwargs)
            return t if device is None else t.to(device)

        return created


class _Event:
    """CUDA event, for which the CPU may wait."""

    def __init__(self, gpu):
        self.gpu = gpu

    def record(self, stream=None):
        """Do nothing: the pretend GPU has completed all operations."""

    def synchronize(self):
        self.gpu.count("event")


class _Move(torch.autograd.Function):
    """Copy between the CPU and the device, with the reverse copy of the gradient."""

    @staticmethod
    def forward(ctx, x, gpu, to_device, dtype, blocking):
        ctx.gpu, ctx.back, ctx.dtype = gpu, is_on_device(x), x.dtype
        return gpu.moved(x, to_device, dtype, blocking)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.gpu.moved(gradient, ctx.back, ctx.dtype, True), None, None, None, None


class _DeviceFunctions(TorchFunctionMode):
    """Mark tensors that a function of device tensors allocates without operands."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        before = self.gpu.in_device_function
        self.gpu.in_device_function = before or any(map(is_on_device, tensors_in(args, kwargs)))
        try:
            return func(*args, **kwargs or {})
        finally:
            self.gpu.in_device_function = before


class _CPUAutocast(torch.autocast):
    """Autocast of the CPU, because CPU kernels compute."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu", *args, **kwargs)
