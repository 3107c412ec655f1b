#!/usr/bin/env python3
"""Compiles XLA programs that TensorFlow lowered, for another kind of device.

TensorFlow lowers a function, variables included, without running it and without
that device:

    step = tf.function(model.train_step, jit_compile=True)
    hlo = step.experimental_get_compiler_ir((x, y))(stage="hlo_serialized")
    pathlib.Path("step.hlo").write_bytes(hlo)

This program reads such files and prints a line of JSON for each:

    tools/hlo_report.py --target tpu:v5e:2x2 step.hlo
    tools/hlo_report.py --target local step.hlo

For a TPU it needs JAX and libtpu, but no TPU: the compiler works ahead of time.
`local` needs JAX alone, compiles for its default device and runs the programs.
Install both in an environment of their own, without TensorFlow.

What is printed:

- `compile_seconds`.
- `argument_bytes`: what the program reads: weights, other variables, the batch.
- `output_bytes`: what it returns, values of variables included.
- `alias_bytes`: the part of the outputs that is written over an argument. The
  rest is new memory.
- `temp_bytes`: scratch in the device's main memory. What the compiler keeps on
  the chip is not counted, which for a small program may be all there is.
- `peak_bytes`: what is in use at the worst moment: arguments, outputs and
  scratch, on the chip too. A CPU's compiler leaves the scratch out.
- `flops`: the compiler's estimate, or null.
- `median_ms` and `min_ms`, for `local`: time of a run, on random inputs.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import re
import statistics
import sys
import time

WARM_UP_RUNS = 2


def main() -> None:
    """Reports on the files that the command line names."""
    options = parse_arguments()
    try:
        check_files(options.programs)
        check_target(options.target)
        check_installed(options.target)
        device = find_device(options.target)
        for path in options.programs:
            row = {"program": path.name, "target": options.target}
            row |= report(path, device, options.runs)
            print(json.dumps(row), flush=True)
    except ValueError as error:
        sys.exit(f"{pathlib.Path(__file__).name}: error: {error}")


def parse_arguments():
    """Returns the command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--target",
        default="tpu:v5e:2x2",
        help="`tpu:<version>:<chips>` or `local`; default: %(default)s",
    )
    parser.add_argument(
        "--runs",
        type=int,
        default=20,
        help="runs to time, for `local`; default: %(default)s",
    )
    parser.add_argument(
        "programs", nargs="+", type=pathlib.Path, help="serialized HLO files"
    )
    return parser.parse_args()


def check_files(paths):
    """Raises a `ValueError` if a file is missing."""
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"`programs` must be files. Missing: {missing}.")


def check_target(target):
    """Raises a `ValueError` if a target is not written as one."""
    if target != "local" and not re.fullmatch(r"tpu:\w+:\d+(x\d+)*", target):
        raise ValueError(
            "`--target` must be `local` or `tpu:<version>:<chips>`, as in "
            f"tpu:v5e:2x2. Received: --target={target}"
        )


def check_installed(target):
    """Raises a `ValueError` if a package that a target needs is missing."""
    needed = ["jax"] if target == "local" else ["jax", "libtpu"]
    missing = [name for name in needed if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(
            f"--target={target} needs packages that {sys.executable} does not "
            f"have. Missing: {missing}. Install them with "
            f"`pip install {' '.join(needed)}`, best in an environment of "
            "their own."
        )


def find_device(target):
    """Returns the device to compile for."""
    return local_device() if target == "local" else tpu_device(target)


def local_device():
    """JAX's default device."""
    import jax

    # Without it JAX would make 32-bit integers of TensorFlow's 64-bit ones.
    jax.config.update("jax_enable_x64", True)
    return jax.devices()[0]


def tpu_device(target):
    """Returns a TPU that need not be there; it can be compiled for only."""
    # JAX and libtpu would look for a TPU, and ask the network about it.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    import jax
    from jax.experimental import topologies

    platform, _, topology = target.partition(":")
    try:
        return topologies.get_topology_desc(topology, platform).devices[0]
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            "`--target` must name a TPU that libtpu knows. Received: "
            f"--target={target}. It says: {error}"
        ) from error


