"""What an operation is: a frozen config whose `plan` turns a description into another and names the weight edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from llmsurgeon.checkpoint.transform import TensorFunction, WeightTransform, remove, rename
from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.families import Family
from llmsurgeon.model.layers import LayersError, layers_as_written
from llmsurgeon.model.parts import Touch
from llmsurgeon.model.spec import LayerSpec, ModelSpec
from llmsurgeon.operations.fit_memory import Text
from llmsurgeon.operations.fit_work import PartWork, Work


@dataclass(frozen=True)
class Subject:
    """A model on the table: its description, its tensor names, and what the analysis found.

    Layers in recipes are numbered as in the parent checkpoint, whatever earlier steps removed;
    `position` translates. `scores` holds the analysis' arrays, indexed by parent layer.
    """

    spec: ModelSpec
    family: Family
    names: frozenset[str]
    scores: Mapping[str, Any] = field(default_factory=dict)

    def position(self, number: int, what: str = "layer") -> int:
        """Where the parent's layer `number` is now.

        Raises:
            SurgeryError: the parent has no such layer, or an earlier step removed it.
        """
        for index, layer in enumerate(self.spec.layers):
            if number in layer.parents:
                return index
        parents = sorted(p for layer in self.spec.layers for p in layer.parents)
        raise SurgeryError(
            f"{what} {number} is not in the model: it has layers {_span(parents)}; "
            "layers are numbered as in the parent, `llmsurgeon inspect MODEL` lists them"
        )

    def positions(self, layers: Sequence[int] | None, part: Literal["attention", "ffn"], op: str) -> list[int]:
        """Where the parent layers `layers` are now; without them every layer that has a `part` of its own.

        Raises:
            SurgeryError: as `position`.
        """
        if layers is None:
            return [index for index, layer in enumerate(self.spec.layers) if getattr(layer, part) is not None]
        return [self.position(number, f"{op}: layer") for number in layers]

    def tensors(self, index: int) -> dict[str, str]:
        """Tensors of layer `index`: name inside the layer -> full name, in checkpoint order of names."""
        prefix = self.family.layer(index)
        return {name.removeprefix(prefix): name for name in sorted(self.names) if name.startswith(prefix)}

    def check(self, step: Step) -> None:
        """Raise SurgeryError if the family declines `step`, or the model has what does not bear being touched so."""
        whole = self.spec.block_transformer and self.spec.block_transformer.refusal(step.touches)
        if reason := step.declined(self.family) or whole:
            raise self.refuse(f"{step.op}: {reason}")
        for layer in self.spec.layers:
            if reason := layer.refusal(step.touches):
                raise self.refuse(f"{step.op}: layer {layer.parents[0]} {reason}")

    def refuse(self, message: str) -> SurgeryError:
        """The error for a step that does not fit, with the family named."""
        return SurgeryError(f"{self.family.model_type}: {message}")

    def score(self, name: str, why: str) -> Any:
        """A score of the analysis.

        Raises:
            SurgeryError: it was not computed.
        """
        if name not in self.scores:
            raise SurgeryError(
                f"{why} needs the score {name!r}, which is measured on text when the recipe runs; a dry run has none. "
                "Name layers or runs (in the recipe, or by flags: --help) instead, or run it"
            )
        return self.scores[name]

    def after(self, plan: Plan) -> Subject:
        """The subject that the next step sees."""
        consumed = {source for t in plan.transforms for source in t.sources}
        targets = {target for t in plan.transforms for target in t.targets}
        return replace(self, spec=plan.spec, names=frozenset((self.names - consumed) | targets))


@dataclass(frozen=True)
class Plan:
    """What a step does: the new description, the edits that get there, and remarks for the report."""

    spec: ModelSpec
    transforms: tuple[WeightTransform, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Computed:
    """A tensor made from others: `fn(*sources)`. Parts that share one `fn` over one source list are made together."""

    sources: tuple[str, ...]
    fn: TensorFunction


@dataclass(frozen=True)
class NewLayer:
    """A layer of the new model: name inside the layer -> full name of the old tensor, or how to compute it."""

    spec: LayerSpec
    tensors: Mapping[str, str | Computed]


# The share of the calibration sequences that judges what nothing was fitted to, where no step says another.
HELD_OUT = 0.125


@dataclass(frozen=True)
class Request:
    """What a step asks of the score `score`, or only tells it: with what settings it is to be measured."""

    score: str


@dataclass(frozen=True)
class Offer:
    """A way to have some neighbouring layers, or the table of tokens, for a search among such ways.

    layers: of the parent; what it is about and nobody else may touch then. None where it is about the table.
    part: of one layer, its attention or its FFN, beside which the other may be chosen freely; or all of the layers; or
        the model's table, beside which any layers may be chosen.
    name: what is left, in a few words.
    steps: what makes it so.
    rows: of the table, where it is about that.
    """

    layers: tuple[int, ...]
    part: Literal["attention", "ffn", "all", "table"]
    name: str
    steps: tuple[Step, ...]
    rows: int | None = None


class Step(BaseModel):
    """A step of a recipe: what the rest of the program asks of an operation, each with the answer of most.

    touches: what it does to a model; everything, unless it says otherwise.
    heals: it makes up for cuts, on text, behind all of them.
    trains: it does so with gradients, as the verb `heal` does.
    alone: why several processes cannot share its work, where they cannot; behind its name.
    libraries: those whose version its results depend on, beside the ones that every result depends on.
    tower_refusal: why it cannot take the text tower of a vision-language model, whose model_type is `{kind}`.
    asked_for: a search uses it only where its user names it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    touches: ClassVar[frozenset[Touch]] = frozenset(Touch)
    heals: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    alone: ClassVar[str] = ""
    libraries: ClassVar[tuple[str, ...]] = ()
    tower_refusal: ClassVar[str] = ""
    asked_for: ClassVar[bool] = False
    op: str

    # What it reads.

    def reads(self) -> tuple[str | None, ...]:
        """Files, folders and data sets that it names."""
        return ()

    def withholds(self) -> float | None:
        """The share of the calibration sequences that chooses and judges in its fit and fits nothing, if it has one."""
        return None

    def calibration_tokens(self) -> int | None:
        """How many tokens of calibration text it wants, where that is not the recipe's number."""
        return None

    def computes(self) -> bool:
        """True where something that it does follows from what the model computes on text."""
        return self.heals or bool(self.needs())

    def needs(self) -> frozenset[str]:
        """Names of the analysis scores without which the step cannot be resolved."""
        return frozenset()

    def requests(self, subject: Subject) -> Sequence[Request]:
        """What it says to the scores that it needs, and to others, which hear of it if they are measured.

        Args:
            subject: the parent as it came; no score is known yet.

        Raises:
            SurgeryError: the step does not fit the model, however the scores may be.
        """
        return [Request(name) for name in sorted(self.needs())]

    def foresee(self, subject: Subject) -> Mapping[str, Any]:
        """Stand-ins for scores that are not computed in a dry run, as far as shapes alone decide the plan."""
        return {}

    # What it refuses, before anything is measured.

    @classmethod
    def declined(cls, family: Family) -> str | None:
        """Why it cannot be done on this family, None where it can."""
        return dict(family.unsupported).get(cls.model_fields["op"].default) or cls.misfit(family)

    @staticmethod
    def misfit(family: Family) -> str | None:
        """Why a family of this shape cannot take it, whether it says so itself or not; None where it can."""
        return None

    def check_place(self, before: Sequence[Step]) -> None:
        """Raise SurgeryError where it cannot come behind these steps."""

    def check_follower(self, step: Step) -> None:
        """Raise SurgeryError where `step` cannot come behind this one."""

    def check_weights(self, subject: Subject, weights: Mapping[str, Tensor]) -> None:
        """Raise SurgeryError where the parent's weights are not such that it can take them."""

    # What it does.

    def resolve(self, subject: Subject) -> Step:
        """The step with every `auto` and `count` replaced by layers."""
        return self

    def job(self) -> Step:
        """The step without what a run that goes on from a kill may change, such as how long it lasts."""
        return self

    def plan(self, subject: Subject) -> Plan:
        """The new description and the edits.

        Raises:
            SurgeryError: the step does not fit the model.
        """
        raise NotImplementedError

    # What a search can choose of it.

    @classmethod
    def offers(cls, subject: Subject, grain: int) -> Sequence[Offer]:
        """Ways to have single layers of the parent, a few neighbours, or its table; none where nothing is to choose.

        Args:
            grain: widths that an engine likes are multiples of it.
        """
        return ()

    @classmethod
    def merged(cls, steps: Sequence[Self]) -> Sequence[Step]:
        """Steps of this operation on different layers, as few steps as can say the same."""
        return steps

    # What follows from it, once it is resolved.

    def made_ternary(self, student: Subject) -> dict[str, str]:
        """Names of the student's weights that it makes ternary, each with what has a scale: tensor, row or group."""
        return {}

    def fit_bytes(self, parent: ModelSpec, student: Subject, shapes: Mapping[str, tuple[int, ...]], text: Text) -> int:
        """About the most memory that its closed-form fit takes; `shapes` are those of the student's tensors."""
        return 0

    def fit_work(
        self, parent: ModelSpec, student: ModelSpec, passes: tuple[PartWork, PartWork], text: Text
    ) -> Work | None:
        """How much computing its closed-form fit is, None where nobody has counted it.

        passes: what the parts of the parent's and of the student's layers multiply for a token.
        """
        return None

    def minutes_given(self) -> float | None:
        """How long it takes, where it is told."""
        return None


