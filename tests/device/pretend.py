"""A device without hardware: `register()` gives torch the device type 'pretend', with two devices.

Memory is the host's, operators run on the CPU; operands on two devices raise as CUDA's do, and so does a generator of
another device. `Watch` counts what would make a CUDA host wait or copy, by the line of code that asked for it.
"""

from __future__ import annotations

import collections
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("pretend.cpp")
NAME = "pretend"


class Unbuilt(Exception):
    """The pretended device cannot be built here."""


def register():
    """Build the extension where it is not built yet (a minute), and register the device type; once a process.

    Raises:
        Unbuilt: there is no g++, or it does not build here.
    """
    if NAME not in sys.modules.get("_pretend_state", {}):
        torch.utils.rename_privateuse1_backend(NAME)
        torch._register_device_module(NAME, _Module(_load()))
        torch.utils.generate_methods_for_privateuse1_backend(for_packed_sequence=False)
        # `Module.to` would make new parameters for a type that it does not know, and tied ones would part.
        torch.__future__.set_swap_module_params_on_conversion(True)
        sys.modules["_pretend_state"] = {NAME: True}
    return torch.device(NAME, 0)


def _load():
    library = _built()
    spec = importlib.util.spec_from_file_location("_pretend", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["_pretend"] = module
    return module


def _built() -> Path:
    if shutil.which("g++") is None:
        raise Unbuilt("the pretended device is built with g++, which is not here")
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode() + sys.version.encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"sparsekit-pretend-{os.getuid()}-{key}" / "_pretend.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        root, unfinished = Path(torch.__file__).parent, library.with_suffix(f".{os.getpid()}")
        include = [root / "include", root / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]]
        command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-w", "-DTORCH_EXTENSION_NAME=_pretend"]
        command += [
            "-DTORCH_API_INCLUDE_EXTENSION_H",
            str(SOURCE),
            "-o",
            str(unfinished),
            *(f"-I{path}" for path in include),
        ]
        command += [
            f"-L{root / 'lib'}",
            "-ltorch",
            "-ltorch_cpu",
            "-lc10",
            "-ltorch_python",
            f"-Wl,-rpath,{root / 'lib'}",
        ]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            raise Unbuilt(f"g++ does not build the pretended device here: {built.stderr[-500:]}")
        os.replace(unfinished, library)
    return library


class _Module:
    """What torch.cuda has, as far as it is used."""

    def __init__(self, C):
        self.C = C
        self.is_available = self.is_initialized = lambda: True
        self._is_in_bad_fork = lambda: False
        self.device_count, self.current_device = C.count, C.current
        self.empty_cache = lambda: None
        self.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
        self.manual_seed = self.manual_seed_all = lambda seed: C.seed(seed & (2**64 - 1))
        module = self

        class device:
            def __init__(self, which):
                self.which = module._index(which)

            def __enter__(self):
                self.before = C.current()
                C.set(self.which)

            def __exit__(self, *_):
                C.set(self.before)

        self.device = device

    def _index(self, device):
        if device is None:
            return self.C.current()
        device = torch.device(NAME, device) if isinstance(device, int) else torch.device(device)
        return self.C.current() if device.index is None else device.index

    def set_device(self, device):
        self.C.set(self._index(device))

    def synchronize(self, device=None):
        pass

    def mem_get_info(self, device=None):
        return self.C.limit() - self.C.live(), self.C.limit()

    def memory_allocated(self, device=None):
        return self.C.live()

    memory_reserved = memory_allocated  # it has no cache

    def max_memory_allocated(self, device=None):
        return self.C.peak()

    def reset_peak_memory_stats(self, device=None):
        self.C.reset_peak()

    def get_device_name(self, device=None):
        return "pretended"

    def get_rng_state(self, device=None):
        return self.C.state(self._index(device))

    def set_rng_state(self, state, device=None):
        self.C.set_state(state, self._index(device))


class Watch:
    """Counts host waits and copies by (kind, operator, file:line) while it is open.

    Attributes:
        count, bytes: of each; kinds are sync, h2d, d2h, d2h-nonblocking, h2d-index, and linalg, which is no wait.
        launches, peak: operators, and bytes allocated at most.
    """

    def __init__(self, roots=("sparsekit",)):
        self.roots, self.count, self.bytes = roots, collections.Counter(), collections.Counter()
        self.C = sys.modules["_pretend"]

    def _seen(self, kind, operator, size):
        frame, where = sys._getframe(1), "?"
        while frame is not None:
            name = frame.f_code.co_filename
            if any(f"/{root}" in name for root in self.roots) and "site-packages" not in name and "/tests/" not in name:
                where = f"{name[name.rindex('/sparsekit') + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}"
                break
            frame = frame.f_back
        self.count[kind, operator, where] += 1
        self.bytes[kind, operator, where] += size

    def __enter__(self):
        self.launches = self.C.launches()
        self.C.reset_peak()
        self.C.observe(self._seen)
        return self

    def __exit__(self, *_):
        self.C.observe(None)
        self.launches = self.C.launches() - self.launches
        self.peak = self.C.peak()

    def waits(self):
        """What makes the host wait, by place: everything but copies to the device and notes of factorisations."""
        return collections.Counter(
            {key: n for key, n in self.count.items() if key[0] not in ("h2d", "linalg", "d2h-nonblocking")}
        )

    def table(self, most=40):
        rows = [
            f"{n:8d} {self.bytes[key] / 2**20:10.2f} MiB  {key[0]:8s} {key[1][:60]:40s} {key[2]}"
            for key, n in self.count.most_common(most)
        ]
        return "\n".join([f"launches {self.launches}, peak {self.peak / 2**20:.1f} MiB", *rows])
