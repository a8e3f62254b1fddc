"""torchsde, and torchcde with torchdiffeq, on a workload that is driven by noise or data."""

import os

import torch

from field import Cell, velocity
from torch_peers import OPS
from workload import Workload


class Network(torch.nn.Module):
    """Perceptrons over the weights of a workload."""

    def __init__(self, work: Workload, dtype: torch.dtype):
        super().__init__()
        weights = [torch.nn.Parameter(torch.tensor(x, dtype=dtype)) for x in work.weights]
        self.registered = torch.nn.ParameterList(weights)
        self.weights = list(self.registered)  # quicker to read than a ParameterList
        self.activation = work.activation

    def network(self, weights, y):
        return velocity("mlp", OPS, weights, None, y, self.activation)


class Equation(Network):
    """Drift and diffusion as torchsde asks for them."""

    noise_type = "diagonal"

    def __init__(self, work: Workload, dtype: torch.dtype):
        super().__init__(work, dtype)
        self.sde_type = "ito" if work.method == "euler_maruyama" else "stratonovich"
        self.half = len(self.weights) // 2

    def f(self, t, y):
        return self.network(self.weights[: self.half], y)

    def g(self, t, y):
        return self.network(self.weights[self.half :], y)


class Control(Network):
    """F(z) as a matrix, as torchcde asks for it."""

    def forward(self, t, z):
        return torch.tanh(self.network(self.weights, z)).view(*z.shape, -1)


def solver(peer: str, work: Workload, field: Network):
    """The function from initial to final state."""
    _, _, variant = peer.partition(" ")
    times = torch.tensor(work.tensors["t"], dtype=torch.float32)
    ends, step = times[[0, -1]], float(times[1] - times[0])
    if work.kind == "sde":
        import torchsde

        method = "euler" if work.method == "euler_maruyama" else "heun"
        if variant:
            return lambda y: torchsde.sdeint_adjoint(field, y, ends, dt=step, method=method, adjoint_method=method)[-1]
        return lambda y: torchsde.sdeint(field, y, ends, dt=step, method=method)[-1]
    import torchcde

    x = torch.tensor(work.tensors["x"])
    path = torchcde.CubicSpline(torchcde.hermite_cubic_coefficients_with_backward_differences(x, times), times)
    options = dict(method=work.method, options=dict(step_size=step))
    return lambda y: torchcde.cdeint(X=path, func=field, z0=y, t=ends, adjoint=bool(variant), **options)[:, -1]


def build(peer: str, precision: str, work: Workload) -> Cell:
    """In f32 only.  Noise is the peer's own, so that gradients are compared with the reference where there is none."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    field = (Equation if work.kind == "sde" else Control)(work, torch.float32)
    y0 = torch.tensor(work.tensors["y0"]).requires_grad_()
    target = torch.tensor(work.tensors["target"])
    solve = solver(peer, work, field)

    def forward():
        with torch.no_grad():
            return solve(y0)

    def both():
        for x in (*field.weights, y0):
            x.grad = None
        value = ((solve(y0) - target) ** 2).mean()
        value.backward()
        return value

    def numbers(value):
        return value.item(), [x.grad.double().numpy() for x in (*field.weights, y0)]

    return Cell(forward, both, numbers)
