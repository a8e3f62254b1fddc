"""The machine that a run is made on, and the vector unit that every library of it is held to (Linux)."""

import os
from pathlib import Path

#: By unit: what a processor must have for it, and the variables by which each library is held to it.  XLA reads flags,
#: of which there may be others.
UNITS = {
    "avx2": ({"avx2", "fma"}, {
        "CANDLE_DIFFEQ_SIMD": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2", "XLA_FLAGS": "--xla_cpu_max_isa=AVX2"}),
    "avx512": ({"avx512f", "avx512bw", "avx512dq", "avx512vl"}, {
        "CANDLE_DIFFEQ_SIMD": "avx512", "ATEN_CPU_CAPABILITY": "avx512", "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "XLA_FLAGS": "--xla_cpu_max_isa=AVX512"}),
}


def hold_to(unit: str) -> None:
    """Holds this process and those that it starts to a unit; to be called before a library is loaded."""
    needed, variables = UNITS[unit]
    missing = needed - features()
    if missing:
        raise SystemExit(f"this processor has no {unit}: {', '.join(sorted(missing))} missing")
    for name, value in variables.items():
        if name == "XLA_FLAGS":
            others = [flag for flag in os.environ.get(name, "").split() if "xla_cpu_max_isa" not in flag]
            value = " ".join([*others, value])
        os.environ[name] = value


def described(unit: str | None) -> str:
    """Processor, caches and unit in a line."""
    held = f"every library held to {unit}" if unit else "the best unit that each library finds"
    return ", ".join([processor(), *caches(), held])


def processor() -> str:
    """Its name and model, which a hypervisor may shorten."""
    info = first_processor()
    numbers = [f"{short} {info[long]}" for short, long in (("family", "cpu family"), ("model", "model")) if long in info]
    return f"{info.get('model name', 'unknown CPU')} ({', '.join(numbers)})" if numbers else info.get("model name", "unknown CPU")


def features() -> set[str]:
    """What the processor can do, in the kernel's words."""
    return set(first_processor().get("flags", "").split())


def caches() -> list[str]:
    """Data caches of the first core with their sizes, and how many cores share them."""
    found = []
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        read = lambda name: (cache / name).read_text().strip()
        if read("type") == "Instruction":
            continue
        sharing = len(cores(read("shared_cpu_list")))
        kilobytes = int(read("size").rstrip("K"))
        size = f"{kilobytes} KiB" if kilobytes % 1024 else f"{kilobytes // 1024} MiB"
        found.append(f"L{read('level')} {size}" + (f" for {sharing} cores" if sharing > 1 else ""))
    return found


def cores(text: str) -> list[int]:
    """The numbers in a list such as 0-3,8."""
    ends = [part.split("-") for part in text.split(",") if part]
    return [core for part in ends for core in range(int(part[0]), int(part[-1]) + 1)]


def first_processor() -> dict[str, str]:
    """What the kernel says about the first one."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    pairs = (line.partition(":")[::2] for line in lines)
    return {key.strip(): value.strip() for key, value in pairs}
