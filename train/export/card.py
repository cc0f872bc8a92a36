"""The README.md of an exported model, which is its card on the Hub: what it is, what it learned from, what it costs."""

import json
from typing import NamedTuple

from shards.numbers import clock, count
from shards.sharing.card import plain


class CardFacts(NamedTuple):
    """What is known of a run. What is not known is left out of the card: None, 0 or "".

    `check` says what was compared; `gguf` is the file's name where the folder holds one.
    """

    name: str
    family: str
    parameters: int
    step: int
    steps: int
    tokens: int
    val_loss: float | None
    val_bpb: float | None
    tokenizer: str
    vocab_size: int
    seq_len: int
    corpora: tuple[str, ...]
    datasets: tuple[tuple[str, str], ...]
    licence: str
    hours: float
    kwh: float
    recipe: str
    check: str = ""
    gguf: str = ""


def model_card(facts: CardFacts) -> str:
    """Markdown behind YAML that the Hub reads. Names of others are quoted without anything that Markdown acts upon."""
    classes = "GPT2LMHeadModel" if facts.family == "gpt2" else "Qwen3ForCausalLM"
    rows = {
        "form": f"`{classes}`, {facts.parameters:,} parameters, context {facts.seq_len:,}",
        "tokenizer": f"{plain(facts.tokenizer)}, {facts.vocab_size:,} tokens",
        "trained on": f"{count(facts.tokens)} tokens of {', '.join(map(plain, facts.corpora))}",
        "step": f"{facts.step:,} of {facts.steps:,}",
    }
    if facts.val_loss is not None and facts.val_bpb is not None:
        rows["validation"] = f"{facts.val_loss:.4f} nats per token, {facts.val_bpb:.4f} bits per byte"
    if facts.hours:
        energy = f", {facts.kwh:.3g} kWh of the GPU" if facts.kwh else ""
        rows["training"] = f"{clock(3600 * facts.hours)}{energy}"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    sources = "\n".join(
        f"- [{repo}](https://huggingface.co/datasets/{repo}/tree/{commit}) at commit `{commit}`"
        for repo, commit in ((plain(repo), plain(commit)) for repo, commit in facts.datasets)
    )
    return f"""{_front_matter(facts)}
# {plain(facts.name)}

A language model trained from scratch by millpond. It continues text; it follows no instructions.

| | |
|---|---|
{table}

{sources + chr(10) * 2 if sources else ""}Before it was published: {facts.check}.

## Use
{_GGUF.format(file=plain(facts.gguf), name=plain(facts.name)) if facts.gguf else _TRANSFORMERS}
## Limits

It was trained on text as it is, and repeats what is in it: errors, prejudice, names. It knows nothing later than its
corpus. Nothing it says has been checked.

## Recipe

```toml
{facts.recipe.strip()}
```
"""


_TRANSFORMERS = """
```python
from transformers import pipeline

generator = pipeline("text-generation", "FOLDER_OR_REPOSITORY")
print(generator("<|endoftext|>Once upon a time", max_new_tokens=64, do_sample=True, top_k=50)[0]["generated_text"])
```

Documents were divided by the end-of-text token, so a prompt that begins a document begins with one. In
transformers, the characters `<|endoftext|>` in a text are that token; `split_special_tokens=True` keeps them as text.
vLLM (`vllm serve FOLDER`) reads such folders, and has not been tested.
"""
_GGUF = """
```
llama-cli -m {file} -no-cnv -p "Once upon a time"    # llama.cpp
ollama create {name} -f Modelfile                    # Ollama, not tested; then: ollama run {name}
```

End-of-text is put before the prompt, as it was before each document. LM Studio opens the file, not tested.
"""


def _front_matter(facts: CardFacts) -> str:
    library = "gguf" if facts.gguf else "transformers"
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation", "tags:", "- millpond"]
    if facts.datasets:
        lines += ["datasets:", *(f"- {json.dumps(repo)}" for repo, _ in facts.datasets)]
    if facts.licence:
        lines += ["license: other", f"license_name: {json.dumps(f'of the corpus: {plain(facts.licence)}')}"]
    return "\n".join([*lines, "---"])
