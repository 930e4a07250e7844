"""Train a fair pair of small models, with and without RAT+'s memory, and convert the one without.

    python examples/train_rat_plus.py --source ~/some/python/packages --output pair --minutes 9

Four models end up below --output, the later two from the first:

    dense        a Llama of the example model's shape
    memory       the same with a decaying memory over keys and values: same data, tokens and seed
    converted    dense with the memory added, its gates partly open, trained on for a short time
    continued    dense trained on for as long, on the same data: what converted is compared with

The first two are trained in two stages; what the first stage leaves is in first/dense and first/memory. Data and recipe
of the first are the example model's (train_example_model.py), with the needles of vllm_rc_backend.evaluation.needles as
the only synthetic tasks beside copying. It leaves several values of one key in the order of their needles unlearned:
all that is unknown there is the first digit of each, a few tokens of thousands. The second stage, and what follows it,
asks for more of that, of several keys at a time, and begins with short contexts.

After --minutes the state is saved; the same command goes on from there. Every batch is a function of the seed and the
step alone, so an interrupted run sees the data of an uninterrupted one. With several GPUs, --only lets one command
train dense and another memory; each model needs the one that it begins as.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from train_example_model import DECAY, EXAMPLE, QUESTION, STAGES, SYNTHETIC, Corpus, Sequences

from vllm_rc_backend.decaying_memory import remember
from vllm_rc_backend.evaluation.needles import NEEDLES, NOISE, identifier
from vllm_rc_backend.evaluation.text import HELD_OUT_PACKAGES

COPIES = 0.06  # share of the synthetic sequences
FOCUS = {"multi_value": 0.5, "multi_key_3": 0.2}  # shares of the needle tasks from the second stage on
SECOND_STAGE = 0.3  # of the steps
SECOND_RATE = 0.5  # of the learning rate
CONVERSION = 0.15  # of the steps
CONVERSION_RATE = 1.0  # of the learning rate
GATES = (-4.0, 0.0)
"""Logits of a converted model's gates at first, from the pair of channels that RoPE turns fastest to the slowest: what
tells neighbours apart keeps 2 % of the past, so that it still does, and what tells contents apart half of it."""
MODELS = ("first/dense", "first/memory", "dense", "memory", "converted", "continued")


class Block(nn.Module):
    """A Llama layer; parameters are named as in its checkpoints."""

    def __init__(self, config: dict[str, Any], memory: bool) -> None:
        super().__init__()
        hidden, size = config["hidden_size"], config["head_dim"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        linear = functools.partial(nn.Linear, bias=False)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": linear(hidden, self.heads * size),
                "k_proj": linear(hidden, self.kv_heads * size),
                "v_proj": linear(hidden, self.kv_heads * size),
                "o_proj": linear(self.heads * size, hidden),
            }
        )
        if memory:
            self.self_attn["memory_gate"] = nn.Linear(hidden, self.kv_heads * size)
        wide = config["intermediate_size"]
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": linear(hidden, wide),
                "up_proj": linear(hidden, wide),
                "down_proj": linear(wide, hidden),
            }
        )
        self.input_layernorm = nn.RMSNorm(hidden, eps=config["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=config["rms_norm_eps"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x`` ``[batch, tokens, hidden]``; ``cos`` and ``sin`` ``[tokens, 1, head size / 2]``."""
        part, y = self.self_attn, self.input_layernorm(x)
        query = part["q_proj"](y).unflatten(-1, (self.heads, -1))
        key, value = part["k_proj"](y), part["v_proj"](y)
        if "memory_gate" in part:
            key, value = over_memory(key, value, part["memory_gate"](y))
        key, value = (t.unflatten(-1, (self.kv_heads, -1)) for t in (key, value))
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        out = functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        x = x + part["o_proj"](out.transpose(1, 2).flatten(2))
        part, y = self.mlp, self.post_attention_layernorm(x)
        return x + part["down_proj"](functional.silu(part["gate_proj"](y)) * part["up_proj"](y))


