"""diffrax on a workload that is driven by noise or data."""

import diffrax
import jax
import jax.numpy as jnp
import lineax
import numpy as np

from field import Cell, velocity
from jax_peers import OPS, Rk4
from workload import Workload


def build(peer: str, precision: str, work: Workload) -> Cell:
    """In f32 only.  Noise is the virtual tree, just as fine as the steps: `UnsafeBrownianPath` has no reverse mode."""
    array = lambda x: jnp.asarray(x, jnp.float32)
    times = array(work.tensors["t"])
    variables = [array(x) for x in work.weights], array(work.tensors["y0"])
    target, half = array(work.tensors["target"]), len(work.weights) // 2
    network = lambda weights, y: velocity("mlp", OPS, weights, None, y, work.activation)
    if work.kind == "sde":
        shape = jax.ShapeDtypeStruct(variables[1].shape, jnp.float32)
        key, finest = jax.random.PRNGKey(work.noise), float(times[1] - times[0]) / 2
        noise = diffrax.VirtualBrownianTree(times[0], times[-1], tol=finest, shape=shape, key=key)
        diffusion = lambda t, y, weights: lineax.DiagonalLinearOperator(network(weights[half:], y))
        drift = diffrax.ODETerm(lambda t, y, weights: network(weights[:half], y))
        terms = diffrax.MultiTerm(drift, diffrax.ControlTerm(diffusion, noise))
        method = diffrax.Euler() if work.method == "euler_maruyama" else diffrax.Heun()
    else:
        observed = jnp.swapaxes(array(work.tensors["x"]), 0, 1)
        path = diffrax.CubicInterpolation(times, diffrax.backward_hermite_coefficients(times, observed))

        def field(t, z, weights):
            matrix = jnp.tanh(network(weights, z)).reshape(*z.shape, -1)
            return jnp.einsum("bhc,bc->bh", matrix, path.derivative(t))

        terms, method = diffrax.ODETerm(field), Rk4()

    def solve(variables):
        weights, y = variables
        solution = diffrax.diffeqsolve(
            terms, method, times[0], times[-1], None, y, args=weights,
            stepsize_controller=diffrax.StepTo(ts=times), max_steps=len(times) - 1)
        return solution.ys[-1]

    value = lambda variables: ((solve(variables) - target) ** 2).mean()
    forward, both = jax.jit(solve), jax.jit(jax.value_and_grad(value))
    return Cell(
        lambda: jax.block_until_ready(forward(variables)),
        lambda: jax.block_until_ready(both(variables)),
        lambda result: (float(result[0]), [np.asarray(x) for x in (*result[1][0], result[1][1])]),
        lambda: both.lower(variables).compile().memory_analysis().temp_size_in_bytes / 2**20,
    )
