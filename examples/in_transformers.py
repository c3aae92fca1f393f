"""Load a finished folder with stock transformers, without Pocketsize, and let it write.

python examples/in_transformers.py OUT --prompt 'The sea is'

It needs compressed-tensors.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", nargs="?", default="demo", help="with an export `folder` in it")
    parser.add_argument("--prompt", default="The sea is")
    parser.add_argument("--tokens", type=int, default=40)
    given = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(given.folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(given.folder, local_files_only=True, dtype=torch.bfloat16)
    prompt = tokenizer(given.prompt, return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=given.tokens, do_sample=False)
    print(tokenizer.decode(ids[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
