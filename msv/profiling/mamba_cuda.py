"""Mamba's own CUDA scan (package `mamba_ssm`), to time ours against on a GPU. Nothing else in msv needs it.

Only what is timed is compiled, from the package's files as they are: real A; B and C that vary over the sequence; no
gate z. That is a sixteenth of the package's kernels, and takes one core about a minute.
"""

import ctypes
import hashlib
import importlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from types import ModuleType

import torch
from torch import Tensor

PACKAGE, VERSION = "mamba_ssm", "2.3.2.post1"
"""What is downloaded where no source is given."""
MODULE = "selective_scan_cuda"
"""The name under which the package imports its kernels."""

_FOLDER, _BINDING = "csrc/selective_scan", "selective_scan.cpp"
_DTYPES = {"fp32": "float", "fp16": "at::Half", "bf16": "at::BFloat16"}
_PASSES = {"fwd": "SSMParamsBase", "bwd": "SSMParamsBwd"}
# The package's flags that bear on speed, and those without which it does not compile.
_CUDA_FLAGS = [
    *("-O3", "--use_fast_math", "--expt-relaxed-constexpr", "--expt-extended-lambda"),
    *("-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__"),
    *(f"-U__CUDA_NO_{name}__" for name in ("BFLOAT16_OPERATORS", "BFLOAT16_CONVERSIONS")),
    *(f"-U__CUDA_NO_{name}__" for name in ("BFLOAT162_OPERATORS", "BFLOAT162_CONVERSIONS")),
]
# The package makes a kernel for either value of each flag, by its macro BOOL_SWITCH. Ours keeps both only where asked.
_SWITCHES = """
#include <c10/util/Exception.h>
#include "static_switch.h"
#undef BOOL_SWITCH
#define BOOL_SWITCH(COND, NAME, ...) SWITCH_##NAME(COND, NAME, __VA_ARGS__)
#define BOTH(COND, NAME, ...) \\
    [&] { \\
        if (COND) { constexpr bool NAME = true; return __VA_ARGS__(); } \\
        else { constexpr bool NAME = false; return __VA_ARGS__(); } \\
    }()
#define ONLY(VALUE, COND, NAME, ...) \\
    [&] { \\
        TORCH_CHECK((COND) == VALUE, "built for " #NAME " = " #VALUE " only"); \\
        constexpr bool NAME = VALUE; \\
        return __VA_ARGS__(); \\
    }()
#define SWITCH_kIsEvenLen(...) BOTH(__VA_ARGS__)
#define SWITCH_kDeltaSoftplus(...) BOTH(__VA_ARGS__)
#define SWITCH_kIsVariableB(...) ONLY(true, __VA_ARGS__)
#define SWITCH_kIsVariableC(...) ONLY(true, __VA_ARGS__)
#define SWITCH_kHasZ(...) ONLY(false, __VA_ARGS__)
"""


class RivalMissingError(RuntimeError):
    """Mamba's kernels cannot be had here; the message says why and what to do."""


@dataclass(frozen=True)
class Rival:
    """Mamba's CUDA scan.

    The arguments, on the GPU:

        u, delta  (B, D, L)     float32, float16 or bfloat16
        A         (D, N)        float32, N up to 256
        B, C      (B, G, N, L)  as u
        D         (D,)          float32, or None
        delta_bias  (D,)        float32, or None

    As in the package, a tensor whose last dimension is strided is copied. Anything else is a RuntimeError.

    Attributes:
        name: of the package.
        version: of the package, "unknown" if the file does not say.
        kernels: the package's extension module.
    """

    name: str
    version: str
    kernels: ModuleType

    def forward(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = True,
    ) -> Tensor:
        """Returns y (B, D, L) in the dtype of u; no graph is kept."""
        u, delta, B, C = (_rows(t) for t in (u, delta, B, C))
        return self.kernels.fwd(u, delta, A, B, C, D, None, delta_bias, delta_softplus)[0]

    def forward_backward(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        dy: Tensor,
        delta_softplus: bool = True,
    ) -> tuple[Tensor, ...]:
        """Returns y, and for dy (B, D, L) in the dtype of u the gradients of u, delta, A, B, C, D and delta_bias.

        Each has the shape and dtype of its tensor; those of D and delta_bias are left out where these are None.
        """
        u, delta, B, C, dy = (_rows(t) for t in (u, delta, B, C, dy))
        rest = (D, None, delta_bias)
        y, states = self.kernels.fwd(u, delta, A, B, C, *rest, delta_softplus)
        *gradients, dD, d_bias = self.kernels.bwd(
            u, delta, A, B, C, *rest, dy, states, None, None, delta_softplus, False
        )
        optional = [gradient for t, gradient in ((D, dD), (delta_bias, d_bias)) if t is not None]
        return y, *gradients, *optional


@dataclass(frozen=True)
class Source:
    """The package's C++ and CUDA.

    Attributes:
        version: of the package, "unknown" if it does not say.
        files: the contents of `csrc/selective_scan`, by name.
    """

    version: str
    files: dict[str, bytes]


