"""Settings of the editing method."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.setting_types import Finite, NonNegative, Positive, Text
from pipeline.spec.part import Part
from pipeline.spec.trained import KnowledgeEditorSpec, MalmenSpec, MendSpec, SeracSpec, TrainedSpec


class ValueSpec(Part):
    """The search for a value z (MEMIT, arXiv 2210.07229, equation 16)."""

    steps: Positive | None = None
    """Forward passes at most; the last one takes no gradient step."""
    learning_rate: Annotated[Finite, Field(gt=0)] | None = None
    """Adam's learning rate."""
    weight_decay: Annotated[Finite, Field(ge=0)] | None = None
    """Weight of ||delta|| / ||h0||^2 in the loss."""
    kl_weight: Annotated[Finite, Field(ge=0)] | None = None
    """Weight of the KL divergence at the subject's last token of "{subject} is a"."""
    clamp_norm: Annotated[Finite, Field(gt=0)] | None = None
    """||delta|| is kept at or below this many times ||h0||."""
    stop_loss: Annotated[Finite, Field(ge=0)] | None = None
    """Stop an edit's search when its loss is below this."""
    stop_when_predicted: bool = False
    """Stop it also once the target is the model's argmax in every context (ENCORE, arXiv
    2502.01636): faster, and another value than the published procedure's."""
    warm_start: bool = False
    """Begin an edit's search at what an earlier edit of its relation ended with, where the same
    shard holds one: it may need fewer steps, and ends at another value than the published
    procedure's."""
    loss_layer: NonNegative | None = None
    """Block whose output the loss is read from; only the last one (null) is supported."""


MethodName = Literal[
    "memit",
    "memit_accumulated",
    "emmet",
    "pmet",
    "alphaedit",
    "rome",
    "ft",
    "ultraedit",
    "kn",
    "mend",
    "malmen",
    "ke",
    "t_patcher",
    "calinet",
    "serac",
]
GRADIENT_METHODS = frozenset({"ft", "ultraedit", "mend", "malmen", "ke", "calinet"})
"""Methods that make updates from gradients of the target's loss, without values and covariances."""
LOCATING_METHODS = frozenset({"kn"})
"""Methods that look for the neurons of every fact, and change those alone."""
PIECEWISE_METHODS = frozenset({"t_patcher"})
"""Methods that make an adapter of each edit by itself."""
ADAPTER_METHODS = PIECEWISE_METHODS | {"calinet"}
"""Methods that put modules beside the weights, which stay as they are."""
ENCODER_DECODER_METHODS = frozenset(
    {"ft", "ultraedit", "mend", "malmen", "ke", "t_patcher", "calinet", "serac"}
)
"""Methods that edit encoder-decoder models. Those in closed form and kn cannot: they write, or look
for, at a token of the prompt what the answer reads behind it in the same stream of tokens."""
MEMORY_METHODS = frozenset({"serac"})
"""Methods that keep edits in a memory and leave the model as it is."""
Wrapper = Literal["merge", "nas", "rect", "prune", "blue"]


class EmmetSpec(Part):
    """EMMET (arXiv 2403.14236)."""

    damping: Annotated[Finite, Field(ge=0)] = 0.1
    """Added to the diagonal of K^T C^-1 K, so that residuals are written nearly; 0 writes them
    exactly."""


class AlphaEditSpec(Part):
    """AlphaEdit (arXiv 2410.02355)."""

    threshold: Annotated[Finite, Field(gt=0)] = 0.02
    """Directions in which the covariance has an eigenvalue below this may be edited."""
    threshold_is: Literal["absolute", "relative"] = "absolute"
    """The threshold as it stands, which depends on the model's scale, or times the mean
    eigenvalue."""
    ridge: Annotated[Finite, Field(gt=0)] = 10.0
    """Weight of ||dW||_F^2 in the equations."""


