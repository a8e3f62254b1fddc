"""Workloads with tolerances: their inputs in f32 and the exact flow's states, loss and gradients in f64."""

import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from workload import Workload, distance

#: A0 is a small one, for tests.  Weights are uniform, `gain` times as large as PyTorch would have them.
SPECS = {
    "A0": dict(kind="mlp", dims=[2, 16, 2], activation="tanh", gain=3.0, batch=8, method="dopri5",
               rtol=1e-5, atol=1e-7, t1=1.0, outputs=3, seed=110),
    "A1": dict(kind="mlp", dims=[2, 64, 64, 2], activation="tanh", gain=5.0, batch=512, method="dopri5",
               rtol=1e-5, atol=1e-7, t1=2.0, outputs=10, seed=111),
    "A2": dict(kind="van_der_pol", alpha=10.0, batch=1024, method="dopri5", rtol=1e-4, atol=1e-4, t1=3.0,
               outputs=300, keep=10, seed=102),
    "A3": dict(kind="mlp", dims=[32, 128, 32], activation="tanh", gain=5.0, batch=256, method="tsit5",
               rtol=1e-4, atol=1e-6, t1=1.5, outputs=20, keep=4, seed=103),
    "A4": dict(kind="cnf", dims=[2, 64, 64, 64, 2], activation="softplus", gain=3.0, batch=512, method="dopri5",
               rtol=1e-5, atol=1e-5, t1=1.0, outputs=1, seed=104),
    "A5": dict(kind="scaled_mlp", dims=[2, 64, 64, 2], activation="tanh", gain=2.0, batch=256, speeds=2.0,
               method="dopri5", rtol=1e-5, atol=1e-7, t1=1.0, outputs=10, seed=105),
}


def random(spec: dict) -> Workload:
    """The inputs that a specification asks for."""
    source, kind, batch, tensors = np.random.RandomState(spec["seed"]), spec["kind"], spec["batch"], {}
    if kind == "van_der_pol":
        tensors |= {"p0": np.array([spec["alpha"]]), "y0": source.randn(batch, 2)}
    else:
        dims = spec["dims"]
        for layer, (fan, width) in enumerate(zip(dims, dims[1:])):
            bound = spec["gain"] / math.sqrt(fan)
            tensors[f"p{2 * layer}"] = source.uniform(-bound, bound, (width, fan))
            tensors[f"p{2 * layer + 1}"] = source.uniform(-bound, bound, width)
        tensors["y0"] = source.randn(batch, dims[0])
    columns = tensors["y0"].shape[1]
    if kind == "scaled_mlp":  # the logarithm of a row's speed, 1 to 10^speeds
        speeds = np.log(10.0) * spec["speeds"] * source.permutation(np.linspace(0, 1, batch))
        tensors["y0"] = np.concatenate([tensors["y0"], speeds[:, None]], 1)
    if kind != "cnf":
        tensors["target"] = source.randn(batch, columns)
    tensors = {name: x.astype(np.float32) for name, x in tensors.items()}
    tensors["t"] = np.linspace(0.0, spec["t1"], spec["outputs"] + (kind != "van_der_pol"))
    tolerances = spec["rtol"], spec["atol"]
    return Workload(kind, spec["method"], tensors, tolerances, spec.get("activation", "tanh"))


def make(directory: Path) -> None:
    """Writes files with their reference."""
    from field import first_output

    directory.mkdir(parents=True, exist_ok=True)
    for name, spec in SPECS.items():
        work = random(spec)
        ys, values = converged(work)
        first, last = first_output(work.kind), len(ys) - 1
        kept = np.unique(np.linspace(first, last, spec.get("keep", last + 1 - first)).round().astype(np.int64))
        tensors = work.tensors | values | {"ref.ys": np.ascontiguousarray(ys[kept]), "ref.index": kept}
        save_file(tensors, directory / f"{name}.safetensors", {key: json.dumps(x) for key, x in spec.items()})


def converged(work: Workload, bound: float = 1e-11) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """States at all times, and loss and gradients, which twice as many steps do not change."""
    steps, before = 2, None
    while True:
        now = reference(work, steps)
        if before:
            changes = [distance([before[0]], [now[0]]), *(distance([before[1][key]], [x]) for key, x in now[1].items())]
            if max(changes) < bound or steps > 2000:
                return now
        before, steps = now, 2 * steps


def reference(work: Workload, steps: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """By so many equal steps of SciPy's DOP853 between two times, pulled back one by one."""
    import torch
    from scipy.integrate._ivp import dop853_coefficients as dop853

    from field import loss_of_outputs, packed_initial, packed_velocity
    from torch_peers import OPS

    double = lambda x: torch.tensor(x, dtype=torch.float64)
    weights = [double(x).requires_grad_() for x in work.weights]
    target = double(work.tensors["target"]) if "target" in work.tensors else None
    stages, times = dop853.N_STAGES, work.tensors["t"]

    def step(y, t, h):
        ks = []
        combine = lambda row: y + h * sum(float(a) * k for a, k in zip(row, ks) if a != 0)
        for c, row in zip(dop853.C[:stages], dop853.A[:stages]):
            ks.append(packed_velocity(work.kind, OPS, weights, t + c * h, combine(row), work.activation))
        return combine(dop853.B)

    grid = [(t + k * h, h) for t, h in zip(times, np.diff(times) / steps) for k in range(steps)]
    states = [packed_initial(work.kind, OPS, double(work.tensors["y0"]))]
    with torch.no_grad():
        for t, h in grid:
            states.append(step(states[-1], t, h))
    ys = torch.stack(states[::steps]).requires_grad_()
    loss = loss_of_outputs(work.kind, ys, target)
    cotangents = torch.autograd.grad(loss, ys)[0]
    adjoint, grads = cotangents[-1], [torch.zeros_like(x) for x in weights]
    for n, (t, h) in reversed(list(enumerate(grid))):
        y = states[n].requires_grad_()
        adjoint, *parts = torch.autograd.grad(step(y, t, h), [y, *weights], adjoint)
        grads = [grad + part for grad, part in zip(grads, parts)]
        if n % steps == 0:
            adjoint = adjoint + cotangents[n // steps]
    y0 = adjoint[:, : work.tensors["y0"].shape[1]].contiguous()
    named = {f"grad.p{i}": grad.numpy() for i, grad in enumerate(grads)}
    return ys.detach().numpy(), {"loss": np.array([loss.item()])} | named | {"grad.y0": y0.numpy()}
