"""How fast images come, and what is read for them: the measurements behind `tools/bench.py data`.

Real JPEGs, packed into a working folder from zips in --data. Ways of loading take turns within a round, so a drift of
the machine's speed falls on all; all have the same cores and as many processes as cores. See bench_data_ways.py for the
ways, bench_data_sets.py for the images, bench_data_costs.py and bench_data_decoders.py for what else is measured.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

sys.path.insert(0, str(Path(__file__).parent))  # as a script it is there already, imported it is not

from bench_data_costs import bytes_read, first_batch_s, index_memory, index_rate, on_cores
from bench_data_decoders import decode_rates, pixels_equal
from bench_data_sets import SOURCES, ImageSet, images_of, make_set
from bench_data_ways import BareLoop, Way, choose, image_folder, ours, read_payloads, webdataset_pipeline

WAYS = ("bare", "ours", "webdataset", "imagefolder")
FRACTIONS = (1.0, 0.1)
AIMS = {("ours/bare", 1.0): 0.9, ("ours/bare", 0.1): 0.9, ("ours/webdataset", 1.0): 1.2, ("ours/webdataset", 0.1): 3.0}
BYTES_AIM, INDEX_AIM, MEMORY_AIM_MIB = 1.02, 20_000, 200e6 / 2**20

Part = Literal["ways", "bytes", "index", "start", "memory", "decoders"]
PARTS: tuple[Part, ...] = ("ways", "bytes", "index", "start", "memory", "decoders")


@dataclass(frozen=True, kw_only=True)
class DataBench:
    """Images/s of four ways of loading, bytes read, index, time to the first batch, decoders."""

    data: Path
    """Folder of cifar10.zip, imagenette.zip and camvid.zip."""
    sets: tuple[str, ...] = tuple(SOURCES)
    """Which images."""
    parts: tuple[Part, ...] = PARTS
    """What to measure."""
    samples: int = 4000
    """Images of a set, at most."""
    rounds: int = 5
    """Counted rounds; one more comes first and is not counted."""
    seconds: float = 10.0
    """Of each way in a round; half of it more comes before and is not counted."""
    batch_size: int = 256
    workers: int = 0
    """Cores, and loader processes of each way; 0: all cores there are."""
    index_samples: int = 1_281_167
    """Of the synthetic set whose joined index is weighed, rounded up to thousands; default: ImageNet's."""
    folder: Path | None = None
    """Where shards and files are written, and removed at the end; default the temporary folder."""
    out: Path | None = None
    """Where to write the figures as JSON."""


def measure(bench: DataBench) -> dict[str, Any]:
    """All of it; prints as it goes."""
    available = sorted(os.sched_getaffinity(0))
    cores = available[: bench.workers or len(available)]
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"machine": _machine(cores), "sets": {}}
    with tempfile.TemporaryDirectory(dir=bench.folder) as name, on_cores(cores):
        for one in bench.sets:
            images = make_set(one, data=bench.data, folder=Path(name), num_samples=bench.samples)
            print(f"{one}: {images.num_samples} images of {images.mean_bytes / 1e3:.1f} kB, to {images.image_size} px")
            figures["sets"][one] = _measure_set(bench, images, cores)
        if "memory" in bench.parts:
            figures["memory"] = index_memory(Path(name) / "synthetic", num_samples=bench.index_samples)
            print(_memory_line(figures["memory"]), flush=True)
    if bench.out is not None:
        bench.out.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def _measure_set(bench: DataBench, images: ImageSet, cores: Sequence[int]) -> dict[str, Any]:
    found: dict[str, Any] = {"samples": images.num_samples, "mean_bytes": images.mean_bytes}
    if "index" in bench.parts:
        found["index_per_s"] = {
            len(some): index_rate(images, cores=some, rounds=bench.rounds) for some in (cores[:1], cores)
        }
        for count, rate in found["index_per_s"].items():
            print(f"  index on {count} cores: {rate:,.0f} samples/s (aim {INDEX_AIM:,})", flush=True)
    if "ways" in bench.parts:
        found["ways"] = compare_ways(bench, images, cores)
    if "bytes" in bench.parts:
        found["bytes_read/used"] = bytes_read(images, batch_size=bench.batch_size)
        cells = [f"{fraction:.0%} {ratio:.4f}" for fraction, ratio in found["bytes_read/used"].items()]
        print(f"  bytes read / used: {', '.join(cells)} (aim {BYTES_AIM})", flush=True)
    if "start" in bench.parts:
        found["first_batch_s"] = first_batch_s(
            images, batch_size=bench.batch_size, num_workers=len(cores), rounds=bench.rounds
        )
        cells = [f"{name} {seconds:.3f}" for name, seconds in found["first_batch_s"].items()]
        print(f"  seconds to the first batch: {', '.join(cells)}", flush=True)
    if "decoders" in bench.parts:
        found["decoders_per_s"] = _compare_decoders(bench, images, cores)
    return found


