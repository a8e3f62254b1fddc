"""diffrax on a workload with tolerances: one step length for the batch, or one for every row."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from field import Cell, loss_of_outputs, packed_initial, packed_velocity
from jax_peers import OPS
from workload import Workload

#: Solvers, and the evaluations of an attempt: the last stage is the next step's first.
SOLVERS = {"dopri5": (diffrax.Dopri5, 6), "tsit5": (diffrax.Tsit5, 6), "bosh3": (diffrax.Bosh3, 3)}


def build(peer: str, precision: str, work: Workload) -> Cell:
    """In f32 only."""
    array = lambda x: jnp.asarray(x, jnp.float32)
    (rtol, atol), times = work.tolerances, array(work.tensors["t"])
    variables = [array(x) for x in work.weights], array(work.tensors["y0"])
    target = array(work.tensors["target"]) if "target" in work.tensors else None
    method, stages = SOLVERS[work.method]
    field = diffrax.ODETerm(
        lambda t, y, weights: packed_velocity(work.kind, OPS, weights, t, y, work.activation))
    pi = {"pcoeff": 0.4, "icoeff": 0.3} if peer == "diffrax pi" else {}
    controller = diffrax.PIDController(rtol=rtol, atol=atol, **pi)

    def trajectory(weights, y):
        solution = diffrax.diffeqsolve(
            field, method(), times[0], times[-1], None, y, args=weights, saveat=diffrax.SaveAt(ts=times),
            stepsize_controller=controller, adjoint=diffrax.RecursiveCheckpointAdjoint(), max_steps=4096)
        return solution.ys, (solution.stats["num_steps"], solution.stats["num_accepted_steps"])

    def solve(variables):
        weights, y = variables[0], packed_initial(work.kind, OPS, variables[1])
        if peer == "diffrax rows":
            return jax.vmap(lambda y: trajectory(weights, y), out_axes=(1, 0))(y)
        return trajectory(weights, y)

    def value(variables):
        return loss_of_outputs(work.kind, solve(variables)[0], target)

    forward, both = jax.jit(solve), jax.jit(jax.value_and_grad(value))

    def counts():
        ys, (steps, accepted) = forward(variables)
        steps, accepted = np.asarray(steps), np.asarray(accepted)
        line = {"accepted": float(accepted.mean()), "rejected": float((steps - accepted).mean())}
        if steps.ndim:
            line["accepted_most"] = int(accepted.max())
        line |= {"nfe_fwd": int(steps.max()) * stages + 2}
        return line | {"err_y": work.state_error(np.asarray(ys, np.float64))}

    return Cell(
        lambda: jax.block_until_ready(forward(variables)),
        lambda: jax.block_until_ready(both(variables)),
        lambda result: (float(result[0]), [*result[1][0], result[1][1]]),
        lambda: both.lower(variables).compile().memory_analysis().temp_size_in_bytes / 2**20,
        counts=counts,
    )
