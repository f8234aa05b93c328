"""The parts of a step one by one: the plain way first, then others, what the engine does last.

Each way computes the same, which is checked before it is timed: losses and gradients of the weights. Forward and
backward are timed together, ways take turns, and the median counts. Sizes are those of one packed row and one layer.

    python -m benchmarks.parts                            # a minute on a CPU, small geometry
    python -m benchmarks.parts --geometry released        # on a GPU
"""

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from datetime import date
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.random_weights import GEOMETRIES, configuration
from benchmarks.stopwatch import Stopwatch, hardware, slug, versions
from benchmarks.throughput import CLOCKS
from engine.backends.torch_optimizer import global_norm
from engine.data.prompts import IGNORED
from engine.errors import ConfigError
from engine.model import attention
from engine.model.initial import build_on_meta
from engine.model.loss import linear_cross_entropy

SAMPLES, AUDIO_SHARE, LABELLED_SHARE, TEXT_TARGETS = 5, 0.73, 0.36, 10
"""Of a row of packed voice cloning samples: two texts, two clips, the second of them labelled."""

Way = Callable[[], list[torch.Tensor]]
"""Runs once; gives what all ways of a part have to agree on."""


def parse_arguments(gpu: bool) -> argparse.Namespace:
    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    add("--geometry", choices=GEOMETRIES, default="released" if gpu else "small", help="size of the model")
    add("--tokens", type=int, default=16384 if gpu else 2048, metavar="N", help="positions of the row")
    add("--repeats", type=int, default=15 if gpu else 5, metavar="N", help="timed runs of each way, after one untimed")
    add("--clock", choices=CLOCKS, default="wall", help="of a CPU; processor: time that other programs do not lengthen")
    add("--out", type=Path, metavar="FILE", help="JSON to write; none: named after device and day in results/")
    return parser.parse_args()