def load(source: str | Path | None = None) -> Rival:
    """Finds Mamba's CUDA scan, or compiles it for this GPU and keeps it in torch's extension cache.

    Args:
        source: a source distribution of `mamba_ssm` (.tar.gz), its unpacked folder, or a .so that `build` made. None:
            the installed package, else the source distribution, downloaded by pip.

    Raises:
        RivalMissingError: there is no GPU, no nvcc, no such source; or it does not compile or run.
    """
    if not torch.cuda.is_available():
        raise RivalMissingError(
            f"{PACKAGE}'s CUDA scan needs a GPU, and torch finds none here; run this on a machine with one"
        )
    rival = _installed() if source is None else None
    if rival is None:
        path = Path(source) if source is not None else download()
        rival = _from_file(path if path.suffix == ".so" else build(path, torch.cuda.get_device_capability()))
    try:
        # A file compiled for another kind of GPU loads, and fails here.
        u = torch.zeros(1, 1, 2, device="cuda")
        rival.forward_backward(u, u, u[0, :, :1], u[None], u[None], u[0, 0, :1], u[0, 0, :1], u)
        torch.cuda.synchronize()
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise RivalMissingError(
            f"{rival.name} {rival.version} ({rival.kernels.__file__}) does not run on this GPU: "
            f"{_last_lines(str(error))}; compile it here, from its source distribution"
        ) from error
    return rival


