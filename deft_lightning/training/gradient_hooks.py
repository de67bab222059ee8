"""Who looks at the gradients of a step before they are clipped."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule

HOOK = "on_before_optimizer_step"


def shows_gradients(module: Any, kind: type[LightningModule]) -> bool:
    """Return whether a callback, or a subclass, looks at gradients before they are clipped: they are divided by then.

    Args:
        module: In training.
        kind: Class whose way to clip divides them.
    """
    if type(module).configure_gradient_clipping is not kind.configure_gradient_clipping:
        return True
    callbacks = module.trainer.callbacks
    return any(_overrides(one, Callback) for one in callbacks) or _overrides(module, LightningModule)


def _overrides(owner: Any, base: type) -> bool:
    hook = getattr(owner, HOOK)  # LambdaCallback has it in the object
    return getattr(hook, "__func__", hook) is not getattr(base, HOOK)
