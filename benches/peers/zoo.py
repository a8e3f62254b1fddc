"""Workloads of torchdyn's own models, of torchdyn on them, and of their reference: a Hamiltonian network, a field of
Galerkin layers, and a graph neural ODE on the citations of Cora."""

import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file

from field import Cell, step
from workload import Workload

#: H0 is a small one, for tests.
SPECS = {
    "H0": dict(kind="hnn", dims=[2, 12, 9, 1], batch=20, steps=3, method="rk4", seed=300),
    "H1": dict(kind="hnn", dims=[2, 64, 64, 1], batch=512, steps=10, method="rk4", seed=301),
    "H2": dict(kind="galerkin", dims=[2, 32, 2], orders=5, batch=512, steps=10, method="rk4", seed=302),
    "H3": dict(kind="graph", dims=[64, 64, 64], steps=2, method="rk4", seed=303),
}
CORA = Path(__file__).resolve().parents[2] / "examples/graph_ode/cora.safetensors"


def random(spec: dict) -> Workload:
    """The inputs that a specification asks for."""
    source, dims, tensors, weights = np.random.RandomState(spec["seed"]), spec["dims"], {}, []

    def layer(fan: int, width: int, bias: bool = True) -> None:
        bound = 1 / np.sqrt(fan)
        weights.append(source.uniform(-bound, bound, (width, fan)))
        if bias:
            weights.append(source.uniform(-bound, bound, width))

    batch = spec.get("batch")
    if spec["kind"] == "galerkin":
        # Coefficients of W (row by row) and b in cosines and then sines, dilation and shift; a plain layer after them.
        functions, numbers = 2 * spec["orders"], dims[1] * (dims[0] + 1)
        weights += [source.randn(functions, numbers) / np.sqrt(dims[0] * functions), np.ones(1), np.zeros(1)]
        layer(*dims[1:])
    else:
        for i, pair in enumerate(zip(dims, dims[1:])):
            layer(*pair, bias=spec["kind"] != "hnn" or i + 2 < len(dims))  # one that only shifts H has no gradient
    if spec["kind"] == "graph":
        cora = load_file(CORA)
        batch, tensors["edges"] = len(cora["labels"]), cora["edges"].astype(np.uint32)
    for name in ("y0", "target"):
        tensors[name] = source.randn(batch, dims[0])
    tensors |= {f"p{i}": x for i, x in enumerate(weights)}
    tensors = {name: x if x.dtype == np.uint32 else x.astype(np.float32) for name, x in tensors.items()}
    tensors["t"] = np.linspace(0.0, 1.0, spec["steps"] + 1)
    return Workload(spec["kind"], spec["method"], tensors)


