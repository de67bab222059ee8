"""Stock chat templates of an installed TRL, each with a small tokenizer that has its family's special tokens."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BAR, BLOCK = "\uff5c", "\u2581"  # DeepSeek's tokens are written with these
DEEPSEEK = [
    f"<{BAR}{name.replace(' ', BLOCK)}{BAR}>"
    for name in (
        "begin of sentence", "end of sentence", "User", "Assistant", "tool calls begin", "tool call begin", "tool sep",
        "tool call end", "tool calls end", "tool outputs begin", "tool output begin", "tool output end",
        "tool outputs end",
    )
]  # fmt: skip
# First letters of a template's name: special tokens, the end of sequence, its beginning.
FAMILIES: dict[str, tuple[list[str], str, str | None]] = {
    "gptoss": (
        ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>"], "<|return|>", None,
    ),
    "deepseek": (DEEPSEEK, DEEPSEEK[1], DEEPSEEK[0]),
    "llama3": (
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"],
        "<|eot_id|>", "<|begin_of_text|>",
    ),
    "gemma": (["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<eos>", "<bos>"),
    "phi": (["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"], "<|endoftext|>", None),
    "cohere": (
        ["<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
         "<|SYSTEM_TOKEN|>"],
        "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>",
    ),
    "mistral": (
        ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"], "</s>", "<s>",
    ),
    "": (["<|im_start|>", "<|im_end|>", "<|endoftext|>"], "<|im_end|>", None),
}  # fmt: skip
# Of the models people use; TRL has more, most of them for pictures.
NAMES = (
    "qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "gptoss", "deepseekv3",
    "deepseek_r1_distill", "nemotron_3_nano", "phi3", "phi3_5", "llama3", "llama3_1", "llama3_2", "gemma", "gemma3",
    "cohere", "lfm2", "mistral",
)  # fmt: skip
# TRL has none of Mistral's: this one is ours. As theirs do, it moves the system turn into the last question, and
# insists on turns that alternate.
MISTRAL = (
    "{% set system = '' %}{% set rest = messages %}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% endif %}{% set at = namespace(user=true, last=-1) %}"
    "{% for m in rest %}{% if m.role == 'user' %}{% set at.last = loop.index0 %}{% endif %}{% endfor %}{{ bos_token }}"
    "{% for m in rest %}{% if m.role in ('user', 'assistant') and not m.tool_calls %}"
    "{% if (m.role == 'user') != at.user %}{{ raise_exception('roles must alternate user and assistant') }}{% endif %}"
    "{% set at.user = not at.user %}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (system if loop.index0 == at.last else '') + m.content + '[/INST]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}{{ c.function | tojson }}"
    "{{ ', ' if not loop.last }}{% endfor %}{{ ']' + eos_token }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}"
    "{% else %}{{ raise_exception('only user, assistant and tool turns') }}{% endif %}{% endfor %}"
)


def folder() -> Path | None:
    """Return where TRL keeps its templates; None where it is not installed."""
    found = importlib.util.find_spec("trl")
    return None if found is None or found.origin is None else Path(found.origin).parent / "chat_templates"


@functools.cache
def tokenizer_for(name: str) -> Any:
    """Return a byte-level tokenizer with the special tokens of a template's family, and no template."""
    special, eos, bos = next(family for start, family in FAMILIES.items() if name.startswith(start))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the user asks the assistant, and the tool answers"] * 3, trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    begins = {"bos_token": bos} if bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token=eos, clean_up_tokenization_spaces=False, **begins
    )


def stock(name: str) -> Any:
    """Return the tokenizer with a stock template of an installed TRL, or of our own for Mistral."""
    place = folder()
    assert place is not None
    tokenizer = tokenizer_for(name)
    if name == "mistral":
        tokenizer.chat_template = MISTRAL
        return tokenizer
    tokenizer.chat_template = (place / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer
