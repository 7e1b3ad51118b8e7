"""The abstract classes that a stage, a strategy, a number format or a kernel backend implements.

When each method is called, for one layer, in this order:

    bind    AbstractStage.bind, once a recipe (and once per set of overrides), before any weight is read
    prepare AbstractPreTransform.prepare, then .weight       the weight is transformed: W̃ with x̃ W̃ᵀ = x Wᵀ
    fit     AbstractLowRank.fit(W̃, main, branch, rank)       makes all codes, through both quantizers
    pack    AbstractPacking.pack, once a part                 the fit becomes the tensors of the checkpoint
    run     AbstractKernel.linear, or the reference in ops.py, once a forward pass

Class rule: a class is abstract or final; a final class has all the fields, an abstract one has none; no concrete method
is overridden. A strategy is a frozen attrs class whose fields are its options, so that a recipe's keys, the Python
constructor and `loraq list KIND NAME` show the same thing. No method changes its arguments in place, and every method
is a pure function of its arguments (randomness comes from `context.generator`, what is known of the layer's input from
`context.statistics`).

Axes: `out`, `inn` (the weight is (out, inn)), `rank`, `tokens`, `rows`, `columns`, `groups`. Floats are float32 on the
device of the run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from loraq.activation import Activation
    from loraq.layer import Coded, Fit, LayerContext, Lookup, Part
    from loraq.layout import Layout, Stored
    from loraq.picture_set import PictureSet
    from loraq.pipeline import LayerRecipe


class AbstractFormat(ABC):
    """A number format: a grid of values, and how a group's scale is stored. Data, found in the group `loraq.format`.

    Equal formats have equal names; a checkpoint names its formats and the loader looks them up.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The name that recipes and checkpoints use."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Width of one code."""

    @property
    @abstractmethod
    def integer(self) -> bool:
        """Whether a value is a small integer times its group's scale, so that products can run in integers."""

    @property
    @abstractmethod
    def block(self) -> int | None:
        """How many columns share a scale where the format fixes it (32 in MX), None where any number will do."""

    @abstractmethod
    def parts(self, rows: int, columns: int, group: int) -> dict[str, Part]:
        """The tensors that hold a coded (rows, columns) matrix. Called by `plan`, before any weight is read."""

    @abstractmethod
    def encode(self, values: Tensor, group: int, limits: Tensor | None = None, *, full_range: bool = False) -> Coded:
        """Round `values` (rows, columns) to the grid.

        `limits` (rows, groups) gives the magnitude that is mapped to the top of the grid, the group's largest magnitude
        where None; larger values saturate. `full_range` lets weights use codes that activations must not (-8 in int4).
        A group whose values are all zero decodes to zeros.
        """

    @abstractmethod
    def decode(self, coded: Coded) -> Tensor:
        """The values, (rows, columns) float32."""

    @abstractmethod
    def integer_view(self, coded: Coded) -> tuple[Tensor, Tensor, int]:
        """(integers, scales, group) with value = integer * scale: what an integer product multiplies.

        `integers` (rows, columns) int8 or int16, `scales` (rows, groups) float32, `group` columns a scale. Called only
        where `integer` is true; raises TypeError elsewhere.
        """

    @abstractmethod
    def points(self, coded: Coded) -> Tensor:
        """All values that codes can stand for under the scales of `coded`: (rows, groups, points) float32, ascending.

        Equal neighbours are allowed (a scale of 0, a row with fewer points than others). Every decoded value is among
        its group's points, bit for bit. Raises TypeError for a format without scales, whose values are stored plainly.
        """

    @abstractmethod
    def with_points(self, coded: Coded, indices: Tensor) -> Coded:
        """Other codes under the same scales: an element (row, column) stands for point `indices[row, column]`.

        `indices` (rows, columns) int64 count along the last axis of `points`, within the element's group.
        """


class AbstractLookup(ABC):
    """What a format adds to its contract when a code stands for one of at most 256 values times its group's scale.

    A kernel can then decode any such format by one loop.
    """

    @abstractmethod
    def lookup(self, coded: Coded) -> Lookup:
        """The codes with what they stand for: what `decode` gives, bit for bit."""


