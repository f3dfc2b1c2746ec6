"""The CUDA driver through ctypes: which GPU is here, and the device memory that an engine needs.

Engines run on devices where neither torch nor any Python binding of CUDA is installed, but the driver library is always
there, so these few calls go to it directly.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headwise.errors import MachineError

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


class Gpu(NamedTuple):
    """The first CUDA device.

    Attributes:
        name: as the driver says it, ``NVIDIA L4``.
        sm: compute capability without the dot, 89 for 8.9.
    """

    name: str
    sm: int


def _library() -> Any | None:
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def gpu() -> Gpu | None:
    """The first GPU that the driver offers, or None when there is no driver or no device."""
    cuda = _library()
    if cuda is None or cuda.cuInit(0) != 0:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if cuda.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    return Gpu(name=name.value.decode(), sm=10 * major.value + minor.value)


def require_gpu() -> Gpu:
    """The first GPU.

    Raises:
        MachineError: there is none.
    """
    found = gpu()
    if found is None:
        raise MachineError(
            "no GPU", expected="a CUDA device and its driver", fix="run this step on a machine with an NVIDIA GPU"
        )
    return found


class DeviceMemory:
    """One stream and named, growing device buffers in the primary context of the first GPU.

    Raises:
        MachineError: there is no GPU, or the driver refuses a call (out of memory, for example).
    """

    def __init__(self) -> None:
        require_gpu()
        self._cuda: Any = _library()
        self._buffers: dict[str, tuple[ctypes.c_uint64, int]] = {}
        self._device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuStreamCreate", ctypes.byref(stream), 0)
        self._stream = stream

    @property
    def stream(self) -> int:
        """The stream's handle, as the engine runtime takes it."""
        return self._stream.value or 0

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._cuda, function)(*arguments)
        if code != 0:
            raise MachineError(
                f"the CUDA driver answered {function} with error {code}",
                expected="a working driver with enough free device memory",
                fix="see what else runs on the GPU (nvidia-smi), or take a smaller batch",
            )

    def reserve(self, name: str, size: int) -> int:
        """The address of the buffer ``name`` with at least ``size`` bytes; its content is not kept."""
        pointer, room = self._buffers.get(name, (ctypes.c_uint64(), 0))
        if size > room or not pointer.value:
            if pointer.value:
                self._call("cuMemFree_v2", pointer)
                del self._buffers[name]
            pointer = ctypes.c_uint64()
            self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
            self._buffers[name] = (pointer, size)
        return int(pointer.value)

    def upload(self, name: str, array: NDArray[Any]) -> int:
        """Copy a contiguous array to the buffer ``name``; its address."""
        address = self.reserve(name, array.nbytes)
        if array.nbytes:  # an empty past has an address, and nothing to copy
            source = array.ctypes.data_as(ctypes.c_void_p)
            self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), source, ctypes.c_size_t(array.nbytes))
        return address

    def download(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Wait for the stream, then copy the buffer ``name`` into a new array."""
        self._call("cuStreamSynchronize", self._stream)
        array = np.empty(shape, dtype)
        pointer, _ = self._buffers[name]
        self._call("cuMemcpyDtoH_v2", array.ctypes.data_as(ctypes.c_void_p), pointer, ctypes.c_size_t(array.nbytes))
        return array

    def free(self) -> int:
        """Bytes of device memory that nobody has taken; on a Jetson the memory is that of the CPU, too."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return int(free.value)

    def close(self) -> None:
        """Free the buffers, the stream and the context."""
        for pointer, _ in self._buffers.values():
            self._call("cuMemFree_v2", pointer)
        self._buffers.clear()
        self._call("cuStreamDestroy_v2", self._stream)
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)
