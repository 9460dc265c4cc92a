"""Folders of saved models: a stub for people without `import longnet`, a model card, and opening one of the right kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longnet.model.transformer import LongNetPreTrainedModel

_STUB = "longnet_stub"
# Auto class -> model class; a folder may be opened with any head.
_CLASSES = {
    "AutoConfig": "LongNetConfig",
    "AutoModel": "LongNetModel",
    "AutoModelForCausalLM": "LongNetForCausalLM",
    "AutoModelForMaskedLM": "LongNetForMaskedLM",
    "AutoModelForSequenceClassification": "LongNetForSequenceClassification",
    "AutoModelForTokenClassification": "LongNetForTokenClassification",
}
AUTO_MAP = {auto: f"{_STUB}.{name}" for auto, name in _CLASSES.items()}
_PIPELINES = {
    "LongNetForCausalLM": "text-generation",
    "LongNetForMaskedLM": "fill-mask",
    "LongNetForSequenceClassification": "text-classification",
    "LongNetForTokenClassification": "token-classification",
}
# transformers looks for imports outside of try blocks and would advise `pip install longnet`, which is another package.
_STUB_TEXT = f'''"""Finds this model's classes in the package longnet-attention."""

try:
    from longnet.model import {", ".join(_CLASSES.values())}
except ImportError as error:
    raise ImportError("this model needs the package longnet-attention: pip install longnet-attention") from error
'''


def furnish(model: LongNetPreTrainedModel, folder: Path) -> None:
    """Write the stub, and the card unless there is one; `config.auto_map` names the stub's classes."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.auto_map = dict(AUTO_MAP)  # type: ignore[attr-defined]
    (folder / f"{_STUB}.py").write_text(_STUB_TEXT)
    card = folder / "README.md"
    if not card.exists():
        card.write_text(_card(model, folder.resolve().name))


def _card(model: LongNetPreTrainedModel, title: str) -> str:
    name = type(model).__name__
    config, pipeline = model.config, _PIPELINES.get(name, "feature-extraction")
    auto = next((a for a, c in _CLASSES.items() if c == name), "AutoModel")
    parameters = sum(p.numel() for p in model.parameters())
    direction = "both directions" if config.bidirectional else "causal"
    return f"""---
library_name: transformers
pipeline_tag: {pipeline}
tags:
- longnet
- long-context
---

# {title}

`{name}`: {parameters:,} parameters, {config.num_hidden_layers} layers of width {config.hidden_size}, {direction}, attention
of linear cost ({config.pattern()}).

```python
# pip install longnet-attention
import longnet
from transformers import AutoTokenizer, {auto}

model = {auto}.from_pretrained("{title}")
tokenizer = AutoTokenizer.from_pretrained("{title}")
```

Without `import longnet`, pass `trust_remote_code=True`: the folder carries a stub that imports the same package.

Training data, evaluation and intended use: to be written by whoever trained it.
"""


def load_whole(model: type[LongNetPreTrainedModel], path: Path, **options: Any) -> Any:
    """As `from_pretrained`, which fills what a folder lacks with random numbers: here that is an error.

    Raises:
        ValueError: no folder of a LongNet, or one of another head.
    """
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(
            f"model: expected a folder with config.json, such as OUTPUT/model of `longnet train`; got {path}"
        )
    config = json.loads(file.read_text())
    if not isinstance(config, dict) or config.get("model_type") != "longnet":
        found = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{file}: expected model_type 'longnet'; got {found!r}")
    options |= {"use_safetensors": True, "output_loading_info": True}  # never a pickle
    loaded, report = model.from_pretrained(path, **options)  # pyrefly: ignore - a pair, because of the last option
    faults = {name: sorted(map(str, report[name]))[:3] for name in report if report[name]}
    if faults:
        raise ValueError(
            f"model: expected the weights of a {model.__name__}; got {config.get('architectures')} in {path}: {faults}"
        )
    return loaded