class AbstractStatistic(ABC):
    """One thing that calibration collects of a layer's input: a frozen attrs class whose fields are tensors.

    Strategies ask for statistics by class (`AbstractCalibrated`); loraq/input_statistics.py has the usual ones.
    """

    needs_sample: ClassVar[bool]
    """Whether `transformed` reads the token sample, which is then collected as well."""

    @classmethod
    @abstractmethod
    def empty(cls, inn: int, device: torch.device | str, *, sample: int) -> Self:
        """The statistic of no token, of an input of `inn` channels; `sample` tokens are kept where tokens are kept."""

    @classmethod
    @abstractmethod
    def bytes(cls, inn: int, *, sample: int) -> int:
        """How many bytes it grows to at most. Called by `plan`, before anything is collected."""

    @abstractmethod
    def observed(self, tokens: Tensor, generator: torch.Generator) -> Self:
        """The statistic with `tokens` (tokens, inn) float32 counted in. May write into its own tensors."""

    @abstractmethod
    def merged(self, other: Self) -> Self:
        """The statistic of both lots of tokens."""

    @abstractmethod
    def transformed(self, transform: Callable[[Tensor], Tensor], sample: Tensor) -> Self:
        """The statistic of x̃ = transform(x), a linear map; `sample` (tokens, inn) of x, empty unless `needs_sample`."""


class AbstractCalibrated(ABC):
    """What a strategy adds to its contract to be told of the layer's input: `context.statistics[Gram]`.

    A pre-transform is told of the input that reaches it, all other strategies of x̃. A recipe without such a strategy
    never calibrates.
    """

    @property
    @abstractmethod
    def statistics(self) -> frozenset[type[AbstractStatistic]]:
        """The statistics that this strategy, with its options, reads; empty where the options make it data-free."""


class AbstractConditional(ABC):
    """What a strategy adds to its contract when it does not go with everything."""

    @abstractmethod
    def objection(self, recipe: LayerRecipe) -> str | None:
        """Why it does not go with the rest of `recipe`, None where it does. Called by `bind`, before weights are read.

        The sentence begins with the strategy's name and ends with what would do; it becomes an InputError.
        """


