"""Kernels in memory: written once, compiled for the processor that is there, and run."""

import functools
import threading
from array import array
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir

from haq.int8.llvm import amx, cache, threads
from haq.int8.llvm.dots import Dots, best_of

# Older ones have other types for some instructions.
_OLDEST = (22,)


@functools.cache
def check() -> None:
    """Whether there is what the kernels need.

    Raises:
        RuntimeError: it is not.
    """
    if llvm.llvm_version_info < _OLDEST:
        raise RuntimeError(f"llvmlite has LLVM {llvm.llvm_version_info[0]}; 22 or newer is needed")
    dots_here()
    threads.library()


@functools.cache
def dots_here() -> Dots:
    """How this processor multiplies bytes.

    Raises:
        RuntimeError: it has no instructions that would be worth it.
    """
    features = llvm.get_host_cpu_features()
    if features.get("amx-int8") and not amx.permitted():
        features["amx-int8"] = False
    dots = best_of(features)
    if dots is None:
        raise RuntimeError("the processor has no AVX2")
    return dots


class Kernel:
    """A function that is ready to run.

    Args:
        module: what has it, by the name "run". It takes the address of an array of integers.
    """

    def __init__(self, module: ir.Module) -> None:
        text, machine = str(module), _machine()
        key = cache.key_of(text, *_what_is_here())
        stored = cache.load(key)
        parsed = llvm.parse_assembly(text)
        if stored is None:
            parsed.verify()
            optimize(parsed, machine)
        self._parallel = threads.library().GOMP_parallel
        self._engine = llvm.create_mcjit_compiler(parsed, machine)
        self._engine.set_object_cache(
            notify_func=lambda _, made: cache.save(key, made), getbuffer_func=lambda _: stored
        )
        self._engine.finalize_object()
        self.address = self._engine.get_function_address("run")

    def __call__(self, places: "array[int]", threads: int) -> None:
        self._parallel(self.address, places.buffer_info()[0], threads, 0)


_lock = threading.Lock()

_kernels: dict[tuple[Any, ...], Kernel] = {}


def kernel_of(write: Callable[..., ir.Module], options: tuple[Any, ...]) -> Kernel:
    """A kernel; if there is none of this kind, it is compiled.

    Args:
        write: gives a module with the function "run", from the options.
        options: what kind.
    """
    key = write, options
    kernel = _kernels.get(key)
    if kernel is None:
        with _lock:
            kernel = _kernels.get(key) or Kernel(write(*options))
            _kernels[key] = kernel
    return kernel


def run(write: Callable[..., ir.Module], options: tuple[Any, ...], places: list[int]) -> None:
    """Run a kernel on as many threads as torch uses.

    Args:
        write: as for `kernel_of`.
        options: as for `kernel_of`.
        places: what the function is told.
    """
    kernel_of(write, options)(array("q", places), torch.get_num_threads())


@functools.cache
def _what_is_here() -> tuple[str, ...]:
    """What a kernel is made for and by; the last is a number for how it is done in this file."""
    version = ".".join(map(str, llvm.llvm_version_info))
    features = llvm.get_host_cpu_features().flatten()
    return version, llvm.get_process_triple(), llvm.get_host_cpu_name(), features, "1"


def _machine() -> llvm.TargetMachine:
    """What writes for this processor; each engine is given its own, and disposes of it."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    features = llvm.get_host_cpu_features().flatten()
    return target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=3)


def optimize(module: llvm.ModuleRef, machine: llvm.TargetMachine) -> None:
    """Variables to registers, and what follows. The loops are as they are to be."""
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
