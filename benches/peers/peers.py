#!/usr/bin/env python3
"""Times candle-diffeq and its peers in turn on workload files and writes a Markdown report.

peers.py make DIR                                   # W0 … W5, A0 … A5, S1, S2, C1, H1 … H3, F0 … F4 with their f64 reference
peers.py run --workloads DIR --markdown README.md   # between <!-- peers --> and <!-- /peers -->
peers.py run --workloads DIR --only A1 A2 A3 A4 A5  # adaptive steps
peers.py run --workloads DIR --only S1 S2 C1        # driven by noise and data
peers.py run --workloads DIR --unit avx2            # all held to AVX2
peers.py run --workloads DIR --only H1 H2 H3        # torchdyn's models
peers.py run --workloads DIR --only F1 F2 F3 F4     # flows of the examples
"""

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from importlib import metadata, util
from pathlib import Path
from statistics import median
from typing import Callable

import numpy as np

import adaptive
import driven
import machine
import report
import workload

ROOT = Path(__file__).resolve().parents[2]
#: Peers and the packages they are from.
PEERS = {"torch": "torch", "rampde": "rampde", "torchdiffeq": "torchdiffeq", "torchdiffeq adjoint": "torchdiffeq",
         "torchdyn": "torchdyn", "torchdyn adjoint": "torchdyn", "diffrax": "diffrax", "jax scan": "jax",
         "diffrax pi": "diffrax", "diffrax rows": "diffrax", "torchode": "torchode",
         "torchsde": "torchsde", "torchsde adjoint": "torchsde", "torchcde": "torchcde", "torchcde adjoint": "torchcde"}
#: Those that solve what a workload is of.
SOLVES = {
    "fixed": ["torch", "rampde", "torchdiffeq", "torchdiffeq adjoint", "torchdyn", "torchdyn adjoint", "diffrax", "jax scan"],
    "adaptive": ["torchdiffeq", "torchdiffeq adjoint", "torchdyn", "torchdyn adjoint", "diffrax", "diffrax pi",
                 "diffrax rows", "torchode"],
    "sde": ["torchsde", "torchsde adjoint", "diffrax"],
    "cde": ["torchcde", "torchcde adjoint", "diffrax"],
    "model": ["torchdyn", "torchdyn adjoint"],
}
#: Repetitions in one process, alike for all: about half a second of the best peer.
REPEATS = {"W0": 300, "W1": 5, "W2": 3, "W3": 3, "W4": 15, "W5": 3,
           "A0": 100, "A1": 3, "A2": 5, "A3": 7, "A4": 3, "A5": 3, "S1": 3, "S2": 3, "C1": 15,
           "H1": 15, "H2": 25, "H3": 9, "F1": 15, "F2": 15, "F3": 9, "F4": 15}


def run(args: argparse.Namespace) -> None:
    """Every cell once a round, each time in a process of its own; then the report."""
    if args.unit:
        machine.hold_to(args.unit)  # inherited
    cpus = sorted(os.sched_getaffinity(0))[: args.threads]
    os.sched_setaffinity(0, cpus)  # inherited, and what every library counts its threads by
    os.environ.pop("RAYON_NUM_THREADS", None)
    variants = {"ours": ""} | {f"ours {text.split('=')[0]}": text.partition("=")[2] for text in args.variant}
    peers = [name for name in args.peers if util.find_spec(PEERS[name])]
    commands = {}
    for name in args.only:
        file = args.workloads / f"{name}.safetensors"
        solve = SOLVES[sort(workload.read(file))]
        for precision in args.precisions:
            tail = [str(file), "--precision", precision,
                    "--repeats", str(REPEATS.get(name, 5))]
            for label, extra in variants.items():
                commands[name, label, precision] = [str(args.binary), *tail, *shlex.split(extra)]
            for peer in peers:
                if peer in solve and (peer == "torch" or precision == "f32"):
                    commands[name, peer, precision] = [sys.executable, "-Wignore", __file__, "one", peer, *tail]
    results, quiet = {}, Quiet(args.quiet)
    try:
        for i in range(args.rounds):
            for key, command in commands.items():
                lines = results.setdefault(key, [])
                if not lines or "error" not in lines[-1]:
                    lines.append(quiet.measure(lambda: ask(command, args.timeout)))
                    print(f"round {i + 1}:", *key, lines[-1].get("fwdbwd_ms", "failed"),
                          "disturbed" if args.quiet and not lines[-1]["quiet"] else "", file=sys.stderr)
    except KeyboardInterrupt:
        results = {key: lines for key, lines in results.items() if lines}
    ours = re.search('version = "(.*)"', (ROOT / "Cargo.toml").read_text())[1]
    versions = {"candle-diffeq": ours} | {PEERS[name]: version(PEERS[name]) for name in peers}
    versions |= {name: version(name) for name in ("torch", "jax") if util.find_spec(name)}  # what others rest on
    text = report.render(results, versions, f"{machine.described(args.unit)}; threads: {len(cpus)}")
    report.insert(args.markdown, text) if args.markdown else print(text)


