"""What one shard holds: one pass over all its bytes, which gives the place and the checksum of every member needed.

Grouping is webdataset's own (the key is the path up to the first dot of the base name, the rest is the extension,
members of a sample are neighbours), but what webdataset leaves to chance is checked: every sample has one image and
one target, the targets of a shard are of one kind, a key comes back nowhere, the archive is whole. Members are taken by
a list of extensions. All others (pickles, for example) are neither read nor fatal; which there were is recorded.

Whatever is wrong is an error that names the shard and the key. With `on_bad="quarantine"` the samples that are sound
are kept and the others reported: a sample is kept only if all its members were read before any damage.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from skd_dist.data.bad_samples import BadSample, OnBad
from skd_dist.data.checksum import checksum
from skd_dist.data.pack_file import count_packed
from skd_dist.data.shard_file import open_shard, reading
from skd_dist.data.shard_samples import SAMPLE_ARRAYS, Kind, ShardSamples
from skd_dist.data.shards import Location
from skd_dist.data.tar_stream import Member, TarDamageError, TarStream
from skd_dist.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Image formats that are decoded."""
LABEL_EXTENSION = "cls"
TARGET_EXTENSIONS: dict[str, Kind] = {LABEL_EXTENSION: "class", "mask.png": "mask", "boxes.json": "boxes"}

_UNREAD_EXTENSIONS = {"json", "txt", "npy"}
_NEEDED_EXTENSIONS = {*IMAGE_EXTENSIONS, *TARGET_EXTENSIONS}
_PAYLOAD_BYTES_MAX = 1 << 28
"""Of a member that is read: bounds the memory of one sample. 256 MiB is beyond any image that may be decoded."""
_LABEL_BYTES_MAX = 32
_LABEL = re.compile(rb"\s*[0-9]{1,7}\s*")
# webdataset.tariterators.base_plus_ext; webdataset itself would bring torch into every process that scans.
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")

_Row = tuple[bytes, int, int, int, int, int, int, int]


@dataclass(slots=True)
class _Draft:
    key: str
    label: int = 0
    image: tuple[int, int, int] | None = None
    target: tuple[int, int, int] | None = None
    is_bad: bool = False


def scan_shard(shard: Location) -> ShardSamples:
    """Read one shard through, and find its samples.

    Raises:
        UserError: the shard cannot be read, or is not a sound, uncompressed tar file; it holds links or names that lead
            elsewhere; a sample lacks its image or its target, or has two; a key is met again; there is no sample at
            all. Names the shard and the key.
    """
    return survey_shard(shard, on_bad="error")[0]


def survey_shard(shard: Location, *, on_bad: OnBad) -> tuple[ShardSamples, tuple[BadSample, ...]]:
    """Read one shard through; `on_bad` says what becomes of samples that are not sound.

    Returns:
        The sound samples (with "quarantine" there may be none), and what was left out.

    Raises:
        UserError: as `scan_shard`; with "quarantine" only where the shard cannot be read or holds targets of two kinds.
    """
    scan = _Scan(shard, on_bad)
    with reading(shard), open_shard(shard) as file:
        scan.read(file)
    if not scan.rows and not scan.bad:
        scan.lose_rest("has no samples", got=None, expected="images with targets, as tools/make_shards.py packs")
    return _as_arrays(scan.rows, scan.kind or "class", sorted(scan.ignored)), tuple(scan.bad)


