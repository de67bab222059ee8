"""Tokenizers: load one, or build one from the data when a model is trained from scratch; what they stand for."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_info

from deft_lightning.config_sizes import check_sizes
from deft_lightning.data.examples import Ints
from deft_lightning.data.noise.vocabulary import Vocabulary
from deft_lightning.errors import UserError, reason_of
from deft_lightning.hashing import key
from deft_lightning.shipped_models import model_path
from deft_lightning.terminal import visible
from deft_lightning.trust import check_tokenizer, read_settings

PAD, END = "<|pad|>", "<|end|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")

# One token a turn marker: a conversation costs two tokens a message beside its text.
COMPACT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% if message['reasoning_content'] %}"
    "{{ '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(texts: Iterable[str], size: int) -> Any:
    """Train a byte-level BPE tokenizer with a compact chat template.

    Args:
        texts: What it is trained on; the order does not change the merges.
        size: Vocabulary size. At or below the 262 entries of bytes and special tokens nothing is merged: one token a
            byte, as tasks on letters want it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[PAD, END, *ROLE_TOKENS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )
    fast.add_special_tokens({"additional_special_tokens": list(ROLE_TOKENS)})
    fast.chat_template = COMPACT
    return fast


def load_tokenizer(name: str, trust: bool = False) -> Any:
    """Load a tokenizer by hub id or folder; give it a padding token if it has none.

    Args:
        name: Hub id or folder.
        trust: Code of the tokenizer's own may run.

    Raises:
        UserError: It does not exist, wants to run code, or has no end-of-sequence token to stop generation at.
    """
    from transformers import AutoTokenizer

    folder = model_path(name)
    if not folder.is_dir() and name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such folder (--data.tokenizer, or --model.pretrained which it follows)")
    check_tokenizer(name, trust)
    # transformers makes the config of a model for the sake of its tokenizer's class.
    check_sizes(read_settings(name, "config.json"), f"{name}: config.json: ", "--data.tokenizer, or --model.pretrained")
    try:
        # Never None: transformers asks on standard input then.
        tokenizer = AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else name, trust_remote_code=trust)
    except Exception as error:  # the tokenizers library raises Exception itself; a malformed config, any kind
        reason = reason_of(error)
        raise UserError(f"{name}: cannot load its tokenizer: {reason} (--data.tokenizer)") from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{name}: its tokenizer is not a fast one, so token offsets are unknown (--data.tokenizer)")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: its tokenizer has no end-of-sequence token (--data.tokenizer)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def add_tokens(tokenizer: Any, names: Sequence[str]) -> tuple[int, ...]:
    """Let a tokenizer read some spellings as one token each; return the ids of those that it did not know.

    They are added the way models add their own tags of thoughts and tools: a text may spell them, and a decoded answer
    shows them, which it does not for special tokens.

    Args:
        tokenizer: Changed in place.
        names: Spellings.
    """
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    new = [name for name in dict.fromkeys(names) if name not in known]
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in new])
    ids = tuple(int(token) for token in tokenizer.convert_tokens_to_ids(new))
    markers.cache_clear()
    if ids:
        told = ", ".join(f"{name} ({token})" for name, token in zip(new, ids, strict=True))
        rank_zero_info(visible(f"tokenizer: added {told}"))
    if len(new) < len(set(names)):
        old = ", ".join(dict.fromkeys(name for name in names if name in known))
        rank_zero_info(visible(f"tokenizer: {old} is known already, and is not added (--model.add_tokens)"))
    return ids


@functools.lru_cache(maxsize=8)
def markers(tokenizer: Any) -> Ints:
    """Return the tokens that stand outside the text: special ones, and others that were added to the vocabulary."""
    return np.array(sorted({*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}), dtype=np.int64)


def vocabulary(tokenizer: Any, counts: Ints) -> Vocabulary:
    """Return what token noise may draw from: every token that is not special, its count as a label, its spelling.

    Args:
        tokenizer: The tokenizer.
        counts: Shape ``(V,)``: how often each token is a label of the training split.
    """
    ids = np.setdiff1d(np.arange(len(tokenizer)), markers(tokenizer))
    return Vocabulary(ids, counts[ids], tuple(tokenizer.convert_ids_to_tokens(ids.tolist())))


def tokenizer_identity(tokenizer: Any) -> str:
    """Return a hash of everything about a tokenizer that changes tokens or labels."""
    # A version, how its author truncated and padded, which means nothing here, and then everything else.
    parts = (
        tokenizer.backend_tokenizer.to_str().partition('"added_tokens"')[2],
        tokenizer.chat_template,
        sorted(tokenizer.special_tokens_map.items()),
    )
    return f"{key(*parts):032x}"
