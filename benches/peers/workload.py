"""Workload files: safetensors with inputs in f32 and the reference's loss and gradients in f64."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

#: For CPUs.  W0 is one small step: the fixed cost of a library.
SPECS = {
    "W0": dict(kind="mlp", dims=[2, 64, 64, 2], batch=8, steps=1, method="rk4", seed=10),
    "W1": dict(kind="mlp", dims=[2, 64, 64, 2], batch=512, steps=100, method="rk4", seed=11),
    "W2": dict(kind="mlp", dims=[64, 512, 512, 64], batch=256, steps=40, method="rk4", seed=12),
    "W3": dict(kind="conv", dims=[16, 16, 16], hw=28, batch=32, steps=8, method="rk4", seed=13),
    "W4": dict(kind="cnf", dims=[2, 64, 64, 2], batch=512, steps=8, method="rk4", seed=14),
    "W5": dict(kind="mlp", dims=[2, 64, 64, 2], batch=64, steps=2000, method="euler", seed=15),
}

#: Flows of the examples `cnf8g` and `otflow`, and one whose trace is estimated; F0 is a small one, for tests.
FLOW_SPECS = {
    "F0": dict(kind="ot_flow", dims=[3, 11, 11], rank=3, features=2, batch=20, steps=3, method="rk4", seed=400),
    "F1": dict(kind="hyper", dims=[1, 32, 32, 448], features=2, batch=512, steps=16, method="rk4", seed=401),
    "F2": dict(kind="ot_flow", dims=[3, 32, 32], rank=2, features=2, batch=512, steps=7, method="rk4", seed=402),
    "F3": dict(kind="ot_flow", dims=[9, 48, 48], rank=8, features=8, batch=256, steps=9, method="rk4", seed=403),
    "F4": dict(kind="hutchinson", dims=[2, 64, 64, 64, 2], batch=512, steps=8, method="rk4", seed=404),
}

#: Fewer rows than a vector has lanes.
FEW_SPECS = {
    "R1": dict(kind="mlp", dims=[64, 512, 512, 64], batch=1, steps=40, method="rk4", seed=31),
    "R2": dict(kind="mlp", dims=[64, 512, 512, 64], batch=4, steps=40, method="rk4", seed=32),
    "R3": dict(kind="mlp", dims=[2, 64, 64, 2], batch=1, steps=200, method="rk4", seed=36),
}

#: For GPUs.  G4 is the flow of torchdiffeq's example of one, at 128 times; `rows` go through the reference at once.
GPU_SPECS = {
    "G1": dict(kind="mlp", dims=[2, 64, 64, 2], batch=65536, steps=100, method="rk4", seed=21, rows=8192),
    "G2": dict(kind="mlp", dims=[512, 2048, 2048, 512], batch=4096, steps=40, method="rk4", seed=22, rows=1024),
    "G3": dict(kind="conv", dims=[64, 64, 64], hw=56, batch=64, steps=8, method="rk4", seed=23, rows=16),
    "G4": dict(kind="hyper", dims=[1, 32, 32, 896], features=2, batch=1024, steps=127, method="rk4", seed=24),
}


class Workload(NamedTuple):
    """Kind of field (mlp, conv, cnf, hyper, ot_flow, hutchinson, van_der_pol, scaled_mlp, sde, cde), method, and tensors by name; relative and
    absolute tolerance where steps are adaptive; the seed of an SDE's noise."""

    kind: str
    method: str
    tensors: dict[str, np.ndarray]
    tolerances: tuple[float, float] | None = None
    activation: str = "tanh"
    noise: int | None = None

    @property
    def weights(self) -> list[np.ndarray]:
        """p0, p1, …: weight and bias of every layer in turn."""
        return [self.tensors[f"p{i}"] for i in range(sum(name[0] == "p" for name in self.tensors))]

    def state_error(self, ys: np.ndarray) -> float:
        """Of states at all times, the relative error of those that the file has."""
        expected = self.tensors["ref.ys"]
        return distance([ys[self.tensors["ref.index"]]], [expected])


def read(path: Path) -> Workload:
    """Reads a file."""
    with safe_open(path, "numpy") as file:
        header = {key: json.loads(text) for key, text in file.metadata().items()}
        tolerances = (header["rtol"], header["atol"]) if "rtol" in header else None
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        activation, noise = header.get("activation", "tanh"), header.get("noise")
        return Workload(header["kind"], header["method"], tensors, tolerances, activation, noise)


