"""Exponential moving average of the weights that train (arXiv 2212.09748 samples from one of decay
0.9999).
"""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from sora_lightning.checks import require_in
from sora_lightning.systems.optimizers.parameters import has_gradients
from sora_lightning.systems.parallel import by_mesh, shared_out


class EMA(Callback):
    """Keeps an average of every parameter that requires a gradient, and validates with it.

    The decay is warmed up as ``min(decay, (1 + n) / (10 + n))`` after n updates, so that short runs
    do not remember their first weights. Buffers are not averaged. The average is stored in the
    checkpoint under this callback's key; the model's own ``state_dict`` holds the raw weights, so
    that a resumed run continues exactly.
    """

    def __init__(self, decay: float = 0.9999):
        require_in("(0, 1)", decay=decay)
        self.decay = decay
        self.num_updates = 0
        self.weights: dict[str, Tensor] = {}
        self._swapped = False  # the model holds the average, and ``weights`` the raw values

    @property
    def state_key(self) -> str:
        return "ema"

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        live = self._live(pl_module)
        if not self.weights:
            self.weights = {name: p.detach().clone() for name, p in live.items()}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Restored from a checkpoint they are whole, on the CPU, or not read yet.
        live = self._live(pl_module)
        self.weights = {name: shared_out(self.weights[name], p) for name, p in live.items()}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if trainer.global_step == self.num_updates:  # gradients are still being accumulated
            return
        self.num_updates = trainer.global_step
        if not has_gradients(trainer.optimizers):  # the step was skipped
            return
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        live = self._live(pl_module)
        names = {id(parameter): name for name, parameter in live.items()}
        with torch.no_grad():
            for alike in by_mesh(live.values()):
                averages = [self.weights[names[id(parameter)]] for parameter in alike]
                torch._foreach_lerp_(averages, [p.detach() for p in alike], 1 - decay)

    def swap_in(self, pl_module: L.LightningModule) -> None:
        """Put the average in the model's place. Without an average yet, nothing happens."""
        if not self._swapped and self.weights:
            self._swap(pl_module)

    def swap_out(self, pl_module: L.LightningModule) -> None:
        """Put the raw weights back."""
        if self._swapped:
            self._swap(pl_module)

    @torch.no_grad()
    def _swap(self, pl_module: L.LightningModule) -> None:
        """Exchange values in place: sharded parameters are gathered from the memory they own."""
        self._swapped = not self._swapped
        for name, parameter in self._live(pl_module).items():
            average = self.weights[name] = shared_out(self.weights[name], parameter)
            raw = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(raw)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.swap_in(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.swap_out(pl_module)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.swap_out(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_updates, self.weights = state_dict["num_updates"], state_dict["weights"]

    @staticmethod
    def _live(pl_module: L.LightningModule) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
