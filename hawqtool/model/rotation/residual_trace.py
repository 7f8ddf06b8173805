"""Readers and writers of the residual stream, found by following it through one row of meta tensors.

What is known of a tensor is how it turns when the stream does: a sum of outputs of linears turns if all of these are
made to, the output of a norm on the stream turns if the linears behind it take over its gain. Views, sums and products
with a number per token keep that; whatever else is done to the stream or behind its norms is a reason to refuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hawqtool.errors import InputError

_SAME = frozenset(
    (
        *("to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "detach", "dropout"),
        *("view", "view_as", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as"),
        *("__getitem__", "transpose", "permute", "split", "chunk", "narrow", "index_select", "repeat"),
    )
)
"""Operations after which the last dimension holds what it held, if its size is still the same."""

_FORM = frozenset(
    ("to", "type_as", "view_as", "expand_as", "new_full", "new_ones", "new_tensor", "full_like", "ones_like")
)
"""Operations that take from all tensors, but for the first of `_SAME`, their form alone."""

_SUMS = frozenset(("add", "add_", "__iadd__", "sub", "sub_"))
_PRODUCTS = frozenset(("mul", "mul_", "__imul__", "div", "div_", "true_divide"))
_ZEROS = frozenset(("zeros_like", "zeros", "new_zeros"))


@dataclass(frozen=True)
class Sum:
    """A tensor that is a sum of linears' outputs, each times a number per token; none for zeros.

    Args:
        weights: Names of the linears' weights.
    """

    weights: frozenset[str]


@dataclass(frozen=True)
class Normed:
    """Output of a norm of the residual stream.

    Args:
        gain: Name of the norm's gain.
    """

    gain: str


Kind = Sum | Normed


@dataclass
class StreamUses:
    """What reads and writes the residual stream, by the names of parameters.

    Attributes:
        embeddings: Tables whose rows are the stream at first.
        writers: Weights of linears whose outputs are added to it.
        readers: Weight of a linear to the gain of the norm before it; None for one that reads the stream itself.
        biases: Weight of a linear to its bias, where it has one.
        plain: Weights whose outputs are used in a way that does not turn with the stream.
    """

    embeddings: set[str] = field(default_factory=set)
    writers: set[str] = field(default_factory=set)
    readers: dict[str, str | None] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    plain: set[str] = field(default_factory=set)


class NotRotatableError(InputError):
    """A model whose residual stream cannot be rotated.

    Args:
        reason: Where and why.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"--rotate: {reason}; this architecture cannot be rotated; use --rotate off")
        self.reason = reason


