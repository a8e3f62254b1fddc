"""Fields, classic steps and losses, written once for torch and JAX.

`ops` holds what the two call by different names: linear, conv, tanh, softplus, relu, sigmoid, exp, sign, cat,
zeros_like, and `time(t, like)`, t as a 1 × 1 matrix.
"""

from typing import Any, Callable, NamedTuple


#: Kinds whose state is (z, log p) or (z, log p and two further costs), and the columns of the second part; a `hutchinson` has
#: its probe as a third part.
DENSITIES = {"cnf": 1, "hyper": 1, "ot_flow": 3, "hutchinson": 1}


class Cell(NamedTuple):
    """A library on a workload, ready to be timed."""

    forward: Callable[[], Any]
    both: Callable[[], Any]
    numbers: Callable[[Any], tuple[float, list]]  # loss, gradients of weights and y0 by `both`
    buffers_mb: Callable[[], float | None] = lambda: None  # compiled scratch memory
    clear: Callable[[], None] = lambda: None  # drops gradients
    counts: Callable[[], dict] = dict  # of adaptive steps: of a forward pass, and the error of its states


def velocity(kind: str, ops, weights: list, t, y, activation: str = "tanh"):
    """dy/dt; of a `cnf` with the exact trace by forward tangents."""
    if kind == "van_der_pol":
        x, v = y[..., :1], y[..., 1:]
        return ops.cat([v, weights[0] * (1 - x * x) * v - x])
    if kind == "scaled_mlp":
        x, s = y[..., :-1], y[..., -1:]
        towards = velocity("mlp", ops, weights, t, x, activation)
        return ops.cat([ops.exp(s) * (towards - x), ops.zeros_like(s)])
    if kind == "ot_flow":
        return ot_flow(ops, weights, t, y[0])
    *hidden, last = zip(weights[::2], weights[1::2])
    if kind == "hutchinson":
        return hutchinson(ops, hidden, last, *y)
    if kind == "hyper":
        return hyper(ops, [*hidden, last], t, y[0])
    if kind == "conv":
        return ops.conv(ops.relu(ops.conv(y, *hidden[0])), *last)
    h, slopes = y[0] if kind == "cnf" else y, []
    for layer in hidden:
        before = ops.linear(h, *layer)
        h = getattr(ops, activation)(before)
        if kind == "cnf":
            slopes.append(1 - h * h if activation == "tanh" else ops.sigmoid(before))
    out = ops.linear(h, *last)
    if kind == "mlp":
        return out
    trace = 0
    for i in range(out.shape[-1]):
        tangent = slopes[0] * weights[0][:, i]
        for (weight, _), slope in zip(hidden[1:], slopes[1:]):
            tangent = ops.linear(tangent, weight, None) * slope
        trace = trace + (tangent * last[0][i]).sum(axis=-1, keepdims=True)
    return out, -trace


def hutchinson(ops, hidden: list, last, z, _, probe):
    """dz/dt of a perceptron with tanh, and −εᵀ(∂f/∂z)ε of the probe ε by one forward tangent."""
    tangent = probe
    for weight, bias in hidden:
        z = ops.tanh(ops.linear(z, weight, bias))
        tangent = (1 - z * z) * ops.linear(tangent, weight, None)
    trace = (ops.linear(tangent, last[0], None) * probe).sum(axis=-1, keepdims=True)
    return ops.linear(z, *last), -trace, ops.zeros_like(probe)


def hyper(ops, layers: list, t, z):
    """dz/dt = 1/m Σ u tanh(w·z + b) and minus its trace, of weights that layers compute from time."""
    x = ops.time(t, z)
    for i, layer in enumerate(layers):
        x = ops.linear(ops.tanh(x) if i else x, *layer)
    d = z.shape[-1]
    m = x.shape[-1] // (3 * d + 1)
    w, u, gate = (x[0, i * m * d : (i + 1) * m * d].reshape(m, d) for i in range(3))
    u = u * ops.sigmoid(gate) / m
    h = ops.tanh(ops.linear(z, w, x[0, 3 * m * d :]))
    return h @ u, (h * h - 1) @ (u * w).sum(axis=-1, keepdims=True)


