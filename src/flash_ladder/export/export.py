"""What scripts/export.py does: a run's checkpoint becomes a folder, which is read back from the disk and evaluated.

The evaluation runs on the training's backend and on eager. It must find the loss that training wrote down.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from flash_ladder.data.batches import TextData, validated
from flash_ladder.data.tokenizer import Tokenizer
from flash_ladder.errors import UserError
from flash_ladder.export.folder import FILES, load_export, load_windows, write_export
from flash_ladder.export.losses import Windows
from flash_ladder.export.parity import compare
from flash_ladder.export.to_wandb import REMEMBERED, log_evaluation, wandb_of
from flash_ladder.export.verdict import describe_windows, record, report, same_loss
from flash_ladder.files import checksum, read_json, replace_folder, write_json
from flash_ladder.kernels.generations import describe
from flash_ladder.machine.decide import check_precision, pick_backend, pick_device
from flash_ladder.machine.hardware import versions
from flash_ladder.model.gpt import GPT
from flash_ladder.model.weights import load_tensors, load_weights
from flash_ladder.model_schema import ModelConfig
from flash_ladder.names import WINDOWS, is_kernel
from flash_ladder.schema import DataConfig
from flash_ladder.script_schema import ExportConfig
from flash_ladder.training.checkpoint import load_run

DATA_KEYS = ("source", "hub_name", "hub_config", "hub_split", "tokenizer", "seq_len", "val_fraction", "document_ids")


def export_run(cfg: ExportConfig) -> int:
    """Exports a run's checkpoint, evaluates the written folder and prints a table; returns 1 where a figure is beyond its limit.

    Raises UserError where the run, its checkpoint or its text cannot be read, and where the target cannot be written.
    """
    run = Path(cast("str", cfg.run))  # validate() refuses a missing one
    out = Path(cfg.out) if cfg.out else run / "export"
    config, weights, training = load_run(run, cfg.checkpoint)
    training |= training_environment(run)
    model = GPT(ModelConfig(**config["model"]))
    load_weights(model, weights, training["checkpoint"])
    print(f"checkpoint: {training['checkpoint']}, step {training['step']}")

    device = pick_device(cfg.device)
    precision = training["precision"] if cfg.precision == "auto" else cfg.precision
    check_precision(precision, device, "precision")
    backend = training_backend(cfg, training, config, device, precision)
    windows, as_validated = validation_windows(run, config, training, cfg)

    about = {
        "training": training | {"checkpoint": Path(training["checkpoint"]).name},
        "data": {key: config["data"][key] for key in DATA_KEYS},
        "versions": versions(),
    }
    if in_wandb := wandb_of(run, config):
        about["wandb"] = {key: in_wandb.get(key) for key in REMEMBERED}
    with replace_folder(out, FILES) as folder:
        write_export(folder, model, Tokenizer.load(run), windows, about)
        del model, weights, windows  # from here on, only the written folder counts
        model, _, written = load_export(folder, device=device)
        windows = load_windows(folder, written)
        print(f"evaluating: {describe_windows(windows)}, precision {precision}, {describe(device)}")
        parity = compare(model, windows, backend=backend, precision=precision, batch_size=cfg.batch_size)
        losses = {backend: parity.candidate.loss, "eager": parity.against.loss}
        checks = [] if backend == "eager" else parity.checks()
        if as_validated and precision == training["precision"] and training["val_loss"] is not None:
            losses = {"training": training["val_loss"], **losses}
            checks.append(same_loss("training", training["val_loss"], parity.candidate, parity.rounding))
        write_json(folder / "parity.json", record(parity, checks, device), sealed=True)
    code = report(losses, checks, f"{backend} against eager", f"exported to {out}")
    if in_wandb:
        log_evaluation(run, in_wandb, cfg.wandb, parity.candidate, parity, checks, describe(device), training["step"])
    return code


def training_environment(run: Path) -> dict[str, Any]:
    """Where and on what text a run was trained, from its environment.json."""
    there = read_json(run / "environment.json")
    try:
        return {
            "device": there["gpu"] or "CPU",
            "n_devices": there["n_devices"],
            "precision": there["precision"]["precision"],
            "attention": there["attention"]["backend"],
            "corpus": there["data"]["corpus"],
        }
    except (KeyError, TypeError) as error:
        raise UserError(f"{run / 'environment.json'} was not written by train.py: it has no {error}") from None


def training_backend(
    cfg: ExportConfig, training: dict[str, Any], config: dict[str, Any], device: torch.device, precision: str
) -> str:
    """The backend to compare with eager: the one named, or the training's, or eager itself where that one cannot run here.

    A backend that cannot run here is reported, not replaced: the table then has eager's loss beside the training's record.
    """
    model, documents = ModelConfig(**config["model"]), config["data"]["document_ids"]
    if cfg.attention != "auto":
        return pick_backend(cfg.attention, model, device, precision, documents).backend
    trained = training["attention"]
    try:
        pick_backend(trained, model, device, precision, documents)
    except UserError as error:
        why_not = str(error)
    else:
        if device.type != "cpu" or training["device"] == "CPU" or not is_kernel(trained):
            return trained
        why_not = f"a CPU would only interpret it, which is slow; attention={trained} does so all the same"
    print(f"note: the model was trained with {trained} on {training['device']}, and that is not compared here: {why_not}")
    return "eager"


def validation_windows(run: Path, config: dict[str, Any], training: dict[str, Any], cfg: ExportConfig) -> tuple[Windows, bool]:
    """The run's first validation windows, and whether its training validated on the same ones.

    They are those that the run kept, or where they do not suffice (more are asked for, or another length), taken from its text.
    """
    data, val_batches = DataConfig(**config["data"]), config["trainer"]["val_batches"]
    about = read_json(run / "environment.json")["data"]
    readers = training["n_devices"] // config["trainer"].get("context_parallel", 1)
    windows = kept_windows(run / WINDOWS, about, data)
    if windows is not None:
        n_validated, _ = validated(about["n_val_tokens"], data, val_batches, readers)
    if windows is None or len(windows["tokens"]) < (cfg.windows or n_validated):
        text = text_of_run(run, config, training)
        n_validated, _ = text.validated(readers)
        windows = text.val_windows(cfg.windows or n_validated)
    windows = {name: rows[: cfg.windows or n_validated] for name, rows in windows.items()}
    whole = cfg.seq_len is None or cfg.seq_len >= data.seq_len
    if cfg.seq_len is not None and not whole:
        extra = {"tokens": 1, "document_ids": 0}
        windows = {name: rows[:, : cfg.seq_len + extra[name]] for name, rows in windows.items()}
    return windows, whole and len(windows["tokens"]) == n_validated


def kept_windows(path: Path, about: dict[str, Any], data: DataConfig) -> Windows | None:
    """The windows that a run keeps; None where it keeps none of that length, or its file was changed. about: the run's record."""
    if not path.is_file() or checksum(path) != about.get("windows_sha256"):
        return None
    windows = load_tensors(path)
    fits = windows["tokens"].shape[1] == data.seq_len + 1 and ("document_ids" in windows) == data.document_ids
    return {**windows, "tokens": windows["tokens"].long()} if fits else None


def text_of_run(run: Path, config: dict[str, Any], training: dict[str, Any]) -> TextData:
    """The text that a run was trained on. Raises UserError where this machine has another one."""
    text = TextData(DataConfig(**config["data"]), seed=config["seed"], val_batches=config["trainer"]["val_batches"])
    text.prepare()
    if text.stats.corpus != training["corpus"] or text.tokenizer.fingerprint != Tokenizer.load(run).fingerprint:
        raise UserError(
            f"the text that run={run} was trained on (data.source={text.cfg.source}) is another one on this machine, "
            f"so there is no validation split to evaluate on; export it where it was trained"
        )
    return text
