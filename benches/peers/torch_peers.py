"""PyTorch unrolled, rampde, torchdiffeq and torchdyn on a workload."""

import os
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Callable

import torch
import torch.nn.functional as F

from field import Cell, each, initial, loss, step, velocity
from workload import Workload

OPS = SimpleNamespace(linear=F.linear, conv=lambda x, w, b: F.conv2d(x, w, b, padding=1),
                      tanh=torch.tanh, relu=torch.relu, zeros_like=torch.zeros_like)
DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class Field(torch.nn.Module):
    """The workload's field as the module that adjoint methods ask for."""

    def __init__(self, kind: str, weights: list[torch.Tensor]):
        super().__init__()
        self.kind, self.registered = kind, torch.nn.ParameterList(weights)
        self.weights = list(self.registered)  # quicker to read than a ParameterList

    def forward(self, t, y, args=None):
        """torchdyn, which knows no tuples, gives `args` and has the parts side by side."""
        if args is None or self.kind != "cnf":
            return velocity(self.kind, OPS, self.weights, y)
        return torch.cat(velocity("cnf", OPS, self.weights, (y[:, :-1], y[:, -1:])), -1)


def solver(peer: str, field: Field, method: str, times: torch.Tensor) -> Callable:
    """The function from initial to final state."""
    name, _, variant = peer.partition(" ")
    if name == "torch":
        steps = times.diff().tolist()

        def unrolled(y):
            for h in steps:
                y = step(method, lambda y: field(None, y), y, h)
            return y

        return unrolled
    if name == "torchdyn":
        from torchdyn.core import NeuralODE

        ode = NeuralODE(field, solver=method, solver_adjoint=method, sensitivity=variant or "autograd",
                        return_t_eval=False).to(times.dtype)
        if field.kind != "cnf":
            return lambda y: ode(y, times)[-1]
        return lambda y: ode(torch.cat(y, -1), times)[-1].split([y[0].shape[-1], 1], -1)
    options = {}
    if name == "rampde":
        from rampde import odeint
    elif variant:
        from torchdiffeq import odeint_adjoint as odeint

        # The end alone, so that no other states are kept.
        options, times = {"options": {"step_size": times.diff()[0].item()}}, times[[0, -1]]
    else:
        from torchdiffeq import odeint
    return lambda y: each(lambda x: x[-1], odeint(field, y, times, method=method, **options))


def build(peer: str, precision: str, work: Workload) -> Cell:
    """f64 and f32 throughout; bf16 and f16 by autocast over f32."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dtype = DTYPES[precision]
    state, context = dtype, nullcontext
    if dtype.itemsize < 4:
        state, context = torch.float32, lambda: torch.autocast("cpu", dtype=dtype)
    tensor = lambda x: torch.tensor(x, dtype=state)
    field = Field(work.kind, [tensor(x) for x in work.weights])
    y0, target = tensor(work.tensors["y0"]).requires_grad_(), tensor(work.tensors["target"])
    variables = [*field.weights, y0]
    solve = solver(peer, field, work.method, tensor(work.tensors["t"]))

    def forward():
        with torch.no_grad(), context():
            return solve(initial(work.kind, OPS, y0))

    def both():
        for x in variables:
            x.grad = None
        with context():
            value = loss(work.kind, solve(initial(work.kind, OPS, y0)), target)
        value.backward()
        return value

    return Cell(forward, both, lambda value: (value.item(), [x.grad.double().numpy() for x in variables]))
