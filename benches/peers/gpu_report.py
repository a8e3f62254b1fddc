"""The Markdown report of a run on a GPU, from its lines."""

import subprocess

import workload
from machine import processor
from report import figure, table

PRECISIONS = ["f32", "bf16", "f16"]
#: Their time over ours, at least, in the same precision: launch-bound problems, and those full of work.
RAMPDE_BARS = {"W1": 5, "W5": 5, "G4": 5, "G2": 1.3, "G3": 1.0}
TORCH_BARS = {"W1": 3, "W5": 3, "G4": 3, "G2": 1.0}
TORCH = ("torch", "torchdiffeq")
OURS = ("ours", "ours graphs")
KEPT = (*OURS, "ours kept")


def render(lines: list[dict]) -> str:
    """Everything that was measured, and what was not."""
    said = {key: line[key] for line in lines for key in ("run", "peers", "environment") if key in line}
    cells = {(x["workload"], x["library"], x["precision"]): [x] for x in lines if "workload" in x}
    cells = dict(sorted(cells.items(), key=lambda item: (PRECISIONS.index(item[0][2]), item[0][0].startswith("G"), item[0][0])))
    failed = {" ".join(key): found[-1]["error"] for key, found in cells.items() if "error" in found[-1]}
    failed |= {line["command"]: line["error"] for line in lines if "error" in line and "workload" not in line}

    def spread(part: str):
        return lambda found: "{} ({}–{})".format(*map(figure, (found[-1][f"{part}_ms"], *found[-1][f"{part}_range"])))

    def memory(found: list[dict]) -> str:
        return "?" if found[-1]["peak_mb"] is None else figure(found[-1]["peak_mb"])

    def errors(found: list[dict]) -> str:
        return ", ".join(f"{found[-1][part]:.0e}" for part in ("err_loss", "err_grad_w", "err_grad_y0"))

    return "\n\n".join([
        header(said),
        bars(lines, {key: found[-1] for key, found in cells.items() if "error" not in found[-1]}),
        table(cells, "Forward and backward, ms: median (least–most)", spread("fwdbwd")),
        table(cells, "Forward alone, ms", spread("fwd")),
        table(cells, "Memory that both passes take beside weights, y0 and target, MB (2²⁰)", memory),
        table(cells, "Relative errors of loss, ∂θ, ∂y0 against the f64 reference", errors),
        "\n".join(f"* {key}: {error}" for key, error in failed.items()) or "Nothing failed.",
    ]) + "\n"


def header(said: dict[str, dict]) -> str:
    """When, where and what."""
    run, ours = said.get("run", {}), said.get("environment", {})
    versions = {"candle-diffeq": ours.get("version", "?"), "candle": ours.get("candle", "?")} | said.get("peers", {})
    problems = "; **small problems, to try this out**" if run.get("small") else ""
    return (f"{run.get('date')}, commit {run.get('commit')}, {card() if run.get('device') == 'cuda' else 'no GPU'}; {processor()}; "
            + ", ".join(f"{name} {number}" for name, number in versions.items()) + f"{problems}.\n\n`{run.get('command')}`")


def card() -> str:
    """The GPU and its driver."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().replace("\n", "; ")
    except (OSError, subprocess.CalledProcessError):
        return "a GPU that nvidia-smi does not name"


def bars(lines: list[dict], good: dict[tuple, dict]) -> str:
    """What is to hold, and what was measured."""
    rows = ["| | measured | bar | |", "|---|--:|--:|---|"]
    small = any(line.get("run", {}).get("small") for line in lines)

    def bar(what: str, value: float | None, least: float | None = None, most: float | None = None) -> None:
        met = value is not None and (least is None or value >= least) and (most is None or value <= most)
        text = "not measured" if value is None else "too small to tell" if small else "met" if met else "**missed**"
        bound = f"≥ {least:g}" if least is not None else f"≤ {figure(most)}"
        rows.append(f"| {what} | {'' if value is None else figure(value)} | {bound} | {text} |")

    def ratio(above: dict | None, below: dict | None, part: str = "fwdbwd_ms") -> float | None:
        return above[part] / below[part] if above and below and above[part] and below[part] else None

    def fastest(name: str, precision: str, libraries: tuple[str, ...]) -> dict | None:
        """Of several ways of ours, or of several libraries."""
        found = [good[key] for library in libraries if (key := (name, library, precision)) in good]
        return min(found, key=lambda x: x["fwdbwd_ms"], default=None)

    low, full = fastest("G2", "bf16", OURS), fastest("G2", "f32", OURS)
    bar("G2, ours, time in f32 / bf16", ratio(full, low), least=2.5)
    bar("G2, ours, memory in bf16 / f32", ratio(low, full, "peak_mb"), most=0.6)
    for precision in PRECISIONS:
        for name, bound in RAMPDE_BARS.items():
            ours, theirs = fastest(name, precision, KEPT), fastest(name, precision, ("rampde",))
            bar(f"{name}, {precision}, time of rampde / {called(ours)}", ratio(theirs, ours), least=bound)
        for name, bound in TORCH_BARS.items():
            best, ours = fastest(name, precision, TORCH), fastest(name, precision, KEPT)
            which = called(best, "the best of torch and torchdiffeq")
            bar(f"{name}, {precision}, time of {which} / {called(ours)}", ratio(best, ours), least=bound)
            if name == "G2":
                plain = fastest(name, precision, OURS)
                bar(f"{name}, {precision}, memory of {called(plain)} / {which}", ratio(plain, best, "peak_mb"), most=1)
    rates = [line for line in lines if line.get("products") == "G2" and line["precision"] == "bf16"]
    for key, what in (("tflops", "products of G2"), ("square_tflops", "a product of 8192³")):
        ceiling = max((line[key] for line in rates), default=None)
        share = work(small) / low["fwdbwd_ms"] / 1e9 / ceiling if low and ceiling else None
        rate = f", {figure(ceiling)} TFLOP/s" if ceiling else ""
        bar(f"G2, bf16, share of the rate of {what}{rate}", share, least=0.6)
    clean = [found for key, found in good.items() if key[1].startswith("ours") and not found.get("retries")]
    for part, what in (("reads_fwd", "forward"), ("reads_bwd", "backward")):
        bar(f"host reads of a clean solve, {what}", max((x[part] for x in clean), default=None), most=1)
    trained = [line for line in lines if "training" in line]
    for line in trained:
        growth = max(line["later"][part] - line["settled"][part] for part in line["settled"]) / 2**20
        bar(f"{line['iterations']} iterations, {line['precision']}, MB more than after ten", max(growth, 0.0), most=0)
    if not trained:
        bar("1000 iterations, MB more than after ten", None, most=0)
    return "\n".join(rows)


def called(found: dict | None, otherwise: str = "ours") -> str:
    """Whose a figure is."""
    return found["library"] if found else otherwise


def work(small: bool) -> float:
    """Operations of G2 forward and backward: evaluation, evaluation again, and two products to pull back."""
    spec = workload.GPU_SPECS["G2"]
    spec = workload.small(spec) if small else spec
    evaluation = sum(2 * spec["batch"] * m * n for m, n in zip(spec["dims"], spec["dims"][1:]))
    return 4 * 4 * spec["steps"] * evaluation