class RomeSpec(Part):
    """ROME (arXiv 2202.05262)."""

    form: Literal["r-rome", "p-rome", "original"] = "r-rome"
    """Which keys are used: the mean over the contexts everywhere (r-ROME, arXiv 2403.07175), the
    bare prompt's everywhere (p-ROME), or the published mixture of both, which at times explodes."""
    covariance: Literal["corpus", "identity"] = "corpus"
    """C, or nothing in its place: u = k, as EasyEdit has it for Llama and Qwen
    (`mom2_adjustment: false`). What is watched for divergence is C all the same."""


class RectSpec(Part):
    """RECT (arXiv 2401.04700)."""

    keep: Annotated[Finite, Field(gt=0, le=1)] = 0.4
    """Share of an update's entries that is kept, those that change the weight the most relatively
    to what it was."""


class PruneSpec(Part):
    """PRUNE (arXiv 2405.16821)."""

    base: Annotated[Finite, Field(gt=1)] = 1.2
    """Base of the logarithm that restrains large singular values."""


class NasSpec(Part):
    """Norm anchors (arXiv 2602.02543)."""

    anchor_norm: Annotated[Finite, Field(gt=0)] | None = None
    """Length that v = W k + delta is scaled to. Null measures it before the first edit: the mean of
    ||v|| over values that are searched on the unedited model, the longest 5 % left out."""
    anchor_edits: Positive = 1000
    """Requests of the job, drawn by `seed`, that it is measured on, behind their bare prompts."""
    drop_above: Annotated[Finite, Field(gt=0)] = 2.0
    """An edit whose v is longer than this many anchors is not made."""


class FineTuningSpec(Part):
    """Fine-tuning (arXiv 2012.00363; 2202.05262)."""

    read: Literal["target_tokens", "last_prompt_token"] = "target_tokens"
    """Where a target is predicted: each token behind the ones before it (FT-M), or all of them at
    the prompt's last token (the published FT and FT-L, which cannot learn two tokens in order)."""
    norm_constraint: Annotated[Finite, Field(gt=0)] | None = None
    """FT-L: no entry of a weight goes further than this from where it was; null is FT."""
    constraint_around: Literal["unedited", "round"] = "unedited"
    """Where it was: in the unedited model, so that a whole study keeps the bound, or at the round's
    beginning, as published."""
    epochs: Positive = 25
    """Times that every edit is gone through at most."""
    learning_rate: Annotated[Finite, Field(gt=0)] = 5e-4
    """Adam's learning rate."""
    weight_decay: Annotated[Finite, Field(ge=0)] = 0.0
    """Adam's weight decay (added to the gradient)."""
    batch_size: Positive = 128
    """Edits of one step."""
    stop_loss: Annotated[Finite, Field(ge=0)] = 1e-2
    """A step is left out where its mean loss is below this, and an epoch's mean below it is the
    end."""


class UltraEditSpec(Part):
    """UltraEdit (arXiv 2505.14679)."""

    learning_rate: Annotated[Finite, Field(gt=0)] = 1e-6
    """Eta, the scale of every update."""
    ridge: Annotated[Finite, Field(gt=0)] = 1.0
    """Weight of ||dW||_F^2 in the regression."""
    variance: Literal["biased", "unbiased"] = "biased"
    """How a batch's variance enters the running one; `unbiased` counts too much, as the published
    code does."""


