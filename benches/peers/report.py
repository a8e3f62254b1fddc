"""The Markdown report of a run."""

from pathlib import Path
from statistics import median
from typing import Callable

import numpy as np

#: Ours over the best peer in f32, forward and backward.
TIME_BARS = {"W0": 0.5, "W1": 0.25, "W2": 0.92, "W3": 0.8, "W4": 0.35, "W5": 0.15, "S1": 0.3, "S2": 0.3, "C1": 0.3,
             "H1": 0.35, "H2": 0.35, "H3": 0.35, "F1": 0.35, "F2": 0.35, "F3": 0.35, "F4": 0.35}
MEMORY_BARS = ["W1", "W2", "W3", "W5"]
#: Multiply-adds of four passes of products over time, of what the machine does at most: --variant "share=--share".
SHARE_BARS = {"W1": 0.65, "W2": 0.85}
LOW_BARS = [("W1", "bf16"), ("W1", "f16"), ("W2", "bf16"), ("W2", "f16")]
ERROR_BARS = {"err_loss": ("loss", 1e-6), "err_grad_w": ("∂θ", 1e-6), "err_grad_y0": ("∂y0", 1e-5)}


def render(results: dict[tuple, list[dict]], versions: dict[str, str], machine: str) -> str:
    """All tables; keys are (workload, library, precision), values the lines of its rounds; `machine` says where."""
    failed = {key: lines[-1]["error"] for key, lines in results.items() if "error" in lines[-1]}
    good = {key: lines for key, lines in results.items() if key not in failed}

    def spread(part: str) -> Callable[[list[dict]], str]:
        def cell(lines: list[dict]) -> str:
            times = [line[part] for line in lines]
            return "{} ({}–{})".format(*map(figure, (median(times), min(times), max(times))))
        return cell

    def processor_time(lines: list[dict]) -> str:
        times = [time for line in lines if (time := line["fwdbwd_cpu_ms"]) is not None]
        return figure(min(times)) if times else "–"  # ours reads it where solves take longer than that

    def memory(lines: list[dict]) -> str:
        buffers = lines[-1].get("buffers_mb")
        return f"{lines[-1]['rss_mb']:.0f}" + (f" ({figure(buffers)})" if buffers is not None else "")

    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    rounds = max(map(len, results.values()))
    measured = [line for lines in good.values() for line in lines]
    quiet = sum(line.get("quiet", False) for line in measured) / max(len(measured), 1)
    undisturbed = f"; undisturbed by other jobs: {quiet:.0%} of the cells" if quiet else ""
    def steps(lines: list[dict]) -> str:
        line = lines[-1]
        if "accepted" not in line:  # torchdyn does not say
            return f"{line['nfe_fwd']:.0f}"
        parts = [f"{line['accepted']:.0f} + {line['rejected']:.0f}, {line['nfe_fwd']:.0f}"]
        if "accepted_most" in line:
            parts.append(f"at most {line['accepted_most']:.0f}")
        if line.get("limited"):
            parts.append(f"limited {line['limited']}")
        if line.get("stand_in"):
            parts.append(line["stand_in"])
        return "; ".join(parts)

    tables = []
    if any(is_adaptive(lines) for lines in good.values()):
        adaptive = {key: lines for key, lines in results.items() if "error" in lines[-1] or is_adaptive(lines)}
        tables.append(table(adaptive, "Steps: accepted + rejected, evaluations forward (of rows the means, and the most "
                            "that one accepted; a method that stands in)", steps))
        tables.append(table(adaptive, "Relative error of the states against the f64 reference",
                            lambda lines: f"{lines[-1]['err_y']:.1e}"))
    return "\n\n".join([
        f"{machine}; {packages}; rounds in turn: {rounds}{undisturbed}.",
        bars(good),
        table(results, "Forward and backward, ms: median of rounds (least–most)", spread("fwdbwd_ms")),
        table(results, "Forward alone, ms", spread("fwd_ms")),
        table(results, "Processor time of all threads, forward and backward, ms: the least",
              processor_time),
        table(results, "Peak RSS less RSS before the first call, MB (buffers of XLA); W0 is the fixed part", memory),
        table(results, "Relative errors of loss, ∂θ, ∂y0 against the f64 reference",
              lambda lines: ", ".join("–" if (x := lines[-1][part]) is None else f"{x:.0e}" for part in ERROR_BARS)),
        *tables,
        *(f"{' '.join(key)} failed: {error}" for key, error in failed.items()),
    ])


