"""Mixtures with experts in int8, beside 16 bit: one layer's forward pass, and a model's load and generation.

python -m benchmarks.experts --json out.json                # on a GPU: all of it, with as many layers as the disk holds
python -m benchmarks.experts --part forward                 # on the CPU, too: of a small shape, beside Linear8bitLt
python -m benchmarks.experts --smoke                        # small ones, on the CPU: that it runs

A layer's time is that of a CUDA graph of several forward passes, each with other experts chosen, so that the weights
come from the GPU's memory, and not from its cache. Its error is that of its output against fp32, beside the error that
rounding the weights to int8 makes alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import ceilings, machine, page_cache
from benchmarks.checkpoints import CONFIGS, make
from benchmarks.contenders import DEVICE, ON_GPU, shards

_GB, _NAME = 1e9, "qwen3-30b-a3b"
_PARTS = ("forward", "load", "generate")
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 512, 4096)
_FEW_TOKENS = (1, 16, 256)  # of a CPU
_MOST_BATCHED = 16  # batched_mm reads an expert's weights for every token
_SPARE = 4 * 10**9  # of the disk


class Shape(NamedTuple):
    experts: int
    k: int
    hidden: int
    inner: int


_SHAPES = {
    "Qwen3-30B-A3B": Shape(128, 8, 2048, 768),
    "Mixtral-8x7B": Shape(8, 2, 4096, 14336),
    "DeepSeek-V3": Shape(256, 8, 7168, 2048),
}
_SMALL = {"small": Shape(16, 4, 1024, 512)}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=_PARTS, help="default: all")
    parser.add_argument("--layers", type=int, help="of the model; default: 48, or what the disk holds")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--spread", dest="where", action="store_const", const="balanced", default=DEVICE, help="load onto all GPUs"
    )
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/pyint8-benchmarks"), help="for the checkpoint")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--smoke", action="store_true", help="that it runs")
    parsed = parser.parse_args(arguments)
    parsed.part = parsed.part or list(_PARTS)
    if parsed.smoke:
        parsed.layers, parsed.runs, parsed.new_tokens = 1, 1, 4
    return parsed


def layers(shape: Shape) -> tuple[Any, Any]:
    """transformers' own module of experts in bf16, with random weights, and the same in int8."""
    import bitsandbytes as bnb
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from pyint8.quantizer import EXPERT_SCALES
    from pyint8.quantizer.experts.modules import make_int8

    config = Qwen3MoeConfig(
        hidden_size=shape.hidden, moe_intermediate_size=shape.inner, num_experts=shape.experts,
        num_experts_per_tok=shape.k,
    )  # fmt: skip
    with torch.device("meta"):
        theirs, ours = Qwen3MoeExperts(config).to(torch.bfloat16), Qwen3MoeExperts(config)
    make_int8(ours)
    theirs, ours = theirs.to_empty(device=DEVICE).requires_grad_(False), ours.to_empty(device=DEVICE)
    for name, weight in theirs.named_parameters():
        for expert in range(shape.experts):
            weight[expert].normal_(0, 0.02)
            codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight[expert].half())
            getattr(ours, name)[expert], getattr(ours, name + EXPERT_SCALES)[expert] = codes, scales
    return theirs, ours


class OneByOne(torch.nn.Module):
    """The same weights as a `Linear8bitLt` for each expert, called one by one, as modules of their own."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        both = [(ours.gate_up_proj, ours.gate_up_proj_SCB), (ours.down_proj, ours.down_proj_SCB)]
        self.layers = [[_linear(codes[e], scales[e]) for codes, scales in both] for e in range(len(both[0][0]))]

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            token, place = (ids == expert).nonzero(as_tuple=True)
            first, second = self.layers[expert]
            gate, up = first(x[token]).chunk(2, dim=-1)
            outer = second(torch.nn.functional.silu(gate) * up) * weights[token, place].unsqueeze(-1)
            total.index_add_(0, token, outer.to(x.dtype))
        return total


def _linear(codes: torch.Tensor, scales: torch.Tensor) -> Any:
    import bitsandbytes as bnb

    made = bnb.nn.Linear8bitLt(*reversed(codes.shape), bias=False, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    return made


def routes(shape: Shape, tokens: int, count: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Activations, the experts of each token, and their weights, `count` times."""
    generator = torch.Generator(DEVICE).manual_seed(tokens)
    for _ in range(count):
        x = torch.randn(tokens, shape.hidden, device=DEVICE, generator=generator).to(torch.bfloat16)
        ids = torch.rand(tokens, shape.experts, device=DEVICE, generator=generator).topk(shape.k).indices
        weights = torch.rand(tokens, shape.k, device=DEVICE, generator=generator)
        yield x, ids, (weights / weights.sum(-1, keepdim=True)).to(torch.bfloat16)


