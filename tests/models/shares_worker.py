"""One rank under fsdp2 that saves folders of shares and loads them again: good ones, and ones that hold code.

    python tests/models/shares_worker.py ROOT

Prints one JSON object: what became of each load.
"""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from deft_lightning import InstructionDataModule, SFTModule, Trainer
from deft_lightning.callbacks import Checkpoint
from deft_lightning.models.seal import DIGESTS
from deft_lightning.training.fsdp2 import FSDP2Strategy
from deft_lightning.training.optim import CosineWithWarmup


class Touch:
    """Makes a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def fit(root: Path, steps: int, resume: Path | None = None, evil: Path | None = None) -> Any:
    """Train on one rank; with ``evil``, the optimizer's state holds code when it is saved."""
    torch.manual_seed(0)
    rows = root / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{i} + 1", "answer": str(i + 1)}) + "\n" for i in range(24)))
    module = SFTModule(
        architecture={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        scheduler=lambda optimizer: CosineWithWarmup(optimizer, total_steps=6),
    )
    data = InstructionDataModule(str(rows), validation_fraction=0.0, tokenizer_size=0, batch_size=4)
    trainer = Trainer(
        max_steps=steps, default_root_dir=str(root / f"run{steps}-{evil is not None}"), logger=False,
        callbacks=[Checkpoint()], accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False,
        strategy=FSDP2Strategy(save_distributed_checkpoint=True),
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=None if resume is None else str(resume))
    last = Path(trainer.checkpoint_callback.last_model_path).resolve()  # type: ignore[union-attr]
    if evil is not None:
        optimizer = get_optimizer_state_dict(module, trainer.optimizers[0])
        for group in optimizer["param_groups"]:  # type: ignore[union-attr]
            group["weight_decay"] = Touch(evil)
        state = {"state_dict": get_model_state_dict(module), "optimizer_0": optimizer}
        torch.distributed.checkpoint.save(state, checkpoint_id=root / "evil.ckpt")
        shutil.copy(last / "meta.pt", root / "evil.ckpt")
    found = {name: value.full_tensor().clone() for name, value in module.model.state_dict().items()}
    return found, last


def main() -> None:
    """Save, change, load."""
    root, told = Path(sys.argv[1]), {}
    marker = root / "marker"
    whole, _ = fit(root, 6)
    _, last = fit(root, 3)
    resumed, _ = fit(root, 6, last)
    told["difference after a resume"] = max(float((whole[n] - resumed[n]).abs().max()) for n in whole)

    def attempt(name: str, folder: Path) -> None:
        try:
            fit(root, 6, folder)
            told[name] = "loaded"
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
        told[f"{name}: code ran"] = str(marker.exists())
        marker.unlink(missing_ok=True)

    fit(root, 3, evil=marker)
    marker.unlink(missing_ok=True)  # torch may have copied it
    attempt("code in an entry of a share", root / "evil.ckpt")
    for part, text in ((".metadata", pickle.dumps(Touch(marker))), ("meta.pt", None)):
        folder = root / f"code in {part}"
        shutil.copytree(last, folder)
        (folder / DIGESTS).unlink()  # a stranger's folder has no digests, or has right ones
        if text is None:
            torch.save({**torch.load(folder / part), "x": Touch(marker)}, folder / part)
        else:
            (folder / part).write_bytes(text)
        attempt(f"code in {part}", folder)
    flipped = root / "flipped"
    shutil.copytree(last, flipped)
    share = next(flipped.glob("*.distcp"))
    raw = bytearray(share.read_bytes())
    raw[len(raw) // 2] ^= 1
    share.write_bytes(raw)
    attempt("a flipped bit in a share", flipped)
    shutil.copytree(last, root / "kept")
    told["kept"] = str(root / "kept")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