def report(path, device, runs):
    """Returns what is printed of one program, as a dict."""
    module = read_module(path)
    begin = time.perf_counter()
    executable = compile_module(module, device)
    row = {"compile_seconds": round(time.perf_counter() - begin, 2)}
    row |= planned(executable)
    if can_run(device):
        row |= timed(executable, module, device, runs)
    return row


def read_module(path):
    """Returns the StableHLO module that a serialized HLO file holds."""
    import jax
    from jax.extend import mlir
    from jax.extend.mlir import ir
    from jax.interpreters.mlir import make_ir_context

    try:
        serialized = mlir.hlo_to_stablehlo(path.read_bytes())
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            "`programs` must be serialized HLO, which TensorFlow returns for "
            f'`stage="hlo_serialized"`. Received: {path}. JAX says: {error}'
        ) from error
    module = ir.Module.parse(serialized, make_ir_context())
    remove_copies(module)
    return module


def remove_copies(module):
    """Replaces `mhlo.copy`, which compilers do not take, by what is copied.

    It means nothing to the values. Where memory must be copied is for the
    compiler to find out.
    """
    from jax.extend.mlir import ir

    copies = []

    def collect(operation):
        if operation.name == "mhlo.copy":
            copies.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(collect)
    for copy in copies:
        copy.results[0].replace_all_uses_with(copy.operands[0])
        copy.erase()


def can_run(device):
    """Returns whether a device is there, and not just described."""
    return not type(device.client).__name__.startswith("CompileOnly")


def compile_module(module, device):
    """Returns the executable that a device's compiler makes of a module."""
    from jax.extend import backend

    # JAX has no public name for compiling a module that it did not make.
    from jaxlib import xla_client

    client = device.client
    compiler = client.compile_and_load if can_run(device) else client.compile
    return compiler(
        module,
        executable_devices=xla_client.DeviceList((device,)),
        compile_options=backend.get_compile_options(
            num_replicas=1, num_partitions=1
        ),
    )


def planned(executable):
    """Returns the compiler's plan for an executable: memory and arithmetic."""
    stats = executable.get_compiled_memory_stats()
    costs = executable.cost_analysis() or {}
    return {
        "argument_bytes": stats.argument_size_in_bytes,
        "output_bytes": stats.output_size_in_bytes,
        "alias_bytes": stats.alias_size_in_bytes,
        "temp_bytes": stats.temp_size_in_bytes,
        "peak_bytes": stats.peak_memory_in_bytes,
        "flops": costs.get("flops"),
    }


def timed(executable, module, device, runs):
    """Returns times of `runs` runs of an executable, after some to warm up."""
    import jax

    milliseconds = []
    for _ in range(WARM_UP_RUNS + runs):
        # New ones for each run, which writes its outputs over them.
        inputs = jax.block_until_ready(random_inputs(module, device))
        begin = time.perf_counter()
        jax.block_until_ready(executable.execute(inputs))
        milliseconds.append(1e3 * (time.perf_counter() - begin))
    measured = milliseconds[WARM_UP_RUNS:]
    return {
        "median_ms": round(statistics.median(measured), 3),
        "min_ms": round(min(measured), 3),
    }


def random_inputs(module, device):
    """Returns an array on a device for each parameter of a module."""
    import jax
    import numpy as np
    from jax.extend.mlir import ir

    main = next(
        operation
        for operation in module.body.operations
        if ir.StringAttr(operation.attributes["sym_name"]).value == "main"
    )
    rng = np.random.default_rng(0)
    arrays = []
    for argument in main.arguments:
        parameter = ir.RankedTensorType(argument.type)
        # Small: integers are labels, say, and the square root of an optimizer's
        # variable must be a number.
        values = rng.uniform(0, 2, parameter.shape)
        dtype = dtype_name(str(parameter.element_type))
        arrays.append(jax.device_put(values.astype(dtype), device))
    return arrays


def dtype_name(element_type):
    """NumPy's name for an MLIR type: "float32" for "f32"."""
    if element_type == "i1":
        return "bool"
    kinds = {"bf": "bfloat", "f": "float", "i": "int", "ui": "uint"}
    kind, bits = re.fullmatch(r"(\D+)(\d+)", element_type).groups()
    return kinds[kind] + bits


if __name__ == "__main__":
    main()
