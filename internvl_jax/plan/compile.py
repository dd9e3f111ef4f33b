"""Compiling a training step for TPUs that are not there, from shapes alone."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import multiprocessing
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from internvl_jax.chips import Topology
from internvl_jax.config import ConfigError
from internvl_jax.train.experiment import Experiment

GIB = 2**30
# The files that the compiler leaves once it has scheduled the program and given it memory. It then
# refuses what does not fit; the last file says that it did. Code generation, which takes ten times
# as long and changes neither, comes after that.
PROGRAM = "after_optimizations.txt"
MEMORY = "after_optimizations-memory-usage-report.txt"
ASSIGNMENT = "after_optimizations-buffer-assignment.txt"
LAST = "after_optimizations_after_buffer_assignment.txt"


class PlanError(RuntimeError):
    """The compiler gave no answer; the message is a sentence."""


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One region of memory: bytes, and the arrays that use it in turn."""

    size: int
    shapes: str


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a chip would hold, in bytes, as the compiler assigns it.

    Attributes:
        arguments: parameters, optimizer state and batch; the results take their place.
        temporaries: everything else, with what padding and fragmentation cost.
        host: of the host's memory, for what is offloaded, per device.
        largest: the largest regions beside the arguments.
    """

    arguments: int
    temporaries: int
    host: int
    largest: tuple[Buffer, ...]

    @property
    def peak(self) -> int:
        return self.arguments + self.temporaries


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's answer for one step.

    Attributes:
        text: the scheduled program.
        memory: what it would hold.
        refusal: the compiler's words on what does not fit; empty where it fits.
        versions: of jax and libtpu.
        seconds: that it took.
    """

    text: str
    memory: Memory
    refusal: str
    versions: dict[str, str]
    seconds: float


def need_compiler() -> None:
    """Raises ConfigError where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "The TPU compiler is not installed: pip install 'internvl-jax[tpu]' (or EXTRAS=dev,tpu "
            "make setup); it needs no TPU."
        )


def devices(topology: Topology) -> list[Any]:
    """The absent devices of a topology, for this process to compile for."""
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.chip.name == "v4":  # else a device would be one of a chip's two cores
        options |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
    if topology.chips_per_slice == 1:
        options |= {"chips_per_host_bounds": (1,) * 3, "wrap": (False,) * 3}
    try:
        found = topologies.get_topology_desc(topology.slice_name, "tpu", **options).devices
    except Exception as error:
        reason = str(error).split("\n")[0][:200]
        raise ConfigError(
            f"The TPU compiler knows no slice {topology.slice_name} ({reason}): use a shape "
            "that can be rented, as v5p:4x4x8 or v6e:16x16."
        ) from error
    return list(found)


def lower(experiment: Experiment, topology: Topology, phase: int = 0) -> Any:
    """The step of a phase on a topology, lowered: what `jax.jit(...).lower` gives.

    Raises:
        ConfigError: the mesh or the batch does not divide, in one sentence.
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from internvl_jax.models.definition import Definition
    from internvl_jax.sharding.mesh import make_mesh
    from internvl_jax.sharding.rules import batch_sharding
    from internvl_jax.train.optimizer import make_optimizer
    from internvl_jax.train.start import abstract_state
    from internvl_jax.train.step import jit_step

    try:
        mesh = make_mesh(experiment.mesh, devices(topology))
        experiment = experiment.on(mesh)
        _, stage = experiment.schedule()[phase]
        definition = Definition.of(stage.build, stage.trainable)
        params, _ = definition.abstract(mesh, experiment.train.frozen_dtype)
    except ValueError as error:
        raise ConfigError(f"config.mesh: {error}") from error
    tx = make_optimizer(experiment.optim, experiment.train.steps, params, stage.lr_scale)
    state, frozen = abstract_state(definition, tx, experiment, mesh)
    rows = batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)
        for name, x in stage.batch_spec(experiment.train.global_batch).items()
    }
    whole = NamedSharding(mesh, PartitionSpec())
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=whole)
    with jax.set_mesh(mesh):
        return jit_step(experiment, stage, definition, tx, state, frozen).lower(
            state, frozen, batch, key
        )