def is_adaptive(lines: list[dict]) -> bool:
    """Whether a cell is of a workload with tolerances."""
    return lines[-1].get("err_y") is not None


def table(results: dict[tuple, list[dict]], title: str, cell: Callable[[list[dict]], str]) -> str:
    """A row for each (library, precision) and a column for each workload, `cell` of the lines of a key."""
    names, rows = (list(dict.fromkeys(map(part, results))) for part in (lambda k: k[0], lambda k: k[1:]))
    lines = [f"**{title}**\n", f"| | | {' | '.join(names)} |", "|---|---|" + "--:|" * len(names)]
    for row in rows:
        found = [results.get((name, *row)) for name in names]
        cells = ["" if not lines else "failed" if "error" in lines[-1] else cell(lines) for lines in found]
        lines.append(f"| {' | '.join([*row, *cells])} |")
    return "\n".join(lines)


def bars(good: dict[tuple, list[dict]]) -> str:
    """What is held against what, where both were measured."""
    lines = ["| | measured | bar | |", "|---|--:|--:|---|"]

    def bar(what: str, value: float, bound: float, least: bool = False) -> None:
        holds = value >= bound if least else value <= bound
        sign = "≥" if least else "≤"
        lines.append(f"| {what} | {value:.2g} | {sign} {bound:.3g} | {'holds' if holds else '**missed**'} |")

    both = {key: median(line["fwdbwd_ms"] for line in found) for key, found in good.items()}
    # Errors of adaptive steps are those of the tolerance.
    ours = [key for key in good if key[1].startswith("ours") and key[2] == "f32" and not is_adaptive(good[key])]
    for key in ours:
        rivals = [k for k in good if k[0] == key[0] and k[2] == "f32" and not k[1].startswith("ours")]
        kept = key[:2] == ("W2", "ours cached")
        if rivals and key[0] in TIME_BARS and (key[1] == "ours" or kept):
            best = min(rivals, key=both.get)
            bar(f"{key[0]}, {key[1]} / {best[1]}", both[key] / both[best],
                0.75 if kept else TIME_BARS[key[0]])
    for name in MEMORY_BARS:
        cells = [(w, library, "f32") for library in ("ours", "rampde") for w in (name, "W0")]
        if all(key in good for key in cells):
            mine, fixed, theirs, their_fixed = (good[key][-1]["rss_mb"] for key in cells)
            bar(f"{name}, RSS less that of W0, MB, ours / rampde", mine - fixed, theirs - their_fixed)
    for name, precision in LOW_BARS:
        low, full = both.get((name, "ours", precision)), both.get((name, "ours", "f32"))
        if low and full:
            bar(f"{name}, ours {precision} / f32", low / full, 1.15)
    for name, bound in SHARE_BARS.items():
        found = [line for line in good.get((name, "ours share", "f32"), []) if "share" in line]
        if found:
            peak = figure(median(line["peak_gflops"] for line in found))
            bar(f"{name}, share of {peak} GFLOP/s", median(line["share"] for line in found), bound, least=True)
    for part, (what, bound) in ERROR_BARS.items():
        if ours:
            bar(f"largest error of {what}, ours f32", max(good[key][-1][part] for key in ours), bound)
    return "\n".join(lines) if len(lines) > 2 else "No bar was measured."


def insert(file: Path, text: str) -> None:
    """Puts the report between the markers of a file."""
    before, start, rest = file.read_text().partition("<!-- peers -->")
    _, end, after = rest.partition("<!-- /peers -->")
    if not (start and end):
        raise SystemExit(f"{file}: no <!-- peers --> … <!-- /peers -->")
    file.write_text(f"{before}{start}\n{text}\n{end}{after}")


def figure(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

