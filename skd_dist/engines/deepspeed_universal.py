"""DeepSpeed's checkpoint of some ranks as its universal checkpoint, which any number of ranks can load.

    zero_pp_rank_R_..._optim_states.pt of all ranks -> fragments by parameter -> zero/PARAMETER/{fp32,exp_avg,...}.pt

The functions are those of DeepSpeed's own converter, `ds_to_universal`. Its main program is not used: it prints, starts
process pools, and writes every tensor of the module once more.

Left out, because universal checkpoints leave it out too: parameters that do not train, and buffers. The caller has them
elsewhere, and puts them into the module himself.
"""

import shutil
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from deepspeed.checkpoint import DeepSpeedCheckpoint, ds_to_universal

from skd_dist.errors import UserError

_ADAM_STATE = "exp_avg"
"""What DeepSpeed's converter asks every optimizer for."""

FOLDER = "zero"
"""Of a directory that holds a universal checkpoint; DeepSpeed's name."""


def convert_to_universal(source: Path, target: Path) -> None:
    """Write the universal checkpoint of ZeRO 1, 2 or 3. One process calls this.

    Args:
        source: directory with the files of all ranks.
        target: an empty directory.

    Raises:
        UserError: the optimizer is not of the Adam family, the only one that DeepSpeed's converter knows.
    """
    optimizer_files = ds_to_universal._get_optim_files(str(source))
    convert = _convert_3 if ds_to_universal._get_zero_stage(optimizer_files) == 3 else _convert_1_2
    # Not below the target: DeepSpeed takes this path for a pattern, and run directories may have any name.
    with TemporaryDirectory(prefix="skd_dist-") as fragments:
        try:
            convert(optimizer_files, target, fragments)
        except KeyError as cause:
            if cause.args != (_ADAM_STATE,):
                raise
            raise UserError("DeepSpeed's universal checkpoint knows the moments of Adam and AdamW only") from cause


def _convert_1_2(optimizer_files: list[str], target: Path, fragments: str) -> None:
    checkpoint = DeepSpeedCheckpoint(str(Path(optimizer_files[0]).parent))
    ds_to_universal._inject_missing_state(checkpoint)
    for rank in range(checkpoint.dp_degree):
        ds_to_universal.extract_zero_shards(fragments, checkpoint, (0, 0, rank))
    (model_file,) = checkpoint.mp_rank_files
    for name, shape in _shapes(ds_to_universal._parse_model_states_stage3([model_file])).items():
        ds_to_universal.merge_tp_slices({}, str(target / FOLDER), fragments, 1, (name, [shape]))
    ds_to_universal._save_optimizer_state(Namespace(output_folder=str(target)), checkpoint)
    shutil.copy(model_file, target)


def _convert_3(optimizer_files: list[str], target: Path, fragments: str) -> None:
    model_files = ds_to_universal._get_zero3_model_state_files(str(Path(optimizer_files[0]).parent))
    shapes = ds_to_universal._parse_model_states_stage3(model_files)
    num_ranks = len(optimizer_files)
    for rank in range(num_ranks):
        ds_to_universal.extract_zero_shards_stage3([optimizer_files], [shapes], num_ranks, fragments, (0, rank))
    for name in _shapes(shapes):
        ds_to_universal.merge_zero3_slices(num_ranks, str(target / FOLDER), fragments, name)
    ds_to_universal._save_optimizer_state_stage3(Namespace(output_folder=str(target)), optimizer_files)
    # The loader looks for the first rank's, and takes nothing but counters from it.
    shutil.copy(model_files[0], target)


def _shapes(groups: list[dict[str, torch.Size]]) -> dict[str, torch.Size]:
    """Of everything that trains, by name."""
    return {name: shape for group in groups for name, shape in group.items()}
