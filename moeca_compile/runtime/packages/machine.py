"""What native code is compiled for: the version of torch, the architecture, the processor's instructions. No torch."""

from __future__ import annotations

import platform
import re
from pathlib import Path

from moeca_compile.errors import BundleError
from moeca_compile.runtime.packages.manifest import MachineSpec

# names that Linux gives to instructions a compiler may use; its other flags are about caches, timers and security
_INSTRUCTIONS = re.compile(
    r"(avx|amx|sse|ssse|fma|f16c|bmi|abm|lzcnt|popcnt|movbe|adx|aes|vaes|pclmul|vpclmul|gfni|sha_|xop|tbm)\w*|"
    r"(asimd|fp$|fphp|sve|sme|bf16|i8mm|atomics|crc32|fcma|jscvt|dcpop)\w*"
)


def this_machine(torch_version: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> MachineSpec:
    """This machine.

    Args:
        torch_version: `torch.__version__`.
        cpuinfo: where Linux describes the processors; on other systems there is no such file.
    """
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    entries = {}
    for line in reversed(text.splitlines()):  # the first processor's last
        name, _, value = line.partition(":")
        entries[name.strip()] = value.strip()
    flags = entries.get("flags", entries.get("Features", "")).split()
    features = sorted({flag for flag in flags if _INSTRUCTIONS.fullmatch(flag)})
    return MachineSpec(str(torch_version), platform.machine(), entries.get("model name", ""), tuple(features))


def refuse_other_machine(made_for: MachineSpec, here: MachineSpec) -> None:
    """Refuse native code that was compiled for something else.

    Raises:
        BundleError: another version of torch, another architecture, or instructions that this processor lacks.
    """
    if made_for.torch != here.torch:
        raise BundleError(
            f"the package was compiled with torch {made_for.torch}, and this is torch {here.torch}: save it again with "
            "this torch, or install that one"
        )
    if made_for.machine != here.machine:
        raise BundleError(
            f"the package was compiled for {made_for.machine}, and this machine is {here.machine}: save it again on a "
            "machine like this one"
        )
    missing = sorted(set(made_for.features) - set(here.features))
    if missing:
        raise BundleError(
            f"the package was compiled for {made_for.processor or made_for.machine}, and this machine's "
            f"{here.processor or here.machine} lacks {', '.join(missing)}: save it again on a machine like this one"
        )