def sort(work: workload.Workload) -> str:
    """What a workload is of."""
    if work.kind in ("sde", "cde"):
        return work.kind
    if work.kind in ("hnn", "galerkin", "graph"):
        return "model"
    return "adaptive" if work.tolerances else "fixed"


class Quiet:
    """Whether other jobs leave the machine alone: a product of matrices on all threads takes no more than
    1.1 times the least that it took so far (medians of nine)."""

    def __init__(self, patience: float) -> None:
        self.patience, self.least = patience, float("inf")
        self.matrix = np.ones((1024, 1024), np.float32)

    def now(self) -> bool:
        if not self.patience:
            return False
        took = median(clock(lambda: self.matrix @ self.matrix) for _ in range(9))
        time.sleep(0.5)  # the threads of the product spin for a while, and would disturb what comes next
        self.least = min(self.least, took)
        return took <= 1.1 * self.least

    def measure(self, cell: Callable[[], dict]) -> dict:
        """A cell that began and ended so, or the one that is measured when patience is over."""
        deadline = time.monotonic() + self.patience
        while True:
            while time.monotonic() < deadline and not self.now():
                time.sleep(0.2)
            line = cell()
            line["quiet"] = self.now()
            if "error" in line or line["quiet"] or time.monotonic() >= deadline:
                return line


def ask(command: list[str], timeout: float) -> dict:
    """The last line of a process, which is JSON, or why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {timeout:g} s"}
    except (IndexError, ValueError):
        return {"error": (done.stderr.splitlines() or [f"exit status {done.returncode}"])[-1]}


def one(args: argparse.Namespace) -> None:
    """Times one peer on one file and prints what the `workloads` example prints of ours."""
    work = workload.read(args.file)
    is_jax = PEERS[args.peer] in ("diffrax", "jax")
    modules = {"fixed": ["torch_peers", "jax_peers"], "adaptive": ["adaptive_torch", "adaptive_jax"], "model": ["zoo", ""]}
    module = modules.get(sort(work), ["driven_torch", "driven_jax"])[is_jax]
    build = importlib.import_module(module).build
    cell = build(args.peer, args.precision, work)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of start-up
    before = memory("VmRSS:")
    errors = workload.errors(work, *cell.numbers(cell.both()))
    # A peer's noise is its own, and so are its gradients.
    line = (errors if work.noise is None else dict.fromkeys(errors)) | cell.counts()
    cell.forward()
    times, processor = [], []
    for _ in range(args.repeats):
        forward, started = clock(cell.forward), time.process_time()
        times.append((forward, clock(cell.both)))
        processor.append((time.process_time() - started) * 1e3)
    line["fwd_ms"], line["fwdbwd_ms"] = map(median, zip(*times))
    line["fwdbwd_cpu_ms"] = min(processor)
    line |= {"rss_mb": memory("VmHWM:") - before, "buffers_mb": cell.buffers_mb()}
    if torch := sys.modules.get("torch"):
        line["unit"] = torch.backends.cpu.get_cpu_capability()
    print(json.dumps(line))


def clock(call) -> float:
    """Milliseconds that a call takes."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def memory(key: str) -> float:
    """Megabytes of this process: VmRSS now, VmHWM at the peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def version(package: str) -> str:
    """Of an installed package, or of a checkout on PYTHONPATH."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return getattr(__import__(package), "__version__", "unknown")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(name: str, text: str, call):
        sub = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(call=call)
        return sub.add_argument

    def make(args: argparse.Namespace) -> None:
        workload.make(args.directory, workload.SPECS | workload.FLOW_SPECS | workload.FEW_SPECS)
        adaptive.make(args.directory)
        driven.make(args.directory)
        importlib.import_module("zoo").make(args.directory)

    add = command("make", "write workload files", make)
    add("directory", type=Path)

    add = command("run", "time everything in turn", run)
    add("--workloads", type=Path, required=True, metavar="DIR", help="where W0.safetensors … and A1.safetensors … are")
    add("--only", nargs="+", default=list(workload.SPECS), metavar="W", help="workloads")
    add("--peers", nargs="*", default=list(PEERS), choices=PEERS, metavar="PEER", help="those not installed are left out")
    add("--precisions", nargs="+", default=["f32", "bf16", "f16"], metavar="P", help="of ours and of torch")
    add("--binary", type=Path, default=ROOT / "target/release/examples/workloads", help="ours")
    add("--variant", action="append", default=[], metavar="NAME=ARGS", help="ours once more, with these arguments")
    add("--rounds", type=int, default=5, help="times that every cell has its turn")
    add("--quiet", type=float, default=0.0, metavar="SECONDS", help="repeats a cell for so long until no other job disturbs it")
    add("--timeout", type=float, default=120.0, help="seconds for one process")
    add("--threads", type=int, help="all that this process may use, unless given")
    add("--unit", choices=machine.UNITS, help="holds every library to this vector unit")
    add("--markdown", type=Path, metavar="FILE", help="standard output if not given")

    add = command("one", "time one peer on one file, as a line of JSON", one)
    add("peer", choices=PEERS)
    add("file", type=Path)
    add("--precision", default="f32", help="bf16 and f16 by autocast (torch only)")
    add("--repeats", type=int, default=5, help="timed repetitions")
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
