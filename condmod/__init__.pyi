"""What `condmod` offers, for type checkers; the modules are loaded on first use."""

from condmod import functional as functional
from condmod import serialization as serialization
from condmod.bank import (
    Bank as Bank,
)
from condmod.build import (
    EncoderSpec as EncoderSpec,
)
from condmod.build import (
    ModulatorSpec as ModulatorSpec,
)
from condmod.build import (
    configure as configure,
)
from condmod.build import (
    create as create,
)
from condmod.build import (
    create_bank as create_bank,
)
from condmod.build import (
    create_encoder as create_encoder,
)
from condmod.build import (
    create_with_encoder as create_with_encoder,
)
from condmod.build import (
    describe as describe,
)
from condmod.build import (
    list_encoders as list_encoders,
)
from condmod.build import (
    list_modulators as list_modulators,
)
from condmod.build import (
    register as register,
)
from condmod.component import (
    Component as Component,
)
from condmod.component import (
    Condition as Condition,
)
from condmod.component import (
    Signal as Signal,
)
from condmod.component import (
    Site as Site,
)
from condmod.config import (
    ComponentConfig as ComponentConfig,
)
from condmod.config import (
    EncoderConfig as EncoderConfig,
)
from condmod.config import (
    ModulatorConfig as ModulatorConfig,
)
from condmod.config import (
    NullableConfig as NullableConfig,
)
from condmod.config import (
    Width as Width,
)
from condmod.encoder import (
    Encoder as Encoder,
)
from condmod.errors import (
    CheckpointError as CheckpointError,
)
from condmod.errors import (
    ConditionError as ConditionError,
)
from condmod.errors import (
    CondmodError as CondmodError,
)
from condmod.errors import (
    DefinitionError as DefinitionError,
)
from condmod.errors import (
    PluginConflictError as PluginConflictError,
)
from condmod.errors import (
    PluginError as PluginError,
)
from condmod.errors import (
    ShapeError as ShapeError,
)
from condmod.errors import (
    SiteError as SiteError,
)
from condmod.errors import (
    SpecError as SpecError,
)
from condmod.errors import (
    UnknownNameError as UnknownNameError,
)
from condmod.hooks import (
    hookimpl as hookimpl,
)
from condmod.modulator import (
    Modulator as Modulator,
)
from condmod.modulator import (
    Sublayer as Sublayer,
)
from condmod.modulator import (
    SublayerModulator as SublayerModulator,
)
from condmod.registry import (
    Registry as Registry,
)
from condmod.spec import (
    FrozenMapping as FrozenMapping,
)
from condmod.spec import (
    Spec as Spec,
)
from condmod.spec import (
    parse as parse,
)

__version__: str
__all__: list[str]