def random(spec: dict) -> Workload:
    """The inputs that a specification asks for."""
    source, dims = np.random.RandomState(spec["seed"]), spec["dims"]
    kernel, image = ([3, 3], 2 * [spec["hw"]]) if spec["kind"] == "conv" else ([], [])
    tensors = {}
    for layer, (width, fan) in enumerate(zip(dims[1:], dims)):
        bound = 1 / np.sqrt(fan * np.prod(kernel))
        tensors[f"p{2 * layer}"] = source.uniform(-bound, bound, [width, fan, *kernel])
        tensors[f"p{2 * layer + 1}"] = source.uniform(-bound, bound, width)
    if spec["kind"] == "ot_flow":
        bound = np.sqrt(6 / (spec["rank"] + dims[0]))
        tensors |= {"p4": np.ones(dims[-1]), "p5": source.uniform(-bound, bound, [spec["rank"], dims[0]]), "p6": np.zeros(dims[0])}
    for name in ("y0", "target"):
        tensors[name] = source.randn(spec["batch"], spec.get("features", dims[0]), *image)
    tensors = {name: x.astype(np.float32) for name, x in tensors.items()}
    # A flow whose weights are functions of time goes from data, at 1, to noise.
    ends = (1.0, 0.0) if spec["kind"] == "hyper" else (0.0, 1.0)
    tensors["t"] = np.linspace(*ends, spec["steps"] + 1)
    return Workload(spec["kind"], spec["method"], tensors)


def small(spec: dict) -> dict:
    """The same kind of problem, for a try."""
    small = spec | dict(batch=min(spec["batch"], 12), steps=min(spec["steps"], 4), rows=8)
    if spec["kind"] == "hyper":
        return small | dict(dims=[1, 8, 8, 35])
    widest, image = (8, {"hw": 6}) if spec["kind"] == "conv" else (144, {})
    return small | image | dict(dims=[min(n, widest) for n in spec["dims"]])


def make(directory: Path, specs: dict[str, dict] = SPECS, device: str = "cpu") -> None:
    """Writes files with their reference."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, spec in specs.items():
        work = random(spec)
        tensors = work.tensors | reference(work, device, spec.get("rows", spec["batch"]))
        save_file(tensors, directory / f"{name}.safetensors", {key: json.dumps(x) for key, x in spec.items()})


def reference(work: Workload, device: str, rows: int) -> dict[str, np.ndarray]:
    """Loss and gradients: f64 autograd through the unrolled solve, so many rows at a time.

    Losses are means over rows: those of parts count by their rows."""
    from torch_peers import build

    batch = len(work.tensors["y0"])
    names = [f"grad.p{i}" for i in range(len(work.weights))]
    sums, y0 = {"loss": np.zeros(1)} | {name: 0.0 for name in names}, []
    for start in range(0, batch, rows):
        part = {name: work.tensors[name][start : start + rows] for name in ("y0", "target")}
        cell = build("torch", "f64", work._replace(tensors=work.tensors | part), device)
        share = len(part["y0"]) / batch
        loss, grads = cell.numbers(cell.both())
        sums["loss"] += loss * share
        for name, grad in zip(names, grads):
            sums[name] = sums[name] + grad * share
        y0.append(grads[-1] * share)
    return sums | {"grad.y0": np.concatenate(y0)}


def errors(work: Workload, loss: float, grads: list[np.ndarray]) -> dict[str, float]:
    """Relative errors of the loss, of all weight gradients together, and of that of y0."""
    expected = [work.tensors[f"grad.p{i}"] for i in range(len(work.weights))]
    return {
        "err_loss": distance([loss], [work.tensors["loss"]]),
        "err_grad_w": distance(grads[:-1], expected),
        "err_grad_y0": distance(grads[-1:], [work.tensors["grad.y0"]]),
    }


def distance(x: list, y: list) -> float:
    """‖x − y‖ / ‖y‖ of arrays taken together."""
    flat = lambda arrays: np.concatenate([np.asarray(x, np.float64).ravel() for x in arrays])
    return float(np.linalg.norm(flat(x) - flat(y)) / np.linalg.norm(flat(y)))
