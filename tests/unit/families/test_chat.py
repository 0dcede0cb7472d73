"""Templates render as in transformers; hostile ones are refused quickly and in little memory."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from exporter.core.errors import InputRefused
from exporter.families.prompts.chat import ChatTemplate
from tests.support.tiny import TEMPLATE

MESSAGES = [
    {
        "role": "user",
        "content": [
            {"type": "image"},
            {"type": "text", "text": "Describe {{ 7 * 7 }} <b>this</b>."},
        ],
    }
]
BLOCKS = """{% for message in messages %}
    {%- if message.role == 'user' and loop.first %}
    {{ bos_token ~ message['role'].upper() }}:
    {% else %}
    x
    {% endif %}
{% for part in message.content if part.type in ['text', 'image'] %}
    {% set ns = namespace(n=0) %}
    {% set ns.n = ns.n + 1 %}
  {{ loop.index + ns.n }} {{ part.text | default('(image)') | trim }}
    {% if loop.last %}{% break %}{% endif %}
{% endfor %}
{% endfor %}{{ '' if add_generation_prompt else 'none' }}"""


@pytest.mark.parametrize(
    "source", [TEMPLATE, BLOCKS, "{% set x %}a{{ messages|length }}{% endset %}{{ x }}"]
)
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers_does(source: str, prompt: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template(
        conversations=[MESSAGES],
        chat_template=source,
        add_generation_prompt=prompt,
        bos_token="<s>",
    )
    template = ChatTemplate(source, "chat_template.jinja", {"bos_token": "<s>"})
    assert template.render(MESSAGES, add_generation_prompt=prompt) == expected[0]


HOSTILE = {
    "endless loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "long output": "{% for i in range(9999) %}" + "a" * 999 + "{% endfor %}",
    "doubling by ~": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling lists": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling blocks": "{% set n = namespace(x='ab') %}{% for i in range(99) %}"
    "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "many large strings": "{% set n = namespace(x='a') %}{% for i in range(18) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}{% for i in range(9999) %}{% set n.y = n.x + 'b' %}{% endfor %}",
    "repeated string": "{{ 'a' * 1000000000 }}",
    "power": "{{ 10 ** 1000000000 }}",
    "squaring": "{% set n = namespace(x=999) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "percent width": "{{ '%0999999999d' % 1 }}",
    "format width": "{{ '{:>999999999}'.format(1) }}",
    "method width": "{{ 'a'.ljust(999999999) }}",
    "filter width": "{{ 'a' | center(999999999) }}",
    "big range": "{{ range(999999999) | length }}",
    "nested lists": "{% set a = [1] %}{% set b = [a, a] %}{{ b }}",
    "prints a list": "{{ messages }}",
    "prints a function": "{{ range }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "python classes": "{{ messages.__class__.__mro__ }}",
    "python globals": "{{ raise_exception.__globals__['sys'] }}",
    "changes messages": "{{ messages.append(1) }}",
    "other file": "{% include '/etc/passwd' %}",
    "other module": "{% import '/etc/passwd' as x %}{{ x }}",
    "too long": "a" * 70_000,
    "not a template": "{% if %}",
    "declines": "{{ raise_exception('only text please') }}",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_templates_are_refused(what: str) -> None:
    tracemalloc.start()
    started = time.perf_counter()
    try:
        with pytest.raises(InputRefused, match="chat template") as refused:
            ChatTemplate(HOSTILE[what], "chat_template.jinja", {}).render(
                MESSAGES, add_generation_prompt=True
            )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started < 5.0
    assert peak < 64 << 20
    assert "\n" not in str(refused.value)
    assert "chat_template.jinja" in str(refused.value)


def test_the_reason_of_the_template_reaches_the_user() -> None:
    with pytest.raises(InputRefused, match="only text please"):
        ChatTemplate(HOSTILE["declines"], "t", {}).render(MESSAGES, add_generation_prompt=True)


def test_the_bounds_hold_for_each_rendering_not_for_their_sum() -> None:
    template = ChatTemplate("{{ messages[0].content[1].text }}" * 100, "t", {})
    long = [{"role": "user", "content": [{}, {"text": "x" * 50_000}]}]
    for _ in range(5):
        assert len(template.render(long, add_generation_prompt=True)) == 5_000_000


def test_the_published_llava_template_equals_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    from tests.support.tiny_llava import TEMPLATE as LLAVA

    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "What?"}, {"type": "image"}, {"type": "image"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A heart."}]},
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
    ]
    expected = "USER: <image>\n<image>\nWhat? ASSISTANT: A heart. USER: And? ASSISTANT:"
    found = ChatTemplate(LLAVA, "here", {}).render(messages, add_generation_prompt=True)
    assert found == expected
    reference, _ = render_jinja_template(
        [messages], chat_template=LLAVA, add_generation_prompt=True
    )
    assert reference == [expected]


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | selectattr('role') }}",
        "{{ messages | selectattr('__class__.__mro__') | first }}",
        "{% for m in messages | selectattr('role', 'equalto', 'user') %}{{ m }}{% endfor %}",
    ],
)
def test_selectattr_gives_no_more_than_its_items(source: str) -> None:
    template = ChatTemplate(source, "here", {})
    messages = [{"role": "user", "content": []}]
    with pytest.raises(InputRefused, match="chat template cannot be used"):
        template.render(messages, add_generation_prompt=False)