class _Scan:
    """One pass over one shard."""

    def __init__(self, shard: Location, on_bad: OnBad) -> None:
        self._shard = shard
        self._on_bad = on_bad
        self._seen: set[str] = set()
        self._sample: _Draft | None = None
        self.kind: Kind | None = None
        self.rows: list[_Row] = []
        self.bad: list[BadSample] = []
        self.ignored: set[str] = set()

    def read(self, file: BinaryIO) -> None:
        stream = TarStream(file)
        try:
            for member in stream:
                if member.refusal is not None:
                    self._refuse(member)
                elif member.is_file:
                    self._add(member, stream)
            self._complete()
        except TarDamageError as damage:
            self._end_in_damage(str(damage))

    def lose_rest(self, what: str, *, got: object, expected: str | None = None, do: str | None = None) -> None:
        """Report that nothing more is known of this shard."""
        if self._on_bad == "error":
            raise UserError(f"shard {self._shard} {what}", got=got, expected=expected, do=do)
        line = UserError(f"the rest of the shard is lost: it {what}", got=got, expected=expected).line
        self.bad.append(BadSample(str(self._shard), "", line, count=self._num_lost()))

    def _num_lost(self) -> int | None:
        """Samples nobody has seen; None: the packer has left no word of how many there were, or of other ones."""
        num_packed = count_packed(self._shard)
        return None if num_packed is None or num_packed < len(self._seen) else num_packed - len(self._seen)

    def _end_in_damage(self, damage: str) -> None:
        sample, self._sample = self._sample, None
        whole = sample is not None and sample.image is not None and sample.target is not None
        if sample is None:
            place = " before its first sample"
        else:
            place = f" {'after' if whole or sample.is_bad else 'inside'} sample {sample.key}"
        if self._on_bad == "quarantine" and sample is not None and not sample.is_bad:
            if whole:
                self._keep(sample)
            else:
                self.bad.append(
                    BadSample(
                        str(self._shard), sample.key, f"the shard is cut short or damaged inside it; got {damage}"
                    )
                )
        self.lose_rest(f"is cut short or damaged{place}", got=damage, do="copy or pack it again")

    def _refuse(self, member: Member) -> None:
        match = _NAME.match(member.name)
        if self._on_bad == "error":
            raise UserError(
                f"shard {self._shard}: member {member.name} {member.refusal}", expected="files with plain names only"
            )
        if match is None:
            self.bad.append(BadSample(str(self._shard), member.name, f"member {member.name} {member.refusal}"))
            return
        self._enter(match[1])
        self._problem(f"has a member {member.name} that {member.refusal}")

    def _add(self, member: Member, stream: TarStream) -> None:
        match = _NAME.match(member.name)
        key, extension = (match[1], match[2].lower()) if match else ("", "no extension")
        if extension not in _NEEDED_EXTENSIONS and extension not in _UNREAD_EXTENSIONS:
            self.ignored.add(extension)
            # `1.5m.jpg` is sample `1` without an image, no stranger: it must not be lost in silence.
            if extension.rpartition(".")[2] not in _NEEDED_EXTENSIONS:
                return
        sample = self._enter(key)
        if extension not in _NEEDED_EXTENSIONS:
            return
        if member.size > _PAYLOAD_BYTES_MAX:
            self._problem("is too large", got=f"{member.size} bytes", expected=f"at most {_PAYLOAD_BYTES_MAX}")
            return
        data = stream.payload()
        place = (member.offset, member.size, checksum(data))
        if extension in IMAGE_EXTENSIONS:
            if sample.image is not None:
                self._problem("has two images", expected="one image member")
            sample.image = place
        else:
            self._add_target(sample, extension, place, data)

    def _add_target(self, sample: _Draft, extension: str, place: tuple[int, int, int], data: bytes) -> None:
        kind = TARGET_EXTENSIONS[extension]
        if self.kind not in (None, kind):
            raise UserError(
                f"shard {self._shard}: sample {sample.key} has a .{extension} member among samples of kind {self.kind}",
                expected="one kind of target for a whole set: " + ", ".join(f".{name}" for name in TARGET_EXTENSIONS),
            )
        self.kind = kind
        if sample.target is not None:
            self._problem("has two targets", expected=f"one .{extension} member")
        if kind == "class":
            if len(data) > _LABEL_BYTES_MAX or not _LABEL.fullmatch(data):
                self._problem(
                    "has an unreadable label", got=data[:_LABEL_BYTES_MAX], expected="a class number, 0 to 9999999"
                )
            else:
                sample.label = int(data)
        sample.target = place

    def _enter(self, key: str) -> _Draft:
        if self._sample is not None and self._sample.key == key:
            return self._sample
        self._complete()
        self._sample = _Draft(key)
        if key in self._seen:
            self._problem(
                "comes back after other samples", expected="unique keys, and the members of a sample together"
            )
        self._seen.add(key)
        return self._sample

    def _complete(self) -> None:
        sample = self._sample
        if sample is None:
            return
        if sample.image is None:
            self._problem("has no image", expected=f"a member .{', .'.join(IMAGE_EXTENSIONS)}")
        if sample.target is None:
            self._problem("has no target", expected=f"a member .{', .'.join(TARGET_EXTENSIONS)}")
        if not sample.is_bad:
            self._keep(sample)

    def _keep(self, sample: _Draft) -> None:
        assert sample.image is not None and sample.target is not None, "a whole sample"
        key = sample.key.encode("utf-8", "surrogateescape")
        self.rows.append((key, sample.label, *sample.image, *sample.target))

    def _problem(self, what: str, *, got: object = None, expected: str | None = None) -> None:
        """Report the sample at hand; the first thing that is wrong with it counts."""
        sample = self._sample
        assert sample is not None, "a sample at hand"
        if self._on_bad == "error":
            raise UserError(f"shard {self._shard}: sample {sample.key} {what}", got=got, expected=expected)
        if not sample.is_bad:
            line = UserError(f"it {what}", got=got, expected=expected).line
            self.bad.append(BadSample(str(self._shard), sample.key, line))
        sample.is_bad = True


def _as_arrays(rows: Sequence[_Row], kind: Kind, ignored: Sequence[str]) -> ShardSamples:
    columns = zip(*rows, strict=True) if rows else ((),) * len(SAMPLE_ARRAYS)
    arrays = {
        name: np.array(column, dtype=dtype)
        for (name, dtype), column in zip(SAMPLE_ARRAYS.items(), columns, strict=True)
    }
    return ShardSamples(kind=kind, ignored=tuple(ignored), **arrays)
