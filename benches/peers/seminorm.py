"""torchcde and torchdiffeq on the neural CDE of the example `seminorm`, from the same initial weights.

    cargo run --release --example seminorm -- --gradients --export w
    seminorm.py gradients w            # evaluations and error of one gradient, in two norms at three pairs of tolerances
    seminorm.py train w --updates 75   # evaluations, accuracy and seconds of a training, in two norms

Straight lines whose knots are jumps, dopri5, f32.  One JSON line for each run.
"""

import argparse
import json
import pathlib
import time

import torch
import torchcde
from safetensors.torch import load_file
from torch import nn

PAIRS = [(1e-3, 1e-6), (1e-4, 1e-7), (1e-5, 1e-8)]
NORMS = ["default", "seminorm"]
DATA = pathlib.Path(__file__).parents[2] / "examples/neural_cde/japanese_vowels.safetensors"
LENGTH, BATCH, STRIDE = 29, 90, 9


class Field(nn.Module):
    """F, which counts its evaluations."""

    def __init__(self, weights):
        super().__init__()
        layers = range(sum(name.endswith("weight") for name in weights if name.startswith("cde.field.")))
        of = lambda part: [nn.Parameter(weights[f"cde.field.{i}.{part}"].clone()) for i in layers]
        self.weights, self.biases = nn.ParameterList(of("weight")), nn.ParameterList(of("bias"))
        self.evaluations = 0

    def forward(self, t, z):
        self.evaluations += 1
        x = z
        for i, (w, b) in enumerate(zip(self.weights, self.biases)):
            x = nn.functional.linear(x, w, b)
            x = torch.tanh(x) if i + 1 == len(self.weights) else torch.relu(x)
        return x.view(*z.shape, -1)

    def take(self):
        count, self.evaluations = self.evaluations, 0
        return count

    def flat(self):
        pairs = zip(self.weights, self.biases)
        return torch.cat([x.grad.flatten() for pair in pairs for x in pair]).double()


class Model(nn.Module):
    """The neural CDE with its readout."""

    def __init__(self, weights):
        super().__init__()
        self.field = Field(weights)
        self.initial = linear(weights, "cde.initial")
        self.readout = linear(weights, "readout")

    def forward(self, coefficients, rtol, atol, norm):
        path = torchcde.LinearInterpolation(coefficients)
        options = dict(jump_t=path.grid_points[1:-1])
        backward = dict(options, norm="seminorm") if norm == "seminorm" else options
        z0 = self.initial(path.evaluate(path.interval[0]))
        z = torchcde.cdeint(
            X=path, func=self.field, z0=z0, t=path.interval, rtol=rtol, atol=atol,
            options=options, adjoint_options=backward,
        )
        return self.readout(z[:, -1])


def linear(weights, name):
    weight = weights[f"{name}.weight"]
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data, layer.bias.data = weight.clone(), weights[f"{name}.bias"].clone()
    return layer


def data():
    """Coefficients of the paths and labels, of both parts."""
    tensors = load_file(DATA)
    frames = tensors["train.values"].double()
    mean, deviation = frames.mean(0), frames.std(0)
    parts = {}
    for part in ("train", "test"):
        values = ((tensors[f"{part}.values"].double() - mean) / deviation).float()
        lengths = tensors[f"{part}.lengths"].to(torch.int64).tolist()
        rows = []
        for v in torch.split(values, lengths):
            at = torch.arange(LENGTH).clamp(max=len(v) - 1)
            rows.append(torch.cat([at[:, None].float() / (LENGTH - 1), v[at]], 1))
        labels = tensors[f"{part}.labels"].to(torch.int64)
        parts[part] = torchcde.linear_interpolation_coeffs(torch.stack(rows)), labels
    return parts


def gradients(files):
    """One gradient at the initial weights."""
    coefficients, labels = (x[::STRIDE] for x in data()["train"])
    for file in files:
        weights = load_file(file)
        names = [n for n in weights if n.startswith("exact.")]
        order = sorted(names, key=lambda n: (int(n.split(".")[-2]), n.endswith("bias")))
        exact = torch.cat([weights[n].flatten() for n in order]).double()
        for rtol, atol in PAIRS:
            for norm in NORMS:
                model = Model(weights)
                logits = model(coefficients, rtol, atol, norm)
                forward = model.field.take()
                nn.functional.cross_entropy(logits, labels).backward()
                backward = model.field.take()
                error = float((model.field.flat() - exact).norm() / exact.norm())
                print(json.dumps(dict(file=file.name, rtol=rtol, atol=atol, norm=norm, forward=forward,
                                      backward=backward, error=float(f"{error:.2e}"))), flush=True)


def train(files, updates, norms):
    """A training at the first pair of tolerances."""
    parts = data()
    coefficients, labels = parts["train"]
    rtol, atol = PAIRS[0]
    for file in files:
        for norm in norms:
            model = Model(load_file(file))
            optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
            generator = torch.Generator().manual_seed(0)
            forward, backward, seconds = [], [], []
            while len(seconds) < updates:
                for rows in torch.randperm(len(labels), generator=generator).split(BATCH)[: updates - len(seconds)]:
                    clock = time.perf_counter()
                    optimiser.zero_grad()
                    logits = model(coefficients[rows], rtol, atol, norm)
                    forward.append(model.field.take())
                    nn.functional.cross_entropy(logits, labels[rows]).backward()
                    backward.append(model.field.take())
                    optimiser.step()
                    seconds.append(time.perf_counter() - clock)
            accuracy = {}
            with torch.no_grad():
                for part, (x, y) in parts.items():
                    right = model(x, rtol, atol, norm).argmax(1) == y
                    accuracy[part] = round(float(right.float().mean()), 4)
            mean = lambda x: round(sum(x) / len(x), 1)
            print(json.dumps(dict(file=file.name, norm=norm, updates=updates, forward=mean(forward),
                                  backward=mean(backward), test=accuracy["test"], train=accuracy["train"],
                                  milliseconds=round(1e3 * sorted(seconds)[len(seconds) // 2], 1))), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=["gradients", "train"])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--updates", type=int, default=75)
    parser.add_argument("--norms", nargs="*", default=NORMS)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = sorted(arguments.folder.glob("*.safetensors"))
    if arguments.task == "gradients":
        gradients(found)
    else:
        train(found, arguments.updates, arguments.norms)
