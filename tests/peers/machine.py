"""The machine that peers are measured on: its processor, what every side of a comparison is held to, and whether it was quiet.

A table of a machine that did something else meanwhile says nothing, so bench_train.py and bench_generate.py print none then.
"""

import os
import sys

# Most that the register loop, which touches no memory, may differ between rounds of a measurement.
DISTURBED = 0.15
# What holds each side to instructions: Homeroom, torch, oneDNN and MKL. llama.cpp is held to what it was built for.
HELD = {
    "avx2": {
        "HOMEROOM_CPU": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
PROBE = "register_loop_gflops"


def add_options(parser) -> None:
    parser.add_argument("--isa", choices=HELD, help="hold every side to older instructions")


def hold(isa: str | None) -> None:
    """Before torch is imported, in this process and in those that it starts."""
    os.environ.update(HELD.get(isa, {}))


def processor() -> tuple[str, str]:
    """Its name, with the family where a virtual machine hides which of its vendor's it is, and its flags."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        pairs = dict(line.split(":", 1) for line in file if ":" in line)
    found = {key.strip(): value.strip() for key, value in pairs.items()}
    family, model = (found.get(key, "?") for key in ("cpu family", "model"))
    return f"{found.get('model name', '?')} (family {family}, model {model})", found.get("flags", "")


def heading(threads: int, rounds: int, isa: str | None) -> str:
    held = f", all held to {isa}" if isa else ""
    return f"{processor()[0]}, {os.cpu_count()} cores, {threads} threads{held}; medians of {rounds} rounds"


def foreign(system: str, isa: str | None) -> str | None:
    """What is wrong with llama.cpp's build, by what it says of itself; None: nothing."""
    has = "AVX512" in system
    if isa == "avx2" and has:
        return "llama.cpp is built for AVX-512: for --isa avx2 it is to be built with GGML_NATIVE=OFF, GGML_AVX512=OFF, GGML_AVX2=ON"
    if isa is None and "avx512f" in processor()[1] and not has:
        return f"llama.cpp is not built for this processor, which has AVX-512: {system.strip()}"
    return None


def disturbed(runs: list[dict]) -> str | None:
    """Whether the probe of these runs, of one instruction each, differs by more than is allowed; in words, or None."""
    probes = [run[PROBE] for run in runs if run.get(PROBE)]
    if not probes or max(probes) <= (1 + DISTURBED) * min(probes):
        return None
    return f"the register loop made {min(probes):.0f} to {max(probes):.0f} GFLOP/s"


def refuse(reasons: list[str]) -> None:
    """Ends without a table, if there is a reason to."""
    if reasons:
        for reason in reasons:
            print("DISTURBED", reason)
        print(f"no table: the machine was not quiet (probes may differ by {100 * DISTURBED:.0f} %); try again")
        sys.exit(2)