def microseconds(module: Any, inputs: list[tuple[torch.Tensor, ...]], runs: int) -> float:
    """The median time of a forward pass: on a GPU within a graph of all inputs."""

    def work() -> None:
        for one in inputs:
            module(*one)

    work()
    if not ON_GPU:
        return statistics.median(_seconds(work) for _ in range(runs)) * 1e6 / len(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(inputs))
    return statistics.median(times)


def errors(theirs: Any, ours: Any, one: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """Of the output against fp32, relative: ours, that of rounded weights alone, and that of 16 bit."""
    x, ids, weights = one
    exact, rounded = torch.zeros(len(x), x.shape[1], device=DEVICE), torch.zeros(len(x), x.shape[1], device=DEVICE)
    for expert in ids.unique().tolist():
        token, place = (ids == expert).nonzero(as_tuple=True)
        for total, wide in ((exact, _wide_16(theirs, expert)), (rounded, _wide_8(ours, expert))):
            gate, up = (x[token].float() @ wide[0].t()).chunk(2, dim=-1)
            outer = (torch.nn.functional.silu(gate) * up) @ wide[1].t()
            total.index_add_(0, token, outer * weights[token, place].float().unsqueeze(-1))
    found = {"int8": ours(x, ids, weights), "rounded weights alone": rounded, "16 bit": theirs(x, ids, weights)}
    return {name: ((value.float() - exact).norm() / exact.norm()).item() for name, value in found.items()}


def _wide_16(theirs: Any, expert: int) -> list[torch.Tensor]:
    return [theirs.gate_up_proj[expert].float(), theirs.down_proj[expert].float()]


def _wide_8(ours: Any, expert: int) -> list[torch.Tensor]:
    both = (ours.gate_up_proj, ours.gate_up_proj_SCB), (ours.down_proj, ours.down_proj_SCB)
    return [codes[expert].float() * scales[expert].unsqueeze(-1) / 127 for codes, scales in both]


@torch.no_grad()
def forward(parsed: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, shape in (_SHAPES if ON_GPU and not parsed.smoke else _SMALL).items():
        theirs, ours = layers(shape)
        results[name] = {"shape": shape._asdict(), "tokens": {}}
        for tokens in (1, 4) if parsed.smoke else _TOKENS if ON_GPU else _FEW_TOKENS:
            inputs = list(routes(shape, tokens, 8 if tokens <= 64 else 2))
            found: dict[str, Any] = {}
            for how in ("grouped_mm", "batched_mm"):
                if how == "grouped_mm" or tokens <= _MOST_BATCHED:
                    theirs.config._experts_implementation = how
                    found[how] = microseconds(theirs, inputs, parsed.runs)
            theirs.config._experts_implementation = "grouped_mm"
            best = min(found.values())
            if not ON_GPU:
                found["Linear8bitLt, one by one"] = microseconds(OneByOne(ours), inputs, parsed.runs)
            found["int8"] = microseconds(ours, inputs, parsed.runs)
            found["ratio"] = found["int8"] / best
            found["errors"] = errors(theirs, ours, inputs[0])
            results[name]["tokens"][tokens] = found
            print(
                f"{name}, {tokens} tokens: {best:.0f} us in 16 bit, {found['int8']:.0f} in int8, {found['ratio']:.2f}"
            )
        del theirs, ours
        _tidy()
    return results


def checkpoint(parsed: argparse.Namespace) -> Path:
    if parsed.layers is None:
        parsed.folder.mkdir(parents=True, exist_ok=True)
        own = CONFIGS[_NAME]
        layer = 2 * own["num_experts"] * 3 * own["hidden_size"] * own["moe_intermediate_size"]
        rest = 4 * own["vocab_size"] * own["hidden_size"]
        room = shutil.disk_usage(parsed.folder).free - _SPARE - rest
        parsed.layers = min(own["num_hidden_layers"], int(room // (1.05 * layer)))
    name = "qwen3-moe" if parsed.smoke else _NAME
    return make(name, parsed.folder / f"{name}-{parsed.layers}", num_hidden_layers=parsed.layers)


def load(parsed: argparse.Namespace) -> dict[str, Any]:
    """Loads of one process: seconds beside the bus, and memory."""
    import pyint8

    folder = checkpoint(parsed)
    nbytes = sum(path.stat().st_size for path in shards(folder))
    page_cache.prepare(shards(folder), "hot")
    bus = ceilings.host_to_gpu(pinned=True)
    results: dict[str, Any] = {"bytes": nbytes, "bus_seconds": nbytes / _GB / bus if bus else None}
    results["gpus"] = gpus = torch.cuda.device_count() if parsed.where == "balanced" else int(ON_GPU)
    ours = partial(pyint8.load, folder, parsed.where, dtype=torch.bfloat16, progress=False, return_report=True)
    for what, config in (("int8 experts", pyint8.Int8Config(experts=True)), ("16-bit experts", None)):
        seconds = []
        for _ in range(parsed.runs):
            model, report = ours(config=config)
            seconds.append(report.total_seconds)
            final = {f"cuda:{gpu}": torch.cuda.memory_allocated(gpu) for gpu in range(gpus)}
            del model
            _tidy()
        results[what] = {
            "seconds": seconds,
            "later": statistics.median(seconds[1:] or seconds),
            "gpu_final": final,
            "gpu_peak": report.device_peak_bytes,
            "host_peak": report.host_peak_bytes,
            "read_times": report.engine["bytes_read"] / nbytes,
            "report": report.to_dict(),
        }
        shown = " ".join(f"{each:.2f}" for each in seconds)
        print(f"load, {what}: {shown} s; all bytes read {results[what]['read_times']:.2f} times", flush=True)
    print(f"the bus alone: {results['bus_seconds']} s for {nbytes / _GB:.1f} GB")
    return results


@torch.no_grad()
def generate(parsed: argparse.Namespace) -> dict[str, Any]:
    """New tokens a second at batch 1 and 16, and the memory of the model."""
    import transformers

    import pyint8

    folder = checkpoint(parsed)
    results: dict[str, Any] = {}
    ours = partial(pyint8.load, folder, DEVICE, dtype=torch.bfloat16, progress=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained
    loaders: dict[str, Callable[[], Any]] = {
        "int8 experts": partial(ours, config=pyint8.Int8Config(experts=True)),
        "16-bit experts": ours,
        "16 bit": partial(theirs, folder, device_map=DEVICE, dtype=torch.bfloat16),
    }
    for what, loader in loaders.items():
        model = loader()
        results[what] = {"bytes": torch.cuda.memory_allocated() if ON_GPU else None}
        for batch in (1, 16):
            tokens = torch.arange(100, 100 + 32 * batch, device=DEVICE).view(batch, 32)
            seconds = [_seconds_to_write(model, tokens, parsed.new_tokens) for _ in range(3)]
            results[what][f"seconds, batch {batch}"] = seconds
            results[what][f"tokens a second, batch {batch}"] = batch * parsed.new_tokens / min(seconds[1:])
        print(f"generation, {what}: {results[what]}")
        del model
        _tidy()
    return results


def _seconds_to_write(model: Any, tokens: torch.Tensor, count: int) -> float:
    return _seconds(lambda: model.generate(tokens, max_new_tokens=count, min_new_tokens=count, do_sample=False))


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _tidy() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # of no effect without a GPU


def main() -> int:
    parsed = parse(sys.argv[1:])
    results: dict[str, Any] = {"machine": machine.describe(parsed.folder)}
    for part in parsed.part:
        results[part] = {"forward": forward, "load": load, "generate": generate}[part](parsed)
        if parsed.json:  # after each, so that what was measured is not lost
            parsed.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
