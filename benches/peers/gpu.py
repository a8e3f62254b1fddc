#!/usr/bin/env python3
"""Times candle-diffeq and what else would be run on the same GPU, in turn on the same problems.

gpu.py --ours target/release/examples/gpu --out DIR     # → DIR/peers.jsonl as it goes, DIR/peers.md
gpu.py … --device cpu --small                           # a try, where there is no GPU

For each workload one process makes its file, with the f64 reference, and times PyTorch, rampde and
torchdiffeq on it; then `examples/gpu` does.  What fails, or is not reached in --budget seconds, is said in
the report.  Ctrl-C, or being terminated, ends a run with the report of what was measured.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime, timezone
from importlib import util
from pathlib import Path
from statistics import median

import gpu_report
import workload

#: Every library and its package.
PEERS = {"torch": "torch", "rampde": "rampde", "torchdiffeq": "torchdiffeq"}
#: Those that bars speak of first: a run that is cut short has them.
SPECS = {name: (workload.SPECS | workload.GPU_SPECS)[name] for name in "W1 G2 G4 W5 G3 G1 W2 W4 W3".split()}
PRECISIONS = ["f32", "bf16", "f16"]


def run(args: argparse.Namespace) -> None:
    """Every workload in turn, then matrix products and memory in training."""
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.budget
    lines = [{"run": dict(date=datetime.now(timezone.utc).isoformat(timespec="seconds"), commit=args.commit,
                          device=args.device, small=args.small, command=brief(sys.argv))}]
    log = (args.out / "peers.jsonl").open("w")

    def collect(command: list[str]) -> None:
        for line in ask(command, min(args.timeout, deadline - time.monotonic())):
            lines.append(line)
            print(json.dumps(line), file=log, flush=True)
            said = {key: line[key] for key in ("workload", "library", "precision", "fwdbwd_ms", "error") if key in line}
            print(*(said or line).values(), file=sys.stderr, flush=True)
        (args.out / "peers.md").write_text(gpu_report.render(lines))

    ours = [*shlex.split(args.ours), "--lines", "--precision", ",".join(args.precisions), "--seconds", str(args.seconds)]
    ours += ["--cpu"] if args.device == "cpu" else []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in args.only:
                file = Path(folder) / f"{name}.safetensors"
                collect([sys.executable, "-Wignore", __file__, "--worker", name, "--files", folder, "--out", folder, *options(args)])
                if file.exists():
                    collect([*ours, "--unfused", "--graphs", "--kept", str(file)])
                    file.unlink()
            smoke = ["--smoke"] if args.small else []
            collect([*ours, *smoke, "--products"])
            if args.training and args.device != "cpu":
                collect([*ours, *smoke, "--training", str(args.training)])
        except KeyboardInterrupt:
            print("ended early", file=sys.stderr)
    text = gpu_report.render(lines)
    (args.out / "peers.md").write_text(text)
    print(text)


def options(args: argparse.Namespace) -> list[str]:
    """What a worker is to know."""
    flags = ["--device", args.device, "--seconds", str(args.seconds), "--peers", *args.peers]
    return [*flags, "--precisions", *args.precisions, *(["--small"] if args.small else [])]


def ask(command: list[str], timeout: float):
    """The lines of JSON that a process prints, as they come; an error in place of what is missing."""
    said = {"command": brief(command)}
    if timeout <= 0:
        yield {"error": "not reached in the time there was"} | said
        return
    with tempfile.TemporaryFile("w+") as errors:
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        except OSError as error:
            yield {"error": error.strerror} | said
            return
        late = threading.Event()
        timer = threading.Timer(timeout, lambda: (late.set(), process.kill()))
        timer.start()
        try:
            for text in process.stdout:
                if text.startswith("{"):
                    yield json.loads(text)
            status = process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
        if late.is_set():
            yield {"error": f"not done in {timeout:.0f} s"} | said
        elif status != 0:
            errors.seek(0)
            yield {"error": (errors.read().splitlines() or [f"exit status {status}"])[-1]} | said


def work(args: argparse.Namespace) -> None:
    """Makes a workload's file and times every peer on it; a line of JSON for each."""
    import torch

    packages = {name: __import__(PEERS[name]) for name in args.peers if util.find_spec(PEERS[name])}
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    versions = {name: getattr(package, "__version__", "unknown") for name, package in packages.items()}
    say(peers=versions | {"CUDA of torch": torch.version.cuda, "device": card})
    name, spec = args.worker, SPECS[args.worker]
    workload.make(args.files, {name: workload.small(spec) if args.small else spec}, args.device)
    problem = workload.read(args.files / f"{name}.safetensors")
    if name == "G2":
        products(args, problem)
    for precision in args.precisions:
        for peer in packages:
            settle(args.device)
            try:
                found = measure(peer, precision, problem, args)
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            say(workload=name, library=peer, precision=precision, **found)