class KnowledgeNeuronsSpec(Part):
    """Knowledge neurons (arXiv 2104.08696)."""

    steps: Positive = 20
    """Points of the integral of every attribution."""
    quadrature: Literal["midpoint", "right", "left", "linspace"] = "midpoint"
    """Where they are between 0 and 1: (k - 1/2) / m, k / m (the paper), (k - 1) / m (its code), for
    k = 1 .. m, or m points with both ends (the code of EleutherAI and EasyEdit)."""
    measure: Literal["probability", "logit"] = "probability"
    """What is attributed of the answer's tokens."""
    threshold: Annotated[Finite, Field(gt=0, lt=1)] = 0.2
    """A prompt's neurons are those with more than this share of its largest attribution."""
    prompt_share: Annotated[Finite, Field(gt=0, le=1)] = 0.7
    """Share of a fact's prompts that must agree on a neuron, before it is adapted by steps of 0.05
    to the two numbers below."""
    fewest_neurons: NonNegative = 2
    """The share is lowered while fewer neurons are agreed on."""
    most_neurons: Positive = 5
    """The share is raised while more are."""
    paraphrases: bool = False
    """Ask `paraphrase_prompts` beside the prompt behind every context. They then are no test of the
    edit: `evaluation.probes` must not have paraphrase."""
    shared_by: Annotated[Finite, Field(ge=0, le=1)] = 0.1
    """A neuron that more than this share of the relation's other facts in the round has, too, is
    the relation's and not edited; 1 edits it all the same."""
    old_answer: Literal["target_true", "argmax"] = "target_true"
    """The answer whose neurons are looked for: the request's, or the token that the model finds
    likeliest behind the bare prompt (the published codes)."""
    operation: Literal["update", "erase", "enhance"] = "update"
    """What becomes of the neurons' values: the new answer in the place of the old one, zero, or
    twice as much; the last two write no new answer."""
    scaling: Literal["value_norm", "none"] = "value_norm"
    """Bring the answers' embeddings to the length of the value (the published code), or take them
    as they are (the paper)."""
    old_weight: Annotated[Finite, Field(ge=0)] = 1.0
    """Lambda 1: how often the old answer's embedding is taken away."""
    new_weight: Annotated[Finite, Field(ge=0)] = 8.0
    """Lambda 2: how often the new answer's is added."""

    @model_validator(mode="after")
    def _check(self) -> "KnowledgeNeuronsSpec":
        if self.fewest_neurons > self.most_neurons:
            raise ValueError(
                f"fewest_neurons: {self.fewest_neurons} is more than most_neurons"
                f" ({self.most_neurons})"
            )
        return self


class TPatcherSpec(Part):
    """T-Patcher (arXiv 2301.09785)."""

    max_patches: Positive = 5
    """Patches of an edit at most: its first wrong target tokens get one each."""
    memory_queries: NonNegative = 40_000
    """Inputs of the patched network, of `covariance.corpus` on the unedited model, at which patches
    shall stay silent; 0 remembers none."""
    watched_queries: NonNegative = 4_000
    """As many more, which are not trained on and tell when to stop."""
    update_memory: bool = True
    """Remember the inputs that patches were made at in the rounds after."""
    form: Literal["exp-topk", "margin"] = "exp-topk"
    """Losses as the mean of the exponentials of the greatest terms, or as the mean of the positive
    terms."""
    activation_threshold: Finite = 0.0
    """A patch's inner value at its own token shall be above this (l_a)."""
    activation_weight: Annotated[Finite, Field(ge=0)] = 1.0
    """Weight of l_a."""
    activation_top: Positive = 5
    """Terms of l_a at most."""
    memory_threshold: Finite = -3.0
    """Inner values at remembered queries shall be below this (l_m1, beta)."""
    memory_weight: Annotated[Finite, Field(ge=0)] = 5.0
    """Weight of l_m1."""
    difference_threshold: Finite = -3.0
    """They shall be below the value at the patch's own token plus this (l_m2, gamma)."""
    difference_weight: Annotated[Finite, Field(ge=0)] = 5.0
    """Weight of l_m2."""
    memory_top: Positive = 1000
    """Terms of l_m1 and l_m2, for each patch."""
    label_smoothing: Annotated[Finite, Field(ge=0, lt=1)] = 0.0
    """Share of the target's loss that all tokens of the vocabulary have alike."""
    value_scale: Annotated[Finite, Field(gt=0)] = 10.0
    """A patch's value begins as this times a standard normal vector; both are trained."""
    learning_rate: Annotated[Finite, Field(gt=0)] = 1e-2
    """Adam's learning rate, halved where an edit's loss is stuck at a check."""
    weight_decay: Annotated[Finite, Field(ge=0)] = 1e-2
    """Adam's weight decay (added to the gradient)."""
    clip_norm: Annotated[Finite, Field(gt=0)] = 5.0
    """Norm that an edit's gradient is cut to."""
    steps: Positive = 2000
    """Steps of an edit at most."""
    least_steps: NonNegative = 100
    """From here on an edit ends at a check at which its target is predicted and its loss on the
    watched queries gains no more."""
    check_every: Positive = 25
    """Steps between checks."""


