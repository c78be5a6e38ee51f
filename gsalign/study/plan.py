"""Which runs a study has, and the configuration of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gsalign.config import Config, load_config
from gsalign.engine.folder import RunFolder
from gsalign.errors import ConfigError
from gsalign.study.config import StudyConfig
from gsalign.study.folder import StudyFolder


@dataclass(frozen=True)
class StudyRun:
    """One variant with one seed.

    Attributes:
        variant: its name.
        seed: of the run.
        config: all settings.
        data: fingerprint of the generated set it learns from; None for another.
    """

    variant: str
    seed: int
    config: Config
    data: str | None

    @property
    def folder(self) -> RunFolder:
        """Its folder, one like that of any other run."""
        return RunFolder(self.config.run_folder)

    def __str__(self) -> str:
        return f"{self.variant} seed {self.seed}"


def plan_runs(
    study: StudyConfig,
    folder: StudyFolder,
    *,
    seeds: Sequence[int] = (),
    only: Sequence[str] = (),
    source: str | Path = "the study",
) -> list[StudyRun]:
    """The runs of a study, seed by seed, so that a stopped study has whole rows.

    Args:
        study: the study.
        folder: where the runs are.
        seeds: instead of the study's.
        only: these variants; all if empty.
        source: the study file, for messages.

    Raises:
        ConfigError: ``only`` names no variant of the study, or the settings of one are wrong.
    """
    for name in only:
        if name not in study.variants:
            raise ConfigError(
                f"variant {name!r} is unknown; {source} has {', '.join(study.variants)}"
            )
    chosen = [name for name in study.variants if not only or name in only]
    return [
        make_run(study, folder, variant, seed, source=source)
        for seed in dict.fromkeys(seeds or study.seeds)
        for variant in chosen
    ]


def make_run(
    study: StudyConfig, folder: StudyFolder, variant: str, seed: int, *, source: str | Path
) -> StudyRun:
    """One variant with one seed; arguments and errors as those of :func:`plan_runs`."""
    data = study.data[study.data_name(variant)]
    overrides = {
        **study.overrides,
        **study.variants[variant].overrides,
        "name": f"{variant}-seed{seed}",
        "output": str(folder.run(variant, seed)),
        "seed": seed,
        "data.root": str(data.root),
    }
    if data.generate is not None:
        overrides["data.name"] = "cargo"
    config = load_config(study.config, overrides, given_in=f"variant {variant} of {source}")
    fingerprint = None if data.generate is None else data.generate.fingerprint()
    return StudyRun(variant, seed, config, fingerprint)
