"""The weights that a training of UNIT starts from where they are not random: those of a trained translator.

A file holds the generators' tensors under their own names and, if it has them, the discriminators' behind
DISCRIMINATORS. `scenes.safetensors` of this package was trained on the procedural scenes by configs/unit_scenes.yaml.
"""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Final

import safetensors.torch
import torch

from nightseg.networks.model_folder import TENSORS, load_tensors
from nightseg.networks.weights import check_names_and_shapes, read_state_dict
from nightseg.storage import Location, UserError, Workspace, sha256_of
from nightseg.unit.network import DISCRIMINATORS, KIND, Discriminators, Generators, split_tensors

SCENES: Final = "scenes"  # the word for the file of this package


def start_file(start: str) -> Location:
    """`scenes`, a .safetensors file, or the one of a model folder. UserError: there is none."""
    if start == SCENES:
        file = Location.of(str(importlib.resources.files("nightseg.unit") / "scenes.safetensors"))
    else:
        file = Location.of(start)
        file = file / TENSORS if file.is_folder() else file
    if not file.exists():
        raise UserError(f"start: there is no file {file.uri}", cure="give a model folder, a .safetensors file, or null")
    return file


def start_sha256(start: str | None) -> str | None:
    """What a training follows from by its start: the content of the file."""
    return None if start is None else sha256_of(start_file(start).read_bytes())


def load_start(start: str, generators: Generators, discriminators: Discriminators) -> None:
    """Copy the weights into the networks, in their own precision; discriminators that the file lacks stay random.

    Raises UserError: no such file, or tensors of other names or shapes.
    """
    file = start_file(start)
    of_generators, of_discriminators = split_tensors(read_state_dict(file, "the translator"))
    check_names_and_shapes("the generators of this recipe", file, generators.state_dict(), of_generators)
    generators.load_state_dict(of_generators)
    if of_discriminators:
        check_names_and_shapes(
            "the discriminators of this recipe", file, discriminators.state_dict(), of_discriminators
        )
        discriminators.load_state_dict(of_discriminators)


def write_start(run: str | Path, translator: str, file: str | Path, *, discriminators: bool = True) -> dict[str, str]:
    """Write the trained translator of a finished run as one .safetensors file of float16 tensors.

    Returns its metadata: what it was trained by. Raises UserError: the run has no such translator.
    """
    commits = [commit for commit in Workspace(run).commits() if commit.stage == "train_translator"]
    wanted = [commit for commit in commits if commit.name == translator]
    if not wanted:
        known = ", ".join(commit.name for commit in commits) or "none"
        raise UserError(f"{run}: no trained translator {translator!r}; it has {known}", cure="finish the run first")
    tensors, card = load_tensors(wanted[-1].folder / "model")
    kept = {
        name: tensor.to(torch.float16)
        for name, tensor in tensors.items()
        if discriminators or not name.startswith(DISCRIMINATORS)
    }
    sizes = {name: card[name] for name in ("width", "res_blocks", "shared_blocks")}
    metadata = {
        "kind": KIND,
        "key": str(card["key"]),  # hash of its part of the recipe, its frames and the stage's version
        "seed": str(card["seed"]),
        "iterations": str(card["training"]["iterations"]),
        "settings": json.dumps(sizes | card["training"]),
    }
    Location.of(file).write_bytes(safetensors.torch.save(kept, metadata))
    return metadata
