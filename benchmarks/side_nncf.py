"""AWQ and scale estimation by NNCF on its torch backend: asymmetric 4 bits, its only such width."""

from __future__ import annotations

from importlib.metadata import version

import nncf
import numpy as np
import torch
from meter import metered
from nncf.torch.function_hook.wrapper import get_hook_storage
from stock import stock
from worker import BITS_OF, hand_over, read_job

LEFT_ALONE = [".*lm_head.*", ".*embed_tokens.*", ".*embeddings.*", ".*relative_attention_bias.*"]


def main() -> None:
    job = read_job()
    model = stock(job)
    ids = torch.from_numpy(np.load(job.calibration)[: job.sequences])
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    with metered() as cost:
        packed = nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode.INT4_ASYM,
            group_size=job.group,
            ratio=1.0,
            backup_mode=nncf.BackupMode.NONE,
            # By itself it leaves the last linear alone, which of a language model is the head.
            all_layers=job.task == "embed",
            ignored_scope=nncf.IgnoredScope(patterns=LEFT_ALONE, validate=False),
            dataset=nncf.Dataset(rows),
            subset_size=job.sequences,
            awq=True,
            scale_estimation=True,
        )
    weights = {}
    for place, unpack in get_hook_storage(packed).post_hooks.items():
        name = place.removesuffix("__0").replace(":", ".")
        (only,) = unpack.values()
        weights[name] = only(packed.get_parameter(name))
    if set(weights) != {f"{name}.weight" for name in names}:
        raise SystemExit("NNCF left linears as they are, or changed others")
    versions = {name: version(name) for name in ("nncf", "transformers")}
    hand_over(job, cost, weights, scale_bits=BITS_OF[torch.float16], zero_bits=job.bits, versions=versions)


if __name__ == "__main__":
    main()
