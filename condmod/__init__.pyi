"""What `condmod` offers, for type checkers; the modules are loaded on first use."""

from condmod import codec, functional, serialization, yaml_text
from condmod.attaching.attach import attach, detach
from condmod.attaching.conditioned import Conditioned
from condmod.attaching.planned import Plan, PlannedSite
from condmod.attaching.planning import plan
from condmod.attaching.saving import load_pretrained
from condmod.bank import Bank
from condmod.build import (
    EncoderSpec,
    ModulatorSpec,
    configure,
    create,
    create_bank,
    create_encoder,
    create_with_encoder,
    list_encoders,
    list_modulators,
    register,
)
from condmod.care.groups import parameter_groups
from condmod.care.inspecting import inspect
from condmod.care.inspection import Inspection
from condmod.care.lint import Finding, lint
from condmod.care.penalty import penalty
from condmod.codec import Codec
from condmod.component import Component
from condmod.config import (
    ComponentConfig,
    EncoderConfig,
    Kind,
    ModulatorConfig,
    NullableConfig,
    Probability,
    Width,
)
from condmod.conversion import convert
from condmod.description import Description, describe
from condmod.encoder import Encoder
from condmod.errors import (
    BackendError,
    CheckpointError,
    CodecError,
    ConditionError,
    CondmodError,
    DefinitionError,
    FoldError,
    PluginConflictError,
    PluginError,
    ShapeError,
    SiteError,
    SpecError,
    UnknownNameError,
)
from condmod.functional import set_backend, use_backend
from condmod.hooks import Document, hookimpl
from condmod.layer import Layer
from condmod.linear import generate_linear, indexed
from condmod.modulator import Modulator, Sublayer, SublayerModulator
from condmod.owned import generate_owned, modulate_owned
from condmod.parsing import parse
from condmod.registry import Registry
from condmod.schedule import Schedule
from condmod.site import Condition, Shared, Signal, Site, one_size
from condmod.spec import FrozenMapping, Spec

__version__: str

__all__ = [
    "BackendError",
    "Bank",
    "CheckpointError",
    "Codec",
    "CodecError",
    "Component",
    "ComponentConfig",
    "Condition",
    "ConditionError",
    "Conditioned",
    "CondmodError",
    "DefinitionError",
    "Description",
    "Document",
    "Encoder",
    "EncoderConfig",
    "EncoderSpec",
    "Finding",
    "FoldError",
    "FrozenMapping",
    "Inspection",
    "Kind",
    "Layer",
    "Modulator",
    "ModulatorConfig",
    "ModulatorSpec",
    "NullableConfig",
    "Plan",
    "PlannedSite",
    "PluginConflictError",
    "PluginError",
    "Probability",
    "Registry",
    "Schedule",
    "ShapeError",
    "Shared",
    "Signal",
    "Site",
    "SiteError",
    "Spec",
    "SpecError",
    "Sublayer",
    "SublayerModulator",
    "UnknownNameError",
    "Width",
    "__version__",
    "attach",
    "codec",
    "configure",
    "convert",
    "create",
    "create_bank",
    "create_encoder",
    "create_with_encoder",
    "describe",
    "detach",
    "functional",
    "generate_linear",
    "generate_owned",
    "hookimpl",
    "indexed",
    "inspect",
    "lint",
    "list_encoders",
    "list_modulators",
    "load_pretrained",
    "modulate_owned",
    "one_size",
    "parameter_groups",
    "parse",
    "penalty",
    "plan",
    "register",
    "serialization",
    "set_backend",
    "use_backend",
    "yaml_text",
]
