"""The trainer behind a callback: transformers passes callbacks the model and the loaders, but not itself."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any


def calling_trainer(callback: object) -> Any | None:
    """Return the trainer that is calling an event of a callback; None where none is.

    It is the one on the stack whose ``callback_handler`` has the callback. Nothing else leads from a callback to its
    trainer: what is logged of a step goes to the loggers before it goes to callbacks that were given by the user, so
    that figures for them have to be added by a callback in front.

    Args:
        callback: It is an event of this one that is running.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        handler = getattr(owner, "callback_handler", None)
        if any(one is callback for one in getattr(handler, "callbacks", ())):
            return owner
        frame = frame.f_back
    return None