class Row:
    """One packed row of random content, and the parts that work on it."""

    def __init__(self, geometry: str, tokens: int, device: torch.device):
        torch.manual_seed(0)
        self.config, self.tokens, self.device = configuration(geometry), tokens, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.is_audio = torch.rand(tokens, device=device) < AUDIO_SHARE
        self.text, self.audio = ((self.is_audio == kind).nonzero().flatten() for kind in (False, True))
        self.hidden = self.random(tokens, self.config.hidden_size)
        self.pull = self.random(tokens, self.config.hidden_size)  # gradient that comes in from above

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def weight(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(self.random(*shape) * shape[-1] ** -0.5)

    # ---------------------------------------------------------------- two FFNs

    @cached_property
    def ffns(self) -> nn.ModuleList:
        layer = build_on_meta(self.config).model.layers[0]
        parts = [layer.post_attention_layernorm, layer.mlp, layer.audio_post_attention_layernorm, layer.audio_mlp]
        made = nn.ModuleList(parts).to_empty(device=self.device).to(self.dtype)
        for parameter in made.parameters():
            nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, parameter.shape[-1] ** -0.5)
        return made

    def two_ffns(self) -> dict[str, Way]:
        norm, mlp, audio_norm, audio_mlp = self.ffns
        weights = list(self.ffns.parameters())
        order = torch.cat([self.text, self.audio])
        n = len(self.text)

        def run(function, order=None) -> list[torch.Tensor]:
            x, pull = (t if order is None else t.index_select(0, order) for t in (self.hidden, self.pull))
            x = x.detach().requires_grad_()
            loss = (function(x) * pull).sum()
            return [loss.detach(), *torch.autograd.grad(loss, weights)]

        def masked(x):
            out = x.clone()
            out[~self.is_audio] += mlp(norm(x[~self.is_audio]))
            out[self.is_audio] += audio_mlp(audio_norm(x[self.is_audio]))
            return out

        def gathered(x):
            out = x.index_add(0, self.text, mlp(norm(x.index_select(0, self.text))))
            return out.index_add(0, self.audio, audio_mlp(audio_norm(x.index_select(0, self.audio))))

        def sorted_once(x):
            text, audio = x[:n], x[n:]
            return torch.cat([text + mlp(norm(text)), audio + audio_mlp(audio_norm(audio))])

        def grouped(x):
            ends = torch.tensor([n, self.tokens], dtype=torch.int32, device=self.device)
            normed = torch.cat([norm(x[:n]), audio_norm(x[n:])])

            def product(rows, name):
                both = torch.stack([getattr(m, name).weight for m in (mlp, audio_mlp)])
                return F.grouped_mm(rows, both.transpose(1, 2), offs=ends)

            return x + product(F.silu(product(normed, "gate_proj")) * product(normed, "up_proj"), "down_proj")

        ways = {
            "boolean masks in each layer": lambda: run(masked),
            "rows gathered in each layer": lambda: run(gathered),
        }
        if hasattr(F, "grouped_mm"):
            ways["sorted once a row, grouped products"] = lambda: run(grouped, order)
        return ways | {"sorted once a row, two dense products": lambda: run(sorted_once, order)}

    # ---------------------------------------------------------------- heads and embeddings

    def codebook_heads(self) -> dict[str, Way]:
        books, width = self.config.num_codebooks, self.config.codebook_size
        weight, rows = self.weight(books * width, self.config.hidden_size), round(LABELLED_SHARE * self.tokens)
        labels = torch.randint(width, (self.tokens, books), device=self.device)
        labels[rows:] = IGNORED

        def one_by_one(hidden, labels):
            logits = F.linear(hidden, weight).float().view(len(hidden), books, width)
            pairs = zip(logits.unbind(1), labels.unbind(1), strict=True)
            losses = [F.cross_entropy(book, label, reduction="sum", ignore_index=IGNORED) for book, label in pairs]
            return torch.stack(losses).sum()

        return self._heads(weight, labels, rows, one_by_one)

    def text_head(self) -> dict[str, Way]:
        weight = self.weight(self.config.vocab_size, self.config.hidden_size)
        labels = torch.randint(self.config.vocab_size, (self.tokens, 1), device=self.device)
        labels[TEXT_TARGETS:] = IGNORED

        def plain(hidden, labels):
            logits = F.linear(hidden, weight).float()
            return F.cross_entropy(logits, labels[:, 0], reduction="sum", ignore_index=IGNORED)

        return self._heads(weight, labels, TEXT_TARGETS, plain)

    def _heads(self, weight: nn.Parameter, labels: torch.Tensor, rows: int, plain: Callable) -> dict[str, Way]:
        shares = torch.ones(labels.shape[1], device=self.device)

        def run(function, many: int | None) -> list[torch.Tensor]:
            hidden = self.hidden[:many].detach().requires_grad_()
            loss = function(hidden, labels[:many])
            of_weight, of_hidden = torch.autograd.grad(loss, [weight, hidden])
            return [loss.detach(), of_weight, of_hidden[:rows]]

        def in_chunks(hidden, labels):
            return linear_cross_entropy(hidden, weight, labels, shares)[0]

        return {
            "logits of all positions": lambda: run(plain, None),
            "of labelled positions": lambda: run(plain, rows),
            "of labelled positions, a chunk at a time, gradients at once": lambda: run(in_chunks, rows),
        }

    def codebook_embeddings(self) -> dict[str, Way]:
        books, width = self.config.num_codebooks, self.config.codebook_size
        weight = self.weight(books * width, self.config.hidden_size)
        ids = torch.randint(width, (len(self.audio), books), device=self.device)
        ids = ids + width * torch.arange(books, device=self.device)
        pull = self.pull[: len(ids)]

        def run(function) -> list[torch.Tensor]:
            loss = (function() * pull).sum()
            return [loss.detach(), *torch.autograd.grad(loss, [weight])]

        return {
            "looked up, then added up": lambda: run(lambda: F.embedding(ids, weight).sum(-2)),
            "one kernel": lambda: run(lambda: F.embedding_bag(ids, weight, mode="sum")),
        }

    # ---------------------------------------------------------------- attention

    def attention(self) -> dict[str, Way]:
        config, lengths = self.config, [len(part) for part in torch.arange(self.tokens).tensor_split(SAMPLES)]
        ends = torch.tensor([0, *lengths], device=self.device).cumsum(0).int()
        bounds = attention.SampleBounds(tuple(lengths), ends, max(lengths))
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        qkv = [self.random(self.tokens, number, config.head_dim).requires_grad_() for number in heads]
        pull, scale = self.random(self.tokens, heads[0], config.head_dim), config.head_dim**-0.5
        place = torch.arange(self.tokens, device=self.device)
        sample = torch.bucketize(place, ends[1:], right=True)
        seen = (sample[:, None] == sample) & (place[:, None] >= place)

        def run(function) -> list[torch.Tensor]:
            loss = (function(*qkv) * pull).sum()
            return [loss.detach(), *torch.autograd.grad(loss, qkv)]

        def masked(*parts):
            q, k, v = (t.transpose(0, 1)[None] for t in parts)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
            return out[0].transpose(0, 1)

        ways = {"one row, a mask of T x T": lambda: run(masked)}
        for name in reversed(attention.IMPLEMENTATIONS):
            try:
                attention.choose(name, self.device, self.dtype)
            except ConfigError:
                continue
            function = attention.IMPLEMENTATIONS[name]
            ways[f"by samples: {name}"] = lambda f=function: run(lambda *parts: f(*parts, bounds, scale))
        return ways

    # ---------------------------------------------------------------- the optimizer and Python

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        """One layer's FFNs and the text embeddings, with gradients."""
        found = [self.weight(self.config.vocab_size, self.config.hidden_size), *self.ffns.parameters()]
        found = [nn.Parameter(p.detach().float().clone()) for p in found]
        for parameter in found:
            parameter.grad = torch.randn_like(parameter)
        return found

    def adamw(self) -> dict[str, Way]:
        def way(**options) -> Way:
            parameters = [nn.Parameter(p.detach().clone()) for p in self.trained]
            optimizer = torch.optim.AdamW(parameters, lr=1e-4, **options)

            def run() -> list[torch.Tensor]:
                for parameter, same in zip(parameters, self.trained, strict=True):
                    parameter.grad = same.grad
                optimizer.step()
                return parameters

            return run

        return {
            "a parameter at a time": way(foreach=False),
            "an operation at a time, for all parameters": way(foreach=True),
            "fused": way(fused=True),
        }

    def gradient_norm(self) -> dict[str, Way]:
        gradients = [p.grad for p in self.trained]

        def in_fp64() -> list[torch.Tensor]:
            squares = [torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in gradients]
            return [torch.stack(squares).sum().sqrt().float()]

        return {
            "gradients turned into fp64": in_fp64,
            "blocks in fp32, their sum in fp64": lambda: [global_norm(gradients, self.device)],
        }

    def garbage(self) -> dict[str, Way]:
        """Python's own; nothing of it runs on a GPU, but all of it waits."""

        def frozen() -> list[torch.Tensor]:
            gc.collect()
            return []

        def everything() -> list[torch.Tensor]:
            gc.unfreeze()
            gc.collect()
            gc.freeze()
            return []

        return {"collection over all objects": everything, "over those made since training began": frozen}