def compare_ways(bench: DataBench, images: ImageSet, cores: Sequence[int]) -> list[dict[str, float]]:
    """One row for each fraction; every way of every fraction has its turn in each round."""
    with ExitStack() as stack:
        ways: dict[tuple[float, str], Way] = {}
        for fraction in FRACTIONS:
            for name, way in _open_ways(bench, images, fraction, cores).items():
                ways[fraction, name] = way
                stack.callback(way.close)
        rates: dict[tuple[float, str], list[float]] = {key: [] for key in ways}
        for number in range(bench.rounds + 1):
            for key, way in ways.items():
                rate = way.measure(warmup_s=bench.seconds / 2, seconds=bench.seconds)
                if number:
                    rates[key].append(rate)
    rows = [_row(fraction, {name: rates[fraction, name] for name in WAYS}) for fraction in FRACTIONS]
    for row in rows:
        print(_line(row), flush=True)
    return rows


def _open_ways(bench: DataBench, images: ImageSet, fraction: float, cores: Sequence[int]) -> dict[str, Way]:
    chosen = choose(images, fraction)
    size, workers = bench.batch_size, len(cores)
    return {
        "bare": BareLoop(chosen, read_payloads(chosen), cores=cores),
        "ours": ours(chosen, batch_size=size, num_workers=workers),
        "webdataset": webdataset_pipeline(chosen, batch_size=size, num_workers=workers),
        "imagefolder": image_folder(chosen, batch_size=size, num_workers=workers),
    }


def _row(fraction: float, rates: Mapping[str, Sequence[float]]) -> dict[str, float]:
    row = {"fraction": fraction, **{f"{way}_images_per_s": statistics.median(rates[way]) for way in WAYS}}
    for other in ("bare", "webdataset", "imagefolder"):
        # Paired within a round.
        row[f"ours/{other}"] = statistics.median(a / b for a, b in zip(rates["ours"], rates[other], strict=True))
    return row


def _line(row: Mapping[str, float]) -> str:
    cells = [f"  {row['fraction']:>4.0%}"] + [f"{way} {row[f'{way}_images_per_s']:8.1f}" for way in WAYS]
    for name in ("ours/bare", "ours/webdataset", "ours/imagefolder"):
        aim = AIMS.get((name, row["fraction"]))
        cells.append(f"{name} {row[name]:.2f}" + (f" (aim {aim})" if aim else ""))
    return "  ".join(cells)


def _compare_decoders(bench: DataBench, images: ImageSet, cores: Sequence[int]) -> dict[str, float]:
    payloads = list(images_of(images))
    with on_cores(cores[:1]):
        rates = decode_rates(payloads, size=images.image_size, rounds=bench.rounds, seconds=bench.seconds / 5)
    cells = [f"{name} {rate:.0f}" for name, rate in rates.items()]
    print(f"  decoded images/s on one core: {', '.join(cells)}; equal pixels: {pixels_equal(payloads[0])}", flush=True)
    return rates


def _memory_line(found: Mapping[str, float]) -> str:
    return (
        f"index of {found['samples']:,} samples: arrays of {found['arrays_mib']:.0f} MiB, "
        f"{found['kept_mib']:.0f} MiB resident, at its peak {found['peak_mib']:.0f} MiB (aim {MEMORY_AIM_MIB:.0f}), "
        f"read in {found['load_s']:.1f} s"
    )


def _machine(cores: Sequence[int]) -> dict[str, object]:
    return {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__, "cores": len(cores)}
