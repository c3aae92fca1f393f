"""A student taught by TRL's GKD loss in transformers' Trainer, on given windows."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

try:
    from trl.experimental.gkd import GKDTrainer
except ImportError:
    from trl import GKDTrainer


class Taught(Trainer):
    """A Trainer with the generalised JSD of GKD; lmbda 0: all text is given."""

    teacher: torch.nn.Module
    beta: float

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of whole logits, float32."""
        ids = inputs["input_ids"]
        with torch.no_grad():
            teacher = self.teacher(input_ids=ids, use_cache=False).logits[:, :-1]
        student = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return GKDTrainer.generalized_jsd_loss(
            student.float(),
            teacher.float(),
            labels=ids[:, 1:],
            beta=self.beta,
            temperature=1.0,
            reduction="batchmean",
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("student", "teacher", "tokens", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--beta", type=float, required=True)
    parser.add_argument("--bf16", action="store_true", help="both models multiply in bfloat16 (autocast)")
    chosen = parser.parse_args()
    ids = np.load(chosen.tokens)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (chosen.student, chosen.teacher)
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=chosen.batch,
            num_train_epochs=1,
            learning_rate=chosen.rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, len(ids) // chosen.batch // 20),
            max_grad_norm=1.0,
            weight_decay=0.01,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=chosen.bf16,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        rows = [{"input_ids": torch.from_numpy(row)} for row in ids.astype(np.int64)]
        trainer = Taught(model=student, args=arguments, train_dataset=rows)
        trainer.teacher, trainer.beta = teacher.eval().requires_grad_(False), chosen.beta
        trainer.train()
    student.save_pretrained(chosen.out)


if __name__ == "__main__":
    main()
