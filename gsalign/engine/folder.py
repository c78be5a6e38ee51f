"""Where a run keeps what: the names in its folder, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gsalign.errors import ConfigError


@dataclass(frozen=True)
class RunFolder:
    """The files of a run.

    Attributes:
        root: ``logs/<data set>/<name>`` by default.
    """

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """What was measured, one JSON object per line, see ``gsalign.engine.metrics``."""
        return self.root / "metrics.json"

    @property
    def log(self) -> Path:
        """What was printed."""
        return self.root / "train.log"

    @property
    def events(self) -> Path:
        """TensorBoard events."""
        return self.root / "tensorboard"

    @property
    def state(self) -> Path:
        """Everything ``--resume`` needs."""
        return self.root / "checkpoint.safetensors"

    @property
    def best(self) -> Path:
        """Weights of the best evaluation, as ``training.select_on`` says."""
        return self.root / "model_best.safetensors"

    @property
    def final(self) -> Path:
        """Weights at the end of the run."""
        return self.root / "model_final.safetensors"

    def is_used(self) -> bool:
        """Whether a run has written here."""
        return self.metrics.exists() or self.state.exists() or self.final.exists()

    def require_unused(self) -> None:
        """Refuse to write over another run.

        Raises:
            ConfigError: there is one.
        """
        if self.is_used():
            raise ConfigError(
                f"{self.root} holds a run already: --resume continues it, --overwrite replaces "
                "it, name=... or --output starts another"
            )

    def clear(self) -> None:
        """Remove what a run writes, and nothing else that lies in the folder."""
        events = self.events.glob("events.out.tfevents.*") if self.events.is_dir() else ()
        for path in (self.config, self.metrics, self.log, self.state, self.best, self.final):
            path.unlink(missing_ok=True)
        for path in events:
            path.unlink(missing_ok=True)
