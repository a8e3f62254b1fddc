"""diffrax and a plain `jax.lax.scan` on a workload."""

from types import SimpleNamespace
from typing import Callable, ClassVar

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from field import Cell, each, initial, loss, step, velocity
from workload import Workload


def conv(x, weight, bias):
    """3×3 with zero padding, channels first."""
    layout = ("NCHW", "OIHW", "NCHW")
    return jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=layout) + bias[:, None, None]


OPS = SimpleNamespace(linear=lambda x, w, b: x @ w.T if b is None else x @ w.T + b, conv=conv,
                      tanh=jnp.tanh, softplus=jax.nn.softplus, relu=jax.nn.relu, sigmoid=jax.nn.sigmoid, exp=jnp.exp,
                      sign=jnp.sign, cat=lambda parts: jnp.concatenate(parts, -1), zeros_like=jnp.zeros_like,
                      time=lambda t, like: jnp.full((1, 1), t, like.dtype))


class Rk4(diffrax.AbstractERK):
    """Classic RK4, which diffrax lacks."""

    tableau: ClassVar = diffrax.ButcherTableau(
        c=np.array([0.5, 0.5, 1.0]),
        a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
        b_sol=np.array([1, 2, 2, 1]) / 6,
        b_error=np.zeros(4),
    )
    interpolation_cls: ClassVar[Callable] = diffrax.Heun.interpolation_cls

    def order(self, terms):
        return 4


def build(peer: str, precision: str, work: Workload) -> Cell:
    """In f32 only."""
    array = lambda x: jnp.asarray(x, jnp.float32)
    times, steps = array(work.tensors["t"]), array(np.diff(work.tensors["t"]))
    variables = [array(x) for x in work.weights], array(work.tensors["y0"])
    target = array(work.tensors["target"])
    field = lambda t, y, weights: velocity(work.kind, OPS, weights, t, y)
    method = diffrax.Euler() if work.method == "euler" else Rk4()

    def solve(variables):
        weights, y = variables[0], initial(work.kind, OPS, variables[1])
        if peer == "jax scan":
            once = lambda y, th: (step(work.method, lambda t, y: field(t, y, weights), th[0], y, th[1]), None)
            return jax.lax.scan(once, y, (times[:-1], steps))[0]
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field), method, times[0], times[-1], None, y, args=weights,
            stepsize_controller=diffrax.StepTo(ts=times), max_steps=len(steps))
        return each(lambda x: x[-1], solution.ys)

    value = lambda variables: loss(work.kind, solve(variables), target)
    forward, both = jax.jit(solve), jax.jit(jax.value_and_grad(value))
    return Cell(
        lambda: jax.block_until_ready(forward(variables)),
        lambda: jax.block_until_ready(both(variables)),
        lambda result: (float(result[0]), [*result[1][0], result[1][1]]),
        lambda: both.lower(variables).compile().memory_analysis().temp_size_in_bytes / 2**20,
    )