def compile_step(
    experiment: Experiment,
    topology: Topology,
    *,
    phase: int = 0,
    dump: str | None = None,
    codegen: bool = False,
    limit: float = 1800.0,
) -> Compiled:
    """Compiles a phase's step in a process of its own, up to the assignment of memory.

    Args:
        experiment: what would be trained; nothing of it is read from disk.
        topology: where.
        phase: index of the run's phase.
        dump: folder that keeps the scheduled program, to be read by anyone.
        codegen: go on to machine code (minutes).
        limit: seconds after which the compiler is given up.

    Raises:
        ConfigError: what is asked for cannot be, in one sentence.
        PlanError: the compiler failed on it.
    """
    need_compiler()
    with contextlib.ExitStack() as stack:
        folder = Path(dump or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.after_optimizations*"):
            old.unlink()
        began = time.monotonic()
        answer = _in_child(experiment, topology, phase, folder, codegen, limit)
        seconds = time.monotonic() - began
        if isinstance(answer, Exception):
            raise answer
        refusal, versions = answer
        program, assignment, report = (
            "" if path is None else path.read_text(encoding="utf-8")
            for path in (_dumped(folder, ending) for ending in (PROGRAM, ASSIGNMENT, MEMORY))
        )
        if not program or not assignment:
            raise PlanError(
                f"The compiler scheduled no program: {refusal or 'it does not say why'}"
            )
        return Compiled(program, read_memory(assignment, report), refusal, versions, seconds)


def _in_child(
    experiment: Experiment,
    topology: Topology,
    phase: int,
    folder: Path,
    codegen: bool,
    limit: float,
) -> tuple[str, dict[str, str]] | Exception:
    """Runs `_compile`, and ends it when what is wanted lies in the folder."""
    worker, receive = start(_compile, experiment, topology, phase, str(folder))
    versions: dict[str, str] = {}
    deadline = time.monotonic() + limit
    try:
        while time.monotonic() < deadline:
            if receive.poll(0.2):
                try:
                    kind, value = receive.recv()
                except EOFError:
                    worker.join()
                    return PlanError(f"The compiler's process ended with {worker.exitcode}.")
                if kind == "versions":
                    versions = value
                else:
                    return value if kind == "error" else (value, versions)
            elif not codegen and _dumped(folder, LAST) is not None:
                return "", versions
    finally:
        worker.kill()
        worker.join()
    return PlanError(f"The compiler took more than {limit:.0f} s.")


def start(target: Callable[..., None], *args: Any) -> tuple[SpawnProcess, Any]:
    """Starts ``target(*args, send)`` where it can compile for absent TPUs, and ends with us.

    Returns:
        The process, and what receives from `send`.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    worker = context.Process(target=_child, args=(target, *args, send), daemon=True)
    with _absent_tpu():
        worker.start()
    send.close()
    return worker, receive


def _child(target: Callable[..., None], *args: Any) -> None:
    _end_with_parent()
    target(*args)


def _end_with_parent() -> None:
    """Ends this process with the one that started it, however that ends."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _compile(
    experiment: Experiment, topology: Topology, phase: int, folder: str, send: Connection
) -> None:
    """Sends ("versions", ...), then ("done", refusal) or ("error", exception)."""
    import jax
    import jaxlib

    # What the compiler says goes to a file: it speaks of the absent TPU at length.
    log = os.open(Path(folder) / "compiler.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    try:
        import libtpu

        versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
        send.send(("versions", {**versions, "libtpu": libtpu.__version__}))
        lowered = lower(experiment, topology, phase)
        try:
            lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            send.send(("done", str(error)))
        else:
            send.send(("done", ""))
    except ConfigError as error:
        send.send(("error", error))
    except Exception as error:
        send.send(("error", PlanError(f"{type(error).__name__}: {error}")))


@contextlib.contextmanager
def _absent_tpu() -> Iterator[None]:
    """The environment of a process that compiles for absent TPUs: no device, no lock."""
    wanted = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _dumped(folder: Path, ending: str) -> Path | None:
    """The file about the step itself; the compiler writes others about parts of it."""
    return next(iter(sorted(folder.glob(f"*jit_step*.{ending}"))), None)


def read_memory(assignment: str, report: str) -> Memory:
    """Reads how the compiler assigned memory.

    Args:
        assignment: text of ``…buffer-assignment.txt``, whose sizes include the tiles' padding.
        report: text of ``…memory-usage-report.txt``, which names the largest regions.
    """
    arguments, temporaries = 0, {_CHIP: 0, _HOST: 0}
    for size, color, kind in re.findall(
        r"^allocation \d+: size (\d+)(?:, color (\d+))?(?:, page \d+)?, "
        r"(parameter|preallocated-temp)",
        assignment,
        re.MULTILINE,
    ):
        if kind == "parameter":
            arguments += int(size)
        elif color in temporaries:
            temporaries[color] += int(size)
    if not temporaries[_CHIP]:
        raise PlanError("The compiler's buffer assignment has no temporaries: its format changed.")
    largest = []
    for line in report.split("\n\n", 1)[0].splitlines():
        if found := re.match(r"[^;]*;\s*([\d.]+)(\w+);[^;]*;[^;]*;(.*)", line):
            size = float(found[1]) * _UNITS[found[2]]
            largest.append(Buffer(int(size), found[3].strip()))
    return Memory(arguments, temporaries[_CHIP], temporaries[_HOST], tuple(largest[:8]))


_CHIP, _HOST = "", "5"  # what the compiler calls the two memories
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
