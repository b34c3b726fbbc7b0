"""pack.json: what a packed set is, beside its shards, and the mark of a set that is not whole yet.

    pack.partial.json    packing is under way, or was ended; these shards are not the set
    pack.json            the set is whole: task, kind, classes, tiers with their shards and counts, seeds, source

Both hold one JSON object; the partial one has more, to tell whether a second start packs the same.
"""

import json
from pathlib import Path
from typing import Any

from skd_dist.data.atomic import atomic_file
from skd_dist.errors import UserError

PACK_FILE = "pack.json"
PARTIAL_FILE = "pack.partial.json"
PACK_FORMAT = 1


def check_complete(directory: Path, *, whole: bool = False) -> None:
    """Refuse shards of a set that is still being packed.

    Args:
        directory: where shards lie; one that no packer of ours wrote passes.
        whole: every shard that pack.json lists must be there: for a directory that is meant as a whole set.

    Raises:
        UserError: packing has not ended there, or a shard is gone.
    """
    if (directory / PARTIAL_FILE).exists():
        raise UserError(
            f"the shards in {directory} are not all packed",
            got=PARTIAL_FILE,
            expected=PACK_FILE,
            do="run tools/make_shards.py again with the same arguments; it goes on where it ended",
        )
    if whole and (directory / PACK_FILE).exists():
        listed = [shard["name"] for tier in read_pack(directory)["tiers"] for shard in tier["shards"]]
        gone = [name for name in listed if not (directory / name).exists()]
        if gone:
            raise UserError(
                f"shards are missing in {directory}",
                got=f"no {gone[0]}",
                expected=f"all {len(listed)} shards of {PACK_FILE}",
                do="copy or pack the set again, or name the shards meant by a pattern",
            )


def read_pack(directory: Path, *, name: str = PACK_FILE) -> dict[str, Any]:
    """Read the description of a set.

    Raises:
        UserError: it is damaged or of another version.
    """
    try:
        found = json.loads((directory / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / name} cannot be read", got=error) from error
    if not isinstance(found, dict) or found.get("format") != PACK_FORMAT:
        raise UserError(f"{directory / name} is of another kind", expected=f"format {PACK_FORMAT} of this program")
    return found


def write_pack(directory: Path, content: dict[str, Any], *, name: str = PACK_FILE) -> None:
    """Write the description of a set, whole or not at all; equal content gives equal bytes."""
    write_json(directory / name, content)


def write_json(path: Path, content: object) -> None:
    """Write a small JSON file for people, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