def brief(command: list[str]) -> str:
    """A command without the folders of its files."""
    return " ".join(Path(word).name for word in command)


def say(**line) -> None:
    """A line of JSON."""
    print(json.dumps(line), flush=True)


def settle(device: str) -> None:
    """Gives back what the last library held."""
    import gc

    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def measure(peer: str, precision: str, problem: workload.Workload, args: argparse.Namespace) -> dict:
    """Errors, memory and milliseconds of a library.

    PyTorch's f16 has its loss scaled by the largest power of two up to 2¹⁶ that leaves gradients finite,
    where GradScaler would arrive; rampde scales by itself."""
    import numpy as np
    from torch_peers import build

    scale = 65536.0 if precision == "f16" and peer != "rampde" else 1.0
    while True:
        cell = build(peer, precision, problem, args.device, scale)
        loss, grads = cell.numbers(cell.both())
        finite = np.isfinite(loss) and all(np.isfinite(grad).all() for grad in grads)
        if finite or scale <= 1:
            break
        scale /= 2
    if not finite:
        return {"error": "a loss or gradient is not finite"}
    line = workload.errors(problem, loss, grads) | {"loss_scale": scale, "peak_mb": peak(cell, args.device)}
    for key, call in (("fwd", cell.forward), ("fwdbwd", cell.both)):
        times = timed(call, args)
        line |= {f"{key}_ms": median(times), f"{key}_range": [min(times), max(times)], "repeats": len(times)}
    return line


def peak(cell, device: str) -> float | None:
    """Megabytes that both passes take at most beside weights, y0 and target: allocated, not reserved."""
    import torch

    cell.clear()
    if device != "cuda":
        cell.both()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cell.both()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def timed(call, args: argparse.Namespace) -> list[float]:
    """Milliseconds of repeated calls after one that is not counted, the device idle at both ends."""
    import torch

    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    times, begin = [], None
    while len(times) < 50 and (len(times) < 3 or time.perf_counter() - begin < args.seconds):
        wait()
        start = time.perf_counter()
        call()
        wait()
        if begin is None:
            begin = time.perf_counter()
        else:
            times.append((time.perf_counter() - start) * 1e3)
    return times


def products(args: argparse.Namespace, problem: workload.Workload) -> None:
    """What PyTorch reaches in the matrix products of G2 alone, and in one of 8192³."""
    import torch
    from torch_peers import DTYPES

    torch.backends.cuda.matmul.allow_tf32 = False
    edge = 64 if args.small else 8192
    rows = len(problem.tensors["y0"])
    layers = [(rows, *weight.shape) for weight in problem.weights[::2]]
    for precision in args.precisions:
        normal = lambda *shape: torch.randn(shape, device=args.device).to(DTYPES[precision])

        def rate(shapes: list[tuple]) -> float:
            pairs = [(normal(m, k), normal(n, k)) for m, n, k in shapes]
            times = timed(lambda: [a @ w.T for a, w in pairs * 10], args)
            return 10 * sum(2 * m * n * k for m, n, k in shapes) / median(times) / 1e9

        say(products="G2", library="torch", precision=precision, tflops=rate(layers), square_tflops=rate([(edge,) * 3]))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ours", default="target/release/examples/gpu", metavar="COMMAND", help="the gpu example (default %(default)s)")
    add("--out", type=Path, required=True, metavar="DIR", help="where results go")
    add("--only", nargs="+", default=list(SPECS), choices=SPECS, metavar="W", help="workloads: " + " ".join(SPECS))
    add("--peers", nargs="*", default=list(PEERS), choices=PEERS, metavar="PEER", help="those not installed are left out")
    add("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS, metavar="P", help="default: all three")
    add("--training", type=int, default=1000, metavar="N", help="iterations of W1 over which memory is to be flat; 0: none")
    add("--seconds", type=float, default=0.4, help="for one figure, once it was measured three times (default %(default)s)")
    add("--timeout", type=float, default=150.0, help="seconds for one process (default %(default)s)")
    add("--budget", type=float, default=480.0, help="seconds for all (default %(default)s)")
    add("--commit", default="unknown", help="of the binary, for the report")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--small", action="store_true", help="small problems of the same kinds")
    add("--worker", choices=SPECS, help=argparse.SUPPRESS)
    add("--files", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    work(args) if args.worker else run(args)


if __name__ == "__main__":
    main()