def download() -> Path:
    """The source distribution, by pip from the index that it is set up for; kept in torch's extension cache.

    Raises:
        RivalMissingError: pip cannot download it, or it cannot be kept.
    """
    path = _cache() / f"{PACKAGE}-{VERSION}.tar.gz"
    if path.is_file():
        return path
    # pip runs the package's setup.py for its metadata, which without this variable looks for nvcc.
    variables = {**os.environ, "MAMBA_SKIP_CUDA_BUILD": "TRUE"}
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--retries", "1", "--timeout", "10", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary", PACKAGE, f"{PACKAGE}=={VERSION}"]
    advice = f"download {PACKAGE}-{VERSION}.tar.gz elsewhere and name it as the source"
    try:
        with tempfile.TemporaryDirectory(dir=_cache()) as folder:
            done = subprocess.run(
                [*command, "--dest", folder], capture_output=True, text=True, timeout=600, env=variables, check=False
            )
            found = list(Path(folder).glob("*.tar.gz"))
            if done.returncode or not found:
                raise RivalMissingError(
                    f"pip cannot download {PACKAGE} {VERSION}: {_last_lines(done.stderr)}; {advice}"
                )
            found[0].replace(path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RivalMissingError(f"{PACKAGE} {VERSION} cannot be downloaded: {error}; {advice}") from error
    return path


def read(source: str | Path) -> Source:
    """The files to compile, from a source distribution (.tar.gz) or its unpacked folder.

    Raises:
        RivalMissingError: there is no such file or folder, it cannot be read, or it is another package's.
    """
    advice = f"expected the source distribution of {PACKAGE} (.tar.gz), or its unpacked folder"
    if not Path(source).exists():
        raise RivalMissingError(f"{source} does not exist; {advice}")
    try:
        found = dict(_members(Path(source)))
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise RivalMissingError(f"{source} cannot be read: {error}; {advice}") from error
    files = {PurePosixPath(name).name: text for name, text in found.items() if name.startswith(f"{_FOLDER}/")}
    if _BINDING not in files:
        raise RivalMissingError(f"{source} holds no {_FOLDER}/{_BINDING}; {advice}")
    told = found.get("PKG-INFO", b"") + b"\n" + found.get(f"{PACKAGE}/__init__.py", b"")
    version = re.search(r"^(?:Version:|__version__ =)\s*[\"']?([\w.+]+)", told.decode(errors="replace"), re.MULTILINE)
    return Source(version[1] if version else "unknown", files)


def build(source: str | Path, capability: tuple[int, int]) -> Path:
    """Compiles the scan for one kind of GPU, which need not be here; returns the .so, at once if it was made before.

    Args:
        source: as `read` takes it.
        capability: of the GPU, as `torch.cuda.get_device_capability` gives it: (9, 0) for an H100.

    Raises:
        RivalMissingError: the source cannot be read, there is no nvcc, or it does not compile.
    """
    package = read(source)
    arch = "{}{}".format(*capability)
    ours = _sources(package.version)
    files = {**package.files, **ours}
    known = [torch.__version__, sys.implementation.cache_tag, platform.machine(), arch, *_CUDA_FLAGS]
    known += [f"{name} {hashlib.sha256(text).hexdigest()}" for name, text in sorted(files.items())]
    path = _cache() / f"{MODULE}-{hashlib.sha256(repr(known).encode()).hexdigest()[:12]}.so"
    if path.is_file():
        return path
    try:
        # Not above: it warns as it is imported where there is nvcc and no GPU, and needs setuptools.
        from torch.utils import cpp_extension
    except ImportError as error:
        raise RivalMissingError(f"torch cannot compile extensions: {error}; pip install setuptools") from error
    home = cpp_extension.CUDA_HOME
    if home is None or shutil.which("nvcc", path=str(Path(home) / "bin")) is None:
        raise RivalMissingError(
            f"compiling {PACKAGE}'s CUDA scan needs nvcc, and there is none here; "
            f"install CUDA {torch.version.cuda}'s toolkit and set CUDA_HOME to its folder"
        )
    try:
        with tempfile.TemporaryDirectory(dir=_cache()) as folder:
            for name, text in files.items():
                (Path(folder) / name).write_bytes(text)
            made = cpp_extension.load(
                MODULE,
                [str(Path(folder) / name) for name in (_BINDING, *ours)],
                # torch numbers the names of what is compiled twice in a process; the module keeps its own.
                extra_cflags=["-O3", "-UTORCH_EXTENSION_NAME", f"-DTORCH_EXTENSION_NAME={MODULE}"],
                extra_cuda_cflags=[*_CUDA_FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}"],
                build_directory=folder,
                is_python_module=False,
            )
            Path(made).replace(path)
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        raise RivalMissingError(
            f"{PACKAGE} {package.version} does not compile with torch {torch.__version__} and {home}: "
            f"{_last_lines(str(error))}; set CUDA_HOME to a toolkit of CUDA {torch.version.cuda}, torch's own"
        ) from error
    return path


def _sources(version: str) -> dict[str, bytes]:
    """What is compiled beside the package's binding, by file name.

    The kernels, a file for each pass and dtype; those that the binding names and nobody here calls, as errors; and the
    version, for `load` to read from the .so.
    """
    signature = "template {} void selective_scan_{}_cuda{}({} &, cudaStream_t)"
    texts = {}
    rest = ["#include <c10/util/BFloat16.h>", "#include <c10/util/Half.h>", "#include <c10/util/complex.h>"]
    rest += ["#include <c10/util/Exception.h>", "#include <cuda_runtime_api.h>", '#include "selective_scan.h"']
    for way, parameters in _PASSES.items():
        rest.append(signature.format("<typename T, typename W>", way, "", parameters) + ";")
        for name, dtype in _DTYPES.items():
            kernels = signature.format("", way, f"<{dtype}, float>", parameters)
            texts[f"msv_{way}_{name}.cu"] = f'{_SWITCHES}#include "selective_scan_{way}_kernel.cuh"\n{kernels};\n'
            missing = signature.format("<>", way, f"<{dtype}, c10::complex<float>>", parameters)
            rest.append(missing + ' { TORCH_CHECK(false, "built for real A only"); }')
    rest.append(
        f'extern "C" __attribute__((visibility("default"))) const char *msv_version() {{ return "{version}"; }}'
    )
    texts["msv_rest.cpp"] = "\n".join([*rest, ""])
    return {name: text.encode() for name, text in texts.items()}


def _members(source: Path) -> Iterator[tuple[str, bytes]]:
    """The path inside the package and the contents of each file that is needed."""
    wanted = re.compile(rf"{_FOLDER}/[^/]+\.(cpp|h|cuh|cu)|PKG-INFO|{PACKAGE}/__init__\.py")
    if source.is_dir():
        for path in (*(source / _FOLDER).glob("*"), source / "PKG-INFO", source / PACKAGE / "__init__.py"):
            name = path.relative_to(source).as_posix()
            if wanted.fullmatch(name) and path.is_file():
                yield name, path.read_bytes()
        return
    with tarfile.open(source, "r:gz") as archive:
        for member in archive:
            name = PurePosixPath(*PurePosixPath(member.name).parts[1:]).as_posix()
            file = archive.extractfile(member) if wanted.fullmatch(name) else None
            if file is not None:
                yield name, file.read()


def _installed() -> Rival | None:
    """What `mamba_ssm` installed; None if there is nothing, or nothing that this torch can load."""
    try:
        return Rival(PACKAGE, metadata.version(PACKAGE), importlib.import_module(MODULE))
    except (ImportError, OSError):
        return None


def _from_file(path: Path) -> Rival:
    spec = importlib.util.spec_from_file_location(MODULE, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise RivalMissingError(f"{path} does not exist; expected a .so that msv.profiling.mamba_cuda.build made")
    try:
        kernels = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(kernels)
        library = ctypes.CDLL(str(path.resolve()))
    except (ImportError, OSError) as error:
        raise RivalMissingError(
            f"{path} cannot be loaded by torch {torch.__version__} and Python {platform.python_version()}: {error}; "
            "compile it again with these, from the source distribution"
        ) from error
    if not hasattr(library, "msv_version"):
        return Rival(PACKAGE, "unknown", kernels)
    library.msv_version.restype = ctypes.c_char_p
    return Rival(PACKAGE, library.msv_version().decode(), kernels)


def _cache() -> Path:
    default = Path.home() / ".cache" / "torch_extensions"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default) / "msv_mamba"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RivalMissingError(
            f"{folder} cannot be made: {error}; set TORCH_EXTENSIONS_DIR to a folder of yours"
        ) from error
    return folder


def _last_lines(output: str) -> str:
    """What went wrong, of a long output: its lines that tell an error, else its last; three at most."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    wrong = [line for line in lines if "error:" in line.lower()] or lines
    return " | ".join(line[:300] for line in wrong[-3:])


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
