"""What quantisation costs in accuracy: `python -m benchmarks.accuracy [--model DIR] [--json FILE]`.

Every scheme of `--quantize` against bfloat16, with the CPU kernels that serve it: perplexity over
docstrings of the standard library, and how often the most probable token is the same. On the model
given (the demo model), and on a random one, whose logits are as close to each other as they get.
"""

import argparse
import ast
import json
import math
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer

from benchmarks.machine import provenance
from common.kv.pool import KvPool
from common.model.batch import Row
from common.model.decoder import Decoder, open_decoder
from common.model.load import Loaded, open_model
from common.model.quantize import SCHEMES
from common.model.weights import quantize_weights
from common.random_model import write

ROOT: Final = Path(__file__).parents[1]
DEMO: Final = ROOT / "deploy" / "demo" / "model"
MODULES: Final = ("argparse", "asyncio/events", "collections/__init__", "decimal", "pathlib")
BLOCK: Final = 16
WINDOW: Final = 256
"""Tokens that are looked at together."""
TOKENS: Final = 4096
"""Of text, at most."""


@dataclass(frozen=True, slots=True)
class Line:
    """One model under one scheme."""

    model: str
    scheme: str
    tokens: int
    perplexity: float
    perplexity_change: float
    """Relative to bfloat16."""
    top1_agreement: float
    """With bfloat16."""
    logit_error: float
    """Root mean square of the difference, over that of the logits around their mean."""


def docstrings() -> str:
    """Of a few modules of the running Python."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts: list[str] = []
    for name in MODULES:
        tree = ast.parse((library / f"{name}.py").read_text(encoding="utf-8"))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        texts += [text for text in found if text]
    return "\n\n".join(texts)


def windows(directory: Path) -> Iterator[list[int]]:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = tokenizer.encode(docstrings(), add_special_tokens=False).ids[:TOKENS]
    for first in range(0, len(ids) - WINDOW, WINDOW):
        yield ids[first : first + WINDOW]


def logits_of(decoder: Decoder, tokens: Sequence[int]) -> torch.Tensor:
    """[tokens, vocab]: a decoder tells of the last token of a row only, so each is one."""
    blocks = range(-(-len(tokens) // BLOCK))
    decoder.compute([Row(tokens, 0, blocks)], [], [])
    rows = [Row([token], i, blocks) for i, token in enumerate(tokens)]
    return decoder.compute(rows, range(len(rows)), [False] * len(rows))[1]


def all_logits(loaded: Loaded, scheme: str | None, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """[texts, tokens, vocab]"""
    weights = loaded.weights
    if scheme is not None:
        weights = quantize_weights(weights, SCHEMES[scheme])
    pool = KvPool(loaded.spec.layout(BLOCK, loaded.dtype_name), -(-WINDOW // BLOCK))
    decoder = open_decoder(loaded.spec, weights, pool, "native", torch.get_num_threads())
    return torch.stack([logits_of(decoder, tokens) for tokens in texts])


def perplexity(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    known = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])
    return math.exp(-known.mean().item())


def measure(name: str, directory: Path) -> Iterator[Line]:
    loaded = open_model(str(directory), None, "bfloat16", "cpu")
    texts = list(windows(directory))
    tokens = torch.tensor(texts)
    exact = all_logits(loaded, None, texts)
    before = perplexity(exact, tokens)
    whole = Line(name, "bfloat16", tokens.numel(), before, 0.0, 1.0, 0.0)
    yield whole
    spread = (exact - exact.mean(-1, keepdim=True)).square().mean().sqrt()
    for scheme in SCHEMES:
        logits = all_logits(loaded, scheme, texts)
        after = perplexity(logits, tokens)
        yield replace(
            whole,
            scheme=scheme,
            perplexity=after,
            perplexity_change=after / before - 1,
            top1_agreement=(logits.argmax(-1) == exact.argmax(-1)).float().mean().item(),
            logit_error=((logits - exact).square().mean().sqrt() / spread).item(),
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.accuracy", description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args(argv)
    lines: list[Line] = []
    print(f"{'model':8} {'scheme':9} {'perplexity':>10} {'change':>8} {'top-1':>7} {'logits':>7}")
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch))
        models = ((arguments.model.parent.name, arguments.model), ("random", Path(scratch)))
        for name, directory in models:
            for line in measure(name, directory):
                lines.append(line)
                print(
                    f"{line.model:8} {line.scheme:9} {line.perplexity:10.3f} "
                    f"{line.perplexity_change:+8.2%} {line.top1_agreement:7.1%} "
                    f"{line.logit_error:7.2%}",
                    flush=True,
                )
    if arguments.json:
        result = {**provenance(), "lines": [asdict(line) for line in lines]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