class ResidualTrace(TorchFunctionMode):
    """Follows the residual stream while it is active.

    Args:
        names: Identities of the parameters to their names; the tensors must outlive the trace.

    Attributes:
        uses: What was found.
        touched: Names of the parameters that took part.
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names, self.place = names, "around the blocks"
        self.uses, self.touched = StreamUses(), set[str]()
        self._kinds: dict[int, tuple[Tensor, Kind]] = {}  # tensors are held, so that ids stay theirs
        self._inside_norm = False

    def kind(self, value: Any) -> Kind | None:
        """What is known of a tensor."""
        return self._kinds[id(value)][1] if id(value) in self._kinds else None

    def mark(self, value: Tensor, kind: Kind | None) -> None:
        """Know this of a tensor from now on."""
        if kind is None:
            self._kinds.pop(id(value), None)
        else:
            self._kinds[id(value)] = (value, kind)

    def stream(self) -> Sum:
        """The residual stream, as the input of a block."""
        return Sum(frozenset(self.uses.embeddings))

    def is_stream(self, kind: Kind | None) -> bool:
        """Whether a tensor is the residual stream."""
        return isinstance(kind, Sum) and not kind.weights.isdisjoint(self.uses.embeddings)

    def write(self, value: Any) -> None:
        """Take a tensor as the residual stream: all that it is a sum of writes to it.

        Raises:
            NotRotatableError: If it is no such sum.
        """
        kind = self.kind(value)
        if not self.is_stream(kind):
            raise self._refused("what is handed on is no sum of an embedding and outputs of linears")
        assert isinstance(kind, Sum)
        self.uses.writers |= kind.weights - self.uses.embeddings

    @contextmanager
    def norms(self, module: nn.Module) -> Iterator[None]:
        """While the context lasts, norms inside a module are seen as a whole where they read the stream."""

        def before(_: nn.Module, args: Any) -> None:
            self._inside_norm = bool(args) and self.is_stream(self.kind(args[0]))

        def after(norm: nn.Module, args: Any, output: Any) -> None:
            if self._inside_norm:
                self._inside_norm = False
                self.write(args[0])
                self.mark(output, Normed(self.names[id(norm.weight)]))

        found = [m for m in module.modules() if is_gained_norm(m)]
        hooks = [hook for m in found for hook in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        self.touched |= {self.names[id(leaf)] for leaf in leaves if id(leaf) in self.names}
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if outputs and not self._inside_norm:
            self._follow(getattr(func, "__name__", "?"), (*args, *kwargs.values()), leaves, outputs)
        return result

    def _follow(self, name: str, args: Any, leaves: list[Any], outputs: list[Tensor]) -> None:
        """Know of the outputs what the inputs tell."""
        read = leaves[: name in _SAME] if name in _FORM else leaves
        known = [(leaf, kind) for leaf in read if (kind := self.kind(leaf)) is not None]
        if name in _ZEROS:
            self.mark(outputs[0], Sum(frozenset()))
        elif name == "embedding" and id(args[1]) in self.names:
            # Positions are looked up as well: all tables whose rows meet in the stream are its beginning.
            self._embed(self.names[id(args[1])], outputs[0])
        elif name == "linear" and id(args[1]) in self.names:
            self._linear(args, outputs[0])
        elif known:
            kept = self._kept(name, leaves, known)
            if kept is None:
                self._used(name, known)
            width = known[0][0].shape[-1:] if known[0][0].ndim else ()
            for output in outputs:
                same = kept is not None and output.shape[-1:] == width
                if kept is not None and not same:
                    self._used(name, known)
                self.mark(output, kept if same else None)

    def _embed(self, table: str, output: Tensor) -> None:
        self.uses.embeddings.add(table)
        self.mark(output, Sum(frozenset((table,))))

    def _linear(self, args: Any, output: Tensor) -> None:
        given, weight, *rest = args
        name, kind = self.names[id(weight)], self.kind(given)
        if rest and id(rest[0]) in self.names:
            self.uses.biases[name] = self.names[id(rest[0])]
        if isinstance(kind, Normed) or self.is_stream(kind):
            gain = kind.gain if isinstance(kind, Normed) else None
            if self.uses.readers.setdefault(name, gain) != gain:
                raise self._refused(f"{name} is behind several norms")
            if gain is None:
                self.write(given)
        elif isinstance(kind, Sum):
            self.uses.plain |= kind.weights
        # A tied head gives outputs of a matrix whose rows begin the stream.
        self.mark(output, None if name in self.uses.embeddings else Sum(frozenset((name,))))

    def _kept(self, name: str, leaves: list[Any], known: list[tuple[Tensor, Kind]]) -> Kind | None:
        """What the result of an operation is; None where nothing is known of it."""
        kinds = [kind for _, kind in known]
        if name in _SAME:
            return kinds[0] if len(known) == 1 and leaves[0] is known[0][0] else None
        others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and self.kind(leaf) is None]
        if name in _PRODUCTS and len(known) == 1:
            per_token = all(other.numel() == 1 or other.shape[-1] == 1 for other in others)
            divides = name.startswith(("div", "true")) and leaves[0] is not known[0][0]
            return kinds[0] if per_token and not divides else None
        sums = [kind.weights for kind in kinds if isinstance(kind, Sum)]
        if len(sums) < len(kinds) or name not in _SUMS:
            return None
        numbers = [leaf for leaf in leaves if isinstance(leaf, (int, float)) and leaf not in (0, 1)]
        return None if others or numbers else Sum(frozenset().union(*sums))

    def _used(self, name: str, known: list[tuple[Tensor, Kind]]) -> None:
        """Take note that tensors are used in a way that does not turn.

        Raises:
            NotRotatableError: If one of them is the stream or comes from its norm.
        """
        for _, kind in known:
            if isinstance(kind, Normed):
                # Experts that stay one tensor give the shape alone on meta.
                reader = "what stays one tensor, such as experts," if name == "empty_like" else f"{name}, no linear,"
                raise self._refused(f"{reader} reads the output of the norm of {kind.gain}")
            if self.is_stream(kind):
                what = (
                    "something else than a linear's output, such as a norm's, enters"
                    if name in _SUMS
                    else "a channel of"
                )
                raise self._refused(f"{what} the residual stream ({name})")
            self.uses.plain |= kind.weights

    def _refused(self, reason: str) -> NotRotatableError:
        return NotRotatableError(f"{self.place}: {reason}")


def is_gained_norm(module: nn.Module) -> bool:
    """Whether a module is all of a norm as far as its form tells: one vector of gains and nothing else."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    return len(parameters) == 1 and weight is not None and weight.ndim == 1
