"""Options that several commands share, and what they are made into."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hw_profiles import RUNTIMES, Store, Workload, detect
from hw_profiles.devices import pin
from hw_profiles.shapes import PRECISIONS, Precision

#: Above any limit, and any count, that a device has today.
_LARGEST = 1e9
_LARGEST_COUNT = 2**24


def _pin(cpus: str | None) -> None:
    if cpus is not None:
        pin(cpus)


def _check_positive(value: float | None) -> float | None:
    """What is infinite, or no number at all, would let everything pass, or nothing."""
    if value is not None and not 0 < value <= _LARGEST:
        raise typer.BadParameter(f"wanted a number above 0, and at most {_LARGEST:g}, got {value:g}.")
    return value


def positive(help_: str) -> Any:
    """An option for a finite number above 0: a limit, a rate, a scale."""
    return typer.Option(callback=_check_positive, help=help_)


def count(help_: str, least: int = 1, most: int = _LARGEST_COUNT) -> Any:
    """An option for how many of something, or several such."""
    return typer.Option(min=least, max=most, help=help_)


Database = Annotated[str, typer.Option(envvar="NAS_DATABASE", help="SQLite file or SQLAlchemy URL.")]
Cache = Annotated[Path, typer.Option(envvar="NAS_CACHE", help="Folder for calibration statistics and weights.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
StudyName = Annotated[str, typer.Option("--study", help="Name of the study in the database.")]
RUNTIME_NAMES = f"{', '.join(RUNTIMES)}, which may carry a device that nas devices lists, as in openvino:GPU."
RuntimeName = Annotated[str, typer.Option("--runtime", help=f"One of {RUNTIME_NAMES}")]

#: Takes effect when it is parsed: before any engine starts its threads, and before anything asks which device this is.
Cpus = Annotated[
    str | None, typer.Option("--cpus", callback=_pin, help="Keep to these, such as 0-3,8: a device of its own.")
]
Threads = Annotated[int | None, count("Threads; all cores of the device by default.", most=1024)]
QueryHeads = Annotated[
    bool, typer.Option("--query-heads", help="Query heads of KV groups are a choice, too: profile and search with it.")
]
DeviceId = Annotated[str | None, typer.Option("--device", help="Id of a profiled device; this one by default.")]
Seed = Annotated[int, count("Of all that is drawn.", least=0, most=2**32 - 1)]
PromptTokens = Annotated[int, count("Prompt length that TTFT is for.")]
ContextTokens = Annotated[int, count("Context length that TPOT is for.", least=0)]
BatchSize = Annotated[int, count("Sequences run at once; a token of each is one TPOT.")]
TpotLimit = Annotated[float | None, positive("Limit of the time per output token.")]
ModelMoved = Annotated[
    str | None, typer.Option("--model", help="Where the study's model is, if it moved since the search.")
]
AllowStale = Annotated[
    bool, typer.Option("--allow-stale", help="Use a profile of another version of the runtime all the same.")
]
TtftLimit = Annotated[float | None, positive("Limit of the time to the first token.")]
MemoryLimit = Annotated[
    float | None, positive("Limit of the peak memory of a process that runs the prompt and the context, in 10^6 bytes.")
]

#: Of the two options above by default.
DATABASE = "llm-nas.db"
CACHE = Path(".llm-nas-cache")

SubnetName = Annotated[str, typer.Option("--subnet", help="Id of a trial, or `full`.")]
PrecisionName = Annotated[
    str | None, typer.Option("--precision", help=f"One of {', '.join(PRECISIONS)}; the subnet's own by default.")
]
TunedFolder = Annotated[
    Path | None, typer.Option("--tuned", help="Folder of nas tune: the weights that it gave the subnet.")
]
SupernetFolder = Annotated[
    Path | None, typer.Option("--supernet", help="Folder of nas tune --subnet all: the study's supernet is tuned.")
]
Fit = Annotated[
    bool, typer.Option(help="Fit the subnet's weights in sequence, so that layers make up for those before them.")
]


def one_of_precisions(value: str) -> Precision:
    for precision in PRECISIONS:
        if value == precision:
            return precision
    raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {value!r}")


def objectives(prompt_tokens: int, context_tokens: int, batch_size: int) -> dict[str, Workload]:
    """What a search or an exchange may be for, by the names that --objective takes."""
    return {
        "tpot_ms": Workload("decode", context_tokens, batch_size),
        "ttft_ms": Workload("prefill", prompt_tokens, batch_size),
    }


def device_and_threads(store: Store, device_id: str | None, threads: int | None) -> tuple[str, int]:
    """This device and all cores of the device by default; ValueError for one that the store does not know."""
    here = detect()
    known = {device.id: device for device in [*store.devices(), here]}
    device = known.get(device_id or here.id)
    if device is None:
        raise ValueError(f"no device {device_id!r} in {store.where} (there: {', '.join(known)}); see nas devices")
    return device.id, threads or device.cores
