"""The strategy ``fsdp2``: weights, gradients and optimizer state sharded over all ranks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import StrategyRegistry
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_shares
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from deft_lightning._lightning import DataParallelStrategy, computes_on, unwrapped
from deft_lightning.annotations import Checkpoint, State
from deft_lightning.atomic import partial_name, replace_folder, sweep
from deft_lightning.errors import UserError
from deft_lightning.models import BASE, Sharding, check_shapes, check_state, load_checkpoint, read_checkpoint
from deft_lightning.models.base import OWNER, frozen_entries
from deft_lightning.models.contents import KEY, problem
from deft_lightning.models.seal import file_digest, write_digests
from deft_lightning.models.shard import buffers_beside_weights
from deft_lightning.models.shares import METADATA, SHARED, WEIGHTS, SharePlanner, ShareReader, innermost, read_metadata
from deft_lightning.training.checkpoint_io import why_not_saved
from deft_lightning.training.offload import activations_in_host_memory


def _about_shares(folder: Path) -> Checkpoint:
    """Read what is neither weights nor optimizer of a folder, once the folder is verified."""
    checkpoint = read_checkpoint(folder)
    # The weights are read by all ranks together; here it only has to be a checkpoint of this package.
    if why := problem({**checkpoint, "state_dict": {"": torch.empty(0)}}):
        raise UserError(f"{folder}: {why} (--ckpt_path)")
    return checkpoint


def _renamed(state: State, names: Mapping[Any, Any]) -> State:
    """Return the state of an optimizer with its parameters under other names, or under numbers."""
    groups = [{**group, "params": [names[one] for one in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[one]: values for one, values in state["state"].items()}, "param_groups": groups}


def hybrid_mesh(device: torch.device, ranks: int, replicate: int) -> Any:
    """Return a mesh of groups of neighbouring ranks: copies along its first dimension, shares along the second.

    Raises:
        UserError: The ranks do not divide into that many groups.
    """
    if ranks % replicate:
        raise UserError(f"--trainer.strategy.replicate {replicate}: {ranks} ranks do not divide into as many groups")
    return init_device_mesh(device.type, (replicate, ranks // replicate), mesh_dim_names=("replicate", "shard"))


class FSDP2Strategy(DataParallelStrategy):
    """Shards weights, gradients and optimizer state over all ranks (``torch.distributed.fsdp.fully_shard``).

    ``--trainer.precision bf16-mixed`` gathers and computes in bfloat16 and reduces gradients in float32, through FSDP
    itself instead of autocast.

    Args:
        save_distributed_checkpoint: A folder to which each rank writes its share, instead of one file with everything.
        replicate: Number of groups of ranks that hold the whole model each (hybrid sharding): a group shards it over
            its ranks, which gather weights among themselves alone; gradients are summed over all groups. With the
            number of machines, weights are gathered within a machine. 1: one group of all ranks.
        cpu_offload: Keep weights, gradients and optimizer state in host memory; the optimizer steps there.
        offload_activations: Keep what backward needs of the forward pass in host memory meanwhile; with
            ``--model.gradient_checkpointing true`` the input of each layer.
        kwargs: As :class:`lightning.pytorch.strategies.ModelParallelStrategy`.

    Raises:
        UserError: A size of data or tensor parallelism other than all ranks and one; ``replicate`` below 1.
    """

    shards_weights = True

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        replicate: int = 1,
        cpu_offload: bool = False,
        offload_activations: bool = False,
        **kwargs: Any,
    ) -> None:
        for name, allowed in (("data_parallel_size", ("auto",)), ("tensor_parallel_size", ("auto", 1))):
            if kwargs.pop(name, "auto") not in allowed:
                raise UserError(f"fsdp2: {name} cannot be set in this version: weights are sharded over all ranks")
        if replicate < 1:
            raise UserError(f"--trainer.strategy.replicate must be at least 1, got {replicate}")
        if cpu_offload and torch.cuda.is_available() and kwargs.get("process_group_backend") is None:
            kwargs["process_group_backend"] = (
                "cuda:nccl,cpu:gloo"  # the norm of gradients in host memory is summed there
            )
        super().__init__(save_distributed_checkpoint, **kwargs)
        self.low_precision = False
        self.replicate, self.cpu_offload, self.offload_activations = replicate, cpu_offload, offload_activations

    def setup_environment(self) -> None:
        """Join the other ranks; take mixed precision over from Lightning."""
        if isinstance(self.precision_plugin, MixedPrecision):
            if self.precision_plugin.scaler is not None:
                raise UserError("fsdp2 cannot train in float16: use --trainer.precision bf16-mixed or 32-true")
            self.low_precision, self.precision_plugin = True, Precision()
        super().setup_environment()
        mesh = self.device_mesh["data_parallel"]
        if self.replicate > 1:
            mesh = hybrid_mesh(self.root_device, self.world_size, self.replicate)
        self.sharding = Sharding(mesh, self.root_device, self.low_precision, self.cpu_offload)

    def model_to_device(self) -> None:
        """Move what is not there yet; weights that are kept in host memory stay, batches and sums do not."""
        if self.cpu_offload:
            computes_on(self.lightning_module, self.root_device)
        else:
            super().model_to_device()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step; what its backward pass needs waits in host memory where that is asked for."""
        with activations_in_host_memory() if self.offload_activations else nullcontext():
            return super().training_step(*args, **kwargs)

    def setup(self, trainer: Trainer) -> None:
        """Set up; weights that are gathered in inference mode could not be trained afterwards."""
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False
        super().setup(trainer)

    def optimizer_state(self, optimizer: Optimizer) -> State:
        """Return the optimizer's state: shares, or on rank 0 all of it under the numbers a plain optimizer gives.

        Lightning numbers parameters by their place in the model, which is another one as soon as there are several
        parameter groups: such a file could not go on in one process, nor the other way round.
        """
        if self.saves_shares:
            return super().optimizer_state(optimizer)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        optimizer = unwrapped(optimizer)
        named: State = get_optimizer_state_dict(self._owner, optimizer, options=options)
        if not self.is_global_zero:
            return {}
        return _renamed(named, {name: i for i, name in enumerate(_names(self._owner, optimizer))})

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Checkpoint:
        """Load shares, or a file that any strategy has written: rank 0 reads it and hands out what is each rank's.

        Raises:
            UserError: The checkpoint is of another model.
        """
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            return self._load_shares(path)
        checkpoint = self._agreed(lambda: load_checkpoint(path))
        weights, states = checkpoint.pop("state_dict"), checkpoint.get("optimizer_states", [])
        about, first = checkpoint[KEY], self.is_global_zero
        check_state(self._owner.model, weights, about)
        self._owner.base_weights.check(self._owner.model, weights, about)
        # Without the base's weights, those that are here stay.
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=first and BASE not in about)
        with buffers_beside_weights(self._owner, self.sharding):
            set_model_state_dict(self._owner, weights if first else {}, options=options)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=first)
        for optimizer, state in zip(self.optimizers, states, strict=False):
            named = _renamed(state, dict(enumerate(_names(self._owner, optimizer))))
            set_optimizer_state_dict(self._owner, optimizer, named if first else {}, options=options)
        return checkpoint

    def _agreed(self, read: Callable[[], Any]) -> Any:
        """Read on every rank; where one cannot, none goes on."""
        problem, answer = None, None
        try:
            answer = read()
        except UserError as error:
            problem = str(error)
        if self._any(problem is not None):
            raise UserError(problem or "another rank cannot read the checkpoint (--ckpt_path)")
        return answer

    def _load_shares(self, folder: Path) -> Checkpoint:
        """Load this rank's part of what many ranks have written, be they as many as now or not."""
        checkpoint: Checkpoint = self._agreed(lambda: _about_shares(folder))
        entries = self._agreed(lambda: read_metadata(folder)).state_dict_metadata
        weights: State = get_model_state_dict(self._owner)
        own = {f"{WEIGHTS}{name}": tuple(value.shape) for name, value in weights.items()}
        theirs = {
            name: tuple(entry.size)
            for name, entry in entries.items()
            if name.startswith(WEIGHTS) and isinstance(entry, TensorStorageMetadata)
        }
        if BASE in (about := checkpoint[KEY]):
            held = {name.removeprefix(WEIGHTS) for name in theirs}
            self._owner.base_weights.check(self._owner.model, dict.fromkeys(held), about)
            base = {f"{OWNER}{name}" for name in frozen_entries(self._owner.model)} - held
            weights = {name: value for name, value in weights.items() if name not in base}
            own = {f"{WEIGHTS}{name}": own[f"{WEIGHTS}{name}"] for name in weights}
        check_shapes(own, theirs, WEIGHTS)
        self._read({"state_dict": weights}, folder)
        self._owner.load_state_dict(weights, strict=BASE not in about)
        options = StateDictOptions(cpu_offload=True)
        for number, optimizer in enumerate(self.optimizers):
            named = {f"optimizer_{number}": get_optimizer_state_dict(self._owner, optimizer)}
            self._read(named, folder)
            set_optimizer_state_dict(self._owner, optimizer, named[f"optimizer_{number}"], options=options)
        return checkpoint

    def _read(self, state: State, folder: Path) -> None:
        try:
            load_shares(state, storage_reader=ShareReader(folder), planner=SharePlanner())
        except (Exception, CheckpointException) as error:  # torch raises on every rank what happened on one
            raise UserError(f"{folder}: cannot be loaded: {innermost(error)} (--ckpt_path)") from None

    @property
    def _owner(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module

    def save_checkpoint(self, checkpoint: Checkpoint, filepath: Any, storage_options: object = None) -> None:
        """Save a file, or a folder that gets its name once every rank has written its share."""
        if not self.saves_shares:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        target = Path(self.broadcast(filepath))
        partial = Path(self.broadcast(str(partial_name(target))))
        if self.is_global_zero:
            sweep(target.parent)
        problem: str | None = None
        digests: dict[str, str] = {}
        try:
            super().save_checkpoint(checkpoint, partial, storage_options)
            digests = {file.name: file_digest(file) for file in self._written(partial)}
        except Exception as error:
            problem = why_not_saved(target, error)
        if self._any(problem is not None):
            if self.is_global_zero:
                shutil.rmtree(partial, ignore_errors=True)
            raise UserError(problem or f"{target}: another rank could not save its shard; earlier ones are intact")
        everywhere: list[Any] = [None] * self.world_size
        dist.all_gather_object(everywhere, digests)
        if self.is_global_zero:
            write_digests(partial, {name: digest for own in everywhere for name, digest in own.items()})
            replace_folder(partial, target)
        self.barrier()

    def _written(self, folder: Path) -> list[Path]:
        """Return files of a folder of shares that this rank has written."""
        own = list(folder.glob(f"__{self.global_rank}_*"))
        return [*own, folder / METADATA, folder / SHARED] if self.is_global_zero else own

    def _any(self, here: bool) -> bool:
        flag = torch.tensor(int(here), device=self.root_device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


def _names(owner: Any, optimizer: Optimizer) -> Iterator[str]:
    """Return names of what an optimizer of a module trains, in the order in which it numbers them."""
    names = {id(parameter): name for name, parameter in owner.named_parameters()}
    for group in optimizer.param_groups:
        yield from (names[id(parameter)] for parameter in group["params"])


def register() -> None:
    """Make ``--trainer.strategy fsdp2`` known."""
    if "fsdp2" not in StrategyRegistry:
        StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2: everything sharded over all ranks")


register()
