"""The loop that people write: transformers' Trainer, and TRL's forward KL over whole logits."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from meter import peak_rss_bytes, write_json
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

try:
    from trl.experimental.gkd import GKDTrainer
except ImportError:
    from trl import GKDTrainer


class Taught(Trainer):
    """A Trainer whose loss is KL(teacher || student) at every position but the last."""

    teacher: torch.nn.Module

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss as GKD has it with beta 0."""
        ids = inputs["input_ids"]
        with torch.no_grad():
            teacher = self.teacher(input_ids=ids, use_cache=False).logits[:, :-1]
        student = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return GKDTrainer.generalized_jsd_loss(
            student, teacher, labels=ids[:, 1:], beta=0.0, temperature=1.0, reduction="batchmean"
        )


class Clock(TrainerCallback):
    """CPU seconds at the end of each step, and its loss."""

    def __init__(self) -> None:
        self.at = [time.process_time()]

    def on_step_end(self, args, state, control, **kwargs):
        """A step is over."""
        self.at.append(time.process_time())


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("student", "teacher", "tokens", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), required=True)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    ids = np.load(chosen.tokens)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (chosen.student, chosen.teacher)
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=chosen.batch,
            max_steps=len(ids) // chosen.batch,
            learning_rate=1e-4,
            max_grad_norm=1.0,
            weight_decay=0.01,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=chosen.precision == "bf16",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
        )
        rows = [{"input_ids": torch.from_numpy(row)} for row in ids.astype(np.int64)]
        trainer = Taught(model=student, args=arguments, train_dataset=rows, callbacks=[clock])
        trainer.teacher = teacher.eval().requires_grad_(False)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    facts = {"cpu_s": np.diff(clock.at).tolist(), "losses": losses, "rss_peak": peak_rss_bytes()}
    write_json(chosen.out, facts)


if __name__ == "__main__":
    main()
