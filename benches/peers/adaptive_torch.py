"""torchdiffeq, torchdyn and torchode on a workload with tolerances."""

import os
from typing import Callable

import torch

from field import Cell, loss_of_outputs, packed_initial, packed_velocity
from torch_peers import OPS
from workload import Workload


class Field(torch.nn.Module):
    """The workload's field over a state of one tensor; counts its calls, and steps where the solver says them."""

    def __init__(self, work: Workload):
        super().__init__()
        self.kind, self.activation = work.kind, work.activation
        weights = [torch.nn.Parameter(torch.tensor(x)) for x in work.weights]
        self.registered = torch.nn.ParameterList(weights)
        self.weights = list(self.registered)  # quicker to read than a ParameterList
        self.clear()

    def clear(self):
        self.calls = self.accepted = self.rejected = 0

    def forward(self, t, y, args=None):
        """torchdyn gives `args`."""
        self.calls += 1
        return packed_velocity(self.kind, OPS, self.weights, t, y, self.activation)

    def callback_accept_step(self, *_):
        """torchdiffeq calls it, and the next."""
        self.accepted += 1

    def callback_reject_step(self, *_):
        self.rejected += 1


def solver(peer: str, field: Field, work: Workload) -> tuple[Callable, str, Callable]:
    """The function from the initial state to the states at all times, its method, and what more it counts.

    A method that a peer lacks is replaced."""
    name, _, variant = peer.partition(" ")
    (rtol, atol), times = work.tolerances, torch.tensor(work.tensors["t"])
    method, nothing = work.method, dict
    if name == "torchdiffeq":
        from torchdiffeq import odeint, odeint_adjoint
        from torchdiffeq._impl.odeint import SOLVERS

        method = method if method in SOLVERS else "dopri5"
        options = dict(rtol=rtol, atol=atol, method=method)
        counts = lambda: {"accepted": field.accepted, "rejected": field.rejected}
        if variant:
            seminorm = dict(adjoint_options=dict(norm="seminorm"))
            return lambda y: odeint_adjoint(field, y, times, **options, **seminorm), method, counts
        return lambda y: odeint(field, y, times, **options), method, counts
    times = times.float()
    if name == "torchdyn":
        from torchdyn.core import NeuralODE

        method = method if method in ("dopri5", "tsit5") else "dopri5"
        ode = NeuralODE(field, solver=method, sensitivity=variant or "autograd", return_t_eval=False,
                        rtol=rtol, atol=atol, solver_adjoint=method, rtol_adjoint=rtol, atol_adjoint=atol)
        return lambda y: ode(y, times), method, nothing
    import torchode

    steppers = {"dopri5": torchode.Dopri5, "tsit5": torchode.Tsit5}
    method = method if method in steppers else "dopri5"
    term, last = torchode.ODETerm(field), {}
    controller = torchode.IntegralController(rtol=rtol, atol=atol, term=term)
    ode = torchode.AutoDiffAdjoint(steppers[method](term=term), controller, backprop_through_step_size_control=False)

    def solve(y):
        every = times.repeat(len(y), 1)
        last["solution"] = solution = ode.solve(torchode.InitialValueProblem(y0=y, t_eval=every))
        return solution.ys.transpose(0, 1)

    def counts():
        stats = last["solution"].stats
        steps, accepted = stats["n_steps"].float(), stats["n_accepted"].float()
        rows = {"accepted": accepted.mean().item(), "rejected": (steps - accepted).mean().item()}
        return rows | {"accepted_most": accepted.max().item()}

    return solve, method, counts


def build(peer: str, precision: str, work: Workload) -> Cell:
    """In f32 only."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    field = Field(work)
    y0 = torch.tensor(work.tensors["y0"]).requires_grad_()
    target = torch.tensor(work.tensors["target"]) if "target" in work.tensors else None
    solve, method, more = solver(peer, field, work)
    start = lambda: packed_initial(work.kind, OPS, y0)

    def forward():
        with torch.no_grad():
            return solve(start())

    def both():
        for x in (*field.weights, y0):
            x.grad = None
        value = loss_of_outputs(work.kind, solve(start()), target)
        value.backward()
        return value

    def numbers(value):
        return value.item(), [x.grad.double().numpy() for x in (*field.weights, y0)]

    def counts():
        field.clear()
        ys = forward()
        line = {"nfe_fwd": field.calls} | more()
        if method != work.method:
            line["stand_in"] = method
        field.clear()
        both()
        return line | {"nfe_all": field.calls, "err_y": work.state_error(ys.double().numpy())}

    return Cell(forward, both, numbers, counts=counts)
