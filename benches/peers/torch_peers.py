"""PyTorch unrolled, rampde, torchdiffeq and torchdyn on a workload."""

import os
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Callable

import torch
import torch.nn.functional as F

from field import DENSITIES, Cell, each, initial, loss, step, velocity
from workload import Workload

def time(t, like: torch.Tensor) -> torch.Tensor:
    """A number is written on the device, where no copy waits."""
    if torch.is_tensor(t):
        return t.to(like.dtype).reshape(1, 1)
    return torch.full((1, 1), t, dtype=like.dtype, device=like.device)


OPS = SimpleNamespace(linear=F.linear, conv=lambda x, w, b: F.conv2d(x, w, b, padding=1),
                      tanh=torch.tanh, softplus=F.softplus, relu=torch.relu, sigmoid=torch.sigmoid, exp=torch.exp,
                      sign=torch.sign, cat=lambda parts: torch.cat(parts, -1), zeros_like=torch.zeros_like, time=time)
DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class Field(torch.nn.Module):
    """The workload's field as the module that adjoint methods ask for."""

    def __init__(self, kind: str, weights: list[torch.Tensor]):
        super().__init__()
        self.kind, self.registered = kind, torch.nn.ParameterList(weights)
        self.weights = list(self.registered)  # quicker to read than a ParameterList

    def forward(self, t, y, args=None):
        """torchdyn, which knows no tuples, gives `args` and has the parts side by side."""
        if args is None or self.kind not in DENSITIES:
            return velocity(self.kind, OPS, self.weights, t, y)
        parts = apart(self.kind, y)
        return torch.cat(velocity(self.kind, OPS, self.weights, t, parts), -1)


def apart(kind: str, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The parts of a state that has them side by side."""
    features = y.shape[-1] // 2 if kind == "hutchinson" else y.shape[-1] - DENSITIES[kind]
    return y.tensor_split([features, features + DENSITIES[kind]], -1)[: 3 if kind == "hutchinson" else 2]


def solver(peer: str, field: Field, method: str, times: torch.Tensor) -> Callable:
    """The function from initial to final state."""
    name, _, variant = peer.partition(" ")
    if name == "torch":
        times = times.tolist()

        def unrolled(y):
            for t, end in zip(times, times[1:]):
                y = step(method, field, t, y, end - t)
            return y

        return unrolled
    if name == "torchdyn":
        from torchdyn.core import NeuralODE

        ode = NeuralODE(field, solver=method, solver_adjoint=method, sensitivity=variant or "autograd",
                        return_t_eval=False).to(times.dtype)
        if field.kind not in DENSITIES:
            return lambda y: ode(y, times)[-1]
        return lambda y: apart(field.kind, ode(torch.cat(y, -1), times)[-1])
    options = {}
    if name == "rampde":
        from rampde import odeint
    elif variant:
        from torchdiffeq import odeint_adjoint as odeint

        # The end alone, so that no other states are kept.
        # A step size is positive, also where time decreases.
        options, times = {"options": {"step_size": times.diff()[0].abs().item()}}, times[[0, -1]]
    else:
        from torchdiffeq import odeint
    return lambda y: each(lambda x: x[-1], odeint(field, y, times, method=method, **options))


def build(peer: str, precision: str, work: Workload, device: str = "cpu", scale: float = 1.0) -> Cell:
    """f64 and f32 throughout, without TF32; bf16 and f16 by autocast over f32, with the loss scaled for f16."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    dtype = DTYPES[precision]
    state, context = dtype, nullcontext
    if dtype.itemsize < 4:
        state, context = torch.float32, lambda: torch.autocast(device, dtype=dtype)
    tensor = lambda x: torch.tensor(x, dtype=state, device=device)
    field = Field(work.kind, [tensor(x) for x in work.weights])
    y0, target = tensor(work.tensors["y0"]).requires_grad_(), tensor(work.tensors["target"])
    variables, seed = [*field.weights, y0], tensor(scale)
    solve = solver(peer, field, work.method, tensor(work.tensors["t"]))

    def forward():
        with torch.no_grad(), context():
            return solve(initial(work.kind, OPS, y0))

    def clear():
        for x in variables:
            x.grad = None

    def both():
        clear()
        with context():
            value = loss(work.kind, solve(initial(work.kind, OPS, y0)), target)
        value.backward(seed.to(value.dtype))
        return value

    def numbers(value):
        return value.item(), [(x.grad.double() / scale).cpu().numpy() for x in variables]

    return Cell(forward, both, numbers, clear=clear)