class Model(nn.Module):
    """The decoder; its embeddings are also its head."""

    def __init__(self, config: dict[str, Any], memory: bool) -> None:
        super().__init__()
        self.config, self.memory = config, memory
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config["vocab_size"], config["hidden_size"]),
                "layers": nn.ModuleList(Block(config, memory) for _ in range(config["num_hidden_layers"])),
                "norm": nn.RMSNorm(config["hidden_size"], eps=config["rms_norm_eps"]),
            }
        )
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=config["initializer_range"])

    def forward(self, ids: Tensor) -> Tensor:
        """What the head reads, ``[batch, tokens, hidden]``, of ``ids`` ``[batch, tokens]``."""
        half = self.config["head_dim"] // 2
        frequencies = self.config["rope_theta"] ** (-torch.arange(half, device=ids.device) / half)
        angles = (torch.arange(ids.shape[1], device=ids.device)[:, None] * frequencies).unsqueeze(1)
        x = self.model["embed_tokens"](ids)
        for layer in self.model["layers"]:
            x = run_block(layer, x, angles.cos(), angles.sin())
        return self.model["norm"](x)

    def loss(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Weighted mean of the next token's cross-entropy; ``ids`` one longer than ``weights``."""
        return head_loss(self(ids[:, :-1]), self.model["embed_tokens"].weight, ids[:, 1:], weights)


def head_loss(x: Tensor, embeddings: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the cross-entropy of ``targets`` ``[batch, tokens]``, from what the last norm gives."""
    logits = functional.linear(x, embeddings).flatten(0, 1).float()
    losses = functional.cross_entropy(logits, targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


# One graph for all layers, not one for each: six are compiled, for three lengths with and without a memory.
on_gpu = functools.partial(torch.compile, dynamic=False, disable=not torch.cuda.is_available())
run_block, head_loss = on_gpu(Block.forward), on_gpu(head_loss)


def over_memory(key: Tensor, value: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[batch, tokens, channels]`` with RAT+'s memory; the gate as logits."""
    batch, tokens, channels = key.shape
    x = torch.stack((key, value), dim=2).float().flatten(0, 1)
    starts = torch.arange(batch + 1, device=x.device, dtype=torch.int32) * tokens
    y = remember(x, gate.float().sigmoid().flatten(0, 1), starts, x.new_zeros(batch, 2, channels))
    new_key, new_value = y.view(batch, tokens, 2, channels).to(key.dtype).unbind(dim=2)
    return new_key, new_value


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of ``[batch, tokens, heads, head size]``."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class NeedleSequences(Sequences):
    """Half Python source; of the rest, copies and the eight needle tasks in equal shares, or with a focus."""

    def __init__(self, tokenizer: Tokenizer, corpus: Corpus, seed: int, focused: bool = False) -> None:
        super().__init__(tokenizer, corpus, seed)
        rest = (1 - sum(FOCUS.values())) / (len(NEEDLES) - len(FOCUS))
        self.focused = focused
        self.shares = [FOCUS.get(kind, rest) if focused else 1.0 for kind in NEEDLES]

    def sequence(self, length: int) -> tuple[Any, Any]:
        """One sequence of exactly ``length`` tokens: ids and loss weights."""
        if self.rng.random() < 1 - SYNTHETIC:
            return self.finished(self.weighted(self.corpus.lines_of(length, self.rng)), length)
        if self.rng.random() < COPIES:
            half = self.weighted(self.corpus.lines_of(length // 2, self.rng))
            return self.finished(half + half, length)
        (kind,) = self.rng.choices(list(NEEDLES), self.shares)
        return self.finished(self.needle_task(kind, length), length)

    def needle_task(self, kind: str, length: int) -> list[Any]:
        """Parts of a sequence, as the evaluation's task of that name is built; in focus, with more questions."""
        asked = max(min(length // 512, 4), 1) if self.focused and kind in FOCUS else 1
        tasks, coded = self.tasks, functools.partial(identifier, self.rng)
        if kind in ("multi_key_2", "multi_key_3"):
            coding = {"new_key": coded, "new_value": coded} if kind == "multi_key_3" else {}
            a_line = len(self.encode(tasks.strewn_needles(1, 1, 1, **coding)[0][0])[0])
            made = tasks.strewn_needles(max(int(0.85 * length / a_line) - 3 - asked, 2), asked, 1, **coding)
        else:
            many = max(length // 512, 4)
            count = {"multi_key_1": 4, "multi_query": many, "multi_value": many}.get(kind, 1)
            questions, values = 4 if kind == "multi_query" else asked, 4 if kind == "multi_value" else 1
            other = {"new_value": coded} if kind == "single_3" else {}
            made = tasks.strewn_needles(count, questions, values, **other)
        inserts, question = [self.encode(piece) for piece in made[0]], self.encode(made[1])
        if kind != "single_1":
            return self.strew(inserts, question, length)
        noise = self.encode([(NOISE, QUESTION)])
        room = length - 1 - len(question[0]) - len(inserts[0][0])
        parts = [noise] * (room // len(noise[0]))
        parts.insert(int(0.97 * self.rng.random() * len(parts)), inserts[0])
        return [*parts, question]


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Batch ``step``: ids ``[rows, context + 1]`` and the weights of all but the first."""

    def __init__(self, sequences: NeedleSequences, seed: int, contexts: list[int], batch_tokens: int) -> None:
        self.sequences, self.seed, self.contexts, self.batch_tokens = sequences, seed, contexts, batch_tokens

    def __len__(self) -> int:
        return len(self.contexts)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        self.sequences.rng.seed(f"{self.seed} {step}")
        context = self.contexts[step]
        return self.sequences.batch(max(self.batch_tokens // context, 1), context)


class Run(NamedTuple):
    """One of the six trainings.

    Attributes:
        start: the model it goes on from, None for a new one.
        first: the first step of its data, so that going on does not see the data again.
        focused: whether its needle tasks have the shares of FOCUS.
        contexts, rates: context length and learning-rate factor of every step.
    """

    name: str
    memory: bool
    start: str | None
    first: int
    focused: bool
    contexts: list[int]
    rates: list[float]


def plan(steps: int, longest: int) -> list[Run]:
    """All six; the first stage of dense and of memory has so many steps."""
    lengths = [min(context, longest) for context, _ in STAGES]
    contexts = [
        context
        for context, (_, share) in zip(lengths, STAGES, strict=True)
        for _ in range(round(share * steps))
    ]
    contexts = (contexts + contexts[-1:] * steps)[:steps]
    rates = [min(1.0, (steps - step) / (DECAY * steps)) for step in range(steps)]

    def lengths_in_turn(count: int) -> list[int]:
        return [lengths[step % len(lengths)] for step in range(count)]

    def falling(rate: float, count: int) -> list[float]:
        return [rate * (1 - step / count) for step in range(count)]

    second, conversion = (max(int(share * steps), 2) for share in (SECOND_STAGE, CONVERSION))
    # What is new is learned on short contexts; then all in turn, so that none is forgotten.
    short = second // 2
    learned = (lengths[:1] * short + lengths_in_turn(second - short), falling(SECOND_RATE, second))
    converted = (lengths_in_turn(conversion), falling(CONVERSION_RATE, conversion))
    return [
        Run("first/dense", False, None, 0, False, contexts, rates),
        Run("first/memory", True, None, 0, False, contexts, rates),
        Run("dense", False, "first/dense", steps, True, *learned),
        Run("memory", True, "first/memory", steps, True, *learned),
        Run("converted", True, "dense", steps + second, True, *converted),
        Run("continued", False, "dense", steps + second, True, *converted),
    ]


def train(run: Run, model: Model, dataset: Batches, workers: int, state: Path, deadline: float) -> bool:
    """Train in place, from ``state`` if that is there; whether it ended before the deadline."""
    decayed = [(n, p) for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    names = {name for name, _ in decayed}
    others = [p for name, p in model.named_parameters() if name not in names]
    optimizers = [
        torch.optim.Muon([p for _, p in decayed], lr=0.012, weight_decay=0.05),
        torch.optim.AdamW(others, lr=3e-3, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    device, step, log = next(model.parameters()).device, 0, []
    if state.exists():
        saved = torch.load(state, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, held in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(held)
        step, log = saved["step"], saved["log"]
    batches = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(run.first + step, len(dataset)),
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    recent: list[Tensor] = []
    for ids, weights in batches:
        for optimizer, rate in zip(optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * run.rates[step]
                if "momentum" in group:
                    group["momentum"] = 0.85 + 0.1 * min(1.0, step / 300) if run.start is None else 0.95
        with torch.autocast(device.type, torch.bfloat16):
            loss = model.loss(ids.to(device, non_blocking=True), weights.to(device, non_blocking=True))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent.append(loss.detach())  # read rarely: every read waits for the device
        step += 1
        if step % 100 == 0 or step == len(run.rates):
            log.append((step, float(torch.stack(recent).mean())))
            recent.clear()
            print(f"{run.name}: step {step} of {len(run.rates)}, loss {log[-1][1]:.3f}", flush=True)
        if step < len(run.rates) and time.monotonic() > deadline:
            held = [optimizer.state_dict() for optimizer in optimizers]
            torch.save({"model": model.state_dict(), "optimizers": held, "step": step, "log": log}, state)
            return False
    state.unlink(missing_ok=True)
    return True


def save(model: Model, folder: Path) -> None:
    """A checkpoint that vLLM and the evaluation load."""
    from safetensors.torch import save_file

    for file in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
    ):
        shutil.copy(EXAMPLE / file, folder / file)
    architecture = "RATPlusForCausalLM" if model.memory else "LlamaForCausalLM"
    (folder / "config.json").write_text(
        json.dumps(model.config | {"architectures": [architecture]}, indent=1)
    )
    save_file(
        {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in model.named_parameters()},
        folder / "model.safetensors",
    )


def begin(run: Run, config: dict[str, Any], output: Path, seed: int) -> Model:
    """The model before its first step; the gates of a memory that is added are the same for every token."""
    from safetensors.torch import load_file

    torch.manual_seed(seed)
    model = Model(config, run.memory)
    if run.start is not None:
        weights = load_file(output / run.start / "model.safetensors")
        added = model.load_state_dict(weights, strict=False).missing_keys
        spread = torch.linspace(*GATES, config["head_dim"] // 2).repeat(2 * config["num_key_value_heads"])
        for name in added:
            with torch.no_grad():
                model.get_parameter(name).copy_(spread if name.endswith("bias") else torch.zeros(()))
    return model


def main(arguments: list[str] | None = None) -> bool:
    """Train what is not there yet; whether all of it is there now."""
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("--source", type=Path, required=True, help="folder with Python files to learn from")
    parser.add_argument("--output", type=Path, required=True, help="folder of the models")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many (default: at the end)")
    parser.add_argument("--steps", type=int, default=4400, help="of the first stage (default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=131_072, help="(default: %(default)s)")
    parser.add_argument(
        "--longest", type=int, default=16384, help="cut contexts to this (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=14, help="processes that make batches (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=MODELS, default=MODELS, help="of the six (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes

    runs = plan(options.steps, options.longest)
    there = {name for name in MODELS if (options.output / name / "model.safetensors").exists()}
    todo = [run for run in runs if run.name in options.only and run.name not in there]
    for run in todo:
        if run.start is not None and run.start not in {*there, *options.only}:
            parser.error(
                f"--only: {run.name} begins as {run.start}, which {options.output} does not hold yet"
            )
    if not todo:
        print("all models are there")
        return True
    tokenizer = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))
    corpus = Corpus(tokenizer, options.source, HELD_OUT_PACKAGES)
    print(f"{len(corpus.tokens):,} tokens of source", flush=True)
    config = json.loads((EXAMPLE / "config.json").read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for run in todo:
        folder = options.output / run.name
        folder.mkdir(parents=True, exist_ok=True)
        model = begin(run, config, options.output, options.seed).to(device)
        contexts = [0] * run.first + run.contexts
        sequences = NeedleSequences(tokenizer, corpus, options.seed, run.focused)
        dataset = Batches(sequences, options.seed, contexts, options.batch_tokens)
        started = time.monotonic()
        if not train(run, model, dataset, options.workers, folder / "state.pt", deadline):
            print(f"stopped in {run.name}: the same command goes on")
            return False
        save(model, folder)
        print(f"{run.name}: done, {time.monotonic() - started:.0f} s in this call", flush=True)
    return True


if __name__ == "__main__":
    main()
