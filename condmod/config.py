"""Configs: validated, frozen options of a component; no torch in this room."""

import keyword
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

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
from condmod.parsing import parse
from condmod.spec import FrozenMapping, Path, Spec, call, freeze, nearest, show

_VALIDATING: ContextVar[bool] = ContextVar("condmod_validating", default=False)
Role = Literal["modulator", "encoder"]
Kind = Literal["raw", "global", "aligned", "map", "set", "rows", "self"]
Width = Annotated[int, Field(ge=1, le=65536)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


def _unfit(annotation: Any) -> str:
    """The name of a container in `annotation` that can change or that no spec can say."""
    for kind in (list, dict, set, frozenset):
        if kind in (annotation, get_origin(annotation)):
            return kind.__name__
    return next(filter(None, map(_unfit, get_args(annotation))), "")


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
            aliases = (info.alias, info.validation_alias, info.serialization_alias)
            if name == "name" or keyword.iskeyword(name) or not name.isascii() or any(aliases):
                raise DefinitionError(
                    f"{cls.__name__}.{name}: an option is a plain ASCII identifier, neither "
                    "'name' nor a Python keyword, and has no alias, so that a spec can say it"
                )
            if unfit := _unfit(info.annotation):
                raise DefinitionError(
                    f"{cls.__name__}.{name}: options are frozen all the way down, so {unfit} is "
                    "no option's type; use tuple for a list or set, FrozenMapping for a dict"
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
            lines = [
                _point(item["msg"], item["loc"], root, of_key=item["ctx"]["of_key"])
                for item in error.errors(include_url=False)
            ]
            raise SpecError("\n".join(lines)) from None
        finally:
            _VALIDATING.reset(token)

    @model_validator(mode="after")
    def _can_be_said(self) -> Self:
        """Refuse options whose text no spec may be: too long, too deep, an integer too large."""
        if self.component is not None:
            try:
                parse(str(self))
            except SpecError as error:
                rule = str(error).partition("\n")[0]
                raise ValueError(f"the text of these options is no spec: {rule}") from None
        return self

    def __str__(self) -> str:
        return call(self.component_name(), self.changed())

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        changed = {}
        for name, info in type(self).model_fields.items():
            value, default = getattr(self, name), info.get_default(call_default_factory=True)
            of_text = isinstance(value, ComponentConfig) and str(value) == default
            if not (value == default or of_text):
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
            mistakes = _by_place(_unless_misspelt(error.errors(include_url=False)), data)
            details = [cls._restated(place, items) for place, items in mistakes.items()]
            raise ValidationError.from_exception_data(cls.component_name(), details) from None

    @classmethod
    def _restated(cls, loc: Path, errors: Sequence[Mapping[str, Any]]) -> InitErrorDetails:
        error = errors[0]
        value, kind, of_key = error["input"], error["type"], False
        owner, option = cls.component_name(), ".".join(map(str, loc))
        if loc[-1:] == ("[key]",):
            option = f"a key of {'.'.join(map(str, loc[:-2]))}"
        if kind == "condmod":  # a nested component has already said it
            text, of_key = error["msg"], error["ctx"]["of_key"]
        elif kind == "extra_forbidden":
            known = list(cls.model_fields)
            mend = nearest(option, known) or f"; it has {', '.join(known) or 'no options'}"
            text, of_key = f"{owner} has no option {option!r}{mend}", True
        elif kind == "missing":
            text = f"{owner} needs the option {option!r}"
        elif kind in {"value_error", "assertion_error"}:
            text = f"{owner}: {error['ctx']['error']}"
        else:
            rules = dict.fromkeys(item["msg"].removeprefix("Input should be ") for item in errors)
            should = "should be " if error["msg"].startswith("Input should be ") else ""
            text = f"{owner}: {option} {should}{' or '.join(rules)}; got {show(value):.80}"
            wants_text = {item["type"] for item in errors} & {"string_type", "literal_error"}
            if wants_text and isinstance(value, Spec) and not value.options:
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


def _point(message: str, loc: Path, root: Spec, *, of_key: bool) -> str:
    """`message` with a caret under the part of `root` that `loc` leads to."""
    node: Any = root
    reached: Path = ()
    source = root.source
    for step in loc:
        if step == "[key]":
            break
        if isinstance(node, str):
            node, reached = parse(node), ()
            source = node.source
        children = _children(node)
        if step in children:
            node, reached = children[step], (*reached, step)
    if source is not None:
        return f"{message}\n{source.point(reached, key=of_key)}"
    return f"{message}\n  at {'.'.join(map(str, loc))}" if len(loc) > 1 else message


def _unless_misspelt(errors: Sequence[Any]) -> list[Any]:
    """Errors without the options that are missing because their names are misspelt."""
    unknown = [error["loc"] for error in errors if error["type"] == "extra_forbidden"]
    return [
        error
        for error in errors
        if error["type"] != "missing"
        or not any(
            loc[:-1] == error["loc"][:-1] and nearest(str(loc[-1]), [str(error["loc"][-1])])
            for loc in unknown
        )
    ]


def _by_place(errors: Sequence[Any], data: Any) -> dict[Path, list[Any]]:
    """Pydantic's errors by the option they are about: a union reports each of its members."""
    places: dict[Path, list[Any]] = {}
    unions: set[Path] = set()
    for error in errors:
        place: Path = error["loc"]
        if error["type"] not in {"condmod", "missing"} and place[-1:] != ("[key]",):
            place = _within(place, data)
        places.setdefault(place, []).append(error)
        if place != error["loc"]:
            unions.add(place)
    return {
        place: items
        for place, items in places.items()
        if place not in unions
        or not any(other != place and other[: len(place)] == place for other in places)
    }


def _within(loc: Path, data: Any) -> Path:
    """`loc` without the steps that lead nowhere in `data`: the names of a union's members."""
    place: Path = ()
    for step in loc:
        if not place or step in _children(data):
            place, data = (*place, step), _children(data).get(step)
    return place


def _children(node: Any) -> dict[Any, Any]:
    if isinstance(node, Spec):
        return dict(node.options)
    if isinstance(node, tuple):
        return dict(enumerate(node))
    return dict(node) if isinstance(node, Mapping) else {}
