"""condmod: condition any network on any signal, each mechanism chosen by one short string."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "BackendError": "errors",
    "Bank": "bank",
    "CheckpointError": "errors",
    "Codec": "codec",
    "CodecError": "errors",
    "Component": "component",
    "ComponentConfig": "config",
    "Condition": "site",
    "ConditionError": "errors",
    "Conditioned": "attaching.conditioned",
    "CondmodError": "errors",
    "DefinitionError": "errors",
    "Description": "description",
    "Document": "hooks",
    "Encoder": "encoder",
    "EncoderConfig": "config",
    "EncoderSpec": "build",
    "Finding": "care.lint",
    "FoldError": "errors",
    "FrozenMapping": "spec",
    "Inspection": "care.inspection",
    "Kind": "config",
    "Layer": "layer",
    "Modulator": "modulator",
    "ModulatorConfig": "config",
    "ModulatorSpec": "build",
    "NullableConfig": "config",
    "Plan": "attaching.planned",
    "PlannedSite": "attaching.planned",
    "PluginConflictError": "errors",
    "PluginError": "errors",
    "Probability": "config",
    "Registry": "registry",
    "Schedule": "schedule",
    "ShapeError": "errors",
    "Shared": "site",
    "Signal": "site",
    "Site": "site",
    "SiteError": "errors",
    "Spec": "spec",
    "SpecError": "errors",
    "Sublayer": "modulator",
    "SublayerModulator": "modulator",
    "UnknownNameError": "errors",
    "Width": "config",
    "attach": "attaching.attach",
    "configure": "build",
    "convert": "conversion",
    "create": "build",
    "create_bank": "build",
    "create_encoder": "build",
    "create_with_encoder": "build",
    "describe": "description",
    "detach": "attaching.attach",
    "generate_linear": "linear",
    "generate_owned": "owned",
    "hookimpl": "hooks",
    "indexed": "linear",
    "lint": "care.lint",
    "inspect": "care.inspecting",
    "list_encoders": "build",
    "list_modulators": "build",
    "load_pretrained": "attaching.saving",
    "modulate_owned": "owned",
    "one_size": "site",
    "parameter_groups": "care.groups",
    "parse": "parsing",
    "penalty": "care.penalty",
    "plan": "attaching.planning",
    "register": "build",
    "set_backend": "functional",
    "use_backend": "functional",
}
_ROOMS = ("codec", "functional", "serialization", "yaml_text")

__all__ = sorted([*_HOME, *_ROOMS, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"condmod.{_HOME[name]}"), name)
    elif name in _ROOMS:
        value = import_module(f"condmod.{name}")
    else:
        raise AttributeError(f"module 'condmod' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
