"""Chat templates of untrusted models, rendered in a sandbox with bounded time and memory.

Jinja's ImmutableSandboxedEnvironment keeps a template from reaching Python; it does not keep it
from looping or growing without end. Here the template's size, the lines it executes and all the
characters it joins are bounded, and only filters, methods and values that cannot grow are known.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

from jinja2 import TemplateError, Undefined, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from exporter.core.errors import InputRefused

MAX_TEMPLATE = 64 << 10
MAX_WORK = 8 << 20
MAX_LINES = 100_000
FILTERS = (
    *("capitalize", "default", "d", "first", "int", "last"),
    *("length", "count", "lower", "trim", "upper", "title", "selectattr"),
)
STRING_METHODS = frozenset(
    {"capitalize", "endswith", "lower", "lstrip", "rstrip", "split", "startswith", "strip"}
    | {"title", "upper"}
)


class ChatTemplate:
    """A compiled template; `render` gives the text of a conversation."""

    def __init__(self, source: str, where: str, special_tokens: Mapping[str, str]) -> None:
        """Compile `source`, found in `where`; `special_tokens` (bos_token, ...) are visible to it.

        Raises `InputRefused` on a template that is too long, malformed or asks for too much.
        """
        self._where = where
        self._tokens = dict(special_tokens)
        if len(source) > MAX_TEMPLATE:
            raise InputRefused(
                f"{where}: chat template of {len(source)} characters; expected at most {MAX_TEMPLATE}"
            )
        self._environment = _Environment()
        try:
            tree = self._environment.checked(source)
            self._template = self._environment.from_string(tree)
        except (TemplateError, RecursionError, ValueError, SyntaxError) as error:
            raise self._refused(error) from error

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """Text of `messages` (role and content, as transformers gives them to a template).

        Raises `InputRefused` when the template fails, calls ``raise_exception`` or grows too large.
        """
        self._environment.left = MAX_WORK
        try:
            with _LineLimit(MAX_LINES):
                return self._template.render(
                    messages=messages, add_generation_prompt=add_generation_prompt, **self._tokens
                )
        except (TemplateError, ArithmeticError, RecursionError) as error:
            raise self._refused(error) from error
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> InputRefused:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return InputRefused(
            f"{self._where}: the chat template cannot be used ({reason}); expected a plain one, "
            "such as the published model's"
        )


class _LineLimit:
    """Ends a template that executes more than `limit` lines (jinja compiles it to Python)."""

    def __init__(self, limit: int) -> None:
        self._left = limit

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, _frame: FrameType, _event: str, _argument: Any) -> Callable[..., Any]:
        self._left -= 1
        if self._left < 0:
            raise SecurityError("it runs without end")
        return self._trace


class _Generator(CodeGenerator):
    """Compiles ``a ~ b`` to a call that bounds the result."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 (jinja's name)
        self.write("environment.concat((")
        for part in node.nodes:
            self.write("environment.printable(")
            self.visit(part, frame)
            self.write("), ")
        self.write("))")


class _Generation(Extension):
    """Reads ``{% generation %}``, which marks the assistant's text for training, as its content."""

    tags = {"generation"}  # noqa: RUF012 (as jinja declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "-", "*", "%", "**", "//", "/"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=self.printable,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        self.filters = {name: self.filters[name] for name in FILTERS}
        # No clock: the same prompt must give the same tokens every day.
        known = {name: self.globals[name] for name in ("range", "namespace")}
        self.globals = {**known, "raise_exception": _raise_exception}
        self.left = MAX_WORK
        self.optimized = False  # Constant folding would run unbounded operations while compiling.

    def spend(self, size: int) -> None:
        """Count `size` joined characters or items; raises SecurityError when they are too many."""
        self.left -= size
        if self.left < 0:
            raise SecurityError(f"it joins more than {MAX_WORK} characters")

    def concat(self, parts: Iterable[str]) -> str:
        """Join `parts` within the bound; jinja uses it for blocks and the output."""
        kept = []
        for part in parts:
            self.spend(len(part))
            kept.append(part)
        return "".join(kept)

    @staticmethod
    def printable(value: Any) -> str:
        """Text of a plain value; the text of containers can be exponentially long."""
        if value is None or isinstance(value, (str, int, float, Undefined)):
            return str(value)
        raise SecurityError(f"it prints a {type(value).__name__}")

    def checked(self, source: str) -> nodes.Template:
        """Parse `source`; raises SecurityError on constructs that are not bounded."""
        tree = self.parse(source)
        for container in tree.find_all((nodes.List, nodes.Tuple, nodes.Dict)):
            loads = getattr(container, "ctx", "load") == "load"
            if loads and any(True for _ in container.find_all((nodes.Name, nodes.Call))):
                raise SecurityError("it builds containers out of variables")
        if next(
            tree.find_all((nodes.Import, nodes.FromImport, nodes.Include, nodes.Extends)), None
        ):
            raise SecurityError("it refers to other files")
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic on small numbers, ``+`` also on strings and lists."""
        if operator == "+" and type(left) is type(right) and isinstance(left, (str, list)):
            self.spend(len(left) + len(right))
        elif not all(isinstance(v, (int, float)) and abs(v) < 1 << 32 for v in (left, right)):
            raise SecurityError(f"it uses '{operator}' on something other than small numbers")
        elif operator == "**":
            raise SecurityError("it uses powers")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> None:
        """Leave str.format to `is_safe_attribute`, which refuses it: one width can be a gigabyte."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Jinja's rules, and of the methods of strings only those that cannot grow them."""
        if isinstance(obj, str) and attr not in STRING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message)[:200])
