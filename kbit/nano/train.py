"""Trains a nano model on the CPU and exports it: the recipe of the embedded families.

    python -m kbit.nano.train family=opt size=332k data=FOLDER out=FOLDER

The optimizer is AdamW with betas 0.9 and 0.95 and a weight decay of 0.1 on matrices. The gradient norm is clipped at 1.
The learning rate rises linearly over 5% of the steps and then falls as a cosine to 10% of its peak. A step has 16
windows of 256 tokens, in bfloat16 autocast over float32 weights.

OUT/nano-<family>-<size> is the model folder (see export.py). Beside it are a checkpoint and a CSV of the losses. After
an interruption the same command goes on at the checkpoint. It ends at the same weights as an undisturbed run, because
every batch depends on seed and step alone. Bit-equal results need the same number of threads, CPU type and torch.
nano-neox was trained with this recipe, but its batches were drawn in another way. Training it again gives another model
of the family.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from tqdm import tqdm
from transformers import AutoTokenizer

from kbit.checks import KbitError, check_choice
from kbit.cli.hydra.explain import explained
from kbit.models.catalog import locate_model
from kbit.nano.architectures import CONTEXT, FAMILIES, SIZES, build_model
from kbit.nano.data import read_training_documents
from kbit.nano.export import Training, export_model
from kbit.silence import silence_libraries
from kbit.training import loop
from kbit.training.batches import Tokens, tokenize_stream
from kbit.training.checkpoint import read_checkpoint, write_checkpoint
from kbit.training.config import MAX_SEED, MAX_STEPS
from kbit.training.loop import schedule_lr, take_steps
from kbit.training.optimizers import group_parameters

BETAS: Final = (0.9, 0.95)
WEIGHT_DECAY: Final = 0.1
LOG_EVERY: Final = 10  # steps that one row of the CSV averages


@dataclass
class TrainConfig:
    """What to train: the schema of `python -m kbit.nano.train`.

    Attributes:
        family: neox, gpt2, opt or bloom.
        size: 98k, 332k, 1m, 3m or 7m.
        data: folder of the training text (see data.py).
        out: folder for the model, its checkpoint and its losses.
        tokens: training length in tokens. None is that of the shipped models of this size.
        lr: peak learning rate. None is the size's.
        batch_size: number of windows of 256 tokens in a step.
        seed: seed of the first weights and of the batches.
        threads: number of CPU threads.
        checkpoint_every: number of steps between checkpoints.
    """

    family: str = "gpt2"
    size: str = "98k"
    data: str = MISSING
    out: str = "nano"
    tokens: int | None = None
    lr: float | None = None
    batch_size: int = 16
    seed: int = 0
    threads: int = 1
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        check_choice("family", self.family, FAMILIES)
        check_choice("size", self.size, tuple(SIZES))
        for name in ("tokens", "lr", "batch_size", "threads", "checkpoint_every"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name}={value} is not > 0")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed={self.seed} is not in 0..{MAX_SEED}")
        if self.steps > MAX_STEPS:
            raise ValueError(f"{self.steps} steps are more than {MAX_STEPS}: lower tokens or raise batch_size")

    @property
    def name(self) -> str:
        """The model's name."""
        return f"nano-{self.family}-{self.size}"

    @property
    def steps(self) -> int:
        """The number of optimizer steps that cover the tokens."""
        tokens = self.tokens or SIZES[self.size].tokens
        return math.ceil(tokens / (self.batch_size * CONTEXT))

    @property
    def peak_lr(self) -> float:
        """The highest learning rate."""
        return self.lr or SIZES[self.size].peak_lr

    @property
    def content(self) -> dict[str, Any]:
        """The settings that decide the weights. A checkpoint of another content is refused."""
        return {"family": self.family, "size": self.size, "steps": self.steps, "lr": self.peak_lr} | {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "threads": self.threads,
        }


