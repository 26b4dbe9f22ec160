"""Callbacks that do to a run what the world does to it."""

import os
import signal

import lightning.pytorch as pl


class Die(pl.Callback):
    """Ends the process by SIGKILL, as the kernel does when memory runs out."""

    def on_train_epoch_start(self, trainer, pl_module):
        os.kill(os.getpid(), signal.SIGKILL)