def kept(subject: Subject, index: int) -> NewLayer:
    """Layer `index` as it is."""
    return NewLayer(subject.spec.layers[index], subject.tensors(index))


def all_kept(subject: Subject) -> list[NewLayer]:
    """Every layer as it is."""
    return [kept(subject, index) for index in range(len(subject.spec.layers))]


def assemble(subject: Subject, layers: Sequence[NewLayer], notes: Sequence[str] = ()) -> Plan:
    """The plan that turns the subject's layers into `layers`. Empty ones vanish; the rest are renumbered.

    Raises:
        SurgeryError: nothing, or no attention at all, would be left.
    """
    parted = subject.spec.block_transformer
    if parted:
        # Only empty layers go after the step that parted them: the token decoder begins where it began.
        parted = replace(parted, split=sum(not layer.spec.empty for layer in layers[: parted.split]))
    layers = [layer for layer in layers if not layer.spec.empty]
    spec = replace(subject.spec.with_layers([layer.spec for layer in layers]), block_transformer=parted)
    if subject.family.first_stays and (
        not layers or layers[0].spec.branches or layers[0].spec.parents[:1] != subject.spec.layers[0].parents[:1]
    ):
        raise subject.refuse(f"block 0 must stay as it is: {subject.family.first_stays}")
    if not spec.attentions:
        raise SurgeryError("no attention would be left: a model needs at least one to see its context")
    wanted = {
        subject.family.layer(index) + suffix: source
        for index, layer in enumerate(layers)
        for suffix, source in layer.tensors.items()
    }
    computed_from = {s for source in wanted.values() if isinstance(source, Computed) for s in source.sources}
    moved_from = {source for target, source in wanted.items() if isinstance(source, str) and source != target}
    transforms: list[WeightTransform] = []
    for target, source in wanted.items():
        if isinstance(source, Computed):
            transforms.append(WeightTransform(source.sources, (target,), source.fn))
        elif source != target or source in computed_from | moved_from:
            transforms.append(rename(source, target))
    used = computed_from | {source for source in wanted.values() if isinstance(source, str)}
    old = {name for index in range(len(subject.spec.layers)) for name in subject.tensors(index).values()}
    if unused := sorted(old - used):
        transforms.append(remove(*unused))
    return Plan(spec, tuple(transforms), tuple(notes))