def ot_flow(ops, weights: list, t, x):
    """Minus the gradient of w·(u + σ(K₁u + b₁)) + ½ ‖As‖² + c·s, u = σ(K₀s + b₀), s = (x, t), σ(x) = log 2 cosh x, with the
    trace of its Hessian and the costs of OT-Flow, by the formulas of its authors."""
    k0, b0, k1, b1, w, a, c = weights
    d = x.shape[-1]
    s = ops.cat([x, ops.zeros_like(x[:, :1]) + ops.time(t, x)])
    before = ops.linear(s, k0, b0)
    t0, u = ops.tanh(before), ops.softplus(2 * before) - before
    t1 = ops.tanh(ops.linear(u, k1, b1))
    z = w + (t1 * w) @ k1
    gradient = (t0 * z) @ k0 + ops.linear(ops.linear(s, a, None), a.T, None) + c
    columns = k0[:, :d]
    tangents = (t0[:, None, :] * columns.T) @ k1.T
    trace = (((1 - t0 * t0) * z) @ (columns * columns).sum(-1)
             + ((1 - t1 * t1) * (tangents * tangents).sum(1)) @ w + (a[:, :d] ** 2).sum())[:, None]
    transport = 0.5 * (gradient[:, :d] ** 2).sum(axis=-1, keepdims=True)
    return -gradient[:, :d], ops.cat([trace, transport, abs(gradient[:, d:] - transport)])


def initial(kind: str, ops, y0):
    """The state at the start.  Signs of normal numbers are a probe of Rademacher's distribution."""
    if kind not in DENSITIES:
        return y0
    costs = ops.cat(DENSITIES[kind] * [ops.zeros_like(y0[:, :1])])
    return (y0, costs, ops.sign(y0)) if kind == "hutchinson" else (y0, costs)


def loss(kind: str, y, target):
    """Mean square distance, or mean negative log-likelihood up to a constant, with the further costs."""
    if kind in DENSITIES:
        return (0.5 * (y[0] ** 2).sum(axis=-1) + y[1].sum(axis=-1)).mean()
    return ((y - target) ** 2).mean()


def first_output(kind: str) -> int:
    """The number of the first time whose state is an output of a workload with tolerances."""
    return 0 if kind == "van_der_pol" else 1


def packed_velocity(kind: str, ops, weights: list, t, y, activation: str):
    """dy/dt of a state that is one array, a density's logarithm its last column."""
    if kind not in DENSITIES:
        return velocity(kind, ops, weights, t, y, activation)
    return ops.cat(velocity(kind, ops, weights, t, (y[..., :-1], y[..., -1:]), activation))


def packed_initial(kind: str, ops, y0):
    """The same state at the start."""
    return ops.cat(initial(kind, ops, y0)) if kind in DENSITIES else y0


def loss_of_outputs(kind: str, ys, target):
    """Mean square distance of all outputs, in as many columns as the target has, or that of the end of a density."""
    if kind in DENSITIES:
        return loss(kind, (ys[-1, ..., :-1], ys[-1, ..., -1:]), None)
    return ((ys[first_output(kind) :, ..., : target.shape[-1]] - target) ** 2).mean()


def step(method: str, f: Callable, t, y, h):
    """One step of Euler or of classic RK4."""
    move = lambda k, h: each(lambda y, k: y + k * h, y, k)
    k1 = f(t, y)
    if method == "euler":
        return move(k1, h)
    k2 = f(t + h / 2, move(k1, h / 2))
    k3 = f(t + h / 2, move(k2, h / 2))
    k4 = f(t + h, move(k3, h))
    return move(each(lambda a, b, c, d: a + 2 * (b + c) + d, k1, k2, k3, k4), h / 6)


def each(function: Callable, *states):
    """Applies a function part by part to states that are tuples, or to single tensors."""
    return tuple(map(function, *states)) if isinstance(states[0], tuple) else function(*states)