class CaliNetSpec(Part):
    """CaliNET (arXiv 2210.03329)."""

    slots: Positive = 64
    """Neurons that a round adds beside each of `layers`."""
    gated: bool = False
    """Give every neuron a gate, act(q.g) (q.k), instead of act(q.k)."""
    epochs: Positive = 300
    """Times that every edit is gone through at most."""
    batch_size: Positive = 512
    """Edits of one step."""
    learning_rate: Annotated[Finite, Field(gt=0)] = 1e-2
    """Adam's learning rate."""
    stop_loss: Annotated[Finite, Field(ge=0)] = 2e-2
    """A step is left out where its mean loss is below this, and an epoch's mean below it is the
    end."""
    kl_weight: Annotated[Finite, Field(ge=0)] = 0.0
    """Weight of the KL divergence from the model of the round before at the tokens of "{subject} is
    a"; the published loss has no such term."""
    seed: NonNegative = 1
    """Seed of the keys and gates."""


class MethodSpec(Part):
    """How to edit. Settings left null come from the model's published defaults."""

    name: MethodName = "memit"
    """Editing method: memit, memit_accumulated, emmet, pmet, alphaedit, rome, ft, ultraedit, kn,
    mend, malmen, ke, t_patcher, calinet or serac; docs/methods.md."""
    wrappers: tuple[Wrapper, ...] = ()
    """What is put around it, in this order: merge and nas on values; rect and prune on updates;
    blue, wherever it stands, on the layers."""
    layers: Annotated[tuple[NonNegative, ...], Field(min_length=1)] | None = None
    """Blocks whose MLP down-projection is edited, ascending; of these blue takes the first and the
    last. Of a method that puts modules beside the MLP, the blocks where; null is the last one."""
    covariance_weight: Annotated[Finite, Field(gt=0)] | None = None
    """Lambda in (lambda C + K K^T): how strongly old keys are protected."""
    norm_penalty: Annotated[Finite, Field(ge=0)] = 0.0
    """Weight of ||dW||_F^2 beside lambda tr(dW C dW^T); 10 to 20 in ENCORE (arXiv 2502.01636)."""
    max_drift: Annotated[Finite, Field(gt=0)] = 2.0
    """The job has diverged when an update moves a layer's output at ordinary tokens by more than
    this many times a hidden state's length. Sound batches stay below 0.5, and ten times too many
    edits at about that."""
    contexts: tuple[Text, ...] | None = None
    """Context templates with one {} each; the first one alone in its group. Null generates them
    from the model with `seed`."""
    value: ValueSpec = ValueSpec()
    """The value search."""
    emmet: EmmetSpec = EmmetSpec()
    alphaedit: AlphaEditSpec = AlphaEditSpec()
    rome: RomeSpec = RomeSpec()
    nas: NasSpec = NasSpec()
    rect: RectSpec = RectSpec()
    prune: PruneSpec = PruneSpec()
    ft: FineTuningSpec = FineTuningSpec()
    ultraedit: UltraEditSpec = UltraEditSpec()
    kn: KnowledgeNeuronsSpec = KnowledgeNeuronsSpec()
    mend: MendSpec = MendSpec()
    malmen: MalmenSpec = MalmenSpec()
    ke: KnowledgeEditorSpec = KnowledgeEditorSpec()
    serac: SeracSpec = SeracSpec()

    t_patcher: TPatcherSpec = TPatcherSpec()
    calinet: CaliNetSpec = CaliNetSpec()

    @property
    def trained(self) -> TrainedSpec | None:
        """The method's own settings, if its editor is trained first."""
        own = getattr(self, self.name, None)
        return own if isinstance(own, TrainedSpec) else None

    def with_trained(self, own: TrainedSpec) -> "MethodSpec":
        """The same with other settings of its own."""
        return self.model_copy(update={self.name: own})

    @property
    def is_closed_form(self) -> bool:
        """Whether values are searched and solved for, with the covariance of keys."""
        others = LOCATING_METHODS | PIECEWISE_METHODS | MEMORY_METHODS
        return self.name not in GRADIENT_METHODS | others

    @property
    def is_locating(self) -> bool:
        """Whether the method looks for the neurons of every fact."""
        return self.name in LOCATING_METHODS

    @property
    def writes_targets(self) -> bool:
        """Whether the new answers are to become likelier."""
        return not (self.is_locating and self.kn.operation != "update")

    @property
    def is_piecewise(self) -> bool:
        """Whether an adapter is made of each edit by itself."""
        return self.name in PIECEWISE_METHODS

    @property
    def is_adapter(self) -> bool:
        """Whether modules are put beside the weights, which stay as they are."""
        return self.name in ADAPTER_METHODS

    @property
    def is_memory(self) -> bool:
        """Whether edits are kept in a memory."""
        return self.name in MEMORY_METHODS

    @property
    def round_table(self) -> Literal["training", "memory"]:
        """Of a method that is not in closed form, the table that each round leaves one part in."""
        return "memory" if self.is_memory else "training"

    @property
    def uses_covariance_weight(self) -> bool:
        """Whether the method weighs the covariance at all."""
        return self.is_closed_form and self.name not in ("alphaedit", "rome")

    @property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """The layers of a resolved spec, those together that one search of values is for."""
        assert self.layers is not None, "resolve the spec first"
        return tuple((layer,) for layer in self.layers) if self.is_blue else (self.layers,)

    @property
    def is_blue(self) -> bool:
        """Whether each layer has a value search of its own (BLUE, arXiv 2502.03748)."""
        return "blue" in self.wrappers

    @property
    def measures_anchor(self) -> bool:
        """Whether the norm anchor is left to be measured."""
        return "nas" in self.wrappers and self.nas.anchor_norm is None

    def with_anchor(self, norm: float) -> "MethodSpec":
        """The same with a norm anchor."""
        nas = self.nas.model_copy(update={"anchor_norm": norm})
        return self.model_copy(update={"nas": nas})

    @model_validator(mode="after")
    def _check(self) -> "MethodSpec":
        if self.layers is not None and list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must ascend without repetition, got {list(self.layers)}")
        if len(set(self.wrappers)) < len(self.wrappers):
            raise ValueError(f"wrappers: {list(self.wrappers)} names one twice")
        if "merge" in self.wrappers and self.name == "rome":
            raise ValueError("wrappers: merge has nothing to merge: rome writes one edit at a time")
        if self.is_blue and self.name == "rome":
            raise ValueError("wrappers: blue edits two layers, rome one; take another method")
        if self.is_blue and "nas" in self.wrappers:
            raise ValueError(
                "wrappers: nas scales values to one anchor, and blue searches them at two layers;"
                " leave one of them out"
            )
        if self.norm_penalty and not self.uses_covariance_weight:
            raise ValueError(
                f"norm_penalty: {self.name} has none; alphaedit.ridge is AlphaEdit's own"
            )
        if self.is_memory and self.wrappers:
            raise ValueError(f"wrappers: {self.name} changes no weight; it takes none")
        if not self.is_closed_form:
            of_values = [name for name in self.wrappers if name in ("merge", "nas", "blue")]
            if of_values:
                raise ValueError(
                    f"wrappers: {of_values[0]} changes how values are found, and {self.name} has no"
                    f" values; it takes {'none' if self.is_adapter else 'rect and prune'}"
                )
        if self.is_adapter and self.wrappers:
            raise ValueError(
                f"wrappers: {self.wrappers[0]} acts on updates of weights, and {self.name} makes"
                " none"
            )
        for context in self.contexts or ():
            if context.count("{}") != 1:
                raise ValueError(f"contexts: {context!r} must hold {{}} exactly once")
        if self.contexts is not None and not self.contexts:
            raise ValueError("contexts: an empty list; give at least '{}', or null to generate")
        return self
