"""What the configs of all adapter types do alike: refuse unknown fields, and damaged weights before PEFT reads them."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig

from moe_peft.config_checks import ELSEWHERE
from moe_peft.errors import nearest
from moe_peft.saving import check_weights


@dataclass
class PluginConfig(PeftConfig):
    """A config of this package; a type adds its fields. PEFT would drop an unknown one with a warning and train the
    default; here it is an error."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        known = {f.name for f in fields(cls)}
        for key in kwargs:
            if key in ELSEWHERE and key not in known:
                raise ValueError(f"`{key}` is not a field of {cls.__name__}: {ELSEWHERE[key]}")
            if key not in known:
                raise ValueError(f"`{key}` is not a field of {cls.__name__}. {nearest(key, known)}")
        return super().__new__(cls)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """As PEFT's, which also comes first when weights are loaded: damaged ones are refused here."""
        check_weights(Path(pretrained_model_name_or_path, subfolder or ""))
        return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