class AbstractPreTransform(ABC):
    """Rewrites a layer's weight and input so that their product stays the same: `x̃ W̃ᵀ = x Wᵀ` in real arithmetic.

    Strategies of the stage `pre_transform`. What the input needs at run time, the online part, is stored beside the
    layer: the strategy's options in config.json, its tensors in the checkpoint.
    """

    @abstractmethod
    def parts(self, inn: int) -> dict[str, Part]:
        """The tensors of the online part. Called by `plan`; empty where the options say it all."""

    @abstractmethod
    def prepare(self, weight: Tensor, context: LayerContext) -> dict[str, Tensor]:
        """The online part for `weight` (out, inn). Called once a layer, before `weight` and `input`."""

    @abstractmethod
    def weight(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """W̃ (out, inn)."""

    @abstractmethod
    def input(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """x̃ (tokens, inn) from x (tokens, inn). Called in every forward pass; must be traceable by torch.compile."""


class AbstractQuantizer(ABC):
    """Turns a matrix into codes. Strategies of the stages `main_quantizer` and `branch_quantizer`."""

    @property
    @abstractmethod
    def format(self) -> AbstractFormat:
        """The format of the codes."""

    @property
    @abstractmethod
    def activation(self) -> Activation:
        """How the input of the product with these codes is rounded at run time."""

    @abstractmethod
    def group_for(self, columns: int) -> int:
        """How many columns share a scale in a matrix of `columns`."""

    @abstractmethod
    def encode(self, weight: Tensor, context: LayerContext) -> Coded:
        """The final codes of `weight` (rows, columns). Called once a matrix; may be slow and look at the context."""

    @abstractmethod
    def round(self, weight: Tensor, guess: Coded | None = None) -> Coded:
        """Codes on the same grid, quickly. Called in every step of a fit.

        `guess` is an earlier answer for a matrix close by (the step before): its scales may be taken as the start of a
        search, so that the search need not begin anew; None asks for the full search.
        """


class AbstractPlainRounding(ABC):
    """What a quantizer adds to its contract when its `round` is that of loraq/rounding.py: a fit may then fuse it."""

    @property
    @abstractmethod
    def scale(self) -> Literal["search", "amax"]:
        """How `round` finds a group's scale."""


class AbstractLowRank(ABC):
    """Makes all codes of a layer: the branch that makes up for the main quantizer's error, and the main codes."""

    has_branch: ClassVar[bool]
    """False for strategies that never make a branch; they ask for no rank."""

    @abstractmethod
    def fit(
        self, weight: Tensor, main: AbstractQuantizer, branch: AbstractQuantizer, rank: int, context: LayerContext
    ) -> Fit:
        """`weight` (out, inn) ≈ main + up @ down, with both factors rounded by `branch`. Called once a layer.

        The answer is never worse than `main.encode(weight)` alone, judged by `factors.error`: the error of the output
        where the input's Gram matrix is known, else of the weight.
        """


class AbstractPacking(ABC):
    """Lays parts out as the tensors of a checkpoint, and declares the way back. Strategies of the stage `packing`."""

    @abstractmethod
    def stored(self, part: Part) -> Stored:
        """Shape and dtype in the file. Called by `plan`; an integer dtype, so that no loader casts it."""

    @abstractmethod
    def pack(self, tensor: Tensor, part: Part) -> Tensor:
        """The tensor of the file from the tensor in memory."""

    @abstractmethod
    def unpack(self, stored: Tensor, part: Part) -> Tensor:
        """The tensor in memory from the tensor of the file, exactly."""


class AbstractStage(ABC):
    """One step of the pipeline: a kind, its own options, and the strategy it runs. Found in the group `loraq.stage`.

    The group `loraq.KIND` holds its strategies.
    """

    kind: ClassVar[str]
    """The word that a recipe writes after `kind =`."""
    repeatable: ClassVar[bool]
    """Whether a recipe may list the stage more than once."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What overrides call this stage: its kind unless the recipe says otherwise."""

    @abstractmethod
    def bind(self, recipe: LayerRecipe) -> LayerRecipe:
        """Add this stage's part to what is done to a layer. Raises InputError where it does not go together."""


class AbstractKernel(ABC):
    """A faster version of the packed linear for some devices and layouts. Found in the group `loraq.kernel`.

    The plain torch reference in loraq/ops.py runs wherever no backend takes a layer.
    """

    @property
    @abstractmethod
    def device_type(self) -> str:
        """The torch device type that the backend runs on, "cpu" or "cuda"."""

    @abstractmethod
    def refusal(self, layout: Layout) -> str | None:
        """None where the backend can run layers of this layout here, else a sentence that says why not."""

    @abstractmethod
    def linear(self, input: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, layout: Layout) -> Tensor:
        """What `ops.reference` computes, bit for bit where the arithmetic is integer."""


class AbstractMetric(ABC):
    """A figure of one picture, for `loraq evaluate`: how near it is to the original's, or how good it is by itself.

    Found in the group `loraq.metric`, as AbstractSetMetric is, which measures whole sets.
    """

    paired: ClassVar[bool]
    """Whether `measure` looks at the original's picture; where not, the original's pictures are measured as well."""
    unit: ClassVar[str]
    """What stands behind the figure in a table, such as "dB"; empty for a plain number."""
    better: ClassVar[Literal["higher", "lower"]]
    """Which way is better."""

    @abstractmethod
    def refusal(self) -> str | None:
        """None where it can measure here, else a sentence: which library, weights or data it lacks, what would do.

        Never touches the network, and loads no weights.
        """

    @abstractmethod
    def measure(self, picture: Image.Image, original: Image.Image, prompt: str) -> float:
        """The figure of `picture`, drawn for `prompt`; `original` is the original model's from the same noise.

        Both are RGB and of one size. Called once a picture, after `refusal` gave None. Finite.
        """


class AbstractSetMetric(ABC):
    """A figure of a whole set of pictures, such as FID: it has no value a picture, and so no interval.

    Found in the group `loraq.metric`. A difference of two is that of the figures.
    """

    paired: ClassVar[bool]
    """Whether `measure` looks at the original's pictures; where not, the original's set is measured as well."""
    unit: ClassVar[str]
    """What stands behind the figure in a table; empty for a plain number."""
    better: ClassVar[Literal["higher", "lower"]]
    """Which way is better."""
    enough: ClassVar[int]
    """How many pictures there should be: with fewer the figure depends on their number, and the table says so."""

    @abstractmethod
    def refusal(self) -> str | None:
        """As AbstractMetric's."""

    @abstractmethod
    def measure(self, pictures: PictureSet) -> float:
        """The figure of `pictures.drawn`. Called once a pipeline, after `refusal` gave None. Finite."""


class AbstractParticular(ABC):
    """What a metric adds to its contract when it cannot judge every set of pictures."""

    @abstractmethod
    def objection(self, pictures: PictureSet) -> str | None:
        """Why it cannot judge these, as a sentence with what would do; None where it can.

        Called after `refusal` gave None and before anything is drawn: the files of `pictures` need not be there yet.
        """


class AbstractShare(ABC):  # noqa: B024  # a mark
    """What a metric adds to its contract when a picture counts 1 or 0: the mean is a share, its interval Wilson's."""


AnyMetric = AbstractMetric | AbstractSetMetric
"""What the group `loraq.metric` holds."""
