"""MuJoCo's warnings about gymnasium's own models."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager

_log = logging.getLogger(__name__)


@contextmanager
def quiet_compiler() -> Generator[None]:
    """Log MuJoCo's warnings while a model is compiled, at debug level.

    Of a model that came with gymnasium the user can change nothing, and MuJoCo would print the same lines for every
    copy of it and leave a MUJOCO_LOG.TXT in the working folder. Warnings of the simulation itself come later and stay.

    Yields:
        Nothing.
    """
    import mujoco

    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: _log.debug("mujoco: %s", message))
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)