PARTS = {
    "two_ffns": "Two FFNs of a layer",
    "attention": "Attention of a layer",
    "codebook_heads": "Eight codebooks' heads and losses",
    "text_head": "Text head and loss",
    "codebook_embeddings": "Codebooks' embeddings",
    "adamw": "AdamW",
    "gradient_norm": "Norm of the gradients",
    "garbage": "Garbage collection",
}


def measure(ways: dict[str, Way], stopwatch: Stopwatch, repeats: int, exact: bool) -> dict[str, list[float]]:
    """Seconds of each way, which take turns, each turn beginning with another.

    Raises:
        SystemExit: ways disagree.
    """
    names, tolerance = list(ways), 1e-4 if exact else 5e-2
    wanted = [t.detach().double().cpu().clone() for t in ways[names[0]]()]
    for name in names[1:]:
        for a, b in zip(wanted, ways[name](), strict=True):
            if not (b.detach().double().cpu() - a).norm() <= tolerance * a.norm():
                raise SystemExit(f"{name}: another result than {names[0]}")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            stopwatch.start()
            ways[name]()
            stopwatch.lap()
            seconds[name].append(stopwatch.read()[0]["step"])
    return seconds


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args = parse_arguments(device.type == "cuda")
    row, stopwatch, results = Row(args.geometry, args.tokens, device), Stopwatch(device, CLOCKS[args.clock]), {}
    print("| part | way | ms | times as fast |\n|---|---|---:|---:|")
    for part, title in PARTS.items():
        seconds = measure(getattr(row, part)(), stopwatch, args.repeats, device.type != "cuda")
        plain = next(iter(seconds.values()))
        results[part] = {}
        for name, laps in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(plain, laps, strict=True))
            results[part][name] = {"seconds": laps, "median_seconds": statistics.median(laps), "ratio": ratio}
            print(f"| {title} | {name} | {1e3 * statistics.median(laps):.3g} | {ratio:.2f} |", flush=True)
            title = ""
        gc.collect()
    machine = hardware(device)
    report = {
        "date": date.today().isoformat(), "hardware": machine, "versions": versions(),
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "check": {"passed": True},  # else `measure` had ended it
        "results": results,
    }  # fmt: skip
    name = f"parts_{args.geometry}_{slug(machine['device'])}_{report['date']}.json"
    out = args.out or Path(__file__).parent / "results" / name
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
