"""Compile kernels for a GPU that is not there: triton brings the assembler along, and needs a device only to run them.

Interpreted, a kernel may do what its compiler refuses. This runs in a process of its own, for a process that interprets
kernels cannot compile any.
"""

import inspect
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def compiled(module, **kernels):
    """Compile kernels of a module of `lit_opd.kernels` for Hopper, and tell the bytes of registers that each spills.

    Each kernel, by its name, has a list of variants: a mapping of its constants, and one of the types of its arguments
    that are no int32.
    """
    calls = [
        f"compile_kernel(module.{name}, *{variant!r})" for name, variants in kernels.items() for variant in variants
    ]
    script = "\n".join(
        [*map(inspect.getsource, (compile_kernel, spilt)), f"import lit_opd.kernels.{module} as module", *calls]
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    imports = "import re, subprocess, tempfile\nfrom pathlib import Path\n"
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-c", imports + script]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment | {"TRITON_CACHE_DIR": cache}
        )
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(line) for line in done.stdout.split()]


def compile_kernel(kernel, constants, types):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    print(spilt(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["cubin"]))


def spilt(cubin):
    import triton

    with tempfile.NamedTemporaryFile() as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"LOCAL:(\d+)", told)[1])
