"""Configs: validated, frozen options of a component; no torch in this room."""

import keyword
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from condmod.errors import DefinitionError, SpecError
from condmod.spec import FrozenMapping, Path, Spec, call, freeze, nearest, parse, show

_VALIDATING: ContextVar[bool] = ContextVar("condmod_validating", default=False)
Role = Literal["modulator", "encoder"]
Kind = Literal["raw", "global", "aligned", "map", "set", "rows", "self"]
Width = Annotated[int, Field(ge=1, le=65536)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class ComponentConfig(BaseModel):
    """Options of one component. `str(config)` is spec text that gives an equal config back.

    A config is strict (True is no integer), frozen all the way down (lists become tuples,
    mappings frozen ones) and refuses unknown options. Its class belongs to exactly one
    component, which stamps itself on it as `component`.
    """

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )

    component: ClassVar[Any] = None
    role: ClassVar[Role]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for name, info in cls.model_fields.items():
            if name == "name" or keyword.iskeyword(name) or not name.isascii() or info.alias:
                raise DefinitionError(
                    f"{cls.__name__}.{name}: an option is a plain ASCII identifier, neither "
                    "'name' nor a Python keyword, and has no alias, so that a spec can say it"
                )

    @classmethod
    def component_name(cls) -> str:
        """The name of the component that these options belong to."""
        return cls.component.name if cls.component is not None else cls.__name__

    @classmethod
    def from_options(cls, options: Mapping[str, Any], spec: Spec | None = None) -> Self:
        """Validate options; `spec` is where they came from, if that is known.

        Raises:
            SpecError: which option of which component, the rule, what came, the nearest name.
        """
        token = _VALIDATING.set(True)
        try:
            return cls.model_validate(dict(options))
        except ValidationError as error:
            root = spec or Spec(cls.component_name(), FrozenMapping(options))
            lines = [_point(item["msg"], item["loc"], root, **item["ctx"]) for item in error.errors()]
            raise SpecError("\n".join(lines)) from None
        finally:
            _VALIDATING.reset(token)

    def __str__(self) -> str:
        return call(self.component_name(), self.changed())

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        changed = {}
        for name, info in type(self).model_fields.items():
            value, default = getattr(self, name), info.get_default(call_default_factory=True)
            if not (value == default or (isinstance(default, str) and show(value) == default)):
                changed[name] = value
        return changed

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_wrap_validator_function(cls._explained, handler(source))

    @classmethod
    def _explained(cls, data: Any, handler: Any) -> Self:
        """Freeze what comes in, and say what is wrong in the component's own words."""
        if isinstance(data, Mapping):
            data = {key: freeze(value) for key, value in data.items()}
        try:
            return handler(data)  # type: ignore[no-any-return]
        except ValidationError as error:
            details = [cls._restated(dict(item)) for item in error.errors(include_url=False)]
            raise ValidationError.from_exception_data(cls.component_name(), details) from None

    @classmethod
    def _restated(cls, error: dict[str, Any]) -> InitErrorDetails:
        loc, value, kind = error["loc"], error["input"], error["type"]
        owner, option, of_key = cls.component_name(), ".".join(map(str, loc)), False
        if kind == "condmod":  # a nested component has already said it
            text, of_key = error["msg"], error["ctx"]["of_key"]
        elif kind == "extra_forbidden":
            known = list(cls.model_fields)
            mend = nearest(option, known) or f"; it has {', '.join(known) or 'no options'}"
            text, of_key = f"{owner} has no option {option!r}{mend}", True
        elif kind == "missing":
            text = f"{owner} needs the option {option!r}"
        elif kind == "value_error":
            text = f"{owner}: {error['ctx']['error']}"
        else:
            rule = error["msg"].replace("Input should", "should", 1)
            text = f"{owner}: {option} {rule}; got {show(value)}"
            if isinstance(value, Spec) and not value.options:
                text += f"; a bare word names a component, so quote text: {option}='{value}'"
            elif isinstance(value, str) and kind == "literal_error":
                text += nearest(value, error["ctx"]["expected"].replace("'", " ").split())
        custom = PydanticCustomError("condmod", "{text}", {"text": text, "of_key": of_key})
        return InitErrorDetails(type=custom, loc=loc, input=value)

    @model_serializer(mode="wrap")
    def _with_name(self, handler: Any) -> dict[str, Any]:
        return {"name": self.component_name(), **handler(self)}


class ModulatorConfig(ComponentConfig):
    """Base of every modulator's options."""

    role: ClassVar[Role] = "modulator"

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        places = {"features", "condition_dim", "channel_dim", "out_features", "site"}
        if stolen := places & set(cls.model_fields):
            raise DefinitionError(
                f"{cls.__name__}.{min(stolen)}: the dimensions of a site are never options, "
                "so that one spec serves every layer of every model"
            )


class EncoderConfig(ComponentConfig):
    """Base of every encoder's options."""

    role: ClassVar[Role] = "encoder"


class NullableConfig(EncoderConfig):
    """Options of an encoder of one signal, which may be absent for some samples of a batch."""

    nullable: bool = False
    """Learn a null vector that stands in for samples whose signal is absent."""
    drop: Probability = 0.0
    """Probability of dropping a sample's signal in training, for classifier-free guidance."""

    @model_validator(mode="after")
    def _drop_needs_null(self) -> Self:
        if self.drop and not self.nullable:
            raise ValueError("drop > 0 needs nullable=True: a dropped signal becomes the null")
        return self


def is_validating() -> bool:
    """Whether a config is being validated, so that a nested spec's error is one of its own."""
    return _VALIDATING.get()


def _point(message: str, loc: Path, root: Spec, *, of_key: bool, text: str) -> str:
    """`message` with a caret under the part of `root` that `loc` leads to."""
    node: Any = root
    source, reached = root.source, ()
    for step in loc:
        if isinstance(node, str):
            node, reached = parse(node), ()
            source = node.source
        children = _children(node)
        if step in children:
            node, reached = children[step], (*reached, step)
    if source is not None:
        return f"{message}\n{source.point(reached, key=of_key)}"
    return f"{message}\n  at {'.'.join(map(str, loc))}" if len(loc) > 1 else message


def _children(node: Any) -> dict[Any, Any]:
    if isinstance(node, Spec):
        return dict(node.options)
    if isinstance(node, tuple):
        return dict(enumerate(node))
    return dict(node) if isinstance(node, Mapping) else {}
