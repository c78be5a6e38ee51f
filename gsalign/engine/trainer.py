"""The training loop: forward, backward, step; everything else is a hook's.

Trainer and Hook name each other, so they share a file; who trains with which hooks is settled in
:mod:`gsalign.engine.build`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor

from gsalign.data import (
    Batch,
    BatchLoader,
    IdentityBatchSampler,
    ReIDDataset,
    Split,
    contiguous_labels,
    hold_out_identities,
    load_dataset,
    train_loader,
)
from gsalign.data.synthetic import has_part_labels
from gsalign.engine.angles import AngleMonitor
from gsalign.engine.compilation import compile_losses
from gsalign.engine.config import NO_SELECTION, VALIDATION
from gsalign.engine.cuda_graphs import require_graphs
from gsalign.engine.determinism import deterministic
from gsalign.engine.display import Display
from gsalign.engine.distributed import build_accelerator, gather_rows
from gsalign.engine.folder import RunFolder
from gsalign.engine.interrupt import StopSignal
from gsalign.engine.kernels import chosen_kernels
from gsalign.engine.logs import log_to
from gsalign.engine.meters import LossMeter, Stopwatch
from gsalign.engine.optimizer import build_optimizer
from gsalign.engine.recorder import Recorder
from gsalign.engine.schedule import LtpsFactor, Rise, Schedule
from gsalign.engine.state import (
    Progress,
    load_state,
    random_state,
    save_state,
    set_random_state,
)
from gsalign.engine.step import TrainingStep
from gsalign.errors import CheckpointError, ConfigError
from gsalign.model import GSAlign, create_model

if TYPE_CHECKING:
    from gsalign.config import Config

logger = logging.getLogger(__name__)


class RunStopped(KeyboardInterrupt):
    """A run was asked to stop and did so between two iterations; the message says where it is."""


class Hook:
    """Something a trainer calls; override what you need.

    A trainer's hooks are called in their order, on every process, and see the trainer's
    attributes: ``progress.iteration`` (iterations done), ``network``, the ``losses`` of the last
    iteration, ``lr``, ``folder``, ``accelerator``, ...
    """

    def before_run(self, trainer: Trainer) -> None:
        """Called once, when everything is in place and a resumed state is loaded."""

    def after_iteration(self, trainer: Trainer) -> None:
        """Called after every iteration."""

    def after_run(self, trainer: Trainer) -> None:
        """Called once, after the last iteration; not when the run is stopped before it."""

    def close(self, trainer: Trainer) -> None:
        """Called at the very end, whether the run finished, was stopped or failed."""


class Trainer:
    """Trains a network as a configuration says.

    The run is deterministic in ``config.seed``: batches and augmentation depend on the seed and
    the iteration alone, the rest on PyTorch's global generators, which the trainer seeds and
    whose states it saves. So a resumed run goes on exactly as if it had not been stopped.

    Under torchrun or ``accelerate launch`` the processes share every batch of P x K images; losses
    are those of the whole batch, unless ``training.global_losses`` is off.

    Args:
        config: all settings; ``model.num_identities`` is replaced by what the data set has.
        dataset: the images; read as ``config.data`` says when None.
        resume: go on from the state in the run's folder.
        overwrite: replace a run that is in the folder already.
        hooks: called in this order.
        display: shows the progress.

    Raises:
        ConfigError: the configuration cannot be carried out here, or the folder holds a run.
        CheckpointError: there is nothing to resume, or it does not fit.
        DataError: the data set cannot be used.

    Attributes:
        config: the configuration, with the number of identities.
        dataset: without the identities held out for validation.
        validation: query and gallery of the held-out identities, or None.
        network: the network, unwrapped.
        step: trains on a batch.
        progress: iterations done, best result, and what else the state on disk tells.
        losses: of the last iteration, on their device.
        lr: of the last iteration.
        total: iterations of the whole run.
        epoch_length: iterations of an epoch.
    """

    def __init__(
        self,
        config: Config,
        dataset: ReIDDataset | None = None,
        *,
        resume: bool = False,
        overwrite: bool = False,
        hooks: Sequence[Hook] = (),
        display: Display | None = None,
    ) -> None:
        training = config.training
        self.folder = RunFolder(config.run_folder)
        if not resume and not overwrite:
            self.folder.require_unused()
        self.accelerator: Accelerator = build_accelerator(
            device=config.device,
            precision=training.precision,
            find_unused_parameters=training.find_unused_parameters,
            remember_casts=not training.cuda_graphs,
        )
        if training.cuda_graphs:
            accelerator = self.accelerator
            require_graphs(training, accelerator.device, accelerator.num_processes)
        dataset = load_dataset(config.data) if dataset is None else dataset
        if training.select_on not in (NO_SELECTION, VALIDATION, *dataset.protocols):
            raise ConfigError(
                f"training.select_on is {training.select_on!r}, which data set {dataset.name} is "
                f"not evaluated by; wanted {NO_SELECTION}, {VALIDATION} or one of "
                f"{', '.join(dataset.protocols)}"
            )
        self.validation: tuple[Split, Split] | None = None
        if training.select_on == VALIDATION:
            fraction = config.data.validation_fraction
            dataset, query, gallery = hold_out_identities(dataset, fraction, seed=config.seed)
            self.validation = (query, gallery)
        self.dataset = dataset
        model = config.model.model_copy(
            update={"num_identities": self.dataset.train.num_identities}
        )
        self.config = config.model_copy(update={"model": model})

        self.epoch_length = self._count_batches()
        self.total = training.iterations or self.in_iterations(training.epochs or 0)
        self.progress = Progress(
            world_size=self.accelerator.num_processes,
            identity={
                "seed": config.seed,
                "identities_per_batch": config.data.identities_per_batch,
                "images_per_identity": config.data.images_per_identity,
                "optimizer.name": config.optimizer.name,
                "training images": len(self.dataset.train),
                "training identities": model.num_identities,
            },
        )
        self._build(resume=resume)
        if not resume and self.accelerator.is_main_process:
            self.folder.clear()
        self.meter = LossMeter()
        self.stopwatch = Stopwatch()
        self.display = Display() if display is None else display
        self.recorder: Recorder | None = None
        self.hooks = tuple(hooks)
        self.losses: dict[str, Tensor] = {}
        self.lr = 0.0
        self._stop = StopSignal()
        self._between_iterations = True

    def in_iterations(self, length: int) -> int:
        """A length in epochs, or in iterations if these give the length of the run."""
        return length * (self.epoch_length if self.config.training.iterations is None else 1)

    def _count_batches(self) -> int:
        data = self.config.data
        labels, _ = contiguous_labels(self.dataset.train.identities)
        length = len(
            IdentityBatchSampler(
                labels,
                identities_per_batch=data.identities_per_batch,
                images_per_identity=data.images_per_identity,
                world_size=self.accelerator.num_processes,
            )
        )
        if length == 0:
            raise ConfigError(
                f"data.identities_per_batch {data.identities_per_batch} x "
                f"data.images_per_identity {data.images_per_identity}: the "
                f"{len(self.dataset.train)} training images fill no batch; use smaller numbers"
            )
        return length

    def _build(self, *, resume: bool) -> None:
        """Make network, optimizer and schedule, and load the state of a run to resume."""
        accelerator, config = self.accelerator, self.config
        torch.manual_seed(config.seed)
        if resume:
            self.network = GSAlign(config.model)
        else:
            self.network, report = create_model(config.model)
            if report is not None:
                logger.info("pretrained: %s", report)
        self.network.to(accelerator.device).train()
        self.network.backbone.recompute = config.training.recompute
        self.network.global_losses = config.training.global_losses
        self.angles = AngleMonitor(self.network)
        self.schedule = Schedule(
            config.schedule, config.optimizer.lr, self.total, self.epoch_length
        )
        self.ltps_factor = LtpsFactor(config.optimizer, self.total)
        warmup = config.model.losses.deformation_warmup
        self.deformation_share = Rise(warmup, self.total) if warmup else None
        optimizer = build_optimizer(self.network, config.optimizer)
        torch.manual_seed(config.seed + accelerator.process_index)
        random: dict[str, Tensor] = {}
        if resume:
            random = self._load(optimizer)
        if config.training.compile:
            compile_losses(self.network)
        self.model, self.optimizer = accelerator.prepare(self.network, optimizer)
        self.step = TrainingStep(
            accelerator,
            self.model,
            self.optimizer,
            clip_norm=config.training.clip_norm,
            graphs=config.training.cuda_graphs,
        )
        if random:
            rank = accelerator.process_index % len(random["cpu"])
            set_random_state(random, rank, accelerator.device)
        if self.progress.scaler and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(self.progress.scaler)

    def _load(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        path = self.folder.state
        mine = self.progress
        progress, random = load_state(path, model=self.network, optimizer=optimizer)
        for name, value in mine.identity.items():
            if progress.identity.get(name) != value:
                raise CheckpointError(
                    f"{path} is of a run with {name} {progress.identity.get(name)}, this one has "
                    f"{value}: resume with the same settings, or start a new run"
                )
        if progress.iteration > self.total:
            raise CheckpointError(
                f"{path} has {progress.iteration} iterations done, but the run is to end after "
                f"{self.total}"
            )
        if progress.world_size != mine.world_size:
            logger.warning(
                "resumed with %d processes instead of %d: batches are the same, but the results "
                "will not be bit for bit",
                mine.world_size,
                progress.world_size,
            )
            progress.world_size = mine.world_size
        self.progress = progress
        logger.info("resumed %s after iteration %d", path, progress.iteration)
        return random

    def train(self) -> Progress:
        """Run to the end.

        Returns:
            The progress, at the end.

        Raises:
            RunStopped: SIGINT or SIGTERM came; the state is saved.
            NonFiniteLossError: a loss became infinite or not a number.
            KernelUnavailableError: ``config.kernels`` cannot run on this machine.
        """
        from gsalign.config import save_config

        main = self.accelerator.is_main_process
        kernels = chosen_kernels(self.config.kernels)
        same_bits = deterministic(self.config.training.deterministic)
        with kernels, same_bits, log_to(self.folder.log if main else None), self._stop:
            if main:
                save_config(self.config, self.folder.config)
                self.recorder = Recorder(self.folder, iteration=self.progress.iteration)
            try:
                self._announce()
                self.display.start(self.progress.iteration, self.total)
                self._run()
            except KeyboardInterrupt:
                raise self._stopped() from None
            finally:
                self.display.stop()
                for hook in self.hooks:
                    hook.close(self)
                if self.recorder is not None:
                    self.recorder.close()
        return self.progress

    def _announce(self) -> None:
        network, data = self.network, self.config.data
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        logger.info(
            "training %s on %s (%d images of %d identities): %s parameters, %d iterations of "
            "%d x %d images, %d per epoch; on %s x %d, precision %s; writing to %s",
            self.config.name,
            data.root,
            len(self.dataset.train),
            self.dataset.train.num_identities,
            f"{trained:,}",
            self.total,
            data.identities_per_batch,
            data.images_per_identity,
            self.epoch_length,
            self.accelerator.device.type,
            self.accelerator.num_processes,
            self.config.training.precision,
            self.folder.root,
        )

    def _run(self) -> None:
        for hook in self.hooks:
            hook.before_run(self)
        self.stopwatch.restart()
        for batch in self._batches():
            self._between_iterations = False
            self._iteration(batch)
            self.progress.iteration += 1
            self._between_iterations = True
            for hook in self.hooks:
                hook.after_iteration(self)
            if self._must_stop():
                raise KeyboardInterrupt
        for hook in self.hooks:
            hook.after_run(self)
        self.accelerator.wait_for_everyone()

    def _batches(self) -> Iterator[Batch]:
        start = self.progress.iteration
        if start >= self.total:
            return
        # Packing a data set takes minutes, and nothing is trained yet.
        with self.interruptible():
            loader: BatchLoader = train_loader(
                self.dataset.train,
                self.config.data,
                seed=self.config.seed,
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
                iterations=(start, self.total),
                part_groups=self._part_groups(),
            )
        batches = iter(loader)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.stopwatch.data_arrived(time.perf_counter() - asked)
            yield batch

    def _part_groups(self) -> int:
        """Into how many groups the parts of label maps are put; 0 where no loss reads them."""
        model, folder = self.config.model, self.config.data.folder
        if model.label_groups and not has_part_labels(folder):
            if model.orientation.learns_from_labels:
                raise ConfigError(
                    f"model.orientation.reads is parts, but {folder} has no label maps to learn "
                    "them from: write some (docs/parts.md), or set model.orientation.reads=rays"
                )
            logger.warning("%s has no label maps: the part_labels loss is 0", folder)
        return model.label_groups

    def _iteration(self, batch: Batch) -> None:
        batch = batch.to(self.accelerator.device, non_blocking=True)
        iteration, share = self.progress.iteration, self.deformation_share
        self.lr = self.schedule(iteration)
        self.losses = self.step(
            batch.pixels(),
            batch.identities,
            batch.views,
            batch.label_maps(),
            lr=self.lr,
            ltps_factor=self.ltps_factor(iteration),
            deformation_share=None if share is None else share(iteration),
        )

    def loss_rows(self) -> Tensor:
        """Losses of the iterations since they were last read, mean over the processes."""
        rows: Tensor = self.accelerator.reduce(self.meter.rows(), reduction="mean")
        return rows

    def check_losses(self) -> None:
        """Make sure that no loss went wrong since they were last read.

        Raises:
            NonFiniteLossError: one did; on every process.
        """
        if len(self.meter):
            self.meter.check(self.loss_rows())

    def save(self) -> Path:
        """Save the state of the run; to be called by all processes.

        Returns:
            Where it is.

        Raises:
            NonFiniteLossError: a loss went wrong, so that the state is not worth keeping.
        """
        self.check_losses()
        accelerator = self.accelerator
        random = {
            name: gather_rows(accelerator, state.unsqueeze(0))
            for name, state in random_state(accelerator.device).items()
        }
        if accelerator.scaler is not None:
            self.progress.scaler = dict(accelerator.scaler.state_dict())
        if accelerator.is_main_process:
            save_state(
                self.folder.state,
                model=self.network,
                optimizer=getattr(self.optimizer, "optimizer", self.optimizer),
                random=random,
                progress=self.progress,
            )
        # When this returns, the file is there for everyone.
        accelerator.wait_for_everyone()
        return self.folder.state

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let Ctrl-C act at once inside the block, which must leave nothing half done."""
        # Several processes must stop in the same place, or they wait for each other for ever.
        self._stop.immediate = self.accelerator.num_processes == 1
        try:
            yield
        finally:
            self._stop.immediate = False

    def _must_stop(self) -> bool:
        if self.accelerator.num_processes == 1:
            return bool(self._stop.received)
        if self.progress.iteration % self.config.training.log_every:
            return False
        mine = torch.tensor(float(bool(self._stop.received)), device=self.accelerator.device)
        return bool(self.accelerator.reduce(mine, reduction="sum") > 0)

    def _stopped(self) -> RunStopped:
        done = self.progress.iteration
        if not self._between_iterations:
            return RunStopped(f"stopped inside iteration {done}; nothing was saved")
        path = self.save()
        logger.info("stopped after iteration %d; state saved in %s", done, path)
        return RunStopped(f"stopped after iteration {done} of {self.total}; --resume continues it")
