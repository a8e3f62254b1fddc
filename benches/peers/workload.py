"""Workload files: safetensors with inputs in f32 and the reference's loss and gradients in f64."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

#: What `make` writes.  W0 is one small step: the fixed cost of a library.
SPECS = {
    "W0": dict(kind="mlp", dims=[2, 64, 64, 2], batch=8, steps=1, method="rk4", seed=10),
    "W1": dict(kind="mlp", dims=[2, 64, 64, 2], batch=512, steps=100, method="rk4", seed=11),
    "W2": dict(kind="mlp", dims=[64, 512, 512, 64], batch=256, steps=40, method="rk4", seed=12),
    "W3": dict(kind="conv", dims=[16, 16, 16], hw=28, batch=32, steps=8, method="rk4", seed=13),
    "W4": dict(kind="cnf", dims=[2, 64, 64, 2], batch=512, steps=8, method="rk4", seed=14),
    "W5": dict(kind="mlp", dims=[2, 64, 64, 2], batch=64, steps=2000, method="euler", seed=15),
}


class Workload(NamedTuple):
    """Kind of field (mlp, conv, cnf), method (rk4, euler), and tensors by name."""

    kind: str
    method: str
    tensors: dict[str, np.ndarray]

    @property
    def weights(self) -> list[np.ndarray]:
        """p0, p1, …: weight and bias of every layer in turn."""
        return [self.tensors[f"p{i}"] for i in range(sum(name[0] == "p" for name in self.tensors))]


def read(path: Path) -> Workload:
    """Reads a file."""
    with safe_open(path, "numpy") as file:
        kind, method = (json.loads(file.metadata()[key]) for key in ("kind", "method"))
        return Workload(kind, method, {name: file.get_tensor(name) for name in file.keys()})


def random(spec: dict) -> Workload:
    """The inputs that a specification asks for."""
    source, dims = np.random.RandomState(spec["seed"]), spec["dims"]
    kernel, image = ([3, 3], 2 * [spec["hw"]]) if spec["kind"] == "conv" else ([], [])
    tensors = {}
    for layer, (width, fan) in enumerate(zip(dims[1:], dims)):
        bound = 1 / np.sqrt(fan * np.prod(kernel))
        tensors[f"p{2 * layer}"] = source.uniform(-bound, bound, [width, fan, *kernel])
        tensors[f"p{2 * layer + 1}"] = source.uniform(-bound, bound, width)
    for name in ("y0", "target"):
        tensors[name] = source.randn(spec["batch"], dims[0], *image)
    tensors = {name: x.astype(np.float32) for name, x in tensors.items()}
    tensors["t"] = np.linspace(0.0, 1.0, spec["steps"] + 1)
    return Workload(spec["kind"], spec["method"], tensors)


def make(directory: Path) -> None:
    """Writes W0 … W5 with the reference: f64 autograd through the unrolled solve."""
    from torch_peers import build

    directory.mkdir(parents=True, exist_ok=True)
    for name, spec in SPECS.items():
        work = random(spec)
        reference = build("torch", "f64", work)
        loss, grads = reference.numbers(reference.both())
        names = [f"grad.p{i}" for i in range(len(work.weights))] + ["grad.y0"]
        tensors = work.tensors | dict(zip(names, grads)) | {"loss": np.array([loss])}
        save_file(tensors, directory / f"{name}.safetensors", {key: json.dumps(x) for key, x in spec.items()})


def errors(work: Workload, loss: float, grads: list[np.ndarray]) -> dict[str, float]:
    """Relative errors of the loss, of all weight gradients together, and of that of y0."""
    flat = lambda arrays: np.concatenate([np.asarray(x, np.float64).ravel() for x in arrays])
    distance = lambda x, y: float(np.linalg.norm(flat(x) - flat(y)) / np.linalg.norm(flat(y)))
    expected = [work.tensors[f"grad.p{i}"] for i in range(len(work.weights))]
    return {
        "err_loss": distance([loss], [work.tensors["loss"]]),
        "err_grad_w": distance(grads[:-1], expected),
        "err_grad_y0": distance(grads[-1:], [work.tensors["grad.y0"]]),
    }
