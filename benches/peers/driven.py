"""Workloads of equations that are driven by noise or data: inputs in f32, loss and gradients of the same steps in f64."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from workload import Workload

#: S0 and C0 are small ones, for tests.  `noise` is the seed of the increments.
SPECS = {
    "S0": dict(kind="sde", dims=[4, 8, 4], batch=12, steps=5, method="heun", seed=200, noise=70),
    "S1": dict(kind="sde", dims=[4, 64, 64, 4], batch=512, steps=200, method="euler_maruyama", seed=201, noise=71),
    "S2": dict(kind="sde", dims=[4, 64, 64, 4], batch=512, steps=200, method="heun", seed=202, noise=72),
    "C0": dict(kind="cde", hidden=4, widths=[8], channels=3, batch=5, length=6, method="rk4", activation="relu", seed=210),
    "C1": dict(kind="cde", hidden=32, widths=[40, 40, 40], channels=13, batch=90, length=29, method="rk4",
               activation="relu", seed=211),
}


def random(spec: dict) -> Workload:
    """The inputs that a specification asks for."""
    source, batch = np.random.RandomState(spec["seed"]), spec["batch"]
    if spec["kind"] == "sde":
        networks = [spec["dims"], spec["dims"]]  # drift, diffusion
    else:
        networks = [[spec["hidden"], *spec["widths"], spec["hidden"] * spec["channels"]]]
    tensors, layers = {}, [pair for dims in networks for pair in zip(dims, dims[1:])]
    for layer, (fan, width) in enumerate(layers):
        bound = 1 / np.sqrt(fan)
        tensors[f"p{2 * layer}"] = source.uniform(-bound, bound, (width, fan))
        tensors[f"p{2 * layer + 1}"] = source.uniform(-bound, bound, width)
    for name in ("y0", "target"):
        tensors[name] = source.randn(batch, layers[0][0])
    if spec["kind"] == "cde":
        walk = 0.3 * source.randn(batch, spec["length"], spec["channels"]).cumsum(1)
        walk[..., 0] = np.arange(spec["length"])  # time
        tensors["x"] = walk
    tensors = {name: x.astype(np.float32) for name, x in tensors.items()}
    steps = spec["steps"] if spec["kind"] == "sde" else spec["length"] - 1
    tensors["t"] = np.linspace(0.0, 1.0 if spec["kind"] == "sde" else float(steps), steps + 1)
    return Workload(spec["kind"], spec["method"], tensors, None, spec.get("activation", "tanh"), spec.get("noise"))


def make(directory: Path, names: list[str] = list(SPECS)) -> None:
    """Writes files with their reference."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        work = random(SPECS[name])
        header = {key: json.dumps(x) for key, x in SPECS[name].items()}
        save_file(work.tensors | reference(work), directory / f"{name}.safetensors", header)


def normal(seed: int, step: int, rows: int, channels: int) -> np.ndarray:
    """The unit increments of candle-diffeq's `Noise::seeded`, but for units in the last place: Philox 4x32-10 at
    (step, row, block of two channels, 0), and Box and Muller's method."""
    word, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    row, block = np.meshgrid(np.arange(rows), np.arange((channels + 1) // 2), indexing="ij")
    zero = np.zeros(row.shape, np.uint64)
    a, b, c, d = zero + np.uint64(step), row.astype(np.uint64), block.astype(np.uint64), zero
    keys = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    for _ in range(10):
        first, second = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (second >> word) ^ b ^ keys[0], second & mask, (first >> word) ^ d ^ keys[1], first & mask
        keys = [(keys[0] + np.uint64(0x9E3779B9)) & mask, (keys[1] + np.uint64(0xBB67AE85)) & mask]
    uniform = lambda high, low: ((high << word | low) >> np.uint64(12)).astype(np.float64) * 2.0**-52
    radius = np.sqrt(-2 * np.log(uniform(a, b) + 2.0**-53))
    angle = 2 * np.pi * uniform(c, d)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
    return pairs.reshape(rows, -1)[:, :channels]


def reference(work: Workload) -> dict[str, np.ndarray]:
    """Loss and gradients of the same steps: f64 autograd through the unrolled solve."""
    import torch

    from driven_torch import Control, Equation

    double = lambda x: torch.tensor(x, dtype=torch.float64)
    y, target, times = double(work.tensors["y0"]).requires_grad_(), double(work.tensors["target"]), work.tensors["t"]
    y0 = y
    if work.kind == "sde":
        field = Equation(work, torch.float64)
        for n, h in enumerate(np.diff(times)):
            dw = double(np.sqrt(h) * normal(work.noise, n, *y.shape))
            move = lambda at: field.f(None, at) * h + field.g(None, at) * dw
            first = move(y)
            y = y + (first if work.method == "euler_maruyama" else 0.5 * (first + move(y + first)))
    else:
        field = Control(work, torch.float64)
        cubics = hermite(double(work.tensors["x"]), times)
        for (b, c, d), t, h in zip(zip(*cubics), times, np.diff(times)):
            slope = lambda s: b + (2 * c + 3 * d * s) * s
            f = lambda s, z: torch.einsum("bhc,bc->bh", field(None, z), slope(s))
            k1 = f(0.0, y)
            k2 = f(h / 2, y + h / 2 * k1)
            k3 = f(h / 2, y + h / 2 * k2)
            k4 = f(h, y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    loss = ((y - target) ** 2).mean()
    loss.backward()
    grads = {f"grad.p{i}": p.grad.numpy() for i, p in enumerate(field.weights)}
    return {"loss": np.array([loss.item()]), "grad.y0": y0.grad.numpy()} | grads


def hermite(x, times):
    """b, c, d of x_i + b s + c s² + d s³ by interval, whose slopes at knots are the differences before them."""
    import torch

    h = torch.tensor(np.diff(times))[:, None, None]
    difference = (x[:, 1:] - x[:, :-1]).transpose(0, 1) / h
    before = torch.cat([difference[:1], difference[:-1]])  # at the start of each interval
    return before, (difference - before) * 2 / h, (before - difference) / h**2