def make(directory: Path, names: list[str] = list(SPECS)) -> None:
    """Writes files with their reference: loss and gradients of the same steps, f64 autograd through the unrolled solve."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        work = random(SPECS[name])
        field = Field(work, torch.float64)
        loss, (*weights, y0) = numbers(field, work, both(field, work, torch.float64, unrolled(field, work)))
        grads = {f"grad.p{i}": grad for i, grad in enumerate(weights)} | {"grad.y0": y0, "loss": np.array([loss])}
        header = {key: json.dumps(x) for key, x in SPECS[name].items()}
        save_file(work.tensors | grads, directory / f"{name}.safetensors", header)


def adjacency(work: Workload, dtype: torch.dtype) -> torch.Tensor:
    """D^−½ (A + I) D^−½ in compressed rows."""
    nodes, edges = len(work.tensors["y0"]), torch.tensor(work.tensors["edges"].astype(np.int64))
    loops = torch.arange(nodes).expand(2, -1).T
    rows, columns = torch.cat([edges, edges.flip(1), loops]).T
    roots = torch.bincount(rows).to(dtype).rsqrt()
    return torch.sparse_coo_tensor(torch.stack([rows, columns]), roots[rows] * roots[columns], (nodes, nodes)).to_sparse_csr()


class Field(torch.nn.Module):
    """The field in plain operations, over weights of which torchdyn's modules are made, too."""

    def __init__(self, work: Workload, dtype: torch.dtype):
        super().__init__()
        self.kind = work.kind
        self.registered = torch.nn.ParameterList(torch.tensor(x, dtype=dtype) for x in work.weights)
        self.weights = list(self.registered)
        self.graph = adjacency(work, dtype) if work.kind == "graph" else None

    def forward(self, t, y):
        p = self.weights
        if self.kind == "hnn":
            with torch.enable_grad():
                x = y if y.requires_grad else y.detach().requires_grad_()
                gradient = torch.autograd.grad(self.network(x).sum(), x, create_graph=True)[0]
            n = y.shape[1] // 2
            return torch.cat([gradient[:, n:], -gradient[:, :n]], 1)
        if self.kind == "galerkin":
            width, functions = p[3].shape[1], len(p[0])
            orders = torch.linspace(0, functions // 2, functions // 2, dtype=p[0].dtype)  # torchdyn's: not whole numbers
            angles = orders * (t * p[1] + p[2])
            numbers = torch.cat([angles.cos(), angles.sin()]) @ p[0]
            hidden = F.linear(y, numbers[:-width].view(width, -1), numbers[-width:])
            return F.linear(torch.tanh(hidden), p[3], p[4])
        hidden = F.softplus(self.graph @ F.linear(y, p[0]) + p[1])
        return self.graph @ F.linear(hidden, p[2]) + p[3]

    def network(self, x):
        *hidden, last = range(0, len(self.weights), 2)
        for i in hidden:
            x = torch.tanh(F.linear(x, self.weights[i], self.weights[i + 1]))
        return F.linear(x, self.weights[last])


class Convolution(torch.nn.Module):
    """A layer of torchdyn's graph tutorial, by PyTorch's product of a matrix in compressed rows."""

    def __init__(self, graph: torch.Tensor, weight: torch.nn.Parameter, bias: torch.nn.Parameter):
        super().__init__()
        self.graph, self.weight, self.bias = graph, weight, bias

    def forward(self, x):
        return self.graph @ F.linear(x, self.weight) + self.bias


def linear(weight: torch.nn.Parameter, bias: torch.nn.Parameter | None) -> torch.nn.Linear:
    """A layer that shares its weights."""
    layer = torch.nn.Linear(*weight.shape[::-1], bias=bias is not None)
    layer.weight, layer.bias = weight, bias
    return layer


def modules(field: Field) -> torch.nn.Module:
    """torchdyn's own model."""
    from torchdyn.models import HNN
    from torchdyn.nn import DepthCat, Fourier, GalLinear

    p = field.weights
    if field.kind == "hnn":
        layers = [linear(*pair) for pair in zip(p[::2], [*p[1::2], None])]
        return HNN(torch.nn.Sequential(*[part for layer in layers[:-1] for part in (layer, torch.nn.Tanh())], layers[-1]))
    if field.kind == "galerkin":
        half = len(p[0]) // 2
        first = GalLinear(p[3].shape[0], p[3].shape[1], expfunc=Fourier(half))
        coefficients = torch.stack([p[0][:half].T, p[0][half:].T], -1).detach()
        first.coeffs, first.dilation, first.shift = torch.nn.Parameter(coefficients), p[1], p[2]
        field.weights[0] = first.coeffs  # in torchdyn's order
        return torch.nn.Sequential(DepthCat(1), first, torch.nn.Tanh(), linear(p[3], p[4]))
    layers = [Convolution(field.graph, *p[:2]), torch.nn.Softplus(), Convolution(field.graph, *p[2:])]
    return torch.nn.Sequential(*layers)


def unrolled(field: Field, work: Workload):
    """The function from initial to final state."""
    times = work.tensors["t"].tolist()

    def solve(y):
        for t, end in zip(times, times[1:]):
            y = step(work.method, field, t, y, end - t)
        return y

    return solve


def both(field: Field, work: Workload, dtype: torch.dtype, solve) -> list:
    """The loss, and y0, which has its gradient afterwards as the weights have theirs."""
    for x in field.weights:
        x.grad = None
    y0 = torch.tensor(work.tensors["y0"], dtype=dtype).requires_grad_()
    loss = ((solve(y0) - torch.tensor(work.tensors["target"], dtype=dtype)) ** 2).mean()
    loss.backward()
    return [loss, y0]


def numbers(field: Field, work: Workload, result: list) -> tuple[float, list]:
    """The loss, and the gradients of the weights and of y0."""
    loss, y0 = result
    grads = [x.grad.double() for x in [*field.weights, y0]]
    if grads[0].ndim == 3:
        grads[0] = torch.cat([grads[0][..., 0].T, grads[0][..., 1].T])
    return loss.item(), [x.numpy() for x in grads]


def build(peer: str, precision: str, work: Workload) -> Cell:
    """torchdyn in f32, by autograd or its continuous adjoint."""
    from torchdyn.core import NeuralODE

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    field, dtype = Field(work, torch.float32), torch.float32
    _, _, variant = peer.partition(" ")
    ode = NeuralODE(modules(field), solver=work.method, solver_adjoint=work.method, sensitivity=variant or "autograd",
                    return_t_eval=False)
    times = torch.tensor(work.tensors["t"], dtype=dtype)
    solve = lambda y: ode(y, times)[-1]

    def forward():
        with torch.no_grad():
            return solve(torch.tensor(work.tensors["y0"]))

    return Cell(forward, lambda: both(field, work, dtype, solve), lambda result: numbers(field, work, result))
