"""pack.json: what a packed set is, beside its shards, and the mark of a set that is not whole yet.

    pack.partial.json    packing is under way, or was ended; these shards are not the set
    pack.json            the set is whole: task, kind, classes, tiers with their shards and counts, seeds, source

Both hold one JSON object; the partial one has more, to tell whether a second start packs the same.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from skd_dist.data.atomic import atomic_file
from skd_dist.data.location import Location, ShardUrl, file_name, is_url
from skd_dist.data.remote import list_directory
from skd_dist.data.shard_file import open_shard, sibling_url
from skd_dist.data.shards import without_file_scheme
from skd_dist.errors import UserError

PACK_FILE = "pack.json"
PARTIAL_FILE = "pack.partial.json"
PACK_FORMAT = 1


def check_set(spec: str, shards: Sequence[Location], *, flag: str) -> None:
    """Refuse a set that is not all there, by what its packer wrote beside its shards.

    Of remote sets only directories are looked at: stores that answer slowly would be asked once for every shard else.

    Args:
        spec: what the user wrote.
        shards: what `list_shards` found for it.
        flag: the option that gave `spec`.

    Raises:
        UserError: as `check_complete`.
    """
    place = without_file_scheme(spec, flag=flag)
    if is_url(place) and place.endswith("/"):
        check_complete(ShardUrl(place), whole=True)
    for folder in sorted({shard.parent for shard in shards if isinstance(shard, Path)}):
        check_complete(folder, whole=folder == Path(place))


def check_complete(directory: Location, *, whole: bool = False) -> None:
    """Refuse shards of a set that is still being packed.

    Args:
        directory: where shards lie, a URL with `/` at its end; one that no packer of ours wrote passes.
        whole: every shard that pack.json lists must be there: for a directory that is meant as a whole set.

    Raises:
        UserError: packing has not ended there, or a shard is gone.
    """
    has = _finder(directory)
    if has(PARTIAL_FILE):
        raise UserError(
            f"the shards in {directory} are not all packed",
            got=PARTIAL_FILE,
            expected=PACK_FILE,
            do="run tools/make_shards.py again with the same arguments; it goes on where it ended",
        )
    if whole and has(PACK_FILE):
        listed = _counts(directory)
        gone = [name for name in listed if not has(name)]
        if gone:
            raise UserError(
                f"shards are missing in {directory}",
                got=f"no {gone[0]}",
                expected=f"all {len(listed)} shards of {PACK_FILE}",
                do="copy or pack the set again, or name the shards meant by a pattern",
            )


def count_packed(shard: Location) -> int | None:
    """Samples of a shard by the pack.json beside it; None where there is none that can be read and names the shard."""
    directory = shard.parent if isinstance(shard, Path) else sibling_url(ShardUrl(shard), "")
    try:
        return _counts(directory).get(file_name(shard))
    except UserError:
        # Nobody knows then, which whoever counts says.
        return None


def read_pack(directory: Location, *, name: str = PACK_FILE) -> dict[str, Any]:
    """Read the description of a set.

    Raises:
        UserError: it is damaged or of another version.
    """
    path = _inside(directory, name)
    try:
        with open_shard(path) as file:
            found = json.loads(file.read())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read", got=error) from error
    if not isinstance(found, dict) or found.get("format") != PACK_FORMAT:
        raise UserError(f"{path} is of another kind", expected=f"format {PACK_FORMAT} of this program")
    return found


def write_pack(directory: Path, content: dict[str, Any], *, name: str = PACK_FILE) -> None:
    """Write the description of a set, whole or not at all; equal content gives equal bytes."""
    write_json(directory / name, content)


def write_json(path: Path, content: object) -> None:
    """Write a small JSON file for people, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _counts(directory: Location) -> dict[str, int | None]:
    """Shard name -> samples, as pack.json has them."""
    found = read_pack(directory)
    try:
        return {shard["name"]: shard.get("num_samples") for tier in found["tiers"] for shard in tier["shards"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{_inside(directory, PACK_FILE)} is damaged", got=f"no list of shards ({error!r})") from error


def _finder(directory: Location) -> Callable[[str], bool]:
    """Whether a file of some name is there; a store is asked once for all of them."""
    if isinstance(directory, Path):
        return lambda name: (directory / name).exists()
    return {file_name(url) for url in list_directory(ShardUrl(directory))}.__contains__


def _inside(directory: Location, name: str) -> Location:
    return directory / name if isinstance(directory, Path) else sibling_url(ShardUrl(directory), name)