def lowest(scores: Sequence[float], allowed: Sequence[int], count: int, what: str) -> tuple[int, ...]:
    """The `count` layers of `allowed` with the lowest score, in layer order.

    Raises:
        SurgeryError: fewer than `count` are allowed.
    """
    if count > len(allowed):
        raise SurgeryError(f"{what}: count {count} asked for, only {len(allowed)} layers qualify")
    return tuple(sorted(sorted(allowed, key=lambda layer: (float(scores[layer]), layer))[:count]))


def shares_of(whole: int, shares: Sequence[float], multiple_of: int) -> list[int]:
    """These shares of a number as multiples of another, each once, falling, less than the whole and more than none."""
    wanted = (round(whole * share / multiple_of) * multiple_of for share in shares)
    return sorted({number for number in wanted if 0 < number < whole}, reverse=True)


def exactly_one(step: str, **given: object) -> None:
    """Raise ValueError (a recipe error) unless exactly one of `given` is set."""
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(f"{step} takes exactly one of {', '.join(given)}")


def sorted_along(fields: Any, numbers: str) -> Any:
    """A step's fields as they are given, the list `numbers` brought into the order that `layers` will have."""
    if not isinstance(fields, Mapping) or not isinstance(fields.get(numbers), list | tuple):
        return fields
    try:
        layers = layers_as_written(fields.get("layers"))
    except LayersError:  # said of the field itself
        return fields
    if len(layers) != len(fields[numbers]):
        return fields
    order = sorted(range(len(layers)), key=layers.__getitem__)
    # A tuple: what comes out of here is strict Python, and no JSON any more.
    return {**fields, numbers: tuple(fields[numbers][place] for place in order)}


def _span(layers: Sequence[int]) -> str:
    if not layers:
        return "(none)"
    whole = list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))
