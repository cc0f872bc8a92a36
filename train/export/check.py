"""Whether an exported folder is the model it was made from: transformers gives the same ids and the same logits."""

from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shards.errors import CorruptError
from shards.tokenizer import Tokenizer
from train.model.gpt import Model

TOLERANCE = 1e-4  # of a logit: both compute in fp32, in another order
TEXTS = (
    "The",
    "In this paper we",
    "Once upon a time, there was a mill by a pond.",
    "def f(x):\n\treturn {'a': [1, 2.5e-3]}  # tabs, brackets\n",
    "  leading,   inner    and trailing spaces   ",
    "\n\n\n\r\n\r\t\t \n",
    "I'm, you're, he'll, WE'VE, they'd, it's not 'S or 'T",
    "0123456789 3.14159 1,000,000 007 ½ ⅓ ²",
    "Grüße aus Köln, naïve café, smørrebrød, Ελληνικά, русский",
    "e\u0301 and \u00e9, a\u030a and \u00e5: combined and composed",
    "日本語の文章、中文句子 한국어 문장",
    "שלום עולם, مرحبا بالعالم, नमस्ते दुनिया, สวัสดี",
    "emoji 👍🏽 👨‍👩‍👧‍👦 🇩🇪 ❤️ and flags",
    "zero\u200bwidth, soft\u00adhyphen, no\u00a0break, bom\ufeff, replacement \ufffd",
    "controls \x00 \x01 \x1b[31m \x7f \x85",
    "\U0001d54f \U00020000 \U0010ffff",
    "a" * 300,
    "word" * 60 + " " * 40 + "!" * 50,
    "https://example.org/a?b=c&d=%20#e <p class='x'>&amp;</p>",
    "| a | b |\n|---|---|\n| `c` | **d** |\n",
)


class Checked(NamedTuple):
    """The largest difference of a logit over so many texts; the ids were equal."""

    max_logit_difference: float
    texts: int


def can_check() -> bool:
    """Whether transformers is installed here."""
    return find_spec("transformers") is not None


def check(folder: Path, model: Model, tokenizer: Tokenizer, dtype: torch.dtype) -> Checked:
    """Compare `folder`, whose weights are in `dtype`, with the model it was made from.

    CorruptError when transformers gives other ids, or logits that differ by more than 1e-4.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as their_logging

    logging: Any = their_logging  # without types
    logging.set_verbosity_error()  # of texts longer than the context, which are cut here
    logging.disable_progress_bar()
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.eval()
    their_tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = deepcopy(model).cpu().eval()
    for parameter in ours.parameters():
        parameter.data = parameter.data.to(dtype).float()
    largest = 0.0
    for text in TEXTS:
        ids = tokenizer.encode(text)
        if (found := list(their_tokenizer.encode(text, add_special_tokens=False))) != ids:
            raise CorruptError(
                f"{folder}: transformers encodes {text[:40]!r} to {found[:8]}, the tokenizer gives {ids[:8]}",
                "the model would read another text than was written; nothing was published",
                "report it with the versions that millpond doctor shows",
            )
        row = torch.tensor([[tokenizer.eot, *ids][: model.config.seq_len]])
        with torch.no_grad():
            largest = max(largest, (ours(row) - theirs(row).logits).abs().max().item())
    if not largest <= TOLERANCE:
        raise CorruptError(
            f"{folder}: a logit of transformers differs by {largest:.2g}, at most {TOLERANCE:g} is rounding",
            "it would be another model; nothing was published",
            "report it with the versions that millpond doctor shows",
        )
    return Checked(largest, len(TEXTS))
