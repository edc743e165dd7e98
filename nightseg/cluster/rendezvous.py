"""How the workers of a training find each other: on one machine through a file, as PyTorch's server asks nobody for a
token and listens on every interface."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend


class _FileBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: FileConfig) -> None:
        """As Ray's own, which knows no files; a file of its own for each time that the workers start."""
        worker_group.execute(_set_torch_distributed_env_vars)
        settings = {
            "backend": backend_config.backend,
            "world_size": len(worker_group),
            "init_method": f"file://{backend_config.folder}/{uuid.uuid4().hex}",
            "timeout_s": backend_config.timeout_s,
        }
        ray.get(
            [
                worker_group.execute_single_async(rank, _setup_torch_process_group, world_rank=rank, **settings)
                for rank in range(len(worker_group))
            ]
        )


@dataclass
class FileConfig(TorchConfig):  # type: ignore[misc]
    """Of workers that all see `folder`, which nobody else can write."""

    folder: str = ""

    @property
    def backend_cls(self) -> type[_FileBackend]:
        return _FileBackend


def torch_config(backend: str, *, folder: Path, is_local: bool) -> TorchConfig:
    return FileConfig(backend=backend, folder=str(folder)) if is_local else TorchConfig(backend=backend)
