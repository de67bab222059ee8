"""Names for annotations: objects of libraries without types, and dictionaries of mixed values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# transformers and peft are imported late and left out of type checks: mypy takes each for Any, an editor for a class.
Tokenizer: TypeAlias = "PreTrainedTokenizerBase"
CausalLM: TypeAlias = "PreTrainedModel | PeftModel"
ModelConfig: TypeAlias = "PretrainedConfig"
GenerationSettings: TypeAlias = "GenerationConfig"

# Of a loader: tensors by name, (B, T) each but for what is per example; ids and records as lists.
Batch: TypeAlias = dict[str, Any]
# What Lightning saves and restores: states by name.
Checkpoint: TypeAlias = dict[str, Any]
# Of a model or an optimizer: tensors, and what goes with them, by name.
State: TypeAlias = dict[str, Any]
# Plain values by name, as JSON and YAML have them: of a file or a report; of options.
JsonObject: TypeAlias = dict[str, Any]
Settings: TypeAlias = dict[str, Any]
# The same where they are only read: a row, a config, a line of a report.
Record: TypeAlias = Mapping[str, Any]