@dataclass
class State(loop.State):
    """A training in progress.

    Attributes:
        losses: rows of the CSV: (step, mean loss of the steps since the last row in nats a token).
        recent: losses of the steps since the last row.
        cpu_seconds: CPU time spent so far, which does not count pauses as wall time would.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0


def make_state(config: TrainConfig) -> State:
    """Return the state before the first step."""
    model = build_model(config.family, config.size, config.seed)
    groups = group_parameters(model, WEIGHT_DECAY)
    return State(model, torch.optim.AdamW(groups, lr=config.peak_lr, betas=BETAS, fused=True))


def train(config: TrainConfig, stream: Tokens, *, stop_at: int | None = None) -> State:
    """Train to the last step, or to `stop_at`, from the checkpoint in `config.out` if there is one.

    Raises:
        ValueError: the checkpoint belongs to another configuration, or a loss is not finite.
    """
    torch.set_num_threads(config.threads)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    state = make_state(config)
    restore_checkpoint(config, state)
    recipe = loop.Recipe(config.steps, config.peak_lr, config.batch_size, CONTEXT, config.seed)
    until = min(config.steps, stop_at or config.steps)
    steps = take_steps(state, stream, recipe, until=until)
    began = time.process_time()
    for loss in tqdm(steps, config.name, initial=state.step, total=config.steps, mininterval=5):
        if not math.isfinite(loss):
            raise ValueError(
                f"{config.name}: the loss of step {state.step - 1} is {loss}; try a lower lr than {config.peak_lr:g}"
            )
        _log_loss(state, loss)
        if state.step % config.checkpoint_every == 0 or state.step == until:
            state.cpu_seconds += time.process_time() - began
            began = time.process_time()
            save_checkpoint(config, state)
    return state


def save_checkpoint(config: TrainConfig, state: State) -> None:
    """Write the state, and the losses as CSV, so that an interruption at any moment leaves a whole checkpoint."""
    content = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    content |= {"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict()}
    write_checkpoint(_checkpoint_path(config), content, config.content)
    with (Path(config.out) / f"{config.name}.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["step", "tokens", "lr", "loss"])
        for step, loss in state.losses:
            lr = schedule_lr(step - 1, config.steps, config.peak_lr)
            rows.writerow([step, step * config.batch_size * CONTEXT, f"{lr:.3e}", f"{loss:.4f}"])


def restore_checkpoint(config: TrainConfig, state: State) -> None:
    """Set the state to that of the checkpoint, if there is one.

    Raises:
        ValueError: the checkpoint is damaged, or belongs to another configuration.
    """
    saved = read_checkpoint(_checkpoint_path(config), config.content)
    if saved is None:
        return
    state.model.load_state_dict(saved["model"])
    state.optimizer.load_state_dict(saved["optimizer"])
    for name in ("step", "losses", "recent", "cpu_seconds"):
        setattr(state, name, saved[name])


def _checkpoint_path(config: TrainConfig) -> Path:
    return Path(config.out) / f"{config.name}.checkpoint"


def _log_loss(state: State, loss: float) -> None:
    state.recent.append(loss)
    if state.step % LOG_EVERY == 0:
        state.losses.append((state.step, sum(state.recent) / len(state.recent)))
        state.recent.clear()


def run_training(config: TrainConfig) -> Path:
    """Read the text, train and export a model, and return its folder."""
    silence_libraries()
    tokenizer = AutoTokenizer.from_pretrained(locate_model("nano-neox-98k"))
    documents = read_training_documents(config.data)
    stream = tokenize_stream(documents, tokenizer)
    state = train(config, stream)
    training = Training(
        name=config.name,
        content=config.content,
        tokens=config.steps * config.batch_size * CONTEXT,
        stream_tokens=len(stream),
        documents=len(documents),
        options={f.name: getattr(config, f.name) for f in dataclasses.fields(config) if _is_chosen(config, f)},
        cpu_seconds=state.cpu_seconds,
        losses=Path(config.out) / f"{config.name}.csv",
    )
    return export_model(state.model, tokenizer, training, Path(config.out) / config.name)


def _is_chosen(config: TrainConfig, option: dataclasses.Field[Any]) -> bool:
    """Return whether an option decides the weights and is not at its default."""
    decides = option.name in ("family", "size", "tokens", "lr", "batch_size", "seed", "threads")
    return decides and (option.name in ("family", "size") or getattr(config, option.name) != option.default)


ConfigStore.instance().store(name="train_schema", node=TrainConfig)


def main() -> None:
    """Run the command line that the module's docstring describes."""
    composed: list[DictConfig] = []

    @hydra.main(version_base="1.3", config_path="pkg://kbit.nano", config_name="train")
    def receive(config: DictConfig) -> None:
        OmegaConf.resolve(config)  # while Hydra's own values can be read
        composed.append(config)

    try:
        with explained(TrainConfig):
            receive()
        for config in composed:
            train_config = OmegaConf.to_object(config)
            assert isinstance(train_config, TrainConfig)  # the schema says so
            print(run_training(train_config))
    except MissingMandatoryValue:
        sys.exit("kbit.nano.train: error: data=FOLDER is missing: the training text, see kbit/nano/data.py")
    except (KbitError, ValueError, OSError) as error:
        sys.exit(f"kbit.nano.train: error: {error}")


if __name__ == "__main__":
    main()
